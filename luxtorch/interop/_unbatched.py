"""A layer that takes one sample as well as a batch."""

from __future__ import annotations

from torch import Tensor

from luxtorch.core import Layer, Parameters, States, WrapperLayer


class Unbatched(WrapperLayer):
    """Pass an input without a batch through a layer as a batch of one.

    Args:
        layer: The layer.
        ndim: The number of dimensions of a batch.

    Shape:
        What the layer takes to what it returns, both with or both without the first dimension.
    """

    layer: Layer
    ndim: int

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the layer's output, without a batch if the input has none, and its states."""
        if x.ndim != self.ndim - 1:
            y, st = self.layer(x, ps, st)
            return y, st
        y, st = self.layer(x.unsqueeze(0), ps, st)
        return y.squeeze(0), st
