from __future__ import annotations

import pytest

from smartinit.data.source import find_source
from smartinit.errors import DataError, MissingFileError


def write(path, text="x\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "builder"),
    [
        ("a.jsonl", "json"),
        ("a.ndjson", "json"),
        ("a.json", "json"),
        ("a.CSV", "csv"),
        ("a.tsv", "tsv"),
        ("a.parquet", "parquet"),
        ("a.txt", "text"),
        ("a.jsonl.gz", "json"),
        ("a.b.txt.gz", "text"),
    ],
)
def test_suffix_decides(tmp_path, name, builder):
    source = find_source(write(tmp_path / name))
    assert source.builder == builder
    assert source.files == (tmp_path / name,)


@pytest.mark.parametrize("name", ["a.pkl", "a.pt", "a", "a.parquet.gz", "a.gz", "a.zip"])
def test_other_suffixes_are_refused_with_the_list(tmp_path, name):
    with pytest.raises(DataError, match=r"supported are \.jsonl.*\.parquet.*\.gz"):
        find_source(write(tmp_path / name))


@pytest.mark.parametrize("name", ["./data", "missing.jsonl", "~/nothing/here.csv", "a/b/c", "/nowhere/at/all", "a\\b"])
def test_a_missing_path_is_named(name):
    with pytest.raises(MissingFileError, match="does not exist"):
        find_source(name)


@pytest.mark.parametrize("name", ["squad", "openai/gsm8k", "HuggingFaceH4/ultrachat_200k"])
def test_other_names_are_hub_ids(name):
    assert find_source(name).builder == "hub"


def test_a_name_within_an_existing_folder_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError):
        find_source("data/trian")


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        find_source(write(tmp_path / "a.jsonl", ""))


class TestFolder:
    def test_files_of_the_split(self, tmp_path):
        first = write(tmp_path / "data" / "train-00000-of-00002.jsonl")
        second = write(tmp_path / "data" / "train-00001-of-00002.jsonl")
        test = write(tmp_path / "data" / "test-00000-of-00001.jsonl")
        write(tmp_path / "README.md")
        write(tmp_path / "notes.jsonl")
        write(tmp_path / ".cache" / "train.jsonl")
        assert find_source(tmp_path).files == (first, second)
        assert find_source(tmp_path, split="test").files == (test,)

    def test_files_of_no_split_are_the_default(self, tmp_path):
        rows = write(tmp_path / "trainers_of_dogs.csv")
        write(tmp_path / "test.csv")
        assert find_source(tmp_path).files == (rows,)

    def test_a_split_that_is_not_there(self, tmp_path):
        write(tmp_path / "test.csv")
        with pytest.raises(DataError, match=r"no file of the split 'train', only test\.csv"):
            find_source(tmp_path)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(DataError, match="holds no data file"):
            find_source(tmp_path)

    def test_mixed_kinds(self, tmp_path):
        write(tmp_path / "a.csv")
        write(tmp_path / "b.jsonl")
        with pytest.raises(DataError, match="mixes csv and json"):
            find_source(tmp_path)

    def test_one_of_the_files_is_empty(self, tmp_path):
        write(tmp_path / "a.csv")
        write(tmp_path / "b.csv", "")
        with pytest.raises(DataError, match=r"b\.csv is empty"):
            find_source(tmp_path)


def test_digest_follows_the_bytes(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    before = find_source(path).sha256
    assert before == find_source(path).sha256
    path.write_text("two")
    assert find_source(path).sha256 != before
    assert find_source("squad").sha256 is None
