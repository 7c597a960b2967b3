"""Servers on this machine for the stores of the tests: real protocols, on ports that the system chooses."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from typing_extensions import Self

LOOPBACK = "127.0.0.1"
ACCESS = {"key": "someone", "secret": "something"}


class Bucket:
    """A bucket of an S3 server that is empty at first."""

    def __init__(self, endpoint: str) -> None:
        import boto3

        self.endpoint, self.name = endpoint, f"team-{secrets.token_hex(6)}"
        self.client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id=ACCESS["key"],
            aws_secret_access_key=ACCESS["secret"],
        )
        self.client.create_bucket(Bucket=self.name)

    @property
    def url(self) -> str:
        return f"s3://{self.name}/store"

    def options(self, port: int | None = None) -> dict[str, Any]:
        """Of a `RemoteStore`, straight or through another port."""
        return {**ACCESS, "endpoint_url": self.endpoint if port is None else f"http://{LOOPBACK}:{port}"}

    def read(self, name: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=f"store/{name}")["Body"].read()

    def write(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=f"store/{name}", Body=content)

    def remove(self, name: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=f"store/{name}")

    def names(self, folder: str = "") -> set[str]:
        """Of all files below a folder."""
        found = self.client.list_objects_v2(Bucket=self.name, Prefix=f"store/{folder}")
        return {item["Key"].removeprefix("store/") for item in found.get("Contents", ())}


class Dav:
    """A folder that is served by WebDAV."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port

    @property
    def url(self) -> str:
        return f"webdav://{LOOPBACK}:{self.port}/team"

    def options(self, port: int | None = None) -> dict[str, Any]:
        assert port is None
        return {}

    def read(self, name: str) -> bytes:
        return (self.folder / "team" / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        path = self.folder / "team" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def remove(self, name: str) -> None:
        (self.folder / "team" / name).unlink()

    def names(self, folder: str = "") -> set[str]:
        root = self.folder / "team"
        return {str(path.relative_to(root)) for path in (root / folder).rglob("*") if path.is_file()}


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of moto's S3 server; what it holds is gone afterwards."""
    from moto.server import ThreadedMotoServer

    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer(ip_address=LOOPBACK, port=0, verbose=False)
    server.start()
    try:
        yield f"http://{LOOPBACK}:{server.get_host_and_port()[1]}"
    finally:
        server.stop()


@contextmanager
def webdav_server(folder: Path) -> Iterator[Dav]:
    """A folder, served for everyone."""
    from cheroot import wsgi
    from wsgidav.wsgidav_app import WsgiDAVApp

    (folder / "team").mkdir()
    config = {
        "provider_mapping": {"/": str(folder)},
        "simple_dc": {"user_mapping": {"*": True}},
        "verbose": 0,
        "logging": {"enable": False},
    }
    server = wsgi.Server((LOOPBACK, 0), WsgiDAVApp(config), numthreads=4)
    server.prepare()
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield Dav(folder, server.bind_addr[1])
    finally:
        server.stop()
        thread.join(10)


class Listener:
    """Accepts connections, and gives each to a thread of its own; all are closed at the end."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._listening = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listening.getsockname()[1]
        self._open: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()
        self.hang_up()
        # a close alone does not wake who waits to accept
        with suppress(OSError):
            socket.create_connection((LOOPBACK, self.port), timeout=1).close()
        self._accepting.join(10)
        self.hang_up()  # what came meanwhile

    def hang_up(self) -> None:
        """Close all connections."""
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def keep(self, connection: socket.socket) -> None:
        """Close it at the end."""
        self._open.append(connection)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.keep(connection)
            threading.Thread(target=self._run, args=(connection,), daemon=True).start()

    def _run(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError), connection:
            self._serve(connection)


class Silent(Listener):
    """Accepts, reads, and never answers."""

    def __init__(self) -> None:
        self.asked = 0
        super().__init__(self._swallow)

    def _swallow(self, connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            self.asked += 1


class Http(Listener):
    """Answers a request for a path with bytes as they are, head and all, and closes the connection."""

    def __init__(self, answer: Callable[[str, str], Iterable[bytes]]) -> None:
        self._answer = answer
        self.asked: list[str] = []
        super().__init__(self._reply)

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}/store"

    def _reply(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            more = connection.recv(1 << 16)
            if not more:
                return
            head += more
        method, path, *_ = head.decode("latin-1").split(" ", 2)
        self.asked.append(f"{method} {path}")
        for piece in self._answer(method, path):
            connection.sendall(piece)


def reply(content: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    """A whole answer; ``length`` may say something else than is true."""
    size = len(content) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n".encode() + content


class Proxy(Listener):
    """Hands everything on to another port; ``fault`` may change what comes back, or stop it."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.fault: Callable[[bytes], bytes | None] | None = None
        """Gets each piece of an answer; None: hang up."""
        super().__init__(self._join)

    def _join(self, connection: socket.socket) -> None:
        with socket.create_connection((LOOPBACK, self._target), timeout=30) as there:
            back = threading.Thread(target=self._back, args=(there, connection), daemon=True)
            back.start()
            while piece := connection.recv(1 << 16):
                there.sendall(piece)
            there.shutdown(socket.SHUT_RDWR)
            back.join(10)

    def _back(self, there: socket.socket, connection: socket.socket) -> None:
        with suppress(OSError):
            while piece := there.recv(1 << 16):
                kept = piece if self.fault is None else self.fault(piece)
                if kept is None:
                    break
                connection.sendall(kept)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
