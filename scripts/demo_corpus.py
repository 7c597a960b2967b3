"""What the demo model reads: standard library sources, generated conversations, and the tokenizer made from them.

Every function depends on a :class:`Recipe` and on the Python that runs, on nothing else; see ``make_demo_model.py``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
from demo_rows import rows
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Iterable

# Pure-Python modules of Python 3.10 to 3.14 (a name is a file or a package); no tests, GUI code or generated tables.
TRAIN_MODULES = (
    *("_collections_abc", "_pydecimal", "_pyio", "_strptime", "abc", "argparse", "ast", "asyncio", "base64", "bdb"),
    *("bz2", "cmd", "code", "codecs", "collections", "compileall", "concurrent", "configparser", "contextlib"),
    *("copy", "ctypes", "dataclasses", "datetime", "dbm", "difflib", "dis", "doctest", "email", "enum", "filecmp"),
    *("fileinput", "fnmatch", "ftplib", "functools", "genericpath", "getopt", "getpass", "gettext", "glob", "gzip"),
    *("hashlib", "hmac", "html", "http", "imaplib", "importlib", "inspect", "io", "ipaddress", "json", "linecache"),
    *("locale", "logging", "lzma", "mailbox", "mimetypes", "modulefinder", "multiprocessing", "netrc", "ntpath"),
    *("numbers", "opcode", "operator", "optparse", "os", "pathlib", "pdb", "pickle", "pickletools", "pkgutil"),
    *("platform", "plistlib", "poplib", "posixpath", "pprint", "profile", "pstats", "py_compile", "pyclbr", "pydoc"),
    *("quopri", "random", "re", "reprlib", "rlcompleter", "runpy", "secrets", "selectors", "shlex", "shutil"),
    *("signal", "site", "smtplib", "socket", "socketserver", "sqlite3", "ssl", "stat", "statistics", "string"),
    *("stringprep", "struct", "subprocess", "symtable", "sysconfig", "tabnanny", "tarfile", "tempfile", "threading"),
    *("timeit", "token", "tokenize", "tomllib", "trace", "traceback", "tracemalloc", "turtle", "types", "typing"),
    *("unittest", "urllib", "uuid", "venv", "warnings", "wave", "weakref", "webbrowser", "wsgiref", "xml", "xmlrpc"),
    *("zipapp", "zipfile", "zipimport", "zoneinfo"),
)
HELD_OUT_MODULES = ("bisect", "csv", "fractions", "graphlib", "heapq", "queue", "sched", "shelve", "textwrap")
SPECIAL_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
# `generation` marks the assistant's words, so that transformers can return a mask of them.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
DATA_ROWS = {"train": 800, "messages": 40, "text": 40}


@dataclass(frozen=True)
class Recipe:
    """Everything the weights depend on, but for the versions of Python and torch."""

    steps: int = 2400
    batch_size: int = 8  # windows of `context` tokens
    chat_windows: int = 2  # how many windows of a batch hold instruction rows
    context: int = 256
    vocabulary: int = 1536
    hidden: int = 128
    intermediate: int = 352
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    peak_rate: float = 5e-3
    final_rate: float = 1e-4
    warmup: int = 100
    weight_decay: float = 0.1
    initial_std: float = 0.06
    seed: int = 20240229
    train_modules: tuple[str, ...] = TRAIN_MODULES
    held_out_modules: tuple[str, ...] = HELD_OUT_MODULES
    evaluation_windows: int = 64
    evaluate_every: int = 100

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine down to ``final_rate``."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        along = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_rate + (self.peak_rate - self.final_rate) * 0.5 * (1 + math.cos(math.pi * along))


def module_sources(names: Iterable[str]) -> list[str]:
    """Sources of standard library modules, as ordered by ``names`` and, within a package, by path.

    A module that this Python lacks is left out: the record of a training holds a digest of what was read.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for name in names:
        files = (
            [library / f"{name}.py"] if (library / f"{name}.py").is_file() else sorted((library / name).rglob("*.py"))
        )
        texts += [
            f.read_text("utf-8") for f in files if "test" not in f.relative_to(library).parts and f.stat().st_size
        ]
    return texts


def digest(texts: Iterable[str]) -> str:
    """SHA-256 over texts, so that a reader can tell whether another Python gives the same ones."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def write_data(folder: Path, recipe: Recipe) -> frozenset[str]:
    """Write the three jsonl files; returns their prompts, which the training rows must avoid."""
    unique = dict(itertools.islice(_unique(rows.pairs(recipe.seed)), DATA_ROWS["train"]))
    talks = list(
        itertools.islice(rows.conversations(recipe.seed + 1, without=frozenset(unique)), DATA_ROWS["messages"])
    )
    records: dict[str, list[dict[str, Any]]] = {
        "train": [{"prompt": p, "completion": c} for p, c in unique.items()],
        "messages": [{"messages": talk} for talk in talks],
        "text": [{"text": t} for t in itertools.islice(rows.texts(recipe.seed + 2), DATA_ROWS["text"])],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in records.items():
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    return frozenset(unique) | {m["content"] for talk in talks for m in talk if m["role"] == "user"}


def _unique(pairs: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    seen: set[str] = set()
    for prompt, completion in pairs:
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, completion


def make_tokenizer(texts: Iterable[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text encodes, digits one by one, a beginning token in front of each text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=recipe.vocabulary,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    begin = SPECIAL_TOKENS[1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin} $B",
        special_tokens=[(begin, tokenizer.token_to_id(begin))],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[0],
        bos_token=begin,
        eos_token=SPECIAL_TOKENS[2],
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> torch.Tensor:
    """Texts as one stream of token ids, each between a beginning and an end token."""
    encoded = tokenizer.backend_tokenizer.encode_batch(list(texts))
    return torch.tensor([i for e in encoded for i in (*e.ids, tokenizer.eos_token_id)], dtype=torch.long)


def chat_stream(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, without: frozenset[str]) -> torch.Tensor:
    """Enough tokens of fresh conversations that no window of the training repeats, and some plain stories."""
    talks, stories = rows.conversations(recipe.seed + 10, without=without), rows.texts(recipe.seed + 11)
    ids: list[int] = []
    while len(ids) < recipe.steps * recipe.chat_windows * recipe.context:
        rendered = [tokenizer.apply_chat_template(next(talks), tokenize=False) for _ in range(100)]
        rendered += [f"{tokenizer.bos_token}{next(stories)}{tokenizer.eos_token}" for _ in range(4)]
        for e in tokenizer.backend_tokenizer.encode_batch(rendered, add_special_tokens=False):
            ids += e.ids
    return torch.tensor(ids, dtype=torch.long)


def draw_batch(
    code: torch.Tensor, chat: torch.Tensor, step: int, draw: torch.Generator, recipe: Recipe
) -> torch.Tensor:
    """One batch (windows x context+1): random places of the code, the next places of the conversations."""
    length = recipe.context + 1
    starts = torch.randint(len(code) - length, (recipe.batch_size - recipe.chat_windows,), generator=draw).tolist()
    first = step * recipe.chat_windows * recipe.context
    places = [min(first + i * recipe.context, len(chat) - length) for i in range(recipe.chat_windows)]
    return torch.stack([*(code[s : s + length] for s in starts), *(chat[s : s + length] for s in places)])


def held_out_windows(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> torch.Tensor:
    """Windows (count x context+1) at even distances over modules which the training never saw."""
    stream = encode(tokenizer, module_sources(recipe.held_out_modules))
    starts = torch.linspace(0, len(stream) - recipe.context - 1, recipe.evaluation_windows).long().tolist()
    return torch.stack([stream[s : s + recipe.context + 1] for s in starts])
