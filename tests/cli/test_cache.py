from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time

import click
import pytest

from smartinit.cli.cache import command
from smartinit.cli.quantities import Duration, Size
from smartinit.store import Key, Store

HOUR = 3600.0


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store with three entries that share a file, which is the default one."""
    monkeypatch.setenv("SMARTINIT_CACHE", str(tmp_path / "store"))
    store = Store()
    for index, method in enumerate(("eva", "pissa", "corda")):
        key = Key("artefact", {"method": method, "model": "ab" * 32})
        store.put(
            key, files={"own": method.encode() * 1000, "shared": b"s" * 500}, meta={"ranks": 8}, tags=("artefact",)
        )
        when = time.time() - (3 - index) * HOUR
        os.utime(store.local.layout.entry(key.digest), (when, when))
    return store


@pytest.fixture
def keys(store):
    """Method -> key."""
    return {store.peek(key).leaves["method"]: key for key in list(store.keys())}


def spoil(path):
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


@pytest.mark.parametrize("verb", command.list_commands(None))
def test_every_verb_is_documented_and_speaks_json(verb):
    sub = command.get_command(None, verb)
    options = {option: parameter for parameter in sub.params for option in parameter.opts}
    assert sub.help
    assert {"--json", "--store"} <= set(options)
    assert all(parameter.help for parameter in sub.params if isinstance(parameter, click.Option))


@pytest.mark.parametrize("arguments", [["ls"], ["verify"], ["gc"], ["gc", "--max-size", "0"], ["path"], ["migrate"]])
def test_a_store_that_does_not_exist_is_empty(run_cli, tmp_path, arguments):
    place = tmp_path / "none"
    for extra in ([], ["--json"]):
        shown = run_cli("cache", *arguments, "--store", place, *extra)
        assert (shown.code, shown.err) == (0, "")
        if extra:
            assert str(place) in json.dumps(shown.document)
    assert not place.exists()


def test_ls_shows_the_last_used_first(run_cli, store, keys):
    store.get(keys["pissa"]).close()
    store.pin(keys["eva"])
    shown = run_cli("cache", "ls")
    lines = shown.out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [keys[name][:12] for name in ("pissa", "corda", "eva")]
    assert "method=pissa" in lines[1]
    assert "model=abababababab" in lines[1]
    assert "just now" in lines[1]
    assert "1 h ago" in lines[2]
    assert "pinned" in lines[3]
    assert lines[-1].startswith("3 entries, 13.2 KiB of files")


def test_ls_as_one_document(run_cli, store, keys):
    store.put("plain", files={"x": b"1"})
    with store.get(keys["eva"]):
        found = run_cli("cache", "ls", "--json").document
    assert found["count"] == len(found["entries"]) == 4
    assert found["bytes"] == 13000 + 500 + 1
    rows = {row["key"]: row for row in found["entries"]}
    assert rows[keys["eva"]]["leased"] is True
    assert rows[keys["eva"]]["size"] == 3500
    assert rows[keys["pissa"]]["about"] == {"method": "pissa", "ranks": "8", "model": "ab" * 6}
    assert [row["key"] for row in run_cli("cache", "ls", "plain", "--json").document["entries"]] == ["plain"]
    assert run_cli("cache", "ls", "--kind", "artefact", "--json").document["count"] == 3
    assert run_cli("cache", "ls", "none", "--json").document["entries"] == []


def test_ls_of_many_is_written_as_it_comes(run_cli, store, monkeypatch):
    monkeypatch.setattr("smartinit.cli.cache._SORTED", 2)
    assert run_cli("cache", "ls", "--json").document["count"] == 3
    assert run_cli("cache", "ls").out.count("artefact") == 3


def test_ls_of_what_is_damaged_or_hostile(run_cli, store, keys):
    spoil(store.local.layout.entry(keys["eva"]))
    store.put("loud", meta={"method": "\x1b[2Jboo\nnext"})
    shown = run_cli("cache", "ls")
    assert shown.code == 0
    assert "\x1b" not in shown.out
    assert "method=\\x1b[2Jboo\\nnext" in shown.out
    assert "its digest differs" in shown.out
    assert len(shown.out.splitlines()) == 6
    problems = [row["problem"] for row in run_cli("cache", "ls", "--json").document["entries"]]
    assert sum(problem is not None for problem in problems) == 1


def test_path(run_cli, store, tmp_path):
    assert run_cli("cache", "path").out == f"{tmp_path / 'store'}\n"
    assert run_cli("cache", "path", "--json").document == {"path": str(tmp_path / "store"), "exists": True}


def test_gc_prints_the_plan_and_does_it(run_cli, store, keys):
    dry = run_cli("cache", "gc", "--max-size", "12kB", "--dry-run")
    assert dry.code == 0
    assert keys["eva"][:12] in dry.out
    assert "least recently used" in dry.out
    assert "freed" not in dry.out
    assert len(list(store.keys())) == 3
    done = run_cli("cache", "gc", "--max-size", "12kB")
    assert done.out.startswith(dry.out)
    assert "freed" in done.out.splitlines()[-1]
    assert sorted(store.keys()) == sorted([keys["pissa"], keys["corda"]])


def test_gc_as_one_document(run_cli, store, keys):
    store.pin(keys["eva"])
    plan = run_cli("cache", "gc", "--max-age", "90m", "--dry-run", "--json").document
    assert [entry["key"] for entry in plan["entries"]] == [keys["pissa"]]
    assert (plan["pinned"], plan["freed"], plan["kept"]) == ([keys["eva"]], None, 2)
    done = run_cli("cache", "gc", "--unused-for", "90m", "--json").document
    assert done["freed"]["entries"] == 1
    assert done["freed"]["bytes"] == done["expected_freed"] > 5000


def test_gc_shows_the_beginning_of_a_long_plan(run_cli, store):
    for index in range(30):
        store.put(f"many-{index}", meta={"index": index})
    shown = run_cli("cache", "gc", "--max-size", "0", "--dry-run")
    assert "… and 13 more entries" in shown.out
    assert "33 of 33 entries go" in shown.out


def test_gc_fails_where_something_stays(run_cli, store, monkeypatch):
    from smartinit.store import durable

    def refuse(path, to):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(durable, "move", refuse)
    shown = run_cli("cache", "gc", "--max-size", "0")
    assert shown.code == 1
    assert "Permission denied" in shown.out


def test_verify_and_repair(run_cli, store, keys):
    assert run_cli("cache", "verify").out.startswith("all sound")
    spoil(store.local.layout.blob(store.peek(keys["eva"]).blobs["own"].sha256))
    shown = run_cli("cache", "verify")
    assert shown.code == 4
    assert "its sha256 is" in shown.out
    assert shown.out.splitlines()[-1] == "2 unsound"
    found = run_cli("cache", "verify", "--repair", "--json")
    assert found.code == 4
    assert sorted(row["what"] for row in found.document["unsound"]) == ["blob", "missing"]
    assert run_cli("cache", "verify", "--json").document["unsound"] == []


def test_pins(run_cli, store, keys):
    shown = run_cli("cache", "pin", keys["eva"][:8], keys["corda"])
    assert shown.out == f"pinned {keys['eva']}\npinned {keys['corda']}\n"
    assert run_cli("cache", "gc", "--max-size", "0", "--json").document["pinned"] == sorted(
        [keys["eva"], keys["corda"]]
    )
    assert run_cli("cache", "unpin", keys["eva"], "--json").document["unpinned"] == [keys["eva"]]
    assert run_cli("cache", "gc", "--max-size", "0", "--json").document["freed"]["entries"] == 1
    assert list(store.keys()) == [keys["corda"]]


def test_rm(run_cli, store, keys):
    store.pin(keys["eva"])
    shown = run_cli("cache", "rm", keys["pissa"], keys["eva"][:10])
    assert shown.code == 2
    assert "is pinned; unpin it first, or use --force" in shown.err
    assert len(list(store.keys())) == 3, "all or none"
    assert run_cli("cache", "rm", keys["pissa"]).out == f"removed {keys['pissa']}\n"
    assert run_cli("cache", "rm", "--force", keys["eva"], "--json").document["removed"] == [keys["eva"]]
    assert list(store.keys()) == list(store.keys("artefact")) == [keys["corda"]]


@pytest.mark.parametrize("verb", ["pin", "unpin", "rm", "push"])
def test_keys_that_are_not_there(run_cli, store, keys, tmp_path, verb):
    before = [tmp_path / "other"] if verb == "push" else []
    for name in ("aaaaaab", "aaaaaac"):
        store.put(name, meta={})
    for text, code, message in (
        ("f" * 64, 3, "no entry"),
        ("abc", 2, "too short"),
        ("../../etc", 2, "is no key"),
        ("aaaaaa", 2, "2 keys begin with"),
    ):
        shown = run_cli("cache", verb, *before, keys["eva"], text, "--json")
        assert shown.code == code, shown
        assert message in shown.document["error"]
    assert run_cli("cache", "ls", "--json").document["count"] == 5


def test_stores_that_cannot_be(run_cli, store, tmp_path):
    (tmp_path / "file").write_text("x")
    shown = run_cli("cache", "ls", "--store", tmp_path / "file")
    assert shown.code == 1
    assert "a store is a folder" in shown.err
    shown = run_cli("cache", "ls", "--store", "s3://bucket/place")
    assert shown.code == 2
    assert "cache pull" in shown.err
    schema = store.local.layout.schema
    schema.unlink()
    schema.write_text('{"schema": 99}')
    for verb in ("ls", "gc", "verify", "migrate"):
        shown = run_cli("cache", verb)
        assert shown.code == 1
        assert "upgrade smartinit" in shown.err


def test_the_default_store_beside_a_remote_one(run_cli, store, tmp_path, monkeypatch):
    monkeypatch.setenv("SMARTINIT_CACHE", "s3://bucket/place")
    monkeypatch.chdir(tmp_path)
    assert run_cli("cache", "path").out == f"{tmp_path / 'cache'}\n"
    assert run_cli("cache", "migrate", "--json").document["store"] == "cache"


def test_push_and_pull(run_cli, store, keys, tmp_path):
    other = tmp_path / "other"
    done = run_cli("cache", "push", other, keys["eva"][:8], "--json")
    assert done.code == 0, done.err
    assert done.document["sent"] == [keys["eva"]]
    assert run_cli("cache", "push", other).out.splitlines()[-1].startswith("2 copied")
    assert run_cli("cache", "verify", "--store", other).code == 0
    store.local.remove(keys["eva"])
    pulled = run_cli("cache", "pull", other, "--json").document
    assert pulled["sent"] == [keys["eva"]]
    assert sorted(pulled["skipped"]) == sorted([keys["pissa"], keys["corda"]])
    assert store.get(keys["eva"]) is not None


def test_a_transfer_that_fails_in_part(run_cli, store, keys, tmp_path, monkeypatch):
    from smartinit.store.transfer import Transfer

    result = Transfer(sent=("a",), failed={"b": "half of it is\nmissing"}, bytes=5, conflicts=("c",))
    monkeypatch.setattr(Store, "pull", lambda *_: result)
    shown = run_cli("cache", "pull", tmp_path / "other")
    assert shown.code == 1
    assert shown.out.splitlines() == [
        "failed b: half of it is\\nmissing",
        "conflict c: the other side has a different result; that one stays",
        "1 copied (5 B), 0 there already, 1 failed",
    ]


def test_ls_into_a_pipe_that_is_closed(store):
    code = "import sys; from smartinit.cli import main; sys.exit(main(['cache', 'ls']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == b""
    assert process.wait(timeout=60) == 1


def test_the_verbs_import_nothing_heavy(store, keys):
    runs = [["ls"], ["verify"], ["gc", "--max-size", "1GB"], ["pin", keys["eva"]], ["migrate"], ["path"]]
    code = (
        "import sys\nfrom smartinit.cli import main\n"
        f"for arguments in {runs!r}: assert main(['cache', *arguments]) == 0\n"
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'numpy', 'sklearn', 'fsspec'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Size(), "10GB", 10e9),
        (Size(), "1.5 gib", 1.5 * 2**30),
        (Size(), "200", 200),
        (Size(), "1_000k", 1e6),
        (Size(), "2TiB", 2**41),
        (Duration(), "30d", 30 * 86400),
        (Duration(), "2w", 14 * 86400),
        (Duration(), "0s", 0),
        (Duration(), 5.0, 5.0),
    ],
)
def test_quantities(kind, text, value):
    assert kind.convert(text, None, None) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [(Size(), text) for text in ("-1", "ten", "1GBs", "", "1e9", "nan")]
    + [(Duration(), text) for text in ("30", "1y", "-1d")],
)
def test_no_quantities(kind, text):
    with pytest.raises(click.BadParameter, match="such as"):
        kind.convert(text, None, None)


def test_an_entry_of_a_newer_version_is_listed_as_such(run_cli, store, keys):
    newer = dataclasses.replace(store.peek(keys["eva"]), schema=99)
    path = store.local.layout.entry(keys["eva"])
    path.unlink()
    path.write_bytes(newer.to_bytes())
    assert "upgrade smartinit" in run_cli("cache", "ls").out
    assert "no blob goes" in run_cli("cache", "gc").out


def test_gc_of_a_store_that_cannot_be_written_is_one_error(run_cli, store, keys, shut):
    shut(store.local.layout.root)
    done = run_cli("cache", "gc", "--max-size", "0")
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "cannot be written, so nothing was removed" in done.err
    assert "remark" not in done.out
    assert set(store.keys()) == set(keys.values())
    assert run_cli("cache", "gc", "--max-size", "0", "--dry-run").code == 0
