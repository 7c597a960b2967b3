"""LoRA, DoRA and EVA on a multi-layer perceptron that one can read through, in half a minute on a laptop.

    .venv/bin/python scripts/example_mlp.py --out curves.png

A perceptron learns to tell the handwritten digits 0 to 6 of scikit-learn apart. Then it is to know all ten, from a few
examples of each: its last layer must be trained anew for the three new classes, and the layers before it may be adapted
in several ways. All start from the same weights, see the same batches and take the same number of steps:

* last layer only: the features stay those of seven digits;
* full fine-tuning: every weight is trained;
* LoRA: ``h = W x + s·B A x`` with W frozen, A random and B zero, s = alpha / rank;
* DoRA: the same update, with the length of every row of ``W + s·B A`` as a weight of its own;
* EVA: LoRA whose A holds the principal directions of the layer's inputs, with the ranks where the variance is;
* PiSSA: LoRA whose ``B A`` is the leading part of W, taken off W.

The table has the share of test images that each gets right, on the digits that the network knew and on the new ones:
mean over the repetitions (other examples, other batches) and, in brackets, their standard deviation. Differences of
that size mean nothing. Every way has the learning rate that was the best of seven, from 0.0005 to 0.05, with other
seeds; with one rate for all the order is another, and says more about the rate than about the ways.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import smartinit as si

OLD, NEW = range(7), range(7, 10)
WIDTH, RANK, ALPHA = 64, 4, 8.0
HIDDEN, HEAD = ["0", "2"], "4"  # names of the layers in the nn.Sequential below
BATCH, SHOTS = 20, 10  # rows in a batch; examples of each class to adapt from

# How to adapt -> learning rate of Adam.
RATES = {
    "last layer only": 5e-3,
    "full fine-tuning": 1e-2,
    "LoRA": 1e-2,
    "DoRA": 2e-2,
    "EVA": 2e-2,
    "PiSSA": 2e-3,
}


@dataclass
class Outcome:
    """What came of one way to adapt, over all repetitions."""

    trained: int = 0
    old: list[float] = field(default_factory=list)
    new: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Digits:
    """Images ``(n, 64)`` with values 0..1 and their classes ``(n,)``."""

    images: torch.Tensor
    labels: torch.Tensor

    def of(self, classes: range) -> Digits:
        """Those of some classes."""
        chosen = torch.isin(self.labels, torch.tensor(list(classes)))
        return Digits(self.images[chosen], self.labels[chosen])

    def few(self, count: int, seed: int) -> Digits:
        """The same small number of every class."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        chosen = torch.cat([order[self.labels[order] == one][:count] for one in self.labels.unique()])
        return Digits(self.images[chosen], self.labels[chosen])

    def batch(self, generator: torch.Generator) -> Digits:
        """A random batch."""
        chosen = torch.randint(len(self.labels), (BATCH,), generator=generator)
        return Digits(self.images[chosen], self.labels[chosen])


def read_digits(seed: int) -> tuple[Digits, Digits]:
    """1 797 images of 8 x 8 pixels: 70 % to learn from, 30 % to be tested on."""
    found = load_digits()
    parts = train_test_split(found.data / 16, found.target, test_size=0.3, random_state=seed, stratify=found.target)
    images, tests, labels, answers = (torch.as_tensor(part) for part in parts)
    return Digits(images.float(), labels.long()), Digits(tests.float(), answers.long())


def perceptron() -> nn.Sequential:
    """Two hidden layers, and an output for every one of the ten digits."""
    return nn.Sequential(
        nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )  # fmt: skip


def train(model: nn.Module, data: Digits, *, steps: int, rate: float, seed: int) -> list[float]:
    """Adam on whatever is trainable; the loss of every step, on its batch before the step."""
    generator = torch.Generator().manual_seed(seed)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(weights, lr=rate)
    losses = []
    model.train()
    for _ in range(steps):
        batch = data.batch(generator)
        loss = nn.functional.cross_entropy(model(batch.images), batch.labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """The share that is right when the model has to choose among all ten classes."""
    model.eval()
    return float((model(data.images).argmax(dim=1) == data.labels).float().mean())


def adapt(way: str, base: nn.Sequential, data: Digits, seed: int) -> nn.Module:
    """The network with what the given way trains in it; ``base`` stays as it is."""
    model = copy.deepcopy(base)
    if way == "full fine-tuning":
        return model
    if way == "last layer only":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name.startswith(HEAD)
        return model
    # The last layer is trained as a whole, in a copy: `modules_to_save`.
    config = si.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=HIDDEN, modules_to_save=[HEAD], use_dora=way == "DoRA"
    )
    torch.manual_seed(seed)  # of LoRA's random A
    adapted = si.LoraModel(model, config)
    if way in ("EVA", "PiSSA"):
        method = way.lower()
        batches = list(data.images.split(BATCH))
        # What a pass over the data needs to know: how to call the model, and that every row of a batch counts.
        start = si.compute(
            base,
            si.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=HIDDEN, init_lora_weights=method),
            batches,
            forward_fn=lambda network, batch: network(batch),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
        start.apply(adapted)
    return adapted


@torch.no_grad()
def layer_by_hand(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What an adapted linear layer computes, written out."""
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # (rank, in), (out, rank)
    changed = weight + layer.scaling["default"] * b @ a
    if "default" in layer.lora_magnitude_vector:  # DoRA: the direction of every row, times its own length
        lengths = layer.lora_magnitude_vector["default"].weight
        changed = lengths[:, None] * changed / changed.norm(dim=1, keepdim=True)
    return x @ changed.T + bias


@torch.no_grad()
def check(model: si.LoraModel, data: Digits) -> None:
    """The layers do what is written above; and merged into the weights, the adapter is no longer needed."""
    hidden = data.images
    for name in HIDDEN:
        layer = model.model.get_submodule(name)
        torch.testing.assert_close(layer(hidden), layer_by_hand(layer, hidden), rtol=1e-4, atol=1e-4)
        hidden = torch.relu(layer(hidden))
    wanted = model(data.images)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.get_submodule(HIDDEN[0])) is nn.Linear  # noqa: S101 - this is a demonstration
    torch.testing.assert_close(merged(data.images), wanted, rtol=1e-4, atol=1e-4)


def table(base: nn.Module, test: Digits, outcomes: dict[str, Outcome]) -> str:
    """Accuracies in per cent."""
    old, new = (accuracy(base, test.of(classes)) for classes in (OLD, NEW))
    lines = [
        f"{'':18}{'trained':>9}{'digits 0-6':>16}{'digits 7-9':>16}",
        f"{'before':18}{'':>9}{100 * old:>10.1f}      {100 * new:>10.1f}      ",
    ]
    for way, outcome in outcomes.items():
        cells = "".join(f"{_mean(values):>10.1f} ({_deviation(values):3.1f})" for values in (outcome.old, outcome.new))
        lines.append(f"{way:18}{outcome.trained:>9,d}{cells}")
    return "\n".join(line.rstrip() for line in lines)


def _mean(shares: list[float]) -> float:
    return 100 * statistics.fmean(shares)


def _deviation(shares: list[float]) -> float:
    return 100 * statistics.stdev(shares) if len(shares) > 1 else 0.0


def draw(outcomes: dict[str, Outcome], repeats: int, file: Path) -> None:
    """Losses while adapting, and what the adapted networks get right."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, points) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", width_ratios=(1.25, 1))
    colours = dict(zip(outcomes, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for way, outcome in outcomes.items():
        mean = [statistics.fmean(step) for step in zip(*outcome.losses, strict=True)]
        window = max(1, len(mean) // 20)
        smooth = [statistics.fmean(mean[max(0, i - window + 1) : i + 1]) for i in range(len(mean))]
        curves.plot(range(1, len(smooth) + 1), smooth, label=way, color=colours[way], linewidth=1.6)
    curves.set(yscale="log", xlabel="step", ylabel="cross-entropy of the batches, running mean", title="while adapting")
    curves.grid(alpha=0.25, which="both")
    curves.legend(frameon=False, fontsize=9)

    for row, (way, outcome) in enumerate(outcomes.items()):
        for shift, values, filling in ((-0.12, outcome.old, "white"), (0.12, outcome.new, colours[way])):
            points.errorbar(
                _mean(values), row + shift, xerr=_deviation(values), color=colours[way], marker="o", markersize=7,
                markerfacecolor=filling, capsize=3, linewidth=1.4,
            )  # fmt: skip
    points.set_yticks(range(len(outcomes)), outcomes)
    points.set_ylim(len(outcomes) - 0.5, -0.5)
    points.set(xlabel="right on test images, per cent", title="digits 0-6 (hollow) and 7-9 (filled)")
    points.grid(alpha=0.25, axis="x")
    figure.suptitle(
        f"Rank-{RANK} adapters on a perceptron, {SHOTS} examples of each digit; means of {repeats} repetitions",
        fontsize=11,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=140)


def main(arguments: list[str] | None = None) -> int:
    """Pretrain once, adapt in every way, print the table and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="PNG file to draw into (needs the extra 'plot'); default: no picture")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--steps", type=int, default=200, help="steps of adaptation (default: 200)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions to average over (default: 5)")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.repeats < 1 or options.seed < 0:
        parser.error("--steps and --repeats must be at least 1, --seed at least 0")
    torch.set_num_threads(1)  # matrices of this size: more threads only wait for each other
    began = time.perf_counter()

    learn, test = read_digits(options.seed)
    torch.manual_seed(options.seed)
    base = perceptron()
    train(base, learn.of(OLD), steps=800, rate=3e-3, seed=options.seed)

    outcomes = {way: Outcome() for way in RATES}
    for repeat in range(options.repeats):
        seed = 1000 * options.seed + repeat
        examples = learn.few(SHOTS, seed)
        for way, outcome in outcomes.items():
            model = adapt(way, base, examples, seed)
            outcome.losses.append(train(model, examples, steps=options.steps, rate=RATES[way], seed=seed))
            outcome.trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
            outcome.old.append(accuracy(model, test.of(OLD)))
            outcome.new.append(accuracy(model, test.of(NEW)))
            if isinstance(model, si.LoraModel):
                check(model, test)

    print(table(base, test, outcomes))
    if options.out is not None:
        draw(outcomes, options.repeats, options.out)
        print(f"curves: {options.out}", file=sys.stderr)
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
