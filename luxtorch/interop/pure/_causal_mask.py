"""The question of torch's transformers whether a mask is the causal one, which they read its numbers for."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.modules import transformer

from luxtorch._torch import function_modes
from luxtorch._transforms import transformed, watched

from ._mode import PureMode

_of_torch: Any = transformer._detect_is_causal_mask


def _detect_is_causal_mask(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Say whether a mask is causal; in a converted module, one whose numbers may not be read counts as any other.

    Torch asks in order to take a kernel that is faster and has the same values, but leaves the mask out, and so its
    derivatives too. The mask itself, which is right whatever its numbers are, may be one of a batch, or only traced.
    """
    if is_causal is None and mask is not None and _in_a_converted_module():
        is_causal = False if transformed() or watched() or mask.requires_grad else None
    return _of_torch(mask, is_causal, size)  # type: ignore[no-any-return]


def _in_a_converted_module() -> bool:
    # Of all that says so, it is this stack that torch.compile knows as well.
    return any(isinstance(mode, PureMode) for mode in function_modes())


def install() -> None:
    """Make torch ask here; outside of the calls of converted modules the answer is as it was."""
    transformer._detect_is_causal_mask = _detect_is_causal_mask


install()
