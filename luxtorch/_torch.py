"""Private names of torch that luxtorch uses, in one place: a new release of torch shows here what it has changed.

Other modules take them from here. Those that live by the insides of one part of torch name these themselves:
`autodiff/_torch_func.py` (levels of torch.func), `jit/`, `optim/_leafwise.py` and `loops/` (tracing,
Inductor, guards), `random/_philox.py` and `layers/recurrent/_kernels.py` (kernels). `tests/test_torch_private.py`
checks that each name is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _disable_current_modes

F = TypeVar("F", bound=Callable[..., Any])


def compile_constant(function: F) -> F:
    """Let torch.compile call a function while it traces, and take the result as a constant, instead of tracing it.

    Arguments and results have to be numbers, strings or tuples of these, arguments also functions or pytree constants.
    Errors of our own can only be raised in such functions.
    """
    # All that torch.compiler.assume_constant_result does, but that loads the whole compiler first: two seconds.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Transforms of torch.func: what wraps a tensor, and which are at work.
TransformType = torch._C._functorch.TransformType
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
is_batched = torch._C._functorch.is_batchedtensor
get_unwrapped = torch._C._functorch.get_unwrapped
unwrap_for_grad = torch._C._functorch._unwrap_for_grad
wrap_for_grad = torch._C._functorch._wrap_for_grad
add_batch_dim = torch._C._functorch._add_batch_dim
unwrap_if_dead = torch._C._functorch.unwrap_if_dead
level_of = torch._C._functorch.maybe_get_level
current_level = torch._C._functorch.maybe_current_level
innermost_transform = torch._C._functorch.peek_interpreter_stack
all_transforms = torch._C._functorch.get_interpreter_stack
batch_dim_of = torch._C._functorch.maybe_get_bdim


def below_transform() -> AbstractContextManager[Any]:
    """Leave the innermost transform for a while."""
    # Imported late, as torch does, because it is slow.
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    return retrieve_current_functorch_interpreter().lower()


def outside_transforms() -> AbstractContextManager[Any]:
    """Leave all transforms for a while."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def primal_of(tensor: Tensor) -> Tensor:
    """Return a tensor without the tangent that it has at the innermost transform, or outside of all transforms."""
    return torch._VF._unpack_dual(tensor, level=0)[0]


def tangent_of(tensor: Tensor) -> Tensor | None:
    """Return the tangent that a tensor has at the innermost transform, or outside of all transforms."""
    return torch._VF._unpack_dual(tensor, level=0)[1]


def forward_level() -> int:
    """Return the level of forward-mode differentiation; -1 outside of it."""
    return forward_ad._current_level


set_forward_mode = forward_ad._set_fwd_grad_enabled


@contextmanager
def no_tangents() -> Iterator[None]:
    """Let forward-mode differentiation pause."""
    before = torch._C._is_fwd_grad_enabled()
    torch._C._set_fwd_grad_enabled(False)
    try:
        yield
    finally:
        torch._C._set_fwd_grad_enabled(before)


# Modes that see every operator.
get_dispatch_mode = torch._C._get_dispatch_mode
dispatch_modes = torch._C._len_torch_dispatch_stack
PROXY = torch._C._TorchDispatchModeKey.PROXY
TRACERS = (
    PROXY,
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)
functions_unseen = torch._C.DisableTorchFunction
autocast_disabled = torch._C._DisableAutocast


@contextmanager
def without_modes() -> Iterator[None]:
    """Leave all modes that see operators or functions, so that neither is recorded, for a while."""
    with _disable_current_modes(), functions_unseen():
        yield


# Tapes.
saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
saved_tensors_hooks_enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
current_autograd_node: Callable[[], Any] | None = getattr(torch._C, "_current_autograd_node", None)

# Operators of torch.compile for loops.
torch_cond: Callable[..., Any] = torch.cond
torch_scan: Callable[..., Any] = scan
torch_while_loop: Callable[..., Any] = while_loop

# Sharded tensors.


def unsplit(part: Tensor, mesh: Any, placements: Any, shape: Any = None) -> Tensor:
    """Return a sharded tensor of this rank's part, outside of autograd.

    Args:
        part: The part, contiguous.
        mesh: The mesh.
        placements: A placement for each axis of the mesh.
        shape: The global shape; by default that of the part, which every rank has as a whole, or as a summand.
    """
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(torch.Size(shape or part.shape), part.stride(), part.dtype)
    return around(part, DTensorSpec(mesh, tuple(placements), tensor_meta=meta))


def around(part: Tensor, spec: Any) -> Tensor:
    """Return the sharded tensor with this part on this rank, outside of autograd."""
    from torch.distributed.tensor import DTensor

    return DTensor(part, spec, requires_grad=False)


# Memory.
storage_users = torch._C._storage_Use_Count


def storage_id(tensor: Tensor) -> int:
    """Return what tells the memory of a tensor from that of others."""
    return int(tensor.untyped_storage()._cdata)


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written into."""
    return tensor._version


def is_view(tensor: Tensor) -> bool:
    """Tell whether a tensor shows the memory of another one."""
    return tensor._is_view()


# Base classes of modules.
BatchNorms = nn.modules.batchnorm._BatchNorm
InstanceNorms = nn.modules.instancenorm._InstanceNorm
NormsWithStatistics = nn.modules.batchnorm._NormBase
Dropouts = nn.modules.dropout._DropoutNd

# The derivative of a gamma variable by its concentration.
standard_gamma_grad = torch._standard_gamma_grad

# Functions that modules call, and that have no public name.
native_multi_head_attention = torch._native_multi_head_attention
weight_norm = torch._weight_norm
pack_padded_sequence = torch._pack_padded_sequence
pad_packed_sequence = torch._pad_packed_sequence
pad_sequence = torch._C._nn.pad_sequence
fractional_max_pool2d = torch._C._nn.fractional_max_pool2d
fractional_max_pool3d = torch._C._nn.fractional_max_pool3d
calculate_correct_fan = nn.init._calculate_correct_fan
legacy_reduction = torch.nn._reduction.legacy_get_string

# Optimizers' kernels that write in place.
fused_adam_ = torch._fused_adam_
fused_adamw_ = torch._fused_adamw_
fused_adagrad_ = torch._fused_adagrad_


def function_modes() -> list[Any]:
    """Return the function modes that are entered, the innermost last; torch.compile knows them too."""
    return _get_current_function_mode_stack()  # type: ignore[no-untyped-call,no-any-return]


def let_modes_replace(functions: Any) -> None:
    """Make torch.compile ask function modes about functions as eager code does.

    It has a list of its own of what a mode may take over, which lacks `randn_like` and a few others.
    """
    from torch._dynamo.variables.torch import get_overridable_functions

    get_overridable_functions().update(functions)


def compiled_stack() -> list[Any]:
    """Return the frames of the code that torch.compile reads now, the innermost last; none outside of it."""
    from torch._guards import TracingContext

    return list(TracingContext.extract_stack()) if TracingContext.try_get() is not None else []


def in_compiled_body() -> bool:
    """Tell whether torch.compile reads the body of an operator of its own now, such as a loop."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx().output.current_tracer.parent is not None


def compiler_backend(name: str) -> Callable[..., Any]:
    """Return a backend of torch.compile by its name."""
    from torch._dynamo import lookup_backend  # with it comes the compiler, which takes seconds to import

    return lookup_backend(name)
