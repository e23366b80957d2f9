"""Every loss is a value, and keeps its numbers under vmap, jvp, hessian and torch.compile."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch
from torch.utils._pytree import tree_map_only

import luxtorch as lt
from luxtorch import losses as L
from luxtorch.testing import check_derivatives
from luxtorch.testing._orders import QUICK, WORDS


def cosh_error(y_hat, y):
    return (y_hat - y).cosh() - 1


def farthest(a, b):
    return (a - b).abs().amax(-1)


INDICES = torch.tensor([0, 2, 1, 2])
LABELS = torch.tensor([[0.0, 1.0, 0.0]] * 4, dtype=torch.float64)
DISTRIBUTION = torch.tensor([[0.2, 0.5, 0.3]] * 4, dtype=torch.float64)
SIGNS = 2 * LABELS - 1
ALIGNMENT = (torch.tensor([[1, 1], [2, -1], [1, 2]]), torch.tensor([4, 4, 3]), torch.tensor([2, 1, 2]))


# Name -> (loss, what makes predictions of a real tensor, the tensor's shape, targets).
def itself(x):
    return x


FORMS = {
    "BinaryCrossEntropyLoss": (L.BinaryCrossEntropyLoss(label_smoothing=0.1), itself, (4, 3), LABELS),
    "BinaryCrossEntropyLoss of probabilities": (L.BinaryCrossEntropyLoss(logits=False), torch.sigmoid, (4, 3), LABELS),
    "BinaryCrossEntropyLoss, weighted": (
        L.BinaryCrossEntropyLoss(weight=0.5, pos_weight=[3, 0.5, 1]),
        itself,
        (4, 3),
        LABELS,
    ),
    "BinaryCrossEntropyLoss, weighted by rows": (
        L.BinaryCrossEntropyLoss(weight=torch.tensor([[0.5], [1.0], [2.0], [0.0]])),
        itself,
        (4, 3),
        LABELS,
    ),
    "BinaryCrossEntropyLoss of probabilities, weighted": (
        L.BinaryCrossEntropyLoss(logits=False, weight=torch.tensor([1.0, 2.0, 3.0]), pos_weight=torch.tensor(2.0)),
        torch.sigmoid,
        (4, 3),
        DISTRIBUTION,
    ),
    "BinaryFocalLoss": (L.BinaryFocalLoss(), itself, (4, 3), LABELS),
    "BinaryFocalLoss of probabilities": (L.BinaryFocalLoss(logits=False, gamma=0.5), torch.sigmoid, (4, 3), LABELS),
    "CosineEmbeddingLoss": (L.CosineEmbeddingLoss(), lambda x: (x[0], x[1]), (2, 4, 3), SIGNS[:, 1]),
    "CrossEntropyLoss": (L.CrossEntropyLoss(), itself, (4, 3), INDICES),
    "CrossEntropyLoss of one sample": (L.CrossEntropyLoss(), itself, (3,), INDICES[1]),
    "CrossEntropyLoss, weighted, smooth": (
        L.CrossEntropyLoss(weight=[0.5, 2, 1], label_smoothing=0.1, ignore_index=2),
        itself,
        (4, 3),
        INDICES,
    ),
    "CrossEntropyLoss of images": (L.CrossEntropyLoss(dim=-1), itself, (2, 2, 3), INDICES.reshape(2, 2)),
    "CrossEntropyLoss of probabilities": (
        L.CrossEntropyLoss(logits=False),
        lambda x: x.softmax(-1),
        (4, 3),
        DISTRIBUTION,
    ),
    "CTCLoss": (L.CTCLoss(), lambda x: x.log_softmax(2), (4, 3, 3), ALIGNMENT),
    "DiceCoeffLoss": (L.DiceCoeffLoss(), torch.sigmoid, (4, 3), LABELS),
    "FocalLoss": (L.FocalLoss(), itself, (4, 3), INDICES),
    "FocalLoss of distributions": (L.FocalLoss(gamma=0.5), itself, (4, 3), DISTRIBUTION),
    "GaussianNLLLoss": (L.GaussianNLLLoss(full=True), lambda x: (x[0], x[1].exp()), (2, 4, 3), LABELS),
    "GaussianNLLLoss of shared variances": (L.GaussianNLLLoss(), lambda x: (x, x[:, :1].exp()), (4, 3), LABELS),
    "GenericLossFunction": (L.GenericLossFunction(cosh_error), itself, (4, 3), LABELS),
    "HingeEmbeddingLoss": (L.HingeEmbeddingLoss(margin=0.5), itself, (4, 3), SIGNS),
    "HingeLoss": (L.HingeLoss(), itself, (4, 3), SIGNS),
    "HuberLoss": (L.HuberLoss(delta=0.5), itself, (4, 3), LABELS),
    "KLDivergenceLoss": (L.KLDivergenceLoss(), itself, (4, 3), DISTRIBUTION),
    "KLDivergenceLoss of logarithms": (L.KLDivergenceLoss(log_target=True), itself, (4, 3), DISTRIBUTION.log()),
    "MarginRankingLoss": (L.MarginRankingLoss(margin=0.5), lambda x: (x[0], x[1]), (2, 4, 3), SIGNS),
    "MAELoss": (L.MAELoss(), itself, (4, 3), LABELS),
    "MSELoss": (L.MSELoss(), itself, (4, 3), LABELS),
    "MSELoss by a function": (L.MSELoss(agg=torch.mean), itself, (4, 3), LABELS),
    "MSLELoss": (L.MSLELoss(), torch.exp, (4, 3), LABELS + 0.5),
    "MultiLabelMarginLoss": (
        L.MultiLabelMarginLoss(),
        itself,
        (4, 3),
        torch.tensor([[1, -1], [0, 2], [2, 2], [-1, 0]]),
    ),
    "MultiLabelSoftMarginLoss": (L.MultiLabelSoftMarginLoss(weight=[3, 0.5, 1]), itself, (4, 3), LABELS),
    "MultiMarginLoss": (L.MultiMarginLoss(), itself, (4, 3), INDICES),
    "MultiMarginLoss of one sample": (L.MultiMarginLoss(margin=0.5), itself, (3,), INDICES[1]),
    "MultiMarginLoss, squared, weighted": (L.MultiMarginLoss(p=2, weight=[3, 0.5, 1]), itself, (4, 3), INDICES),
    "NLLLoss": (L.NLLLoss(weight=torch.tensor([0.5, 2.0, 1.0])), lambda x: x.log_softmax(1), (4, 3), INDICES),
    "PoissonLoss": (L.PoissonLoss(), itself, (4, 3), LABELS),
    "PoissonLoss, full": (L.PoissonLoss(full=True), itself, (4, 3), 3 * LABELS),
    "PoissonLoss of rates": (L.PoissonLoss(log_input=False), torch.exp, (4, 3), LABELS),
    "SiameseContrastiveLoss": (L.SiameseContrastiveLoss(), torch.exp, (4, 3), LABELS),
    "SmoothL1Loss": (L.SmoothL1Loss(beta=0.5), itself, (4, 3), LABELS),
    "SoftMarginLoss": (L.SoftMarginLoss(), itself, (4, 3), SIGNS),
    "SquaredHingeLoss": (L.SquaredHingeLoss(), itself, (4, 3), SIGNS),
    "TripletMarginLoss": (L.TripletMarginLoss(swap=True), lambda x: tuple(x), (3, 4, 3), None),
    "TripletMarginLoss with a distance": (
        L.TripletMarginLoss(distance=farthest),
        lambda x: tuple(x),
        (3, 4, 3),
        None,
    ),
}


@pytest.fixture(params=FORMS)
def form(request, make_key):
    loss, predictions, shape, y = FORMS[request.param]
    return loss, lambda x, y=y: loss(predictions(x), y), lt.random.normal(make_key(), shape, dtype=torch.float64), y


def test_vmap_is_a_loop(form, make_key):
    _, run, x, y = form
    many = torch.stack([x, 2 * x, lt.random.normal(make_key(), x.shape, dtype=x.dtype)])
    torch.testing.assert_close(torch.vmap(run)(many), torch.stack([run(x) for x in many]))
    gradients = torch.vmap(torch.func.grad(run))(many)
    torch.testing.assert_close(gradients, torch.stack([torch.func.grad(run)(x) for x in many]))
    if y is not None:
        ys = tree_map_only(torch.Tensor, lambda part: torch.stack([part] * 3), y)
        torch.testing.assert_close(torch.vmap(run)(many, ys), torch.vmap(run)(many))


def test_gradients_agree_with_differences(form, make_key):
    _, run, x, _ = form
    assert torch.autograd.gradcheck(run, x.clone().requires_grad_())
    tangent = lt.random.normal(make_key(), x.shape, dtype=x.dtype)
    value, derivative = torch.func.jvp(run, (x,), (tangent,))
    torch.testing.assert_close(value, run(x))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(run(leaf), leaf)
    torch.testing.assert_close(derivative, (gradient * tangent).sum())


def test_hessian_agrees_with_differences(form):
    _, run, x, _ = form
    gradient, step = torch.func.grad(run), 1e-6
    columns = []
    for direction in torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape):
        columns.append((gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step))
    differences = torch.stack(columns).reshape(x.shape + x.shape)
    torch.testing.assert_close(torch.func.hessian(run)(x), differences, rtol=1e-4, atol=1e-7)


def test_derivatives_of_every_order(form, make_key):
    _, run, x, _ = form
    check_derivatives(run, x, rng=make_key(), words=("RF", "FR", "FF", "rr", "rf", "fR", "RFR", "FRF", "RfR"))


@pytest.mark.slow
@pytest.mark.parametrize("agg", ["mean", "sum", "none", torch.amax], ids=["mean", "sum", "none", "function"])
def test_derivatives_of_every_order_with_every_aggregation(form, make_key, agg):
    loss, _, x, y = form
    predictions = next(f for form_loss, f, *_ in FORMS.values() if form_loss is loss)
    other = dataclasses.replace(loss, agg=agg)
    check_derivatives(lambda x: other(predictions(x), y), x, rng=make_key(), words=QUICK if agg == "none" else WORDS)


def test_learning_rates_by_seeds(form, make_key):
    _, run, x, _ = form
    rates = torch.tensor([0.1, 0.01], dtype=x.dtype)
    xs = torch.stack([x, 1.1 * x, 0.9 * x])

    def step(rate, x):
        return run(x - rate * torch.func.grad(run)(x))

    got = torch.vmap(torch.vmap(step, (None, 0)), (0, None))(rates, xs)
    torch.testing.assert_close(got, torch.stack([torch.stack([step(rate, x) for x in xs]) for rate in rates]))


@pytest.mark.slow
def test_compiled_is_eager(form):
    loss, run, x, y = form
    predictions = next(f for form_loss, f, *_ in FORMS.values() if form_loss is loss)
    apart = dataclasses.replace(loss, agg="none")

    def everything(x):
        return torch.func.grad_and_value(run)(x), apart(predictions(x), y)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), everything(x))


def test_jitted_is_eager(form):
    _, run, x, y = form

    def on_a_tape(run, x, y):
        value = run(x := x.detach().requires_grad_(), y)
        return value.detach(), torch.autograd.grad(value, x)

    def inside(x, y):
        return on_a_tape(run, x, y)

    expected = inside(x, y)
    torch.testing.assert_close(lt.jit(inside, backend="replay")(x, y), expected)
    torch.testing.assert_close(on_a_tape(lt.jit(run, backend="replay"), x, y), expected)


def test_objective(form):
    loss, run, x, y = form
    predictions = next(f for form_loss, f, *_ in FORMS.values() if form_loss is loss)
    model = lt.Chain(lt.WrappedFunction(torch.clone), lt.WrappedFunction(predictions))
    ps, st = lt.setup(0, model)
    value, new, stats = loss(model, ps, st, (x, y))
    torch.testing.assert_close(value, run(x))
    assert new == st and stats == {}


def test_losses_are_values(form):
    loss = form[0]
    same = dataclasses.replace(loss)
    assert same == loss and hash(same) == hash(loss) and len({loss, same, dataclasses.replace(loss, agg="sum")}) == 2
    assert pickle.loads(pickle.dumps(loss)) == loss
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.agg = "sum"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_is_kept(form, dtype):
    loss, run, x, y = form
    y = tree_map_only(torch.Tensor, lambda part: part.to(dtype) if part.is_floating_point() else part, y)
    value = run(x.to(dtype), y)
    assert value.dtype == dtype
    torch.testing.assert_close(value.double(), run(x), rtol=0.1, atol=0.1)


def test_views_do_as_well_as_copies(form):
    _, run, x, _ = form
    view = torch.stack([x, x], -1)[..., 0]
    assert not view.is_contiguous()
    torch.testing.assert_close(run(view), run(x))


def test_nothing_passed_is_changed(form):
    _, run, x, y = form
    kept = tree_map_only(torch.Tensor, torch.clone, (x, y))
    run(x)
    torch.testing.assert_close((x, y), kept)


def test_every_public_loss_has_a_form():
    public = {value for value in vars(L).values() if isinstance(value, type) and issubclass(value, L.Loss)} - {L.Loss}
    assert public == {type(loss) for loss, *_ in FORMS.values()}
