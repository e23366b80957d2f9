"""The blocks of the Hessian are torch's, and the evidence finds the weight decay."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_the_evidence_finds_the_decay(run_example, capsys):
    result = run_example("laplace_digits")
    assert result["best"] == min(result["scores"], key=result["scores"].get)
    assert "all 16 blocks are those of torch.func.hessian" in capsys.readouterr().out


def test_fewer_digits(run_example, capsys):
    result = run_example("laplace_digits", TRAIN=80, DECAYS=(0.3, 3.0))
    assert result["best"] in (0.3, 3.0)
    out = capsys.readouterr().out
    assert "all 16 blocks" in out and "what the closed form says" in out
