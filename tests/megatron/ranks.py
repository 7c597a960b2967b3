"""Processes in a gloo group that run functions of test modules: started once, used by many tests."""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

PATIENCE = 300  # seconds that a case may take; a collective that waits for a lost peer gives up after half of it


class RankError(AssertionError):
    """A case failed on a rank."""


class Ranks:
    """``world`` processes; `run` calls one function on each, with the same arguments, and returns all results.

    Groups that a case makes end with it, as each has three threads that never sleep for long; unless ``keep_groups``.
    """

    def __init__(self, world: int, *, keep_groups: bool = False) -> None:
        self.world, self.keep_groups = world, keep_groups
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results by rank. What goes to the processes and comes back is pickled."""
        if not self._workers:
            self._start()
        module = sys.modules[function.__module__]
        for _, pipe in self._workers:
            pipe.send((module.__file__, function.__qualname__, args))
        answers = []
        for process, pipe in self._workers:
            known = pipe.poll(PATIENCE) and (process.is_alive() or pipe.poll(0))
            try:
                answers.append(pipe.recv() if known else (False, f"no answer in {PATIENCE} s"))
            except EOFError:
                answers.append((False, f"the process ended with {process.exitcode}"))
            if not answers[-1][0]:
                break  # its peers wait for it
        failed = [(rank, text) for rank, (ok, text) in enumerate(answers) if not ok]
        if failed or len(answers) < self.world:
            self.stop()
            raise RankError("\n".join(f"rank {rank} of {self.world}:\n{text}" for rank, text in failed))
        return [value for _, value in answers]

    def stop(self) -> None:
        """End the processes; the next `run` starts new ones."""
        for process, pipe in self._workers:
            pipe.close()
            process.terminate()
            process.join(10)
            if process.is_alive():
                process.kill()
        self._workers = []

    def _start(self) -> None:
        folder = tempfile.mkdtemp(prefix="smartinit-ranks-")
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            args = (theirs, rank, self.world, folder, self.keep_groups)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))


def _serve(pipe: Connection, rank: int, world: int, folder: str, keep_groups: bool) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=PATIENCE / 2),
    )
    modules: dict[str, Any] = {}
    while True:
        try:
            file, name, args = pipe.recv()
        except EOFError:
            return
        try:
            if file not in modules:
                modules[file] = _load(file)
            function = modules[file]
            for part in name.split("."):
                function = getattr(function, part)
            torch.manual_seed(0)
            answer = (True, function(*args))
            if not keep_groups:
                end_groups()
        except BaseException:  # noqa: BLE001 - the test that asked is told
            answer = (False, traceback.format_exc())
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return


def end_groups() -> None:
    """End all groups of this process but the whole world's; every rank calls it."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    dist.barrier()  # no peer still waits for something in them
    for group in [group for group in distributed_c10d._world.pg_map if group is not dist.group.WORLD]:
        dist.destroy_process_group(group)
    gc.collect()  # what still holds them


def _load(file: str) -> Any:
    name = f"rank_{Path(file).stem}"
    sys.path.insert(0, str(Path(file).parent))  # for helpers beside it
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
