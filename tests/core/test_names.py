"""Trees by dotted names, and back."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch.core import Static, flatten_names, unflatten_names

MODELS = {
    "one layer": lt.Dense(3, 2),
    "layers without tensors": lt.Chain(lt.NoOpLayer(), lt.Dense(3, 2), lt.NoOpLayer()),
    "modes": lt.Chain(a=lt.BatchNorm(3), b=lt.Chain(c=lt.Dropout(0.5), d=lt.Dense(3, 2))),
    "nothing": lt.NoOpLayer(),
}


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name):
    for tree in lt.setup(0, MODELS[name]):
        flat = flatten_names(tree)
        assert all(isinstance(value, torch.Tensor) for value in flat.values())
        assert str(unflatten_names(flat, like=tree)) == str(tree)


def test_the_names_are_those_of_a_state_dict():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.Linear(4, 2)))
    named = unflatten_names(module.state_dict())
    assert list(named) == ["0", "1"] and list(named["1"]["0"]) == ["weight", "bias"]
    assert list(flatten_names(named)) == list(module.state_dict())


def test_a_component_vector_has_the_names_of_its_dict():
    ps, _ = lt.setup(0, MODELS["modes"])
    flat, expected = flatten_names(lt.ComponentVector(ps)), flatten_names(ps)
    assert list(flat) == list(expected)
    assert all(torch.equal(flat[name], expected[name]) for name in flat)


def test_like_is_not_changed_and_gives_what_has_no_name():
    like = {"a": {"x": torch.zeros(1), "training": Static(True)}, "b": {}}
    tree = unflatten_names({"a.x": torch.ones(1)}, like=like)
    assert tree == {"a": {"x": torch.ones(1), "training": Static(True)}, "b": {}}
    assert float(like["a"]["x"]) == 0


@pytest.mark.parametrize("names", [("a", "a.b"), ("a.b", "a"), ("a.b", "a.b.c")])
def test_a_name_is_that_of_an_entry_or_of_a_layer(names):
    with pytest.raises(lt.InputError, match="must not be that of a tensor and of a group"):
        unflatten_names(dict.fromkeys(names, torch.ones(1)))
