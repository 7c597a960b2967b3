"""The gain report against the first optimiser step: predicted and measured change of every layer's output.

    .venv/bin/python scripts/bench_gain.py

The demo model, its data and a real adapter: for each start, one step of Adam and one of SGD on a batch of prompts and
completions, and the root-mean-square change of each layer's output on the inputs of *other* rows. The prediction knows
the factors and the second moment of the layer's inputs over the whole data, but no gradient; that of SGD also knows the
gradient's norm, to which its step is proportional. "with G" knows the gradient itself.

For every start and optimiser: the median over layers of predicted / measured with the middle 80 %, the same for all
layers together (root of the sums of squares), and the gain relative to LoRA's own start, predicted and measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import smartinit as si
from smartinit import demo
from smartinit.adapters.attach import write_factors
from smartinit.data import Sampling, read_batches
from smartinit.methods import available_methods
from smartinit.planning.first_step import predict_step
from smartinit.planning.moment import SecondMoment
from smartinit.statistics.gram import GramStatistic

if TYPE_CHECKING:
    from torch import Tensor, nn

    from smartinit.factors import Factors

METHODS = ("kaiming", "gaussian", "eva", "pissa")
OPTIMISERS: dict[str, Any] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
BOUND = 0.1
IGNORED = -100  # label of tokens that do not count


def main() -> int:
    """Run every start with both optimisers; exit code 1 if a median is more than 10 % off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=sorted(available_methods()))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    bench = Bench(options)
    rows = [bench.row(method, optimiser) for optimiser in OPTIMISERS for method in options.methods]
    for row in rows:
        reference = next(r for r in rows if (r["method"], r["optimiser"]) == ("kaiming", row["optimiser"]))
        for kind in ("predicted", "measured"):
            ratios = [a / b for a, b in zip(row[kind], reference[kind], strict=True)]
            row[f"gain_{kind}"] = statistics.median(ratios)
    print(f"{len(bench.layers)} layers, rank {options.rank}, scaling {bench.scaling:g}; predicted / measured")
    print("start     optimiser  median  middle 80 %   together  with G   gain predicted  measured")
    for row in rows:
        low, high = row["middle"]
        print(
            f"{row['method']:<10}{row['optimiser']:<9}{row['median']:8.3f}  {low:.3f}–{high:.3f} {row['together']:9.3f}"
            f"{row['with_gradient']:9.3f}{row['gain_predicted']:15.2f}×{row['gain_measured']:9.2f}×"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    worst = max(abs(row["median"] - 1) for row in rows if row["optimiser"] == "adam")
    print(f"Adam: every median is within {100 * worst:.1f} % (goal: {100 * BOUND:.0f} %)")
    return int(worst > BOUND)


class Bench:
    """The model, its layers' inputs, and one batch's gradients."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.scaling = options.alpha / options.rank
        self.model = AutoModelForCausalLM.from_pretrained(demo.model_folder()).float().eval()
        self.layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        }
        tokenizer = AutoTokenizer.from_pretrained(demo.model_folder())
        sampling = Sampling(batch_size=options.batch_size, max_length=128, seed=options.seed)
        self.training, *others = read_batches(demo.data_file(), tokenizer, sampling)
        inputs = self._inputs(others)
        self.statistics = {name: _statistic(rows) for name, rows in inputs.items()}
        self.moments = {name: SecondMoment.of(statistic) for name, statistic in self.statistics.items()}
        self.rows = {name: rows[:: max(1, len(rows) // 2048)] for name, rows in inputs.items()}
        _loss(self.model, self.training).backward()
        self.gradients = {name: _known(layer.weight.grad).clone() for name, layer in self.layers.items()}
        self.model.zero_grad()

    def row(self, name: str, optimiser: str) -> dict[str, Any]:
        """Predictions and measurements of one start."""
        factors = self._factors(name)
        measured = self._measured(factors, optimiser)
        predicted, exact = {}, {}
        for layer, pair in factors.items():
            gradient = self.gradients[layer]
            known = (pair, self.scaling, self.moments[layer], self.options.lr)
            predicted[layer] = predict_step(*known, optimiser=optimiser, gradient=_norm_for(optimiser, gradient))
            exact[layer] = predict_step(*known, optimiser=optimiser, gradient=gradient)
        ratios = [predicted[layer] / measured[layer] for layer in factors]
        cuts = statistics.quantiles(ratios, n=10)
        return {
            "method": name,
            "optimiser": optimiser,
            "median": statistics.median(ratios),
            "middle": (cuts[0], cuts[-1]),
            "together": math.hypot(*predicted.values()) / math.hypot(*measured.values()),
            "with_gradient": statistics.median(exact[layer] / measured[layer] for layer in factors),
            "predicted": list(predicted.values()),
            "measured": [measured[layer] for layer in factors],
        }

    def _factors(self, name: str) -> dict[str, Factors]:
        method = available_methods()[name]()
        rank = self.options.rank
        out = {}
        for i, (layer, module) in enumerate(self.layers.items()):
            weight = module.weight.detach()
            spectrum = method.spectrum(
                weight, self.statistics[layer], rank, tuple(weight.shape), seed=self.options.seed + 7 * i
            )
            out[layer] = method.factors(spectrum, rank, self.scaling)
        return out

    def _measured(self, factors: dict[str, Factors], optimiser: str) -> dict[str, float]:
        """Train a real adapter for one step; the change of each layer on rows that it was not trained on."""
        config = si.LoraConfig(
            r=self.options.rank, lora_alpha=self.options.alpha, target_modules=sorted(factors), task_type="CAUSAL_LM"
        )
        adapted = si.LoraModel(copy.deepcopy(self.model), config)
        plan = si.Plan(dict.fromkeys(factors, self.options.rank), dict.fromkeys(factors, self.options.alpha))
        write_factors(adapted, factors, plan)
        wrapped = {name: adapted.get_submodule(f"model.{name}") for name in factors}
        before = self._outputs(wrapped)
        trained = [p for n, p in adapted.named_parameters() if "lora_" in n]
        step = OPTIMISERS[optimiser](trained, lr=self.options.lr)
        _loss(adapted, self.training).backward()
        step.step()
        after = self._outputs(wrapped)
        return {name: float((after[name] - before[name]).square().sum(1).mean().sqrt()) for name in factors}

    def _outputs(self, wrapped: dict[str, nn.Module]) -> dict[str, Tensor]:
        """What the adapters add, and in float64: a step of SGD is small beside the output."""
        found = {}
        for name, layer in wrapped.items():
            a, b = (layer.get_parameter(f"lora_{half}.default.weight").detach().double() for half in "AB")
            found[name] = self.scaling * (self.rows[name].double() @ a.mT) @ b.mT
        return found

    def _inputs(self, batches: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Inputs of every layer at the tokens that count."""
        seen: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        keep = torch.empty(0)
        handles = [
            layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach()[keep]))
            for name, layer in self.layers.items()
        ]
        with torch.no_grad():
            for batch in batches:
                keep = batch["attention_mask"].bool() & (batch["labels"] != IGNORED)
                self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for handle in handles:
            handle.remove()
        return {name: torch.cat(rows) for name, rows in seen.items()}


def _statistic(rows: Tensor) -> GramStatistic:
    statistic = GramStatistic(rows.shape[1])
    statistic.update(rows)
    statistic.settle()
    return statistic


def _loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    names = ("input_ids", "attention_mask", "labels")
    loss: Tensor = model(**{name: batch[name] for name in names}).loss
    return loss


def _norm_for(optimiser: str, gradient: Tensor) -> float | None:
    return float(gradient.norm()) if optimiser == "sgd" else None


def _known(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        msg = "a layer has no gradient"
        raise RuntimeError(msg)
    return gradient


if __name__ == "__main__":
    sys.exit(main())
