"""Many processes on one store, with locks and without; one that is killed; threads; forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from faulty import audit, entry_files

from smartinit.store import Store
from smartinit.store.leases import leased_keys
from smartinit.store.local import LocalStore

SOUND = {"codes": [0], "problems": [], "unfinished": []}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


@needs_fork
def test_one_of_32_computes_and_all_get_the_same(program, ram, tally):
    found = program("crowd.py", ram, 32, "same", "locking")
    assert found == SOUND | {"computed": 1, "digests": 1, "warnings": []}
    tally(fault="32 processes want one key", computed=1, different=0)


@needs_fork
def test_without_locks_several_compute_and_all_get_the_same(program, ram, tally, times):
    computed = 0
    for again in range(times(2, 20)):
        found = program("crowd.py", ram / str(again), 32, "same", "free")
        computed += found.pop("computed")
        assert found == SOUND | {"digests": 1, "warnings": []}
    assert computed > times(2, 20), "without a lock they should have met"
    tally(fault="32 processes want one key, no locks", rounds=times(2, 20), computed=computed, different=0)


@needs_fork
def test_differing_results_are_told_and_one_is_taken_by_all(program, ram):
    found = program("crowd.py", ram, 32, "differing", "free")
    said = found.pop("warnings")
    assert 2 <= found.pop("computed") <= 32
    assert found == SOUND | {"digests": 1}
    assert said
    assert all("not deterministic" in warning for warning in said)
    assert list((ram / "store" / "aside").iterdir())


@needs_fork
def test_a_store_is_made_by_many_at_once(program, ram):
    found = program("crowd.py", ram, 32, "apart", "free")
    assert found == SOUND | {"computed": 32, "digests": 1, "warnings": []}
    assert len(list(LocalStore(ram / "store").keys("all"))) == 32


HOLDER = """
import sys, time
from smartinit.store import Store
with Store(sys.argv[1]).single_flight("k") as held:
    print(held, flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that computes for ever."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "store"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.wait(60)
    process.stdout.close()


def test_who_waits_in_vain_computes_by_itself(holder, tmp_path):
    said = []
    with Store(tmp_path / "store").single_flight("k", timeout=2.5, tell=said.append) as held:
        assert not held
    assert said[0] == "another process computes k; waiting for it, at most 2 s"
    assert said[1] == "k is still being computed elsewhere after 2 s; computing it here too"
    with Store(tmp_path / "store", locking=False).single_flight("k", timeout=100) as held:
        assert not held


def test_the_lock_of_a_killed_process_is_free(holder, tmp_path):
    said = []
    killer = threading.Timer(0.3, holder.send_signal, [signal.SIGKILL])
    killer.start()
    with Store(tmp_path / "store").single_flight("k", timeout=200, tell=said.append) as held:
        assert held
    killer.join()


def test_an_error_in_the_computation_frees_the_lock(tmp_path):
    store = Store(tmp_path / "store")
    with pytest.raises(ZeroDivisionError), store.single_flight("k"):
        raise ZeroDivisionError
    with store.single_flight("k", timeout=0) as held:
        assert held


def test_threads_share_a_store(ram, times):
    store, wrong = LocalStore(ram / "store"), []
    everything = {number: {"t": torch.full((1000,), float(number % 7))} for number in range(times(40, 400))}

    def work(thread):
        for number, tensors in everything.items():
            if number % 8 == thread or number % 3 == 0:
                store.put(f"k{number}", tensors, files=entry_files(number))
            entry = store.get(f"k{number}")
            if entry is None:
                continue
            with entry:
                if not torch.equal(entry.tensors["t"], tensors["t"]):
                    wrong.append(number)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8)))
    assert wrong == []
    assert audit(ram / "store") == []
    assert all(f"k{number}" in store for number in everything)
    assert leased_keys(store.layout) == set()


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_an_entry_outlives_its_store_and_a_fork(tmp_path):
    store = LocalStore(tmp_path / "store")
    store.put("k", {"t": torch.arange(10.0)})
    entry, layout = store.get("k"), store.layout
    del store
    child = os.fork()
    if not child:
        code = 1
        try:
            if torch.equal(entry.tensors["t"], torch.arange(10.0)):
                code = 0
            entry.close()
        finally:
            os._exit(code)
    deadline = time.monotonic() + 100
    status = 0, 0
    while status[0] == 0 and time.monotonic() < deadline:
        status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    assert status == (child, 0)
    assert leased_keys(layout) == {"k"}, "the child has no say over its parent's lease"
    entry.close()
    assert leased_keys(layout) == set()
    assert torch.equal(entry.tensors["t"], torch.arange(10.0))
