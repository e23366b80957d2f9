"""A custom cell learns more of a text the farther back its gradients go."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_longer_windows_learn_more(run_example, capsys):
    results = run_example("tbptt")["results"]
    bits = [found[-1][1] for _, found in results.values()]
    assert bits == sorted(bits, reverse=True) and bits[-1] < 2.25 < results[16][1][1][1]
    assert "gradients through 16 characters" in capsys.readouterr().out


@pytest.mark.slow
def test_it_notices_that_nothing_was_learnt(run_example):
    with pytest.raises(AssertionError, match="of no use"):
        run_example("tbptt", picture=False, STEPS=1, WINDOWS=(4, 1))
