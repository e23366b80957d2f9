"""Parameters and states are nested dicts of tensors: `setup` makes no others, and says which layer would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import luxtorch as lt
from luxtorch import optim


class Given(lt.Layer):
    """Start with what is given as an attribute of the class."""

    parameters: Any = lambda device: {}
    states: Any = lambda device: {}

    def initial_parameters(self, key):
        return self.parameters(key.device)

    def initial_states(self, key):
        return self.states(key.device)

    def __call__(self, x, ps, st):
        return x, st


def ones(device):
    return torch.ones(2, device=device)


# Trees that a layer could make, with what the error says.
BAD = {
    "list": (lambda d: {"ws": [ones(d), ones(d)]}, "nested dicts of tensors, but '{}ws' is a list"),
    "tuple": (lambda d: {"ws": (ones(d),)}, "nested dicts of tensors, but '{}ws' is a tuple"),
    "empty list": (lambda d: {"ws": []}, "nested dicts of tensors, but '{}ws' is a list"),
    "list in a group": (lambda d: {"group": {"ws": [ones(d)]}}, "nested dicts of tensors, but '{}group.ws' is a list"),
    "group in a list": (lambda d: {"ws": [{"w": ones(d)}]}, "nested dicts of tensors, but '{}ws' is a list"),
    "no dict": (lambda d: [ones(d)], "nested dicts of tensors, but "),
    "a tensor alone": (lambda d: ones(d), "nested dicts of tensors, but "),
    "number": (lambda d: {"w": 1.0}, "'{}w' must be a tensor"),
    "bool": (lambda d: {"w": True}, "'{}w' must be a tensor"),
    "None": (lambda d: {"w": None}, "'{}w' must be a tensor"),
    "string": (lambda d: {"w": "ones"}, "'{}w' must be a tensor"),
    "module": (lambda d: {"w": torch.nn.Linear(2, 2)}, "'{}w' must be a tensor"),
    "function": (lambda d: {"w": torch.ones}, "'{}w' must be a tensor"),
    "name of a number": (lambda d: {0: ones(d)}, "must be a string without dots"),
    "name with a dot": (lambda d: {"a.b": ones(d)}, "without dots"),
    "empty name": (lambda d: {"": ones(d)}, "must be a string without dots"),
    "name inside": (lambda d: {"group": {1: ones(d)}}, "must be a string without dots"),
}
PARAMETERS = {
    "integers": (lambda d: {"w": ones(d).long()}, "'{}w' must be a tensor of real or complex numbers"),
    "booleans": (lambda d: {"group": {"w": ones(d).bool()}}, "'{}group.w' must be a tensor of real or complex numbers"),
    "key": (lambda d: {"w": torch.zeros(2, dtype=torch.uint64, device=d)}, "'{}w' must be a tensor of real"),
    "static": (lambda d: {"w": lt.core.Static(1)}, "'{}w' must be a tensor"),
}
PLACES = {
    "alone": (lambda layer: layer, "model ", ""),
    "in a chain": (lambda layer: lt.Chain(lt.Dense(2, 2), layer), "model.layer_2 ", "layer_2."),
    "in a chain in a chain": (lambda layer: lt.Chain(a=lt.Chain(b=layer)), "model.a.b ", "a.b."),
    "in a wrapper": (lambda layer: lt.Chain(lt.SkipConnection(layer, torch.add)), "model.layer_1 ", "layer_1."),
    "compact": (lambda layer: lt.compact(lambda m, x: m.part(x), part=layer), "model.part ", "part."),
}
CALLS = {
    "setup": lambda model: lt.setup(0, model),
    "initial": lambda model: (lt.initial_parameters(0, model), lt.initial_states(0, model)),
    "length": lambda model: (lt.parameter_length(model), lt.state_length(model)),
    "output_shape": lambda model: lt.output_shape(model, (3, 2)),
    "check_layer": lambda model: lt.testing.check_layer(model, torch.ones(3, 2)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(
    ("what", "make", "problem"),
    [
        *(pytest.param("parameters", *case, id=f"parameters, {name}") for name, case in (BAD | PARAMETERS).items()),
        *(pytest.param("states", *case, id=f"states, {name}") for name, case in BAD.items()),
    ],
)
def test_trees_that_are_refused(what, make, problem, place, call):
    build, where, prefix = place
    error: Any
    with pytest.raises((lt.InputError, lt.DTypeError), match=problem.format(prefix)) as error:
        call(build(Given(**{what: make})))
    assert error.value.where.startswith(where) and "Given" in error.value.where
    assert error.value.got or error.value.fix


GOOD = {
    "nothing": lambda d: {},
    "empty groups": lambda d: {"a": {}, "b": {"c": {}}},
    "nested": lambda d: {"a": {"b": {"c": ones(d)}}, "w": ones(d)},
    "dtypes": lambda d: {"a": ones(d).half(), "b": ones(d).double(), "c": ones(d).cfloat(), "d": ones(d).bfloat16()},
    "scalar and empty": lambda d: {"a": torch.ones((), device=d), "b": torch.ones(0, 3, device=d)},
    "numbered": lambda d: {"ws": {"0": ones(d), "1": ones(d)}},
}
STATES = {
    "counter": lambda d: {"count": torch.zeros((), dtype=torch.int64, device=d), "training": lt.core.Static(True)},
    "key": lambda d: {"rng": torch.zeros(2, dtype=torch.uint64, device=d)},
}


@pytest.mark.parametrize(
    ("what", "make"),
    [
        *(pytest.param("parameters", make, id=f"parameters, {name}") for name, make in GOOD.items()),
        *(pytest.param("states", make, id=f"states, {name}") for name, make in (GOOD | STATES).items()),
    ],
)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_trees_that_are_taken(what, make, place):
    model = place[0](Given(**{what: make}))
    ps, st = lt.setup(0, model)
    assert lt.parameter_length(model) == sum(leaf.numel() for leaf in lt.flatten_names(ps).values())
    assert lt.state_length(model) == sum(leaf.numel() for leaf in lt.flatten_names(st).values())


class TestAnyTree:
    """Derivatives and rules know of no layers: lists and tuples are as good as dicts there."""

    TREES = (
        [torch.tensor([1.0, 2.0]), torch.tensor(3.0)],
        (torch.tensor([1.0, 2.0]), {"a": torch.tensor(3.0)}),
        {"ws": [torch.tensor([1.0, 2.0]), (torch.tensor(3.0),)]},
    )

    @pytest.mark.parametrize("tree", TREES)
    def test_derivatives_and_rules(self, tree):
        def loss(ps):
            return sum((leaf**3).sum() for leaf in lt.core.tree_leaves(ps))

        grads = lt.gradient(loss, tree)
        expected = lt.core.tree_map(lambda leaf: 3 * leaf**2, tree)
        torch.testing.assert_close(grads, expected)
        state, new = optim.update(optim.setup(optim.Descent(0.1), tree), tree, grads)
        torch.testing.assert_close(new, lt.core.tree_map(lambda leaf: leaf - 0.3 * leaf**2, tree))
        assert lt.stack([tree, tree]) is not None and lt.ComponentVector({"a": tree}).numel() == 3

    def test_names(self):
        """What goes by names says that a list has none, instead of leaving it out."""
        with pytest.raises(lt.InputError, match=r"'a\.ws' is a list"):
            lt.flatten_names({"a": {"ws": [torch.ones(1)]}, "b": torch.ones(1)})
