"""A small GPT writes the same with a cache as without, in a time that does not grow with the square of the length."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_it_learns_and_writes_the_same_with_a_cache(run_example, capsys):
    result = run_example("gpt_generate")
    assert result["after"] < 2.6 < 6 < result["before"]
    assert result["greedy"].shape == result["sample"].shape == (1, 100)
    assert "256 characters" in capsys.readouterr().out


@pytest.mark.slow
def test_it_notices_a_cache_that_is_wrong(run_example, monkeypatch):
    from luxtorch.layers import _attention

    monkeypatch.setattr(_attention, "_written", lambda old, new, rows: old)
    with pytest.raises(AssertionError, match="the cache is wrong"):
        run_example("gpt_generate", picture=False, STEPS=2)
