from __future__ import annotations

import gzip
import json
import os
import tempfile

import datasets
import pytest

from smartinit.data.files import load_rows
from smartinit.errors import DataError, MissingFileError

ROWS = [{"text": "one"}, {"text": "zwei – naïve"}, {"text": "three"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)

pytestmark = [
    pytest.mark.usefixtures("no_network"),
    # `datasets` leaves the file of a CSV stream open until it is collected.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def leaves_nothing(tmp_path_factory, monkeypatch):
    """No temporary file outlives a call, and the user's cache of datasets stays as it is."""
    scratch, cache = tmp_path_factory.mktemp("scratch"), tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    yield
    assert list(scratch.iterdir()) == []
    assert list(cache.iterdir()) == []


def write(path, content):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.jsonl", JSONL.replace("\n", "\r\n\r\n")),
        ("a.jsonl", JSONL.rstrip("\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + JSONL.encode()),
        ("a.json", json.dumps(ROWS, indent=1, ensure_ascii=False)),
        ("a.csv", "text\none\nzwei – naïve\nthree\n"),
        ("a.csv", b"\xef\xbb\xbf" + "text\none\nzwei – naïve\nthree\n".encode()),
        ("a.tsv", "text\none\nzwei – naïve\nthree\n"),
        ("a.txt", "one\n\nzwei – naïve\n\n\n\nthree"),
        ("a.txt", "one\r\n\r\nzwei – naïve\r\n\r\nthree"),
        ("a.txt", "one\nzwei – naïve\nthree\n"),
        ("a.jsonl.gz", JSONL),
        ("a.csv.gz", "text\none\nzwei – naïve\nthree\n"),
        ("a.txt.gz", "one\n\nzwei – naïve\n\nthree"),
    ],
)
def test_same_rows_from_every_format(tmp_path, name, content):
    path = write(tmp_path / name, content)
    rows = load_rows(path)
    assert rows["text"][:] == [row["text"] for row in ROWS]
    assert os.listdir(tmp_path) == [name]  # noqa: PTH208
    assert load_rows(path, limit=2)["text"][:] == ["one", "zwei – naïve"]


def test_parquet_and_saved_datasets(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows.select([0]), "test": rows.select([1])}).save_to_disk(tmp_path / "dict")
    assert load_rows(tmp_path / "a.parquet").to_list() == ROWS
    assert load_rows(tmp_path / "saved").to_list() == ROWS
    assert load_rows(tmp_path / "dict", split="test").to_list() == ROWS[1:2]
    with pytest.raises(DataError, match="no split 'dev', only train, test"):
        load_rows(tmp_path / "dict", split="dev")


def test_a_large_file_is_mapped_and_its_cache_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("smartinit.data.files._IN_MEMORY", 0)
    rows = load_rows(write(tmp_path / "a.jsonl", JSONL))
    assert rows[[2, 0]] == {"text": ["three", "one"]}


def test_rows_may_differ_in_their_keys_and_kinds(tmp_path):
    content = '{"text": "a", "extra": [{"a": 1}]}\n{"text": "b", "extra": "x"}\n{"text": "c"}\n'
    assert load_rows(write(tmp_path / "a.jsonl", content))["text"][:] == ["a", "b", "c"]


def test_a_cell_that_says_null_is_a_text(tmp_path):
    assert load_rows(write(tmp_path / "a.csv", "text\nnull\nNone\nNA\n"))["text"][:] == ["null", "None", "NA"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", JSONL + '{"text": nope}\n' + JSONL, r"line 4 of .*a\.jsonl is not valid JSON"),
        ("a.jsonl", JSONL + '{"text": "cut', r"line 4 of .*a\.jsonl is not valid JSON"),
        ("a.jsonl", '\n\n{"text": }\n', r"line 3 of .*a\.jsonl is not valid JSON"),
        ("a.jsonl", "[1, 2]\n[3, 4]\n", r"line 1 of .*it holds a list"),
        ("a.jsonl", '"text"\n"more"\n', r"line 1 of .*it holds a str"),
        ("a.json", '[{"a": 1},\n{"a": 2},\n{"a": ]', r"line 3 of .*a\.json is not valid JSON"),
        ("a.json", '[{"a": 1}, 2]', r"line 1 of .*the array holds a int"),
        ("a.jsonl.gz", JSONL + "{", r"line 4 of .*a\.jsonl\.gz is not valid JSON"),
        ("a.jsonl", JSONL.encode("latin1", "replace"), r"line 2 of .* is not UTF-8 \(byte 0xef at offset 35\)"),
        ("a.csv", "text\na\nnaïve\n".encode("latin1"), r"line 3 of .* is not UTF-8 \(byte 0xef at offset 9\)"),
        ("a.txt", "a\n\nna\u00efve".encode("utf-16"), r"line 1 of .* is not UTF-8"),
        ("a.txt", "cut \u00ef".encode()[:-1], r"line 1 of .* is not UTF-8"),
        ("a.parquet", "no parquet", r"a\.parquet cannot be read as parquet"),
        ("a.csv", "text,b\n", r"a\.csv holds no rows"),
        ("a.jsonl", "\n\n", r"a\.jsonl holds no rows"),
        ("a.json", "[]", r"a\.json holds no rows"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        load_rows(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_a_damaged_gzip(tmp_path):
    whole = gzip.compress(os.urandom(4000).hex().encode())
    path = tmp_path / "a.txt.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.txt\.gz cannot be read"):
        load_rows(path)


def test_the_broken_file_of_a_folder_is_named(tmp_path):
    write(tmp_path / "a.jsonl", JSONL)
    write(tmp_path / "b.jsonl", JSONL + "nope\n")
    with pytest.raises(DataError, match=r"line 4 of .*b\.jsonl"):
        load_rows(tmp_path)


def test_a_hub_id_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match="neither a file or folder here nor a dataset of the hub"):
        load_rows("smartinit/does-not-exist")


def test_local_files_need_no_network_even_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    # The hub's client is told to stay offline by the environment of the tests, and hides that it was asked.
    monkeypatch.setattr(datasets.load, "get_session", lambda: pytest.fail("a server was called"))
    path = write(tmp_path / "a.jsonl", JSONL)
    assert len(load_rows(path)) == len(load_rows(path, limit=3)) == 3
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


def test_progress_bars_and_log_level_are_put_back(tmp_path):
    level = datasets.utils.logging.get_verbosity()
    load_rows(write(tmp_path / "a.jsonl", JSONL))
    assert not datasets.are_progress_bars_disabled()
    assert datasets.utils.logging.get_verbosity() == level
