"""The command line: thin verbs, one file each; errors become exit codes in `exit_codes`.

Data goes to stdout, logs and progress to stderr. Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from smartinit.cli.exit_codes import Interrupt, report
from smartinit.cli.verbs import group

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; never raises."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with Interrupt() as interrupt:
        try:
            result = group.main(args=given, prog_name="smartinit", standalone_mode=False, obj=interrupt)
            sys.stdout.flush()
        except BaseException as error:  # noqa: BLE001 - the one place where errors become exit codes
            return report(error, as_json="--json" in given, interrupted=interrupt.seen)
    return result if isinstance(result, int) else 0
