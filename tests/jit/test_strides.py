"""Strides that nothing depends on cost no second compilation, and change no number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.jit import jit

from .conftest import BACKENDS, compiled, train

pytree = torch.utils._pytree

# Tensors of shape (4, 3) with other strides each.
LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "expanded": lambda x: x[:1].expand(4, 3),
    "of one number": lambda x: x[0, 0].expand(4, 3),
    "transposed": lambda x: x.T.contiguous().T,
    "with gaps": lambda x: torch.stack([x, x], -1).flatten(1)[:, ::2],
    "a part": lambda x: torch.cat([x, x], 1)[:, 2:5],
}


def _matrices(x, w):
    return {"y": x @ w, "sum": x.sum(0), "x": x * 2}


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_other_strides_give_the_same_numbers(first, second, rng, same):
    jitted = jit(_matrices, backend="replay")
    w = torch.randn(3, 2, generator=rng)
    for layout in (first, second, first, second, second):
        x = LAYOUTS[layout](torch.randn(4, 3, generator=rng))
        same(jitted(x, w), _matrices(x, w))
    assert jitted.cache_info().misses <= 2


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_strides_in_passing_cost_no_compilation_and_those_that_stay_one(layout, rng):
    jitted, w = jit(_matrices, backend="replay"), torch.ones(3, 2)
    x = torch.randn(4, 3, generator=rng)
    misses = []
    for argument in (x, LAYOUTS[layout](x), x, LAYOUTS[layout](x), LAYOUTS[layout](x)):
        jitted(argument, w)
        misses.append(jitted.cache_info().misses)
    assert misses == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_autograd_sees_the_copy(requires_grad, rng):
    jitted, w = jit(lambda x: (x * x).sum(0).sin(), backend="replay"), torch.randn(3, generator=rng)
    jitted(torch.randn(4, 3, generator=rng).requires_grad_(requires_grad))
    base = torch.randn(1, 3, generator=rng).requires_grad_(requires_grad)
    got, expected = jitted(base.expand(4, 3)), (4 * base[0] ** 2).sin()
    torch.testing.assert_close(got, expected)
    if requires_grad:
        torch.testing.assert_close(*(torch.autograd.grad(y @ w, base) for y in (got, expected)))


def _ensemble(keys, make):
    model = lt.Chain(lt.Dense(3, 4, "tanh"), lt.BatchNorm(4), lt.Dense(4, 2))
    if make == "at once":
        return torch.vmap(lambda key: training.TrainState(model, *lt.setup(key, model), optim.Adam(0.01)))(keys)
    ps, st = torch.vmap(lambda key: lt.setup(key, model))(keys)
    return torch.vmap(lambda ps, st: training.TrainState(model, ps, st, optim.Adam(0.01)))(ps, st)


@pytest.mark.parametrize("donate", [(), "ts"], ids=["kept", "donated"])
@pytest.mark.parametrize("make", ["at once", pytest.param("parameters first", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_of_expanded_zeros_is_compiled_for_once(backend, make, donate, batch, make_key, same):
    def function(ts, batch):
        return torch.vmap(train, in_dims=(0, None))(ts, batch)

    jitted = jit(function, donate=donate, backend=backend)
    keys = lt.random.split(make_key(), 3)
    for _ in range(2):
        ts, other = _ensemble(keys, make), _ensemble(keys, make)
        for _ in range(3):
            (got, ts), (expected, other) = jitted(ts, batch), function(other, batch)
            same(got, expected, 1e-4)
        same(ts, other, 1e-4)
    assert jitted.cache_info().misses == 1


@pytest.mark.slow
@compiled
@pytest.mark.parametrize("donate", [(), "ts"], ids=["kept", "donated"])
def test_states_keep_their_strides_where_the_compiler_prefers_others(donate, make_state, rng, same):
    """Inductor has the weights of convolutions with channels last."""
    model = lt.Chain(lt.Conv((3, 3), 3, 8, "relu"), lt.Conv((3, 3), 8, 4), lt.WrappedFunction(_mean))
    batch = torch.randn(4, 3, 8, 8, generator=rng), torch.randn(4, 4, generator=rng)
    jitted, ts = jit(train, donate=donate, backend="inductor"), make_state(model)
    other = pytree.tree_map(torch.clone, ts)
    for _ in range(3):
        (got, ts), (expected, other) = jitted(ts, batch), train(other, batch)
        same(got, expected, 1e-4)
    assert jitted.cache_info().misses == 1
    strides = [[leaf.stride() for leaf in pytree.tree_leaves(tree) if leaf is not None] for tree in (ts, other)]
    assert strides[0] == strides[1]


def _mean(x):
    return x.mean((2, 3))


def test_a_state_that_comes_back_as_it_is_stays_expanded(same):
    jitted = jit(lambda st, x: ({"zeros": st["zeros"], "n": st["n"] + x}, x * 2), backend="replay")
    st, x = {"zeros": torch.zeros(1).expand(3), "n": torch.zeros(1).expand(3)}, torch.ones(3)
    for n in range(1, 4):
        st, _ = jitted(st, x)
        same(st, {"zeros": torch.zeros(3), "n": torch.full((3,), float(n))})
    assert jitted.cache_info().misses == 1


ASKS = {
    "stride": lambda x: (x.sum(), x.stride()),
    "stride of a dimension": lambda x: x * x.stride(0),
    "is_contiguous": lambda x: x + 1 if x.is_contiguous() else x - 1,
    "as_strided": lambda x: torch.as_strided(x, (2, 2), (1, 2)) * 2,
}


@pytest.mark.parametrize("name", ASKS)
def test_functions_that_ask_for_strides_see_those_of_the_call(name, rng, same):
    x = torch.randn(4, 3, generator=rng)
    jitted = jit(ASKS[name], backend="replay")
    for one in (x, x.T.contiguous().T, x, x.T.contiguous().T):
        same(jitted(one), ASKS[name](one))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_arguments_of_another_kind_are_not_taken_for_other_strides(same):
    jitted = jit(lambda x, a: x + a, backend="replay")
    x = torch.ones(2, 3)
    for a in (x, 3, x.T.contiguous().T, 2.0):
        same(jitted(x, a), x + a)
    with pytest.raises(lt.DTypeError, match="dense"):
        jitted(x.to_sparse(), x)
    with pytest.raises(lt.DTypeError, match="dense"):
        jitted(x, x.to_sparse_csr())


# Where a formula of torch says what strides a result will have, the kernel may have others, as 8 of these do.
ELEMENTWISE = [
    *(F.celu, F.elu, F.gelu, F.glu, F.hardshrink, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.logsigmoid),
    *(F.mish, F.relu, F.relu6, F.selu, F.silu, F.softplus, F.softshrink, F.softsign, F.tanhshrink, F.threshold),
    *(torch.sigmoid, torch.tanh, torch.sinc, torch.logit, torch.special.entr, torch.square, torch.rsqrt, torch.atan),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", ELEMENTWISE, ids=lambda function: function.__name__)
def test_a_view_sees_the_numbers_in_whatever_order_a_kernel_leaves_them(function, dynamic, rng):
    options = (0.1, 20.0) if function is F.threshold else ()

    def gradient(flat, cotangent):
        back = torch.func.vjp(lambda flat: function(flat.view(-1, 6, 4), *options), flat)[1]
        second = torch.func.vjp(lambda flat: back(cotangent.sin())[0] * flat, flat)[1](flat)[0]
        return back(cotangent)[0].view(-1), second

    def given(batch):
        flat = 0.8 * torch.rand(batch * 24, generator=rng, dtype=torch.float64) + 0.1
        like = function(flat.view(batch, 6, 4), *options)
        return flat, torch.randn(like.permute(1, 0, 2).shape, generator=rng, dtype=torch.float64).permute(1, 0, 2)

    jitted = jit(gradient, backend="replay", dynamic={"flat": 0, "cotangent": 0} if dynamic else False)
    for batch in (4, 4, 5):  # the second call runs what the first has found
        torch.testing.assert_close(jitted(*(args := given(batch))), gradient(*args))
