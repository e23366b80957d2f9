"""One step from meta-learned parameters beats 200 from those of joint training."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_one_step_is_better_than_two_hundred(run_example, capsys):
    result = run_example("maml_sinusoid")
    errors = {name: by_step.mean(1) for name, by_step in result["errors"].items()}
    assert errors["meta-learning"][1] < 0.5 * errors["joint training"].min()
    assert errors["meta-learning"][10] < 0.8 * errors["meta-learning"][1]
    assert "the best of 200 after joint training" in capsys.readouterr().out


@pytest.mark.slow
def test_it_notices_that_nothing_was_learnt(run_example):
    with pytest.raises(AssertionError, match="one step is no better than many from the joint ones"):
        run_example("maml_sinusoid", picture=False, STEPS=1)
