"""Every public value survives what programs do to values: pickle, copy, torch.save, joblib, queues, numpy."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

import luxtorch as lt
from luxtorch import optim, training

MODEL = lt.Chain(lt.Dense(3, 4, "tanh"), lt.Dropout(0.5), lt.BatchNorm(4), lt.Dense(4, 2))


def square(x: Tensor) -> Tensor:
    return x**2


jitted_square = lt.jit(square, backend="replay")


@lt.jit(backend="replay")
def decorated(x: Tensor) -> Tensor:
    return x**3


def body(m: Any, x: Tensor) -> Tensor:
    return m.dense(x) * m.scale


def vector() -> lt.ComponentVector:
    return lt.ComponentVector(lt.setup(0, MODEL)[0])


def trained(ps: Any) -> training.TrainState:
    ts = training.TrainState(MODEL, ps, lt.setup(0, MODEL)[1], optim.Adam(1e-2))
    return training.single_train_step(lt.MSELoss(), (torch.ones(5, 3), torch.ones(5, 2)), ts)[3]


VALUES = {
    "key": lambda: lt.random.key(3),
    "keys": lambda: lt.random.split(lt.random.key(3), 4),
    "one of many keys": lambda: lt.random.split(lt.random.key(3), 4)[2],
    "integers": lambda: torch.tensor([1, 2], dtype=torch.uint16),
    "parameters": lambda: lt.setup(0, MODEL)[0],
    "states": lambda: lt.setup(0, MODEL)[1],
    "vector": vector,
    "group": lambda: vector()["layer_1"],
    "batch of vectors": lambda: torch.stack([vector(), vector()]),
    "matrix": lambda: lt.hessian(lambda cv: (cv.flat**3).sum(), vector()["layer_4"]),
    "axes": lambda: vector().axes,
    "Static": lambda: lt.core.Static(True),
    "layer": lambda: MODEL,
    "compact": lambda: lt.compact(body, dense=lt.Dense(2, 3), scale=torch.ones(3)),
    "rule": lambda: optim.OptimiserChain(optim.ClipNorm(1.0), optim.AdamW(1e-3)),
    "loss": lambda: lt.losses.MSELoss(),
    "OptState": lambda: trained(vector()).optimizer_state,
    "TrainState": lambda: trained(lt.setup(0, MODEL)[0]),
    "TrainState of a vector": lambda: trained(vector()),
    "EMA": lambda: lt.EMA(0.9),
    "averages": lambda: lt.EMA(0.9).init(vector()),
    "stacked": lambda: lt.stack([lt.setup(seed, MODEL) for seed in range(2)]),
    "Inputs": lambda: lt.Inputs(torch.ones(2), mask=torch.zeros(2)),
    "initializer": lambda: lt.init.kaiming_uniform(gain=2.0),
}


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_joblib(value: Any) -> Any:
    joblib, file = pytest.importorskip("joblib"), io.BytesIO()
    joblib.dump(value, file)
    file.seek(0)
    return joblib.load(file)


def through_a_queue(value: Any) -> Any:
    queue: Any = multiprocessing.get_context("spawn").Queue()
    queue.put(value)
    try:
        return queue.get(timeout=30)
    finally:
        queue.close()
        queue.join_thread()


WAYS = {
    **{f"pickle {n}": lambda value, n=n: pickle.loads(pickle.dumps(value, n)) for n in (2, pickle.HIGHEST_PROTOCOL)},
    "pickle in Python": lambda value: pickle._loads(pickle._dumps(value)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
    "joblib": by_joblib,
    "queue": through_a_queue,
}


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    leaves, spec = pytree.tree_flatten(found)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert spec == expected_spec
    for leaf, other in zip(leaves, expected_leaves, strict=True):
        if isinstance(other, Tensor):
            assert leaf.dtype is other.dtype and leaf.requires_grad == other.requires_grad and torch.equal(leaf, other)
        else:
            assert leaf == other and hash(leaf) == hash(other)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_equal_and_independent(make, way):
    value, expected = make(), make()
    found = WAYS[way](value)
    assert_same(found, expected)
    if way in ("copy", "queue"):  # these share memory
        return
    for leaf in pytree.tree_leaves(found):
        if isinstance(leaf, Tensor):
            leaf.zero_()
    assert_same(value, expected)


@pytest.mark.parametrize("name", ["states", "vector", "group", "matrix", "key", "OptState"])
def test_loaded_as_plain_data(name):
    """What has no code of a user in it needs no trust: keys are written as torch writes them."""
    file = io.BytesIO()
    value = pytree.tree_leaves(VALUES[name]()) if name == "OptState" else VALUES[name]()
    torch.save(value, file)
    file.seek(0)
    assert_same(torch.load(file), value)


@pytest.mark.parametrize("way", ["pickle 2", "copy", "deepcopy", "torch.save", "joblib"])
@pytest.mark.parametrize("function", [jitted_square, decorated], ids=["jitted", "decorated"])
def test_jitted_functions(function, way):
    x = torch.tensor([1.0, 2.0])
    expected = function(x)
    found = WAYS[way](function)
    assert type(found) is type(function) and (found is decorated) == (function is decorated)
    assert torch.equal(found(x), expected) and found.__name__ == function.__name__


@pytest.mark.parametrize("way", ["pickle 2", "copy", "deepcopy", "torch.save", "joblib"])
def test_boxes(way):
    box = lt.StatefulLayer(MODEL, *lt.setup(0, MODEL))
    found = WAYS[way](box)
    assert_same((found.layer, found.parameters, found.states), (box.layer, box.parameters, box.states))
    assert torch.equal(found(torch.ones(5, 3)), box(torch.ones(5, 3)))


def test_keys_as_arrays():
    np = pytest.importorskip("numpy")
    keys = lt.random.split(lt.random.key(3), 4)
    assert torch.equal(torch.from_numpy(np.array(keys.numpy())), keys)
    assert torch.equal(torch.from_numpy(pickle.loads(pickle.dumps(keys.numpy()))), keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool])
def test_other_tensors_are_pickled_as_by_torch(dtype):
    tensor = torch.ones(2, 3).to(dtype).T
    assert pickle.loads(pickle.dumps(tensor)).stride() == tensor.stride()
    for value in (tensor, torch.nn.Parameter(torch.ones(2)), torch.ones(2, device="meta")):
        found = pickle.loads(pickle.dumps(value))
        assert type(found) is type(value) and found.layout is value.layout and found.device == value.device
