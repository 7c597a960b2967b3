from __future__ import annotations

import json
import re
import shutil

import pytest

from smartinit.artefact import Artefact
from smartinit.store import Key, Store


@pytest.fixture
def two(compute, tmp_path):
    """Keys of two artefacts, of rank 4 and 2, whose folders are ``adapter`` and ``small``."""
    keys = [compute("--json", "--quiet").document["key"]]
    keys.append(compute("--json", "--quiet", rank=2, out=tmp_path / "small").document["key"])
    return keys


def leaves(document):
    return {row["leaf"]: (row["a"], row["b"]) for row in document["differences"]}


def test_by_keys_and_folders(run_cli, two, tmp_path):
    by_key = run_cli("explain", two[0][:8], two[1], "--json").document
    by_folder = run_cli("explain", tmp_path / "adapter", tmp_path / "small", "--json").document
    for document in (by_key, by_folder):
        assert (document["by"], document["same"]) == ("leaves", False)
        found = leaves(document)
        assert found["config.r"] == (4, 2)
        assert "model" not in found
        assert "data.digest" not in found
    assert by_key["differences"] == by_folder["differences"]
    text = run_cli("explain", two[0], two[1]).out
    assert "config.r" in text
    assert re.search(r"^alphas\.model\.layers\.\*\.self_attn\.q_proj \(2×\) +4 +2$", text, re.MULTILINE)


def test_nothing_differs(run_cli, two, tmp_path):
    done = run_cli("explain", two[0], tmp_path / "adapter")
    assert done.code == 0
    assert "they do not differ" in done.out
    assert run_cli("explain", two[0], two[0], "--json").document["same"] is True


def test_without_a_store_recipes_are_compared(run_cli, two, tmp_path):
    del two
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(Artefact.load(tmp_path / "small").recipe.as_dict()))
    elsewhere = ("--store", tmp_path / "elsewhere")
    document = run_cli("explain", tmp_path / "adapter", recipe, "--json", *elsewhere).document
    assert document["by"] == "recipe"
    assert leaves(document)["planner.ranks.model.layers.0.self_attn.q_proj"] == (4, 2)
    assert "compared by their recipes" in run_cli("explain", tmp_path / "adapter", recipe, *elsewhere).out
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_beside_a_key_that_the_store_does_not_know_it_by(run_cli, two, tmp_path):
    record = json.loads((tmp_path / "adapter" / "smartinit.json").read_text())
    del record["provenance"]["store"]
    (tmp_path / "adapter" / "smartinit.json").write_text(json.dumps(record))
    document = run_cli("explain", tmp_path / "adapter", two[1], "--json").document
    assert (document["a"]["kind"], document["b"]["kind"], document["by"]) == ("recipe", "artefact", "recipe")
    assert leaves(document).keys() == {
        f"planner.ranks.model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")
    }


def test_one_alone_is_compared_with_the_nearest(run_cli, two, tmp_path):
    document = run_cli("explain", two[0], "--json").document
    assert document["b"]["name"] == two[1][:12]
    assert leaves(document)["config.r"] == (4, 2)
    Store().local.remove(two[1])
    done = run_cli("explain", two[0])
    assert done.code == 3
    assert "nothing to compare" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("abcdef12", "abcdef34"), 3, "the store has no entry 'abcdef12'"),
        (("./nothing", "x"), 2, "is no adapter folder, no file and no key"),
        (("empty", "x"), 6, "has no smartinit.json"),
        (("text", "x"), 6, "cannot be read as JSON"),
        (("list", "x"), 6, "holds no JSON object"),
        (("object", "x"), 6, "holds no recipe"),
    ],
)
def test_what_is_no_request(run_cli, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, text in {"text": "{", "list": "[]", "object": '{"recipe": {"method": "eva"}}'}.items():
        (tmp_path / name).write_text(text)
    done = run_cli("explain", *arguments)
    assert done.code == code, done.err
    assert message in done.err


def test_kinds_that_have_nothing_in_common(run_cli, two):
    spectrum = Key("spectrum", {"model": "a"})
    Store().put(spectrum)
    done = run_cli("explain", spectrum.digest, two[0])
    assert done.code == 2
    assert "is of the kind spectrum" in done.err


def test_nothing_of_a_leaf_reaches_the_terminal(run_cli):
    store = Store()
    one, other = (Key("thing", {"name": name}) for name in ("\x1b[2Jgone", "\r\nhere"))
    for key in (one, other):
        store.put(key)
    done = run_cli("explain", one.digest, other.digest)
    assert done.code == 0
    assert "\x1b" not in done.out
    assert "\\u001b[2Jgone" in done.out


def test_a_copied_folder_is_known_by_its_key(run_cli, two, tmp_path):
    shutil.copytree(tmp_path / "adapter", tmp_path / "moved")
    assert run_cli("explain", tmp_path / "moved", two[0], "--json").document["by"] == "leaves"
