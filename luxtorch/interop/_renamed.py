"""luxtorch's normalisations with torch's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luxtorch.core import TRAINING, Layer, Parameters, States, WrapperLayer, test_mode

_COUNT = "num_batches_tracked"


class Renamed(WrapperLayer):
    """Call the parameter `scale` of a layer `weight`, as torch.nn does.

    Args:
        layer: A layer with a scale.

    Parameters:
        Those of the layer, `weight` in the place of `scale`.

    States:
        Those of the layer.
    """

    layer: Layer

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return the layer's parameters."""
        ps = self.layer.initial_parameters(key)
        return {"weight" if name == "scale" else name: value for name, value in ps.items()}

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Call the layer."""
        return self.layer(x, _with_scale(ps), st)


class RenamedBatchNorm(Renamed):
    """Be a `BatchNorm` as torch.nn has it: it counts the batches, and an empty one leaves its statistics alone.

    Args:
        layer: A BatchNorm with running statistics.

    Parameters:
        Those of the layer, `weight` in the place of `scale`.

    States:
        Those of the layer, and `num_batches_tracked`: ().
    """

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the layer's states, and the count."""
        return {**self.layer.initial_states(key), _COUNT: torch.zeros((), dtype=torch.int64, device=key.device)}

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Call the layer, and count the batch if it is trained on it."""
        own = {name: value for name, value in st.items() if name != _COUNT}
        y, new = self.layer(x, _with_scale(ps), own if x.numel() else test_mode(own))
        return (y, {**st, **new, TRAINING: st[TRAINING], _COUNT: st[_COUNT] + 1}) if st[TRAINING] else (y, st)


def _with_scale(ps: Parameters) -> dict[str, Any]:
    return {"scale" if name == "weight" else name: value for name, value in ps.items()}
