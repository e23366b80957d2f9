"""Operators that write to what their schemas call inputs: all are known, and traced as the writes that they are."""

from __future__ import annotations

import sys
import types
import unittest
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import luxtorch as lt
from luxtorch.jit import TracingError, jit
from luxtorch.jit._effects import _BACKWARD, _UNDECLARED, with_declared_writes, written

from .conftest import BACKENDS

aten = torch.ops.aten
pytree = torch.utils._pytree

# These work in the memory of a result of theirs, which nothing reads again.
SCRATCH = {"aten.mkldnn_rnn_layer_backward.default"}


class Compared(TorchDispatchMode):
    """Compare the inputs of each operator before and after it."""

    def __init__(self):
        super().__init__()
        self.seen, self.secret = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        own = {tensor.untyped_storage()._cdata for tensor in written(func, args, kwargs)}
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and _is_plain(t)]
        before = [(t, _bytes(t).clone()) for t in inputs if t.untyped_storage()._cdata not in own]
        result = func(*args, **kwargs)
        self.seen.add(func)
        if any(not torch.equal(_bytes(t), old) for t, old in before):
            self.secret.add(str(func))
        return result


def _is_plain(tensor):
    return (
        tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor._is_zerotensor())
        and 0 < tensor.numel() < 10**5
    )


def _bytes(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _samples():
    """Yield functions that call torch's operators, with their gradients, on the samples that torch tests them on."""
    sys.modules.setdefault("expecttest", types.ModuleType("expecttest")).TestCase = unittest.TestCase
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    for op in op_db:
        for dtype in {torch.float32, torch.complex64, torch.int64} & op.supported_dtypes("cpu"):
            floats = op.supports_autograd and dtype is torch.float32
            for sample in _first(lambda op=op, d=dtype, g=floats: op.sample_inputs("cpu", d, requires_grad=g)):
                yield lambda op=op, sample=sample: op.op(sample.input, *sample.args, **sample.kwargs)
    for info in module_db:
        for training in (True, False):
            make = info.module_inputs_func
            for one in _first(lambda i=info, make=make, t=training: make(i, "cpu", torch.float32, True, t)):
                yield lambda i=info, one=one, t=training: i.module_cls(
                    *one.constructor_input.args, **one.constructor_input.kwargs
                ).train(t)(*one.forward_input.args, **one.forward_input.kwargs)


def _first(samples, number=2):
    try:
        yield from (sample for _, sample in zip(range(number), samples(), strict=False))
    except Exception:  # what torch cannot make samples of here
        return


@pytest.mark.slow
def test_no_other_operator_writes_in_secret():
    """What a new release of torch adds shows here."""
    compared = Compared()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in _samples():
            try:
                with compared:
                    total = sum(leaf.sum().abs() for leaf in pytree.tree_leaves(call()) if leaf.requires_grad)
                    if isinstance(total, torch.Tensor):
                        total.backward()
            except Exception:  # a sample that is meant to fail, or takes what is not here
                continue
    assert compared.secret <= SCRATCH
    assert aten.native_batch_norm.default in compared.seen and len(compared.seen) > 500


def test_every_operator_with_running_statistics_is_known():
    """Also those for other devices, which cannot be called here."""
    reads = ("no_training", "no_update", "_backward", "functional")
    composed = ("aten::batch_norm", "aten::instance_norm", "aten::_batch_norm_impl_index")
    for schema in torch._C._jit_get_all_schemas():
        said = {one.name for one in schema.arguments if one.alias_info is not None and one.alias_info.is_write}
        secret = {one.name for one in schema.arguments if one.name in ("running_mean", "running_var")} - said
        if schema.name.startswith("aten::") and secret and not any(word in schema.name for word in reads):
            packet = getattr(aten, schema.name.removeprefix("aten::"))
            assert packet in _UNDECLARED or schema.name in composed, schema


@pytest.fixture
def statistics(rng):
    x = torch.randn(6, 3, generator=rng) + 2
    return x, torch.rand(3, generator=rng), torch.rand(3, generator=rng) + 0.5


def _native(x, mean, var, op=aten.native_batch_norm.default):
    return op(x, torch.ones(3), torch.zeros(3), mean, var, True, 0.3, 1e-5)


@pytest.mark.parametrize("op", [op for op in _UNDECLARED if "stats" not in str(op)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_forms_that_say_what_they_write_to(op, training, statistics):
    x, mean, var = statistics
    args = (x, torch.ones(3), None, mean, var, training, 0.3, 1e-5)
    form = with_declared_writes(op.default, args, {})
    assert [id(one) for one in written(op.default, args, {})] == [id(mean), id(var)] * training
    if training:
        new = mean.clone(), var.clone()
        expected = aten.native_batch_norm.default(x, torch.ones(3), None, *new, True, 0.3, 1e-5)
        torch.testing.assert_close(form(*args)[:3], expected)
        torch.testing.assert_close((mean, var), new)
    else:
        assert form is op.default


@pytest.mark.parametrize("op", _BACKWARD, ids=str)
def test_backward_goes_with_the_forms(op, statistics):
    x, mean, var = statistics
    x = x.requires_grad_()
    weight = torch.ones(3, requires_grad=True)
    y, save_mean, inverse = aten.native_batch_norm.default(x, weight, None, mean, var, True, 0.1, 1e-5)
    expected = torch.autograd.grad(y, (x, weight), y.cos())
    args = (x, y.cos(), weight, mean, var, save_mean, inverse, 1e-5, torch.empty(0))
    args = args[: len(op._schema.arguments)]
    torch.testing.assert_close(with_declared_writes(op, args, {})(*args)[:2], expected)


FUNCTIONS = {
    "batch_norm": lambda x, mean, var: F.batch_norm(x, mean, var, training=True, momentum=0.5),
    "affine": lambda x, mean, var: F.batch_norm(x, mean, var, var * 2, mean * 3, training=True),
    "native": lambda x, mean, var: _native(x, mean, var)[0],
    "legit": lambda x, mean, var: _native(x, mean, var, aten._native_batch_norm_legit.default)[0],
    "views": lambda x, mean, var: F.batch_norm(x, mean[:], var.view(3), training=True),
    "instance_norm": lambda x, mean, var: F.instance_norm(x.reshape(2, 3, 3), mean, var, momentum=0.5),
    "module": lambda x, mean, var: torch.func.functional_call(
        torch.nn.BatchNorm1d(3, affine=False), {"running_mean": mean, "running_var": var}, x
    ),
    "evaluated": lambda x, mean, var: F.batch_norm(x, mean, var),
    "without": lambda x, mean, var: F.batch_norm(x, None, None, training=True),
}

# What is returned of a normalized tensor and the new statistics, which are written into copies.
PARTS = {
    "all": lambda y, mean, var: (y, mean, var),
    "states": lambda y, mean, var: (mean, var),
    "variance": lambda y, mean, var: var * 2,
    "loss": lambda y, mean, var: y.square().mean(),
    "old": lambda y, mean, var: None,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_statistics_are_written(name, part, backend, statistics, same):
    def function(x, mean, var):
        new = mean.clone(), var.clone()
        return PARTS[part](FUNCTIONS[name](x, *new), *new), mean, var

    jitted = jit(function, backend=backend)
    for _ in range(2):
        same(jitted(*statistics), function(*statistics))


# torch's rule for vmap of batch_norm asks for the batch size as a number.
@pytest.mark.filterwarnings("ignore:.* needs the size of dimension:RuntimeWarning")
@pytest.mark.parametrize("dynamic", [False, "x"])
@pytest.mark.parametrize("how", ["gradient", "recorded", "vmap"])
@pytest.mark.parametrize("name", ["batch_norm", "affine"])
def test_statistics_are_written_inside_of_transforms(name, how, dynamic, statistics, same):
    def states(x, mean, var):
        new = mean.clone(), var.clone()
        y = FUNCTIONS[name](x, *new)
        return (y[0] * 0 + new[0]).sum(), new

    def function(x, mean, var):
        if how == "gradient":
            return torch.func.grad(lambda bias: states(x + bias, mean, var), has_aux=True)(0 * mean)[1]
        if how == "vmap":
            xs, means, variances = torch.stack([x, 2 * x]), torch.stack([mean, mean]), torch.stack([var, 2 * var])
            return torch.vmap(states)(xs, means, variances)[1]
        return states(x, mean, var)[1]

    x, *rest = statistics
    x = x.requires_grad_(how == "recorded")
    same(jit(function, backend="replay", dynamic=dynamic)(x, *rest), function(x, *rest))


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("evaluated", "without")])
@pytest.mark.parametrize("closed_over", [False, True])
@pytest.mark.parametrize("dynamic", [False, "x"])
def test_statistics_of_others_are_not_written(name, closed_over, dynamic, statistics):
    x, mean, var = statistics
    before = mean.clone()
    function = (lambda x, *_: FUNCTIONS[name](x, mean, var)) if closed_over else FUNCTIONS[name]
    with pytest.raises(TracingError, match="must not change (a tensor that it closes over|an argument) in place"):
        jit(function, backend="replay", dynamic=dynamic if name != "instance_norm" else False)(x, mean, var)
    assert torch.equal(mean, before)


@pytest.mark.parametrize("op", [op for op in _UNDECLARED if "stats" in str(op)], ids=str)
def test_operators_without_another_form_are_refused(op, statistics):
    x, mean, var = statistics
    rest = {"batch_norm_update_stats": (0.1,), "batch_norm_gather_stats": (0.1, 1e-5, 6)}.get(
        op._qualified_op_name.removeprefix("aten::"), (0.1, 1e-5, torch.ones(6))
    )
    moments = () if "update" in str(op) else (mean[None], var[None])
    with pytest.raises(TracingError, match="with running statistics"):
        jit(lambda x: op(x, *moments, mean.clone() + 0 * x[0], var.clone() + 0 * x[0], *rest), backend="replay")(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("train", [True, False])
def test_states_that_are_closed_over(train, recorded, backend, make_key, rng, same):
    model = lt.Chain(lt.Dense(3, 4), lt.BatchNorm(4, "tanh"), lt.Dropout(0.3), lt.Dense(4, 2))
    ps, st = lt.setup(make_key(), model)
    st = st if train else lt.test_mode(st)
    x = torch.randn(6, 3, generator=rng)

    def states(ps):
        return model(x, ps, st)

    def loss(ps):
        return states(ps)[0].square().sum()

    if not recorded:
        same(jit(states, backend=backend)(ps), states(ps))
        return
    ps = pytree.tree_map(lambda leaf: leaf.requires_grad_(), ps)
    leaves = pytree.tree_leaves(ps)
    got = torch.autograd.grad(jit(loss, backend=backend)(ps), leaves)
    same(got, torch.autograd.grad(loss(ps), leaves))
