"""Copying entries between a folder and another store."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from smartinit.errors import StoreError, VerificationError
from smartinit.store.adoption import copy_entry
from smartinit.store.keys import check_name
from smartinit.store.layers import open_place
from smartinit.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from concurrent.futures import Future

    from smartinit.store.adoption import Copied
    from smartinit.store.keys import Key
    from smartinit.store.layers import Place

JOBS = 8
"""Entries that go to or from another machine at the same time."""
_NONE: Mapping[str, str] = MappingProxyType({})
_ABSENT = "it is not there, or not sound (a key must be whole here)"


@dataclass(frozen=True)
class Transfer:
    """What was copied.

    Attributes:
        sent: keys that the other side has now and had not before.
        skipped: keys that it had already.
        failed: keys that could not be copied, each with a sentence that says why.
        bytes: of blobs that went over; blobs that were there do not count.
        conflicts: keys for which the other side has a different result of the same inputs: that one stays.
    """

    sent: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=lambda: _NONE)
    bytes: int = 0
    conflicts: tuple[str, ...] = ()


class TransferError(StoreError):
    """A transfer that could not go on; what was copied is there, and another attempt starts after it.

    Attributes:
        transfer: what was done until then.
    """

    def __init__(self, message: str, transfer: Transfer) -> None:
        super().__init__(message)
        self.transfer = transfer


def push(
    local: LocalStore, target: Place, keys: Iterable[Key | str] | None = None, *, progress: bool = False
) -> Transfer:
    """Copy entries to another store.

    An entry goes over with all its blobs or not at all; what is there is not sent again, so that a push that was
    broken off is just repeated. Whatever the other side has for a key stays.

    Args:
        local: where they come from.
        target: a folder, or a URL such as ``s3://bucket/folder``.
        keys: which ones; None: all.
        progress: show a bar.

    Raises:
        TransferError: the other side cannot be reached or written to.
    """
    other = open_place(target)
    names = [check_name(key) for key in (local.keys() if keys is None else keys)]
    if isinstance(other, LocalStore):
        other.check_writable()
        return _copy_all(names, partial(copy_entry, local, other), progress=progress, jobs=1)
    return _copy_all(names, partial(other.send, store=local), progress=progress, jobs=JOBS)


def pull(
    local: LocalStore, source: Place, keys: Iterable[Key | str] | None = None, *, progress: bool = False
) -> Transfer:
    """Copy entries from another store, every byte of which is checked before it can be seen.

    Args:
        local: where they go to.
        source: a folder, or a URL such as ``s3://bucket/folder``.
        keys: which ones; None: all.
        progress: show a bar.

    Raises:
        TransferError: the other side cannot be reached, or this one not written to.
        StoreError: there is no store in a folder.
    """
    other = open_place(source, read_only=True)
    if isinstance(other, LocalStore) and not other.layout.entries.is_dir():
        raise StoreError(f"there is no store in '{other.layout.root}' that could be pulled from; check the path")
    local.check_writable()
    names = [check_name(key) for key in (other.keys() if keys is None else keys)]
    if isinstance(other, LocalStore):
        return _copy_all(names, partial(copy_entry, other, local), progress=progress, jobs=1)
    return _copy_all(names, partial(other.fetch, into=local), progress=progress, jobs=JOBS)


class _Report:
    """A transfer in the making."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.skipped: list[str] = []
        self.conflicts: list[str] = []
        self.failed: dict[str, str] = {}
        self.bytes = 0

    def note(self, name: str, copied: Copied | None) -> None:
        """One key is done."""
        if copied is None:
            self.failed[name] = _ABSENT
            return
        self.bytes += copied.bytes
        (self.sent if copied.new else self.skipped).append(name)
        if copied.conflict:
            self.conflicts.append(name)

    def transfer(self) -> Transfer:
        """As it stands."""
        failed = MappingProxyType(dict(sorted(self.failed.items())))
        return Transfer(
            tuple(sorted(self.sent)), tuple(sorted(self.skipped)), failed, self.bytes, tuple(sorted(self.conflicts))
        )


def _copy_all(names: list[str], copy: Callable[[str], Copied | None], *, progress: bool, jobs: int) -> Transfer:
    """Copy entries, several at a time.

    Raises:
        TransferError: at the first trouble that the next entry would have too.
    """
    report, rest = _Report(), iter(dict.fromkeys(names))
    running: dict[Future[Copied | None], str] = {}
    with _bar(len(names), shown=progress) as bar, ThreadPoolExecutor(jobs, "smartinit-transfer") as threads:
        while True:
            for name in islice(rest, 2 * jobs - len(running)):
                running[threads.submit(copy, name)] = name
            if not running:
                return report.transfer()
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            trouble: StoreError | None = None
            for future in finished:
                name = running.pop(future)
                try:
                    report.note(name, future.result())
                except VerificationError as error:
                    report.failed[name] = str(error)
                except StoreError as error:
                    report.failed[name], trouble = str(error), error
                if bar is not None:
                    bar.update()
            if trouble is not None:
                threads.shutdown(wait=True, cancel_futures=True)
                _take_stock(running, report)
                raise TransferError(
                    f"{trouble} (after {len(report.sent) + len(report.skipped)} of {len(names)} entries; what is over "
                    "stays: repeat it to go on)",
                    report.transfer(),
                ) from trouble


def _take_stock(running: Mapping[Future[Copied | None], str], report: _Report) -> None:
    """What became of entries that were on their way when it stopped."""
    for future, name in running.items():
        if future.cancelled():
            continue
        error = future.exception()
        if error is None:
            report.note(name, future.result())
        else:
            report.failed[name] = str(error)


def _bar(total: int, *, shown: bool) -> Any:  # noqa: ANN401 - tqdm has no types
    if not shown:
        return nullcontext()
    from tqdm import tqdm

    return tqdm(total=total, unit="entry")
