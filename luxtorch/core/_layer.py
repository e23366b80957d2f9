"""`Layer`: an immutable description of a computation, whose parameters and states are passed to its call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, field, fields
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import dataclass_transform

from luxtorch._torch import without_modes

from ._call_errors import locate_errors
from ._plain import Value
from ._table import Line, html, runs
from ._tree import META_KEY, count, named_leaves, subtree

Parameters: TypeAlias = Mapping[str, Any]
"""A nested mapping from names to tensors: a dict, or a ComponentVector."""

States: TypeAlias = Mapping[str, Any]
"""A nested dict from names to tensors and `Static` values."""


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Layer(Value, ABC):
    """Describe a computation by its hyperparameters; subclasses become frozen, hashable dataclasses.

    A layer holds no tensor. `initial_parameters` and `initial_states` make its tensors from a key, and its call
    is a pure function of an input and of these tensors. Two equal layers are interchangeable.

    A subclass declares its hyperparameters as annotated fields, which become the constructor's arguments, and
    defines `__call__`; if it has parameters or states, it defines their initial values too.

    Example:
        >>> import torch, luxtorch as lt
        >>> class Power(lt.Layer):
        ...     size: int
        ...
        ...     def initial_parameters(self, key):
        ...         return {"exponent": torch.ones(self.size, device=key.device)}
        ...
        ...     def __call__(self, x, ps, st):
        ...         return x ** ps["exponent"], st
        >>> ps, st = lt.setup(0, Power(2))
        >>> y, st = Power(2)(torch.tensor([2.0, 3.0]), ps, st)
        >>> y
        tensor([2., 3.])
        >>> Power(2) == Power(2)
        True
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        call = cls.__dict__.get("__call__")
        if call is not None and not getattr(call, "__isabstractmethod__", False):
            cls.__call__ = locate_errors(call)  # type: ignore[method-assign]

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return the initial trainable tensors, by name.

        Args:
            key: The key to draw from; tensors are made on its device.

        Returns:
            A nested dict of tensors; empty for a layer without parameters.
        """
        return {}

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the initial tensors that are updated without being trained, and `Static` flags, by name.

        Args:
            key: The key to draw from; tensors are made on its device.

        Returns:
            A nested dict of tensors and `Static` values; empty for a layer without states.
        """
        return {}

    @abstractmethod
    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the output and the new state, without changing any argument.

        Args:
            x: The input: a tensor, or any tree of tensors that the layer takes.
            ps: The parameters, named as in `initial_parameters`.
            st: The states, named as in `initial_states`.

        Returns:
            `(y, st)`: the output, and a state of the same structure, detached.
        """

    def children(self) -> Mapping[str, Layer]:
        """Return the layers inside, by the names under which their parameters and states are nested.

        The empty name stands for a single layer whose trees are not nested.
        """
        return {}

    def expected_input(self) -> str:
        """Describe the input that the layer expects, for error messages; empty for any input."""
        return ""

    def extra_repr(self) -> str:
        """Return the arguments for prints and errors: by default, the fields without their default values."""
        shown = []
        for item in fields(self):
            value = getattr(self, item.name)
            if item.repr and (item.default is MISSING or value != item.default):
                shown.append(f"{item.name}={show_value(value)}" if item.kw_only else show_value(value))
        return ", ".join(shown)

    def __repr__(self) -> str:
        return _text(self)

    def _repr_html_(self) -> str:
        return _html(self)

    @cached_property
    def _names(self) -> tuple[frozenset[str], frozenset[str]]:
        """The top names of the layer's parameters and states, computed on the meta device."""
        with without_modes():  # it may be asked for in a trace, which has no use for the operators
            return frozenset(self.initial_parameters(META_KEY)), frozenset(self.initial_states(META_KEY))


def show_value(value: Any) -> str:
    """Return the text of a hyperparameter: a function by its name."""
    if isinstance(value, torch.dtype | str | int | float | tuple):
        return str(value) if not isinstance(value, str) else repr(value)
    return getattr(value, "__name__", None) or str(value)


_INDENT = "    "


def _text(layer: Layer) -> str:
    """Return a model as text: a line for each layer with the shapes and counts of its parameters, and the totals.

    Runs of equal layers are folded into one line.

    Example:
        >>> import torch, luxtorch as lt
        >>> print(lt.Chain(lt.Dense(2, 8, torch.tanh), *[lt.Dense(8, 8)] * 3, lt.BatchNorm(8)))
        Chain(
            layer_1 = Dense(2 -> 8, tanh),    # 24 parameters: weight (8, 2), bias (8,)
            layer_(2-4) = Dense(8 -> 8),      # 3 x 72 parameters: weight (8, 8), bias (8,)
            layer_5 = BatchNorm(8),           # 16 parameters: weight (8,), bias (8,); 17 states
        )                                     # total: 256 parameters, 17 states
    """
    ps, st = layer.initial_parameters(META_KEY), layer.initial_states(META_KEY)
    lines = list(_text_lines("", layer, ps, st, 0, 1))
    if len(lines) > 1:
        lines[-1] = (lines[-1][0].rstrip(","), f"total: {_counts(ps, st)}")
    else:
        lines = [(lines[0][0].rstrip(","), lines[0][1])]
    width = max(len(text) for text, _ in lines) + 4
    return "\n".join(f"{text:<{width}}# {note}" if note else text for text, note in lines)


def _text_lines(name: str, layer: Layer, ps: Any, st: Any, depth: int, times: int) -> Iterator[tuple[str, str]]:
    """Yield the lines of a layer, each with the comment beside it."""
    label = f"{name} = " if name else ""
    head = f"{_INDENT * depth}{label}{type(layer).__name__}("
    children = layer.children()
    if not children:
        yield f"{head}{layer.extra_repr()}),", _note(ps, st, times)
        return
    arguments = layer.extra_repr()
    yield f"{head}{arguments}," if arguments else head, ""
    for first, shown, child, repeats in _folded(children, ps, st):
        yield from _text_lines(shown, child, subtree(ps, first), subtree(st, first), depth + 1, repeats)
    yield f"{_INDENT * depth}),", ""


def _folded(children: Mapping[str, Layer], ps: Any, st: Any) -> Iterator[tuple[str, str, Layer, int]]:
    """Yield each run of equal layers once: its first name, the name to show, the layer, the length of the run."""
    # If parameters are frozen or shared, equal layers may have different trees.
    items = [(name, (child, _shapes(ps, name), _shapes(st, name))) for name, child in children.items()]
    for shown, start, length in runs(items):
        first, (layer, *_) = items[start]
        yield first, shown, layer, length


def _shapes(tree: Any, name: str) -> list[Any]:
    return [(path, getattr(leaf, "shape", ())) for path, leaf in named_leaves(subtree(tree, name))]


def _note(ps: Any, st: Any, times: int) -> str:
    shapes = [f"{name} {_shape(leaf)}" for name, leaf in named_leaves(ps)]
    counts = _counts(ps, st, shapes=", ".join(shapes) if len(shapes) <= 8 else "")
    return f"{times} x {counts}" if counts and times > 1 else counts


def _counts(ps: Any, st: Any, shapes: str = "") -> str:
    parameters, states = count(ps), count(st)
    parts = [f"{parameters:_} parameters" + (f": {shapes}" if shapes else "")] if parameters else []
    parts += [f"{states:_} states"] if states else []
    return ("; " if shapes else ", ").join(parts)


def _shape(leaf: Any) -> str:
    return str(tuple(leaf.shape))


def _html(layer: Layer) -> str:
    """Return a model as HTML: a line for each layer, with the counts of its parameters and states.

    Runs of equal layers are folded into one line, as in `str(layer)`.
    """
    ps, st = layer.initial_parameters(META_KEY), layer.initial_states(META_KEY)
    return html(("parameters", "states"), _html_line("", layer, ps, st, 1))


def _html_line(name: str, layer: Layer, ps: Any, st: Any, times: int) -> Line:
    arguments, children = layer.extra_repr(), layer.children()
    label = f"{name} = " * bool(name) + type(layer).__name__ + f"({arguments})" * bool(arguments)
    shapes = [] if children else [f"{name} {_shape(leaf)}" for name, leaf in named_leaves(ps)]
    below = tuple(
        _html_line(shown, child, subtree(ps, first), subtree(st, first), repeats)
        for first, shown, child, repeats in _folded(children, ps, st)
    )
    cells = (_count(ps, times), _count(st, times))
    return Line(label, ", ".join(shapes) if len(shapes) <= 8 else "", cells, below=below)


def _count(tree: Any, times: int) -> str:
    number = count(tree)
    return (f"{times} x " * (times > 1) + f"{number:_}") if number else ""
