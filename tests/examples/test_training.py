"""The examples that train: they run, they learn, and they draw."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_copy(folder, name):
    """Run a copy of an example, so that what it writes lands in a folder of its own."""
    shutil.copy(EXAMPLES / f"{name}.py", folder)
    result = runpy.run_path(str(folder / f"{name}.py"))
    assert (folder / "output" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return result


def test_a_parabola_is_fitted(tmp_path):
    result = run_copy(tmp_path, "polynomial_fitting")
    assert result["losses"][-1] < 0.02 < result["losses"][0]


@pytest.mark.slow
def test_digits_are_recognized_and_a_resumed_run_equals_a_whole_one(tmp_path, capsys):
    result = run_copy(tmp_path, "digits")
    assert result["share"] >= 0.98
    assert "the resumed run equals the whole one" in capsys.readouterr().out


@pytest.mark.slow
def test_lbfgs_ends_where_scipy_does(tmp_path):
    result = run_copy(tmp_path, "lbfgs")
    losses = {name: loss for name, loss, *_ in result["rows"]}
    assert abs(losses["luxtorch"] - losses["SciPy"]) < 1e-8 < 1e-5 < losses["Adam"] - losses["SciPy"]
    assert result["better"].grad_norm < 1e-7
