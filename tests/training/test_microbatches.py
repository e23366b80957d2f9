"""Microbatches: every loss is that of the whole batch, with its weights and with what it leaves out, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import luxtorch as lt
from luxtorch import losses, optim, training

N, CLASSES = 12, 4
INDICES = torch.tensor(
    [0, 1, 2, 3, 0, 0, 0, 0, 1, 0, 2, 2]
)  # with ignore_index=0, one microbatch of three or four is empty
WEIGHTS = (10.0, 1.0, 0.5, 0.0)


def classes(y: Tensor) -> tuple[Callable[[Tensor], Any], Any]:
    return (lambda out: out), y


def positive(make: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return lambda out: make(out.sigmoid())


NUMBERS = torch.linspace(0.1, 2.0, N * CLASSES, dtype=torch.float64).reshape(N, CLASSES).sin()
BITS, SHARES = (NUMBERS > 0.5).double(), NUMBERS.softmax(1)
SIGNS = 2.0 * BITS - 1
LENGTHS = torch.tensor([1, 2] * (N // 2))
LABELS = (torch.ones(N, 2, dtype=torch.int64), torch.full((N,), CLASSES), LENGTHS)
CASES: dict[str, tuple[Callable[[str], lt.Loss], Callable[[Tensor], Any], Any]] = {}


def case(name: str, make: Callable[..., lt.Loss], predict: Callable[[Tensor], Any], y: Any, **options: Any) -> None:
    CASES[name] = (lambda agg: make(agg=agg, **options), predict, y)


def same(out: Tensor) -> Tensor:
    return out


for title, options in {
    "": {},
    " weight": {"weight": WEIGHTS},
    " ignored": {"ignore_index": 0},
    " ignored, weight": {"ignore_index": 0, "weight": WEIGHTS},
}.items():
    for loss in (losses.CrossEntropyLoss, losses.FocalLoss):
        case(f"{loss.__name__}{title}", loss, same, INDICES, **options)
    case(f"NLLLoss{title}", losses.NLLLoss, lambda out: out.log_softmax(1), INDICES, **options)
    case(f"CrossEntropyLoss smooth{title}", losses.CrossEntropyLoss, same, INDICES, label_smoothing=0.1, **options)
    case(f"CrossEntropyLoss shares{title}", losses.CrossEntropyLoss, same, SHARES, **options)
    case(
        f"CrossEntropyLoss positions{title}",
        losses.CrossEntropyLoss,
        lambda out: torch.stack([out, 2 * out], -1),
        torch.stack([INDICES, INDICES.roll(1)], -1),
        **options,
    )
case("BinaryCrossEntropyLoss", losses.BinaryCrossEntropyLoss, same, BITS, weight=WEIGHTS, pos_weight=3.0)
case("BinaryFocalLoss", losses.BinaryFocalLoss, torch.sigmoid, BITS)
case("DiceCoeffLoss", losses.DiceCoeffLoss, torch.sigmoid, BITS)
case("CTCLoss", losses.CTCLoss, lambda out: torch.stack([out, out.sin(), out, -out]).log_softmax(2), LABELS)
case("KLDivergenceLoss", losses.KLDivergenceLoss, same, SHARES)
case("SiameseContrastiveLoss", losses.SiameseContrastiveLoss, lambda out: out.square().sum(1), BITS[:, 0])
case("CosineEmbeddingLoss", losses.CosineEmbeddingLoss, lambda out: (out, out.sin()), SIGNS[:, 0])
case("HingeLoss", losses.HingeLoss, same, SIGNS)
case("SquaredHingeLoss", losses.SquaredHingeLoss, same, SIGNS)
case("MarginRankingLoss", losses.MarginRankingLoss, lambda out: (out, out.sin()), SIGNS, margin=0.5)
case("SoftMarginLoss", losses.SoftMarginLoss, same, SIGNS)
case("HingeEmbeddingLoss", losses.HingeEmbeddingLoss, same, SIGNS)
case("MultiMarginLoss", losses.MultiMarginLoss, same, INDICES, weight=WEIGHTS)
case("MultiLabelMarginLoss", losses.MultiLabelMarginLoss, same, INDICES[:, None])
case("MultiLabelSoftMarginLoss", losses.MultiLabelSoftMarginLoss, same, BITS, weight=WEIGHTS)
case("GaussianNLLLoss", losses.GaussianNLLLoss, lambda out: (out, out.exp()), NUMBERS)
case("MAELoss", losses.MAELoss, same, NUMBERS)
case("MSELoss", losses.MSELoss, same, NUMBERS)
case("HuberLoss", losses.HuberLoss, same, NUMBERS)
case("SmoothL1Loss", losses.SmoothL1Loss, same, NUMBERS)
case("MSLELoss", losses.MSLELoss, torch.sigmoid, BITS)
case("PoissonLoss", losses.PoissonLoss, torch.sigmoid, BITS)
case("GenericLossFunction", lambda agg: losses.GenericLossFunction(lambda a, b: (a - b) ** 4, agg=agg), same, NUMBERS)


@pytest.fixture
def run(rng: torch.Generator) -> Callable[..., Any]:
    x = torch.randn(N, 3, generator=rng, dtype=torch.float64)
    ps = {"w": torch.randn(3, CLASSES, generator=rng, dtype=torch.float64)}

    def compute(objective: Any, predict: Callable[[Tensor], Any], y: Any, n: int, jitted: bool = False) -> Any:
        def model(x: Tensor, ps: Any, st: Any) -> Any:
            return predict(x @ ps["w"]), st

        ts = training.TrainState(model, ps, {}, optim.Adam())

        def step(data: Any, ts: Any) -> Any:
            return training.compute_gradients(objective, data, ts, accumulate=n)[:2]

        return (lt.jit(step, backend="replay") if jitted else step)((x, y), ts)

    return compute


def alike(one: Any, other: Any) -> None:
    leaves = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    for a, b in leaves:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("n", [2, 3, 12])
@pytest.mark.parametrize("agg", ["mean", "sum"])
@pytest.mark.parametrize("name", CASES)
def test_microbatches_are_the_whole_batch(run, name: str, agg: str, n: int) -> None:
    make, predict, y = CASES[name]
    whole = run(make(agg), predict, y, 1)
    assert whole[1].isfinite()
    alike(run(make(agg), predict, y, n), whole)


@pytest.mark.parametrize("name", CASES)
def test_the_mean_is_the_sum_over_the_weight(rng, name: str) -> None:
    make, predict, y = CASES[name]
    y_hat = predict(torch.randn(N, CLASSES, generator=rng, dtype=torch.float64))
    total, weight = make("mean").sum_and_weight(y_hat, y)
    torch.testing.assert_close(total / weight, make("mean")(y_hat, y))
    total, weight = make("sum").sum_and_weight(y_hat, y)
    torch.testing.assert_close(total, make("sum")(y_hat, y))
    assert weight is None


@pytest.mark.parametrize("name", ["CrossEntropyLoss ignored, weight", "MSELoss"])
def test_compiled_microbatches(run, name: str) -> None:
    make, predict, y = CASES[name]
    alike(run(make("mean"), predict, y, 3, jitted=True), run(make("mean"), predict, y, 1))


@pytest.mark.parametrize("n", [1, 3])
def test_a_batch_that_is_ignored_altogether(run, n: int) -> None:
    grads, loss = run(losses.CrossEntropyLoss(ignore_index=0), same, torch.zeros(N, dtype=torch.int64), n)
    assert loss.isnan() and not grads["w"].any()


def test_what_is_not_a_number_is_so_in_all(run) -> None:
    y = NUMBERS.clone()
    y[5, 1] = torch.nan
    alike(run(losses.MSELoss(), same, y, 4), run(losses.MSELoss(), same, y, 1))


# Objectives of one's own.


def _masked(model: Any, ps: Any, st: Any, data: Any) -> Any:
    y_hat, st = model(data[0], ps, st)
    mask = (data[1] > 0.9).to(y_hat.dtype)
    return (((y_hat - data[1]).square() * mask).sum(), mask.sum()), st, {"n": mask.sum()}


def _two_tasks(model: Any, ps: Any, st: Any, data: Any) -> Any:
    y_hat, st = model(data[0], ps, st)
    return losses.CrossEntropyLoss(weight=WEIGHTS).sum_and_weight(y_hat, data[1]), st, {}


def _summed(model: Any, ps: Any, st: Any, data: Any) -> Any:
    y_hat, st = model(data[0], ps, st)
    return ((y_hat - data[1]).square().sum(), None), st, {}


OWN = {"masked": (_masked, NUMBERS), "weighted": (_two_tasks, INDICES), "summed": (_summed, NUMBERS)}


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("name", OWN)
def test_an_objective_that_tells_its_weight(run, name: str, n: int) -> None:
    objective, y = OWN[name]
    whole = run(objective, same, y, 1)
    alike(run(objective, same, y, n), whole)
    by_hand = run(lambda *args: (_value(objective(*args)[0]), *objective(*args)[1:]), same, y, 1)
    alike(whole, by_hand)


def _value(pair: Any) -> Tensor:
    return pair[0] if pair[1] is None else pair[0] / pair[1]


@pytest.mark.parametrize("weight", ["3", torch.ones(2), True, 1j])
def test_a_weight_is_a_number(run, weight: Any) -> None:
    def objective(model: Any, ps: Any, st: Any, data: Any) -> Any:
        return (ps["w"].sum(), weight), st, {}

    with pytest.raises(lt.InputError, match="weight of the loss must be a number"):
        run(objective, same, NUMBERS, 1)


class _Median(losses.MSELoss):
    def value(self, y_hat: Any, y: Any) -> Tensor:
        return (y_hat - y).square().median()


@pytest.mark.parametrize("loss", [losses.MSELoss(agg=torch.amax), losses.CrossEntropyLoss(agg=torch.mean), _Median()])
def test_what_cannot_be_told_from_the_parts_is_refused(run, loss: lt.Loss) -> None:
    y = INDICES if isinstance(loss, losses.CrossEntropyLoss) else NUMBERS
    run(loss, same, y, 1)
    with pytest.raises(lt.InputError, match="cannot be told from those of its parts"):
        run(loss, same, y, 2)


def test_the_losses_are_all_here() -> None:
    known = {type(make("mean")) for make, _, _ in CASES.values()}
    every = {c for c in vars(losses).values() if isinstance(c, type) and issubclass(c, lt.Loss) and c is not lt.Loss}
    assert every - known == {losses.TripletMarginLoss}  # it takes no targets, see below


def test_a_loss_without_targets(run) -> None:
    def objective(model: Any, ps: Any, st: Any, data: Any) -> Any:
        y_hat, st = model(data[0], ps, st)
        return losses.TripletMarginLoss().sum_and_weight((y_hat, y_hat.sin(), data[1]), None), st, {}

    alike(run(objective, same, NUMBERS, 3), run(objective, same, NUMBERS, 1))


@pytest.mark.parametrize("jitted", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][2] is INDICES])
def test_a_number_is_refused_where_a_weighted_mean_was_taken(run, name: str, jitted: bool) -> None:
    make, predict, y = CASES[name]

    def number(model: Any, ps: Any, st: Any, data: Any) -> Any:
        y_hat, st = model(data[0], ps, st)
        return 2 * make("mean")(y_hat, data[1]), st, {}

    whole = run(number, predict, y, 1, jitted)
    if "weight" not in name and "ignored" not in name:
        alike(run(number, predict, y, 3, jitted), whole)
        return
    with pytest.raises(lt.InputError, match="weights differ") as error:
        run(number, predict, y, 3, jitted)
    assert "sum_and_weight" in str(error.value)

    def pair(model: Any, ps: Any, st: Any, data: Any) -> Any:
        y_hat, st = model(data[0], ps, st)
        total, weight = make("mean").sum_and_weight(y_hat, data[1])
        return (2 * total, weight), st, {"of this part": make("mean")(y_hat, data[1])}

    alike(run(pair, predict, y, 3, jitted), whole)


def test_targets_that_are_ignored_by_default_are_seen(run) -> None:
    def number(model: Any, ps: Any, st: Any, data: Any) -> Any:
        y_hat, st = model(data[0], ps, st)
        return losses.CrossEntropyLoss()(y_hat, data[1]), st, {}

    y = INDICES.masked_fill(INDICES == 1, -100)
    with pytest.raises(lt.InputError, match="weights differ"):
        run(number, same, y, 3)
    alike(run(losses.CrossEntropyLoss(), same, y, 3), run(number, same, y, 1))
