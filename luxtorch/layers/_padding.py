"""Padding by itself: `Pad`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY

import torch
from torch import Tensor

from luxtorch.core import InputError, Layer, Parameters, States

from ._spatial import PADDING_MODES, Pairs, check_padding_mode, padded, shown, sides

_MODES = {**PADDING_MODES, "constant": "constant", "symmetric": None}


class Pad(Layer):
    """Put something before and after each spatial dimension, or cut it off where a number is negative.

    Args:
        padding: A number for all dimensions but batch and channels; or, in order of the dimensions, a tuple with a
            number or a pair (before, after) for each of the last one to three. torch's functions take the numbers of
            the last dimension first.
        mode: What is put there: "zeros"; "constant", a given value; "replicate", the outermost element; "reflect",
            what lies inside of it; "symmetric", the same from that element on; "circular", what lies at the other end.
        value: The value of the mode "constant".

    Shape:
        (batch, channels, *dims) to (batch, channels, *dims + before + after). With a tuple the batch may be missing.

    Raises:
        InputError: If the arguments do not fit each other, or the input is too small for the mode: "reflect" takes
            less than a dimension's size at either side, "circular" and "symmetric" no more than that.

    Example:
        >>> import torch, luxtorch as lt
        >>> x = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> lt.Pad(((1, 2),))(x, {}, {})[0]
        tensor([[[0., 1., 2., 3., 0., 0.]]])
        >>> lt.Pad(((-1, 2),), "symmetric")(x, {}, {})[0]
        tensor([[[2., 3., 3., 2.]]])

    Source: NNlib's `pad_zeros`, `pad_constant`, `pad_reflect`, `pad_symmetric`, `pad_circular` and `pad_repeat`;
    `torch.nn.ZeroPad2d`, `ConstantPad2d`, `ReflectionPad2d`, `ReplicationPad2d`, `CircularPad2d`.
    """

    padding: int | Sequence[int | Sequence[int]]
    mode: str = "zeros"
    _: KW_ONLY
    value: float = 0.0

    def __post_init__(self) -> None:
        check_padding_mode(self.mode, _MODES)
        if self.value != 0 and self.mode != "constant":
            raise InputError(
                f"The mode '{self.mode}' takes no value.",
                expected="value=0, or mode='constant'",
                got=f"value={self.value}",
            )
        if isinstance(self.padding, int):
            return
        dims = len(self.padding) if isinstance(self.padding, Sequence) else 0
        found = sides(self.padding, dims) if 0 < dims <= 3 else None
        if found is None:
            raise InputError(
                "The length of the padding says how many dimensions are padded.",
                expected="a number, or a tuple of 1, 2 or 3 numbers or pairs (before, after)",
                got=f"padding={self.padding!r}",
            )
        self._set(padding=found)

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the padded input and `st`."""
        pairs, mode = self._pairs(x), _MODES[self.mode]
        if mode is None:
            return _symmetric(x, pairs), st
        return padded(x, pairs, mode, self.value if mode == "constant" else None), st

    def _pairs(self, x: Tensor) -> Pairs:
        alike = isinstance(self.padding, int)
        dims = x.ndim - 2 if alike else len(self.padding)  # type: ignore[arg-type]
        if not 0 < dims <= min(3, x.ndim):
            raise InputError(
                "The input does not have the dimensions to be padded.",
                expected=self.expected_input(),
                got=f"a tensor of shape {tuple(x.shape)}",
            )
        return ((self.padding, self.padding),) * dims if alike else self.padding  # type: ignore[return-value]

    def expected_input(self) -> str:
        """Name the dimensions."""
        if isinstance(self.padding, int):
            return "a tensor of shape (batch, channels, ...) with one to three dimensions more, that bear the padding"
        return f"a tensor whose last {len(self.padding)} dimensions bear the padding"

    def extra_repr(self) -> str:
        """Return for instance `((1, 2),), 'reflect'`."""
        mode = [repr(self.mode)] if self.mode != "zeros" else []
        return ", ".join([str(self.padding), *mode, *shown("value", self.value, 0)])


def _symmetric(x: Tensor, pairs: Pairs) -> Tensor:
    """Put the elements at each end once more beside it, in reverse order."""
    x = padded(x, tuple((min(low, 0), min(high, 0)) for low, high in pairs))
    for dim, (low, high) in zip(range(-len(pairs), 0), pairs, strict=True):
        size, (before, after) = x.shape[dim], (max(low, 0), max(high, 0))
        if max(before, after) > size:
            raise InputError(
                "The input is too small to be mirrored.",
                expected=f"at least {max(before, after)} elements in dimension {dim}",
                got=f"{size}",
            )
        first, last = x.narrow(dim, 0, before), x.narrow(dim, size - after, after)
        x = torch.cat([first.flip(dim), x, last.flip(dim)], dim)
    return x
