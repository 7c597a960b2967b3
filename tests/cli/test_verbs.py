from __future__ import annotations

import subprocess
import sys

import click
import pytest

from smartinit.cli.verbs import VERBS, group


def command_of(verb):
    return group.get_command(click.Context(group), verb)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_documented_command(verb):
    command = command_of(verb)
    assert command.name == verb
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{verb} {parameter.opts} has no help"
            assert parameter.help.endswith(".")
    for single in command.commands.values() if isinstance(command, click.Group) else [command]:
        assert any("--json" in parameter.opts for parameter in single.params)


def test_help_of_the_verbs_imports_nothing_heavy():
    names = ", ".join(f"'{verb}'" for verb in VERBS)
    code = (
        "import sys\nfrom smartinit.cli import main\n"
        f"for verb in ({names}): main([verb, '--help'])\n"
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'numpy', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_and_version_are_on_stdout(run_cli):
    shown = run_cli("--help")
    assert shown.code == 0
    assert all(f"  {verb} " in shown.out for verb in VERBS)
    assert shown.err == ""
    assert run_cli("--version").out.startswith("smartinit, version ")


def test_nothing_at_all_shows_the_help_and_is_a_usage_error(run_cli):
    shown = run_cli()
    assert shown.code == 2
    assert "Verbs:" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["comptue"], "no verb 'comptue'; known: compute, plan"),
        (["compute", "--modle", "x"], "No such option"),
        (["compute", "--model", "x"], "Missing option '--out'"),
        (["compute", "--model", "x", "--data", "y", "--out", "z", "--rank", "many"], "'many' is not a valid integer"),
        (["compute", "--model", "x", "--data", "y", "--out", "z", "--params", "2.5"], "'2.5' is no whole number"),
        (["compute", "--model", "x", "--data", "y", "--out", "z", "--planner", "best"], "'best' is not one of"),
        (["inspect"], "Missing argument 'FOLDER'"),
    ],
)
def test_usage_errors_are_one_line_with_the_way_to_the_help(run_cli, arguments, message):
    shown = run_cli(*arguments)
    assert shown.code == 2
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert "--help'" in shown.err
    assert shown.out == ""
    assert run_cli(*arguments, "--json").document["exit_code"] == 2


def test_a_reader_that_goes_away_is_no_traceback():
    code = "import sys; from smartinit.cli import main; sys.exit(main(['compute', '--help']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == b""
    assert process.wait() == 1
