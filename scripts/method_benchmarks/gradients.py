"""LoRA-GA beside PEFT's on the same model and batches: time, peak memory, and how much of the gradient they start from.

Each contender runs in a process of its own, from the same random weights; memory is what the process takes at its
peak above what it took with the model loaded. The error is the share of the gradient's energy on the best
2r directions that a first step of ``A`` and ``B`` cannot reach, in the first block; the gradient is that of a third
process, in float64.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from method_benchmarks.rows import Row
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve()
RANK = 16
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2, "num_attention_heads": 16}
QUICK_SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3, "num_attention_heads": 8}
VOCABULARY, BATCHES, SEQUENCES, TOKENS = 512, 4, 2, 128
PASSES = {"one pass": 1, "two passes": 2, "three passes": 3}


def run(options: argparse.Namespace) -> list[Row]:
    """LoRA-GA with one pass and with two, beside PEFT's; ``options.quick`` takes a smaller model."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        results = {name: _child(name, Path(folder), options) for name in ("truth", "peft", *PASSES)}
        truth = load_file(Path(folder) / "truth.safetensors")
        theirs = results["peft"]
        their_error = _missed(truth, load_file(Path(folder) / "peft.safetensors"))
        for name in PASSES:
            ours = results[name]
            rows.append(
                Row(
                    "lora_ga",
                    f"Llama of {ours['parameters'] / 1e6:.0f}M, all linear, r={RANK}, {BATCHES} batches, {name}",
                    ours["seconds"],
                    theirs["seconds"],
                    _missed(truth, load_file(Path(folder) / f"{name}.safetensors")),
                    their_error,
                    ours["mb"],
                    theirs["mb"],
                    "PEFT's preprocess_loraga and get_peft_model; error: energy of the best 2r directions not held",
                )
            )
    return rows


def _missed(truth: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    """Mean share of the energy of the best 2r directions that the first step of A and B cannot reach."""
    shares = []
    for name in (key.removesuffix(".best") for key in truth if key.endswith(".best")):
        a = torch.linalg.qr(found[f"{name}.a"].double().mT).Q
        b = torch.linalg.qr(found[f"{name}.b"].double()).Q
        gradient = truth[name]
        outside = gradient - b @ (b.mT @ gradient)
        outside -= (outside @ a) @ a.mT
        reached = float(gradient.square().sum()) - float(outside.square().sum())
        shares.append(1 - reached / float(truth[f"{name}.best"]))
    return sum(shares) / len(shares)


def _child(name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    task = {"name": name, "folder": str(folder), "quick": options.quick, "threads": options.threads}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "method_benchmarks.gradients",
        json.dumps({**task, "seed": options.seed}),
    ]
    path = os.pathsep.join(str(HERE.parents[depth]) for depth in (1, 2))
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _model(task: dict[str, Any]) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(task["seed"])
    shape = QUICK_SHAPE if task["quick"] else SHAPE
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape)).eval()


def _batches(seed: int) -> list[dict[str, torch.Tensor]]:
    """Text of a kind: a chain in which every token has a few likely successors, as frequent as words are."""
    generator = torch.Generator().manual_seed(seed)
    successors = (torch.rand(VOCABULARY, 4, generator=generator) ** 3 * VOCABULARY).long()
    out = []
    for _ in range(BATCHES):
        tokens = [torch.randint(VOCABULARY, (SEQUENCES,), generator=generator)]
        for _ in range(TOKENS - 1):
            tokens.append(successors[tokens[-1], torch.randint(4, (SEQUENCES,), generator=generator)])
        ids = torch.stack(tokens, 1)
        out.append({"input_ids": ids, "labels": ids})
    return out


def _run_child(task: dict[str, Any]) -> None:
    torch.set_num_threads(task["threads"])
    model, batches = _model(task), _batches(task["seed"])
    contenders: dict[str, Callable[..., dict[str, torch.Tensor]]] = {"peft": _peft, "truth": _truth}
    with torch.no_grad():
        model(**batches[0])  # what the first forward pass allocates belongs to neither
    start_mb, started = _resident_mb(), time.perf_counter()
    passes = PASSES.get(task["name"])
    found = _ours(model, batches, passes) if passes else contenders[task["name"]](model, batches)
    seconds = time.perf_counter() - started
    peak_mb = _high_water_mb()
    save_file(
        {key: value.contiguous() for key, value in found.items()}, Path(task["folder"]) / f"{task['name']}.safetensors"
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"seconds": seconds, "mb": peak_mb - start_mb, "parameters": parameters}))


def _high_water_mb() -> float:
    """Most resident memory so far; the rusage of a child begins with what its parent held, the status file does not."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1.024e-3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def _ours(model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]], passes: int) -> dict[str, torch.Tensor]:
    from smartinit.config import LoraConfig
    from smartinit.gradients import collect_gradients
    from smartinit.methods.lora_ga import LoraGa
    from smartinit.targets.select import select_targets

    targets = select_targets(model, LoraConfig(target_modules="all-linear"))
    sketches = collect_gradients(
        model, targets, batches, {t.name: RANK for t in targets}, passes=passes, show_progress_bar=False
    ).sketches
    method, out = LoraGa(), {}
    for target in targets:
        spectrum = method.spectrum(None, sketches.pop(target.name), RANK, target.shape)
        factors = method.factors(spectrum, RANK, 1.0)
        out[f"{target.name}.a"], out[f"{target.name}.b"] = factors.a, factors.b
    return out


def _peft(model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    import peft
    from peft.tuners.lora import preprocess_loraga

    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules="all-linear",
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )
    config.target_modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    def train_step() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, train_step)
    wrapped = peft.get_peft_model(model, config)
    out = {}
    for name, module in wrapped.named_modules():
        if hasattr(module, "lora_A"):
            short = name.removeprefix("base_model.model.")
            out[f"{short}.a"] = module.lora_A["default"].weight.detach()
            out[f"{short}.b"] = module.lora_B["default"].weight.detach()
    return out


def _truth(model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    model.double()
    for batch in batches:
        model(**batch).loss.backward()
    out = {}
    for name, p in model.named_parameters():
        if "layers.0." in name and "_proj" in name and p.grad is not None:
            gradient = p.grad if p.grad.shape[0] < p.grad.shape[1] else p.grad.mT
            squared = torch.linalg.eigvalsh(gradient @ gradient.mT)[-2 * RANK :]
            out |= {name.removesuffix(".weight"): p.grad, name.removesuffix("weight") + "best": squared.sum()}
    return out


if __name__ == "__main__":
    _run_child(json.loads(sys.argv[1]))
