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
    return torch.compiler.is_compiling() or functional()


def functional() -> bool:
    """Tell whether a transform of torch.func or forward-mode differentiation is at work, compiled or not."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def transform_level() -> int:
    """Return how many transforms of torch.func surround the caller."""
    top = torch._C._functorch.peek_interpreter_stack()
    return 0 if top is None else top.level()


# torch.compile enters the levels while it traces, and so takes the number of the place as a constant. The decorator
# that sets this mark, torch.compiler.assume_constant_result, would load the whole compiler.
transform_level._dynamo_marked_constant = True  # type: ignore[attr-defined]
