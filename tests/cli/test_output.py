from __future__ import annotations

import sys
import warnings

from smartinit.cli.output import Output, human_bytes, human_count, table


def test_table():
    assert table(("a", "bb"), [("xyz", 1), ("x", 22)]) == "a    bb\n───  ──\nxyz   1\nx    22"


def test_sizes():
    assert [human_bytes(n) for n in (0, 1023, 1536, 3 * 2**30, 2**50)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 GiB",
        "1024.0 TiB",
    ]
    assert [human_count(n) for n in (7, 1234, 2.5e6, 7e9, 3e12)] == ["7", "1.2k", "2.5M", "7.0G", "3.0T"]


def test_what_libraries_print_stays_off_stdout(capsys):
    output = Output()
    with output.work():
        print("a library says hello")  # noqa: T201
        sys.stdout.write("again\n")
    output.result({"a": 1}, "text")
    captured = capsys.readouterr()
    assert captured.out == "text\n"
    assert captured.err == "a library says hello\nagain\n"


def test_warnings_become_lines(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with Output(quiet=True).work():
            warnings.warn("two\n lines", stacklevel=1)
    assert capsys.readouterr().err == "smartinit: warning: two lines\n"


def test_quiet_and_json(capsys):
    output = Output(as_json=True, quiet=True)
    output.log("not seen")
    output.result({"a": None}, "text")
    captured = capsys.readouterr()
    assert captured.out == '{\n  "a": null\n}\n'
    assert captured.err == ""
