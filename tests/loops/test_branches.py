"""`lt.cond` and `lt.switch` under every word of transforms, eager and compiled, and their errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import luxtorch as lt
from luxtorch.errors import DTypeError, InputError, TracingError
from tests.loops.words import F64, HOW, LONG, apply


def closed(cond: Any, theta: Any) -> Any:
    """Branches that close over what the other does not use."""
    branches = (lambda x: {"y": torch.sin(x @ theta["w"]), "n": 1}), (lambda x: {"y": x * x * theta["v"], "n": 1})
    return cond((theta["x"] * theta["v"]).sum() > 0, *branches, theta["x"])["y"].sum()


def inside(cond: Any, theta: Any) -> Any:
    """A branch in a branch."""

    def outer(x: Any) -> Any:
        return cond(x.sum() > theta["v"].sum(), lambda: torch.tanh(x @ theta["w"]), lambda: x * theta["x"] ** 2)

    return cond(theta["x"].sum() > 0, outer, lambda x: x.exp() @ theta["w"], theta["x"]).square().sum()


def chosen(pred: Any, true: Any, false: Any, *operands: Any) -> Any:
    """Select, in operators that every transform knows."""
    one, other = true(*operands), false(*operands)
    if isinstance(one, dict):
        return {"y": torch.where(pred, one["y"], other["y"])}
    return torch.where(pred, one, other)


BODIES = {body.__name__: body for body in (closed, inside)}


@pytest.fixture(params=[1.0, -1.0], ids=["yes", "no"])
def theta(request, rng):
    x = torch.rand(3, generator=rng, dtype=F64) * request.param
    return {"x": x, "v": torch.rand(3, generator=rng, dtype=F64), "w": torch.randn(3, 3, generator=rng, dtype=F64)}


FIRST, *OTHERS = BODIES


@pytest.mark.sampled(3)
@HOW
@pytest.mark.parametrize("word", ["", *LONG])
@pytest.mark.parametrize("body", [FIRST, *(pytest.param(body, marks=pytest.mark.slow) for body in OTHERS)])
def test_every_word(how, body, word, theta):
    expected = apply(word, lambda t: BODIES[body](chosen, t))(theta)
    got = how(apply(word, lambda t: BODIES[body](lt.cond, t)))(theta)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@HOW
@pytest.mark.parametrize("index", [-3, 0, 1, 2, 9])
def test_switch_takes_the_nearest(how, index):
    branches = [torch.sin, lambda x: x * 2, lambda x: x.new_zeros(2)]
    x = torch.tensor([1.0, 2.0])
    expected = branches[min(max(index, 0), 2)](x)
    assert torch.equal(lt.switch(index, branches, x), expected)
    assert torch.equal(how(lambda i, x: lt.switch(i, branches, x))(torch.tensor(index), x), expected)
    slope = how(torch.func.grad(lambda x, i: lt.switch(i, branches, x).sum()))(x, torch.tensor(index))
    torch.testing.assert_close(slope, torch.func.grad(lambda x: branches[min(max(index, 0), 2)](x).sum())(x))


@HOW
def test_a_batch_of_numbers_selects(how):
    branches = [torch.sin, lambda x: x * 2, lambda x: x.new_zeros(2)]
    x, index = torch.tensor([1.0, 2.0]), torch.tensor([2, -1, 1, 7])
    got = how(torch.vmap(lambda i: lt.switch(i, branches, x)))(index)
    assert torch.equal(got, torch.stack([lt.switch(int(i), branches, x) for i in index]))


def test_eager_code_runs_one_branch():
    seen = []
    lt.cond(torch.tensor(True), lambda: seen.append("true"), lambda: seen.append("false"))
    assert seen == ["true"]


@HOW
def test_a_known_predicate_is_an_if(how):
    f = lambda x: lt.cond(torch.tensor(2) > 1, lambda: x + 1, lambda: "never")  # noqa: E731
    assert how(f)(torch.ones(())) == 2
    assert how(lambda x: lt.cond(False, lambda: "never", lambda: x + 1))(torch.ones(())) == 2


X = torch.ones(2)
BAD = {
    "shape": (lambda x: lt.cond(x.sum() > 0, lambda: {"a": x}, lambda: {"a": x[0]}), InputError, r"result\.a"),
    "dtype": (
        lambda x: lt.cond(x.sum() > 0, lambda: {"a": [x]}, lambda: {"a": [x.double()]}),
        DTypeError,
        r"result\.a\.0",
    ),
    "structure": (lambda x: lt.cond(x.sum() > 0, lambda: {"a": x}, lambda: {"b": x}), InputError, "names a from true"),
    "number": (lambda x: lt.cond(x.sum() > 0, lambda: (x, 1), lambda: (x, 2)), InputError, r"result\.1"),
    "third": (lambda x: lt.switch(x.sum().long(), [lambda: x, lambda: x, lambda: x[0]]), InputError, r"branches\[2\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_branches_that_differ(case):
    f, kind, text = BAD[case]
    with pytest.raises(kind, match=text):
        lt.jit(f, backend="replay")(X)
    with pytest.raises(kind, match=text):
        torch.vmap(f)(torch.stack([X, X]))


REFUSED = {
    "shape": (lambda x: lt.cond(x > 0, lambda: x, lambda: x), DTypeError, "boolean scalar"),
    "float": (lambda x: lt.cond(x.sum(), lambda: x, lambda: x), DTypeError, "boolean scalar"),
    "string": (lambda x: lt.cond("yes", lambda: x, lambda: x), DTypeError, "boolean scalar"),
    "no function": (lambda x: lt.cond(x.sum() > 0, x, lambda: x), DTypeError, "true must be a function"),
    "no branch": (lambda x: lt.switch(0, [], x), InputError, "branches"),
    "not a sequence": (lambda x: lt.switch(0, torch.sin, x), InputError, "branches"),
    "a float index": (lambda x: lt.switch(x.sum(), [torch.sin, torch.cos], x), DTypeError, "index"),
    "a function missing": (lambda x: lt.switch(0, [torch.sin, None], x), DTypeError, r"branches\[1\]"),
}


@HOW
@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments(how, case):
    f, kind, text = REFUSED[case]
    with pytest.raises(kind, match=text):
        how(f)(X)


def test_a_branch_that_writes():
    def f(x):
        made = x * 2
        return lt.cond(x.sum() > 0, lambda: made.add_(1), lambda: made)

    with pytest.raises(TracingError, match="in place"):
        lt.jit(f, backend="replay")(X)


@pytest.mark.parametrize("inside", [lambda f: f, torch.vmap], ids=["", "vmap"])
def test_torch_cond_is_refused_in_favor_of_ours(inside):
    f = inside(lambda x: torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,)))
    with pytest.raises(TracingError, match=r"(?s)operator 'cond'.*lt\.cond"):
        lt.jit(f, backend="replay")(torch.ones(2, 2))


def test_an_if_on_a_tensor_names_what_to_use():
    with pytest.raises(TracingError, match=r"lt\.cond"):
        lt.jit(lambda x: x if x.sum() > 0 else -x, backend="replay")(X)
