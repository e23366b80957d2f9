"""The layer of the tutorial keeps the laws, learns, and a careless one is found out."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_a_layer_from_nothing_to_a_trained_model(run_example, capsys):
    result = run_example("own_layer", MODELS=3)
    assert result["accuracy"] > 0.98 and result["together"] > 0.98
    out = capsys.readouterr().out
    assert "all laws hold" in out and "Careless(2, 3) after train_mode: purity, arguments: '2.usage' differs" in out
    usage = result["ts"].states["layer_1"]["usage"]
    assert usage.shape == (24,) and bool((usage > 0).all()), "the state has followed the batches"
