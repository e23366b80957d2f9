"""The examples run on one process and on several, end with the same losses, and draw."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "ddp_digits.py"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 1, 2])
def test_the_example_runs_on(ranks, tmp_path):
    script = shutil.copy(EXAMPLE, tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    done = subprocess.run([sys.executable, *launcher, script], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    said = rf"sharded on {max(ranks, 1)}: the losses are within .* of those of a single process"
    assert re.search(said, done.stdout), done.stdout
    assert float(re.search(r"([\d.]+)% of 450 held-out digits", done.stdout)[1]) > 95
    assert ("each process holds" in done.stdout) == (ranks > 1)
    assert (tmp_path / "output" / "ddp_digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 4])
def test_the_example_of_a_mesh_runs_on(ranks, tmp_path):
    script = shutil.copy(EXAMPLE.with_name("tensor_parallel.py"), tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    done = subprocess.run([sys.executable, *launcher, script], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{ranks or 2} processes" in done.stdout
    assert re.search(r"the losses are within .* of those of a single process", done.stdout), done.stdout
    assert (tmp_path / "output" / "tensor_parallel.png").read_bytes().startswith(b"\x89PNG")
