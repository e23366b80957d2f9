"""Operators and torch functions: which keep the names, which return plain tensors, and which refuse."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F

from luxtorch.components import ComponentMatrix, ComponentVector
from luxtorch.components._functions import ELEMENTWISE
from luxtorch.core import InputError

BINARY = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
    operator.eq,
    operator.ne,
]
UNARY = [operator.neg, operator.pos, abs]


def assert_named(result, expected, cv):
    assert type(result) is ComponentVector
    assert result.axes is cv.axes
    assert result.dtype == expected.dtype and result.shape == expected.shape
    assert torch.equal(result.flat.nan_to_num(), expected.nan_to_num())


def assert_plain(result, expected):
    assert type(result) is torch.Tensor
    assert torch.equal(result, expected)


@pytest.fixture
def positive(cv):
    """Numbers for which every operator and its mirror image are defined."""
    return abs(cv) + 0.5


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("other", ["number", "integer", "0-d", "tensor", "broadcast", "batch", "vector"])
def test_operators_keep_the_names(positive, rng, op, other):
    cv = positive
    operand = {
        "number": 0.7,
        "integer": 2,
        "0-d": torch.tensor(1.5),
        "tensor": torch.rand(13, generator=rng) + 0.5,
        "broadcast": torch.tensor([1.5]),
        "batch": torch.rand(4, 13, generator=rng) + 0.5,
        "vector": cv * 1.5,
    }[other]
    plain = getattr(operand, "flat", operand)
    assert_named(op(cv, operand), op(cv.flat, plain), cv)
    assert_named(op(operand, cv), op(plain, cv.flat), cv)


@pytest.mark.parametrize("op", [operator.and_, operator.or_, operator.xor])
def test_logical_operators(cv, op):
    a, b = cv > 0, cv > 1
    assert_named(op(a, b), op(a.flat, b.flat), cv)
    assert_named(op(a, True), op(a.flat, True), cv)
    assert_named(op(a.flat, b), op(a.flat, b.flat), cv)
    assert_named(~a, ~a.flat, cv)


@pytest.mark.parametrize("op", UNARY)
def test_unary_operators(cv, op):
    assert_named(op(cv), op(cv.flat), cv)


def test_augmented_assignment_makes_a_new_vector(cv):
    before, old = cv.flat.clone(), cv
    cv += 1
    assert cv is not old and torch.equal(old.flat, before)


def test_comparison_with_something_else_altogether(cv):
    assert (cv == None) is False  # noqa: E711
    assert (cv != "a") is True


@pytest.mark.parametrize(
    "function",
    [
        lambda v: torch.add(v, 1),
        lambda v: torch.add(v, v, alpha=0.1),
        lambda v: torch.sub(torch.ones(13), v),
        lambda v: torch.sqrt(torch.abs(v)),
        lambda v: torch.where(v > 0, v, 0.0),
        lambda v: torch.where(torch.ones(13) > 0, 1.0, v),
        lambda v: torch.clamp(v, min=-0.5, max=0.5),
        lambda v: torch.lerp(v, 2 * v, 0.3),
        lambda v: torch.addcmul(v, v, v, value=0.5),
        lambda v: torch.maximum(v, torch.zeros(13)),
        lambda v: torch.zeros_like(v),
        lambda v: torch.full_like(v, 3.0),
        lambda v: torch.clone(v),
        lambda v: torch.isfinite(v),
        lambda v: torch.special.erf(v),
        lambda v: torch.special.xlog1py(v, abs(v)),
        lambda v: F.softplus(v, beta=2.0),
        lambda v: F.relu(v),
        lambda v: F.gelu(v, approximate="tanh"),
        lambda v: torch.Tensor.mul(torch.ones(13), v),
        lambda v: torch.round(v, decimals=1),
    ],
)
def test_elementwise_functions_keep_the_names(cv, function):
    assert_named(function(cv), function(cv.flat), cv)


@pytest.mark.parametrize(
    "function",
    [
        torch.sum,
        torch.mean,
        torch.max,
        torch.linalg.vector_norm,
        lambda v: torch.sum(v, dim=-1, keepdim=True),
        lambda v: torch.dot(v, v),
        lambda v: v @ v,
        lambda v: torch.sort(v)[0],
        lambda v: torch.sort(v)[1],
        lambda v: torch.flip(v, (0,)),
        lambda v: torch.roll(v, 1),
        lambda v: torch.cumsum(v, 0),
        lambda v: torch.softmax(v, -1),
        lambda v: F.normalize(v, dim=0),
        lambda v: torch.cat([v, v]),
        lambda v: torch.stack([v, v], dim=-1),
        lambda v: torch.reshape(v, (13, 1)),
        lambda v: torch.diag(v),
        lambda v: v @ torch.ones(13, 2),
        lambda v: torch.ones(2, 13) @ v,
        lambda v: F.linear(v, torch.ones(2, 13)),
        lambda v: F.mse_loss(v, torch.zeros(13)),
        lambda v: torch.kron(v, torch.ones(2)),
        lambda v: torch.where(v > 0)[0],
        lambda v: torch.linalg.solve(torch.eye(13) * 2, v),
    ],
)
def test_all_other_functions_return_plain_tensors(cv, function):
    assert_plain(function(cv), function(cv.flat))


def test_functions_that_return_no_tensor(cv):
    assert torch.equal(cv, cv) is True
    assert torch.allclose(cv, cv + 1) is False
    assert torch.numel(cv) == 13


def test_random_likes(cv):
    for like in (torch.rand_like, torch.randn_like, torch.empty_like):
        assert like(cv).axes is cv.axes


def test_stack_makes_a_batch(cv):
    batch = torch.stack([cv, 2 * cv, 3 * cv])
    assert_named(batch, torch.stack([cv.flat, 2 * cv.flat, 3 * cv.flat]), cv)
    assert_named(torch.stack([batch, batch], dim=1), torch.stack([batch.flat, batch.flat], dim=1), cv)
    assert_plain(torch.stack([batch, batch], dim=2), torch.stack([batch.flat, batch.flat], dim=2))


def find(name):
    """Find a function of torch by the name that ELEMENTWISE has for it."""
    places = (torch, F, torch.special, torch.Tensor)
    return next(getattr(place, name) for place in places if hasattr(place, name))


ARGUMENTS = {"clip": (None, 0.3), "clamp": (None, 0.3), "threshold": (0.3, 0.0), "full_like": (2.0,)}
# These draw or leave their numbers undefined: for them only the shape can be looked at.
ARBITRARY = {"rand_like", "randn_like", "empty_like"}


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_what_is_called_elementwise_is(name, rng):
    """Such a function does to shuffled numbers what it does to the numbers, shuffled."""
    function = find(name)
    numbers = [torch.rand(9, generator=rng) * 0.8 + 0.1 for _ in range(3)]
    order = torch.randperm(9, generator=rng)
    if "bitwise" in name or name in ("__and__", "__or__", "__xor__"):
        numbers = [(10 * number).long() for number in numbers]
    if name == "where":
        numbers[0] = numbers[0] > 0.5
    if name == "ldexp":
        numbers[1] = numbers[1].round()
    if name == "imag":
        numbers = [torch.complex(number, number) for number in numbers]
    extra = ARGUMENTS.get(name, ())
    for count in (1, 2, 3):
        try:
            result = function(*numbers[:count], *extra)
        except TypeError:
            continue
        if not isinstance(result, torch.Tensor):
            continue
        assert result.shape == (9,)
        if name not in ARBITRARY:
            shuffled = function(*(number[order] for number in numbers[:count]), *extra)
            torch.testing.assert_close(shuffled, result[order], equal_nan=True)
        return
    pytest.fail(f"{name} takes no such arguments")


OTHERS = {
    "another order": lambda cv: cv[["scale", "layer_1", "relu", "layer_2"]],
    "another shape": lambda cv: cv.replace({"layer_1.weight": torch.zeros(2, 3)}),
    "another name": lambda cv: ComponentVector({"all": cv.flat}),
    "an empty group more": lambda cv: cv.replace(tanh={}),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize(
    "combine",
    [
        operator.add,
        operator.eq,
        torch.add,
        torch.dot,
        torch.equal,
        operator.matmul,
        F.mse_loss,
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: torch.add(torch.ones(13), a, alpha=1) - b,
        lambda a, b: torch.stack([a, b]),
    ],
)
def test_different_axes_are_an_error(cv, other, combine):
    with pytest.raises(InputError, match="must have the same names and shapes") as caught:
        combine(cv, other(cv))
    assert ".flat" in str(caught.value)


def test_the_error_says_where_axes_differ(cv):
    with pytest.raises(InputError, match=r"'layer_1.weight', \(3, 2\) against \(2, 3\)"):
        cv + cv.replace({"layer_1.weight": torch.zeros(2, 3)})
    with pytest.raises(InputError, match="another order, 'layer_1' against 'scale'"):
        cv + cv[["scale", "layer_1", "relu", "layer_2"]]
    with pytest.raises(InputError, match="another order, 'nothing' against 'tanh'"):
        cv + cv.replace(tanh={})
    with pytest.raises(InputError, match=r"'scale', \(\) against missing"):
        cv + cv[["layer_1", "relu", "layer_2"]]
    with pytest.raises(InputError, match="A ComponentVector and a ComponentMatrix"):
        cv + ComponentMatrix(torch.zeros(13, 13), cv.axes, cv.axes)


def test_unpaired_functions_take_any_axes(cv):
    other = cv[["layer_1"]]
    assert_plain(torch.cat([cv, other]), torch.cat([cv.flat, other.flat]))
    assert torch.outer(cv, other).shape == (13, 9)


def test_the_flat_tensor_of_the_other_pairs_by_position(cv):
    other = cv[["scale", "layer_1", "layer_2"]]
    assert_named(cv + other.flat, cv.flat + other.flat, cv)


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_an_only_element_is_not_broadcast(shape):
    cv = ComponentVector({"scale": torch.ones(())})
    for combine in (operator.mul, torch.mul):
        with pytest.raises(InputError, match="only element was broadcast"):
            combine(cv, torch.ones(shape))
    assert (cv * torch.ones(5, 1)).shape == (5, 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda v: torch.add(v, 1, out=v),
        lambda v: torch.relu_(v),
        lambda v: F.relu(v, inplace=True),
        lambda v: torch.sqrt_(v),
    ],
)
def test_in_place_functions_are_refused(cv, function):
    before = cv.flat.clone()
    with pytest.raises(InputError, match="would change a ComponentVector, which is immutable"):
        function(cv)
    assert torch.equal(cv.flat, before)


def test_a_plain_tensor_may_be_changed_by_one(cv):
    total = torch.zeros(13)
    total.add_(cv)
    total[:] = total + cv.flat
    assert torch.equal(total, 2 * cv.flat)
