"""Losses against torch.nn.functional: the same values and the same gradients, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import luxtorch as lt
from luxtorch import losses as L

AGGREGATIONS = ("mean", "sum", "none")


def drawn(key, *shape):
    return lt.random.normal(key, shape, dtype=torch.float64)


def same(ours, reference, *predictions):
    """Compare two functions of tensors, and the gradients of their sums."""
    values, gradients = [], []
    for function in (ours, reference):
        leaves = [p.clone().requires_grad_() for p in predictions]
        values.append(function(*leaves))
        gradients.append(torch.autograd.grad(values[-1].sum(), leaves))
    torch.testing.assert_close(*values, equal_nan=True)
    torch.testing.assert_close(*gradients, equal_nan=True)


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize(
    ("loss", "reference", "options"),
    [
        (L.MAELoss, F.l1_loss, {}),
        (L.MSELoss, F.mse_loss, {}),
        (L.HuberLoss, F.huber_loss, {}),
        (L.HuberLoss, F.huber_loss, {"delta": 0.3}),
        (L.SmoothL1Loss, F.smooth_l1_loss, {}),
        (L.SmoothL1Loss, F.smooth_l1_loss, {"beta": 0.3}),
        (L.SmoothL1Loss, F.smooth_l1_loss, {"beta": 0.0}),
        (L.PoissonLoss, F.poisson_nll_loss, {"log_input": True}),
        (L.PoissonLoss, F.poisson_nll_loss, {"log_input": True, "full": True}),
    ],
)
@pytest.mark.parametrize("shape", [(), (2, 3, 2)])
def test_regression(make_key, loss, reference, options, agg, shape):
    y = 2 * drawn(make_key(), *shape)
    same(
        lambda y_hat: loss(agg=agg, **options)(y_hat, y),
        lambda y_hat: reference(y_hat, y, reduction=agg, **options),
        drawn(make_key(), *shape),
    )


@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_rates_and_probabilities(make_key, agg):
    y, p = drawn(make_key(), 4, 3).sigmoid(), drawn(make_key(), 4, 3).sigmoid()
    same(
        lambda p: L.PoissonLoss(agg=agg, log_input=False, epsilon=1e-8)(p, y),
        lambda p: F.poisson_nll_loss(p, y, log_input=False, reduction=agg),
        p,
    )
    counts = torch.arange(12.0, dtype=p.dtype).reshape(4, 3)
    same(
        lambda p: L.PoissonLoss(agg=agg, log_input=False, epsilon=1e-8, full=True)(p, counts),
        lambda p: F.poisson_nll_loss(p, counts, log_input=False, full=True, reduction=agg),
        p,
    )
    same(
        lambda p: L.BinaryCrossEntropyLoss(agg=agg, logits=False, epsilon=0.0)(p, y),
        lambda p: F.binary_cross_entropy(p, y, reduction=agg),
        p,
    )
    same(
        lambda p: L.BinaryCrossEntropyLoss(agg=agg)(p, y),
        lambda p: F.binary_cross_entropy_with_logits(p, y, reduction=agg),
        p,
    )
    same(
        lambda p: L.BinaryCrossEntropyLoss(agg=agg, label_smoothing=0.2)(p, y),
        lambda p: F.binary_cross_entropy_with_logits(p, 0.8 * y + 0.1, reduction=agg),
        p,
    )


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3), (0, 3)])
@pytest.mark.parametrize("weight", [None, 0.5, (0.5, 2.0, 0.0), (2.0,)])
@pytest.mark.parametrize("pos_weight", [None, 3, (3.0, 0.1, 1.0)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_weights_of_binary_cross_entropy(make_key, agg, dtype, shape, weight, pos_weight, label_smoothing):
    y, y_hat = drawn(make_key(), *shape).sigmoid().to(dtype), drawn(make_key(), *shape).to(dtype)
    w, pos = (None if value is None else torch.tensor(value, dtype=dtype) for value in (weight, pos_weight))
    options = {"agg": agg, "weight": weight, "label_smoothing": label_smoothing}
    loss = L.BinaryCrossEntropyLoss(pos_weight=pos_weight, **options)
    smooth = (1 - label_smoothing) * y + label_smoothing / 2

    def reference(y_hat):
        return F.binary_cross_entropy_with_logits(y_hat, smooth, w, reduction=agg, pos_weight=pos)

    same(lambda y_hat: loss(y_hat, y), reference, y_hat)
    of_probabilities = L.BinaryCrossEntropyLoss(logits=False, epsilon=0.0, pos_weight=pos_weight, **options)
    same(lambda y_hat: of_probabilities(y_hat.sigmoid(), y), reference, y_hat)
    if pos_weight is None:
        p = y_hat.sigmoid()
        same(
            lambda p: of_probabilities(p, y),
            lambda p: F.binary_cross_entropy(p, smooth, w, reduction=agg),
            p,
        )


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(6, 3), (3,), (2, 3, 2, 2)])
@pytest.mark.parametrize("weight", [None, (0.5, 2.0, 1.0)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("targets", ["indices", "ignored", "probabilities"])
def test_cross_entropy(make_key, agg, shape, weight, label_smoothing, targets):
    place = min(1, len(shape) - 1)
    if targets == "probabilities":
        y = drawn(make_key(), *shape).softmax(place)
    else:
        y = lt.random.randint(make_key(), shape[:place] + shape[place + 1 :], 0, 3)
    ignore_index = int(y.flatten()[0]) if targets == "ignored" and len(shape) > 1 else -100
    loss = L.CrossEntropyLoss(agg=agg, weight=weight, label_smoothing=label_smoothing, ignore_index=ignore_index)
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    options = {"ignore_index": ignore_index} if targets != "probabilities" else {}

    def reference(y_hat):
        return F.cross_entropy(y_hat, y, w, label_smoothing=label_smoothing, reduction=agg, **options)

    y_hat = drawn(make_key(), *shape)
    same(lambda y_hat: loss(y_hat, y), reference, y_hat)
    last = L.CrossEntropyLoss(
        agg=agg, weight=weight, label_smoothing=label_smoothing, ignore_index=ignore_index, dim=-1
    )
    moved = y.movedim(place, -1) if targets == "probabilities" else y
    value, expected = last(y_hat.movedim(place, -1), moved), reference(y_hat)
    torch.testing.assert_close(value, expected)
    p = L.CrossEntropyLoss(
        agg=agg,
        weight=weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        logits=False,
        epsilon=0.0,
    )
    torch.testing.assert_close(p(y_hat.softmax(place), y), expected)


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("weight", [None, (0.5, 2.0, 1.0)])
@pytest.mark.parametrize("shape", [(6, 3), (3,), (4, 3, 2)])
def test_negative_log_likelihood(make_key, agg, weight, shape):
    y = lt.random.randint(make_key(), shape[:1] + shape[2:] if len(shape) > 1 else (), 0, 3)
    w = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    same(
        lambda y_hat: L.NLLLoss(agg=agg, weight=weight, ignore_index=2)(y_hat, y),
        lambda y_hat: F.nll_loss(y_hat, y, w, ignore_index=2, reduction=agg),
        drawn(make_key(), *shape).log_softmax(min(1, len(shape) - 1)),
    )


def test_kl_divergence(make_key):
    y = drawn(make_key(), 5, 3).softmax(1)
    y_hat = drawn(make_key(), 5, 3)
    for agg, reduction in (("mean", "batchmean"), ("sum", "sum")):
        same(
            lambda y_hat, agg=agg: L.KLDivergenceLoss(agg=agg)(y_hat, y),
            lambda y_hat, reduction=reduction: F.kl_div(y_hat.log_softmax(1), y, reduction=reduction),
            y_hat,
        )
    log_p = y_hat.log_softmax(1)
    for agg, reduction in (("mean", "batchmean"), ("sum", "sum")):
        same(
            lambda y_hat, log_y, agg=agg: L.KLDivergenceLoss(agg=agg, log_target=True)(y_hat, log_y),
            lambda y_hat, log_y, reduction=reduction: F.kl_div(
                y_hat.log_softmax(1), log_y, reduction=reduction, log_target=True
            ),
            y_hat,
            y.log(),
        )
    smooth = L.KLDivergenceLoss(label_smoothing=0.2, log_target=True)(y_hat, y.log())
    torch.testing.assert_close(smooth, L.KLDivergenceLoss(label_smoothing=0.2)(y_hat, y))
    expected = F.kl_div(log_p, y, reduction="none").sum(1)
    torch.testing.assert_close(L.KLDivergenceLoss(agg="none")(log_p, y), expected)
    torch.testing.assert_close(L.KLDivergenceLoss(agg="none", logits=False, epsilon=0.0)(log_p.exp(), y), expected)
    torch.testing.assert_close(L.KLDivergenceLoss(agg="none", dim=0)(log_p.T, y.T), expected)
    smooth = L.KLDivergenceLoss(label_smoothing=0.2)(y_hat, y)
    torch.testing.assert_close(smooth, L.KLDivergenceLoss()(y_hat, 0.8 * y + 0.2 / 3))


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("batch", [(4,), ()])
def test_embeddings(make_key, agg, batch):
    x = [drawn(make_key(), *batch, 3) for _ in range(3)]
    y = 2 * lt.random.randint(make_key(), batch, 0, 2) - 1
    for margin in (0.0, 0.4):
        same(
            lambda x1, x2, margin=margin: L.CosineEmbeddingLoss(agg=agg, margin=margin)((x1, x2), y),
            lambda x1, x2, margin=margin: F.cosine_embedding_loss(x1, x2, y, margin, reduction=agg),
            *x[:2],
        )
    for options in ({}, {"margin": 2.0, "p": 1.0}, {"swap": True, "eps": 1e-3}):
        same(
            lambda *x, options=options: L.TripletMarginLoss(agg=agg, **options)(x, None),
            lambda *x, options=options: F.triplet_margin_loss(*x, reduction=agg, **options),
            *x,
        )

    def far(a, b):
        return (a - b).abs().amax(-1)

    for options in ({}, {"margin": 2.0}, {"swap": True}):
        same(
            lambda *x, options=options: L.TripletMarginLoss(agg=agg, distance=far, **options)(x, None),
            lambda *x, options=options: F.triplet_margin_with_distance_loss(
                *x, distance_function=far, reduction=agg, **options
            ),
            *x,
        )


def test_distances_of_images(make_key):
    x = [drawn(make_key(), 4, 2, 3) for _ in range(3)]

    def by_row(a, b):
        return (a - b).square().sum(-1)

    same(
        lambda *x: L.TripletMarginLoss(distance=by_row)(x, None),
        lambda *x: F.triplet_margin_with_distance_loss(*x, distance_function=by_row),
        *x,
    )


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(4, 3), (3,), (), (2, 3, 2), (0, 3)])
def test_signs_as_labels(make_key, agg, shape):
    x, z = drawn(make_key(), *shape), drawn(make_key(), *shape)
    y = torch.where(drawn(make_key(), *shape) > 0, 1.0, -1.0).double()
    same(lambda x: L.SoftMarginLoss(agg=agg)(x, y), lambda x: F.soft_margin_loss(x, y, reduction=agg), x)
    for margin in (-0.5, 0.0, 0.4):
        same(
            lambda x, z, margin=margin: L.MarginRankingLoss(agg=agg, margin=margin)((x, z), y),
            lambda x, z, margin=margin: F.margin_ranking_loss(x, z, y, margin, reduction=agg),
            x,
            z,
        )
    # With other labels too, both parts count.
    for label in (y, 0 * y, y.round().long()):
        for margin in (0.4, 1.0):
            same(
                lambda x, y=label, m=margin: L.HingeEmbeddingLoss(agg=agg, margin=m)(x, y),
                lambda x, y=label, m=margin: F.hinge_embedding_loss(x, y, m, reduction=agg),
                x,
            )


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize(
    ("shape", "variances"),
    [
        ((4, 3), (4, 3)),
        ((4, 3), (4, 1)),
        ((4, 3), (4,)),
        ((3,), ()),
        ((), ()),
        ((2, 3, 2), (2, 1, 2)),
        ((0, 3), (0, 3)),
    ],
)
def test_normal_likelihood(make_key, agg, full, eps, shape, variances):
    mean, y, variance = drawn(make_key(), *shape), drawn(make_key(), *shape), drawn(make_key(), *variances).exp()
    variance = variance.where(drawn(make_key(), *variances) > -1, 0)  # of which some are clamped
    loss = L.GaussianNLLLoss(agg=agg, full=full, eps=eps)
    same(
        lambda mean, variance: loss((mean, variance), y),
        lambda mean, variance: F.gaussian_nll_loss(mean, y, variance, full, eps, reduction=agg),
        mean,
        variance,
    )


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("weight", [None, (0.5, 2.0, 0.0)])
@pytest.mark.parametrize("shape", [(4, 3), (3,)])  # of no samples, torch returns memory that nobody has written to
def test_margins_over_classes(make_key, agg, weight, shape):
    x, w = drawn(make_key(), *shape), None if weight is None else torch.tensor(weight, dtype=torch.float64)
    index = lt.random.randint(make_key(), shape[:-1], 0, 3)
    for p, margin in ((1, 1.0), (1, 0.2), (2, 1.0), (2, 0.2)):
        same(
            lambda x, p=p, m=margin: L.MultiMarginLoss(agg=agg, p=p, margin=m, weight=weight)(x, index),
            lambda x, p=p, m=margin: F.multi_margin_loss(x, index, p, m, w, reduction=agg),
            x,
        )
    y = lt.random.uniform(make_key(), shape, dtype=x.dtype)
    same(
        lambda x: L.MultiLabelSoftMarginLoss(agg=agg, weight=weight)(x, y),
        lambda x: F.multilabel_soft_margin_loss(x, y, w, reduction=agg),
        x,
    )
    if weight is None:
        labels = lt.random.randint(make_key(), shape, -1, 3)
        same(
            lambda x: L.MultiLabelMarginLoss(agg=agg)(x, labels),
            lambda x: F.multilabel_margin_loss(x, labels, reduction=agg),
            x,
        )


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("weight", [(4, 1), (1, 3), (4, 3), (3, 1, 1), (2, 4, 3), (2, 1, 3)])
@pytest.mark.parametrize("logits", [True, False])
def test_weights_that_broadcast(make_key, agg, weight, logits):
    shape = (2, 4, 3) if weight != (3, 1, 1) else (2, 3, 2, 2)
    y_hat, y = drawn(make_key(), *shape), drawn(make_key(), *shape).sigmoid()
    w, pos = drawn(make_key(), *weight).abs(), drawn(make_key(), *weight).abs()
    loss = L.BinaryCrossEntropyLoss(agg=agg, weight=w, pos_weight=pos, logits=logits, epsilon=0.0)
    assert loss == L.BinaryCrossEntropyLoss(
        agg=agg, weight=w.tolist(), pos_weight=pos.tolist(), logits=logits, epsilon=0.0
    )
    assert hash(loss) == hash(L.BinaryCrossEntropyLoss(**vars(loss)))
    same(
        lambda y_hat: loss(y_hat if logits else y_hat.sigmoid(), y),
        lambda y_hat: F.binary_cross_entropy_with_logits(y_hat, y, w, pos_weight=pos, reduction=agg),
        y_hat,
    )
    same(
        lambda y_hat: L.MultiLabelSoftMarginLoss(agg=agg, weight=w)(y_hat, y),
        lambda y_hat: F.multilabel_soft_margin_loss(y_hat, y, w, reduction=agg),
        y_hat,
    )


def test_kinks_are_those_of_torch():
    """Where a loss has no derivative, it has torch's."""
    one, zero, y = torch.ones(2).double(), torch.zeros(2).double(), torch.tensor([1.0, -1.0]).double()
    same(lambda x, z: L.MarginRankingLoss()((x, z), y), lambda x, z: F.margin_ranking_loss(x, z, y), one, one)
    same(lambda x: L.HingeEmbeddingLoss()(x, y), lambda x: F.hinge_embedding_loss(x, y), one)
    x, index, labels = torch.eye(2).double(), torch.tensor([0, 1]), torch.tensor([[0, -1], [1, -1]])
    for p in (1, 2):
        same(lambda x, p=p: L.MultiMarginLoss(p=p)(x, index), lambda x, p=p: F.multi_margin_loss(x, index, p), x)
    same(lambda x: L.MultiLabelMarginLoss()(x, labels), lambda x: F.multilabel_margin_loss(x, labels), x)
    for options in ({"eps": 0.0, "p": 1.0}, {"eps": 0.0, "p": 1.0, "swap": True}):
        same(
            lambda *x, options=options: L.TripletMarginLoss(**options)(x, None),
            lambda *x, options=options: F.triplet_margin_loss(*x, **options),
            *(zero, zero, torch.tensor([1.0, 0.0]).double()),
        )
    same(
        lambda m, v: L.GaussianNLLLoss(eps=1.0)((m, v), y),
        lambda m, v: F.gaussian_nll_loss(m, y, v, eps=1.0),
        zero,
        one,
    )
    counts = torch.tensor([0.0, 1.0, 2.0]).double()
    same(
        lambda x: L.PoissonLoss(full=True)(x, counts),
        lambda x: F.poisson_nll_loss(x, counts, full=True),
        torch.zeros(3).double(),
    )


LABELS = torch.tensor([[1, 1, 2], [3, 1, -1], [2, 0, 0], [0, 0, 0], [1, 1, 1]])
INPUT_LENGTHS, TARGET_LENGTHS = torch.tensor([6, 5, 4, 6, 3]), torch.tensor([3, 2, 1, 0, 3])


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("path", ["kernel", "math"])
@pytest.mark.parametrize("blank", [0, 3])
def test_ctc(make_key, agg, path, blank):
    labels = torch.where(blank == LABELS, 0 if blank else 1, LABELS)
    y = labels, INPUT_LENGTHS, TARGET_LENGTHS
    loss = L.CTCLoss(agg=agg, blank=blank, zero_infinity=True)
    reference_labels = labels.clamp_min(0)

    def ours(z):
        log_p = z.log_softmax(2)
        return loss(log_p, y) if path == "kernel" else torch.vmap(lambda log_p: loss(log_p, y))(log_p[None])[0]

    def reference(z):
        return F.ctc_loss(z.log_softmax(2), reference_labels, *y[1:], blank=blank, reduction=agg, zero_infinity=True)

    same(ours, reference, drawn(make_key(), 6, 5, 4))
    endless = torch.vmap(lambda log_p: L.CTCLoss(agg="none")(log_p, y))(torch.zeros(1, 6, 5, 4))[0]
    assert endless.isinf().tolist() == [False, False, False, False, True]


def test_ctc_without_steps_or_labels():
    log_p = torch.zeros(0, 2, 3)
    y = torch.tensor([[1], [1]]), torch.tensor([0, 0]), torch.tensor([0, 1])
    assert torch.vmap(lambda p: L.CTCLoss(agg="none")(p, y))(log_p[None])[0].tolist() == [0, torch.inf]
    y = torch.zeros(2, 0, dtype=torch.int64), torch.tensor([3, 3]), torch.tensor([0, 0])
    log_p = torch.full((3, 2, 4), 0.25).log()
    math = torch.vmap(lambda p: L.CTCLoss(agg="none")(p, y))(log_p[None])[0]
    torch.testing.assert_close(math, torch.full((2,), 3 * torch.tensor(4.0).log().item()))
