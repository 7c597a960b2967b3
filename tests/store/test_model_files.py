"""A model's files: the same tensors give the same fingerprint wherever and however they lie, and are read once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from smartinit.errors import ModelError
from smartinit.formats.safetensors_header import read_header
from smartinit.store import file_memo, model_files
from smartinit.store.model_files import file_sha256, files_fingerprint, local_model
from smartinit.targets.fingerprint import model_fingerprint, tensor_digest

OLD = 1_700_000_000  # seconds: long ago


@pytest.fixture
def memo(tmp_path):
    return tmp_path / "memo"


@pytest.fixture
def folder(tmp_path, demo_model_folder):
    """A copy of the demo model, as old as a download."""
    return settle(Path(shutil.copytree(demo_model_folder, tmp_path / "model")))


@pytest.fixture(autouse=True)
def _settles_at_once(monkeypatch):
    """Files count as settled when they are written: tests that are about that set it back."""
    monkeypatch.setattr(file_memo, "_SETTLED", -1)


@pytest.fixture
def reads(monkeypatch):
    """Tensors and files that were really read."""
    seen: list[str] = []
    hash_one, sha256 = model_files._hash_one, file_memo._sha256
    monkeypatch.setattr(model_files, "_hash_one", lambda path, entry: seen.append("tensor") or hash_one(path, entry))
    monkeypatch.setattr(file_memo, "_sha256", lambda path: seen.append(path.name) or sha256(path))
    return seen


def settle(folder: Path) -> Path:
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (OLD, OLD))
    return folder


def reshard(folder: Path, count: int, *, metadata=None) -> None:
    """Other files, with other names, for the same tensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"part-{index % count}.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        part = {name: tensors[name] for name in names if names[name] == file}
        save_file(part, folder / file, metadata=metadata)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# --- the same ------------------------------------------------------------------------------------------------------


def test_digests_are_those_of_the_loaded_model(folder, memo):
    from transformers import AutoModelForCausalLM

    loaded = model_fingerprint(AutoModelForCausalLM.from_pretrained(folder)).tensors
    found = files_fingerprint(folder, memo)
    assert len(found.tensors) > 20
    assert all(loaded[name] == digest for name, digest in found.tensors.items())


def test_every_dtype_is_named_as_in_memory(tmp_path, memo):
    from smartinit.formats.tensor_file import DTYPES

    tensors = {name: torch.zeros(2, 3).to(dtype) for dtype, name in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = files_fingerprint(tmp_path / "x.safetensors", memo).tensors
    assert found == {name: tensor_digest(tensor) for name, tensor in tensors.items()}


def test_renamed_sharded_and_annotated(folder, memo, tmp_path):
    whole = files_fingerprint(folder, memo)
    other = folder.rename(tmp_path / "other name")
    assert files_fingerprint(other, memo) == whole
    for count in (1, 3):
        copy = Path(shutil.copytree(other, tmp_path / f"copy{count}"))
        reshard(copy, count, metadata={"note": str(count)})
        assert files_fingerprint(copy, memo) == whole
    assert files_fingerprint(other / "model.safetensors", memo).root == whole.root


def test_what_a_configuration_says_of_itself_does_not_matter(folder, memo):
    before = files_fingerprint(folder, memo)
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": "/elsewhere", "transformers_version": "0"}
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    for name in ("README.md", "generation_config.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    assert files_fingerprint(folder, memo) == before


def test_the_former_name_of_the_dtype(folder, memo):
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    found = []
    for said in ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"dtype": "float32"}):
        (folder / "config.json").write_text(json.dumps(config | said))
        found.append(files_fingerprint(folder, memo).config)
    assert (found[0] == found[1], found[0] != found[2]) == (True, True)


def test_threads_and_pieces_change_nothing(folder, memo, monkeypatch):
    before = files_fingerprint(folder, memo)
    monkeypatch.setattr(model_files, "_PIECE", 1000)
    assert (
        files_fingerprint(folder, memo / "1", threads=1) == files_fingerprint(folder, memo / "9", threads=9) == before
    )


# --- another -------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(data=st.data())
def test_one_bit_of_any_tensor(demo_model_folder, tmp_path_factory, data):
    folder = Path(shutil.copytree(demo_model_folder, tmp_path_factory.mktemp("flip") / "model"))
    memo = folder.parent / "memo"
    before = files_fingerprint(folder, memo)
    path = folder / "model.safetensors"
    entries = read_header(path)
    name = data.draw(st.sampled_from(sorted(entries)))
    at = data.draw(st.integers(entries[name].start, entries[name].stop - 1))
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << data.draw(st.integers(0, 7))]))
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    after = files_fingerprint(folder, memo)
    assert {key for key in after.tensors if after.tensors[key] != before.tensors[key]} == {name}
    assert (after.root != before.root, after.config, after.tokenizer) == (True, before.config, before.tokenizer)


def edit_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))


def rename_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    first = min(tensors)
    save_file({f"{name}x" if name == first else name: tensor for name, tensor in tensors.items()},
              folder / "model.safetensors")  # fmt: skip


CHANGES = {
    "config.json": (edit_config, "config"),
    "code": (lambda folder: (folder / "modeling_own.py").write_text("x = 1"), "config"),
    "template": (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"), "tokenizer"),
    "another template": (
        lambda folder: (
            (folder / "additional_chat_templates").mkdir(),
            (folder / "additional_chat_templates" / "tools.jinja").write_text("x"),
        ),
        "tokenizer",
    ),
    "tokenizer.json": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer"),
    "vocabulary": (lambda folder: (folder / "vocab.txt").write_text("a\nb"), "tokenizer"),
    "sentencepiece": (lambda folder: (folder / "tokenizer.model").write_bytes(b"\0"), "tokenizer"),
    "name of a tensor": (rename_tensor, "root"),
}


@pytest.mark.parametrize(("change", "part"), CHANGES.values(), ids=CHANGES)
def test_each_change_is_told_by_its_part(folder, memo, change, part):
    before = files_fingerprint(folder, memo)
    change(folder)
    after = files_fingerprint(folder, memo)
    differing = {name for name in ("root", "config", "tokenizer") if getattr(after, name) != getattr(before, name)}
    assert differing == {part}


# --- what files do not say -----------------------------------------------------------------------------------------


class Loud:
    def __reduce__(self):
        return (os.system, ("false",))


def only_pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def adapter_beside(folder):
    (folder / "adapter_config.json").write_text("{}")


def code_elsewhere(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "someone/repository--modeling.Model"}
    (folder / "config.json").write_text(json.dumps(config))


def sharded_pickles(folder):
    only_pickled(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))


@pytest.mark.parametrize("change", [only_pickled, adapter_beside, code_elsewhere, sharded_pickles, shutil.rmtree])
def test_there_is_no_key_from_files_that_do_not_say_it(folder, memo, change):
    change(folder)
    assert files_fingerprint(folder, memo) is None


def test_a_pickle_is_never_opened(tmp_path, memo):
    torch.save(Loud(), tmp_path / "model.bin")
    assert files_fingerprint(tmp_path / "model.bin", memo) is None


@pytest.mark.parametrize("name", ["nobody/nothing", "../../etc", "a b", "", "x" * 5000, "a/b/c", "a\nb", "é/é"])
def test_what_is_not_here_has_none(tmp_path, memo, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert files_fingerprint(name or "nothing", memo) is None


def put(folder, content, name="model.safetensors"):
    (folder / name).write_bytes(content)


def index_of(listed):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        text = listed if isinstance(listed, str) else json.dumps({"weight_map": listed})
        (folder / "model.safetensors.index.json").write_text(text)

    return change


BROKEN = {
    "truncated": (lambda folder: put(folder, (folder / "model.safetensors").read_bytes()[:-1]), "bytes instead of"),
    "no safetensors": (lambda folder: put(folder, b"{}"), "no safetensors file"),
    "config is none": (lambda folder: put(folder, b"[]", "config.json"), "holds no JSON object"),
    "config is deep": (lambda folder: put(folder, b'{"a":' * 99_999, "config.json"), "cannot be read as JSON"),
    "config is binary": (lambda folder: put(folder, b"\xff\xfe\0", "config.json"), "cannot be read as JSON"),
    "outside": (index_of({"a": "../model/part.safetensors"}), "which is no file of its folder"),
    "absolute": (index_of({"a": "/etc/passwd"}), "which is no file of its folder"),
    "other slashes": (index_of({"a": "..\\part.safetensors"}), "which is no file of its folder"),
    "missing shard": (index_of({"a": "other.safetensors"}), "lacks other.safetensors"),
    "missing tensor": (index_of({"a": "part.safetensors"}), "lack 'a', which the index lists"),
    "no map": (index_of([]), "no weight_map"),
    "a map of numbers": (index_of({"a": 3}), "no weight_map"),
    "no index": (index_of("{"), "cannot be read as JSON"),
}


@pytest.mark.parametrize(("change", "text"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named(folder, memo, change, text):
    change(folder)
    with pytest.raises(ModelError, match=text):
        files_fingerprint(folder, memo)


def test_absurdly_long_configurations_are_not_parsed(folder, memo, monkeypatch):
    monkeypatch.setattr(model_files, "_LARGEST_JSON", 100)
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        files_fingerprint(folder, memo)


def test_two_tensors_of_one_name(folder, memo):
    tensors = load_file(folder / "model.safetensors")
    reshard(folder, 2)
    name = min(tensors)
    part = load_file(folder / "part-1.safetensors")
    save_file(part | {name: tensors[name] + 1}, folder / "part-1.safetensors")
    with pytest.raises(ModelError, match=f"two tensors '{name}' that differ"):
        files_fingerprint(folder, memo)


def test_what_may_not_be_read_is_named(folder, memo, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))  # root may read everything

    monkeypatch.setattr(file_memo, "_sha256", refuse)
    with pytest.raises(ModelError, match=r"cannot be read: .*tokenizer"):
        files_fingerprint(folder, memo)


# --- the memo ------------------------------------------------------------------------------------------------------


def test_each_file_is_read_once(folder, memo, reads):
    first = files_fingerprint(folder, memo)
    assert reads.count("tensor") == len(first.tensors)
    assert "tokenizer.json" in reads
    del reads[:]
    assert files_fingerprint(folder, memo) == first
    assert files_fingerprint(str(folder) + "/../model", memo) == first
    assert reads == []


def test_bytes_and_tensors_of_a_file_are_remembered_apart(folder, memo, reads):
    path = folder / "model.safetensors"
    for _ in range(2):
        found = files_fingerprint(path, memo)
        assert file_sha256(path, memo) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(reads) == len(found.tensors) + 1


def test_a_memo_that_cannot_be_written_is_no_error(folder, tmp_path, reads):
    (tmp_path / "file").write_text("")
    first = files_fingerprint(folder, tmp_path / "file" / "memo")
    assert files_fingerprint(folder, tmp_path / "file" / "memo") == first
    assert reads.count("tensor") == 2 * len(first.tensors)


def test_a_new_file_is_read_until_it_has_settled(folder, memo, reads, monkeypatch):
    monkeypatch.setattr(file_memo, "_SETTLED", 2 * 10**9)
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes())
    file_sha256(path, memo)
    file_sha256(path, memo)
    assert len(reads) == 2
    monkeypatch.setattr(file_memo, "_SETTLED", -1)
    file_sha256(path, memo)
    file_sha256(path, memo)
    assert len(reads) == 3


@pytest.mark.parametrize("age", [-3600, 0])
def test_files_from_the_future_are_not_remembered(folder, memo, monkeypatch, age):
    """As after the clock went backwards."""
    monkeypatch.setattr(file_memo, "_SETTLED", 2 * 10**9)
    path = folder / "tokenizer.json"
    now = time.time()
    os.utime(path, (now - age, now - age))
    file_sha256(path, memo)
    assert not memo.exists()


def test_the_same_size_and_time_with_other_bytes_is_another_file(folder, memo):
    path = folder / "tokenizer.json"
    before = file_sha256(path, memo)
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert file_sha256(path, memo) == hashlib.sha256(content).hexdigest() != before


def test_a_file_that_changes_while_it_is_read(folder, memo, monkeypatch):
    hash_one = model_files._hash_one

    def meanwhile(path, entry):
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x55")
        return hash_one(path, entry)

    monkeypatch.setattr(model_files, "_hash_one", meanwhile)
    with pytest.raises(ModelError, match="changed while it was read"):
        files_fingerprint(folder, memo)


def test_a_file_that_shrinks_while_it_is_read(folder, memo, monkeypatch):
    hash_one = model_files._hash_one

    def meanwhile(path, entry):
        os.truncate(path, entry.stop - 1)
        return hash_one(path, entry)

    monkeypatch.setattr(model_files, "_hash_one", meanwhile)
    with pytest.raises(ModelError, match=r"became shorter|changed while"):
        files_fingerprint(folder, memo, threads=1)


def flipped(note: Path) -> bytes:
    content = bytearray(note.read_bytes())
    at = content.index(b'"value"') + 100
    content[at] = ord("0") if content[at] != ord("0") else ord("1")
    return bytes(content)


SPOILT = {
    "a bit": flipped,
    "half": lambda note: note.read_bytes()[:100],
    "nothing": lambda _: b"",
    "deep": lambda _: b"[" * 200_000,
    "a list": lambda _: b"[1, 2]",
    "a number": lambda _: b"1",
    "no text": lambda _: b"\xff\xfe\0\1",
    "other keys": lambda _: b'{"file": 1}',
    "another's names": lambda note: sealed(json.loads(note.read_bytes())["file"], {"a": "0" * 64}),
    "no digests": lambda note: sealed(
        json.loads(note.read_bytes())["file"], dict.fromkeys(json.loads(note.read_bytes())["value"], "../x")
    ),
    "text": lambda note: sealed(json.loads(note.read_bytes())["file"], "0" * 64),
    "another file's": lambda note: sealed(["/elsewhere", 1, 2, 3, 4], json.loads(note.read_bytes())["value"]),
}


def sealed(file, value) -> bytes:
    from smartinit.store.keys import canonical

    content = {"file": file, "value": value}
    return canonical({**content, "sum": hashlib.sha256(canonical(content)).hexdigest()})


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_broken_or_hostile_memo_is_passed_over(folder, memo, reads, spoil):
    files_fingerprint(folder / "model.safetensors", memo)
    (note,) = memo.iterdir()
    content = spoil(note)
    note.write_bytes(content)
    del reads[:]
    found = files_fingerprint(folder / "model.safetensors", memo)
    assert len(reads) == len(found.tensors)
    assert found.tensors == {k: tensor_digest(v) for k, v in load_file(folder / "model.safetensors").items()}
    assert note.read_bytes() != content


def test_a_memo_too_large_is_not_read(folder, memo, reads, monkeypatch):
    first = files_fingerprint(folder, memo)
    monkeypatch.setattr(file_memo, "_LARGEST", 50)
    assert files_fingerprint(folder, memo) == first
    assert reads.count("tensor") == 2 * len(first.tensors)


# --- the hub's cache -----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, demo_model_folder, monkeypatch):
    """A cache as huggingface_hub lays it out, with the demo model as someone/tiny."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("1" * 40)
    for part in (repository / "blobs", repository / "refs", snapshot):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text("1" * 40)
    for file in demo_model_folder.iterdir():
        content = file.read_bytes()
        large = file.suffix == ".safetensors"
        blob = (
            hashlib.sha256(content).hexdigest() if large else hashlib.sha1(content, usedforsecurity=False).hexdigest()
        )
        (repository / "blobs" / blob).write_bytes(content)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
    return repository


def test_an_id_is_found_in_the_cache(hub, demo_model_folder, memo, reads):
    found = files_fingerprint("someone/tiny", memo)
    assert found == files_fingerprint(demo_model_folder, memo / "other")
    assert files_fingerprint("someone/tiny", memo, revision="1" * 40) == found
    assert files_fingerprint("someone/tiny", memo, revision="other") is None
    assert local_model("someone/tiny") == hub / "snapshots" / ("1" * 40)


def test_a_copy_of_the_cache_is_not_read_again(hub, memo, reads, tmp_path):
    weights = hub / "snapshots" / ("1" * 40) / "model.safetensors"
    first = files_fingerprint(weights, memo)
    copy = Path(shutil.copytree(hub, tmp_path / "copy", symlinks=True))
    settle(copy)
    del reads[:]
    assert files_fingerprint(copy / "snapshots" / ("1" * 40) / "model.safetensors", memo) == first
    assert reads == []


def test_a_blob_that_was_written_to_is_read_again(hub, memo):
    weights = hub / "snapshots" / ("1" * 40) / "model.safetensors"
    first = files_fingerprint(weights, memo)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.resolve().write_bytes(content)
    assert files_fingerprint(weights, memo).root != first.root


def test_a_file_that_only_has_such_a_name_is_known_by_its_own(hub, memo, tmp_path):
    """Not linked to from a snapshot: nobody says that its name is its content's."""
    weights = hub / "snapshots" / ("1" * 40) / "model.safetensors"
    other = tmp_path / "blobs" / weights.resolve().name
    other.parent.mkdir()
    first = file_sha256(weights, memo)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    (tmp_path / "link").symlink_to(other)
    for path in (other, tmp_path / "link"):
        assert file_sha256(path, memo) == hashlib.sha256(content).hexdigest() != first


# --- cost ----------------------------------------------------------------------------------------------------------


def test_torch_is_not_imported(folder, memo):
    code = f"""
import sys
from pathlib import Path
from smartinit.store.model_files import files_fingerprint, file_sha256
for _ in range(2):
    assert files_fingerprint({str(folder)!r}, Path({str(memo)!r})) is not None
assert files_fingerprint("nobody/nothing", Path({str(memo)!r})) is None
print([name for name in ("torch", "numpy", "transformers", "safetensors") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
