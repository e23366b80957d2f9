"""Layers that enlarge: `Upsample` and `PixelShuffle`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY

import torch.nn.functional as F
from torch import Tensor

from luxtorch.core import InputError, Layer, Parameters, States, suggest

_MODES = {
    "nearest": (1, 2, 3),
    "area": (1, 2, 3),
    "linear": (1,),
    "bilinear": (2,),
    "bicubic": (2,),
    "trilinear": (3,),
}
_ALIGNED = ("linear", "bilinear", "bicubic", "trilinear")


class Upsample(Layer):
    """Enlarge, or shrink, all dimensions but batch and channels by interpolation.

    Args:
        mode: "nearest" or "area", for one to three dimensions; "linear" for one; "bilinear" or "bicubic" for two;
            "trilinear" for three.
        scale_factor: The factor, one for all dimensions or one for each. Either this or `size` is given.
        size: The output's size, one for all dimensions or one for each.
        align_corners: Whether the corner elements keep their values, in the modes that are linear or cubic.

    Shape:
        (batch, channels, *dims) to (batch, channels, *new dims)

    Raises:
        InputError: If the arguments do not fit each other, or the mode does not fit the input's dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.Upsample("nearest", scale_factor=2)(torch.tensor([[[1.0, 2.0]]]), {}, {})
        >>> y
        tensor([[[1., 1., 2., 2.]]])

    Source: Lux's `Upsample`, `torch.nn.Upsample`.
    """

    mode: str = "nearest"
    _: KW_ONLY
    scale_factor: float | Sequence[float] | None = None
    size: int | Sequence[int] | None = None
    align_corners: bool = False

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise InputError(
                f"There is no mode '{self.mode}'.", expected=", ".join(_MODES), fix=suggest(str(self.mode), _MODES)
            )
        if (self.scale_factor is None) == (self.size is None):
            raise InputError(
                "Upsample takes either a factor or a size.",
                expected="scale_factor or size",
                got="neither" if self.size is None else "both",
            )
        if self.align_corners and self.mode not in _ALIGNED:
            raise InputError(
                f"The mode '{self.mode}' has no corners to align.",
                expected="align_corners=False, or one of the modes " + ", ".join(_ALIGNED),
                got="align_corners=True",
            )
        for name, value in (("scale_factor", self.scale_factor), ("size", self.size)):
            if value is None:
                continue
            numbers = tuple(value) if isinstance(value, Sequence) else (value,)
            if not all(number > 0 for number in numbers):
                raise InputError(f"The {name} is positive.", expected="positive numbers", got=f"{name}={value!r}")
            if isinstance(value, Sequence):
                self._set(**{name: numbers})

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the interpolated input and `st`."""
        if x.ndim - 2 not in _MODES[self.mode]:
            raise InputError(
                "The mode does not fit the input's dimensions.",
                expected=self.expected_input(),
                got=f"a tensor of shape {tuple(x.shape)}",
                fix="The first two dimensions are batch and channels.",
            )
        corners = self.align_corners if self.mode in _ALIGNED else None
        y = F.interpolate(x, self.size, self.scale_factor, self.mode, corners)
        return y, st

    def expected_input(self) -> str:
        """Name the number of dimensions."""
        dims = " or ".join(str(2 + dims) for dims in _MODES[self.mode])
        return f"a tensor of {dims} dimensions, (batch, channels, ...)"


class PixelShuffle(Layer):
    """Turn channels into a finer grid: a channel for each place in a block becomes that block.

    Args:
        upscale_factor: The factor by which each dimension but batch and channels grows.

    Shape:
        (batch, channels * upscale_factor ** n, *dims) to (batch, channels, *dims * upscale_factor), for n dims

    Raises:
        InputError: If the factor is not positive or the channels are not a multiple of the blocks' size.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.PixelShuffle(2)(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1), {}, {})
        >>> y
        tensor([[[[1., 2.],
                  [3., 4.]]]])

    Source: Lux's `PixelShuffle`, `torch.nn.PixelShuffle`; Shi et al., "Real-time single image and video
    super-resolution using an efficient sub-pixel convolutional neural network", 2016.
    """

    upscale_factor: int

    def __post_init__(self) -> None:
        if self.upscale_factor < 1:
            raise InputError(
                "The factor is positive.", expected="a positive integer", got=f"upscale_factor={self.upscale_factor}"
            )

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the rearranged input and `st`."""
        dims, factor = x.ndim - 2, self.upscale_factor
        if dims < 1 or x.shape[1] % factor**dims:
            raise InputError(
                "The channels do not fill the blocks.",
                expected=self.expected_input(),
                got=f"a tensor of shape {tuple(x.shape)}",
            )
        channels = x.shape[1] // factor**dims
        blocks = x.reshape(x.shape[0], channels, *(factor,) * dims, *x.shape[2:])
        order = [axis for dim in range(dims) for axis in (2 + dims + dim, 2 + dim)]
        return blocks.permute(0, 1, *order).reshape(x.shape[0], channels, *(factor * n for n in x.shape[2:])), st

    def expected_input(self) -> str:
        """Name the channels."""
        return f"a tensor of shape (batch, a multiple of {self.upscale_factor} ** n, ...), for n dimensions after them"
