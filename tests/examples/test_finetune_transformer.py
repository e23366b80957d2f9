"""LoRA on a transformer learns, and what is merged is what was trained; where the packages are installed."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_what_was_trained_is_merged(run_example):
    for package in ("peft", "transformers"):
        pytest.importorskip(package, exc_type=ImportError)
    result = run_example("finetune_transformer", EPOCHS=5)
    losses, shares = zip(*result["history"], strict=True)
    assert losses[-1] < 0.9 * losses[0] and shares[-1] > result["chance"] + 0.1
    assert result["error"] < 1e-4 and result["difference"] < 1e-4
