"""Processes are killed while they write: what was acknowledged is there, the rest is absent or whole."""

from __future__ import annotations

import os

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="writers are forked")


def test_a_kill_at_every_step_of_a_put(program, ram, tally):
    done = program("kills.py", ram, "steps", 1)
    assert done["kills"] > 60
    tally(fault="SIGKILL at each step of a put, once", **done)


def test_kills_at_random_moments(program, ram, tally, times, seed):
    done = program("kills.py", ram, "random", times(30, 500), seed)
    assert done["kills"] == times(30, 500)
    tally(fault="SIGKILL at random moments of writers", **done)
