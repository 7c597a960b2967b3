"""What the store has for the command line: found from files alone, so that a hit loads no library and no model."""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smartinit import __version__
from smartinit.cli.precision import precision
from smartinit.cli.summary import summarise_record
from smartinit.data.source import find_source
from smartinit.errors import (
    ConfigError,
    ModelError,
    NotStoredError,
    OutputError,
    SmartinitError,
    StoreError,
    VerificationError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from torch import nn

    from smartinit.artefact import Artefact
    from smartinit.cli.request import Request
    from smartinit.data import Batches
    from smartinit.store import Key, Store
    from smartinit.store.local import LocalStore
    from smartinit.store.requests import Remembered
    from smartinit.targets.fingerprint import ModelFingerprint

_RECORD = "smartinit.json"
_ADAPTER_CONFIG = "adapter_config.json"
_MODEL = "fingerprint.json"
_LARGEST = 256 << 20  # bytes of a record
# What these do to the base can be served without the model.
_KEEPING = frozenset({"keeps", "shifts"})


def open_store(options: Mapping[str, Any]) -> Store | None:
    """The stores of ``--store``, or the default one; None with ``--no-store``.

    A store that cannot be used does not stop a computation: then it is None too, with a warning.

    Raises:
        ConfigError: options that contradict each other.
        StoreError: it cannot be used, where nothing may be computed.
    """
    places, only_stored = options.get("store") or (), options.get("no_compute", False)
    if options.get("no_store"):
        for name in ("store", "no_compute", "refresh"):
            if options.get(name):
                raise ConfigError(f"--no-store and --{name.replace('_', '-')} contradict each other; leave one out")
        return None
    if only_stored and options.get("refresh"):
        raise ConfigError("--no-compute and --refresh contradict each other; leave one out")
    from smartinit.store import Store

    try:
        return Store(*places)
    except (StoreError, OSError) as error:
        if only_stored:
            raise
        warnings.warn(f"{error}; going on without a store", stacklevel=2)
        return None


def place_of(store: Store) -> str:
    """Where the store is that is written."""
    return str(store.local.layout.root)


@dataclass(frozen=True)
class StoreMayFail:
    """Inside, a failure of the store is a warning, after which one goes on without it.

    Attributes:
        what: has not been done then.
        strict: raise it all the same.
    """

    what: str
    strict: bool = False

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self.strict or not isinstance(error, (StoreError, VerificationError, OSError)):
            return False
        if isinstance(error, OutputError):
            return False
        warnings.warn(f"{self.what}: {error}; going on without it", stacklevel=2)
        return True


@dataclass(frozen=True)
class Found:
    """A stored artefact, its record read and its bytes checked.

    Attributes:
        key: of its entry.
        record: what its ``smartinit.json`` says.
        config: what its ``adapter_config.json`` says.
        store: that has it.
        about: what was noted of the request: the task type that ``adapter_config.json`` is to have (one that was
            computed elsewhere may say less), and how many rows were dropped.
        origin: which of the stores had it, for people.
    """

    key: str
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    store: Store
    about: Mapping[str, Any]
    origin: str

    @property
    def task_type(self) -> str | None:
        """That the adapter is to have."""
        return self.about.get("task_type")

    @property
    def summary(self) -> dict[str, Any]:
        """As of the computation that it came from, but for the time that this took."""
        return {**summarise_record(self.record), "dropped_rows": self.about.get("dropped_rows"), "seconds": {}}

    @property
    def keeps_base(self) -> bool:
        """Whether its folder is all there is to it: no base model is to be written."""
        return set(self.record["effects"].values()) <= _KEEPING

    def says(self, options: Mapping[str, Any]) -> bool:
        """Whether its files name model and data as the user does now."""
        provenance = self.record["provenance"]
        data = None if provenance.get("data") is None else options["data"]  # of a method that reads none
        said = (provenance.get("model"), provenance.get("data"), self.config.get("task_type"))
        names_model = self.config.get("base_model_name_or_path") in (None, options["model"])
        return names_model and said == (options["model"], data, self.task_type)

    def copy(self, out: Path, *, force: bool) -> None:
        """Write the adapter folder as it is stored; torch is not needed."""
        from smartinit.store.adapters import copy_adapter

        copy_adapter(self.holder, self.key, out, force)

    @property
    def holder(self) -> LocalStore:
        """The folder that has it: the first, or, where that cannot be written, one that is only read."""
        stores = [self.store.local, *(layer.folder for layer in self.store.layers)]
        return next((one for one in stores if one is not None and one.peek(self.key)), self.store.local)

    def folder(self) -> Path:
        """Its adapter folder in the store; of a store that cannot be written, one in a place of the user's own."""
        from smartinit.store.adapters import readable_folder

        return readable_folder(self.holder, self.key)

    def artefact(self, options: Mapping[str, Any]) -> Artefact:
        """Itself, naming model and data as the user does now."""
        from dataclasses import replace

        from smartinit.artefact import Artefact

        stored = Artefact.load(self.folder())
        config = stored.config.copy()
        config.base_model_name_or_path, config.task_type = options["model"], self.task_type
        data = None if stored.provenance.get("data") is None else options["data"]
        names = {"model": options["model"], "data": data}
        kept = {"store": {"hit": "artefact", "key": self.key, "missed": None, "kept": True}}
        return replace(stored, config=config, provenance={**stored.provenance, **names, **kept})


@dataclass
class StoredRequest:
    """One request of the command line beside a store.

    Attributes:
        request: itself.
        options: as click read them.
        store: None: there is none, and nothing is ever found.
    """

    request: Request
    options: Mapping[str, Any]
    store: Store | None
    _leaves: dict[str, Any] | None = None

    @property
    def leaves(self) -> dict[str, Any] | None:
        """Its request by content, see `smartinit.store.requests`; None where files do not say it.

        Cost: the first time one read of model and data, then their files' sizes and times.
        """
        if self._leaves is None and self.store is not None:
            self._leaves = request_leaves(self.request, self.options, self.store.local.layout.memo)
        return self._leaves

    def remembered(self) -> Remembered | None:
        """Where the same request led before."""
        from smartinit.store.requests import recall

        if self.store is None or self.leaves is None:
            return None
        return recall(self.store, self.leaves)

    def find(self, remembered: Remembered | None, batches: Batches | None = None) -> Found | None:
        """The artefact that a remembered request led to, if it is there, sound, and certain.

        Args:
            remembered: see `remembered`.
            batches: of the data as they are read now, for one that is not certain.
        """
        if remembered is None or self.store is None:
            return None
        to_confirm = not remembered.certain and remembered.first is not None
        if to_confirm and (batches is None or first_batches(batches) != remembered.first):
            return None
        return read_artefact(self.store, remembered.artefact, remembered.about)

    def remember(self, artefact: Artefact, batches: Batches | None) -> None:
        """Note that the request led to this artefact, if the store has it."""
        from smartinit.store.requests import remember

        key = stored_key(artefact)
        if self.store is None or self.leaves is None or key is None or self.store.local.peek(key) is None:
            return
        first = None if batches is None else first_batches(batches)
        about = {"task_type": artefact.config.task_type, "dropped_rows": artefact.provenance.get("dropped_rows")}
        remember(self.store, self.leaves, key, first=first, about=about)

    def known_model(self) -> ModelFingerprint | None:
        """The fingerprint that the model had in memory when it was loaded from these very files."""
        from smartinit.targets.fingerprint import ModelFingerprint

        if self.store is None or self.leaves is None or self.options["trust_remote_code"]:
            return None
        with StoreMayFail("the model was not looked up"):
            entry = self.store.get(self._model_key())
            if entry is not None and _MODEL in entry.files:
                with entry, suppress(TypeError):
                    return ModelFingerprint(**_object(entry.files[_MODEL]))
        return None

    def learn_model(self, model: nn.Module) -> ModelFingerprint | None:
        """The fingerprint of the loaded model, remembered for its files; None without a store."""
        from smartinit.store.keys import canonical
        from smartinit.targets.fingerprint import model_fingerprint

        if self.store is None:
            return None
        try:
            found = model_fingerprint(model)
        except ModelError:  # one that nothing identifies: the computation says so
            return None
        if self.leaves is not None:
            with StoreMayFail("the model is not remembered"):
                if self.store.local.peek(self._model_key()) is None:
                    self.store.put(self._model_key(), files={_MODEL: canonical(vars(found))})
        return found

    def _model_key(self) -> Key:
        """What the model in memory follows from: its files, their precision, and who reads them."""
        from smartinit.store.keys import Key
        from smartinit.store.requests import library_versions

        leaves = self.leaves or {}
        kept = {name: leaves.get(name) for name in ("model", "precision", "remote_code")}
        return Key("model", {**kept, "smartinit": __version__, "versions": library_versions()})

    def missed(self) -> str:
        """Why nothing was found."""
        from smartinit.store.requests import missed

        if self.store is None:
            return "there is no store"
        if self.leaves is None:
            return self._unknown()
        with StoreMayFail("the store was not searched"):
            return missed(self.store, self.leaves)
        return "the store cannot be searched"

    def _unknown(self) -> str:
        """Why the request has no leaves."""
        from smartinit.store.model_files import local_model

        folder = local_model(self.options["model"])
        if folder is not None and precision(self.options, folder) is None:
            return (
                "the model is float16, which is loaded as float32 on a CPU, and only torch can tell what "
                "--device auto is here: name --device or --dtype"
            )
        return "model or data are not files here whose content can be told without loading them"


def stored_key(artefact: Artefact) -> str | None:
    """Of its entry, if it went through a store."""
    key = (artefact.provenance.get("store") or {}).get("key")
    return key if isinstance(key, str) else None


def read_artefact(store: Store, key: str, about: Mapping[str, Any]) -> Found | None:
    """An artefact's entry, every byte checked; None if it is not there or not sound."""
    has = None if store.local.peek(key) is not None else next((one for one in store.layers if one.peek(key)), None)
    entry = store.local.get(key, tensors=False) or store.get(key)  # only what another layer has may cost torch
    if entry is None:
        return None
    with entry:
        if entry.manifest.kind != "artefact" or not {_RECORD, _ADAPTER_CONFIG} <= entry.files.keys():
            return None
        try:
            record, config = (_object(entry.files[name]) for name in (_RECORD, _ADAPTER_CONFIG))
            found = Found(key, record, config, store, about, place_of(store) if has is None else has.shown)
            _ = found.summary, found.keeps_base, found.says({"model": None, "data": None})  # what is missing shows now
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            warnings.warn(f"the stored artefact {key[:12]} is not used: {error}", stacklevel=2)
            return None
    return found


def request_leaves(request: Request, options: Mapping[str, Any], memo: Path) -> dict[str, Any] | None:
    """A request by content: nothing in it names a place. None where files do not say what would be loaded."""
    from smartinit.store.model_files import files_fingerprint, local_model

    try:
        model = files_fingerprint(options["model"], memo)
        data = None if options["data"] is None else _data_leaves(request, options, memo)
    except SmartinitError:  # the computation says it better
        return None
    folder = local_model(options["model"])
    if model is None or folder is None or (options["data"] is not None and data is None):
        return None
    loaded_as = precision(options, folder)
    if loaded_as is None:
        return None
    config = request.config.to_dict()
    config.pop("base_model_name_or_path", None)
    return {
        "model": {"tensors": model.root, "config": model.config, "tokenizer": model.tokenizer},
        "data": data,
        "adapter": config,
        "sampling": request.sampling.as_dict(),
        "ranks": request.planner_options(),
        "max_batches": request.max_batches,
        "skip_bad_batches": options["skip_bad_batches"],
        "precision": loaded_as,
        "remote_code": options["trust_remote_code"],
    }


def first_batches(batches: Batches) -> str:
    """Digest of the first batches, as it is remembered."""
    from smartinit.activations.data_digest import RowDigests
    from smartinit.store.requests import BATCHES

    return RowDigests(batches, BATCHES).first(BATCHES)


def refuse_to_compute(stored: StoredRequest) -> NotStoredError:
    """The error of ``--no-compute``."""
    return NotStoredError(f"not in the store, and --no-compute forbids to compute it: {stored.missed()}")


def _data_leaves(request: Request, options: Mapping[str, Any], memo: Path) -> dict[str, Any] | None:
    from smartinit.store.model_files import file_sha256

    source = find_source(options["data"], split=request.sampling.split)
    if source.builder in ("hub", "saved"):  # the hub's may change; a saved folder says more than its rows
        return None
    return {"format": source.builder, "files": [file_sha256(path, memo) for path in source.files]}


def _object(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        value = json.loads(file.read(_LARGEST))
    if not isinstance(value, dict):
        raise TypeError(f"{path.name} holds no JSON object")
    return value
