"""`StatefulLayer`: a layer with its parameters and states as a mutable object, for notebooks and solvers."""

from __future__ import annotations

from typing import Any

from luxtorch._errors import InputError, described, suggest
from luxtorch._transforms import transform_level

from ._describe import tree_html
from ._layer import Layer, Parameters, States
from ._mode import test_mode, train_mode, update_state
from ._table import section, shown

_PUBLIC = ("layer", "parameters", "states", "train_mode", "test_mode", "update_state")


class StatefulLayer:
    """Hold a layer with its parameters and states, and call it as a function of the input alone.

    Each call stores the new states. This is the one mutable object of luxtorch: it is for notebooks, and for solvers
    that take a plain function. It is not a `Layer`; to differentiate or vmap a call, pass it `ps`.

    States are stored only by calls at the level of transforms at which the object was made. Inside of a further
    `torch.func.grad`, `vmap`, `jvp` or the like, a call returns the same output and stores no states, so that the
    object never holds a value from inside a transform. For the new states of a differentiated call, call the layer
    itself, with `has_aux=True`. Under `torch.compile` alone, states are stored.

    Args:
        layer: The layer.
        ps: Its parameters, for calls that do not pass any; None if all calls do.
        st: Its states.

    Attributes:
        layer: The layer.
        parameters: The parameters; they can be assigned.
        states: The states for the next call.

    Raises:
        InputError: If `layer` is not a layer.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.BatchNorm(2)
        >>> box = lt.StatefulLayer(model, *lt.setup(0, model))
        >>> y = box(torch.ones(4, 2))
        >>> box.states["running_mean"]
        tensor([0.1000, 0.1000])
        >>> grads = torch.func.grad(lambda ps: box(torch.ones(4, 2), ps).sum())(box.parameters)
        >>> box.states["running_mean"]  # unchanged
        tensor([0.1000, 0.1000])

    Source: Lux's `StatefulLuxLayer`, which keeps the states in every case.
    """

    __slots__ = ("_level", "layer", "parameters", "states")

    def __init__(self, layer: Layer, ps: Parameters | None, st: States) -> None:
        if not isinstance(layer, Layer):
            fix = "Call StatefulLayer(layer, ps, st)."
            raise InputError("A StatefulLayer must hold a layer.", got=described(layer), fix=fix)
        self.layer = layer
        self.parameters = ps
        self.states = st
        self._level = transform_level()

    def __call__(self, x: Any, ps: Parameters | None = None) -> Any:
        """Return the output, and store the new states.

        Args:
            x: The input.
            ps: The parameters; the stored ones if None.
        """
        used: Any = self.parameters if ps is None else ps
        y, st = self.layer(x, used, self.states)
        if transform_level() == self._level:
            self.states = st
        return y

    def train_mode(self) -> StatefulLayer:
        """Set every layer to training mode, and return the object itself."""
        self.states = train_mode(self.states)
        return self

    def test_mode(self) -> StatefulLayer:
        """Set every layer to test mode, and return the object itself."""
        self.states = test_mode(self.states)
        return self

    def update_state(self, name: str, value: Any) -> StatefulLayer:
        """Set every state called `name` to a value, and return the object itself.

        Raises:
            KeyNameError: If no state has that name.
        """
        self.states = update_state(self.states, name, value)
        return self

    def __getattr__(self, name: str) -> Any:
        # It is called for missing attributes only.
        hint = suggest(name, _PUBLIC) or "Parameters are read as box.parameters['weight']."
        raise AttributeError(f"A StatefulLayer has no attribute '{name}'. {hint}")

    def __repr__(self) -> str:
        return f"StatefulLayer of {self.layer!r}"

    def _repr_html_(self) -> str:
        trees = {"parameters": self.parameters, "states": self.states}
        parts = [tree_html(tree, name) for name, tree in trees.items() if tree is not None]
        return section("StatefulLayer", [shown(self.layer), *parts])
