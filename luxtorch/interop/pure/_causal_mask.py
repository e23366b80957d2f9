"""Causal masks of torch's transformers, which are detected by their values unless a transform is active."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.modules import transformer

from luxtorch._torch import function_modes
from luxtorch._transforms import transformed, watched

from ._mode import PureMode

_of_torch: Any = transformer._detect_is_causal_mask


def _detect_is_causal_mask(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Return whether a mask is causal; in a converted module, False if its values cannot be read.

    torch detects it to choose a faster kernel with the same values, which ignores the mask, and so its derivatives.
    With the mask itself the result is right for all values; it may be batched by vmap, or traced.
    """
    if is_causal is None and mask is not None and _in_a_converted_module():
        is_causal = False if transformed() or watched() or mask.requires_grad else None
    return _of_torch(mask, is_causal, size)  # type: ignore[no-any-return]


def _in_a_converted_module() -> bool:
    # This stack of modes can be read under torch.compile too.
    return any(isinstance(mode, PureMode) for mode in function_modes())


def install() -> None:
    """Patch the detection in torch; outside of the calls of converted modules it is unchanged."""
    transformer._detect_is_causal_mask = _detect_is_causal_mask


install()
