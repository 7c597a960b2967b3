"""EVA against PEFT's and against bare forward passes: time, memory and captured variance, side by side in one run.

    .venv/bin/python scripts/bench_eva.py       # a real model if there is one, else the demo model; and a wide one
    .venv/bin/python scripts/bench_eva.py --model DIR --data FILE

Every contender runs in a process of its own, on the same model, batches and settings; contenders take turns. CPU
seconds are the process's, so that a busy machine disturbs the ratios little. PEFT has no bound on its passes, so it is
stopped after the same number of batches.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("SMARTINIT_ASSETS", ROOT.parent / "shared" / "assets"))
CONTENDERS = ("forward", "smartinit", "peft")


def main() -> None:
    """Parse the options, run the cases, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (default: a real one, then a structured Llama)")
    parser.add_argument("--data", help="text to run (jsonl)")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rho", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden", type=int, default=768, help="of the structured Llama")
    parser.add_argument("--layers", type=int, default=4, help="of the structured Llama")
    parser.add_argument("--skip-peft", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options, json.loads(options.child))
        return
    cases = [default_case()] if options.model is None else [(options.model, options.data)]
    if options.model is None:
        cases.append(("structured", None))
    print(
        f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}, "
        f"{options.device} {options.dtype}; {options.batches} batches of {options.batch_size}×{options.max_length}, "
        f"r={options.rank}, rho={options.rho}"
    )
    results = [run_case(options, model, data) for model, data in cases]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def default_case() -> tuple[str, str]:
    """A real encoder and real text where they are, else the demo model."""
    model, data = ASSETS / "all-minilm-l6-v2", ASSETS / "gsm8k" / "train.jsonl"
    if model.is_dir() and data.is_file():
        return str(model), str(data)
    from smartinit.demo import data_file, model_folder

    return str(model_folder()), str(data_file())


def run_case(options: argparse.Namespace, model: str, data: str | None) -> dict[str, Any]:
    """All contenders on one model, taking turns; then the scaling with tokens."""
    print(f"\n{Path(model).name}" + (f" ({options.layers}×{options.hidden})" if model == "structured" else ""))
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, list[dict[str, Any]]] = {
            name: [] for name in CONTENDERS if not (name == "peft" and options.skip_peft)
        }
        for repeat in range(options.repeats):
            for name, done in runs.items():
                if name != "peft" or not repeat:  # it takes minutes: one run is enough to divide by
                    done.append(spawn(options, model, data, name, Path(folder)))
        bare = statistics.median(run["cpu"] for run in runs["forward"])
        print(
            f"  {'':10} {'CPU s':>8} {'wall s':>8} {'× forward':>10} {'peak MB':>8}"
            "  captured / exact PCA's, on held-out rows: mean, worst"
        )
        held_out = HeldOut(options, model, data)
        table = {}
        for name, done in runs.items():
            cpu = statistics.median(run["cpu"] for run in done)
            wall = statistics.median(run["wall"] for run in done)
            peak = statistics.median(run["peak_mb"] for run in done)
            quality = None if name == "forward" else held_out.shares(Path(folder) / f"{name}.safetensors")
            table[name] = {"cpu": cpu, "wall": wall, "ratio": cpu / bare, "peak_mb": peak, "captured": quality}
            shown = "" if quality is None else f"{quality[0]:.5f}, {quality[1]:.5f}"
            print(f"  {name:10} {cpu:8.2f} {wall:8.2f} {cpu / bare:10.2f} {peak:8.0f}  {shown}")
        if "peft" in table:
            ours, theirs = table["smartinit"]["ratio"] - 1, table["peft"]["ratio"] - 1
            smaller = f", {theirs / ours:.0f}× smaller" if ours > 0 else " (the head and the loss never run)"
            print(f"  overhead over bare forward passes: {ours:.0%} against {theirs:.0%}{smaller}")
        scaling = {}
        for factor in (1, 2, 4):
            run = spawn(options, model, data, "smartinit", Path(folder), batches=options.batches * factor)
            scaling[factor] = run["cpu"]
        print("  cost by tokens: " + ", ".join(f"{f}× {s:.2f} s ({s / scaling[1]:.2f})" for f, s in scaling.items()))
    return {"model": Path(model).name, "table": table, "scaling": scaling}


def spawn(
    options: argparse.Namespace, model: str, data: str | None, name: str, folder: Path, *, batches: int | None = None
) -> dict[str, Any]:
    """Run one contender in a fresh process and read its figures."""
    task = {
        "model": model,
        "data": data,
        "name": name,
        "out": str(folder / f"{name}.safetensors"),
        "batches": batches or options.batches,
    }
    passed = [
        f"--{key.replace('_', '-')}={getattr(options, key)}"
        for key in ("batch_size", "max_length", "rank", "rho", "threads", "device", "dtype", "hidden", "layers")
    ]
    done = subprocess.run(
        [sys.executable, __file__, *passed, "--child", json.dumps(task)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        },
    )
    return json.loads(done.stdout.splitlines()[-1])


def child(options: argparse.Namespace, task: dict[str, Any]) -> None:
    """One contender: warm up, measure, save what it found."""
    torch.set_num_threads(options.threads)
    model, batches = load(options, task["model"], task["data"], task["batches"])
    config = lora_config(options)
    with torch.no_grad():
        model(**batches[0])
    if task["name"] != "forward":  # importing is no part of the work
        importlib.import_module({"smartinit": "smartinit.pipeline", "peft": "peft"}[task["name"]])
    before = peak_mb(options)
    cpu, wall = time.process_time(), time.perf_counter()
    state = run_contender(task["name"], model, batches, config)
    if options.device == "cuda":
        torch.cuda.synchronize()
    figures = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    figures["peak_mb"] = peak_mb(options) - before
    if state:
        save_file({key: value.cpu().clone().contiguous() for key, value in state.items()}, task["out"])
    print(json.dumps(figures))


def run_contender(
    name: str, model: torch.nn.Module, batches: list[Any], config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The same batches through one of the three."""
    if name == "forward":
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        return {}
    if name == "smartinit":
        import smartinit as si

        asked = si.LoraConfig(**{**config, "eva_config": si.EvaConfig(**config["eva_config"])})
        return si.get_eva_state_dict(model, batches, asked, show_progress_bar=False)
    import peft

    asked = peft.LoraConfig(**{**config, "eva_config": peft.EvaConfig(**config["eva_config"])})
    return peft.get_eva_state_dict(model, StopsPeft(model, batches), asked, show_progress_bar=False)


class StopsPeft:
    """A data loader that ends PEFT's endless loop: after its last batch every layer is declared converged."""

    def __init__(self, model: torch.nn.Module, batches: list[Any]) -> None:
        self._model, self._batches = model, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        yield from self._batches
        for module in self._model.modules():
            for hook in module._forward_hooks.values():  # noqa: SLF001 - the only way to stop it
                if hasattr(hook, "converged"):
                    hook.converged = torch.ones_like(hook.converged)
        yield self._batches[0]


def lora_config(options: argparse.Namespace) -> dict[str, Any]:
    """The same request for both libraries; tau that neither reaches, so that both use every batch."""
    return {
        "r": options.rank,
        "lora_alpha": options.rank,
        "target_modules": r".*(query|key|value|(output|intermediate)\.dense|[qkvo]_proj|(gate|up|down)_proj)",
        "init_lora_weights": "eva",
        "eva_config": {"rho": options.rho, "tau": 1.0},
    }


def load(options: argparse.Namespace, model: str, data: str | None, count: int) -> tuple[torch.nn.Module, list[Any]]:
    """Model in eval mode and exactly ``count`` batches."""
    dtype = getattr(torch, options.dtype)
    if model == "structured":
        return structured_llama(options).to(options.device, dtype), zipf_batches(options, count)
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    causal = "CausalLM" in str(AutoConfig.from_pretrained(model).architectures)
    network = (
        (AutoModelForCausalLM if causal else AutoModel).from_pretrained(model, dtype=dtype).to(options.device).eval()
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with Path(data or "").open() as lines:
        texts = [
            " ".join(map(str, json.loads(line).values())) for line in islice(lines, (count + 1) * options.batch_size)
        ]
    if len(texts) < count * options.batch_size:
        texts = (texts * (count * options.batch_size // len(texts) + 1))[: count * options.batch_size]
    batches = []
    for start in range(0, count * options.batch_size, options.batch_size):
        batch = tokenizer(
            texts[start : start + options.batch_size],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=options.max_length,
        )
        batches.append({key: value.to(options.device) for key, value in batch.items() if key != "token_type_ids"})
    return network, batches


def structured_llama(options: argparse.Namespace) -> torch.nn.Module:
    """A Llama whose weights have decaying spectra: random ones would give featureless activations."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(4, options.hidden // 64)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=options.hidden,
            intermediate_size=int(options.hidden * 8 / 3) // 64 * 64,
            num_hidden_layers=options.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=4096,
        )
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:  # noqa: PLR2004
                rows = min(parameter.shape)
                left = torch.linalg.qr(torch.randn(parameter.shape[0], rows)).Q
                right = torch.linalg.qr(torch.randn(parameter.shape[1], rows)).Q
                spectrum = torch.arange(1, rows + 1).float() ** -0.5
                parameter.copy_((left * (spectrum / spectrum.norm() * parameter.norm())) @ right.T)
    return network


def zipf_batches(options: argparse.Namespace, count: int) -> list[dict[str, torch.Tensor]]:
    """Token ids with the frequencies of language."""
    generator = torch.Generator().manual_seed(1)
    weights = 1 / torch.arange(1, 4097).float()
    shape = (options.batch_size, options.max_length)
    out = []
    for _ in range(count):
        ids = torch.multinomial(weights, shape[0] * shape[1], replacement=True, generator=generator).view(shape)
        out.append({"input_ids": ids.to(options.device), "attention_mask": torch.ones_like(ids).to(options.device)})
    return out


class HeldOut:
    """Exact moments of every target's rows, on the batches that were used and on as many that nobody has seen."""

    def __init__(self, options: argparse.Namespace, model: str, data: str | None) -> None:
        torch.set_num_threads(options.threads)
        network, batches = load(options, model, data, options.batches * 2)
        pattern = re.compile(lora_config(options)["target_modules"])
        names = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and pattern.fullmatch(n)]
        self._seen = self._moments(network, names, batches[: options.batches])
        self._unseen = self._moments(network, names, batches[options.batches :])
        self._exact = {name: torch.linalg.eigh(moment).eigenvectors.flip(1) for name, moment in self._seen.items()}

    def shares(self, state: Path) -> tuple[float, float]:
        """Variance that the bases capture of unseen rows, over what the exact PCA at equal rank does: mean, worst."""
        shares = []
        for name, basis in load_file(state).items():
            if basis.shape[0]:
                q = torch.linalg.qr(basis.double().mT).Q
                best = self._exact[name][:, : q.shape[1]]
                unseen = self._unseen[name]
                shares.append(float((q * (unseen @ q)).sum() / (best * (unseen @ best)).sum()))
        return statistics.mean(shares), min(shares)

    @staticmethod
    def _moments(network: torch.nn.Module, names: list[str], batches: list[Any]) -> dict[str, torch.Tensor]:
        moments, sums, counts = dict.fromkeys(names, 0), dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        mask = torch.empty(0)

        def look(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0][mask].double()
            moments[name] = moments[name] + (rows.mT @ rows).cpu()
            sums[name] = sums[name] + rows.sum(0).cpu()
            counts[name] += rows.shape[0]

        handles = [
            network.get_submodule(n).register_forward_hook(lambda _m, i, _o, name=n: look(name, i)) for n in names
        ]
        with torch.no_grad():
            for batch in batches:
                mask = batch["attention_mask"].bool()
                network(**batch)
        for handle in handles:
            handle.remove()
        return {n: moments[n] - torch.outer(sums[n], sums[n]) / counts[n] for n in names}


def peak_mb(options: argparse.Namespace) -> float:
    """Peak memory so far, in MB: the GPU's if there is one, else the process's."""
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
