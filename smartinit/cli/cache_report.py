"""How the verbs of ``smartinit cache`` show entries, plans and transfers."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click

from smartinit.cli.exit_codes import FAILED, OK
from smartinit.cli.output import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from smartinit.cli.output import Output
    from smartinit.store.listing import Listed
    from smartinit.store.prune import PrunePlan
    from smartinit.store.sweep import Freed
    from smartinit.store.transfer import Transfer

_SHOWN = 20  # lines of a plan
_KEY = 12
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def print_json(entries: Iterable[Listed], root: str) -> int:
    """The beginning of one document, written as entries come; how many there were. The caller writes its end."""
    click.echo(f'{{"store": {json.dumps(root)}, "entries": [')
    count = 0
    for entry in entries:
        click.echo(("," if count else "") + json.dumps(entry._asdict(), allow_nan=False))
        count += 1
    return count


def print_lines(entries: Iterable[Listed]) -> int:
    """Aligned lines, written as entries come; how many there were."""
    count, now = 0, time.time()
    for entry in entries:
        if not count:
            click.echo(f"{'key':<{_KEY}}  {'kind':<9}  {'size':>9}  {'last used':>10}  {'':<6}  about")
        count += 1
        if entry.problem is not None:
            click.echo(f"{entry.key[:_KEY]:<{_KEY}}  {_printable(entry.problem)}")
            continue
        state = "pinned" if entry.pinned else "read" if entry.leased else ""
        about = " ".join(f"{name}={value}" for name, value in entry.about.items())
        click.echo(
            f"{entry.key[:_KEY]:<{_KEY}}  {_printable(entry.kind)[:9]:<9}  {human_bytes(entry.size):>9}  "
            f"{_ago(now - entry.used):>10}  {state:<6}  {_printable(about)}".rstrip()
        )
    return count


def plan_text(plan: PrunePlan) -> str:
    """What goes: the first entries, and sums."""
    lines = [
        f"{going.key[:_KEY]:<{_KEY}}  {human_bytes(going.entry.size):>9}  used {_date(going.used)}  {going.reason}"
        for going in plan.entries[:_SHOWN]
    ]
    if len(plan.entries) > _SHOWN:
        lines.append(f"… and {len(plan.entries) - _SHOWN:,} more entries")
    lines += [f"remark: {_printable(message)}" for message in plan.messages]
    for names, why in ((plan.pinned, "pinned"), (plan.leased, "being read")):
        if names:
            lines.append(f"{len(names):,} entries stay because they are {why}")
    lines.append(
        f"{len(plan.entries):,} of {plan.kept + len(plan.entries):,} entries go, with {len(plan.blobs):,} files and "
        f"{len(plan.leftovers):,} leftovers: {human_bytes(plan.expected_freed)} of {human_bytes(plan.total)}"
    )
    return "\n".join(lines)


def freed_text(freed: Freed) -> str:
    """What is gone."""
    lines = [f"remark: {_printable(problem)}" for problem in freed.problems]
    if freed.kept:
        lines.append(f"{len(freed.kept):,} entries stay after all: they were wanted again")
    lines.append(f"freed {human_bytes(freed.bytes)}: {freed.entries:,} entries, {freed.blobs:,} files")
    return "\n".join(lines)


def plan_document(plan: PrunePlan, freed: Freed | None) -> dict[str, Any]:
    """A plan and, if it was executed, what that did."""
    root = plan.local.layout.root
    return {
        "store": str(root),
        "entries": [
            {"key": going.key, "bytes": going.entry.size, "used": going.used, "reason": going.reason}
            for going in plan.entries
        ],
        "blobs": [{"sha256": blob.sha256, "bytes": blob.bytes} for blob in plan.blobs],
        "leftovers": [
            {"path": item.path.relative_to(root).as_posix(), "bytes": item.bytes, "reason": item.reason}
            for item in plan.leftovers
        ],
        "bytes": plan.total,
        "expected_freed": plan.expected_freed,
        "kept": plan.kept,
        "pinned": list(plan.pinned),
        "leased": list(plan.leased),
        "messages": list(plan.messages),
        "freed": None if freed is None else {**vars(freed), "kept": list(freed.kept)},
    }


def show_transfer(output: Output, where: dict[str, Any], transfer: Transfer) -> int:
    """Print what was copied; the exit code."""
    document = {
        **where,
        "sent": list(transfer.sent),
        "skipped": list(transfer.skipped),
        "failed": dict(transfer.failed),
        "bytes": transfer.bytes,
        "conflicts": list(transfer.conflicts),
    }
    lines = [f"failed {key[:_KEY]}: {_printable(why)}" for key, why in transfer.failed.items()]
    lines += [
        f"conflict {key[:_KEY]}: the other side has a different result; that one stays" for key in transfer.conflicts
    ]
    lines.append(
        f"{len(transfer.sent):,} copied ({human_bytes(transfer.bytes)}), {len(transfer.skipped):,} there already, "
        f"{len(transfer.failed):,} failed"
    )
    output.result(document, "\n".join(lines))
    return FAILED if transfer.failed else OK


def _ago(seconds: float) -> str:
    """``3 d ago``; of a clock that has gone back, ``in 3 d``."""
    for size, unit in _UNITS:
        if abs(seconds) >= size:
            number = f"{abs(seconds) / size:.0f} {unit}"
            return f"{number} ago" if seconds > 0 else f"in {number}"
    return "just now"


def _date(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        return f"{seconds:.0f}"


def _printable(text: str) -> str:
    """With nothing in it that a terminal would obey."""
    return text if text.isprintable() else ascii(text)[1:-1]
