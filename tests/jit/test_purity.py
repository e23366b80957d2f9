"""What cannot be in a graph is an error that names the operator and the user's line."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import luxtorch as lt
from luxtorch.core import DTypeError, InputError, KeyNameError, LuxtorchError
from luxtorch.jit import TracingError, jit

HERE = re.escape(__file__)
BUFFER = torch.zeros(3)
KEPT = []

DRAWS = {
    "rand": lambda x: x + torch.rand(3),
    "randn_like": lambda x: x + torch.randn_like(x),
    "normal_": lambda x: torch.empty(3).normal_() + x,
    "bernoulli": lambda x: torch.bernoulli(x.abs().clamp(0, 1)),
    "randperm": lambda x: x[torch.randperm(3)],
    "dropout": lambda x: torch.nn.functional.dropout(x, 0.5),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(
        x[None, None, None], x[None, None, None], x[None, None, None], dropout_p=0.5
    ),
    "own generator": lambda x: x + torch.rand(3, generator=torch.Generator()),
}

READS = {
    "if": lambda x: x if x.sum() > 0 else -x,
    "item": lambda x: x * x.sum().item(),
    "float": lambda x: x * float(x[0]),
    "tolist": lambda x: x * x.tolist()[0],
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: x if torch.equal(x, x + 1) else -x,
    "numpy": lambda x: x.numpy(),
}

CHANGES = {
    "add_": lambda x: x.add_(1),
    "view": lambda x: x[:2].mul_(2),
    "item": lambda x: x.__setitem__(0, 1.0),
    "out": lambda x: torch.sin(x, out=x),
    "foreach": lambda x: torch._foreach_add_([x], 1),
    "closed over": lambda x: BUFFER.add_(x),
    "view of what is closed over": lambda x: BUFFER[1:].add_(x[1:]),
    "known value": lambda x: BUFFER.add_(1),
    "batch_norm": lambda x: F.batch_norm(x.expand(2, 3), x, torch.ones(3), training=True),
    "batch_norm, closed over": lambda x: F.batch_norm(x.expand(2, 3), torch.zeros(3), BUFFER, training=True),
    "instance_norm": lambda x: F.instance_norm(x.expand(2, 3, 3), x, torch.ones(3)),
    "native_batch_norm": lambda x: torch.native_batch_norm(x.expand(2, 3), None, None, BUFFER, x, True, 0.1, 1e-5),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws(name):
    with pytest.raises(
        TracingError, match=f"{HERE}:\\d+: A jitted function must not draw from a generator.*aten"
    ) as caught:
        jit(DRAWS[name], backend="replay")(torch.ones(3))
    assert "luxtorch.random" in caught.value.fix


def test_what_could_draw_but_does_not(same):
    x = torch.ones(1, 1, 2, 3)

    def function(x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x), torch.nn.functional.dropout(x, 0.5, False)

    same(jit(function, backend="replay")(x), function(x))


@pytest.mark.parametrize("name", READS)
def test_values(name):
    with pytest.raises(
        TracingError, match="A jitted function must not (depend on the value|read the values)"
    ) as caught:
        jit(READS[name], backend="replay")(torch.ones(3))
    assert name == "numpy" or caught.value.where.startswith(__file__)


def test_values_of_constants_are_known(same):
    got = jit(lambda x: x * BUFFER[0].item() + (1 if BUFFER.sum() == 0 else 2), backend="replay")(torch.ones(3))
    assert torch.equal(got, torch.ones(3))


@pytest.mark.parametrize("transform", [lambda function: function, torch.func.grad], ids=["plain", "grad"])
def test_positions_and_masks_are_known(transform):
    def function(x):
        steps, made = torch.arange(8).diff(), torch.arange(3.0)  # transformers asks so whether a row is one sequence
        made += x
        mask = torch.ones(2, 3)  # and so whether there is padding
        mask[0] *= x
        return (x * made * mask).sum() if (steps == 1).all() and torch.ones(3).all() else x.sum()

    jitted = jit(transform(function), backend="replay")
    for x in (torch.ones(3), torch.arange(3.0)):
        assert torch.equal(jitted(x), transform(function)(x))


def _views(x):
    made = torch.zeros_like(BUFFER)
    view, other = made[1:], made.view(3, 1).t()
    made.add_(x)
    view.mul_(x[1:])
    return made * made, view.clone(), other, made.max()


def _statistics(x):
    mean, var = torch.zeros_like(BUFFER), torch.ones_like(BUFFER)
    y = F.batch_norm(x * torch.arange(4.0)[:, None], mean, var, training=True)
    return y, mean * var, var


def _noncontiguous(x):
    made = BUFFER.new_zeros(2, 3).t()
    made[1:, 0] = x[1:]
    return made, made.contiguous().view(-1)


# Functions that write to tensors that they have made of closed-over ones.
OWN = {
    "clone": lambda x: BUFFER.clone().add_(x),
    "zeros_like": lambda x: torch.zeros_like(BUFFER).add_(x),
    "new_zeros": lambda x: BUFFER.new_zeros(3).add_(x),
    "empty_like": lambda x: torch.empty_like(BUFFER).copy_(x),
    "computed": lambda x: (BUFFER + 1).mul_(x).sin_(),
    "literal": lambda x: torch.tensor([1.0, 2.0, 3.0]).add_(x),
    "out": lambda x: torch.sin(x, out=BUFFER.clone()),
    "item": lambda x: BUFFER.clone().index_put_((torch.tensor([0, 2]),), x[:2]),
    "foreach": lambda x: [made := [BUFFER.clone(), BUFFER + 1], torch._foreach_add_(made, [x, 2 * x])][0],
    "twice": lambda x: BUFFER.clone().add_(1).add_(x).add_(1),
    "read before": lambda x: [made := BUFFER + 2, made.sum().item() * made * x, made.add_(x)][1:],
    "real part": lambda x: [made := (BUFFER * 1j), torch.view_as_real(made).add_(x[:, None]), made.abs()][2],
    "integers": lambda x: (BUFFER > 1).logical_or_(x > 0),
    "list": lambda x: sum([BUFFER.clone().add_(x * i) for i in range(3)]),
    "views": _views,
    "statistics": _statistics,
    "not contiguous": _noncontiguous,
    "vmap": lambda x: torch.vmap(lambda x: x.clone().add_(BUFFER + 1))(torch.stack([x, 2 * x])),
}


WITHOUT_GRADIENT = ("read before", "integers", "out", "views")


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, "plain") for name in OWN]
    + [(name, how) for name in OWN if name not in WITHOUT_GRADIENT for how in ("gradient inside", "recorded")],
)
def test_constants_of_the_functions_own_may_be_changed(name, how, same):
    def total(x):
        return sum(leaf.double().cos().sum() for leaf in torch.utils._pytree.tree_leaves(OWN[name](x)))

    def gradient(f):
        if how == "gradient inside":
            return lambda x: torch.autograd.grad(total(x := x.detach().requires_grad_()), x)
        return lambda x: torch.autograd.grad(f(x := x.clone().requires_grad_()), x)

    if how == "plain":
        expected = OWN[name]
        jitted = jit(expected, backend="replay")
    else:
        expected = gradient(total)
        jitted = jit(expected, backend="replay") if how == "gradient inside" else gradient(jit(total, backend="replay"))
    for scale in (1.0, 2.0, 1.0):
        x = scale * torch.tensor([0.5, 1.0, -1.5])
        same(jitted(x), expected(x))
    assert torch.equal(BUFFER, torch.zeros(3))


@pytest.mark.parametrize(
    ("read", "inside"), [(Tensor.tolist, False), (Tensor.item, False), (Tensor.numpy, False), (Tensor.item, True)]
)
def test_what_was_written_to_a_constant_is_not_known(read, inside):
    def function(x):
        made = BUFFER[0].clone()
        read(made)
        made.add_(x)
        return x * read(made)

    with pytest.raises(TracingError, match="must not depend on the value of a tensor"):
        jit(torch.func.grad(function) if inside else function, backend="replay")(torch.tensor(1.0))


def test_constants_that_are_returned_are_new_at_each_call():
    jitted = jit(lambda x: (x, BUFFER + 1, torch.tensor([1.0, 2.0])), backend="replay")
    for _ in range(2):
        _, one, two = jitted(torch.ones(3))
        assert torch.equal(one.add_(1), torch.full((3,), 2.0)) and torch.equal(two.mul_(2), torch.tensor([2.0, 4.0]))


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("donate", [(), "x"])
def test_changes(name, donate):
    x = torch.ones(3)
    with pytest.raises(
        TracingError, match=f"{HERE}:\\d+: A jitted function must not change (an argument|a tensor that it)"
    ):
        jit(CHANGES[name], backend="replay", donate=donate)(x)
    assert torch.equal(x, torch.ones(3)) and torch.equal(BUFFER, torch.zeros(3))


def test_leaks():
    with pytest.raises(TracingError, match=f"{HERE}:\\d+: A jitted function must not keep a result of aten.sin"):
        jit(lambda x: KEPT.append(x.sin()), backend="replay")(torch.ones(3))
    KEPT.clear()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_closing_over_what_requires_grad(grad, direct):
    weight = torch.ones(3, requires_grad=True)
    jitted = jit((lambda x: x * weight) if direct else (lambda x: x * weight.flip(0)), backend="replay")
    detached = jit(lambda x: x * weight.detach().flip(0), backend="replay")
    with torch.set_grad_enabled(grad):
        assert torch.equal(detached(torch.ones(3)), torch.ones(3))
        if grad:
            with pytest.raises(InputError, match="close over a tensor that requires grad"):
                jitted(torch.ones(3))
        else:
            assert torch.equal(jitted(torch.ones(3)), torch.ones(3))


INSIDES = {
    # What torch's insides would say, and what the plain call raises, if anything.
    "format": (lambda x: f"{x[0]:.2f}", None),
    "save": (lambda x: torch.save(x, io.BytesIO()), None),
    "pickle": (lambda x: pickle.dumps(x), None),
    "deepcopy": (lambda x: copy.deepcopy(x), None),
    "address": (lambda x: x * (1 if x.data_ptr() else 0), None),
    "address of the storage": (lambda x: x * (x.untyped_storage().data_ptr() > 0), None),
    "array": (lambda x: np.asarray(x), None),
    "function of numpy": (lambda x: np.sin(x), None),
    "dlpack": (lambda x: torch.from_dlpack(x), None),
    "tensor of tensors": (lambda x: torch.tensor([x[0], x[1]]), None),
    "tensor_split": (lambda x: torch.tensor_split(x, x.long()), None),
    "nested": (lambda x: torch.nested.nested_tensor([x, x]), None),
    "shape": (lambda x: x @ torch.ones(4), RuntimeError),
    "cat": (lambda x: torch.cat([x, x[None]]), RuntimeError),
    "reshape": (lambda x: x.reshape(2, 2), RuntimeError),
    "index": (lambda x: x[5], IndexError),
    "dtype": (lambda x: x.double() @ x, RuntimeError),
    "device": (lambda x: x + torch.ones(3, device="meta"), RuntimeError),
    "value error": (lambda x: torch.nn.functional.dropout(x, 1.5), ValueError),
    "if under vmap": (lambda x: torch.vmap(lambda y: y if y > 0 else -y)(x), RuntimeError),
    "hook": (lambda x: x.register_hook(print), RuntimeError),
}


@pytest.mark.parametrize("name", INSIDES)
def test_errors_of_torchs_insides_have_the_users_line(name):
    function, plain = INSIDES[name]
    with pytest.raises(TracingError, match=f"{HERE}:\\d+: A jitted function ") as caught:
        jit(function, backend="replay")(torch.ones(3))
    assert caught.value.__cause__ is not None
    if plain is not None:
        with pytest.raises(plain):
            function(torch.ones(3))
        assert isinstance(caught.value, plain) and type(pickle.loads(pickle.dumps(caught.value))) is TracingError


@pytest.mark.parametrize("args", [lambda x, m, v: x.index_put((m,), v), lambda x, m, v: x.clone().index_put_((m,), v)])
def test_errors_of_a_derivative_that_cannot_be_traced(args):
    x, mask, v = torch.ones(3, requires_grad=True), torch.tensor([True, False, True]), torch.ones(2, requires_grad=True)
    with pytest.raises(TracingError, match=f"{HERE}:\\d+: A jitted function must not depend on the value of a tensor"):
        jit(args, backend="replay")(x, mask, v)


def test_an_error_that_the_function_catches_is_no_error():
    def function(x):
        try:
            return x @ torch.ones(4)
        except RuntimeError:
            return x + 7

    assert torch.equal(jit(function, backend="replay")(torch.ones(3)), torch.full((3,), 8.0))


def test_printing_is_a_help_while_tracing(capsys):
    jit(lambda x: (print(x), x)[1], backend="replay")(torch.ones(3))
    assert "size=(3,)" in capsys.readouterr().out


OTHERS = {
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "negated": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "without memory": lambda: torch._efficientzerotensor(3),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHERS)
def test_tensors_that_compilers_misread(name):
    with pytest.raises(DTypeError, match=f"plain dense tensors(.|\n)*{name}"):
        jit(lambda x: x, backend="replay")(OTHERS[name]())


@pytest.mark.parametrize("error", [KeyError, ValueError, RuntimeError, ZeroDivisionError, StopIteration])
def test_errors_of_the_function_are_its_own(error):
    def fails(x):
        raise error("mine")

    with pytest.raises(error, match="mine") as caught:
        jit(fails, backend="replay")(torch.ones(3))
    assert type(caught.value) is error and caught.traceback[-1].name == "fails"


def test_errors_of_layers_name_their_place():
    model = lt.Chain(lt.Dense(3, 2), lt.Dense(3, 2))
    ps, st = lt.setup(0, model)
    with pytest.raises(LuxtorchError, match="layer_2"):
        jit(lambda ps, x: model(x, ps, st)[0], backend="replay")(ps, torch.ones(1, 3))


def test_what_is_raised_is_not_logged_as_well(monkeypatch):
    logger, seen = logging.getLogger("torch._subclasses.fake_tensor"), []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", seen.append)
    monkeypatch.setattr(logger, "handlers", [handler])
    model = lt.Dense(2, 3)
    ps, st = lt.setup(0, model)
    with pytest.raises(InputError, match="does not fit the layer"):
        jit(lambda x: model(x, ps, st)[0], backend="replay")(torch.ones(4, 5))
    assert not seen and not logger.disabled


def test_after_an_error_all_is_as_before(same):
    with pytest.raises(TracingError):
        jit(DRAWS["rand"], backend="replay")(torch.ones(3))
    assert not torch._C._len_torch_dispatch_stack()
    same(jit(torch.sin, backend="replay")(torch.ones(3)), torch.sin(torch.ones(3)))


def test_arrays_of_numpy():
    with pytest.raises(DTypeError, match="must be a tensor or a constant"):
        jit(lambda x, y: x, backend="replay")(torch.ones(3), np.ones(3))


@pytest.mark.parametrize(
    "make", [lambda: torch.eye(2).to_sparse(), lambda: FakeTensorMode().from_tensor(torch.ones(2))]
)
def test_other_kinds_of_tensors(make):
    with pytest.raises(DTypeError, match="plain dense tensors"):
        jit(lambda x: x, backend="replay")(make())


@pytest.mark.parametrize("setting", ["donate", "static", "dynamic"])
def test_unknown_names(setting):
    with pytest.raises(KeyNameError, match="no argument 'parms'"):
        jit(lambda params: params, **{setting: "parms"})


def test_settings_that_do_not_fit():
    with pytest.raises(InputError, match="both donated and static"):
        jit(lambda x: x, donate="x", static="x")
    with pytest.raises(InputError, match="backend must be"):
        jit(lambda x: x, backend="fast")
    with pytest.raises(InputError, match="must be a single argument"):
        jit(lambda *xs: xs, donate="xs")


def test_outputs_that_torch_does_not_write_to_while_it_traces():
    def rank(x):
        out = torch.zeros((), dtype=torch.int64)
        torch.linalg.matrix_rank(x, out=out)
        return out

    with pytest.raises(TracingError, match=f"{HERE}:.*pass out= to torch.linalg.matrix_rank"):
        jit(rank, backend="replay")(torch.eye(3))


def test_outputs_that_are_written_to():
    def written(x):
        out, values, indices = torch.zeros(3), x.new_empty(0), torch.empty(0, dtype=torch.int64)
        torch.sort(torch.add(x, 1, out=out), out=(values, indices))
        return out, values, indices

    x = torch.tensor([3.0, 1.0, 2.0])
    for got, wanted in zip(jit(written, backend="replay")(x), written(x), strict=True):
        assert torch.equal(got, wanted)
