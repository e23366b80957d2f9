"""The network solves the heat equation to a thousandth."""

from __future__ import annotations

import pytest

pytest.importorskip("scipy", minversion="1.16", reason="SciPy's least_squares had no callback")


@pytest.mark.slow
def test_the_error_is_below_a_thousandth(run_example):
    result = run_example("pinn_heat")
    assert result["errors"][-1] < 1e-3 < result["errors"][0]
    assert result["errors"][-1] == result["error"](result["ps"]).item()


def test_it_notices_that_the_solution_is_none(run_example):
    with pytest.raises(AssertionError, match="not below 0.001"):
        run_example("pinn_heat", picture=False, STEPS=2)
