"""Recurrent layers against torch.nn: outputs, carries, gradients, and the fused kernels against the steps."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch import BidirectionalRNN, GRUCell, LSTMCell, Recurrence, RNNCell, StackedCell
from luxtorch.layers.recurrent._fused import stepwise

ENDS = {"forward": "", "backward": "_reverse"}
HALVES = [torch.float16, torch.bfloat16]
KINDS = {
    "tanh": (RNNCell, torch.nn.RNN, torch.nn.RNNCell, {}),
    "relu": (lambda i, h, **o: RNNCell(i, h, "relu", **o), torch.nn.RNN, torch.nn.RNNCell, {"nonlinearity": "relu"}),
    "lstm": (LSTMCell, torch.nn.LSTM, torch.nn.LSTMCell, {}),
    "gru": (GRUCell, torch.nn.GRU, torch.nn.GRUCell, {}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
both_orders = pytest.mark.parametrize("batch_first", [True, False])


def tolerance(dtype):
    wide = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 2e-5, torch.float64: 1e-10}[dtype]
    return {"rtol": wide, "atol": wide}


def drawn(key, module):
    """Give a module of torch parameters drawn from a key."""
    for name, value in module.named_parameters():
        value.data = 0.5 * lt.random.normal(lt.random.fold_in(key, name), value.shape, dtype=value.dtype)
    return module


def level(module, suffix):
    """Return what a cell takes of a module's parameters, as leaves of their own."""
    parts = [name for name, _ in module.named_parameters() if name.endswith(suffix)]
    return {name.removesuffix(suffix): module.get_parameter(name).detach().requires_grad_() for name in parts}


def gradients(outputs, inputs):
    """Return gradients of a scalar that tells all numbers in the outputs apart."""
    total = sum((output * torch.cos(torch.arange(output.numel())).view_as(output)).sum() for output in outputs)
    return torch.autograd.grad(total, inputs)


@each_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("batch", [(), (0,), (1,), (3,)])
def test_a_step_is_that_of_torch(make_key, kind, bias, dtype, batch):
    cell, _, module, options = KINDS[kind]
    reference = drawn(make_key(), module(2, 3, bias=bias, dtype=dtype, **options))
    layer = cell(2, 3, bias=bias)
    ps, fresh = level(reference, ""), lt.setup(0, layer)[0]
    assert {n: p.shape for n, p in ps.items()} == {n: p.shape for n, p in fresh.items()}
    x = lt.random.normal(make_key(), (*batch, 2), dtype=dtype)
    if dtype in HALVES and "relu" in options.values():  # rounding near the kink would decide on the slope
        x = x.abs()
        for value in (*reference.parameters(), *ps.values()):
            value.data.abs_()
    x.requires_grad_()
    (y, carry), _ = layer(x, ps, {})
    (y, carry), st = layer((x, carry), ps, {})
    expected = reference(x, reference(x))
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert st == {} and len(carry) == len(expected)
    torch.testing.assert_close((y, carry), (expected[0], expected), **tolerance(dtype))
    got = gradients((y, *carry), [x, *ps.values()])
    wanted = gradients((expected[0], *expected), [x, *(reference.get_parameter(name) for name in ps)])
    wide = tolerance(dtype)["rtol"] * 20
    torch.testing.assert_close(got, wanted, rtol=wide, atol=wide)


@both_orders
@each_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("batch", [(), (0,), (1,), (3,)])
@pytest.mark.parametrize("length", [1, 4])
def test_a_sequence_is_that_of_torch(make_key, kind, batch_first, bias, dtype, batch, length):
    cell, module, _, options = KINDS[kind]
    reference = drawn(make_key(), module(2, 3, bias=bias, batch_first=batch_first, dtype=dtype, **options))
    layer = Recurrence(cell(2, 3, bias=bias), batch_first=batch_first, return_sequence=True, return_carry=True)
    ps = level(reference, "_l0")
    shape = (*batch, length, 2) if batch_first else (length, *batch, 2)
    x = lt.random.normal(make_key(), shape, dtype=dtype).requires_grad_()
    start = [lt.random.normal(make_key(), (*batch, 3), dtype=dtype).requires_grad_() for _ in range(2)]
    start = start if kind == "lstm" else start[:1]
    hx = tuple(part[None] for part in start)
    expected, last = reference(x, hx if kind == "lstm" else hx[0])
    last = [part[0] for part in last] if kind == "lstm" else [last[0]]
    (y, carry), _ = layer((x, tuple(start)), ps, {})
    torch.testing.assert_close((y, list(carry)), (expected, last), **tolerance(dtype))
    got = gradients((y, *carry), [x, *start, *ps.values()])
    wanted = gradients((expected, *last), [x, *start, *(reference.get_parameter(name + "_l0") for name in ps)])
    wide = tolerance(dtype)["rtol"] * 20
    torch.testing.assert_close(got, wanted, rtol=wide, atol=wide)
    last_only = Recurrence(cell(2, 3, bias=bias), batch_first=batch_first)
    torch.testing.assert_close(last_only((x, tuple(start)), ps, {})[0], carry[0], rtol=0, atol=0)


@both_orders
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_several_layers_are_those_of_torch(make_key, kind, batch_first, dtype):
    cell, module, _, options = KINDS[kind]
    reference = drawn(make_key(), module(2, 3, 3, batch_first=batch_first, dtype=dtype, dropout=0.5, **options)).eval()
    layer = Recurrence(
        StackedCell(cell(2, 3), cell(3, 3), cell(3, 3), dropout=0.5),
        batch_first=batch_first,
        return_sequence=True,
        return_carry=True,
    )
    ps = {f"layer_{i + 1}": level(reference, f"_l{i}") for i in range(3)} | {"dropout": {}}
    st = lt.test_mode(lt.setup(0, layer)[1])
    x = lt.random.normal(make_key(), (4, 5, 2), dtype=dtype).requires_grad_()
    (y, carry), _ = layer(x, ps, st)
    expected, last = reference(x)
    last = last if kind == "lstm" else (last,)
    torch.testing.assert_close(y, expected, **tolerance(dtype))
    torch.testing.assert_close([torch.stack(part) for part in zip(*carry, strict=True)], list(last), **tolerance(dtype))
    leaves = [leaf for i in range(3) for leaf in ps[f"layer_{i + 1}"].values()]
    named = [reference.get_parameter(f"{name}_l{i}") for i in range(3) for name in ps["layer_1"]]
    torch.testing.assert_close(gradients([y], [x, *leaves]), gradients([expected], [x, *named]), **tolerance(dtype))


@both_orders
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unbatched", [True, False])
def test_both_directions_are_those_of_torch(make_key, kind, batch_first, dtype, unbatched):
    cell, module, _, options = KINDS[kind]
    options = {**options, "num_layers": 2, "bidirectional": True, "batch_first": batch_first, "dtype": dtype}
    reference = drawn(make_key(), module(2, 3, **options))
    layer = lt.Chain(
        BidirectionalRNN(cell(2, 3), batch_first=batch_first),
        BidirectionalRNN(cell(6, 3), batch_first=batch_first, return_carry=True),
    )
    ps = {
        f"layer_{i + 1}": {
            "forward_rnn": level(reference, f"_l{i}"),
            "backward_rnn": level(reference, f"_l{i}_reverse"),
        }
        for i in range(2)
    }
    x = lt.random.normal(make_key(), (4, 2) if unbatched else (4, 5, 2), dtype=dtype).requires_grad_()
    (y, carries), _ = layer(x, ps, lt.setup(0, layer)[1])
    expected, last = reference(x)
    torch.testing.assert_close(y, expected, **tolerance(dtype))
    for got, direction in zip(carries, (2, 3), strict=True):
        for part, wanted in zip(got, last if kind == "lstm" else [last], strict=True):
            torch.testing.assert_close(part, wanted[direction], **tolerance(dtype))
    leaf, parameter = ps["layer_1"]["backward_rnn"]["weight_hh"], reference.weight_hh_l0_reverse
    torch.testing.assert_close(gradients([y], [x, leaf]), gradients([expected], [x, parameter]), **tolerance(dtype))


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2, 3)])
def test_the_kernel_and_the_steps_give_the_same(make_key, kind, dtype, batch, frozen):
    cell = KINDS[kind][0](2, 3)
    ps = {name: leaf.to(dtype) for name, leaf in lt.setup(make_key(), cell)[0].items()}
    leaves = [lt.random.normal(make_key(), (5, *batch, 2), dtype=dtype), *ps.values()]
    leaves = [leaf.requires_grad_(i not in frozen) for i, leaf in enumerate(leaves)]
    xs, *weights = leaves
    start, _ = cell.initial_carry(xs[0], ps, {})
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    fused = Recurrence(cell, batch_first=False, return_sequence=True, return_carry=True)
    (ys, carry), _ = fused((xs, start), dict(zip(ps, weights, strict=True)), {})
    assert "_Fused" in type(ys.grad_fn).__name__
    ys_by_steps, carry_by_steps = stepwise(cell, xs, start, weights)
    torch.testing.assert_close((ys, carry), (ys_by_steps, carry_by_steps), **tolerance(dtype))
    by_steps = gradients((ys_by_steps, *carry_by_steps), needed)
    for output in (ys, *carry):  # the gradient of one output leaves the others' empty
        assert all(grad is not None for grad in torch.autograd.grad(output.sum(), needed, retain_graph=True))
    torch.testing.assert_close(gradients((ys, *carry), needed), by_steps, **tolerance(dtype))


@each_kind
def test_the_kernel_can_be_differentiated_twice(make_key, kind):
    layer = Recurrence(KINDS[kind][0](2, 3))
    ps = lt.f64(lt.setup(make_key(), layer)[0])
    x = lt.random.normal(make_key(), (2, 4, 2), dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad((layer(x, ps, {})[0] ** 2).sum(), x, create_graph=True)
    (got,) = torch.autograd.grad((slope**2).sum(), x)
    slope_of = torch.func.grad(lambda x: (layer(x, ps, {})[0] ** 2).sum())
    torch.testing.assert_close(got, torch.func.grad(lambda x: (slope_of(x) ** 2).sum())(x.detach()))


@each_kind
def test_a_graph_can_be_used_twice_if_it_is_kept_and_batched(make_key, kind):
    layer = Recurrence(KINDS[kind][0](2, 3), return_sequence=True)
    ps, _ = lt.setup(make_key(), layer)
    x = lt.random.normal(make_key(), (2, 4, 2)).requires_grad_()
    y, _ = layer(x, ps, {})
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)
    many = torch.stack([torch.ones_like(y), 2 * torch.ones_like(y)])
    (batched,) = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(batched, torch.stack([first, 2 * first]))
    torch.autograd.grad(y.sum(), x)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_eight_models_and_many_samples_are_vmapped(make_key, kind):
    layer = Recurrence(StackedCell(KINDS[kind][0](2, 3), KINDS[kind][0](3, 3)), return_sequence=True)
    models = [lt.setup(key, layer)[0] for key in lt.random.split(make_key(), 8)]
    st = lt.setup(0, layer)[1]
    x = lt.random.normal(make_key(), (4, 5, 2))
    stacked = torch.utils._pytree.tree_map(lambda *leaves: torch.stack(leaves), *models)

    def loss(ps, x):
        return (layer(x, ps, st)[0] ** 2).sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(0, None))(stacked, x)
    for i, ps in enumerate(models):
        expected = torch.func.grad(loss)(ps, x)
        for name, leaf in lt.core.named_leaves(expected):
            outer, inner = name.split(".")
            torch.testing.assert_close(got[outer][inner][i], leaf, rtol=1e-4, atol=1e-5)
    by_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(models[0], x)
    total = torch.func.grad(loss)(models[0], x)
    torch.testing.assert_close(by_sample["layer_2"]["weight_hh"].sum(0), total["layer_2"]["weight_hh"])


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_hessian_is_that_of_the_gradient(make_key, kind):
    layer = Recurrence(KINDS[kind][0](2, 2))
    ps = lt.f64(lt.setup(make_key(), layer)[0])
    x = lt.random.normal(make_key(), (2, 3, 2), dtype=torch.float64)

    def loss(weight):
        return (layer(x, {**ps, "weight_hh": weight}, {})[0] ** 2).sum()

    hessian = torch.func.hessian(loss)(ps["weight_hh"])
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, ps["weight_hh"]))


@each_kind
def test_inputs_and_carries_of_any_strides_and_broadcast_carries_do(make_key, kind):
    cell = KINDS[kind][0](2, 3)
    layer, ps = Recurrence(cell, return_sequence=True), lt.setup(make_key(), cell)[0]
    x = lt.random.normal(make_key(), (2, 5, 4)).permute(2, 1, 0)
    h = lt.random.normal(make_key(), (3, 4)).t()
    carry = (h, h) if kind == "lstm" else (h,)
    (y, _), (expected, _) = (
        layer((x, carry), ps, {}),
        layer((x.contiguous(), tuple(part.contiguous() for part in carry)), ps, {}),
    )
    torch.testing.assert_close(y, expected)
    one = tuple(part[0] for part in carry)
    (y, _), (expected, _) = layer((x, one), ps, {}), layer((x, tuple(part.expand(4, 3) for part in one)), ps, {})
    torch.testing.assert_close(y, expected)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_kernel(make_key, kind, dtype):
    cell, module, _, options = KINDS[kind]
    reference = drawn(make_key(), module(2, 3, **options))
    layer, ps = Recurrence(cell(2, 3), batch_first=False, return_sequence=True), level(reference, "_l0")
    x = lt.random.normal(make_key(), (4, 5, 2), dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            expected = reference(x.float())[0]
        except RuntimeError as error:
            pytest.skip(f"this processor has no such kernel: {error}")
        y, _ = layer(x, ps, {})
    assert "_Fused" in type(y.grad_fn).__name__ and y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, **tolerance(torch.bfloat16))
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(y.float().sum(), list(ps.values())))
