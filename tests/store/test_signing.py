from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from smartinit.errors import ConfigError, MissingDependencyError, MissingFileError, OutputError, VerificationError
from smartinit.store import Store
from smartinit.store.keys import Key
from smartinit.store.local import LocalStore
from smartinit.store.manifest import Manifest
from smartinit.store.remote import RemoteStore
from smartinit.store.signing import Signer, Trust, make_keys, signature_name, signer_of, trust_of

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("cryptography", reason="the extra `sign`")

KEY = Key("artefact", {"a": 1})


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A private key, with its public one beside it."""
    make_keys(tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "here")
    store.put(KEY, files={"a": b"1" * 100})
    return store


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}-{tmp_path.stat().st_ino}"


def public_of(private: Path) -> Path:
    return private.with_name(private.name + ".pub")


def test_what_is_signed_is_read_by_who_trusts_its_signer(
    keys: Path, local: LocalStore, url: str, tmp_path: Path
) -> None:
    RemoteStore(url, signing_key=keys).send(KEY, local)
    reader = RemoteStore(url, trusted_keys=public_of(keys))
    assert reader.peek(KEY) == local.peek(KEY)
    assert reader.fetch(KEY, LocalStore(tmp_path / "there")).new
    assert RemoteStore(url).peek(KEY) is not None  # who asks for no signature needs none


def test_what_is_not_signed_is_refused(keys: Path, local: LocalStore, url: str, tmp_path: Path) -> None:
    RemoteStore(url).send(KEY, local)
    other = LocalStore(tmp_path / "there")
    reader = RemoteStore(url, trusted_keys=public_of(keys))
    with pytest.raises(VerificationError, match="not signed by any of the trusted keys"):
        reader.fetch(KEY, other)
    assert KEY not in other
    with pytest.warns(UserWarning, match="not signed"):
        assert Store(tmp_path / "there", reader).get(KEY) is None


def test_a_strangers_signature_does_not_count(keys: Path, local: LocalStore, url: str, tmp_path: Path) -> None:
    make_keys(tmp_path / "stranger")
    RemoteStore(url, signing_key=tmp_path / "stranger").send(KEY, local)
    with pytest.raises(VerificationError, match="not signed"):
        RemoteStore(url, trusted_keys=public_of(keys)).peek(KEY)
    # nor under the name of one that does
    reader = RemoteStore(url, trusted_keys=public_of(keys))
    content = local.peek(KEY).to_bytes()
    mine, stranger = Signer.from_file(keys), Signer.from_file(tmp_path / "stranger")
    for forged in (
        stranger.sign(content),
        stranger.sign(content).replace(stranger.public.hex().encode(), mine.public.hex().encode()),
        mine.sign(content).replace(mine.public.hex().encode(), stranger.public.hex().encode()),
        mine.sign(content + b" "),
        mine.sign(content)[:-1],
        mine.sign(content).upper(),
        b"",
        b"x" * 1000,
    ):
        reader.transport.put(signature_name(content, mine.public), forged)
        with pytest.raises(VerificationError, match="wrong signature"):
            reader.peek(KEY)
    reader.transport.put(signature_name(content, mine.public), b"x" * 2000)
    with pytest.raises(VerificationError, match="longer than"):
        reader.peek(KEY)


def test_a_signature_is_one_of_the_whole_entry(keys: Path, local: LocalStore, url: str) -> None:
    remote = RemoteStore(url, signing_key=keys)
    remote.send(KEY, local)
    manifest = local.peek(KEY)
    for changed in (replace(manifest, meta={"x": 1}), replace(manifest, created=1.0), replace(manifest, blobs={})):
        remote.transport.put(f"entries/{KEY}.json", changed.to_bytes())
        with pytest.raises(VerificationError, match="not signed"):
            RemoteStore(url, trusted_keys=public_of(keys)).peek(KEY)


def test_an_entry_that_nobody_trusts_is_replaced_by_who_can_sign(keys: Path, local: LocalStore, url: str) -> None:
    RemoteStore(url).send(KEY, local)
    both = RemoteStore(url, signing_key=keys, trusted_keys=public_of(keys))
    with pytest.warns(UserWarning, match="it is replaced"):
        assert both.send(KEY, local).new
    assert both.peek(KEY) == local.peek(KEY)


def test_two_signers_of_one_key_do_not_spoil_each_others(
    keys: Path, local: LocalStore, url: str, tmp_path: Path
) -> None:
    make_keys(tmp_path / "other")
    second = LocalStore(tmp_path / "second")
    second.put(KEY, files={"a": b"1" * 100}, meta={"of": "another run"})
    RemoteStore(url, signing_key=keys).send(KEY, local)
    RemoteStore(url, signing_key=tmp_path / "other").send(KEY, second)  # is not the first
    reader = RemoteStore(url, trusted_keys=public_of(keys))
    assert reader.peek(KEY) == local.peek(KEY)


def test_keys_are_made_once_and_kept_private(tmp_path: Path) -> None:
    public = make_keys(tmp_path / "k")
    assert public_of(tmp_path / "k").read_text() == public + "\n"
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert Signer.from_file(tmp_path / "k").public.hex() == public
    before = (tmp_path / "k").read_bytes()
    with pytest.raises(OutputError, match="is there already"):
        make_keys(tmp_path / "k")
    assert (tmp_path / "k").read_bytes() == before
    with pytest.raises(OutputError, match="no keys can be written"):
        make_keys(tmp_path / "missing" / "k")


def test_keys_of_other_programs(keys: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

    private = ed25519.Ed25519PrivateKey.generate()
    pem = private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    (tmp_path / "pem").write_bytes(pem)
    (tmp_path / "pem.pub").write_bytes(
        private.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    )
    signed = Signer.from_file(tmp_path / "pem").sign(b"m")
    trust = Trust.from_place(tmp_path / "pem.pub")
    trust.check(b"m", "k", lambda _: signed)
    assert trust.keys == (Signer.from_file(tmp_path / "pem").public,)

    locked = private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"word"))
    (tmp_path / "locked").write_bytes(locked)
    (tmp_path / "broken").write_bytes(pem[:60])
    for name in ("locked", "broken"):
        with pytest.raises(ConfigError, match="cannot be read as a key"):
            Signer.from_file(tmp_path / name)
    other = rsa.generate_private_key(65537, 2048)
    (tmp_path / "rsa").write_bytes(other.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    with pytest.raises(ConfigError, match="expected an Ed25519 key"):
        Signer.from_file(tmp_path / "rsa")
    with pytest.raises(ConfigError, match="cannot be read as a key"):
        Trust.from_place(tmp_path / "pem")  # a private key where a public one belongs


def test_a_folder_of_keys(keys: Path, tmp_path: Path) -> None:
    folder = tmp_path / "team"
    folder.mkdir()
    with pytest.raises(ConfigError, match="nothing could be trusted"):
        Trust.from_place(folder)
    publics = [make_keys(tmp_path / f"member-{number}") for number in range(3)]
    (folder / "a").write_text(f"# the team\n{publics[0]}  # one\n\n{publics[1].upper()}\n")
    (folder / "b").write_text(publics[2])
    assert {key.hex() for key in Trust.from_place(folder).keys} == set(publics)
    signed = Signer.from_file(tmp_path / "member-2").sign(b"m")
    name = signature_name(b"m", bytes.fromhex(publics[2]))
    Trust.from_place(folder).check(b"m", "k", {name: signed}.get)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"00" * 31, b"00" * 33, b"\xff\xfe" * 40, b"ab" * 32 + b"\nx"])
def test_files_that_hold_no_key(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "k").write_bytes(content)
    with pytest.raises(ConfigError):
        Signer.from_file(tmp_path / "k")
    with pytest.raises(ConfigError):
        Trust.from_place(tmp_path / "k")


def test_a_key_that_is_no_point_of_the_curve_signs_nothing(keys: Path, tmp_path: Path) -> None:
    odd = b"\xff" * 32
    trust = Trust((odd, Signer.from_file(keys).public))
    content = Signer.from_file(keys).sign(b"m")
    forged = b"ed25519 " + odd.hex().encode() + content[72:]
    with pytest.raises(VerificationError):
        trust.check(b"m", "k", {signature_name(b"m", odd): forged}.get)


def test_the_environment_names_the_keys(
    keys: Path, local: LocalStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert signer_of(None) is None
    assert trust_of(None) is None
    monkeypatch.setenv("SMARTINIT_SIGNING_KEY", str(keys))
    monkeypatch.setenv("SMARTINIT_TRUSTED_KEYS", str(public_of(keys)))
    RemoteStore(url).send(KEY, local)
    assert RemoteStore(url).peek(KEY) == local.peek(KEY)
    make_keys(tmp_path / "stranger")
    monkeypatch.setenv("SMARTINIT_TRUSTED_KEYS", str(public_of(tmp_path / "stranger")))
    with pytest.raises(VerificationError):
        RemoteStore(url).peek(KEY)
    monkeypatch.setenv("SMARTINIT_TRUSTED_KEYS", str(tmp_path / "nowhere"))
    with pytest.raises(MissingFileError):  # what cannot be checked is not believed
        RemoteStore(url).peek(KEY)


def test_without_its_package_nothing_is_believed(
    keys: Path, local: LocalStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    RemoteStore(url, signing_key=keys).send(KEY, local)
    reader = RemoteStore(url, trusted_keys=public_of(keys))
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'smartinit\[sign\]'"):
        reader.peek(KEY)
    with pytest.raises(MissingDependencyError):
        RemoteStore(url, signing_key=keys).send(KEY, local)


def test_signatures_agree_with_openssl(keys: Path, local: LocalStore, tmp_path: Path) -> None:
    """Anyone can check one without this package."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ed25519

    content = local.peek(KEY).to_bytes()
    line = Signer.from_file(keys).sign(content).decode().split()
    public = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(line[1]))
    files = {
        "public.pem": public.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo),
        "message": b"smartinit manifest 1\n" + content,
        "signature": bytes.fromhex(line[2]),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    command = "openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in message -sigfile signature"
    try:
        done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no openssl here")
    if "unknown option" in done.stderr.lower() or "not supported" in done.stderr.lower():
        pytest.skip("an openssl that cannot check these")
    assert done.returncode == 0, done.stdout + done.stderr


def test_signatures_are_no_entries(keys: Path, local: LocalStore, url: str) -> None:
    remote = RemoteStore(url, signing_key=keys)
    remote.send(KEY, local)
    assert list(remote.keys()) == [KEY.digest]
    assert Manifest.from_bytes(local.peek(KEY).to_bytes(), KEY.digest) == local.peek(KEY)
    assert os.environ.get("SMARTINIT_SIGNING_KEY") is None
