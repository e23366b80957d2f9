"""`describe`: a table of a tree of tensors with shapes and statistics, for printing and notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from luxtorch._errors import InputError, LuxtorchError, out_of_range
from luxtorch._torch import is_wrapped
from luxtorch._transforms import watched

from ._stack import _one_level
from ._statistics import Statistics, physical
from ._table import MANY, Line, html, runs, text
from ._tree import path_name


class Description:
    """Show a tree as a table, as text and in notebooks; made by `describe`.

    Values are read each time it is shown.
    """

    __slots__ = ("_depth", "_tree")

    def __init__(self, tree: Any, depth: int | None) -> None:
        self._tree = tree
        self._depth = depth

    def __repr__(self) -> str:
        return tree_text(self._tree, self._depth)

    def _repr_html_(self) -> str:
        return tree_html(self._tree, depth=self._depth)


def describe(tree: Any, *, depth: int | None = None) -> Description:
    """Tabulate a tree of tensors: shapes, minimum, maximum, mean and standard deviation of the values.

    Print the result, or let a notebook show it, where groups open and close. The line of a group is about all values in
    it, so that a NaN is visible from the first line on. In a tree of more than 60 tensors, consecutive groups of the
    same names and shapes, such as the layers of a deep model, are folded into one line.

    Args:
        tree: Parameters, states, gradients, a training state, or any other pytree.
        depth: The number of levels to show; all if None.

    Returns:
        A `Description`, to print.

    Raises:
        InputError: If `tree` is not a tree, or the depth is negative.

    Example:
        >>> import torch, luxtorch as lt
        >>> ps = {"dense": {"weight": torch.tensor([[1.0, -2.0], [torch.nan, 4.0]]), "bias": torch.zeros(2)}}
        >>> lt.describe(ps)
                                                 shape   min  max  mean    std
        dict of 6 elements (torch.float32, cpu)           -2    4   0.6   1.96  1 NaN
          dense 6 elements                                -2    4   0.6   1.96  1 NaN
            weight                               (2, 2)   -2    4     1  2.449  1 NaN
            bias                                 (2,)      0    0     0      0

    Statistics leave out values that are not finite, and for complex numbers are those of magnitudes. `std` divides by
    the number of elements. Those of a group leave out integers and booleans. For tensors that are traced, batched by
    `torch.vmap`, of a subclass or on the meta device, and for random keys, only shapes are shown.

    Source: `pandas.DataFrame.describe`.
    """
    if not isinstance(tree, Tensor) and children(tree) is None:
        fix = "For a model, print(model), or pass what lt.setup returns: parameters, states, or any other pytree."
        raise InputError("tree must be a tree of tensors.", got=type(tree).__name__, fix=fix)
    if depth is not None and depth < 0:
        raise out_of_range("depth", depth, "at least 0, or None")
    return Description(tree, depth)


HEAD = ("shape", "min", "max", "mean", "std")
"""The columns of the table."""


@dataclass(frozen=True)
class _Part:
    """Hold the line of a subtree, its number of elements, and statistics of its real or complex values."""

    line: Line
    size: int
    statistics: Statistics | None = None


def outline(tree: Any, title: str = "") -> Line:
    """Return a tree as lines: one for each tensor, and one for each group, about all values in it.

    Values are read here, so this is called when they are shown.

    Args:
        tree: The tree.
        title: Its title; type and size by default.
    """
    leaves = list(_leaves(tree))
    kinds = {_kind(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
    whole = _part("", tree, alike=len(kinds) < 2, many=len(leaves) > MANY)
    detail = f"({kinds.pop()})" if len(kinds) == 1 else ""
    return replace(whole.line, label=title or f"{type(tree).__name__} of {_elements(whole.size)}", detail=detail)


def tree_text(tree: Any, depth: int | None = None) -> str:
    """Return a tree as text, with `depth` levels, all if None."""
    return text(HEAD, outline(tree), depth)


def tree_html(tree: Any, title: str = "", depth: int | None = None) -> str:
    """Return a tree as HTML for notebooks.

    Args:
        tree: The tree.
        title: Its title; type and size by default.
        depth: The number of levels to show; all if None.
    """
    return html(HEAD, outline(tree, title), depth)


def children(node: Any) -> list[tuple[str, Any]] | None:
    """Return the children of a node by name; None if it is a leaf."""
    if isinstance(node, Mapping):
        try:
            return [(str(name), child) for name, child in node.items()]
        except (LuxtorchError, AttributeError):  # a vector whose leaves a tree library has replaced
            return None
    pairs, _ = _one_level(node)
    return None if pairs and not pairs[0][0] else [(path_name(path), child) for path, child in pairs]


def _leaves(node: Any) -> Iterator[Any]:
    inside = children(node)
    if inside is None:
        yield node
    for _, child in inside or ():
        yield from _leaves(child)


def _part(name: str, node: Any, alike: bool, many: bool) -> _Part:
    """Return the line of a subtree.

    Args:
        name: Its name.
        node: The subtree.
        alike: Whether all dtypes and devices are the same, so that they are left out.
        many: Whether runs of equal subtrees are folded.
    """
    if isinstance(node, Tensor):
        return _tensor(name, node, alike)
    inside = children(node)
    if not inside:
        return _Part(Line(name, "(empty)" if isinstance(node, Mapping) else _equals(repr(node))), 0)
    parts = [_part(child_name, child, alike, many) for child_name, child in inside]
    return _group(name, _folded(parts) if many else parts)


def _tensor(name: str, tensor: Tensor, alike: bool) -> _Part:
    size, shape = _sizes(tensor)
    shape = shape if alike else f"{shape} {_kind(tensor)}"
    statistics = _statistics(tensor)
    if statistics is None:
        return _Part(Line(name, cells=(shape,)), size)
    # A single number is shown itself.
    detail = _equals(_number(physical(tensor).item())) if size == 1 and statistics.finite else ""
    line = Line(name, detail, (shape, *(() if size == 1 else _numbers(statistics))), _alarm(statistics))
    return _Part(line, size, statistics if tensor.is_floating_point() or tensor.is_complex() else None)


def _group(name: str, parts: Sequence[_Part], folded: bool = False) -> _Part:
    size = sum(part.size for part in parts)
    known = [part.statistics for part in parts if part.statistics is not None]
    statistics = Statistics.pooled(known) if known else None
    cells = () if statistics is None else ("", *_numbers(statistics))
    alarm = "" if statistics is None else _alarm(statistics)
    detail = f"{len(parts)} x {_elements(parts[0].size)}" if folded else _elements(size)
    return _Part(Line(name, detail, cells, alarm, tuple(part.line for part in parts), folded), size, statistics)


def _folded(parts: Sequence[_Part]) -> list[_Part]:
    """Return parts with each run of equal names and shapes folded into one."""
    found = runs([(part.line.label, _signature(part.line)) for part in parts])
    return [
        parts[start] if length == 1 else _group(name, parts[start : start + length], folded=True)
        for name, start, length in found
    ]


def _signature(line: Line) -> Any:
    return line.cells[:1], [(below.label, _signature(below)) for below in line.below]


def _statistics(tensor: Tensor) -> Statistics | None:
    """Return the statistics of a tensor; None if values cannot be read, or a tracer is active."""
    if (
        type(tensor) not in (Tensor, Parameter)
        or is_wrapped(tensor)
        or watched()
        or torch.compiler.is_compiling()
        or tensor.is_meta
        or tensor.is_nested
        or tensor.dtype is torch.uint64  # random keys, whose values have no meaning
        or not tensor.numel()
    ):
        return None
    try:
        with torch.no_grad():
            return Statistics.of(tensor)
    except (RuntimeError, TypeError):  # a dtype without arithmetic, a device without double precision, no memory
        return None


def _sizes(tensor: Tensor) -> tuple[int, str]:
    """Return the number of elements and the shape."""
    try:
        return tensor.numel(), str(tuple(tensor.shape))
    except (RuntimeError, ValueError):  # nested tensors and parameters of lazy modules have no shape
        return 0, "no shape"


def _kind(tensor: Tensor) -> str:
    own = type(tensor).__name__
    traced = is_wrapped(tensor)
    kind = f"{tensor.dtype}, {tensor.device}" + ", traced" * traced
    return kind if own in ("Tensor", "Parameter") else f"{own}, {kind}"


def _numbers(statistics: Statistics) -> tuple[str, ...]:
    if statistics.mean != statistics.mean:  # no number is finite
        return ("",) * 4
    return tuple(map(_number, (statistics.minimum, statistics.maximum, statistics.mean, statistics.std)))


def _number(value: complex) -> str:
    return str(value) if isinstance(value, int) else f"{value + 0:.4g}"


def _equals(value: str) -> str:
    return f"= {value:.60}".replace("\n", " ")


def _alarm(statistics: Statistics) -> str:
    found = (f"{statistics.nan:_} NaN" * bool(statistics.nan), f"{statistics.inf:_} Inf" * bool(statistics.inf))
    return ", ".join(filter(None, found))


def _elements(size: int) -> str:
    """Return a number of elements in words; while tracing, it may be a symbol."""
    return f"{size:_} element{'s' * (size != 1)}" if isinstance(size, int) else f"{size} elements"
