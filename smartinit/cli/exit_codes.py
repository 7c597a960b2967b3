"""The one place where exceptions become exit codes and one line on stderr.

0 ok · 1 failed · 2 usage · 3 not in the store · 4 verification failed · 5 out of memory · 6 bad data or model ·
130 interrupted
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import click

from smartinit import errors

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from typing_extensions import Self

OK, FAILED, USAGE, NOT_STORED, UNVERIFIED, OUT_OF_MEMORY, BAD_DATA, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130

# The first match counts, so special ones stand before their bases.
_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.VerificationError, UNVERIFIED),
    (errors.DataError, BAD_DATA),
    (errors.ModelError, BAD_DATA),
    (errors.ArtefactError, BAD_DATA),
    (errors.NotStoredError, NOT_STORED),
    (errors.StoreError, FAILED),
    (errors.SmartinitError, USAGE),
    (click.ClickException, USAGE),
    (MemoryError, OUT_OF_MEMORY),
    (KeyboardInterrupt, INTERRUPTED),
    (click.Abort, INTERRUPTED),
)
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def exit_code(error: BaseException) -> int:
    """The exit code of an exception."""
    if _is_out_of_memory(error):
        return OUT_OF_MEMORY
    return next((code for kind, code in _CODES if isinstance(error, kind)), FAILED)


def sentence(error: BaseException) -> str:
    """The exception as one line for a user."""
    code = exit_code(error)
    if code == INTERRUPTED:
        return "interrupted; no partial output was left"
    if code == OUT_OF_MEMORY:
        return f"out of memory ({_line(error)}); lower --batch-size or --max-length, or use --dtype bfloat16"
    if isinstance(error, click.ClickException):
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "smartinit"
        return f"{' '.join(error.format_message().split()).rstrip('.')}; see '{command} --help'"
    if code == FAILED and not isinstance(error, errors.SmartinitError):
        return f"{type(error).__name__}: {_line(error)}; set SMARTINIT_DEBUG=1 for the traceback"
    return _line(error)


def report(error: BaseException, *, as_json: bool, interrupted: bool = False) -> int:
    """Say what went wrong and return the exit code.

    Args:
        error: what was raised.
        as_json: also print ``{"error": ..., "exit_code": ...}`` on stdout.
        interrupted: Ctrl-C came first; libraries turn it into other exceptions on the way.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    if isinstance(error, BrokenPipeError):
        # The reader has gone (`| head`): there is no one to tell. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return USAGE
    if interrupted:
        error = KeyboardInterrupt()
    code, text = exit_code(error), sentence(error)
    if code == INTERRUPTED:
        # Ctrl-C inside an exec() of text (making a dataclass, say) leaves a mark, with which Python would end `-m` by
        # a signal in place of this code; the next exec() takes it off.
        exec("")  # noqa: S102
    if os.environ.get("SMARTINIT_DEBUG"):
        traceback.print_exception(error)
    click.echo(f"smartinit: error: {text}", err=True)
    if as_json:
        click.echo(json.dumps({"error": text, "exit_code": code}))
    return code


class Interrupt:
    """Inside, Ctrl-C raises KeyboardInterrupt, but not again within a second, so that cleaning up is not cut short."""

    _PAUSE = 1.0  # seconds

    def __init__(self) -> None:
        self._last = -math.inf
        self._before: Any = None

    @property
    def seen(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._last > -math.inf

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed: some code swallows the one that was raised in it."""
        if self.seen:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        """Take over SIGINT; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give SIGINT back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        now = time.monotonic()
        if now - self._last > self._PAUSE:
            self._last = now
            raise KeyboardInterrupt


def check_interrupt() -> None:
    """A point where a verb gives up if Ctrl-C was pressed."""
    context = click.get_current_context(silent=True)
    interrupt = None if context is None else context.find_object(Interrupt)
    if interrupt is not None:
        interrupt.check()


def _is_out_of_memory(error: BaseException) -> bool:
    torch: Any = sys.modules.get("torch")  # never imported for this
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return type(error) is RuntimeError and any(words in str(error).lower() for words in _MEMORY_WORDS)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
