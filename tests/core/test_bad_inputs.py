"""Whatever is wrong with an input, a parameter or a state, the error is ours, and names the layer that met it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import luxtorch as lt

# A layer, the shape of an input, and the dimension that it knows the size of.
LAYERS = {
    "Dense": (lt.Dense(4, 3, torch.tanh), (2, 4), -1),
    "Conv": (lt.Conv((3,), 2, 4), (2, 2, 6), 1),
    "ConvTranspose": (lt.ConvTranspose((2, 2), 2, 3), (2, 2, 4, 4), 1),
    "BatchNorm": (lt.BatchNorm(4), (3, 4), -1),
    "LayerNorm": (lt.LayerNorm(4), (2, 4), -1),
    "GroupNorm": (lt.GroupNorm(4, 2), (2, 4, 3), 1),
    "RMSNorm": (lt.RMSNorm(4), (2, 4), -1),
    "Scale": (lt.Scale(4), (2, 4), -1),
    "Bilinear": (lt.Bilinear(4, 4, 2), (2, 4), -1),
    "MultiHeadAttention": (lt.MultiHeadAttention(4, 2), (2, 3, 4), -1),
    "TransformerEncoderLayer": (lt.TransformerEncoderLayer(4, 2, 8), (2, 3, 4), -1),
    "Recurrence": (lt.Recurrence(lt.GRUCell(4, 3)), (2, 5, 4), -1),
    "LSTM": (lt.Recurrence(lt.LSTMCell(4, 3)), (2, 5, 4), -1),
    "Chain": (lt.Chain(lt.Dense(4, 3), lt.Dense(3, 2)), (2, 4), -1),
    "Dropout": (lt.Chain(lt.Dense(4, 4), lt.Dropout(0.5)), (2, 4), -1),
}

Change = Callable[[Any, dict[str, Any], dict[str, Any]], tuple[Any, Any, Any]]


def first(tree: dict[str, Any], change: Callable[[dict[str, Any], str], None]) -> dict[str, Any]:
    """Return a copy of a tree where a function has changed the dict that holds the first leaf, by its name there."""
    name, leaf = next(((name, node) for name, node in tree.items() if node != {}))
    if isinstance(leaf, dict):
        return {**tree, name: first(leaf, change)}
    copy = dict(tree)
    change(copy, name)
    return copy


def rename(node: dict[str, Any], name: str) -> None:
    node[f"{name}s"] = node.pop(name)


def replaced(make: Callable[[Any], Any]) -> Callable[[dict[str, Any], str], None]:
    return lambda node, name: node.update({name: make(node[name])})


def on_input(change: Callable[[torch.Tensor], Any]) -> Change:
    return lambda x, ps, st: (change(x), ps, st)


def on_parameters(change: Callable[[dict[str, Any], str], None]) -> Change:
    return lambda x, ps, st: (x, first(ps, change), st)


MISTAKES: dict[str, Change] = {
    "integers": on_input(lambda x: x.long()),
    "booleans": on_input(lambda x: x > 0),
    "double precision": on_input(lambda x: x.double()),
    "half precision": on_input(lambda x: x.bfloat16()),
    "complex numbers": on_input(lambda x: x + 0j),
    "no input": on_input(lambda x: None),
    "a text": on_input(lambda x: "x"),
    "a list": on_input(lambda x: x.tolist()),
    "an array": on_input(lambda x: np.zeros(x.shape, np.float32)),
    "a number": on_input(lambda x: 1.0),
    "a dict": on_input(lambda x: {"x": x}),
    "five inputs": on_input(lambda x: (x,) * 5),
    "no dimension": on_input(lambda x: x.sum()),
    "a parameter is missing": on_parameters(lambda node, name: node.__delitem__(name)),
    "a parameter too many": on_parameters(lambda node, name: node.update(other=node[name])),
    "a parameter is misspelt": on_parameters(rename),
    "a parameter of another shape": on_parameters(replaced(lambda p: torch.zeros(*p.shape, 2))),
    "a parameter in double precision": on_parameters(replaced(lambda p: p.double())),
    "a parameter is an array": on_parameters(replaced(lambda p: p.numpy())),
    "a parameter is None": on_parameters(replaced(lambda p: None)),
    "parameters are None": lambda x, ps, st: (x, None, st),
    "parameters are a list": lambda x, ps, st: (x, [*ps.values()], st),
    "parameters of another layer": lambda x, ps, st: (x, {"weights": torch.zeros(2)}, st),
    "states are None": lambda x, ps, st: (x, ps, None),
    "states for parameters": lambda x, ps, st: (x, st, ps),
    "a state too many": lambda x, ps, st: (x, ps, {**st, "other": {}}),
}


# What torch does with numbers of other kinds: they are promoted, or cast as the kernels of normalizations do.
LEGAL = {
    ("Scale", "integers"),
    ("Scale", "booleans"),
    ("Scale", "double precision"),
    ("Scale", "half precision"),
    ("Scale", "complex numbers"),
    ("Scale", "a parameter in double precision"),
    ("RMSNorm", "double precision"),
    ("RMSNorm", "half precision"),
    ("RMSNorm", "a parameter in double precision"),
    ("LayerNorm", "half precision"),
    ("GroupNorm", "half precision"),
    ("BatchNorm", "half precision"),
    ("BatchNorm", "a parameter in double precision"),
}
CASES = [(name, mistake) for name in LAYERS for mistake in MISTAKES if (name, mistake) not in LEGAL]


@pytest.fixture
def refused(make_key: Callable[[], torch.Tensor]) -> Callable[[str, Change], None]:
    """Return a function that fails unless a layer, as part of a model, refuses what a change makes of its arguments."""

    def refused(name: str, change: Change) -> None:
        layer, shape, _ = LAYERS[name]
        model = lt.Chain(before=lt.NoOpLayer(), inner=layer)
        ps, st = lt.setup(make_key(), model)
        x, inner_ps, inner_st = change(torch.ones(shape), ps["inner"], st["inner"])
        with pytest.raises(lt.LuxtorchError, match=r"model\.inner"):
            model(x, {**ps, "inner": inner_ps}, {**st, "inner": inner_st})

    return refused


@pytest.mark.parametrize(("name", "mistake"), CASES)
def test_a_mistake_is_an_error_that_names_the_layer(refused: Any, name: str, mistake: str) -> None:
    refused(name, MISTAKES[mistake])


@pytest.mark.parametrize("size", [0, 1, 3, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_another_number_of_features(refused: Any, name: str, size: int) -> None:
    dim = LAYERS[name][2]

    def change(x: torch.Tensor, ps: Any, st: Any) -> tuple[Any, Any, Any]:
        shape = [*x.shape]
        shape[dim] = size
        return torch.ones(shape), ps, st

    refused(name, change)


@pytest.mark.parametrize("name", LAYERS)
def test_no_parameter_may_be_none(refused: Any, name: str, make_key: Callable[[], torch.Tensor]) -> None:
    for path in lt.flatten_names(lt.initial_parameters(make_key(), LAYERS[name][0])):

        def change(x: Any, ps: Any, st: Any, path: str = path) -> tuple[Any, Any, Any]:
            return x, lt.unflatten_names({**lt.flatten_names(ps), path: None}, like=ps), st

        refused(name, change)
