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


def watched() -> bool:
    """Tell whether a dispatch mode sees every operator, as when `jit` traces: a tensor may have no numbers then."""
    return torch._C._len_torch_dispatch_stack() > 0


def traced() -> bool:
    """Tell whether operators are recorded, or run on tensors without numbers, instead of being run."""
    return torch.compiler.is_compiling() or any(map(torch._C._get_dispatch_mode, _TRACERS))


_TRACERS = (
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def reverse_alone() -> bool:
    """Tell whether nothing is at work but an autograd tape and at most one reverse-mode transform of torch.func."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    kinds = [level.key() for level in stack if level.key() != torch._C._functorch.TransformType.Functionalize]
    return forward_ad._current_level < 0 and kinds in ([], [torch._C._functorch.TransformType.Grad])


def transform_level() -> int:
    """Return how many transforms of torch.func surround the caller."""
    top = torch._C._functorch.peek_interpreter_stack()
    return 0 if top is None else top.level()


# torch.compile enters the levels while it traces, and so takes the number of the place as a constant. The decorator
# that sets this mark, torch.compiler.assume_constant_result, would load the whole compiler.
transform_level._dynamo_marked_constant = True  # type: ignore[attr-defined]
reverse_alone._dynamo_marked_constant = True  # type: ignore[attr-defined]
