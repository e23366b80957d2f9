"""Layers that change the resolution: `Upsample`, `PixelShuffle` and `PixelUnshuffle`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import transformed
from luxtorch.core import InputError, Layer, Parameters, States, out_of_range, suggest
from luxtorch.core._sharded import beside

from ._shared import require_size, unfit, widened

_MODES = {
    "nearest": (1, 2, 3),
    "nearest-exact": (1, 2, 3),
    "area": (1, 2, 3),
    "linear": (1,),
    "bilinear": (2,),
    "bicubic": (2,),
    "trilinear": (3,),
}
_ALIGNED = ("linear", "bilinear", "bicubic", "trilinear")
_ANTIALIASED = ("bilinear", "bicubic")


class Upsample(Layer):
    """Resize all dimensions but batch and channels by interpolation.

    Args:
        mode: "nearest", "nearest-exact" or "area", for one to three dimensions; "linear" for one; "bilinear" or
            "bicubic" for two; "trilinear" for three. Of the nearest modes, the exact one measures from the centers of
            elements, as image libraries do, and the other from their starts.
        scale_factor: The factor, one for all dimensions or one for each. Either this or `size` is given.
        size: The output's size, one for all dimensions or one for each.
        align_corners: Whether the corner elements keep their values, in the modes that are linear or cubic.
        antialias: Whether shrinking averages over all that an output covers, in the modes "bilinear" and "bicubic".

    Shape:
        (batch, channels, *dims) to (batch, channels, *new dims)

    Raises:
        InputError: If the arguments do not fit each other, or the mode does not fit the input's dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.Upsample("nearest", scale_factor=2)(torch.tensor([[[1.0, 2.0]]]), {}, {})
        >>> y
        tensor([[[1., 1., 2., 2.]]])

    Source: Lux's `Upsample`, `torch.nn.Upsample`, `torch.nn.functional.interpolate`.
    """

    mode: str = "nearest"
    _: KW_ONLY
    scale_factor: float | Sequence[float] | None = None
    size: int | Sequence[int] | None = None
    align_corners: bool = False
    antialias: bool = False

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise InputError(
                f"There is no mode '{self.mode}'.", expected=", ".join(_MODES), fix=suggest(str(self.mode), _MODES)
            )
        if (self.scale_factor is None) == (self.size is None):
            got = "neither" if self.size is None else "both"
            raise InputError("Upsample needs exactly one of scale_factor and size.", got=got)
        for name, modes in (("align_corners", _ALIGNED), ("antialias", _ANTIALIASED)):
            if getattr(self, name) and self.mode not in modes:
                raise out_of_range(name, True, f"False with mode={self.mode!r}, or the mode one of {', '.join(modes)}")
        for name, value in (("scale_factor", self.scale_factor), ("size", self.size)):
            if value is None:
                continue
            numbers = tuple(value) if isinstance(value, Sequence) else (value,)
            if not all(number > 0 for number in numbers):
                raise out_of_range(name, value, "above 0")
            if isinstance(value, Sequence):
                self._set(**{name: numbers})

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the interpolated input and `st`."""
        if x.ndim - 2 not in _MODES[self.mode]:
            raise unfit(self, x, "The input must have a batch, channels and the dimensions of the mode.")
        if self.mode == "nearest-exact" and transformed():
            return self._picked(x), st
        corners = self.align_corners if self.mode in _ALIGNED else None
        wide = widened(x) if self.antialias else x
        y = F.interpolate(wide, self.size, self.scale_factor, self.mode, corners, antialias=self.antialias)
        return y.to(x.dtype), st

    def _picked(self, x: Tensor) -> Tensor:
        """Interpolate indices instead of the input: torch's kernel for "nearest-exact" has no batching rule."""
        dtype = torch.promote_types(x.dtype, torch.float32)  # positions are rounded as for this input
        for dim in range(2, x.ndim):
            size = self.size[dim - 2] if isinstance(self.size, tuple) else self.size
            factor = self.scale_factor[dim - 2] if isinstance(self.scale_factor, tuple) else self.scale_factor
            positions = torch.arange(x.shape[dim], dtype=dtype, device=x.device)[None, None]
            x = x.index_select(dim, beside(F.interpolate(positions, size, factor, self.mode)[0, 0].long(), x))
        return x

    def expected_input(self) -> str:
        """Name the number of dimensions."""
        dims = " or ".join(str(2 + dims) for dims in _MODES[self.mode])
        return f"a tensor of {dims} dimensions, (batch, channels, ...)"


class PixelShuffle(Layer):
    """Rearrange channels into space: factor ** n channels become a block of n dimensions.

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
        _check_factor("upscale_factor", self.upscale_factor)

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the rearranged input and `st`."""
        dims, factor = x.ndim - 2, self.upscale_factor
        if dims < 1 or x.shape[1] % factor**dims:
            raise unfit(self, x, "The channels must be a multiple of the block size.")
        channels = x.shape[1] // factor**dims
        blocks = x.reshape(x.shape[0], channels, *(factor,) * dims, *x.shape[2:])
        # Each dimension of a block goes after the spatial dimension that it refines.
        order = [axis for dim in range(dims) for axis in (2 + dims + dim, 2 + dim)]
        sizes = [factor * size for size in x.shape[2:]]
        return blocks.permute(0, 1, *order).reshape(x.shape[0], channels, *sizes), st

    def expected_input(self) -> str:
        """Name the channels."""
        return f"a tensor of shape (batch, a multiple of {self.upscale_factor} ** n, ...), for n dimensions after them"


class PixelUnshuffle(Layer):
    """Rearrange blocks of space into channels: the inverse of `PixelShuffle`.

    Args:
        downscale_factor: The factor by which each dimension but batch and channels shrinks.

    Shape:
        (batch, channels, *dims) to (batch, channels * downscale_factor ** n, *dims / downscale_factor), for n dims

    Raises:
        InputError: If the factor is not positive or a dimension is not a multiple of it.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.PixelUnshuffle(2)(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), {}, {})
        >>> y.shape, y.flatten()
        (torch.Size([1, 4, 1, 1]), tensor([1., 2., 3., 4.]))

    Source: `torch.nn.PixelUnshuffle`.
    """

    downscale_factor: int

    def __post_init__(self) -> None:
        _check_factor("downscale_factor", self.downscale_factor)

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the rearranged input and `st`."""
        dims, factor = x.ndim - 2, self.downscale_factor
        if dims < 1 or any(size % factor for size in x.shape[2:]):
            raise unfit(self, x, f"Each spatial dimension must be a multiple of {factor}.")
        sizes = [size // factor for size in x.shape[2:]]
        blocks = x.reshape(*x.shape[:2], *(number for size in sizes for number in (size, factor)))
        places, grid = range(3, 3 + 2 * dims, 2), range(2, 2 + 2 * dims, 2)
        channels = x.shape[1] * factor**dims
        return blocks.permute(0, 1, *places, *grid).reshape(x.shape[0], channels, *sizes), st

    def expected_input(self) -> str:
        """Name the dimensions."""
        return f"a tensor of shape (batch, channels, ...) with dimensions that are multiples of {self.downscale_factor}"


def _check_factor(name: str, factor: int) -> None:
    require_size(name, factor)
