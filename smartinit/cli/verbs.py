"""The table of verbs. A verb's module is imported when the verb is used, not to list it."""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import click

from smartinit import __version__
from smartinit.config.checks import closest

if TYPE_CHECKING:
    from collections.abc import Mapping


class Verb(NamedTuple):
    """Where a verb lives, and its line in ``smartinit --help``."""

    module: str
    summary: str


VERBS: Mapping[str, Verb] = MappingProxyType(
    {
        "compute": Verb("smartinit.cli.compute", "Compute the starting point of an adapter from a model and data."),
        "plan": Verb("smartinit.cli.plan", "Say what compute would do, without weights or data in memory."),
        "get": Verb("smartinit.cli.get", "Print where a stored adapter lies; nothing is computed."),
        "explain": Verb("smartinit.cli.explain", "Say in what two requests differ, or one from what is stored."),
        "cache": Verb("smartinit.cli.cache", "Look after the store: list, check, make room, pin, share."),
        "inspect": Verb("smartinit.cli.inspect", "Show what an adapter folder holds."),
        "convert": Verb("smartinit.cli.convert", "Turn a trained split into plain LoRA for the unmodified base."),
        "export": Verb("smartinit.cli.export", "Write an adapter for Megatron, or one of Megatron for PEFT."),
        "doctor": Verb("smartinit.cli.doctor", "Show the environment, or verify an adapter by recomputing it."),
        "demo": Verb("smartinit.cli.demo", "Run the main job on the embedded model and data."),
    }
)


class LazyGroup(click.Group):
    """A group whose commands are imported one at a time."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        del ctx
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's module; its command is called ``command``."""
        del ctx
        verb = VERBS.get(cmd_name)
        if verb is None:
            return None
        command = import_module(verb.module).command
        if not isinstance(command, click.Command):
            raise TypeError(f"{verb.module}.command is no click command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click, but an unknown verb names the closest one."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"no verb '{args[0]}'; known: {', '.join(VERBS)}{closest(args[0], VERBS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs from the table, without importing one."""
        del ctx
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.summary) for name, verb in VERBS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="smartinit")
def group() -> None:
    """Starting points for LoRA fine-tuning, computed from data and weights.

    \b
    smartinit compute --model MODEL_DIR --data train.jsonl --method eva --rank 16 --out adapter/

    Exit codes: 0 ok, 1 failed, 2 usage, 3 not in the store, 4 verification failed, 5 out of memory,
    6 bad data or model, 130 interrupted. SMARTINIT_DEBUG=1 shows the traceback of an error.
    """  # noqa: D301 - click's \b keeps the line as it is
