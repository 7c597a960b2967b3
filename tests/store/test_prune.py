from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
import time

import pytest

from smartinit.errors import ConfigError, StoreError
from smartinit.store import Store, durable
from smartinit.store.prune import plan_prune
from smartinit.store.verify import verify

HOUR, DAY, WEEK = 3600.0, 86400.0, 7 * 86400.0


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def shift(path, seconds):
    """Make a file look older (or, if negative, younger than now)."""
    when = time.time() - seconds
    os.utime(path, (when, when))


def fill(store, names="abc", *, shared=b"shared" * 50):
    """Entries of 1,000 bytes and a blob that all share, put and used in this order, an hour apart."""
    for index, name in enumerate(names):
        store.put(name, files={"own": name.encode() * 1000, "shared": shared}, tags=("group",))
        shift(store.local.layout.entry(name), (len(names) - index) * HOUR)


def on_disk(store):
    """Bytes of all files, each once."""
    files = {}
    for path in store.local.layout.root.rglob("*"):
        if path.is_file():
            files[path.stat().st_ino] = path.stat().st_size
    return sum(files.values())


def blob_paths(store):
    return sorted(store.local.layout.blobs.glob("*/*"))


def stray(store, content, age):
    """A blob that no entry names."""
    store.put("stray", files={"x": content})
    blob = store.local.layout.blob(store.peek("stray").blobs["x"].sha256)
    store.local.remove("stray")
    shift(blob, age)
    return blob


def everything(root):
    return {
        path: (path.lstat().st_mtime_ns, path.lstat().st_ino) for path in root.rglob("*") if path.parent.name != "used"
    }


def test_a_plan_changes_nothing_and_says_what_it_frees(store):
    fill(store)
    store.local.mark_used("b")
    for blob in blob_paths(store):
        shift(blob, DAY)
    before = everything(store.local.layout.root)
    plan = store.prune(max_bytes=0, dry_run=True)
    assert everything(store.local.layout.root) == before
    used = on_disk(store)
    freed = plan.execute()
    assert freed.bytes == plan.expected_freed == used - on_disk(store)
    assert (freed.entries, freed.blobs, freed.problems, freed.kept) == (3, 4, (), ())
    assert list(store.keys()) == list(store.keys("group")) == blob_paths(store) == []
    assert not (store.local.layout.used / "b").exists()


def test_the_least_recently_used_go_until_it_is_small_enough(store):
    fill(store, "abcd")
    store.local.mark_used("a")
    total = store.prune(dry_run=True).total
    plan = store.prune(max_bytes=total - 1500, dry_run=True)
    assert [going.key for going in plan.entries] == ["b"]
    plan = store.prune(max_bytes=total - 1600)
    assert [going.key for going in plan.entries] == ["b", "c"]
    assert sorted(store.keys()) == sorted(store.keys("group")) == ["a", "d"]
    assert all(store.get(key) is not None for key in "ad"), "the blob that they share is there"
    assert store.prune(dry_run=True).total <= total - 1600


def test_what_entries_share_is_freed_with_the_last_of_them(store):
    fill(store, "ab", shared=b"s" * 100_000)
    plan = store.prune(max_age=1.5 * HOUR)
    assert [going.key for going in plan.entries] == ["a"]
    assert plan.expected_freed < 5_000
    assert store.get("b") is not None
    for blob in blob_paths(store):
        shift(blob, DAY)
    used = on_disk(store)
    assert store.prune(max_age=0).expected_freed == used - on_disk(store) > 100_000
    assert blob_paths(store) == []


@pytest.mark.parametrize(("rule", "gone"), [("max_age", "ab"), ("unused_for", "b")])
def test_age_and_last_use_are_different_things(store, rule, gone):
    fill(store, "abc")
    store.local.mark_used("a")
    plan = store.prune(**{rule: 1.5 * HOUR})
    assert "".join(going.key for going in plan.entries) == gone
    assert plan.kept == 3 - len(gone)


def test_what_is_pinned_or_read_stays(store):
    fill(store)
    store.pin("a")
    with store.get("b"):
        plan = store.prune(max_bytes=0)
        assert (plan.pinned, plan.leased) == (("a",), ("b",))
        assert sorted(store.keys()) == ["a", "b"]
        assert any("bytes stay, more than the 0" in message for message in plan.messages)
        assert store.get("a") is not None
    store.unpin("a")
    store.prune(max_bytes=0)
    assert list(store.keys()) == []


def test_a_reader_in_another_process_and_one_that_was_killed(store):
    fill(store)
    code = f"""
        from smartinit.store import Store
        entry = Store({str(store.local.layout.root)!r}).local.get("a", tensors=False)
        print("reading", flush=True)
        input()
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "reading\n"
        assert store.prune(max_bytes=0, dry_run=True).leased == ("a",)
    finally:
        child.kill()
        child.communicate(timeout=60)
    assert store.prune(max_bytes=0, dry_run=True).leased == ()


def test_what_is_wanted_again_after_the_plan_stays(store):
    fill(store, "abcd")
    plan = store.prune(max_bytes=0, dry_run=True)
    store.pin("a")
    store.get("b").close()
    store.put("c", files={"own": b"another" * 200}, replace=True)
    freed = plan.execute()
    assert sorted(freed.kept) == ["a", "b", "c"]
    assert sorted(store.keys()) == ["a", "b", "c"]
    assert all(store.get(key) is not None for key in "abc")
    assert verify(store.local) == []


def test_a_reader_or_a_pin_that_comes_after_the_plan(store, monkeypatch):
    from smartinit.store.leases import take_lease

    fill(store)
    plan = store.prune(max_bytes=0, dry_run=True)
    lease = take_lease(store.local.layout, "a")
    original = durable.move

    def move(path, to):
        if path.name == "b.json":
            store.pin("b")
        if path.name == "c.json":  # at the very moment
            store.put("c", files={"own": b"another" * 200}, replace=True)
        original(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "move", move)
        freed = plan.execute()
    assert sorted(freed.kept) == sorted(store.keys()) == ["a", "b", "c"]
    assert store.get("c").manifest.size == 1400
    assert verify(store.local) == []
    lease.release()


def test_what_has_another_name_elsewhere_frees_nothing(store, tmp_path):
    fill(store, "a")
    os.link(store.local.layout.blob(store.peek("a").blobs["own"].sha256), tmp_path / "mine")
    used = on_disk(store)
    assert store.prune(max_bytes=0, dry_run=True).execute().bytes == used - on_disk(store) - 1000
    assert (tmp_path / "mine").read_bytes() == b"a" * 1000


def test_a_blob_that_nothing_names_stays_for_an_hour(store):
    fill(store, "a")
    young, old, future = (
        stray(store, text * 500, age) for text, age in ((b"y", 0.9 * HOUR), (b"o", 1.1 * HOUR), (b"f", -DAY))
    )
    plan = store.prune()
    assert [blob.sha256 for blob in plan.blobs] == [old.name]
    assert (young.exists(), old.exists(), future.exists()) == (True, False, True)


def test_a_blob_that_is_named_after_the_plan_stays(store):
    blob = stray(store, b"x" * 1000, DAY)
    plan = store.prune(dry_run=True)
    assert len(plan.blobs) == 1
    store.put("late", files={"x": b"x" * 1000})
    assert plan.execute().blobs == 0
    assert blob.exists()
    shift(blob, DAY)  # as if the writer could not touch it: the manifest alone keeps it
    assert plan.execute().blobs == 0
    assert store.get("late") is not None


@pytest.mark.parametrize("moment", ["trash_of", "settle"])
def test_a_writer_between_the_steps_of_the_sweep(store, monkeypatch, moment):
    """The blob has lost its name already when its manifest comes: before and after the second look at manifests."""
    blob = stray(store, b"x" * 1000, DAY)
    import smartinit.store.sweep as module

    original, done = getattr(module, moment), []

    def interrupted(layout, *arguments):
        if "blob" in arguments and not done:
            done.append(True)
            assert not blob.exists()
            store.put("late", files={"x": b"x" * 1000})
        return original(layout, *arguments)

    monkeypatch.setattr(module, moment, interrupted)
    store.prune()
    assert done
    assert store.get("late") is not None
    assert verify(store.local) == []
    assert list(store.local.layout.unfinished.iterdir()) == []


def test_a_manifest_that_came_before_its_blob_was_taken_away(store, monkeypatch):
    """The writer looked whether its blob was there, and it was: then it may not go."""
    blob = stray(store, b"x" * 1000, DAY)
    import smartinit.store.sweep as module

    original = module.discard

    def late(layout, kind, name, modified_ns):
        if kind == "blob":
            store.put("late", files={"x": b"x" * 1000})
            os.utime(blob, ns=(modified_ns, modified_ns))
        return original(layout, kind, name, modified_ns)

    monkeypatch.setattr(module, "discard", late)
    assert store.prune().blobs
    assert blob.exists()
    assert store.get("late") is not None


@pytest.mark.parametrize("kind", ["entry", "blob"])
def test_a_gc_that_is_killed_is_finished_by_the_next(store, kind):
    fill(store)
    named = store.local.layout.blob(store.peek("c").blobs["own"].sha256)
    root = store.local.layout.root
    code = f"""
        import os
        import smartinit.store.sweep as module
        from smartinit.store import Store
        original = module.settle
        def killed(layout, trash, kind, wanted):
            if kind == {kind!r}:
                os.kill(os.getpid(), 9)
            return original(layout, trash, kind, wanted)
        module.settle = killed
        Store({str(root)!r}).prune(max_age=1.5 * 3600)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=120)
    assert done.returncode == -9
    left = {path.name.split(".")[1] for path in store.local.layout.unfinished.iterdir()}
    assert left == {kind}
    if kind == "blob":  # as if someone had named it at that moment
        digest = named.name
        named.rename(store.local.layout.unfinished / f"trash.blob.{digest}.{named.stat().st_mtime_ns}.{'0' * 16}")
    plan = store.prune(max_age=1.5 * HOUR)
    assert {item.reason for item in plan.leftovers} == {"left by an interrupted gc"}
    assert list(store.local.layout.unfinished.iterdir()) == []
    assert list(store.keys()) == ["c"]
    assert store.get("c") is not None
    assert verify(store.local) == []
    store.local.remove("c")
    plan_prune(store.local, now=time.time() + DAY).execute()
    assert blob_paths(store) == []


def test_what_cannot_be_read_keeps_every_blob(store, monkeypatch):
    fill(store, "ab")
    old = stray(store, b"x" * 1000, DAY)
    import smartinit.store.census as module

    original = module.read_small

    def broken(path, most):
        if str(path).endswith("b.json"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(path, most)

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_small", broken)
        plan = store.prune(max_age=0)
    assert [going.key for going in plan.entries] == ["a"]
    assert plan.blobs == ()
    assert "b.json" in plan.messages[0]
    assert "Input/output error" in plan.messages[0]
    assert old.exists()
    assert len(blob_paths(store)) == 4
    assert store.get("b") is not None


def test_a_manifest_of_a_newer_version_keeps_every_blob(store):
    old = stray(store, b"x" * 1000, DAY)
    plan = store.prune(dry_run=True)
    assert len(plan.blobs) == 1
    newer(store, "later")
    assert plan.execute().blobs == 0, "it came after the plan"
    assert "upgrade smartinit" in store.prune().messages[0]
    assert old.exists()


def newer(store, key):
    """A manifest with a schema that nobody knows yet."""
    import dataclasses

    from smartinit.store.manifest import Manifest

    content = dataclasses.replace(Manifest(key=key, blobs={}), schema=99).to_bytes()
    store.local.layout.entry(key).write_bytes(content)


def test_a_damaged_manifest_names_nothing_and_is_left_to_verify(store):
    fill(store, "ab")
    path = store.local.layout.entry("a")
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    for blob in blob_paths(store):
        shift(blob, DAY)
    plan = store.prune()
    assert len(plan.blobs) == 1
    assert "verify --repair" in plan.messages[0]
    assert path.exists()
    assert store.get("b") is not None


def test_unfinished_files_of_the_dead_and_of_yesterday_go(store):
    fill(store, "a")
    layout = store.local.layout
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], check=True, capture_output=True)
    mine, old, foreign = layout.new_file(), layout.new_file(), layout.unfinished / "elsewhere.1.abc"
    host, _, token = mine.name.split(".")
    dead, folder = layout.unfinished / f"{host}.{int(ended.stdout)}.{token}", layout.unfinished / "folder"
    for path in (mine, old, foreign, dead):
        path.write_bytes(b"x" * 100)
    folder.mkdir()
    (folder / "inside").write_bytes(b"x" * 100)
    future = layout.unfinished / f"{dead.name}f"
    future.write_bytes(b"x")
    shift(old, 1.1 * DAY)
    shift(folder, 1.1 * DAY)
    shift(future, -WEEK)
    plan = store.prune()
    assert {item.path for item in plan.leftovers} == {old, dead, folder}
    assert plan.expected_freed == 300
    assert set(layout.unfinished.iterdir()) == {mine, foreign, future}


def test_broken_and_differing_results_go_after_a_week(store):
    fill(store, "a")
    layout = store.local.layout
    with pytest.warns(UserWarning, match="not deterministic"):
        store.put("a", files={"own": b"other" * 100})
    layout.quarantine.mkdir()
    (layout.quarantine / "broken.1234").write_bytes(b"x" * 100)
    shift(layout.quarantine / "broken.1234", 2 * WEEK)  # the file is old, but was found broken just now
    for blob in blob_paths(store):
        shift(blob, DAY)
    assert store.prune().expected_freed == 0
    assert len(blob_paths(store)) == 3, "the blob of the result that was kept aside stays with it"
    later = time.time() + 1.1 * WEEK
    freed = plan_prune(store.local, now=later).execute()
    assert (freed.leftovers, freed.blobs) == (2, 1)
    assert not list(layout.quarantine.iterdir())
    assert not list(layout.aside.iterdir())
    assert store.get("a") is not None


def test_marks_of_entries_that_are_gone_go(store):
    fill(store, "ab")
    store.pin("b")
    store.get("b").close()
    layout = store.local.layout
    layout.entry("b").unlink()
    marks = [layout.index("group") / "b", layout.used / "b", layout.pins / "b"]
    assert store.prune().leftovers == (), "a writer marks first, and publishes then"
    for mark in marks:
        shift(mark, 2 * HOUR)
    assert {item.path for item in store.prune().leftovers} == set(marks)
    assert not any(mark.exists() for mark in marks)
    assert list(store.keys("group")) == ["a"]


def test_a_mark_whose_entry_comes_at_that_moment_is_there_afterwards(store, monkeypatch):
    fill(store, "a")
    mark = store.local.layout.index("group") / "late"
    mark.touch()
    shift(mark, DAY)
    original = durable.remove

    def remove(path):
        if path == mark and not store.local.layout.entry("late").exists():
            store.put("late", files={"x": b"x"}, tags=("group",))
        return original(path)

    monkeypatch.setattr(durable, "remove", remove)
    store.prune()
    assert sorted(store.keys("group")) == ["a", "late"]


def test_a_mark_that_was_made_again_after_the_plan_stays(store):
    fill(store, "a")
    mark = store.local.layout.index("group") / "late"
    mark.touch()
    shift(mark, DAY)
    plan = store.prune(dry_run=True)
    assert len(plan.leftovers) == 1
    os.utime(mark)  # a writer has begun
    plan.execute()
    assert mark.exists()


def test_a_mark_that_goes_between_a_writers_steps_is_made_again(store, monkeypatch):
    fill(store, "a")
    mark = store.local.layout.index("group") / "late"
    original = durable.publish_once

    def publish_once(unfinished, final):
        if final.name == "late.json":
            mark.unlink()
        return original(unfinished, final)

    monkeypatch.setattr(durable, "publish_once", publish_once)
    store.put("late", files={"x": b"x"}, tags=("group",))
    assert sorted(store.keys("group")) == ["a", "late"]


def test_adapter_folders_go_with_their_entries(store):
    fill(store, "ab")
    layout = store.local.layout
    for key in "ab":
        folder = layout.adapters / key
        folder.mkdir(parents=True)
        os.link(layout.blob(store.peek(key).blobs["own"].sha256), folder / "own")
        (folder / "config.json").write_bytes(b"{}" * 50)
    used = on_disk(store)
    plan = store.prune(max_age=1.5 * HOUR)
    assert [path.name for path in layout.adapters.iterdir()] == ["b"]
    assert plan.expected_freed == used - on_disk(store)
    layout.entry("b").unlink()
    shift(layout.adapters / "b", DAY)
    store.prune()
    assert list(layout.adapters.iterdir()) == []


def test_links_are_removed_and_not_followed(store, tmp_path):
    fill(store, "a")
    layout = store.local.layout
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"x")
    layout.quarantine.mkdir()
    for folder in (layout.quarantine, layout.unfinished):
        (folder / "link").symlink_to(outside)
    layout.adapters.mkdir()
    (layout.adapters / "gone").symlink_to(outside)
    plan_prune(store.local, now=time.time() + 2 * WEEK).execute()
    assert (outside / "precious").exists()
    assert not any(
        os.path.lexists(path)
        for path in (layout.quarantine / "link", layout.unfinished / "link", layout.adapters / "gone")
    )


def test_what_cannot_be_removed_is_named_and_the_rest_goes(store, monkeypatch):
    fill(store)
    bad = store.local.layout.blob(store.peek("a").blobs["own"].sha256)
    original = durable.move

    def move(path, to):
        if path == bad:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        original(path, to)

    plan = store.prune(max_bytes=0, dry_run=True)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "move", move)
        freed = plan.execute()
    assert "Permission denied" in freed.problems[0]
    assert blob_paths(store) == [bad]
    assert freed.bytes == plan.expected_freed - 1000


def test_stores_that_are_missing_empty_read_only_or_gone(store, tmp_path):
    plan = store.prune(max_bytes=0)
    assert (plan.entries, plan.total, plan.expected_freed) == ((), 0, 0)
    assert not (tmp_path / "store").exists()
    fill(store)
    watched = Store(tmp_path / "store", read_only=True)
    assert len(watched.prune(max_bytes=0, dry_run=True).entries) == 3
    with pytest.raises(StoreError, match="read-only"):
        watched.prune(max_bytes=0)
    plan = store.prune(max_bytes=0, dry_run=True)
    shutil.rmtree(tmp_path / "store")
    assert plan.execute().bytes == 0


@pytest.mark.parametrize("rule", ["max_bytes", "max_age", "unused_for"])
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_rules_below_zero_are_refused(store, rule, value):
    with pytest.raises(ConfigError, match=rule):
        store.prune(**{rule: value})


def test_writers_beside_a_gc_lose_nothing(store, seed):
    """Two processes put entries that share blobs; gc sweeps without any grace all the while."""
    root = str(store.local.layout.root)
    code = f"""
        import random, sys
        from smartinit.store import Store
        store, dice = Store({root!r}), random.Random(f"{seed}{{sys.argv[1]}}")
        for step in range(120):
            own = f"{{sys.argv[1]}}-{{step % 7}}"
            store.put(own, files={{"a": bytes([dice.randrange(4)]) * 500, "b": own.encode()}}, replace=True)
            if dice.random() < 0.3:
                store.local.remove(own)
        print(own if own in store else "", flush=True)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    writers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in ("one", "two")]
    try:
        end, sweeps = time.monotonic() + 60, 0
        while any(writer.poll() is None for writer in writers) and time.monotonic() < end:
            plan_prune(store.local, now=time.time() + 2 * HOUR).execute()
            sweeps += 1
        results = [writer.communicate(timeout=60)[0] for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert sweeps > 5
    assert verify(store.local) == []
    last = [result.strip() for result in results if result.strip()]
    assert all(store.get(key) is not None for key in {*last, *store.keys()})
