"""Losses against closed forms, at their extremes, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

import luxtorch as lt
from luxtorch import losses as L
from luxtorch.jit import jit


def drawn(key, *shape):
    return lt.random.normal(key, shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(4, 3), (5,), ()])
def test_closed_forms(make_key, shape):
    x, z = drawn(make_key(), *shape), drawn(make_key(), *shape)
    label, sign, close = (z > 0).double(), z.sign(), torch.testing.assert_close
    close(L.HingeLoss()(x, sign), torch.where(sign * x < 1, 1 - sign * x, 0).mean())
    close(L.SquaredHingeLoss()(x, sign), torch.where(sign * x < 1, 1 - sign * x, 0).pow(2).mean())
    near, far = x.square(), torch.where(x < 0.5, 0.5 - x, 0).square()
    close(L.SiameseContrastiveLoss(margin=0.5, agg="sum")(x, label), torch.where(label == 1, far, near).sum())
    close(L.MSLELoss(epsilon=0.1)(x.exp(), z.exp()), ((x.exp() + 0.1) / (z.exp() + 0.1)).log().square().mean())
    p = x.sigmoid()
    right = torch.where(label == 1, p, 1 - p)
    for gamma in (0.0, 0.5, 2.0):
        focal = (-((1 - right) ** gamma) * right.log()).mean()
        close(L.BinaryFocalLoss(gamma=gamma)(x, label), focal)
        close(L.BinaryFocalLoss(gamma=gamma, logits=False)(p, label), focal)
    close(L.GenericLossFunction(torch.mul, agg=torch.amax)(x, z), (x * z).amax())


@pytest.mark.parametrize("shape", [(4, 3), (5,), ()])
def test_closed_forms_of_margins_and_likelihoods(make_key, shape):
    x, z, close = drawn(make_key(), *shape), drawn(make_key(), *shape), torch.testing.assert_close
    sign = z.sign()
    close(L.SoftMarginLoss()(x, sign), (1 + (-sign * x).exp()).log().mean())
    close(
        L.MarginRankingLoss(margin=0.3)((x, z), sign), torch.where(sign * (x - z) < 0.3, 0.3 - sign * (x - z), 0).mean()
    )
    close(L.HingeEmbeddingLoss(margin=0.3)(x, sign), torch.where(sign == 1, x, torch.where(x < 0.3, 0.3 - x, 0)).mean())
    normal = torch.distributions.Normal(x, x.exp().sqrt())
    close(L.GaussianNLLLoss(full=True, agg="sum")((x, x.exp()), z), -normal.log_prob(z).sum())
    counts = (10 * z.abs()).round() + 2
    close(
        L.PoissonLoss(full=True)(x, counts),
        -torch.distributions.Poisson(x.exp()).log_prob(counts).mean(),
        atol=0.05,
        rtol=0,
    )


@pytest.mark.parametrize("margin", [0.3, 1.0])
@pytest.mark.parametrize("p", [1, 2])
def test_margins_over_classes_are_loops(make_key, margin, p):
    x, y = drawn(make_key(), 5, 4), torch.tensor([0, 3, 2, 1, 0])
    lists = torch.tensor([[0, 2, -1], [3, 3, 1], [-1, 0, 0], [1, -1, 2], [0, 1, 2]])
    one, some = [], []
    for row, target, targets in zip(x.tolist(), y.tolist(), lists.tolist(), strict=True):
        one.append(sum(max(0, margin - row[target] + row[i]) ** p for i in range(4) if i != target) / 4)
        right = targets[: targets.index(-1)] if -1 in targets else targets
        some.append(sum(max(0, 1 - row[j] + row[i]) for j in right for i in range(4) if i not in right) / 4)
    one, some = torch.tensor(one, dtype=x.dtype), torch.tensor(some, dtype=x.dtype)
    torch.testing.assert_close(L.MultiMarginLoss(agg="none", margin=margin, p=p)(x, y), one)
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=x.dtype)
    torch.testing.assert_close(L.MultiMarginLoss(margin=margin, p=p, weight=weight)(x, y), (one * weight[y]).mean())
    torch.testing.assert_close(L.MultiLabelMarginLoss(agg="none")(x, lists), some)
    padded = torch.cat([lists, torch.full((5, 1), -1)], 1)
    torch.testing.assert_close(L.MultiLabelMarginLoss()(x, padded), some.mean())


def test_a_small_variance_has_the_derivatives_of_the_smallest(make_key):
    mean, y, variance = drawn(make_key(), 3), drawn(make_key(), 3), torch.tensor([0.1, 0.0, 2.0]).double()

    def ours(variance):
        return L.GaussianNLLLoss(agg="sum", eps=0.5)((mean, variance), y)

    def formula(variance):
        return (variance.log() / 2 + (mean - y) ** 2 / (2 * variance)).sum()

    at = variance.clamp_min(0.5)
    forward, reverse, jvp = torch.func.jacfwd, torch.func.jacrev, torch.func.jvp
    torch.testing.assert_close(ours(variance), formula(at))
    for derivative in (
        forward,
        reverse,
        torch.func.hessian,
        lambda f: forward(forward(f)),
        lambda f: reverse(reverse(f)),
    ):
        torch.testing.assert_close(derivative(ours)(variance), derivative(formula)(at))
    tangent = drawn(make_key(), 3)
    torch.testing.assert_close(jvp(ours, (variance,), (tangent,))[1], jvp(formula, (at,), (tangent,))[1])


def test_a_negative_variance_is_seen_or_gives_nan():
    mean, variance, y = torch.zeros(3), torch.tensor([-1.0, 0.0, 1.0]), torch.ones(3)

    def run(variance):
        return L.GaussianNLLLoss(agg="none")((mean, variance), y)

    with pytest.raises(lt.InputError, match="negative"):
        run(variance)
    assert torch.vmap(run)(variance[None])[0].isnan().tolist() == [True, False, False]
    assert jit(run, backend="replay")(variance).isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_over_classes(make_key, gamma):
    x, y = drawn(make_key(), 5, 3), torch.tensor([0, 1, 2, 1, 0])
    p = x.softmax(1)
    right = p[torch.arange(5), y]
    expected = -((1 - right) ** gamma) * right.log()
    for loss, prediction in ((L.FocalLoss, x), (lambda **o: L.FocalLoss(logits=False, **o), p)):
        torch.testing.assert_close(loss(gamma=gamma, agg="none")(prediction, y), expected)
        one_hot = torch.nn.functional.one_hot(y, 3)
        torch.testing.assert_close(loss(gamma=gamma)(prediction, one_hot), expected.mean())
    weighted = L.FocalLoss(gamma=gamma, weight=(1.0, 2.0, 3.0), ignore_index=0)(x, y)
    weight = torch.tensor([0.0, 2.0, 3.0, 2.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(weighted, (weight * expected).sum() / weight.sum())


def test_dice_of_samples(make_key):
    p, y = drawn(make_key(), 3, 2, 4).sigmoid(), drawn(make_key(), 3, 2, 4) > 0
    expected = [1 - (2 * (p[i] * y[i]).sum() + 0.5) / ((p[i] ** 2).sum() + y[i].sum() + 0.5) for i in range(3)]
    torch.testing.assert_close(L.DiceCoeffLoss(smooth=0.5, agg="none")(p, y), torch.stack(expected))
    assert L.DiceCoeffLoss()(torch.zeros(2, 3), torch.zeros(2, 3)) == 0


EXTREMES = [-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30]


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_numbers(gamma, dtype):
    logits = torch.tensor(EXTREMES, dtype=dtype)
    for label in (0.0, 0.5, 1.0):
        y = torch.full_like(logits, label)
        for loss in (
            L.BinaryCrossEntropyLoss(agg="none"),
            L.BinaryFocalLoss(agg="none", gamma=gamma),
            L.SoftMarginLoss(agg="none"),
            L.MultiLabelSoftMarginLoss(agg="none"),
        ):
            assert loss(logits, y).isfinite().all()
            assert torch.func.grad(lambda x, loss=loss, y=y: loss(x, y).sum())(logits).isfinite().all()
            assert torch.func.hessian(lambda x, loss=loss, y=y: loss(x, y).sum())(logits).isfinite().all()
    rows = torch.stack([logits, torch.zeros_like(logits)], 1)
    for loss in (L.CrossEntropyLoss(), L.FocalLoss(gamma=gamma), L.CrossEntropyLoss(label_smoothing=0.1)):
        for y in (torch.zeros(7, dtype=torch.int64), torch.eye(2, dtype=dtype)[:1].expand(7, 2)):
            run = torch.func.grad_and_value(lambda x, loss=loss, y=y: loss(x, y))
            assert all(part.isfinite().all() for part in run(rows))
            assert torch.func.hessian(lambda x, loss=loss, y=y: loss(x, y))(rows).isfinite().all()


def test_impossible_classes_and_certain_probabilities():
    masked = torch.tensor([[0.0, 1.0, -torch.inf]])
    one_hot, index = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0])
    expected = torch.tensor([1.0, math.e]).sum().log()
    for y in (one_hot, index):
        torch.testing.assert_close(L.CrossEntropyLoss()(masked, y), expected)
        assert torch.func.grad(lambda x, y=y: L.CrossEntropyLoss()(x, y))(masked).isfinite().all()
    torch.testing.assert_close(L.KLDivergenceLoss()(masked, one_hot), expected)
    assert L.KLDivergenceLoss()(masked, torch.ones(1, 3) / 3) == torch.inf
    assert L.CrossEntropyLoss()(masked, torch.tensor([2])) == torch.inf
    certain = one_hot.log()
    torch.testing.assert_close(L.KLDivergenceLoss(log_target=True)(masked, certain), expected)
    for argnums in (0, 1):
        gradient = torch.func.grad(L.KLDivergenceLoss(log_target=True), argnums)(masked, certain)
        assert gradient.isfinite().all()
    p, y = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    eps = torch.finfo(torch.float32).eps
    for loss in (L.BinaryCrossEntropyLoss(logits=False), L.CrossEntropyLoss(logits=False)):
        torch.testing.assert_close(loss(p, y), torch.tensor(-math.log(eps)))
    assert L.BinaryCrossEntropyLoss(logits=False)(p, p).abs() < 1e-6


def test_empty_batches():
    """The mean of nothing is NaN and the sum is 0, as in torch."""
    x, y = torch.zeros(0, 3), torch.zeros(0, 3)
    index = torch.zeros(0, dtype=torch.int64)
    same_shape = (L.HingeEmbeddingLoss, L.MultiLabelSoftMarginLoss, L.SoftMarginLoss)
    for kind in (L.MSELoss, L.BinaryCrossEntropyLoss, L.HingeLoss, L.DiceCoeffLoss, L.KLDivergenceLoss, *same_shape):
        assert kind()(x, y).isnan() and kind(agg="sum")(x, y) == 0
    for kind in (L.MarginRankingLoss, L.GaussianNLLLoss):
        assert kind()((x, x), y).isnan() and kind(agg="sum")((x, x), y) == 0
    assert L.MultiLabelMarginLoss()(x, y.long()).isnan() and L.MultiLabelMarginLoss(agg="sum")(x, y.long()) == 0
    for kind in (L.CrossEntropyLoss, L.NLLLoss, L.FocalLoss, L.MultiMarginLoss):
        assert kind()(x, index).isnan() and kind(agg="sum")(x, index) == 0 and kind(agg="none")(x, index).shape == (0,)
    all_ignored = L.CrossEntropyLoss(ignore_index=1)
    assert all_ignored(torch.zeros(2, 3), torch.tensor([1, 1])).isnan()


def test_labels_may_be_integers_or_booleans():
    x = torch.tensor([0.5, -1.0])
    for kind in (L.BinaryCrossEntropyLoss, L.MSELoss, L.HingeLoss, L.MAELoss):
        expected = kind()(x, torch.tensor([1.0, 0.0]))
        assert kind()(x, torch.tensor([1, 0])) == kind()(x, torch.tensor([True, False])) == expected
    small = torch.tensor([0, 1], dtype=torch.int32)
    assert L.CrossEntropyLoss()(torch.eye(2), small) == L.CrossEntropyLoss()(torch.eye(2), small.long())


@pytest.mark.parametrize("kind", [L.MSELoss, L.MAELoss, L.BinaryFocalLoss, L.HuberLoss, L.PoissonLoss, L.HingeLoss])
@pytest.mark.parametrize(("shape", "target"), [((4, 1), (4,)), ((4, 3), (3,)), ((2,), (2, 1)), ((3,), ())])
def test_a_loss_never_broadcasts(kind, shape, target):
    with pytest.raises(lt.InputError, match="never broadcasts") as caught:
        kind()(torch.zeros(shape), torch.zeros(target))
    assert str(tuple(shape)) in str(caught.value) and f"got:      targets of shape {target}" in str(caught.value)
    assert caught.value.where == f"{kind.__name__}()"


LOGITS = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: L.CrossEntropyLoss()(LOGITS, torch.tensor([0, 1, 3, 2])),
            lt.InputError,
            "from 0 to 2[\\s\\S]*Target 3",
        ),
        (lambda: L.FocalLoss()(LOGITS, torch.tensor([0, -1, 1, 2])), lt.InputError, "FocalLoss\\(\\): A class index"),
        (
            lambda: L.CrossEntropyLoss()(LOGITS, torch.zeros(4)),
            lt.DTypeError,
            "y must be class indices[\\s\\S]*float32",
        ),
        (lambda: L.CrossEntropyLoss()(LOGITS, torch.ones(4).bool()), lt.DTypeError, "y must be class indices"),
        (
            lambda: L.CrossEntropyLoss()(LOGITS, torch.ones(3).long()),
            lt.InputError,
            "\\(4,\\)[\\s\\S]*\\(4, 3\\)[\\s\\S]*\\(3,\\)",
        ),
        (lambda: L.CrossEntropyLoss()(LOGITS, torch.ones(4, 1)), lt.InputError, "\\(4, 3\\)[\\s\\S]*\\(4, 1\\)"),
        (
            lambda: L.CrossEntropyLoss(dim=2)(LOGITS, torch.ones(4, 1)),
            lt.InputError,
            "a dimension 2[\\s\\S]*\\(4, 3\\)",
        ),
        (lambda: L.CrossEntropyLoss(weight=(1, 2))(LOGITS, torch.ones(4).long()), lt.InputError, "3 weights"),
        (lambda: L.CrossEntropyLoss(weight="one"), lt.InputError, "one number for each class"),
        (lambda: L.BinaryCrossEntropyLoss(pos_weight="two"), lt.InputError, "numbers that broadcasts[\\s\\S]*two"),
        (
            lambda: L.BinaryCrossEntropyLoss(pos_weight=(1, 2))(LOGITS, LOGITS),
            lt.InputError,
            "pos_weight does not fit[\\s\\S]*last dimension[\\s\\S]*shape \\(2,\\) for predictions of shape \\(4, 3\\)",
        ),
        (
            lambda: L.BinaryCrossEntropyLoss(weight=(1.0,))(LOGITS[0, 0], LOGITS[0, 0]),
            lt.InputError,
            "The weight does not fit[\\s\\S]*shape \\(1,\\) for predictions of shape \\(\\)",
        ),
        (lambda: L.BinaryCrossEntropyLoss(weight=[[1, 2], [3]]), lt.InputError, "weight must be[\\s\\S]*broadcasts"),
        (lambda: L.MultiLabelSoftMarginLoss(weight=[]), lt.InputError, "weight must be[\\s\\S]*broadcasts"),
        (
            lambda: L.MultiLabelSoftMarginLoss(weight=torch.ones(3, 1, 1))(LOGITS, LOGITS),
            lt.InputError,
            "The weight does not fit[\\s\\S]*shape \\(3, 1, 1\\) for predictions of shape \\(4, 3\\)",
        ),
        (lambda: L.MultiLabelSoftMarginLoss()(LOGITS[0, 0], LOGITS[0, 0]), lt.InputError, "no classes"),
        (lambda: L.MultiMarginLoss(p=3), lt.InputError, "p must be 1 or 2"),
        (lambda: L.MultiMarginLoss(weight=(1, 2))(LOGITS, torch.ones(4).long()), lt.InputError, "3 weights"),
        (lambda: L.MultiMarginLoss()(LOGITS, torch.ones(4)), lt.DTypeError, "y must be class indices"),
        (lambda: L.MultiMarginLoss()(LOGITS, torch.ones(3).long()), lt.InputError, "never broadcasts"),
        (lambda: L.MultiMarginLoss()(LOGITS[None], torch.ones(1, 4).long()), lt.InputError, "scores of classes"),
        (
            lambda: L.MultiMarginLoss()(LOGITS, torch.tensor([0, 1, 3, 2])),
            lt.InputError,
            "from 0 to 2[\\s\\S]*from 0 to 3",
        ),
        (lambda: L.MultiMarginLoss()(LOGITS, torch.tensor([0, 1, -1, 2])), lt.InputError, "out of range"),
        (lambda: L.MultiLabelMarginLoss()(LOGITS, torch.tensor([[3]] * 4)), lt.InputError, "-1 for no more"),
        (lambda: L.MultiLabelMarginLoss()(LOGITS, torch.tensor([[-2]] * 4)), lt.InputError, "out of range"),
        (lambda: L.MultiLabelMarginLoss()(LOGITS, torch.tensor([1] * 4)), lt.InputError, "never broadcasts"),
        (lambda: L.MarginRankingLoss()(LOGITS, LOGITS), lt.InputError, "\\(x1, x2\\)[\\s\\S]*Tensor"),
        (lambda: L.MarginRankingLoss()((LOGITS, LOGITS[0]), LOGITS), lt.InputError, "do not fit each other"),
        (lambda: L.MarginRankingLoss()((LOGITS, 1.0), LOGITS), lt.DTypeError, "x2 must be a tensor"),
        (lambda: L.GaussianNLLLoss()(LOGITS, LOGITS), lt.InputError, "\\(mean, variance\\)[\\s\\S]*Tensor"),
        (lambda: L.GaussianNLLLoss(eps=0.0), lt.InputError, "eps must be a number above 0"),
        (
            lambda: L.GaussianNLLLoss()((LOGITS, LOGITS - 0.5), LOGITS),
            lt.InputError,
            "variance must not be negative[\\s\\S]*-0.5[\\s\\S]*log_variance",
        ),
        (
            lambda: L.GaussianNLLLoss()((LOGITS, torch.ones(3)), LOGITS),
            lt.InputError,
            "do not fit each other[\\s\\S]*mean of shape \\(4, 3\\), variance of shape \\(3,\\)",
        ),
        (lambda: L.TripletMarginLoss(distance=2.0), lt.InputError, "distance must be a function"),
        (
            lambda: L.TripletMarginLoss(distance=lambda a, b: (a - b).norm())((LOGITS,) * 3, None),
            lt.InputError,
            "distance for each of 4 samples[\\s\\S]*shape \\(\\)",
        ),
        (
            lambda: L.TripletMarginLoss(distance=lambda a, b: 1.0)((LOGITS,) * 3, None),
            lt.InputError,
            "distance for each of 4 samples[\\s\\S]*of type float",
        ),
        (
            lambda: L.CrossEntropyLoss(label_smoothing=1.5),
            lt.InputError,
            "label_smoothing[\\s\\S]*at most 1[\\s\\S]*1.5",
        ),
        (lambda: L.KLDivergenceLoss()(LOGITS, torch.ones(4).long()), lt.InputError, "never broadcasts"),
        (lambda: L.MSELoss()(torch.ones(2).long(), torch.ones(2)), lt.DTypeError, "Predictions come first"),
        (lambda: L.MSELoss(agg="avg"), lt.InputError, "MSELoss: agg must be 'mean', 'sum', 'none'"),
        (lambda: L.MSELoss(agg="som"), lt.InputError, "Did you mean 'sum'"),
        (lambda: L.MSELoss()(LOGITS), lt.InputError, "loss\\(model, ps, st, \\(x, y\\)\\)[\\s\\S]*1 arguments"),
        (lambda: L.MSELoss()(lt.NoOpLayer(), {}, {}, LOGITS), lt.InputError, "data that is Tensor"),
        (lambda: L.HuberLoss(delta=0), lt.InputError, "above 0"),
        (lambda: L.TripletMarginLoss()(LOGITS, None), lt.InputError, "\\(anchor, positive, negative\\)[\\s\\S]*Tensor"),
        (lambda: L.TripletMarginLoss()((LOGITS,) * 3, LOGITS), lt.InputError, "triplets have no targets"),
        (
            lambda: L.CosineEmbeddingLoss()((LOGITS, LOGITS[:1]), torch.ones(4)),
            lt.InputError,
            "x1 of shape \\(4, 3\\), x2 of shape \\(1, 3\\)",
        ),
        (lambda: L.CosineEmbeddingLoss()((LOGITS, LOGITS), torch.ones(4, 1)), lt.InputError, "never broadcasts"),
        (lambda: L.DiceCoeffLoss()(torch.ones(3), torch.ones(3)), lt.InputError, "\\(batch, ...\\)[\\s\\S]*\\(3,\\)"),
        (lambda: L.CTCLoss()(LOGITS, None), lt.InputError, "\\(time, batch, classes\\)"),
    ],
)
def test_mistakes_are_explained(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(
    ("position", "value", "text"),
    [(0, 3, "label is out of range[\\s\\S]*2"), (1, 6, "input length[\\s\\S]*5"), (2, 3, "target length[\\s\\S]*2")],
)
def test_ctc_refuses_what_its_kernel_would_read_past(position, value, text):
    y = [torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2])]
    y[position] = torch.full_like(y[position], value)
    with pytest.raises(lt.InputError, match=text):
        L.CTCLoss()(torch.zeros(5, 1, 3), tuple(y))
    with pytest.raises(lt.DTypeError, match="torch.float32"):
        L.CTCLoss()(torch.zeros(5, 1, 3), (y[0], y[1].float(), y[2]))
    with pytest.raises(lt.InputError, match="blank must be a class from 0 to 2"):
        L.CTCLoss(blank=3)(torch.zeros(5, 1, 3), tuple(y))


def test_losses_show_what_is_not_the_default():
    assert repr(L.MSELoss()) == "MSELoss()"
    assert repr(L.HuberLoss(delta=0.5, agg="sum")) == "HuberLoss(agg='sum', delta=0.5)"
    assert repr(L.GenericLossFunction(torch.mul, agg=torch.amax)) == "GenericLossFunction(mul, agg=amax)"
    assert repr(L.BinaryCrossEntropyLoss(weight=2, pos_weight=torch.tensor([1, 2]))) == (
        "BinaryCrossEntropyLoss(weight=2.0, pos_weight=(1.0, 2.0))"
    )
    assert repr(L.CrossEntropyLoss(weight=[1, 2])) == "CrossEntropyLoss(weight=(1.0, 2.0))"
    assert L.L1Loss is L.MAELoss and L.L2Loss is L.MSELoss
    assert L.MSELoss() != L.MAELoss()
