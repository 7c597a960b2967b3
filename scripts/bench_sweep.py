"""One pass over the data for a sweep: what the second and later configurations cost, as a share of the first.

    .venv/bin/python scripts/bench_sweep.py          # a real model and data if there are some, else the demo's
    .venv/bin/python scripts/bench_sweep.py --model DIR --data FILE

EVA, CorDA, output-optimal PCA and LoRA-Null at several ranks, all from `smartinit.compute_many`. The first
configuration pays for the pass; the first of each further method pays for its spectra; all others only for their
factors. For comparison, the last column says what each would take on its own: the pass, its spectra, its factors.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

import smartinit as si

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("SMARTINIT_ASSETS", ROOT.parent / "shared" / "assets"))
METHODS = ("eva", "corda", "output_pca", "lora_null")


def main() -> None:
    """Parse the options, run the sweep, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, batches, name = load(options)
    # A pooler sees one row per text: too few for whole second moments.
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "pooler" not in n]
    smallest = min(min(model.get_submodule(n).weight.shape) for n in layers)
    ranks = sorted({min(rank, smallest) for rank in options.ranks})
    configs = [
        si.LoraConfig(r=rank, lora_alpha=rank, target_modules=r".*", init_lora_weights=method)
        for method in METHODS
        for rank in ranks
    ]
    for config in configs:
        config.target_modules = set(layers)
    passes = Counted(model)
    started = time.perf_counter()
    artefacts = si.compute_many(model, configs, batches, max_batches=options.batches, show_progress_bar=False)
    total = time.perf_counter() - started
    forwards = passes.count
    print(
        f"{name}: {len(layers)} layers, {forwards} forward passes of {options.batch_size}x{options.max_length}, "
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}; {total:.1f} s in all\n"
    )
    show(artefacts, ranks, options.json)


class Counted:
    """Counts the forward passes of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.count = 0
        model.register_forward_pre_hook(self._seen)

    def _seen(self, *_: object) -> None:
        self.count += 1


def load(options: argparse.Namespace) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]], str]:
    """Model in float32, tokenised batches, and what to call them."""
    import transformers

    from smartinit.demo import data_file, model_folder

    model, data = options.model, options.data
    if model is None:
        model, data = ASSETS / "all-minilm-l6-v2", ASSETS / "gsm8k" / "train.jsonl"
        if not (model.is_dir() and data.is_file()):
            model, data = model_folder(), data_file()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    kind = (
        transformers.AutoModelForCausalLM if "Causal" in (model / "config.json").read_text() else transformers.AutoModel
    )
    loaded = kind.from_pretrained(model, dtype=torch.float32).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [" ".join(str(v) for v in json.loads(line).values()) for line in data.read_text().splitlines() if line]
    size, rows = options.batch_size, []
    texts = texts * (1 + options.batches * size // len(texts))
    for start in range(0, options.batches * size, size):
        some = tokenizer(
            texts[start : start + size],
            truncation=True, max_length=options.max_length, padding=True, return_tensors="pt",
        )  # fmt: skip
        rows.append({key: some[key] for key in ("input_ids", "attention_mask")})
    return loaded, rows, model.name


def show(artefacts: list[si.Artefact], ranks: list[int], path: Path | None) -> None:
    """One line per configuration."""
    rows: list[dict[str, Any]] = []
    first = sum(artefacts[0].timings.values())
    print("| method | rank | adds (s) | share of the first | alone (s) |\n|---|---:|---:|---:|---:|")
    spectra = 0.0
    for index, artefact in enumerate(artefacts):
        took = artefact.timings
        spectra = took["spectra"] if index % len(ranks) == 0 else spectra
        adds = first if index == 0 else took["spectra"] + took["factors"]
        alone = took["activations"] + spectra + took["factors"]
        row = {"method": artefact.recipe.method, "rank": ranks[index % len(ranks)], "adds": adds, "alone": alone}
        rows.append({**row, "share": adds / first})
        print(f"| {row['method']} | {row['rank']} | {adds:.3f} | {adds / first:.1%} | {alone:.2f} |")
    later = [row["share"] for row in rows[1:]]
    same = [row["share"] for i, row in enumerate(rows) if i % len(ranks)]
    print(
        f"\nlater configurations: {sum(later) / len(later):.1%} of the first on average; of a method that was there "
        f"already: {sum(same) / len(same):.1%} on average, {max(same):.1%} at most"
    )
    if path is not None:
        path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
