"""Compiled functions as files: they give what the function gives, for arguments like those that were exported."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.jit import _export, jit

from .conftest import compiled

pytestmark = [pytest.mark.slow, compiled]


def activation(x):
    return x.relu()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def model():
    return lt.Chain(lt.Dense(3, 4, torch.tanh), lt.Dense(4, 2))


@pytest.fixture(scope="module")
def trees(model):
    return lt.setup(0, model)


@pytest.fixture(scope="module")
def path(folder, model, trees):
    """A model whose batch may have any size, with a constant, a keyword and a result that is a number."""

    def predict(ps, x, *, scale, kind="plain"):
        y, _ = model(x, ps, trees[1])
        return {"y": y * scale, "count": x.shape[0], "kind": kind, "x": x}

    # Parameters are closed over by nothing: they are arguments, as in a checkpoint that is loaded.
    jitted = jit(predict, dynamic="x", backend="replay")
    return jitted.export(folder / "model.pt2", trees[0], torch.zeros(8, 3), scale=torch.ones(()))


@pytest.fixture
def loaded(path):
    return lt.load_jitted(path)


def expected(model, trees, x, scale):
    return model(x, trees[0], trees[1])[0] * scale


@pytest.mark.parametrize("size", [2, 3, 8, 100])
def test_the_batch_may_have_any_size(loaded, model, trees, rng, size):
    x, scale = torch.randn(size, 3, generator=rng), torch.tensor(2.0)
    got = loaded(trees[0], x, scale=scale)
    torch.testing.assert_close(got["y"], expected(model, trees, x, scale))
    assert got["count"] == size and got["kind"] == "plain" and got["x"].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_runs_in_every_grad_mode(loaded, model, trees, rng, mode):
    with mode():
        x = torch.randn(4, 3, generator=rng)
        got = loaded(trees[0], x, scale=torch.ones(()))["y"]
        torch.testing.assert_close(got, expected(model, trees, x, 1.0))
        assert not got.requires_grad


def test_other_strides_are_copied(loaded, model, trees, rng):
    x = torch.randn(3, 5, generator=rng).T
    ps = {name: {"weight": p["weight"].T.contiguous().T, "bias": p["bias"]} for name, p in trees[0].items()}
    got = loaded(ps, x, scale=torch.ones(()))["y"]
    torch.testing.assert_close(got, expected(model, trees, x, 1.0))


BAD = {
    "another width": (
        lambda ps, x: ((ps, x[:, :2]), {"scale": torch.ones(())}),
        r"(?s)argument 1: .*at least 2, 3",
    ),
    "one dimension less": (lambda ps, x: ((ps, x[0]), {"scale": torch.ones(())}), "argument 1"),
    "an empty batch": (lambda ps, x: ((ps, x[:0]), {"scale": torch.ones(())}), "argument 1"),
    "a batch of one": (lambda ps, x: ((ps, x[:1]), {"scale": torch.ones(())}), "argument 1"),
    "another dtype": (lambda ps, x: ((ps, x.double()), {"scale": torch.ones(())}), "argument 1"),
    "a number for a tensor": (lambda ps, x: ((ps, x), {"scale": 1.0}), "scale"),
    "another constant": (lambda ps, x: ((ps, x), {"scale": torch.ones(()), "kind": "plain"}), "like those"),
    "a key less": (lambda ps, x: (({"layer_1": ps["layer_1"]}, x), {"scale": torch.ones(())}), "like those"),
    "an argument less": (lambda ps, x: ((ps,), {"scale": torch.ones(())}), "like those"),
    "requires grad": (lambda ps, x: ((ps, x.requires_grad_()), {"scale": torch.ones(())}), "no derivative"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_arguments_are_refused(loaded, trees, name):
    make, match = BAD[name]
    args, kwargs = make(trees[0], torch.zeros(4, 3))
    with pytest.raises(lt.InputError, match=match):
        loaded(*args, **kwargs)


def test_tensors_that_require_grad_are_taken_where_nothing_is_recorded(loaded, model, trees, rng):
    x = torch.randn(4, 3, generator=rng, requires_grad=True)
    with torch.no_grad():
        got = loaded(trees[0], x, scale=torch.ones(()))["y"]
    torch.testing.assert_close(got, expected(model, trees, x.detach(), 1.0))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jit"])
def test_it_is_refused_inside_of_transforms(loaded, trees, transform):
    def run(x):
        return loaded(trees[0], x, scale=torch.ones(()))["y"].sum()

    x = torch.zeros(4, 3)
    calls = {
        "grad": lambda: torch.func.grad(run)(x),
        "vmap": lambda: torch.func.vmap(run)(torch.stack([x, x])),
        "jvp": lambda: torch.func.jvp(run, (x,), (x,)),
        "jit": lambda: jit(run, backend="replay")(x),
    }
    with pytest.raises(lt.InputError, match="inside of transforms"):
        calls[transform]()


def test_another_process_runs_it_without_a_compiler(path, trees, rng):
    script = """
import pickle, sys
import torch, luxtorch as lt
ps, x = pickle.loads(sys.stdin.buffer.read())
y = lt.load_jitted(sys.argv[1])(ps, x, scale=torch.ones(()))["y"]
print(any(name.startswith(("torch._inductor", "torch._dynamo")) for name in sys.modules))
print(pickle.dumps(y).hex())
"""
    x = torch.randn(6, 3, generator=rng)
    environment = {**os.environ, "CXX": "no-such-compiler", "PATH": ""}
    ran = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        input=pickle.dumps((trees[0], x)),
        capture_output=True,
        env=environment,
        check=True,
    )
    first, y = ran.stdout.decode().splitlines()
    assert first == "False"
    model = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.Dense(4, 2))
    torch.testing.assert_close(pickle.loads(bytes.fromhex(y)), expected(model, trees, x, 1.0))


def test_a_whole_training_step(folder, model, trees, same):
    ts = training.TrainState(model, lt.ComponentVector(trees[0]), trees[1], optim.Adam(0.01))
    batch = torch.linspace(0, 1, 12).reshape(4, 3), torch.ones(4, 2)
    loss = lt.losses.MSELoss()

    def step(ts, batch):
        _, value, _, ts = training.single_train_step(loss, batch, ts)
        return value, ts

    loaded = lt.load_jitted(jit(step, donate="ts").export(folder / "step.pt2", ts, batch))
    got, wanted = ts, ts
    for _ in range(3):
        value, got = loaded(got, batch)
        value_2, wanted = step(wanted, batch)
        same(value, value_2)
    same(got, wanted)


def test_constants_and_dropout_are_in_the_file(folder):
    table = torch.arange(3.0)
    layer = lt.Dropout(0.5)
    ps, st = lt.setup(0, layer)

    def function(x, st):
        return layer(x * table, ps, st)

    x = torch.ones(50, 3)
    loaded = lt.load_jitted(jit(function).export(folder / "constants.pt2", x, st))
    y, new = loaded(x, st)
    y_2, new_2 = function(x, st)
    assert torch.equal(y, y_2)
    assert new.keys() == new_2.keys()


def test_a_gradient_is_exported(folder, model, trees):
    def gradient(ps, x):
        return lt.gradient(lambda ps: model(x, ps, trees[1])[0].square().sum(), ps)

    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    loaded = lt.load_jitted(jit(gradient, backend="replay").export(folder / "gradient.pt2", trees[0], x))
    for name, one in loaded(trees[0], x).items():
        for key, value in gradient(trees[0], x)[name].items():
            torch.testing.assert_close(one[key], value)


def test_without_arguments_it_exports_the_latest_program(folder):
    jitted = jit(lambda x: x.sin(), backend="replay")
    with pytest.raises(lt.InputError, match="there are none yet"):
        jitted.export(folder / "latest.pt2")
    jitted(torch.ones(2, 3).T)
    x = torch.linspace(0, 1, 6).reshape(2, 3).T
    torch.testing.assert_close(lt.load_jitted(jitted.export(folder / "latest.pt2"))(x), x.sin())


def test_static_arguments_are_compared(folder):
    jitted = jit(lambda x, sizes: x.reshape(sizes) + 1, static="sizes", backend="replay")
    loaded = lt.load_jitted(jitted.export(folder / "static.pt2", torch.ones(6), sizes=[2, 3]))
    assert loaded(torch.ones(6), sizes=[2, 3]).shape == (2, 3)
    with pytest.raises(lt.InputError, match="like those"):
        loaded(torch.ones(6), sizes=[3, 2])


def test_constants_are_pickled_or_refused(folder):
    def apply(f, x):
        return f(x)

    jitted = jit(apply, backend="replay")
    loaded = lt.load_jitted(jitted.export(folder / "function.pt2", activation, torch.ones(2)))
    assert torch.equal(loaded(activation, -torch.ones(2)), torch.zeros(2))
    with pytest.raises(lt.InputError, match="like those"):
        loaded(torch.sin, torch.ones(2))
    with pytest.raises(lt.InputError, match="must be pickled"):
        jitted.export(folder / "lambda.pt2", lambda x: x + 1, torch.ones(2))


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x: lt.scan(lambda c, x: (c + x, c), torch.zeros(()), x), "a loop or branch"),
        (lambda x: x, "must compute something"),
    ],
)
def test_what_cannot_be_exported_is_refused(folder, function, match):
    with pytest.raises(lt.InputError, match=match):
        jit(function, backend="replay").export(folder / "refused.pt2", torch.ones(4))
    assert not (folder / "refused.pt2").exists()


def test_the_name_ends_with_pt2(folder):
    with pytest.raises(lt.InputError, match="must end with .pt2"):
        jit(torch.sin).export(folder / "model.bin", torch.ones(2))


def test_other_files_are_refused(folder):
    with pytest.raises(lt.InputError, match="no such file"):
        lt.load_jitted(folder / "nothing.pt2")
    (folder / "text.pt2").write_text("text")
    with zipfile.ZipFile(folder / "zip.pt2", "w") as file:
        file.writestr("a", "b")
    for name in ("text.pt2", "zip.pt2"):
        with pytest.raises(lt.InputError, match="not written by"):
            lt.load_jitted(folder / name)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("torch", "1.0", "version of torch"),
        ("machine", "pdp11", "version of torch"),
        ("instructions", "", "lacks instructions"),
    ],
)
def test_other_machines_are_refused(path, monkeypatch, name, value, match):
    here = _export._machine()
    monkeypatch.setattr(_export, "_machine", lambda: {**here, name: value})
    with pytest.raises(lt.errors.LuxtorchError, match=match):
        lt.load_jitted(path)


def test_dataclasses_of_torch_are_nodes_in_the_next_process(folder, tmp_path, rng):
    module = tmp_path / "exported_nodes.py"
    module.write_text(
        "from dataclasses import dataclass\nimport torch\nimport torch.utils._pytree as pytree\n"
        "@dataclass\nclass Pair:\n    a: torch.Tensor\n    b: torch.Tensor\n"
        "pytree.register_dataclass(Pair)\n"
        "def turned(pair):\n    return Pair(pair.b, pair.a + 1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(lt.__file__).parent.parent)])}
    write = (
        "import torch, luxtorch as lt, exported_nodes as m; "
        "lt.jit(m.turned, backend='replay').export('pair.pt2', m.Pair(torch.zeros(2), torch.ones(2)))"
    )
    read = (
        "import torch, luxtorch as lt, exported_nodes as m; "
        "p = lt.load_jitted('pair.pt2')(m.Pair(torch.zeros(2), torch.ones(2))); "
        "print(type(p).__name__, p.a.sum() + p.b.sum())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        for code in (write, read)
    ]
    assert outputs[1].split()[0] == "Pair" and "4." in outputs[1]
