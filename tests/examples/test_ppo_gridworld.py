"""An agent finds its goals after some updates, each of which is one graph of constant size."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_the_agent_finds_its_goals(run_example, capsys):
    curve = run_example("ppo_gridworld")["curve"]
    (found, steps), (at_last, fewer) = curve[0], curve[-1]
    assert found < 0.4 and at_last > 0.9 and fewer < steps / 3
    assert int(capsys.readouterr().out.split("operators of an update:")[1].split()[0]) < 300


@pytest.mark.slow
def test_it_notices_that_nothing_was_learnt(run_example):
    with pytest.raises(AssertionError, match="does not find"):
        run_example("ppo_gridworld", picture=False, UPDATES=2)
