"""An ensemble is its members, and is unsure of what it has never seen."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_it_knows_what_it_does_not_know(run_example):
    result = run_example("ensemble_digits")
    assert result["joint"] < result["single"].mean()
    assert result["finds_mistakes"] > 0.95 and result["finds_strange"] > 0.93
    assert 1 - result["wrong"].float().mean() > 0.97


def test_few_members_are_members_too(run_example):
    result = run_example("ensemble_digits", MEMBERS=3, EPOCHS=6)
    assert result["difference"] < 1e-4


def test_it_notices_that_it_is_sure_of_everything(run_example):
    with pytest.raises(AssertionError, match="sure of what it does not know"):
        run_example("ensemble_digits", picture=False, MEMBERS=2, EPOCHS=1, BATCH=1000)
