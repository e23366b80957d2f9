"""A model as a tree in notebooks."""

from __future__ import annotations

from typing import Any

from ._html import table
from ._layer import Layer
from ._lines import Line
from ._nowhere import NOWHERE
from ._show import folded, shape
from ._tree import count, named_leaves, subtree


def layer_html(layer: Layer) -> str:
    """Return a model as HTML: a line a layer, with the counts of its parameters and states.

    Runs of equal layers are folded into one line, as in `str(layer)`.
    """
    ps, st = layer.initial_parameters(NOWHERE), layer.initial_states(NOWHERE)
    return table(("parameters", "states"), _line("", layer, ps, st, 1))


def _line(name: str, layer: Layer, ps: Any, st: Any, times: int) -> Line:
    arguments, children = layer.extra_repr(), layer.children()
    label = f"{name} = " * bool(name) + type(layer).__name__ + f"({arguments})" * bool(arguments)
    shapes = [] if children else [f"{name} {shape(leaf)}" for name, leaf in named_leaves(ps)]
    below = tuple(
        _line(shown, child, subtree(ps, first), subtree(st, first), repeats)
        for first, shown, child, repeats in folded(children, ps, st)
    )
    cells = (_count(ps, times), _count(st, times))
    return Line(label, ", ".join(shapes) if len(shapes) <= 8 else "", cells, below=below)


def _count(tree: Any, times: int) -> str:
    number = count(tree)
    return (f"{times} x " * (times > 1) + f"{number:_}") if number else ""
