"""The CTC loss in converted modules: torch's numbers on the tape, and derivatives of every order."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, hessian, jvp, vmap

import luxtorch as lt
from luxtorch.interop import Inputs, from_torch
from luxtorch.testing import check_derivatives

TIME, BATCH, CLASSES = 5, 3, 4
LABELS = torch.tensor([[1, 1, 2], [3, 1, 0], [2, 3, 1]])
STEPS, SIZES = (5, 4, 5), (2, 1, 3)

REDUCTIONS = ("mean", "sum", "none")
LENGTHS = {"tensors": torch.tensor, "tuples": tuple}
TARGETS = {
    "side by side": lambda labels: labels,
    "int32": lambda labels: labels.int(),
    "one after another": lambda labels: torch.cat([row[:size] for row, size in zip(labels, SIZES, strict=True)]),
}


class Speller(nn.Module):
    """Compute its loss itself, as models that are trained with others do; by the function that it is told."""

    def __init__(self, loss):
        super().__init__()
        self.out = nn.Linear(CLASSES, CLASSES, dtype=torch.float64)
        self.loss = loss

    def forward(self, x, *targets):
        return self.loss(self.out(x).log_softmax(-1), *targets)


def by_number(*args):
    return torch.ctc_loss(*args, 0, 2)


LOSSES = {
    **{f"module, {reduction}": nn.CTCLoss(reduction=reduction) for reduction in REDUCTIONS},
    "module, blank, zero_infinity": nn.CTCLoss(blank=3, zero_infinity=True),
    "function": F.ctc_loss,
    "function of numbers": by_number,
}


@pytest.fixture
def draw(make_key):
    return lambda *shape: lt.random.normal(make_key(), shape, dtype=torch.float64)


def number(y):
    return (y * torch.arange(1, y.numel() + 1).reshape(y.shape)).sum()


@pytest.mark.parametrize(("loss", "lengths", "targets"), list(product(LOSSES, LENGTHS, TARGETS)))
def test_numbers_and_derivatives_are_torchs(draw, loss, lengths, targets):
    module = Speller(LOSSES[loss])
    labels = LABELS % 3 if "blank" in loss else LABELS
    given = TARGETS[targets](labels), LENGTHS[lengths](STEPS), LENGTHS[lengths](SIZES)
    x = draw(TIME, BATCH, CLASSES)
    expected = module(x, *given)
    number(expected).backward()
    slopes = {name: value.grad for name, value in module.named_parameters()}
    layer, ps, st = from_torch(module)

    def run(ps, x=x):
        return layer(Inputs(x, *given), ps, st)[0]

    assert torch.equal(run(ps), expected)
    torch.testing.assert_close(vmap(run, (None, 0))(ps, torch.stack([x, 2 * x]))[0], expected.detach())
    torch.testing.assert_close(lt.flatten_names(grad(lambda ps: number(run(ps)))(ps)), slopes)
    value, slope = jvp(run, (ps,), (lt.core.tree_map(torch.ones_like, ps),))
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(number(slope), sum(leaf.sum() for leaf in slopes.values()))
    if loss in ("module, mean", "module, blank, zero_infinity", "function of numbers"):
        jitted = lt.jit(lambda ps, x: grad(lambda ps: number(run(ps, x)))(ps), backend="replay")(ps, x)
        torch.testing.assert_close(lt.flatten_names(jitted), slopes)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("targets", ["side by side", "one after another"])
def test_derivatives_of_every_order(make_key, draw, reduction, targets):
    layer, ps, st = from_torch(nn.CTCLoss(reduction=reduction))
    given = TARGETS[targets](LABELS), torch.tensor(STEPS), torch.tensor(SIZES)
    for prepare in (lambda x: x, lambda x: x.log_softmax(2)):  # it need not be of probabilities
        check_derivatives(
            lambda x, prepare=prepare: layer(Inputs(prepare(x), *given), ps, st)[0],
            draw(TIME, BATCH, CLASSES),
            rng=make_key(),
            words=("RF", "FR", "FF", "rr", "rf", "fR", "RFR", "FRF"),
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_sequence_is_a_batch_of_one(draw, reduction):
    layer, ps, st = from_torch(nn.CTCLoss(reduction=reduction))
    x = draw(TIME, CLASSES).log_softmax(-1)
    for steps, sizes in ((torch.tensor(4), torch.tensor(2)), (torch.tensor([4]), torch.tensor([2])), ((4,), (2,))):
        given = LABELS[0, :2], steps, sizes
        expected = nn.CTCLoss(reduction=reduction)(x, *given)
        value, _ = jvp(lambda x, given=given: layer(Inputs(x, *given), ps, st)[0], (x,), (x,))
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("targets", ["side by side", "one after another"])
def test_targets_and_lengths_are_batched_too(draw, targets):
    layer, ps, st = from_torch(nn.CTCLoss(reduction="none"))
    xs = draw(2, TIME, BATCH, CLASSES).log_softmax(-1)
    ways = [TARGETS[targets](LABELS), TARGETS[targets](LABELS % 3 + 1)]
    given = torch.stack(ways), torch.tensor([STEPS, STEPS[::-1]]), torch.tensor([SIZES, SIZES])
    got = vmap(lambda *args: layer(Inputs(*args), ps, st)[0])(xs, *given)
    for i in range(2):
        torch.testing.assert_close(got[i], F.ctc_loss(xs[i], *(part[i] for part in given), reduction="none"))


@pytest.mark.parametrize(("zero", "size"), list(product((True, False), (3, 6))))
def test_what_cannot_be_aligned_costs_infinity_or_nothing(draw, zero, size):
    layer, ps, st = from_torch(nn.CTCLoss(reduction="none", zero_infinity=zero))
    x, labels = draw(4, 2, CLASSES).log_softmax(-1), torch.ones(2, size, dtype=torch.int64)
    given = labels, (4, 4), (size, 1)
    expected = F.ctc_loss(x, *given, reduction="none", zero_infinity=zero)
    assert expected[0] == (0 if zero else torch.inf)
    torch.testing.assert_close(jvp(lambda x: layer(Inputs(x, *given), ps, st)[0], (x,), (x,))[0], expected)
    if zero:
        assert not hessian(lambda x: layer(Inputs(x, *given), ps, st)[0][0])(x).any()


WRONG = {
    "input length": ((LABELS, (5, 6, 5), SIZES), "Input lengths must be from 0"),
    "target length": ((LABELS, STEPS, (2, 1, 4)), "Target lengths must be from 0"),
    "negative": ((LABELS, STEPS, (2, -1, 3)), "Target lengths must be from 0"),
    "sum": ((LABELS.flatten(), STEPS, SIZES), "The sum of the target lengths"),
    "number of lengths": ((LABELS, STEPS[:2], SIZES), "The number of lengths must be that of the sequences, 3"),
    "batch": ((LABELS[:2], STEPS, SIZES), "The batch of targets must be"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_the_kernel_refuses_is_refused(draw, wrong):
    layer, ps, st = from_torch(nn.CTCLoss())
    given, text = WRONG[wrong]
    x = draw(TIME, BATCH, CLASSES)
    with pytest.raises(lt.InputError, match=text):
        grad(lambda x: layer(Inputs(x, *given), ps, st)[0])(x)
    if wrong in ("input length", "target length", "negative", "sum"):
        tensors = [torch.as_tensor(part) for part in given]
        with pytest.raises(lt.InputError, match=text):
            vmap(lambda x, *given: layer(Inputs(x, *given), ps, st)[0])(x[None], *(part[None] for part in tensors))
        # Where numbers cannot be seen, nobody takes the loss for one.
        assert lt.jit(lambda x, *given: layer(Inputs(x, *given), ps, st)[0], backend="replay")(x, *tensors).isnan()


@pytest.mark.slow
def test_compiled_is_eager(draw):
    layer, ps, st = from_torch(Speller(nn.CTCLoss()))
    x, given = draw(TIME, BATCH, CLASSES), (LABELS, torch.tensor(STEPS), torch.tensor(SIZES))

    def step(ps, x, *given):
        return grad(lambda ps: layer(Inputs(x, *given), ps, st)[0])(ps)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ps, x, *given), step(ps, x, *given))
