"""Bytes to and from another machine: no wait without an end, no file that is longer than was agreed.

fsspec knows the protocols. What it leaves open is settled here: how long anything may take, how often it is tried, and
how a file gets its name only when it is whole.
"""

from __future__ import annotations

import re
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from smartinit.errors import ConfigError, SmartinitError, StoreError, VerificationError
from smartinit.store.connections import READ_ONLY, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from smartinit.store.connections import Connection

    T = TypeVar("T")

TIMEOUT = 60.0
"""Seconds that any single answer may take."""
ATTEMPTS = 3
_PAUSE = 0.2  # seconds before the second attempt; four times as long before the third
_PIECE = 4 << 20
_SLOWEST = 50_000  # bytes per second of an upload before it counts as stuck
_LISTING = 5  # a listing has many answers: this many times the timeout
_DEFINITE = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError, ImportError)
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class _Trouble(Exception):  # noqa: N818 - never seen outside
    """What a connection had to say, told apart from what this machine's own disk says meanwhile."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error

    @property
    def is_absence(self) -> bool:
        """Whether it only says that there is no such file."""
        return isinstance(self.error, (FileNotFoundError, NotADirectoryError))


class RemoteError(StoreError):
    """The other side cannot be reached, refuses, or is of another version: this side is not to blame."""


def is_url(place: object) -> bool:
    """Whether text names a place on another machine (or ``file://``), and no folder."""
    return isinstance(place, str) and _URL.match(place) is not None


class Transport:
    """Files below one URL, by relative names.

    Args:
        url: such as ``s3://bucket/folder``.
        options: of fsspec's file system for it, such as ``endpoint_url``.
        timeout: seconds that an answer, or the next piece of a file, may take.
        attempts: how often anything is tried that fails without having taken that long.
    """

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any] | None = None,
        *,
        timeout: float = TIMEOUT,
        attempts: int = ATTEMPTS,
    ) -> None:
        if timeout <= 0 or attempts < 1:
            raise ConfigError(f"timeout={timeout}, attempts={attempts}: expected more than 0 seconds and 1 or more")
        self.url, self.timeout, self.attempts = url, timeout, attempts
        self.shown = without_secrets(url)
        self._options = dict(options or {})
        self._connection: Connection | None = None
        self._connecting = threading.Lock()
        self.calls = 0
        """Requests so far; listings and uploads in parts count once."""

    def read_small(self, name: str, most: int) -> bytes | None:
        """A file's bytes; None: there is no such file.

        Raises:
            VerificationError: it has more than ``most`` bytes.
            RemoteError: it cannot be read.
        """

        def read() -> bytes | None:
            try:
                return b"".join(self.stream(name, most))
            except _Trouble as trouble:
                if trouble.is_absence:
                    return None
                raise

        return self.attempt(f"'{name}' cannot be read", read)

    def stream(self, name: str, most: int) -> Iterator[bytes]:
        """A file's bytes in pieces, as they come; memory for one piece. It is tried once: see `attempt`.

        Raises:
            VerificationError: more than ``most`` bytes come.
            RemoteError: for other reasons, within `attempt`.
        """
        connection, got = self._connected(), 0
        self.calls += 1
        file = self._bounded(connection.open, name)
        try:
            while piece := self._bounded(connection.read, file, min(_PIECE, most + 1 - got)):
                got += len(piece)
                if got > most:
                    raise VerificationError(
                        f"'{name}' in '{self.shown}' is longer than the {most} bytes that it may have"
                    )
                yield piece
        finally:
            with suppress(Exception):
                self._bounded(connection.close, file)

    def size(self, name: str) -> int | None:
        """Of a file, bytes; None: there is no such file.

        Raises:
            RemoteError: it cannot be asked for.
        """

        def ask() -> int | None:
            connection = self._connected()
            self.calls += 1
            try:
                return self._bounded(connection.size, name)
            except _Trouble as trouble:
                if trouble.is_absence:
                    return None
                raise

        return self.attempt(f"'{name}' cannot be looked up", ask)

    def names(self, folder: str) -> list[str]:
        """Of the files in a folder; none if there is no such folder.

        Raises:
            RemoteError: it cannot be listed.
        """

        def ask() -> list[str]:
            connection = self._connected()
            self.calls += 1
            try:
                return self._bounded(connection.names, folder, seconds=_LISTING * self.timeout)
            except _Trouble as trouble:
                if trouble.is_absence:
                    return []
                raise

        return self.attempt(f"'{folder}' cannot be listed", ask)

    def put(self, name: str, content: bytes, *, once: bool = False) -> bool:
        """Write a small file: readers see it whole or not at all.

        Args:
            name: of the file.
            content: of the file.
            once: leave one that is there alone.

        Returns:
            Whether it was written. Where the protocol has no conditional write, two that write at the same time may
            both believe so.

        Raises:
            RemoteError: it cannot be written.
            StoreError: nothing can be written by this protocol.
        """
        self._check_writable()

        def write() -> bool:
            connection = self._connected()
            self.calls += 1
            try:
                self._bounded(connection.put, name, content, once, seconds=self._upload_seconds(len(content)))
            except _Trouble as trouble:
                if once and isinstance(trouble.error, FileExistsError):
                    return False
                raise
            return True

        return self.attempt(f"'{name}' cannot be written", write)

    def upload(self, name: str, path: Path) -> None:
        """Write a file from the disk: readers see it whole or not at all.

        Raises:
            RemoteError: it cannot be written.
            StoreError: nothing can be written by this protocol.
        """
        self._check_writable()

        def write() -> None:
            connection = self._connected()
            self.calls += 1
            self._bounded(connection.upload, name, path, seconds=self._upload_seconds(path.stat().st_size))

        self.attempt(f"'{name}' cannot be written", write)

    def attempt(self, what: str, call: Callable[[], T]) -> T:
        """Do something that may fail by chance, a few times at most.

        Args:
            what: went wrong if it does, for the message.
            call: what is done.

        Raises:
            RemoteError: it failed every time, or took too long.
        """
        began = time.monotonic()
        error: BaseException = RuntimeError("it was not tried")
        for number in range(self.attempts):
            if number:
                time.sleep(min(_PAUSE * 4 ** (number - 1), self.timeout))
            try:
                return call()
            except _Trouble as trouble:
                error = trouble.error
            if isinstance(error, _DEFINITE) or time.monotonic() - began >= self.timeout:
                break
        raise RemoteError(
            f"{what} in the store '{self.shown}' ({_reason(error)}); check its address, your access and the network, "
            "or go on without it"
        ) from error

    def _check_writable(self) -> None:
        if urlsplit(self.url).scheme.lower() in READ_ONLY:
            raise StoreError(
                f"the store '{self.shown}' can only be read by its protocol; copy a store's folder there by other means"
            )

    def _upload_seconds(self, size: int) -> float:
        return self.timeout + size / _SLOWEST

    def _connected(self) -> Connection:
        with self._connecting:
            if self._connection is None or not self._connection.is_ours():
                try:
                    self._connection = connect(self.url, self._options, self.timeout)
                except SmartinitError:
                    raise
                except Exception as error:
                    raise _Trouble(error) from error
            return self._connection

    def _bounded(self, call: Callable[..., T], *arguments: Any, seconds: float = 0.0) -> T:  # noqa: ANN401
        """Call and wait, but not for ever: what is still running then is left to itself.

        Raises:
            _Trouble: it takes longer, or fails.
            SmartinitError: passed on.
        """
        seconds = seconds or self.timeout
        done = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(call(*arguments, seconds))
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                errors.append(error)
            done.set()

        threading.Thread(target=run, name="smartinit-remote", daemon=True).start()
        if not done.wait(seconds + 1):  # the connection's own end of patience comes first, and cleans up
            raise _Trouble(TimeoutError(f"no answer within {seconds:.0f} s"))
        if errors and isinstance(errors[0], SmartinitError):
            raise errors[0]
        if errors:
            raise _Trouble(errors[0]) from errors[0]
        return results[0]


def without_secrets(url: str) -> str:
    """A URL for messages: without user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _reason(error: BaseException) -> str:
    """What an error says, on one line and without end."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(letter if letter.isprintable() else "?" for letter in re.sub(r"//[^/@\s]*@", "//", text))
    return text if len(text) <= 200 else text[:200] + "…"  # noqa: PLR2004 - a line or two
