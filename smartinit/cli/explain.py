"""``smartinit explain``: in what two requests differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smartinit.cli.options import output_options, store_options
from smartinit.cli.output import Output, table
from smartinit.cli.stored import open_store
from smartinit.errors import ArtefactError, ConfigError, MissingFileError, NotStoredError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smartinit.store import Store

_LARGEST = 256 << 20  # bytes of a record
_RECORD = "smartinit.json"


@dataclass(frozen=True)
class Side:
    """One of the two requests.

    Attributes:
        name: as the user gave it.
        kind: of the entry; ``"recipe"`` for what names neither model nor data.
        leaves: what it depends on.
        recipe: the part that a recipe has; None for other kinds of entries.
    """

    name: str
    kind: str
    leaves: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None


@click.command("explain")
@click.argument("a")
@click.argument("b", required=False)
@store_options(computes=False)
@output_options(quiet=False)
def command(*, a: str, b: str | None, as_json: bool, **options: Any) -> None:  # noqa: ANN401 - click's options
    """Print the leaves in which two requests differ; with A alone, what the store has that is nearest to it.

    A and B are each the key of an entry (its first letters will do), an adapter folder, or a JSON file with a recipe.
    Entries are compared by everything that their content depends on; a folder that is not in the store, or a recipe,
    by the recipe alone, which names neither model nor data.
    """
    output = Output(as_json=as_json)
    with output.work():
        store = open_store(options)
        one = read_side(a, store)
        other = nearest_to(one, store) if b is None else read_side(b, store)
        found, by = compare(one, other)
    document = {
        "a": {"name": one.name, "kind": one.kind},
        "b": {"name": other.name, "kind": other.kind},
        "by": by,
        "same": not found,
        "differences": [{"leaf": leaf, "a": ours, "b": theirs} for leaf, ours, theirs in found],
    }
    output.result(json.loads(json.dumps(document, default=str)), _render(one, other, by, found))


def read_side(text: str, store: Store | None) -> Side:
    """A request by folder, file or key.

    Raises:
        ArtefactError: a folder or file that says nothing of a request.
        MissingFileError, NotStoredError, ConfigError: there is nothing of that name.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return _of_folder(text, path, store)
    if path.is_file():
        value = _read_object(path)
        return _of_recipe(text, value.get("recipe", value), path)
    if store is None:
        raise MissingFileError(f"'{text}' is no folder and no file, and there is no store to look for a key")
    try:
        return _of_entry(text, store)
    except ConfigError as error:
        if path.name != text:
            raise MissingFileError(f"'{text}' is no adapter folder, no file and no key; check the name") from error
        raise


def nearest_to(side: Side, store: Store | None) -> Side:
    """The entry of the store that differs in the fewest leaves.

    Raises:
        NotStoredError: there is none to compare with.
    """
    from smartinit.store import Key
    from smartinit.store.explain import nearest, nearest_recipe

    found = None
    if store is not None and side.kind != "recipe":
        key = Key(side.kind, side.leaves)
        found = nearest(store, key, but=key.digest)
    elif store is not None and side.recipe is not None:
        found = nearest_recipe(store, side.recipe)
    if found is None:
        raise NotStoredError(f"the store has nothing to compare '{side.name}' with")
    manifest = found[0]
    return _of_manifest(manifest.key[:12], manifest.kind, manifest.leaves)


def compare(one: Side, other: Side) -> tuple[list[tuple[str, object, object]], str]:
    """Differing leaves, and by what the two were compared: ``"leaves"`` or ``"recipe"``.

    Raises:
        ConfigError: a statistic and an artefact, say, have nothing in common.
    """
    from smartinit.store.explain import keyed
    from smartinit.store.keys import differences

    if one.kind == other.kind != "recipe":
        return differences(one.leaves, other.leaves), "leaves"
    if one.recipe is None or other.recipe is None:
        kinds = f"'{one.name}' is of the kind {one.kind}, '{other.name}' of the kind {other.kind}"
        raise ConfigError(f"{kinds}: they have no leaf in common")
    return differences(keyed(one.recipe), keyed(other.recipe)), "recipe"


def _of_folder(text: str, folder: Path, store: Store | None) -> Side:
    path = folder / _RECORD
    if not path.is_file():
        raise ArtefactError(f"the folder {folder} has no {_RECORD}: it does not say what was asked for")
    record = _read_object(path)
    note = (record.get("provenance") or {}).get("store") or {}
    manifest = store.peek(note["key"]) if store is not None and isinstance(note.get("key"), str) else None
    if manifest is not None and manifest.kind == "artefact":
        return _of_manifest(text, manifest.kind, manifest.leaves)
    return _of_recipe(text, record.get("recipe"), path)


def _of_recipe(text: str, values: object, path: Path) -> Side:
    from smartinit.errors import SmartinitError
    from smartinit.recipe import Recipe

    try:
        recipe = Recipe.from_dict(values).as_dict()  # type: ignore[arg-type] # what it is shows there
    except (SmartinitError, TypeError) as error:
        raise ArtefactError(f"'{path}' holds no recipe ({error}); name an adapter folder or a recipe") from error
    return Side(text, "recipe", recipe, recipe)


def _of_entry(text: str, store: Store) -> Side:
    from smartinit.store.naming import find_key

    manifest = store.peek(find_key(store, text))
    if manifest is None:
        raise NotStoredError(f"the store has no sound entry '{text}'")
    return _of_manifest(text, manifest.kind, manifest.leaves)


def _of_manifest(text: str, kind: str, leaves: Mapping[str, Any]) -> Side:
    from smartinit.recipe import Recipe

    names = [name for name in Recipe.__dataclass_fields__ if name != "version"]
    return Side(text, kind, leaves, {name: leaves.get(name) for name in names} if kind == "artefact" else None)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_LARGEST))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"'{path}' cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"'{path}' holds no JSON object")
    return value


def _render(one: Side, other: Side, by: str, found: list[tuple[str, object, object]]) -> str:
    from smartinit.store.explain import folded, shown

    names = f"A  {one.name} ({one.kind})\nB  {other.name} ({other.kind})"
    if by == "recipe":
        names += "\ncompared by their recipes: model and data are not told apart"
    if not found:
        return f"{names}\n\nthey do not differ"
    rows = [(leaf, shown(ours), shown(theirs)) for leaf, ours, theirs in folded(found)]
    return f"{names}\n\n{table(('leaf', 'A', 'B'), rows, left=3)}"
