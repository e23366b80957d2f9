"""Layers without parameters: identity, functions, flattening, reshaping, selecting, reversing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import Layer, Parameters, States, out_of_range
from luxtorch.core._container import refuse_modules


class NoOpLayer(Layer):
    """Identity: return the input unchanged.

    Shape:
        Anything to the same.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.NoOpLayer()(torch.ones(2), {}, {})
        >>> y
        tensor([1., 1.])

    Source: Lux's `NoOpLayer`, `torch.nn.Identity`.
    """

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return `(x, st)`."""
        return x, st


class WrappedFunction(Layer):
    """Make a layer of a function of the input.

    Args:
        function: Any pure function of the input. A module-level function can be pickled with the model, a lambda not.

    Shape:
        Whatever the function takes to whatever it returns.

    Raises:
        InputError: If the function is, or refers to, a module of torch.nn with tensors of its own, or a tensor that
            requires grad: `lt.from_torch` makes a layer of a module.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.WrappedFunction(torch.exp)(torch.zeros(2), {}, {})
        >>> y
        tensor([1., 1.])

    Source: Lux's `WrappedFunction`.
    """

    function: Callable[[Any], Any]

    def __post_init__(self) -> None:
        refuse_modules(self.function, "A function in a model")

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return `(function(x), st)`."""
        return self.function(x), st


class FlattenLayer(Layer):
    """Flatten a range of dimensions into one; by default, all but the batch.

    Args:
        start_dim: The first dimension to flatten.
        end_dim: The last dimension to flatten.

    Shape:
        (batch, *dims) to (batch, prod(dims))

    Raises:
        InputError: If the input has too few dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.FlattenLayer()(torch.ones(2, 3, 4), {}, {})
        >>> y.shape
        torch.Size([2, 12])

    Source: Lux's `FlattenLayer`, `torch.nn.Flatten`.
    """

    start_dim: int = 1
    end_dim: int = -1

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the flattened input and `st`."""
        return torch.flatten(x, self.start_dim, self.end_dim), st

    def expected_input(self) -> str:
        """Name the dimensions."""
        return f"a tensor with the dimensions {self.start_dim} to {self.end_dim}"


class ReshapeLayer(Layer):
    """Reshape each sample of the batch.

    Args:
        *shape: The sizes of all dimensions but the batch; one of them may be -1, to be inferred.

    Shape:
        (batch, ...) to (batch, *shape)

    Raises:
        InputError: If the shape is invalid, or does not fit the number of values of a sample.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.ReshapeLayer(3, -1)(torch.ones(2, 12), {}, {})
        >>> y.shape
        torch.Size([2, 3, 4])

    Source: Lux's `ReshapeLayer`, `torch.nn.Unflatten`.
    """

    shape: tuple[int, ...]

    def __init__(self, *shape: int) -> None:
        if not shape or not all(isinstance(n, int) and (n >= 1 or n == -1) for n in shape) or shape.count(-1) > 1:
            raise out_of_range("shape", shape, "one or more sizes of at least 1, or once -1")
        self._set(shape=shape)

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the reshaped input and `st`."""
        # Flattened first: so -1 can be inferred with an empty batch too.
        return torch.unflatten(x.flatten(1), 1, self.shape), st

    def expected_input(self) -> str:
        """Name the batch, and what a sample becomes."""
        return f"a tensor of shape (batch, ...) whose samples fit the shape {self.shape}"

    def extra_repr(self) -> str:
        """Return for instance `3, 4`."""
        return ", ".join(map(str, self.shape))


class SelectDim(Layer):
    """Select an index of a dimension, which is removed, or several, which keep the dimension.

    Args:
        dim: The dimension.
        index: An index for a view, or a sequence of them for a copy; negative ones count from the end.

    Shape:
        (..., size, ...) to (..., ...), or to (..., len(index), ...)

    Raises:
        InputError: If there is no index, or the input has no such dimension or index.

    Example:
        >>> import torch, luxtorch as lt
        >>> x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        >>> y, st = lt.SelectDim(1, -1)(x, {}, {})
        >>> y
        tensor([3., 6.])
        >>> y, st = lt.SelectDim(1, [2, 0])(x, {}, {})
        >>> y
        tensor([[3., 1.],
                [6., 4.]])

    Source: Lux's `SelectDim`, `torch.select`.
    """

    dim: int
    index: int | Sequence[int]

    def __post_init__(self) -> None:
        indices = (self.index,) if isinstance(self.index, int) else tuple(self.index)
        if not indices or not all(isinstance(index, int) for index in indices):
            raise out_of_range("index", self.index, "an integer, or a sequence of integers")
        if not isinstance(self.index, int):
            self._set(index=indices)

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the selected part and `st`."""
        if isinstance(self.index, int):
            return x.select(self.dim, self.index), st
        return torch.stack([x.select(self.dim, index) for index in self.index], self.dim), st

    def expected_input(self) -> str:
        """Name the dimension and the index."""
        return f"a tensor that has the index {self.index} in dimension {self.dim}"


class ReverseSequence(Layer):
    """Reverse the order along a dimension.

    Args:
        dim: The dimension; None for the second (the time of a batch of sequences), or the only one of a vector.

    Shape:
        (batch, time, ...) to the same

    Raises:
        InputError: If the input has no such dimension.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.ReverseSequence()(torch.tensor([[1.0, 2.0, 3.0]]), {}, {})
        >>> y
        tensor([[3., 2., 1.]])

    Source: Lux's `ReverseSequence`, `torch.flip`.
    """

    dim: int | None = None

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the reversed input and `st`."""
        dim = min(1, x.ndim - 1) if self.dim is None else self.dim
        return x.flip(dim), st

    def expected_input(self) -> str:
        """Name the dimension."""
        return "a tensor" if self.dim is None else f"a tensor that has the dimension {self.dim}"
