"""The constants of hares and lynxes are the published ones, and a network does better than they do."""

from __future__ import annotations

import pytest

pytest.importorskip("torchdiffeq")


@pytest.mark.slow
def test_the_network_beats_four_constants(run_example, capsys):
    result = run_example("neural_ode")
    assert result["factors"][1] < 1.22 < result["factors"][0]
    assert capsys.readouterr().out.count("is that of dopri5") == 2


@pytest.mark.slow
def test_it_notices_that_nothing_was_learnt(run_example):
    with pytest.raises(AssertionError, match="no better than four constants"):
        run_example("neural_ode", picture=False, STEPS=2)
