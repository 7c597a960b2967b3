"""``smartinit cache``: what the store holds, keeping it small and sound, and sharing it."""

from __future__ import annotations

import os
import sys
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smartinit.cli.cache_report import freed_text, plan_document, plan_text, print_json, print_lines, show_transfer
from smartinit.cli.exit_codes import FAILED, OK, UNVERIFIED
from smartinit.cli.options import output_options
from smartinit.cli.output import Output, human_bytes
from smartinit.cli.quantities import Duration, Size
from smartinit.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from smartinit.store import Store

_SORTED = 10_000  # entries that are held in memory to be sorted; more come as they lie


class InOrder(click.Group):
    """A group that lists its commands in the order of their making."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names."""
        del ctx
        return list(self.commands)


@click.group("cache", cls=InOrder)
def command() -> None:
    """Look after the store: list it, check it, make room, pin, share.

    Keys may be shortened to their first six letters, if only one key begins with them. A store that does not exist is
    an empty one.
    """


def store_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Which store."""
    text = "Folder of the store; SMARTINIT_CACHE or cache if not given."
    return click.option("--store", "place", metavar="DIR", help=text)(function)


@command.command("ls", short_help="List entries.")
@click.argument("prefix", default="")
@click.option("--kind", help="Only entries of this kind, such as artefact or statistic.")
@store_option
@output_options(quiet=False)
def list_command(prefix: str, kind: str | None, place: str | None, *, as_json: bool) -> None:
    """List entries, those used last first, or only those whose key begins with PREFIX.

    Up to 10,000 entries are sorted; of a larger store they come in no order. Size is that of an entry's files, also
    of those that it shares with others; the last line counts each file once.
    """
    from smartinit.store.listing import list_entries, stored_bytes

    layout = _open(place, read_only=True).local.layout
    entries = (entry for entry in list_entries(layout) if entry.key.startswith(prefix) and kind in (None, entry.kind))
    first = list(islice(entries, _SORTED + 1))
    if len(first) <= _SORTED:
        first.sort(key=lambda entry: -entry.used)
    rest = chain(first, entries)
    if as_json:
        count = print_json(rest, str(layout.root))
        click.echo(f'], "count": {count}, "bytes": {stored_bytes(layout)}}}')
    else:
        count, total = print_lines(rest), stored_bytes(layout)
        click.echo(f"{count:,} entries, {human_bytes(total)} of files in '{layout.root}'")


@command.command("path", short_help="Print where the store is.")
@store_option
@output_options(quiet=False)
def path_command(place: str | None, *, as_json: bool) -> None:
    """Print where the store is, whether it exists or not."""
    layout = _open(place, read_only=True).local.layout
    root = str(layout.root.absolute())
    Output(as_json=as_json).result({"path": root, "exists": layout.entries.is_dir()}, root)


@command.command("verify", short_help="Read everything and check it.")
@click.option("--repair", is_flag=True, help="Put what is broken into quarantine, to be computed again.")
@store_option
@output_options()
def verify_command(place: str | None, *, repair: bool, as_json: bool, quiet: bool) -> int:
    """Read everything and check it against its sha256; exit with 4 if anything is unsound, repaired or not."""
    from tqdm import tqdm

    from smartinit.store.verify import verify

    output = Output(as_json=as_json, quiet=quiet)
    store = _open(place, read_only=not repair)
    with (
        output.work(),
        tqdm(desc="verify", unit="B", unit_scale=True, disable=True if quiet else None, file=sys.stderr) as progress,
    ):
        found = verify(store.local, repair=repair, progress=progress.update)
    lines = [unsound.sentence for unsound in found]
    done = "; what is broken is in quarantine now" if repair and found else ""
    lines.append(f"{len(found)} unsound{done}" if found else f"all sound in '{_root(store)}'")
    document = {"store": _root(store), "repair": repair, "unsound": [unsound._asdict() for unsound in found]}
    output.result(document, "\n".join(lines))
    return UNVERIFIED if found else OK


@command.command("gc", short_help="Make room: print what goes and why, then remove it.")
@click.option("--max-size", type=Size(), help="Entries used least recently go until the store has this size.")
@click.option("--max-age", type=Duration(), help="Entries go that were stored longer ago, such as 30d.")
@click.option("--unused-for", type=Duration(), help="Entries go that were not used for this time, such as 7d.")
@click.option("--dry-run", is_flag=True, help="Print the plan only.")
@store_option
@output_options(quiet=False)
def gc_command(
    max_size: float | None,
    max_age: float | None,
    unused_for: float | None,
    place: str | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Make room: print what goes and why, then remove it.

    Without rules, only what nothing needs goes: files without an entry, and what killed processes have left. Pinned
    entries, and those that someone reads at the moment, stay.
    """
    output, store = Output(as_json=as_json), _open(place, read_only=dry_run)
    with output.work():
        plan = store.prune(
            None if max_size is None else int(max_size), max_age=max_age, unused_for=unused_for, dry_run=True
        )
    if not as_json:
        click.echo(plan_text(plan))
    freed = None
    if not dry_run:
        layout = store.local.layout
        if (plan.entries or plan.blobs or plan.leftovers) and not os.access(layout.entries, os.W_OK):
            raise StoreError(f"the store '{layout.root}' cannot be written, so nothing was removed")
        with output.work():
            freed = plan.execute()
    if as_json:
        output.result(plan_document(plan, freed), "")
    elif freed is not None:
        click.echo(freed_text(freed))
    return FAILED if freed is not None and freed.problems else OK


@command.command("pin", short_help="Keep entries whatever gc does.")
@click.argument("keys", nargs=-1, required=True)
@store_option
@output_options(quiet=False)
def pin_command(keys: Sequence[str], place: str | None, *, as_json: bool) -> None:
    """Keep entries whatever gc does."""
    store = _open(place)
    names = _names(store, keys)
    for name in names:
        store.pin(name)
    Output(as_json=as_json).result({"store": _root(store), "pinned": names}, "\n".join(f"pinned {n}" for n in names))


@command.command("unpin", short_help="Let gc remove entries again.")
@click.argument("keys", nargs=-1, required=True)
@store_option
@output_options(quiet=False)
def unpin_command(keys: Sequence[str], place: str | None, *, as_json: bool) -> None:
    """Let gc remove entries again."""
    store = _open(place)
    names = _names(store, keys)
    for name in names:
        store.unpin(name)
    Output(as_json=as_json).result(
        {"store": _root(store), "unpinned": names}, "\n".join(f"unpinned {n}" for n in names)
    )


@command.command("rm", short_help="Forget entries.")
@click.argument("keys", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Also pinned entries.")
@store_option
@output_options(quiet=False)
def remove_command(keys: Sequence[str], place: str | None, *, force: bool, as_json: bool) -> None:
    """Forget entries; a later gc removes their files, which others may share."""
    from smartinit.store.pins import pinned_keys

    store = _open(place)
    names = _names(store, keys)
    pinned = [name for name in names if name in pinned_keys(store.local.layout)]
    if pinned and not force:
        raise ConfigError(f"'{pinned[0]}' is pinned; unpin it first, or use --force")
    removed = [name for name in names if store.local.remove(name)]
    Output(as_json=as_json).result(
        {"store": _root(store), "removed": removed}, "\n".join(f"removed {name}" for name in removed)
    )


@command.command("push", short_help="Copy entries to another store.")
@click.argument("target", metavar="DIR_OR_URL")
@click.argument("keys", nargs=-1)
@store_option
@output_options(quiet=False)
def push_command(target: str, keys: Sequence[str], place: str | None, *, as_json: bool) -> int:
    """Copy entries (all of them if no KEYS are given) to another store."""
    output, store = Output(as_json=as_json), _open(place)
    with output.work():
        transfer = store.push(target, _names(store, keys) or None)
    return show_transfer(output, {"store": _root(store), "target": target}, transfer)


@command.command("pull", short_help="Copy entries from another store.")
@click.argument("source", metavar="DIR_OR_URL")
@click.argument("keys", nargs=-1)
@store_option
@output_options(quiet=False)
def pull_command(source: str, keys: Sequence[str], place: str | None, *, as_json: bool) -> int:
    """Copy entries (all of them if no KEYS are given, which are whole ones here) from another store."""
    output, store = Output(as_json=as_json), _open(place)
    with output.work():
        transfer = store.pull(source, list(keys) or None)
    return show_transfer(output, {"store": _root(store), "source": source}, transfer)


@command.command("migrate", short_help="Bring a store of an older version to the schema of this one.")
@store_option
@output_options(quiet=False)
def migrate_command(place: str | None, *, as_json: bool) -> None:
    """Bring a store of an older version to the schema of this one; nothing else may use it meanwhile."""
    from smartinit.store.layout import Layout
    from smartinit.store.migrate import migrate

    output = Output(as_json=as_json)
    root = Path(_folder(place)).expanduser()
    with output.work():
        done = migrate(Layout(root))
    text = f"'{root}' has schema {done.now}"
    if done.before != done.now:
        text += f" now; it had {done.before}"
    output.result({"store": str(root), "before": done.before, "schema": done.now}, text)


def _folder(place: str | None) -> str:
    """The folder that is looked after."""
    from smartinit.store.layers import is_remote
    from smartinit.store.store import DEFAULT, VARIABLE

    if place is None:
        place = os.environ.get(VARIABLE) or DEFAULT
        return DEFAULT if is_remote(place) else place
    if is_remote(place):
        raise ConfigError(f"'{place}' is no folder; copy from there with `smartinit cache pull`")
    return place


def _open(place: str | None, *, read_only: bool = False) -> Store:
    from smartinit.store import Store

    return Store(_folder(place), read_only=read_only)


def _root(store: Store) -> str:
    return str(store.local.layout.root)


def _names(store: Store, keys: Iterable[str]) -> list[str]:
    """Whole keys; all are known before anything is done."""
    from smartinit.store.naming import find_key

    return list(dict.fromkeys(find_key(store.local, key) for key in keys))
