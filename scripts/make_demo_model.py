"""Make the embedded demo model and its data: ``scripts/make_demo_model.py [--steps N] [--out FOLDER] [--check]``.

Writes ``FOLDER/model`` (a Llama causal LM of 1.3 million float32 parameters, its tokenizer, ``training.json`` with its
loss curve) and ``FOLDER/data`` (three small jsonl files). The text is on every machine that has Python: the sources of
the standard library, and the instruction rows of ``scripts/demo_rows``. One thread and fixed seeds: two runs on one
machine with the same versions give bitwise equal weights. About 15 minutes on one core.
"""

from __future__ import annotations

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before `tokenizers` is loaded: one thread, one order of merges

import argparse
import itertools
import json
import math
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
import transformers
from demo_corpus import (
    SPECIAL_TOKENS,
    Recipe,
    chat_stream,
    digest,
    draw_batch,
    encode,
    held_out_windows,
    make_tokenizer,
    module_sources,
    write_data,
)
from demo_rows import rows
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]


def make_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Build the untrained model; the seed fixes its weights."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            initializer_range=recipe.initial_std,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


@torch.no_grad()
def text_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    """Mean nats per token of windows (count x length)."""
    losses = []
    for block in windows.split(16):
        logits = model(input_ids=block[:, :-1], use_cache=False).logits
        losses.append(cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses).double().mean().item()


@torch.no_grad()
def rows_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, file: Path, count: int = 200) -> float:
    """Mean nats per token of the completions of the first rows of a jsonl file, given their prompts."""
    losses = []
    for line in file.read_text("utf-8").splitlines()[:count]:
        row = json.loads(line)
        asked = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer.encode(prompt, add_special_tokens=False))
        text = prompt + row["completion"] + tokenizer.eos_token
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses.append(cross_entropy(logits[0, start - 1 :], ids[0, start:], reduction="none"))
    return torch.cat(losses).double().mean().item()


def unigram_loss(train: torch.Tensor, windows: torch.Tensor, vocabulary: int) -> float:
    """Mean nats per token of windows under the token frequencies of the training text (one added to each count)."""
    counts = torch.bincount(train, minlength=vocabulary).double() + 1
    return -(counts / counts.sum()).log()[windows[:, 1:].flatten()].mean().item()


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, windows: torch.Tensor) -> float:
    """Mean bytes of text per token; a byte-level token has one character per byte, a special token has none."""
    special = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    ids = windows[:, 1:].flatten().tolist()
    return sum(
        len(t) for i, t in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True) if i not in special
    ) / len(ids)


def train(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Make data, tokenizer and model under ``out``; returns what ``training.json`` holds."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    model_folder, data_folder = out / "model", out / "data"
    shipped = write_data(data_folder, recipe)
    sources = module_sources(recipe.train_modules)
    sample = [p for pair in itertools.islice(rows.pairs(recipe.seed + 20, without=shipped), 4000) for p in pair]
    tokenizer = make_tokenizer([*sources, *sample], recipe)
    code, chat = encode(tokenizer, sources), chat_stream(tokenizer, recipe, shipped)
    windows, rows_file = held_out_windows(tokenizer, recipe), data_folder / "train.jsonl"
    model = make_model(tokenizer, recipe)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters; {len(code)} tokens of code, {len(chat)} of conversations", flush=True)

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.95), fused=True)
    draw = torch.Generator().manual_seed(recipe.seed + 1)
    curve: list[dict[str, float]] = []
    recent: list[float] = []
    begin = time.perf_counter()
    for step in range(recipe.steps + 1):
        if step % recipe.evaluate_every == 0 or step == recipe.steps:
            model.eval()
            point = {"step": step, "train": sum(recent) / len(recent)} if recent else {"step": step}
            point |= {"held_out": text_loss(model, windows), "rows": rows_loss(model, tokenizer, rows_file)}
            curve.append({key: round(value, 6) for key, value in point.items()})
            print(f"{time.perf_counter() - begin:6.0f} s  {curve[-1]}", flush=True)
            recent = []
        if step == recipe.steps:
            break
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        recent.append(train_step(model, optimizer, draw_batch(code, chat, step, draw, recipe)))
    model.eval()
    model.save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    settings_file = model_folder / "tokenizer_config.json"
    # transformers 5 writes its own new name of this class, which earlier versions and other loaders do not know.
    settings = json.loads(settings_file.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    record = {
        "parameters": parameters,
        "recipe": asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "corpus": {"bytes": sum(len(s.encode()) for s in sources), "tokens": len(code), "sha256": digest(sources)},
        "held_out": {
            "sha256": digest(module_sources(recipe.held_out_modules)),
            "bytes_per_token": bytes_per_token(tokenizer, windows),
            "random_init": curve[0]["held_out"],
            "unigram": unigram_loss(code, windows, len(tokenizer)),
            "loss": text_loss(model, windows),
        },
        "rows": {"random_init": curve[0]["rows"], "loss": rows_loss(model, tokenizer, rows_file)},
        "curve": curve,
    }
    (model_folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    """Take one optimiser step and return the batch's loss in nats per token."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def check(out: Path) -> bool:
    """Reload the folder and compare its losses with the recorded ones; prints both, tells whether they agree."""
    folder = out / "model"
    record = json.loads((folder / "training.json").read_text("utf-8"))
    recipe = Recipe(**record["recipe"])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    same_text = digest(module_sources(recipe.held_out_modules)) == record["held_out"]["sha256"]
    # Another Python has other sources: the held-out text is then merely similar, the rows stay the same.
    agree = True
    for name, value, tolerance in (
        ("held_out", text_loss(model, held_out_windows(tokenizer, recipe)), 0.001 if same_text else 0.1),
        ("rows", rows_loss(model, tokenizer, out / "data" / "train.jsonl"), 0.001),
    ):
        close = abs(value - record[name]["loss"]) <= tolerance
        agree &= close
        print(
            f"{name}: {value:.4f} nats per token, recorded {record[name]['loss']:.4f}: {'ok' if close else 'DIFFERS'}"
        )
    return agree


def draw_curve(record: dict[str, Any], file: Path) -> None:
    """Draw the recorded losses by step."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for key, label in (
        ("train", "training (mean since the last point)"),
        ("held_out", "held-out modules"),
        ("rows", "demo rows"),
    ):
        points = [(p["step"], p[key]) for p in record["curve"] if key in p]
        axes.plot(*zip(*points, strict=True), label=label)
    axes.axhline(record["held_out"]["unigram"], color="grey", linestyle=":", label="unigram, held-out modules")
    axes.set(xlabel="step", ylabel="nats per token", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the options and do one of: make, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "smartinit" / "demo", help="where model/ and data/ go")
    parser.add_argument("--figure", type=Path, help="also draw the loss curve into this PNG (needs matplotlib)")
    parser.add_argument(
        "--rate", type=float, default=Recipe.peak_rate, help="peak learning rate (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="reload the folder and compare with its recorded losses")
    options = parser.parse_args(arguments)
    if options.check:
        return 0 if check(options.out) else 1
    record = train(options.out, Recipe(steps=options.steps, peak_rate=options.rate))
    if options.figure:
        draw_curve(record, options.figure)
    held_out = record["held_out"]
    bits = held_out["loss"] / math.log(2) / held_out["bytes_per_token"]
    print(
        f"held-out: {held_out['loss']:.3f} nats per token, {bits:.3f} "
        f"bits per byte (random init {held_out['random_init']:.3f}, unigram {held_out['unigram']:.3f} nats per token)"
    )
    print(f"wrote {options.out / 'model'} and {options.out / 'data'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
