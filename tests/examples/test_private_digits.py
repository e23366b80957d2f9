"""Digits are learnt in private, the less so the more noise there is, and an accountant says how private it was."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest


def check(result, out):
    epsilons = [result["epsilons"][noise] for noise in sorted(result["NOISES"])]
    if find_spec("dp_accounting") is None:
        assert set(epsilons) == {None} and "pip install dp-accounting" in out
    else:
        assert epsilons[0] == math.inf and epsilons == sorted(epsilons, reverse=True) and "pip install" not in out


@pytest.mark.slow
def test_privacy_costs_accuracy(run_example, capsys):
    result = run_example("private_digits")
    final = [result["curves"][noise][-1] for noise in result["NOISES"]]
    assert final[0] > 0.95 and final[1] > 0.88 and final[-1] < final[0] - 0.05
    check(result, capsys.readouterr().out)
    if find_spec("dp_accounting"):  # the PRV accountant of opacus 1.6 says nearly the same
        assert list(result["epsilons"].values())[1:] == pytest.approx([7.376, 2.457, 1.029], rel=0.02)


def test_fewer_steps(run_example, capsys):
    result = run_example("private_digits", NOISES=(0.0, 4.0), STEPS=60)
    check(result, capsys.readouterr().out)
