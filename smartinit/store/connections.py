"""What each protocol can do: reading in pieces, listing, and giving a file its name only when it is whole.

s3://, gs://, az://    a file appears when it has been sent; S3 and GCS refuse a second one if asked to
webdav(s)://           sent under another name and moved, which the server refuses if the name is taken
hf://, http(s)://      read only
everything else        sent under another name and moved, after a look whether the name is taken
"""

from __future__ import annotations

import io
import os
import secrets
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from smartinit.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_EXTRAS = {"s3": "s3", "s3a": "s3", "webdav": "webdav", "webdavs": "webdav"}
# One request each, after which a file is there; the first kind also knows "only if there is none".
_CONDITIONAL = {"s3", "s3a", "gs", "gcs"}
_WHOLE = {*_CONDITIONAL, "az", "abfs", "abfss", "memory"}
READ_ONLY = {"hf", "http", "https"}
_OTHERS = {"webdav", "webdavs", "sftp", "ssh"}
PROTOCOLS = frozenset(_WHOLE | READ_ONLY | _OTHERS)
_UNFINISHED = "tmp"
_FAREWELL = 2.0  # seconds


class Connection:
    """A file system below one folder; every call takes, last, the seconds that it may take.

    Args:
        files: fsspec's file system.
        root: the folder.
        scheme: of the URL.
    """

    def __init__(self, files: Any, root: str, scheme: str) -> None:  # noqa: ANN401 - fsspec has no types
        self._files, self._root, self._scheme = files, root.rstrip("/"), scheme
        self._process = os.getpid()

    def is_ours(self) -> bool:
        """Whether this process has made it: sockets and threads do not survive a fork."""
        return self._process == os.getpid()

    def open(self, name: str, _: float) -> Any:  # noqa: ANN401 - a file of the protocol's
        """A file for `read`."""
        if self._scheme == "memory":  # all its readers would share one place in the file
            return io.BytesIO(self._files.cat_file(self._at(name)))
        return self._files.open(self._at(name), "rb")

    def read(self, file: Any, most: int, _: float) -> bytes:  # noqa: ANN401
        """The next bytes, at most so many; none at the end."""
        return bytes(file.read(most))

    def close(self, file: Any, _: float) -> None:  # noqa: ANN401
        """Done with a file."""
        file.close()

    def size(self, name: str, _: float) -> int:
        """Of a file."""
        return int(self._files.info(self._at(name))["size"])

    def names(self, folder: str, _: float) -> list[str]:
        """Last parts of the names of what lies in a folder."""
        return _last_parts(self._files.ls(self._at(folder), detail=False))

    def put(self, name: str, content: bytes, once: bool, _: float) -> None:
        """Write a file; with ``once`` only if there is none."""
        if self._scheme in _WHOLE:
            self._refuse_second(name, once)
            self._files.pipe_file(self._at(name), content)
            return
        self._refuse_second(name, once)
        unfinished = self._unfinished()
        self._files.makedirs(self._parent(unfinished), exist_ok=True)
        self._files.pipe_file(unfinished, content)
        self._settle(unfinished, name, once)

    def upload(self, name: str, path: Path, _: float) -> None:
        """Write a file from the disk."""
        if self._scheme in _WHOLE:
            self._files.put_file(str(path), self._at(name))
            return
        unfinished = self._unfinished()
        self._files.makedirs(self._parent(unfinished), exist_ok=True)
        self._files.put_file(str(path), unfinished)
        self._settle(unfinished, name, once=False)

    def _settle(self, unfinished: str, name: str, once: bool) -> None:
        final = self._at(name)
        try:
            self._files.makedirs(self._parent(final), exist_ok=True)
            if not once and self._files.exists(final):  # there are protocols that move on to free names only
                self._files.rm_file(final)
            self._files.mv(unfinished, final)
        except BaseException:
            with suppress(Exception):
                self._files.rm_file(unfinished)
            raise

    def _refuse_second(self, name: str, once: bool) -> None:
        if once and self._files.exists(self._at(name)):
            raise FileExistsError(name)

    def _unfinished(self) -> str:
        return self._at(f"{_UNFINISHED}/{secrets.token_hex(16)}")

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if self._root else name

    @staticmethod
    def _parent(path: str) -> str:
        return path.rpartition("/")[0]


class _Asynchronous(Connection):
    """Protocols that fsspec speaks in an event loop: a call that takes too long is cancelled there."""

    def open(self, name: str, seconds: float) -> Any:  # noqa: ANN401
        # The size that http would ask for first is of no use: nothing that is said of a file is believed.
        known = {"size": 1} if self._scheme in READ_ONLY else {}
        return self._run(self._files.open_async, self._at(name), "rb", seconds=seconds, **known)

    def read(self, file: Any, most: int, seconds: float) -> bytes:  # noqa: ANN401
        return bytes(self._run(file.read, most, seconds=seconds))

    def close(self, file: Any, seconds: float) -> None:  # noqa: ANN401
        async def close() -> None:
            response, file.r = getattr(file, "r", None), None
            if response is not None:
                response.close()  # or an answer that was not read to its end keeps its connection
            await file.close()

        self._run(close, seconds=seconds)

    def size(self, name: str, seconds: float) -> int:
        return int(self._run(self._files._info, self._at(name), seconds=seconds)["size"])  # noqa: SLF001

    def names(self, folder: str, seconds: float) -> list[str]:
        return _last_parts(self._run(self._files._ls, self._at(folder), detail=False, seconds=seconds))  # noqa: SLF001

    def put(self, name: str, content: bytes, once: bool, seconds: float) -> None:
        condition = {}
        if once and self._scheme in _CONDITIONAL:
            condition["mode"] = "create"
        elif once:
            self._refuse_second(name, once)
        try:
            self._run(self._files._pipe_file, self._at(name), content, seconds=seconds, **condition)  # noqa: SLF001
        except OSError as error:
            if condition and _is_taken(error):
                raise FileExistsError(name) from error
            raise

    def upload(self, name: str, path: Path, seconds: float) -> None:
        self._run(self._files._put_file, str(path), self._at(name), seconds=seconds)  # noqa: SLF001

    def _run(self, call: Any, *arguments: Any, seconds: float, **options: Any) -> Any:  # noqa: ANN401
        from fsspec.asyn import sync

        return sync(self._files.loop, call, *arguments, timeout=seconds, **options)


class _Webdav(Connection):
    """WebDAV: moving is the conditional write."""

    def _refuse_second(self, name: str, once: bool) -> None:
        pass  # `_settle` finds out

    def _settle(self, unfinished: str, name: str, once: bool) -> None:
        from webdav4.client import ResourceAlreadyExists

        final = self._at(name)
        try:
            self._files.makedirs(self._parent(final), exist_ok=True)
            self._files.client.move(unfinished, final, overwrite=not once)
        except ResourceAlreadyExists as error:
            with suppress(Exception):
                self._files.rm_file(unfinished)
            raise FileExistsError(name) from error
        except BaseException:
            with suppress(Exception):
                self._files.rm_file(unfinished)
            raise


def connect(url: str, options: Mapping[str, Any], timeout: float) -> Connection:
    """A connection; most protocols send nothing before the first call.

    Raises:
        ConfigError: another protocol than `PROTOCOLS`.
        MissingDependencyError: its package is not installed.
    """
    import fsspec

    scheme = urlsplit(url).scheme.lower()
    if scheme not in PROTOCOLS:
        raise ConfigError(f"'{scheme}://' is no protocol for a store; there are {', '.join(sorted(PROTOCOLS))}")
    try:
        if scheme in ("webdav", "webdavs"):
            return _webdav(url, options, timeout)
        kind = fsspec.get_filesystem_class(scheme)
        given = {**kind._get_kwargs_from_urls(url), **_limits(scheme, options, timeout)}  # noqa: SLF001
        files = kind(**given, skip_instance_cache=True)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        install = f"`pip install 'smartinit[{extra}]'`" if extra else f"the package that it names ({error})"
        raise MissingDependencyError(f"a store at {scheme}:// needs a package more; install {install}") from error
    if scheme in ("s3", "s3a"):
        files.retries = 1  # `Transport.attempt` repeats
    root = kind._strip_protocol(url)  # noqa: SLF001
    if not getattr(files, "async_impl", False):
        return Connection(files, root, scheme)
    connection = _Asynchronous(files, root, scheme)
    weakref.finalize(connection, _close_session, files).atexit = False
    return connection


def _close_session(files: Any) -> None:  # noqa: ANN401
    """End a session's connections; fsspec itself waits for that a tenth of a second, which busy machines exceed."""
    from fsspec.asyn import sync

    async def close() -> None:
        session = getattr(files, "_s3", None) or getattr(files, "_session", None)
        if session is not None:
            await session.__aexit__(None, None, None)

    with suppress(Exception):
        sync(files.loop, close, timeout=_FAREWELL)


def _limits(scheme: str, options: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Options with the protocol's own timeouts, so that it closes what nobody waits for."""
    given = dict(options)
    if scheme in ("s3", "s3a"):
        times = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
        given["config_kwargs"] = {**times, **given.get("config_kwargs", {})}
        given.setdefault("use_listings_cache", False)
    if scheme in ("http", "https"):
        import aiohttp

        times = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)}
        given["client_kwargs"] = {**times, **given.get("client_kwargs", {})}
    if scheme in ("ssh", "sftp"):
        given.setdefault("timeout", timeout)
    return given


def _webdav(url: str, options: Mapping[str, Any], timeout: float) -> Connection:
    from webdav4.fsspec import WebdavFileSystem

    parts = urlsplit(url)
    given: dict[str, Any] = {"timeout": timeout, "retry": False, **options}
    if parts.username is not None:
        given.setdefault("auth", (unquote(parts.username), unquote(parts.password or "")))
    scheme = "https" if parts.scheme.lower() == "webdavs" else "http"
    base = f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    files = WebdavFileSystem(base, skip_instance_cache=True, **given)
    connection = _Webdav(files, "", "webdav")
    weakref.finalize(connection, files.client.http.close)  # its sockets would wait for the garbage collector
    return connection


def _is_taken(error: OSError) -> bool:
    """Whether a conditional write was refused because there is a file."""
    if isinstance(error, FileExistsError):
        return True
    answer = getattr(error.__cause__, "response", None) or {}
    code = str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""
    # the second is of two that were sent at the same moment
    return code in ("PreconditionFailed", "412", "ConditionalRequestConflict")


def _last_parts(paths: list[Any]) -> list[str]:
    return [str(path).rstrip("/").rpartition("/")[2] for path in paths]
