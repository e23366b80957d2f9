"""Labels: the name of each element of a flat vector, and the index of a name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

from luxtorch.core import KeyNameError

from ._axes import Axes
from ._ravel import axes_and_leaves
from ._vector import ComponentVector


def axes(tree: Any, *, batch_dims: int = 0) -> Axes:
    """Return the names and shapes that a tree of tensors has as a flat vector.

    Args:
        tree: A dict of tensors, nested or not, or a ComponentVector.
        batch_dims: How many leading dimensions of every leaf do not count.

    Raises:
        InputError: If a name is not a string, is empty or has a dot.
        DTypeError: If a leaf is not a tensor.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.axes({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
        Axes(weight=(2, 3), bias=(2,))
    """
    return tree.axes if isinstance(tree, ComponentVector) else axes_and_leaves(tree, batch_dims)[0]


def labels(vector: ComponentVector | Axes) -> list[str]:
    """Return the name of every element of a flat vector.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.labels(lt.axes({"dense": {"weight": torch.zeros(1, 2)}, "scale": torch.zeros(())}))
        ['dense.weight[0, 0]', 'dense.weight[0, 1]', 'scale']
    """
    return list(_labels(_axes_of(vector)))


def label_to_index(vector: ComponentVector | Axes, label: str) -> int | slice:
    """Return where a name points to in a flat vector.

    Args:
        vector: A ComponentVector or its axes.
        label: The dotted name of a component, or that of one element, as `labels` gives it.

    Returns:
        The slice of the flat vector that a component covers; the index of an element that has one in its name.

    Raises:
        KeyNameError: If there is no such component or element.

    Example:
        >>> import torch, luxtorch as lt
        >>> layout = lt.axes({"dense": {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}})
        >>> lt.label_to_index(layout, "dense.bias"), lt.label_to_index(layout, "dense.bias[1]")
        (slice(4, 6, None), 5)
    """
    layout = _axes_of(vector)
    element = _ELEMENT.fullmatch(label)
    if element is None or label in layout:
        return layout.slice(label)
    place = layout.place(element["name"])
    index = [int(i) for i in element["index"].split(",")]
    shape = place.child
    if isinstance(shape, Axes) or len(index) != len(shape) or any(i >= n for i, n in zip(index, shape, strict=True)):
        raise KeyNameError(
            f"There is no element '{label}'.",
            expected=f"an index into '{element['name']}', whose shape is {shape}",
            got=f"[{element['index']}]",
        )
    offset = 0
    for i, n in zip(index, shape, strict=True):
        offset = offset * n + i
    return place.start + offset


_ELEMENT = re.compile(r"(?P<name>.+)\[(?P<index>\d+(, *\d+)*)\]", re.DOTALL)


def _axes_of(vector: ComponentVector | Axes) -> Axes:
    return vector.axes if isinstance(vector, ComponentVector) else vector


def _labels(layout: Axes) -> Iterator[str]:
    for name, shape in layout.shapes.items():
        for index in product(*map(range, shape)):
            yield f"{name}[{', '.join(map(str, index))}]" if index else name
