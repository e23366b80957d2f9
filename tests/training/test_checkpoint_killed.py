"""A run that is killed at any moment goes on from its last checkpoint, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("killed_run.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forks of one process")
@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_runs_end_bit_for_bit_like_one_that_was_not(tmp_path: Path, kills: int) -> None:
    command = [sys.executable, PROGRAM, tmp_path, str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(result)
    assert sum(result["kills"].values()) == kills
    assert len(result["kills"]) == 6  # kinds of moments
    assert result["most_lost"] <= 2  # the steps from save to save
    assert result["half_written"] >= kills // 3  # three of six moments are in the middle of a write
    assert result["trained"]
    assert result["identical"]
    assert not any(name.endswith(".tmp") for name in result["files"])
