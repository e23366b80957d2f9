"""Models as programs: saved, loaded, and called on batches of other sizes, they give the model's numbers."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.interop import Inputs, export, from_torch


class Branching(nn.Module):
    """Ask for several inputs, one of which has no batch, and return a dict."""

    def __init__(self):
        super().__init__()
        self.encode = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.norm = nn.BatchNorm1d(5)
        self.rnn = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x, mask, *, scale):
        y, _ = self.rnn(self.norm(self.encode(x, mask)))
        return {"y": y * scale, "mean": y.mean(1)}


def causal():
    return nn.Transformer.generate_square_subsequent_mask(5)


# Each with how an input for a batch of some size is made.
MODELS = {
    "dense": (
        lambda: lt.Chain(lt.Dense(3, 4, torch.tanh), lt.BatchNorm(4), lt.Dropout(0.3), lt.Dense(4, 2)),
        lambda n, normal: normal(n, 3),
    ),
    "convolution": (
        lambda: lt.Chain(
            lt.Conv((3, 3), 3, 4, torch.relu, padding=1),
            lt.BatchNorm(4),
            lt.MaxPool((2, 2)),
            lt.GroupNorm(4, 2),
            lt.GlobalMeanPool(),
            lt.FlattenLayer(),
            lt.Dense(4, 2),
        ),
        lambda n, normal: normal(n, 3, 8, 8),
    ),
    "recurrent": (
        lambda: lt.Chain(lt.Recurrence(lt.LSTMCell(3, 5)), lt.Dense(5, 2)),
        lambda n, normal: normal(n, 3, 3),
    ),
    "both ways": (lambda: lt.BidirectionalRNN(lt.GRUCell(3, 5)), lambda n, normal: normal(n, 3, 3)),
    "attention": (lambda: lt.TransformerEncoderLayer(8, 2, 16), lambda n, normal: normal(n, 6, 8)),
    "tokens": (
        lambda: lt.Chain(lt.Embedding(10, 4), lt.LayerNorm((4,))),
        lambda n, normal: normal(n, 6).abs().mul(3).long().clamp(max=9),
    ),
    "tuple": (lambda: lt.Bilinear(3, 4, 2), lambda n, normal: (normal(n, 3), normal(n, 4))),
    "module": (
        lambda: from_torch(Branching()).layer,
        lambda n, normal: Inputs(normal(n, 5, 8), causal(), scale=torch.tensor(2.0)),
    ),
}


@pytest.fixture
def normal(rng):
    return lambda *shape: torch.randn(*shape, generator=rng)


@pytest.fixture
def make(make_key):
    def make(name):
        if name == "module":
            return from_torch(Branching(), make_key())
        layer = MODELS[name][0]()
        return layer, *lt.setup(make_key(), layer)

    return make


def loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def call(function, x):
    return function(*x.args, **x.kwargs) if isinstance(x, Inputs) else function(x)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["test", pytest.param("train", marks=pytest.mark.slow)])
def test_a_program_gives_the_numbers_of_the_model(name, mode, make, normal):
    layer, ps, st = make(name)
    st = getattr(lt, f"{mode}_mode")(st)
    inputs = MODELS[name][1]
    program = loaded(export(layer, ps, st, inputs(2, normal)))
    for size in (2, 7):
        x = inputs(size, normal)
        y, st = layer(x, ps, st)
        torch.testing.assert_close(call(program, x), y, rtol=1e-4, atol=1e-5)


def test_a_program_in_training_mode_writes_its_buffers(make, normal):
    layer, ps, st = make("dense")
    program = loaded(export(layer, ps, st, normal(2, 3)))
    for size in (2, 7, 4):
        x = normal(size, 3)
        program(x)
        st = layer(x, ps, st)[1]
    buffers = dict(program.named_buffers())
    torch.testing.assert_close(buffers["layer_2.running_var"], st["layer_2"]["running_var"])
    assert torch.equal(buffers["layer_3.rng"].to(torch.uint64), st["layer_3"]["rng"])


def test_a_program_has_values_of_its_own(make, normal):
    layer, ps, st = make("dense")
    st, x = lt.test_mode(st), normal(2, 3)
    y = layer(x, ps, st)[0].clone()
    program = export(layer, lt.ComponentVector(ps), st, x)
    ps["layer_1"]["weight"].zero_()
    torch.testing.assert_close(program.module()(x), y)
    assert set(program.state_dict) >= {"layer_1.weight", "layer_2.running_mean"}


@pytest.mark.slow
def test_a_program_for_inference_runs_without_luxtorch(make, normal, tmp_path):
    layer, ps, st = make("module")
    x = MODELS["module"][1](2, normal)
    torch.export.save(export(layer, ps, lt.test_mode(st), x), tmp_path / "model.pt2")
    torch.save((x.args, x.kwargs), tmp_path / "inputs.pt")
    script = """
import sys, torch
program = torch.export.load("model.pt2").module()
args, kwargs = torch.load("inputs.pt", weights_only=True)
torch.save(program(*args, **kwargs), "outputs.pt")
assert "luxtorch" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, cwd=tmp_path, timeout=300)
    y, _ = layer(x, ps, lt.test_mode(st))
    torch.testing.assert_close(torch.load(tmp_path / "outputs.pt", weights_only=True), y, rtol=1e-4, atol=1e-5)


def test_a_fixed_batch_stays_fixed(make, normal):
    layer, ps, st = make("dense")
    program = export(layer, ps, lt.test_mode(st), normal(1, 3), dynamic_batch=False)
    assert program.module()(normal(1, 3)).shape == (1, 2)
    with pytest.raises((AssertionError, RuntimeError)):
        program.module()(normal(2, 3))


@pytest.mark.parametrize("example", [torch.ones(1, 3), torch.ones(0, 3), torch.tensor(1.0), ()])
def test_an_example_without_a_batch_is_an_error(make, example):
    with pytest.raises(lt.InputError, match="batch"):
        export(*make("dense"), example)


class Called(nn.Module):
    """Make a function a module, which is all that torch exports."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        return self.f(*args)


LAYER = MODELS["dense"][0]()


def functions(normal):
    """Return functions of trees by name, with arguments."""
    ps, st = lt.setup(0, LAYER)
    test, vector, x = lt.test_mode(st), lt.ComponentVector(ps), normal(5, 3)
    matrix = lt.ComponentMatrix(normal(len(vector.flat), len(vector.flat)), vector.axes, vector.axes)
    rule = optim.OptimiserChain(optim.ClipNorm(1.0), optim.Adam(optim.linear(0.1, 0.0, 10)))
    state = optim.setup(rule, vector)
    return {
        "dicts": (lambda ps, st, x: LAYER(x, ps, st), (ps, test, x)),
        "dicts, training": (lambda ps, st, x: LAYER(x, ps, st), (ps, st, x)),
        "vector": (lambda ps, st, x: LAYER(x, ps, st), (vector, test, x)),
        "vector, training": (lambda ps, st, x: LAYER(x, ps, st), (vector, st, x)),
        "made inside": (lambda x: lt.ComponentVector({"a": x, "b": {"c": x[0]}}), (x,)),
        "components": (lambda ps: (2 * ps.layer_1.weight, ps["layer_1"]), (vector,)),
        "matrix": (torch.matmul, (matrix, vector)),
        "inputs": (lambda inputs: inputs.args[0] * inputs.kwargs["scale"], (Inputs(x, scale=x),)),
        "update": (lambda state, ps, gradient: optim.update(state, ps, gradient), (state, vector, vector)),
        "training state": (
            lambda ts, x: (ts, ts.model(x, ts.parameters, ts.states)[0]),
            (training.TrainState(LAYER, ps, test, rule), x),
        ),
    }


def same(got, wanted):
    leaves, structure = pytree.tree_flatten(got)
    others, other = pytree.tree_flatten(wanted)
    assert structure == other
    torch.testing.assert_close(leaves, others)


@pytest.mark.parametrize("name", functions(torch.zeros))
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_functions_of_trees_are_exported_and_saved(name, strict, normal):
    f, args = functions(normal)[name]
    if strict and name in ("update", "training state"):  # torch cannot hold a rule in a structure there
        with pytest.raises(Exception, match="is not a constant"):
            torch.export.export(Called(f), args, strict=True)
        return
    program = torch.export.export(Called(f), args, strict=strict)
    if name == "training state":
        program.example_inputs = None  # torch.load trusts no model
    program = loaded(program)
    _, others = functions(normal)[name]
    same(program(*others), f(*others))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # it writes its buffers
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["test", "train"])
def test_modules_are_exported_and_saved(strict, mode, make, normal):
    layer, ps, st = make("dense")
    st, x = getattr(lt, f"{mode}_mode")(st), normal(4, 3)
    program = loaded(torch.export.export(lt.to_torch(layer, ps, st), (x,), strict=strict))
    torch.testing.assert_close(program(x), layer(x, ps, st)[0])


def test_a_structure_that_cannot_be_saved_is_named(normal):
    layer = lt.Dense(3, 2, lambda x: x.sin())
    ts = training.TrainState(layer, *lt.setup(0, layer), optim.Adam(0.1))
    program = torch.export.export(Called(lambda ts: ts.parameters), (ts,))
    with pytest.raises(lt.InputError, match="functions and classes with names[\\s\\S]*lambda"):
        torch.export.save(program, io.BytesIO())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["dense", "convolution", "recurrent", "attention"])
def test_a_program_goes_to_onnx(name, make, normal, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    layer, ps, st = make(name)
    st, inputs = lt.test_mode(st), MODELS[name][1]
    torch.onnx.export(export(layer, ps, st, inputs(2, normal)), f=tmp_path / "model.onnx", verbose=False)
    model = onnx.load(tmp_path / "model.onnx")
    for size in (2, 5):
        x = inputs(size, normal)
        (y,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), layer(x, ps, st)[0], rtol=1e-4, atol=1e-5)
