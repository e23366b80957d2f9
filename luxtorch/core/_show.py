"""Printing a model as a tree, with shapes and counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ._layer import Layer
from ._lines import runs
from ._nowhere import NOWHERE
from ._tree import count, named_leaves, subtree

_INDENT = "    "


def show(layer: Layer) -> str:
    """Return a model as a tree: a line a layer, its parameters' shapes and counts beside it, totals at the end.

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
    ps, st = layer.initial_parameters(NOWHERE), layer.initial_states(NOWHERE)
    lines = list(_lines("", layer, ps, st, 0, 1))
    if len(lines) > 1:
        lines[-1] = (lines[-1][0].rstrip(","), f"total: {_counts(ps, st)}")
    else:
        lines = [(lines[0][0].rstrip(","), lines[0][1])]
    width = max(len(text) for text, _ in lines) + 4
    return "\n".join(f"{text:<{width}}# {note}" if note else text for text, note in lines)


def _lines(name: str, layer: Layer, ps: Any, st: Any, depth: int, times: int) -> Iterator[tuple[str, str]]:
    """Yield the lines of a layer, each with the note that belongs beside it."""
    label = f"{name} = " if name else ""
    head = f"{_INDENT * depth}{label}{type(layer).__name__}("
    children = layer.children()
    if not children:
        yield f"{head}{layer.extra_repr()}),", _note(ps, st, times)
        return
    arguments = layer.extra_repr()
    yield f"{head}{arguments}," if arguments else head, ""
    for first, shown, child, repeats in folded(children, ps, st):
        yield from _lines(shown, child, subtree(ps, first), subtree(st, first), depth + 1, repeats)
    yield f"{_INDENT * depth}),", ""


def folded(children: Mapping[str, Layer], ps: Any, st: Any) -> Iterator[tuple[str, str, Layer, int]]:
    """Yield each run of equal layers once: its first name, the name to show, the layer, the length of the run."""
    # Where some parameters are frozen or shared, equal layers may have different trees.
    items = [(name, (child, _shapes(ps, name), _shapes(st, name))) for name, child in children.items()]
    for shown, start, length in runs(items):
        first, (layer, *_) = items[start]
        yield first, shown, layer, length


def _shapes(tree: Any, name: str) -> list[Any]:
    return [(path, getattr(leaf, "shape", ())) for path, leaf in named_leaves(subtree(tree, name))]


def _note(ps: Any, st: Any, times: int) -> str:
    shapes = [f"{name} {shape(leaf)}" for name, leaf in named_leaves(ps)]
    counts = _counts(ps, st, shapes=", ".join(shapes) if len(shapes) <= 8 else "")
    return f"{times} x {counts}" if counts and times > 1 else counts


def _counts(ps: Any, st: Any, shapes: str = "") -> str:
    parameters, states = count(ps), count(st)
    parts = [f"{parameters:_} parameters" + (f": {shapes}" if shapes else "")] if parameters else []
    parts += [f"{states:_} states"] if states else []
    return ("; " if shapes else ", ").join(parts)


def shape(leaf: Any) -> str:
    return str(tuple(leaf.shape))
