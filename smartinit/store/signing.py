"""Signed manifests (Ed25519): a reader can insist on results of people it knows.

    SMARTINIT_SIGNING_KEY     file of a private key: what is pushed is signed with it
    SMARTINIT_TRUSTED_KEYS    file or folder of public keys: what is not signed by one of them is not read

A manifest names the sha256 of every blob, so that its signature is one of the whole entry. Signatures lie beside the
entries as ``signatures/<sha256 of the manifest>.<first digits of the public key>``: they are written before the
manifest and never change, so that two who push one key at the same time cannot spoil each other's.
"""

from __future__ import annotations

import binascii
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartinit.errors import ConfigError, MissingDependencyError, MissingFileError, OutputError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

SIGNING_KEY = "SMARTINIT_SIGNING_KEY"
TRUSTED_KEYS = "SMARTINIT_TRUSTED_KEYS"
MOST_BYTES = 1024
"""Longest signature file."""
_DOMAIN = b"smartinit manifest 1\n"  # a signature of anything else is none of a manifest
_LINE = re.compile(rb"ed25519 ([0-9a-f]{64}) ([0-9a-f]{128})\n")
_KEY = re.compile(r"[0-9a-fA-F]{64}")
_LONGEST_KEY_FILE = 1 << 20


def signature_name(manifest: bytes, public: bytes) -> str:
    """Where a signature lies in a store."""
    return f"signatures/{hashlib.sha256(manifest).hexdigest()}.{public.hex()[:16]}"


class Signer:
    """A private key.

    Args:
        private: its 32 bytes.
    """

    def __init__(self, private: bytes) -> None:
        self._key = _ed25519().Ed25519PrivateKey.from_private_bytes(private)
        self.public: bytes = self._key.public_key().public_bytes_raw()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """A key from a file of 64 hexadecimal digits, or of PEM (PKCS 8, without a password).

        Raises:
            MissingFileError, ConfigError: there is none, or it is no such key.
        """
        content = _read(Path(path))
        if content.lstrip().startswith(b"-----BEGIN"):
            return cls(_from_pem(content, Path(path), private=True))
        found = [line for line in _lines(content) if _KEY.fullmatch(line)]
        if len(found) != 1 or len(_lines(content)) != 1:
            raise ConfigError(f"'{path}' holds no private key: expected 64 hexadecimal digits, or PEM")
        return cls(bytes.fromhex(found[0]))

    def sign(self, manifest: bytes) -> bytes:
        """The content of the signature's file."""
        signature: bytes = self._key.sign(_DOMAIN + manifest)
        return b"ed25519 " + self.public.hex().encode() + b" " + signature.hex().encode() + b"\n"


@dataclass(frozen=True)
class Trust:
    """Public keys whose signatures count.

    Attributes:
        keys: 32 bytes each.
    """

    keys: tuple[bytes, ...]

    @classmethod
    def from_place(cls, place: str | os.PathLike[str]) -> Self:
        """Keys from a file, or from all files of a folder: hexadecimal ones, one on a line, or PEM.

        Raises:
            MissingFileError, ConfigError: there are none, or something else stands there.
        """
        path = Path(place).expanduser()
        files = sorted(item for item in path.iterdir() if item.is_file()) if path.is_dir() else [path]
        keys: list[bytes] = []
        for file in files:
            content = _read(file)
            if content.lstrip().startswith(b"-----BEGIN"):
                keys.append(_from_pem(content, file, private=False))
                continue
            for line in _lines(content):
                if not _KEY.fullmatch(line):
                    raise ConfigError(f"'{file}' holds something else than public keys of 64 hexadecimal digits")
                keys.append(bytes.fromhex(line))
        if not keys:
            raise ConfigError(f"'{path}' holds no public key, so that nothing could be trusted; put one there")
        return cls(tuple(dict.fromkeys(keys)))

    def check(self, manifest: bytes, key: str, read: Callable[[str], bytes | None]) -> None:
        """Look for a signature that counts.

        Args:
            manifest: what must be signed.
            key: of the entry, for messages.
            read: a file of the store by its name; None: there is none.

        Raises:
            VerificationError: nobody trusted has signed it.

        Cost: one small file per key, until one fits.
        """
        wrong = False
        for public in self.keys:
            content = read(signature_name(manifest, public))
            if content is None:
                continue
            if _is_signature(content, manifest, public):
                return
            wrong = True
        what = "has a wrong signature" if wrong else "is not signed by any of the trusted keys"
        raise VerificationError(
            f"the entry '{key}' {what}; ask for one that is, or name its signer's public key in {TRUSTED_KEYS}"
        )


def make_keys(path: str | os.PathLike[str]) -> str:
    """Make a pair of keys: the private one at ``path`` (only its owner may read it), the public one beside it.

    Returns:
        The public key, 64 hexadecimal digits, as it stands in ``<path>.pub``.

    Raises:
        OutputError: there is a file already, or it cannot be written.
    """
    kind = _ed25519()
    private = kind.Ed25519PrivateKey.generate()
    public: str = private.public_key().public_bytes_raw().hex()
    path = Path(path).expanduser()
    beside = path.with_name(path.name + ".pub")
    try:
        for file, content, mode in ((path, private.private_bytes_raw().hex(), 0o600), (beside, public, 0o644)):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with open(descriptor, "w", encoding="ascii") as opened:  # noqa: PTH123 - a descriptor
                opened.write(content + "\n")
    except FileExistsError as error:
        raise OutputError(
            f"'{error.filename}' is there already, and keys are not overwritten; name another file"
        ) from error
    except OSError as error:
        raise OutputError(f"no keys can be written to '{path}': {error.strerror or error}") from error
    return public


def signer_of(place: str | os.PathLike[str] | None) -> Signer | None:
    """The key of a file; None: of the one that the environment names, if it does."""
    place = place or os.environ.get(SIGNING_KEY)
    return Signer.from_file(place) if place else None


def trust_of(place: str | os.PathLike[str] | None) -> Trust | None:
    """The keys of a place; None: of the one that the environment names, if it does."""
    place = place or os.environ.get(TRUSTED_KEYS)
    return Trust.from_place(place) if place else None


def _is_signature(content: bytes, manifest: bytes, public: bytes) -> bool:
    found = _LINE.fullmatch(content)
    if found is None or bytes.fromhex(found[1].decode()) != public:
        return False
    from cryptography.exceptions import InvalidSignature

    try:
        key = _ed25519().Ed25519PublicKey.from_public_bytes(public)
        key.verify(binascii.unhexlify(found[2]), _DOMAIN + manifest)
    except (InvalidSignature, ValueError):  # some keys are no points of the curve
        return False
    return True


def _from_pem(content: bytes, path: Path, *, private: bool) -> bytes:
    kinds = _ed25519()
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    try:
        key: Any = load_pem_private_key(content, None) if private else load_pem_public_key(content)
    except (ValueError, TypeError, NotImplementedError) as error:  # unknown kinds; a password
        raise ConfigError(f"'{path}' cannot be read as a key: {error}") from error
    except Exception as error:
        if type(error).__name__ != "UnsupportedAlgorithm":
            raise
        raise ConfigError(f"'{path}' cannot be read as a key: {error}") from error
    if not isinstance(key, kinds.Ed25519PrivateKey if private else kinds.Ed25519PublicKey):
        raise ConfigError(f"'{path}' holds a {type(key).__name__}; expected an Ed25519 key")
    return bytes(key.private_bytes_raw() if private else key.public_bytes_raw())


def _read(path: Path) -> bytes:
    path = path.expanduser()
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST_KEY_FILE + 1)
    except FileNotFoundError as error:
        raise MissingFileError(f"there is no key at '{path}'") from error
    except OSError as error:
        raise ConfigError(f"the key '{path}' cannot be read: {error.strerror or error}") from error
    if len(content) > _LONGEST_KEY_FILE:
        raise ConfigError(f"'{path}' is too long for a file of keys")
    return content


def _lines(content: bytes) -> list[str]:
    """Lines that say something: ``#`` begins a comment."""
    text = content.decode("utf-8", "replace")
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def _ed25519() -> Any:  # noqa: ANN401 - an optional module
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingDependencyError(
            "signatures need the package cryptography; install `pip install 'smartinit[sign]'`"
        ) from error
    return ed25519
