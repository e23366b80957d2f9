"""Importing luxtorch is cheap: it loads nothing that takes long."""

from __future__ import annotations

import subprocess
import sys

import pytest

import luxtorch as lt


@pytest.mark.parametrize("heavy", ["torch._dynamo", "torch._inductor", "sympy", "scipy", "matplotlib", "torchopt"])
def test_importing_luxtorch_loads_no(heavy):
    code = (
        f"import sys, torch; before = set(sys.modules); import luxtorch; print('{heavy}' in set(sys.modules) - before)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_what_comes_late_comes_when_it_is_asked_for():
    code = (
        "import torch, luxtorch as lt\n"
        "rate = torch.compile(lambda x: lt.optim.constant(0.5)(x), backend='eager', fullgraph=True)\n"
        "print(float(rate(torch.tensor(1))), lt.training.TrainState.__name__, hasattr(lt, 'optimizers'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["0.5", "TrainState", "False"], run.stderr


def test_what_comes_late_is_listed():
    assert {"optim", "training", "testing", "from_torch", "Dense"} <= set(dir(lt))
    assert all(hasattr(lt, name) for name in dir(lt))
