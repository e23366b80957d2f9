"""Whether anything looks on while plain eager code runs: the one file that asks torch about it."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Tell whether a transform of torch.func, forward-mode differentiation or a compiler is at work.

    Some of torch's fused kernels have no rule for these; where this is False they may be used. An ordinary
    autograd tape does not count: every kernel knows it.

    Example:
        >>> import torch
        >>> transformed(), bool(torch.func.vmap(lambda x: x + transformed())(torch.zeros(1)))
        (False, True)
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )
