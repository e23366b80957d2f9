"""Matrices whose rows and columns have the names of parameters, and the labels of these."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, final

import torch
from torch import Tensor

from luxtorch.core import InputError, KeyNameError, out_of_range, register_node, wrong_shape, wrong_type
from luxtorch.core._describe import tree_html
from luxtorch.core._table import plain

from ._axes import Axes, refuse_names
from ._functions import Named, call_with_names, handles, strip
from ._ravel import axes_and_leaves
from ._vector import ComponentVector, named


@final
class ComponentMatrix(Named):
    """Hold a matrix whose rows, columns or both have the names of a ComponentVector.

    `H["dense", "dense.weight"]` is the block of these rows and columns as a plain tensor, a view of the data. With a
    colon on one side, as in `H["dense", :]`, that side stays whole and the result is a ComponentMatrix. Any other
    index is one into the data.

    Products with ComponentVectors, tensors and matrices carry the names of the outer sides on, and so do `torch.outer`,
    `torch.linalg.inv` and `torch.linalg.solve`. What computes element by element keeps the names of both sides; all
    other torch functions return plain tensors. A batch of vectors is multiplied vector by vector.

    In torch 2.13, torch.compile traces `torch.matmul(H, v)`, but not `H @ v`.

    Args:
        data: The tensor.
        row_axes: The names of the rows; None if they have none.
        col_axes: The names of the columns; None if they have none.

    Shape:
        `data` is `(*batch, rows, columns)`.

    Raises:
        InputError: If a side with names does not have as many elements as its names.

    Example:
        >>> import torch, luxtorch as lt
        >>> ps = lt.ComponentVector({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)})
        >>> hessian = torch.func.hessian(lambda ps: (ps.a**2).sum() * ps.b)(ps)
        >>> H = lt.ComponentMatrix.from_jacobian(hessian)
        >>> H["a", "b"]
        tensor([[2.],
                [4.]])
        >>> (H @ ps).a
        tensor([12., 24.])
    """

    data: Tensor
    row_axes: Axes | None
    col_axes: Axes | None

    def __init__(self, data: Tensor, row_axes: Axes | None = None, col_axes: Axes | None = None) -> None:
        if not isinstance(data, Tensor):
            raise wrong_type("The data of a ComponentMatrix", data, "a tensor")
        wanted = [axes.size if axes is not None else None for axes in (row_axes, col_axes)]
        if data.dim() < 2 or any(n not in (None, m) for n, m in zip(wanted, data.shape[-2:], strict=True)):
            sizes = ", ".join("any" if size is None else str(size) for size in wanted)
            raise wrong_shape("The matrix", data, f"(..., {sizes}), the sizes of its axes")
        self.__dict__.update(data=data, row_axes=row_axes, col_axes=col_axes)

    @staticmethod
    def from_jacobian(jacobian: Any) -> ComponentMatrix:
        """Name the rows and columns of what `torch.func` returns as a Jacobian or a Hessian.

        Args:
            jacobian: What `jacrev`, `jacfwd` or `hessian` returned, where the input, the output or both were a
                ComponentVector: a ComponentVector whose flat tensor is the matrix, or is a ComponentVector again.
                If only one side has names and both are of one size, these are taken for the names of the columns,
                as in a Jacobian with respect to a ComponentVector.

        Raises:
            DTypeError: If it is not a ComponentVector.
            InputError: If its shape is not that of such a matrix.

        Example:
            >>> import torch, luxtorch as lt
            >>> ps = lt.ComponentVector({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)})
            >>> jacobian = torch.func.jacrev(lambda ps: ps.a * ps.b)(ps)
            >>> lt.ComponentMatrix.from_jacobian(jacobian)[:, "b"].data
            tensor([[1.],
                    [2.]])
        """
        if not isinstance(jacobian, ComponentVector):
            raise wrong_type("jacobian", jacobian, "a ComponentVector, as torch.func.jacrev returns for one")
        inner = jacobian.flat
        if isinstance(inner, ComponentVector):
            return ComponentMatrix(inner.flat, jacobian.axes, inner.axes)
        if inner.dim() > 1 and inner.shape[-1] != jacobian.axes.size:
            return ComponentMatrix(inner, jacobian.axes, None)
        return ComponentMatrix(inner, None, jacobian.axes)

    def __getitem__(self, key: Any) -> Any:
        if not (isinstance(key, tuple) and any(isinstance(side, str) for side in key)):
            if isinstance(key, str):
                fix = f"Write H['{key}', :] for these rows, or H[:, '{key}'] for these columns."
                raise out_of_range("The index of a block", key, "a pair, of rows and columns", fix=fix)
            if isinstance(key, tuple) and key == (slice(None), slice(None)):
                return self
            return self.data[key]
        if len(key) != 2 or not all(isinstance(side, str) or side == slice(None) for side in key):
            fix = "Take the block by its names first, then index it by numbers."
            raise out_of_range("The index of a block", key, "a pair of names, or of a name and a colon", fix=fix)
        rows, row_axes = _side(self.row_axes, key[0], "rows")
        columns, col_axes = _side(self.col_axes, key[1], "columns")
        block = self.data[..., rows, columns]
        if isinstance(key[0], str) and isinstance(key[1], str):
            return block
        return _new(block, row_axes, col_axes)

    @property
    def T(self) -> ComponentMatrix:
        """The transposed matrix, or matrices; not a copy."""
        return _new(self.data.mT, self.col_axes, self.row_axes)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the data."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """The device of the data."""
        return self.data.device

    @property
    def shape(self) -> torch.Size:
        """The shape of the data."""
        return self.data.shape

    def detach(self) -> ComponentMatrix:
        """Return the matrix detached from the autograd graph; the memory is shared."""
        return _new(self.data.detach(), self.row_axes, self.col_axes)

    def to(self, *args: Any, **kwargs: Any) -> ComponentMatrix:
        """Return the matrix in another dtype or on another device; the arguments are those of `torch.Tensor.to`."""
        return _new(self.data.to(*args, **kwargs), self.row_axes, self.col_axes)

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def _strip(self) -> Tensor:
        return self.data

    def _rename(self, result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        if result.shape[-2:] != self.data.shape[-2:]:
            raise InputError(
                "A side of the matrix was broadcast, so that its names do not fit the result.",
                expected=f"a result of shape (..., {self.data.shape[-2]}, {self.data.shape[-1]})",
                got=f"{tuple(result.shape)}",
                fix="Use H.data where the result is a plain tensor.",
            )
        return _new(result, self.row_axes, self.col_axes)

    def _check_names(self, other: Named) -> None:
        if not isinstance(other, ComponentMatrix):
            raise InputError(
                f"A ComponentMatrix and a {type(other).__name__} cannot be combined element by element.",
                fix="Use @ for their product, or the flat tensor to broadcast it.",
            )
        for own, its in ((self.row_axes, other.row_axes), (self.col_axes, other.col_axes)):
            _check_equal(own, its)
            if (own is None) != (its is None):
                raise InputError(
                    "Both matrices must have names on the same sides.",
                    fix="Give both the same names, or use .data of one of them.",
                )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return call_with_names(func, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        raise InputError(f"A ComponentMatrix is immutable: '{name}' cannot be set.")

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (self.data, self.row_axes, self.col_axes)

    def __repr__(self) -> str:
        data, row_axes, col_axes = self.data, self.row_axes, self.col_axes
        if not isinstance(data, Tensor):
            return f"ComponentMatrix({data!r}, {row_axes!r}, {col_axes!r})"
        return "\n".join(
            [
                f"ComponentMatrix of shape {tuple(data.shape)} ({data.dtype}, {data.device})",
                f"  rows: {', '.join(row_axes) if row_axes is not None else 'no names'}",
                f"  columns: {', '.join(col_axes) if col_axes is not None else 'no names'}",
                f"  {str(data.detach()).replace(chr(10), chr(10) + '  ')}",
            ]
        )

    def _repr_html_(self) -> str:
        data = self.data
        if not isinstance(data, Tensor):
            return plain(repr(self))
        columns = _parts(self.col_axes)
        blocks = {row: {column: data[..., i, j] for column, j in columns} for row, i in _parts(self.row_axes)}
        return tree_html(blocks, f"ComponentMatrix of shape {tuple(data.shape)}")


def _parts(axes: Axes | None) -> list[tuple[str, slice]]:
    """Return the names at the top of a side, with the rows or columns that they cover."""
    return [(":", slice(None))] if axes is None else [(name, axes.slice(name)) for name in axes]


def _new(data: Any, row_axes: Axes | None, col_axes: Axes | None) -> ComponentMatrix:
    """Return the matrix of this data and these names, without checks."""
    matrix: ComponentMatrix = object.__new__(ComponentMatrix)
    matrix.__dict__.update(data=data, row_axes=row_axes, col_axes=col_axes)
    return matrix


def _name(data: Tensor, row_axes: Axes | None, col_axes: Axes | None) -> ComponentMatrix | Tensor:
    return data if row_axes is None and col_axes is None else _new(data, row_axes, col_axes)


def _name_vector(flat: Tensor, axes: Axes | None) -> ComponentVector | Tensor:
    return flat if axes is None else named(flat, axes)


def _side(axes: Axes | None, key: str | slice, what: str) -> tuple[slice, Axes | None]:
    """Return which rows or columns a key takes, and the names that they have in the result."""
    if isinstance(key, slice):
        return key, axes
    if axes is None:
        raise InputError(f"The {what} of this matrix have no names.", got=f"'{key}'", fix="Write a colon there.")
    child = axes[key]
    return axes.slice(key), child if isinstance(child, Axes) else None


def _check_equal(a: Axes | None, b: Axes | None) -> None:
    """Raise an error if two sides that meet both have names, and different ones."""
    if a is not None and b is not None and a is not b:
        refuse_names(a, b)


def _sides(value: Any) -> tuple[Axes | None, Axes | None]:
    """Return the names of the rows and of the columns; a vector's are the same, as it is a row or a column."""
    if isinstance(value, ComponentMatrix):
        return value.row_axes, value.col_axes
    return (value.axes, value.axes) if isinstance(value, ComponentVector) else (None, None)


@handles("matmul", "__matmul__", "mm", "mv")
def _product(func: Callable[..., Tensor], a: Any, b: Any) -> Any:
    """Multiply, and put the names of the outer sides on the product; of vectors alone it is a plain tensor."""
    (rows, inner_a), (inner_b, cols) = _sides(a), _sides(b)
    _check_equal(inner_a, inner_b)
    left, right = strip((a, b), [])
    if not isinstance(a, ComponentMatrix) and not isinstance(b, ComponentMatrix):
        return func(left, right)
    if isinstance(a, ComponentVector):
        return _name_vector(torch.matmul(left.unsqueeze(-2), right).squeeze(-2), cols)
    if isinstance(b, ComponentVector):
        return _name_vector(torch.matmul(left, right.unsqueeze(-1)).squeeze(-1), rows)
    result = func(left, right)
    if left.dim() == 1 or right.dim() == 1:
        return _name_vector(result, rows if right.dim() == 1 else cols)
    return _name(result, rows, cols)


@handles("outer")
def _outer(func: Callable[..., Tensor], a: Any, b: Any) -> ComponentMatrix:
    """Multiply each element of one vector with each of the other; the sides have the vectors' names."""
    return _new(func(*strip((a, b), [])), _sides(a)[0], _sides(b)[1])


@handles("inv", "inverse", "pinv")
def _inverse(func: Callable[..., Tensor], a: Named, **options: Any) -> Any:
    result = func(a._strip(), **options)
    return _new(result, a.col_axes, a.row_axes) if isinstance(a, ComponentMatrix) else result


@handles("solve")
def _solve(func: Callable[..., Tensor], a: Any, b: Any) -> Any:
    """Solve a linear system; the solution has the names of the columns of the matrix."""
    (rows, names), (inner, cols) = _sides(a), _sides(b)
    _check_equal(rows, inner)
    left, right = strip((a, b), [])
    if isinstance(b, ComponentVector):
        return _name_vector(func(left, right.unsqueeze(-1)).squeeze(-1), names)
    result = func(left, right)
    return _name_vector(result, names) if right.dim() == 1 else _name(result, names, cols)


register_node(
    ComponentMatrix,
    lambda matrix: ([matrix.data], (matrix.row_axes, matrix.col_axes)),
    lambda children, axes: _new(next(iter(children)), *axes),
    names=["data"],
)
torch.serialization.add_safe_globals([_new])


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
