"""``smartinit get``: where a stored adapter lies, for scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from smartinit.cli.options import (
    adapter_options,
    data_options,
    model_options,
    output_options,
    pass_options,
    store_options,
)
from smartinit.cli.output import Output
from smartinit.cli.request import read_request
from smartinit.cli.running import check_inputs, look_up
from smartinit.cli.stored import StoredRequest, open_store, read_artefact
from smartinit.errors import ConfigError, MissingFileError, NotStoredError

if TYPE_CHECKING:
    from smartinit.cli.stored import Found
    from smartinit.store import Store


@click.command("get")
@click.argument("key", required=False)
@model_options(required=False)
@data_options(required=False)
@adapter_options()
@pass_options()
@store_options(computes=False)
@output_options()
def command(key: str | None, **options: Any) -> None:  # noqa: ANN401 - click's options
    """Print the path of a stored adapter folder and nothing else; exit with 3 if it is not in the store.

    KEY is that of an artefact, or its first letters (at least six). Without it, the options say what is wanted, as
    those of compute do; nothing is computed. The folder belongs to the store: read it, or copy it. Of a store that
    cannot be written it is made in the user's folder for caches.
    """
    output = Output(as_json=options["as_json"], quiet=options["quiet"])
    with output.work():
        store = open_store({**options, "no_compute": True})
        if store is None:  # pragma: no cover - it would have been an error
            raise NotStoredError("there is no store")
        found = _by_key(store, key, options) if key is not None else _by_options(store, options, output)
        folder = found.folder()
    output.result({"key": found.key, "path": str(folder), "store": str(found.holder.layout.root)}, str(folder))


def _by_key(store: Store, key: str, options: dict[str, Any]) -> Found:
    from smartinit.store.naming import find_key

    if options["model"] is not None or options["data"] is not None:
        raise ConfigError("get takes either a key or the options of a request (--model …), not both")
    name = find_key(store, key)
    manifest = store.peek(name)
    if manifest is not None and manifest.kind != "artefact":
        raise ConfigError(f"'{name[:12]}' is a {manifest.kind or 'plain entry'}; only artefacts are adapter folders")
    found = read_artefact(store, name, {})
    if found is None:
        raise NotStoredError(f"the store has no sound artefact '{name[:12]}'; compute it again")
    return found


def _by_options(store: Store, options: dict[str, Any], output: Output) -> Found:
    from smartinit.store.model_files import local_model

    if options["model"] is None:
        raise ConfigError("get needs a key, or a request: --model and the other options of compute")
    request = read_request(options)
    check_inputs(request, options)
    stored = StoredRequest(request, {**options, "no_compute": True}, store)
    found = look_up(stored, output)
    if found is None and local_model(options["model"]) is None:
        raise MissingFileError(f"'{options['model']}' is neither a folder here nor in the hub's cache; check --model")
    if found is None:
        raise NotStoredError(f"not in the store: {stored.missed()}")
    return found
