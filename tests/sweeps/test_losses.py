"""Losses against torch.nn.functional where numbers are not ordinary: NaN, infinite, none at all, ignored, or half."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import luxtorch as lt
from luxtorch import losses as L

from .harness import Result, check_same, outcome, report

pytestmark = pytest.mark.slow

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
VALUES = {
    "ordinary": None,
    "nan": float("nan"),
    "inf": float("inf"),
    "minus inf": float("-inf"),
    "huge": 1e4,
    "zero": 0.0,
    "one": 1.0,
}


def dense(shape, dtype, key):
    """Predictions and targets of one shape."""
    return lt.random.normal(key, shape).to(dtype), lt.random.normal(lt.random.fold_in(key, 1), shape).to(dtype)


def probable(shape, dtype, key):
    """Predictions and targets from 0 to 1."""
    y_hat, y = dense(shape, torch.float32, key)
    return y_hat.sigmoid().to(dtype), y.sigmoid().to(dtype)


def rates(shape, dtype, key):
    y_hat, y = dense(shape, dtype, key)
    return y_hat, y.abs()


def positive_rates(shape, dtype, key):
    y_hat, y = dense(shape, dtype, key)
    return y_hat.abs() + 0.1, y.abs()


def indices(shape, dtype, key):
    """Predictions for classes, and class indices."""
    y_hat, _ = dense(shape, dtype, key)
    return y_hat, lt.random.randint(lt.random.fold_in(key, 1), shape[:1] + shape[2:], 0, shape[1])


def distributions(shape, dtype, key):
    y_hat, y = dense(shape, dtype, key)
    return y_hat, y.softmax(1)


def signs(shape, dtype, key):
    y_hat, y = dense(shape, dtype, key)
    return y_hat, torch.where(y > 0, 1, -1).to(dtype)


def bce(y_hat, y, reduction):
    return F.binary_cross_entropy_with_logits(y_hat, y, reduction=reduction)


def weighted(y_hat, y, reduction):
    weight = torch.tensor((0.5, 2.0, 0.0), dtype=y_hat.dtype)
    return F.cross_entropy(y_hat, y, weight, reduction=reduction, label_smoothing=0.2, ignore_index=1)


def kl(y_hat, y, reduction):
    losses = F.kl_div(y_hat.log_softmax(1), y, reduction="none").sum(1)
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses


def pairs(shape, dtype, key):
    """Two predictions, and a label of -1 or 1."""
    y_hat, y = signs(shape, dtype, key)
    return torch.stack([y_hat, y_hat.flip(0) + 0.1]), y


def normals(shape, dtype, key):
    """Means and variances, and numbers."""
    y_hat, y = dense(shape, dtype, key)
    return torch.stack([y_hat, y_hat.flip(0).exp()]), y


def normal_nll(y_hat, y, reduction):
    return F.gaussian_nll_loss(y_hat[0], y, y_hat[1], reduction=reduction, full=True)


def ranking(y_hat, y, reduction):
    return F.margin_ranking_loss(y_hat[0], y_hat[1], y, 0.3, reduction=reduction)


class Pair(L.Loss):
    """Take the loss of a pair that lies in one tensor."""

    loss: L.Loss

    def checked(self, y_hat, y):
        return y_hat, y

    def each(self, y_hat, y):
        return dataclasses.replace(self.loss, agg="none")((y_hat[0], y_hat[1]), y)


CASES = {
    "MAELoss": (L.MAELoss, {}, F.l1_loss, dense),
    "MSELoss": (L.MSELoss, {}, F.mse_loss, dense),
    "HuberLoss": (L.HuberLoss, {}, F.huber_loss, dense),
    "HuberLoss delta": (L.HuberLoss, {"delta": 0.3}, lambda a, b, reduction: F.huber_loss(a, b, reduction, 0.3), dense),
    "SmoothL1Loss": (L.SmoothL1Loss, {}, F.smooth_l1_loss, dense),
    "SmoothL1Loss beta": (
        L.SmoothL1Loss,
        {"beta": 0.0},
        lambda a, b, reduction: F.smooth_l1_loss(a, b, reduction=reduction, beta=0.0),
        dense,
    ),
    "PoissonLoss": (L.PoissonLoss, {}, F.poisson_nll_loss, rates),
    "PoissonLoss rates": (
        L.PoissonLoss,
        {"log_input": False},
        lambda a, b, reduction: F.poisson_nll_loss(
            a, b, log_input=False, reduction=reduction, eps=torch.finfo(a.dtype).eps
        ),
        positive_rates,
    ),
    "BinaryCrossEntropyLoss": (
        L.BinaryCrossEntropyLoss,
        {},
        bce,
        lambda *args: (dense(*args)[0], probable(*args)[1]),
    ),
    "CrossEntropyLoss": (L.CrossEntropyLoss, {}, F.cross_entropy, indices),
    "CrossEntropyLoss probabilities": (L.CrossEntropyLoss, {}, F.cross_entropy, distributions),
    "CrossEntropyLoss weighted": (
        L.CrossEntropyLoss,
        {"weight": (0.5, 2.0, 0.0), "label_smoothing": 0.2, "ignore_index": 1},
        weighted,
        indices,
    ),
    "CrossEntropyLoss ignored": (
        L.CrossEntropyLoss,
        {"ignore_index": 1},
        lambda a, b, reduction: F.cross_entropy(a, b, ignore_index=1, reduction=reduction),
        indices,
    ),
    "CrossEntropyLoss all ignored": (
        L.CrossEntropyLoss,
        {"ignore_index": 7},
        lambda a, b, reduction: F.cross_entropy(a, b, ignore_index=7, reduction=reduction),
        lambda *args: (indices(*args)[0], torch.full_like(indices(*args)[1], 7)),
    ),
    "NLLLoss": (L.NLLLoss, {}, F.nll_loss, indices),
    "NLLLoss ignored": (
        L.NLLLoss,
        {"ignore_index": 1},
        lambda a, b, reduction: F.nll_loss(a, b, ignore_index=1, reduction=reduction),
        indices,
    ),
    "KLDivergenceLoss": (L.KLDivergenceLoss, {}, kl, distributions),
    # Not here, as torch's are worse: its margins over classes drop NaN, its SoftMarginLoss overflows, and its
    # KLDivLoss(log_target=True) makes NaN of what is impossible.
    "GaussianNLLLoss": (Pair, {"loss": L.GaussianNLLLoss(full=True)}, normal_nll, normals),
    "HingeEmbeddingLoss": (L.HingeEmbeddingLoss, {}, F.hinge_embedding_loss, signs),
    "MarginRankingLoss": (Pair, {"loss": L.MarginRankingLoss(margin=0.3)}, ranking, pairs),
    "MultiLabelSoftMarginLoss": (
        L.MultiLabelSoftMarginLoss,
        {},
        F.multilabel_soft_margin_loss,
        lambda *args: (dense(*args)[0], probable(*args)[1]),
    ),
    "PoissonLoss full": (
        L.PoissonLoss,
        {"full": True},
        lambda a, b, reduction: F.poisson_nll_loss(a, b, full=True, reduction=reduction),
        lambda *args: (rates(*args)[0], 3 * rates(*args)[1]),
    ),
}


def spoilt(tensor: Tensor, value: float | None, place: int) -> Tensor:
    if value is None or not tensor.numel() or not tensor.is_floating_point():
        return tensor
    tensor = tensor.clone()
    tensor.view(-1)[place % tensor.numel()] = value
    return tensor


def value_and_gradient(loss, y_hat, y):
    leaf = y_hat.clone().requires_grad_()
    value = loss(leaf, y)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def forms(how: str) -> Iterator[tuple[Any, ...]]:
    for dtype, agg, shape, (kind, value), where in itertools.product(
        DTYPES, ("mean", "sum", "none"), ((4, 3), (0, 3), (2, 3, 2)), VALUES.items(), ("y_hat", "y", "both")
    ):
        if (dtype != torch.float64 or how != "eager") and (agg != "mean" or len(shape) == 3):
            continue
        if how != "eager" and (dtype in (torch.float32, torch.float16) or kind in ("zero", "one", "minus inf")):
            continue
        if 0 in shape and kind != "ordinary" or kind == "ordinary" and where != "both":
            continue
        if how == "recorded" and (dtype != torch.float64 or kind not in ("ordinary", "nan")):
            continue
        yield dtype, agg, shape, kind, value, where


def calls(case: str, how: str, key: Tensor) -> Iterator[Result]:
    make, options, reference, draw = CASES[case]
    for dtype, agg, shape, kind, value, where in forms(how):
        y_hat, y = draw(shape, dtype, key)
        y_hat = spoilt(y_hat, value, 1) if where != "y" else y_hat
        y = spoilt(y, value, 1) if where != "y_hat" else y
        loss = make(agg=agg, **options)
        wanted = value_and_gradient(lambda a, b, agg=agg: reference(a, b, reduction=agg), y_hat, y)

        def call(loss: Any = loss, y_hat: Tensor = y_hat, y: Tensor = y) -> Any:
            if how == "eager":
                return value_and_gradient(loss, y_hat, y)
            if how == "recorded":
                return value_and_gradient(lt.jit(loss, backend="replay"), y_hat, y)
            both = lt.jit(
                lambda y_hat: (loss(y_hat, y), lt.gradient(lambda p: loss(p, y).sum(), y_hat)), backend="replay"
            )
            return both(y_hat)

        # An operation more or less is rounded to the precision of the dtype.
        tolerance = 1e-10 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
        outcomes = outcome(
            call, lambda got, wanted=wanted, near=tolerance: check_same(got, wanted, near, strides=False)
        )
        yield Result(case, *outcomes, f"{dtype} {agg} {shape}, {kind} in {where}")


@pytest.mark.parametrize("how", ["eager", "jit", "recorded"])
def test_losses(how, make_key):
    key = make_key()
    report(f"losses, {how}", [result for case in CASES for result in calls(case, how, key)], {})
