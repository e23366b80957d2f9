"""Importing luxtorch is cheap: it loads nothing that takes long."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("heavy", ["torch._dynamo", "torch._inductor", "sympy", "scipy", "matplotlib"])
def test_importing_luxtorch_loads_no(heavy):
    code = (
        f"import sys, torch; before = set(sys.modules); import luxtorch; print('{heavy}' in set(sys.modules) - before)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
