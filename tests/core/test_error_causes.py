"""What an error inside a layer is put down to: its own words, unless it is torch's and the tensors bear it out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import luxtorch as lt

MESSAGES = [
    "no such loss type: 'focal'",
    "the dtype of the table is unknown",
    "tensors must have the same dtype",
    "x and mask must have the same dtype, but got Long and Float",
    "'flash' is not implemented for this type",
    "\"my_op\" not implemented for 'Long'",
    "expected scalar type Float but found Long",
    "wrong shape",
    "the size of the vocabulary must match",
    "dimension out of range",
    "device type cuda expected",
    "all tensors must be on the same device",
    "Expected all tensors to be on the same device",
    "several lines, of which\nthe first is shown",
    "",
]
INPUTS = {
    "integers": torch.ones(2, 3, dtype=torch.int64),
    "float64": torch.ones(2, 3, dtype=torch.float64),
    "float32": torch.ones(2, 3),
    "meta": torch.ones(2, 3, device="meta"),
}


def raising(kind, message):
    def function(x):
        raise kind(message)

    return function


class Module(nn.Module):
    """Raise an error in a module of one's own, beside parameters."""

    def __init__(self, error):
        super().__init__()
        self.weight, self.error = nn.Parameter(torch.ones(3)), error

    def forward(self, x):
        raise self.error


class Own(lt.Layer):
    """Raise an error in a layer of one's own that tells what it takes."""

    kind: type
    message: str

    def initial_parameters(self, key):
        return {"weight": torch.ones(3, device=key.device)}

    def expected_input(self):
        return "a tensor of shape (..., 3)"

    def __call__(self, x, ps, st):
        raise self.kind(self.message)


PLACES = {
    "module": lambda kind, message: nn.Sequential(nn.Identity(), Module(kind(message))),
    "layer": lambda kind, message: lt.Chain(lt.NoOpLayer(), Own(kind, message)),
    "function": lambda kind, message: lt.Chain(lt.NoOpLayer(), raising(kind, message)),
    "normalization": lambda kind, message: lt.Chain(lt.NoOpLayer(), lt.PReLU(), raising(kind, message)),
}


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError, IndexError])
@pytest.mark.parametrize("place", PLACES)
def test_what_a_user_raises_keeps_its_own_words(place, kind):
    for message in MESSAGES:
        model = PLACES[place](kind, message)
        model, ps, st = lt.from_torch(model) if isinstance(model, nn.Module) else (model, *lt.setup(0, model))
        for name, x in INPUTS.items():
            if place == "normalization" and name != "float32":
                continue
            with pytest.raises(lt.LayerError) as caught:
                model(x, ps, st)
            first = message.splitlines()[0] if message else "(no message)"
            assert caught.value.problem == f"{kind.__name__} in the layer: {first}"
            assert caught.value.where.startswith(f"model.{(*st,)[-1]}"), caught.value.where
            assert type(caught.value.__cause__) is kind


@pytest.mark.parametrize("message", MESSAGES)
def test_an_activation_that_fails_is_not_the_input_that_does_not_fit(message):
    model = lt.Dense(3, 4, raising(RuntimeError, message))
    with pytest.raises(lt.LayerError, match="RuntimeError in the layer"):
        model(torch.ones(2, 3), *lt.setup(0, model))
    model = lt.Dense(3, 4, lambda x: x @ x)
    with pytest.raises(lt.LayerError, match=r"RuntimeError in the layer: mat1 and mat2 shapes") as caught:
        model(torch.ones(2, 3), *lt.setup(0, model))
    assert "(..., 3)" in str(caught.value)


def test_parameters_of_another_shape_do_not_hide_what_a_user_raises():
    model = Own(ValueError, "no such kind")
    with pytest.raises(lt.LayerError, match="ValueError in the layer: no such kind"):
        model(torch.ones(2, 3), {"weight": torch.ones(4)}, {})
    model = lt.Dense(3, 4)
    with pytest.raises(lt.InputError, match="'weight' must have the layer's shape") as caught:
        model(torch.ones(2, 3), {"weight": torch.ones(4, 5), "bias": torch.ones(4)}, {})
    assert "The cause: RuntimeError: mat1 and mat2 shapes cannot be multiplied" in str(caught.value)


class Tokens(nn.Module):
    """Take integers, rightly, and fail inside by a mistake of dtype that has nothing to do with them."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, tokens):
        return self.table(tokens) @ torch.ones(3, 2, dtype=torch.float64)


def test_dtypes_that_differ_elsewhere_are_not_those_of_the_input():
    model, ps, st = lt.from_torch(Tokens())
    with pytest.raises(lt.LayerError, match=r"RuntimeError in the layer: (expected|mat1)"):
        model(torch.tensor([1, 2]), ps, st)


LAYERS = {
    "Dense": (lt.Dense(3, 4), (2, 3)),
    "Scale": (lt.Scale(3), (2, 3)),
    "Bilinear": (lt.Bilinear(3, 3, 2), (2, 3)),
    "Conv": (lt.Conv((2,), 3, 4), (2, 3, 5)),
    "ConvTranspose": (lt.ConvTranspose((2,), 3, 4), (2, 3, 5)),
    "BatchNorm": (lt.BatchNorm(3), (4, 3)),
    "LayerNorm": (lt.LayerNorm(3), (2, 3)),
    "RMSNorm": (lt.RMSNorm(3), (2, 3)),
    "GroupNorm": (lt.GroupNorm(4, 2), (2, 4, 3)),
    "InstanceNorm": (lt.InstanceNorm(3, affine=True), (2, 3, 4)),
    "PReLU": (lt.PReLU(), (2, 3)),
    "Recurrence": (lt.Recurrence(lt.LSTMCell(3, 4)), (2, 5, 3)),
    "GRUCell": (lt.Recurrence(lt.GRUCell(3, 4)), (2, 5, 3)),
    "RNNCell": (lt.Recurrence(lt.RNNCell(3, 4)), (2, 5, 3)),
    "MultiHeadAttention": (lt.MultiHeadAttention(4, num_heads=2), (2, 5, 4)),
    "TransformerEncoderLayer": (lt.TransformerEncoderLayer(4, 2, 8), (2, 5, 4)),
}
MODULES = {
    "Linear": (lambda: nn.Linear(3, 4), (2, 3)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 2), (2, 3, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 2), (2, 3, 4, 5)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(3), (2, 3)),
    "RMSNorm": (lambda: nn.RMSNorm(3), (2, 3)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, affine=True), (2, 3, 4)),
    "InstanceNorm1d, running": (lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), (2, 3, 4)),
    "PReLU": (nn.PReLU, (2, 3)),
    "RNN": (lambda: nn.RNN(3, 4), (2, 5, 3)),
    "LSTM": (lambda: nn.LSTM(3, 4), (2, 5, 3)),
    "GRU": (lambda: nn.GRU(3, 4), (2, 5, 3)),
    "LSTMCell": (lambda: nn.LSTMCell(3, 4), (2, 3)),
    "GRUCell": (lambda: nn.GRUCell(3, 4), (2, 3)),
    "RNNCell": (lambda: nn.RNNCell(3, 4), (2, 3)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(4, 2, 8), (2, 5, 4)),
    "of one's own": (lambda: Weighted(lambda x, w: x @ w), (2, 3)),
    "mv": (lambda: Weighted(lambda x, w: torch.mv(x, w[:, 0])), (2, 3)),
    "bmm": (lambda: Weighted(lambda x, w: torch.bmm(x, w.expand(2, 3, 3))), (2, 3, 3)),
    "baddbmm": (lambda: Weighted(lambda x, w: torch.baddbmm(x, w.expand(2, 3, 3), w.expand(2, 3, 3))), (2, 3, 3)),
    "attention": (lambda: Weighted(lambda x, w: F.scaled_dot_product_attention(x, w, w)), (3, 3)),
    "solve": (lambda: Weighted(lambda x, w: torch.linalg.solve(w + torch.eye(3), x)), (3, 3)),
    "index_add": (lambda: Weighted(lambda x, w: w.index_add(0, torch.arange(3), x)), (3, 3)),
    "tensordot": (lambda: Weighted(lambda x, w: torch.tensordot(x, w, 1)), (2, 3)),
    "einsum": (lambda: Weighted(lambda x, w: torch.einsum("ij,jk->ik", x, w)), (2, 3)),
    "scatter": (lambda: Weighted(lambda x, w: w.scatter(0, torch.zeros(3, 3, dtype=torch.int64), x)), (3, 3)),
    "masked_scatter": (lambda: Weighted(lambda x, w: w.masked_scatter(w > 0, x)), (3, 3)),
    "index_put": (lambda: Weighted(lambda x, w: w.index_put((torch.arange(3),), x)), (3, 3)),
    "lerp": (lambda: Weighted(lambda x, w: torch.lerp(w, x, 0.5)), (3, 3)),
    "functional conv": (lambda: Weighted(lambda x, w: F.conv1d(x, w[:, :, None])), (2, 3, 5)),
}


class Weighted(nn.Module):
    """Call a function of an input and a weight."""

    def __init__(self, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(3, 3)), function

    def forward(self, x):
        return self.function(x, self.weight)


DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


def models():
    yield from ((name, layer, *lt.setup(0, layer), shape) for name, (layer, shape) in LAYERS.items())
    yield from ((name, *lt.from_torch(make()), shape) for name, (make, shape) in MODULES.items())


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_dtype_of_the_input_is_told_as_that(dtype):
    told = set()
    for name, layer, ps, st, shape in models():
        x = torch.ones(shape).to(dtype)
        x = (x, x) if name == "Bilinear" else x
        try:
            layer(x, ps, st)
        except Exception as error:
            assert type(error) is lt.DTypeError, (name, error)
            assert "expected: torch.float32" in str(error) and str(dtype) in str(error), (name, error)
            told.add(name)
    assert {"Dense", "Conv", "PReLU", "Linear", "LSTM", "of one's own", "bmm", "solve", "scatter"} <= told


def test_an_input_on_another_device_is_told_as_that():
    told = set()
    for name, layer, ps, st, shape in models():
        x = torch.ones(shape, device="meta")
        if "Weighted" in repr(layer):  # some functions of torch read what is not there
            continue
        try:
            layer((x, x) if name == "Bilinear" else x, ps, st)
        except Exception as error:
            if type(error) is lt.InputError and "device" in str(error):
                assert "must be on the device of the parameters" in str(error), (name, error)
                assert "expected: cpu" in str(error) and "The cause: RuntimeError: " in str(error)
                told.add(name)
            else:
                assert type(error) is lt.LayerError, (name, error)
    assert {"Dense", "LayerNorm", "Linear", "LSTM"} <= told
