"""A model folder and a data file that every verb can work with, and the command line in this process."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import NamedTuple

import pytest

SENTENCES = [
    "The capital of France is Paris, and the capital of Peru is Lima.",
    "Three apples and four pears make seven pieces of fruit.",
    "A river runs to the sea; a road runs to the town.",
    "Compilers never sleep, and neither do the moons of Jupiter.",
]


class Result(NamedTuple):
    """What a run of the command line left."""

    code: int
    out: str
    err: str

    @property
    def document(self):
        """Standard output, which must be exactly one JSON document."""
        return json.loads(self.out)

    @property
    def last(self):
        """The last line on stderr."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


@pytest.fixture
def run_cli(capfd, monkeypatch):
    """Run ``smartinit`` in this process; file descriptors are captured, so libraries cannot hide what they print."""
    from smartinit.cli import main

    monkeypatch.delenv("SMARTINIT_DEBUG", raising=False)

    def run(*arguments):
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory, tiny_llama):
    """Folder of a tiny Llama with its byte-level tokenizer; not to be changed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=64, **{f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos")}
    )
    folder = tmp_path_factory.mktemp("model") / "llama"
    tiny_llama(vocab_size=320).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(saved_model, tmp_path):
    """A copy of the model folder that a test may spoil."""
    return shutil.copytree(saved_model, tmp_path / "model")


@pytest.fixture
def data_file(write_rows):
    """Forty rows of text."""
    return write_rows("data.jsonl", [{"text": SENTENCES[i % 4] + f" {i}"} for i in range(40)])


@pytest.fixture
def write_rows(tmp_path):
    """Write rows as a jsonl file."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def edit_weights():
    """Change the tensors of a model folder."""
    from safetensors.torch import load_file, save_file

    def edit(folder, change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


@pytest.fixture
def adapter(run_cli, model_folder, data_file, tmp_path):
    """An adapter folder that compute has just written."""
    folder = tmp_path / "adapter"
    arguments = ("--model", model_folder, "--data", data_file, "--rank", 4, "--out", folder, "--quiet")
    assert run_cli("compute", *arguments, "--target-modules", "all-linear").code == 0
    return folder


@pytest.fixture
def compute(run_cli, model_folder, data_file, tmp_path):
    """Run compute with options that work, unless others are given."""

    def run(*arguments, **options):
        given = {"model": model_folder, "data": data_file, "out": tmp_path / "adapter", "rank": 4} | options
        named = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
        return run_cli("compute", *named, *arguments)

    return run


@pytest.fixture
def shut():
    """Make a folder one that cannot be written, not even by root, until the test is over."""
    mounted = []

    def mount(*arguments):
        return subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode == 0  # noqa: S607

    def run(folder):
        if shutil.which("mount") is None or not mount("--bind", folder, folder):
            pytest.skip("folders can be mounted by root only")
        mounted.append(folder)
        assert mount("-o", "remount,ro,bind", folder)

    yield run
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)  # noqa: S607


@pytest.fixture(autouse=True)
def _leaves_no_temporary_file(tmp_path, monkeypatch):
    """Nothing outlives a verb but its output: neither in the folder for temporary files nor beside the output."""
    import tempfile

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield
    left = [path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor_")]  # torch's own cache
    assert left == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
