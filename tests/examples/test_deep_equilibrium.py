"""A deep equilibrium model learns to complete digits, by the gradient of the equation that its state obeys."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_it_completes_digits(run_example):
    result = run_example("deep_equilibrium")
    assert result["errors"][0] < 0.8 * result["errors"][1]
    assert result["distances"][-1] < 1e-3 < 0.1 < result["distances"][0]


def test_it_notices_that_it_has_not_learnt(run_example):
    with pytest.raises(AssertionError, match="hardly better than the mean digit"):
        run_example("deep_equilibrium", picture=False, STEPS=3, WIDTH=16)
