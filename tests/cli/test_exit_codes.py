from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import click
import pytest
import torch

from smartinit import errors
from smartinit.cli.exit_codes import Interrupt, exit_code, report, sentence
from smartinit.cli.request import read_layers

ERRORS = [
    (errors.ConfigError("a"), 2),
    (errors.TargetError("a"), 2),
    (errors.ArgumentError("a"), 2),
    (errors.UnknownNameError("a"), 2),
    (errors.MissingFileError("a"), 2),
    (errors.OutputError("a"), 2),
    (errors.MissingDependencyError("a"), 2),
    (click.UsageError("a"), 2),
    (click.BadParameter("a"), 2),
    (errors.StoreError("a"), 1),
    (errors.NotStoredError("a"), 3),
    (errors.VerificationError("a"), 4),
    (MemoryError("a"), 5),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 5),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"), 5),
    (errors.DataError("a"), 6),
    (errors.NonFiniteError("layer", 0), 6),
    (errors.ModelError("a"), 6),
    (errors.ArtefactError("a"), 6),
    (KeyboardInterrupt(), 130),
    (click.Abort(), 130),
    (RuntimeError("a"), 1),
    (ValueError("a"), 1),
    (OSError(28, "No space left on device"), 1),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: type(value).__name__)
def test_code_and_one_line(error, code, capsys):
    assert exit_code(error) == code
    assert report(error, as_json=False) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("smartinit: error: ")
    assert captured.err.count("\n") == 1


def test_every_error_of_the_project_has_a_code():
    kinds = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert kinds - {type(error) for error, _ in ERRORS} == {errors.SmartinitError}


def test_json_has_the_error_on_stdout(capsys):
    assert report(errors.DataError("no rows"), as_json=True) == 6
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"error": "no rows", "exit_code": 6}
    assert captured.err == "smartinit: error: no rows\n"


def test_an_unexpected_error_says_how_to_see_more(capsys, monkeypatch):
    assert sentence(ZeroDivisionError("x\ny")) == "ZeroDivisionError: x; set SMARTINIT_DEBUG=1 for the traceback"
    monkeypatch.setenv("SMARTINIT_DEBUG", "1")
    with pytest.raises(errors.ConfigError) as caught:
        read_layers("no numbers")
    assert report(caught.value, as_json=False) == 2
    assert "Traceback" in capsys.readouterr().err


def test_after_ctrl_c_every_error_is_the_interrupt(capsys):
    assert report(errors.DataError("cancelled"), as_json=False, interrupted=True) == 130
    assert capsys.readouterr().err == "smartinit: error: interrupted; no partial output was left\n"


def test_ctrl_c_while_a_library_makes_code(tmp_path):
    """Python would end the process by a signal, whatever exit code was chosen."""
    (tmp_path / "verb.py").write_text(
        "import sys\nfrom smartinit.cli.exit_codes import report\n"
        "try:\n    exec('raise KeyboardInterrupt')\nexcept KeyboardInterrupt as error:\n"
        "    sys.exit(report(error, as_json=False))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "verb"], check=False, env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=60
    )
    assert done.returncode == 130


def test_ctrl_c_raises_once_and_leaves_cleaning_up_alone():
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interrupt.seen
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_works_again_after_a_while(monkeypatch):
    monkeypatch.setattr(Interrupt, "_PAUSE", 0.0)
    with Interrupt():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


def test_system_exit_passes():
    assert report(SystemExit(3), as_json=False) == 3
