"""Convolutions as layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from luxtorch.core import InputError, Layer, Parameters, States
from luxtorch.layers import Conv, ConvTranspose

from ._inputs import Inputs, bound


class SizedConvTranspose(ConvTranspose):
    """Be a `ConvTranspose` that may be told the size of its output, as `torch.nn.ConvTranspose2d` may.

    Args:
        kernel_size: As in `ConvTranspose`, like all others.
        in_channels: The size of the input's second dimension.
        out_channels: The size of the output's second dimension.
        activation: A function of a tensor; None for none.

    Shape:
        (batch, in_channels, *dims), or `Inputs` of it and of an `output_size`, to (batch, out_channels, *new dims).

    Source: `torch.nn.ConvTranspose2d`.
    """

    def __call__(self, x: Tensor | Inputs, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the transposed convolution of the input, and `st`."""
        image, size = bound(x, "input", "output_size") if isinstance(x, Inputs) else (x, None)
        # Another layer, with the padding of this size: ConvTranspose's own call knows nothing of sizes.
        plain = ConvTranspose.__call__
        return plain(self if size is None else replace(self, output_padding=self._missing(image, size)), image, ps, st)

    def _missing(self, x: Tensor, size: Sequence[int]) -> tuple[int, ...]:
        """Return how much longer an output of the given size is than the shortest."""
        steps, ends = self.stride, zip(self._cut, self._extent, strict=True)
        least = [
            (n - 1) * step - low - high + reach + 1
            for n, step, ((low, high), reach) in zip(x.shape[-self._dims :], steps, ends, strict=True)  # type: ignore[arg-type]
        ]
        more = tuple(n - m for n, m in zip(size[-self._dims :], least, strict=True))
        if min(more) < 0:
            raise InputError(
                "The output cannot be as small.", expected=f"at least {tuple(least)}", got=f"{tuple(size)}"
            )
        return more


def _conv(module: Any) -> Conv:
    return Conv(*_sizes(module), padding_mode=module.padding_mode, **_options(module))


def _conv_transpose(module: Any) -> ConvTranspose:
    return SizedConvTranspose(*_sizes(module), output_padding=module.output_padding, **_options(module))


def _sizes(module: Any) -> tuple[Any, int, int]:
    return module.kernel_size, module.in_channels, module.out_channels


def _options(module: Any) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "groups")
    return {**{name: getattr(module, name) for name in names}, "bias": module.bias is not None}


CONVERTERS: dict[type[nn.Module], Callable[[Any], Layer | None]] = {
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.ConvTranspose1d: _conv_transpose,
    nn.ConvTranspose2d: _conv_transpose,
    nn.ConvTranspose3d: _conv_transpose,
}
