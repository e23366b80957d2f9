"""The levels of torch.func without its Python: the same steps in the same order, but trees are not walked six times.

This is the one file of the folder that uses torch's private names. `usable` says whether they are there and may stand
for torch.func; where it says no, `_transforms` takes torch.func itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from luxtorch.core import map_tensors, tree_leaves, tree_map

from ._aux import Tree

try:
    from torch._C import _is_fwd_grad_enabled, _set_fwd_grad_enabled
    from torch._C._autograd import (
        _saved_tensors_hooks_disable,
        _saved_tensors_hooks_enable,
        _saved_tensors_hooks_get_disabled_error_message,
    )
    from torch._C._functorch import (
        _grad_decrement_nesting,
        _grad_increment_nesting,
        _unwrap_for_grad,
        _wrap_for_grad,
        get_inplace_requires_grad_allowed,
        set_inplace_requires_grad_allowed,
    )
    from torch._VF import _make_dual, _unpack_dual
    from torch.autograd.forward_ad import _maybe_load_decompositions
    from torch.autograd.graph import _engine_run_backward
    from torch.autograd.variable import Variable

    _run_here = Variable._execution_engine.run_backward
    _AVAILABLE = True
except (ImportError, AttributeError):  # another torch
    _AVAILABLE = False

Trees: TypeAlias = "tuple[Tree, ...]"
WithAux: TypeAlias = Callable[..., tuple[Tree, Tree]]
T = TypeVar("T")

_NO_HOOKS = "Gradients of functions know no hooks on saved tensors: leave save_on_cpu and its like outside."


def usable() -> bool:
    """Say whether the levels here may stand for those of torch.func.

    They may not where somebody looks for torch.func's own names, as a compiler and modes that see each call do; nor
    where torch.func does more than is done here: in inference mode, and where backwards are compiled.
    """
    return (
        _AVAILABLE
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_function_stack()
        and not torch.is_inference_mode_enabled()
        and not getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "compiled_autograd_enabled", False)
    )


def value_and_gradients(f: WithAux, xs: Trees) -> tuple[Tensor, Tree, Trees]:
    """Return the scalar value of `f(*xs)`, its auxiliary output, and the gradients: trees like the arguments."""

    def at(level: int) -> tuple[Tensor, Tree, Trees]:
        args, inputs = _differentiable(xs, level)
        value, aux = f(*args)
        slopes = map(_outside(level), gradients((value,), None, inputs, retain=False, create=True))
        return _unwrap_for_grad(value, level), _leave(aux, level), tree_map(lambda _: next(slopes), args)

    return _reverse(at)


def vjp(f: WithAux, xs: Trees) -> tuple[Tree, Callable[[Tree], Trees], Tree]:
    """Return the value of `f(*xs)`, its pullback, and the auxiliary output."""

    def at(level: int) -> tuple[Tree, Tree, list[Tensor], Trees, list[Tensor]]:
        args, inputs = _differentiable(xs, level)
        value, aux = f(*args)
        return _leave(value, level), _leave(aux, level), tree_leaves(value), args, inputs

    value, aux, outputs, args, inputs = _reverse(at)

    def back(u: Tree) -> Trees:
        with _no_inference():
            create = torch.is_grad_enabled()
            products = iter(gradients(outputs, tree_leaves(u), inputs, retain=True, create=create))
        return tree_map(lambda _: next(products), args)  # type: ignore[no-any-return]

    return value, back, aux


def jvp(f: WithAux, xs: Trees, us: Sequence[Tensor]) -> tuple[Tree, Tree, Tree]:
    """Return the value of `f(*xs)`, the product of its Jacobian with vectors, one for each leaf, and the aux."""
    tangents = iter(us)
    products: list[Tensor] = []

    def at(level: int, dual: int) -> tuple[Tree, Tree, Tree]:
        def unpacked(y: Tensor) -> Tensor:
            primal, tangent = _unpack_dual(y, level=dual)
            products.append(_unwrap_for_grad(torch.zeros_like(primal) if tangent is None else tangent, level))
            return _unwrap_for_grad(primal, level)

        value, aux = f(*tree_map(lambda x: _make_dual(x, next(tangents), level=dual), xs))
        aux, value = _leave(aux, level), tree_map(unpacked, value)
        found = iter(products)
        return value, tree_map(lambda _: next(found), value), aux

    return _forward(at)


def gradients(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None,
    inputs: Sequence[Tensor],
    *,
    retain: bool,
    create: bool,
) -> list[Tensor]:
    """Return what `torch.autograd.grad` does, with zeros for inputs that the outputs do not depend on, and all dense.

    Args:
        outputs: What was computed.
        cotangents: What the rows of the Jacobian are weighted by, of the outputs' shapes; ones if None.
        inputs: By what to differentiate.
        retain: Whether the tape is kept.
        create: Whether the backward is recorded itself.
    """
    recorded = tuple([y for y in outputs if y.requires_grad])
    if not recorded or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    if cotangents is None:
        weights = [torch.ones_like(y, memory_format=torch.preserve_format) for y in recorded]
    else:
        weights = [u for y, u in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if not _AVAILABLE:
        found = torch.autograd.grad(recorded, inputs, weights, retain, create, allow_unused=True)
    else:
        # The engine has threads for other devices, which torch prepares for in Python.
        run = _run_here if recorded[0].is_cpu and inputs[0].is_cpu else _engine_run_backward
        found = run(recorded, tuple(weights), retain, create, tuple(inputs), True, accumulate_grad=False)
    return [_like(x, g) for g, x in zip(found, inputs, strict=True)]


def _like(x: Tensor, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.zeros_like(x)
    # Lookups can have sparse ones on a tape, which hardly anything takes.
    return gradient if gradient.layout is x.layout else gradient.to_dense()


def _reverse(at: Callable[[int], T]) -> T:
    """Call a function inside of a new reverse level, of which it gets the number."""
    message = _saved_tensors_hooks_get_disabled_error_message()
    try:
        _saved_tensors_hooks_disable(_NO_HOOKS)
        level = _grad_increment_nesting()
        try:
            with torch.enable_grad():
                return at(level)
        finally:
            _grad_decrement_nesting()
    finally:
        if message is None:
            _saved_tensors_hooks_enable()
        else:
            _saved_tensors_hooks_disable(message)


def _forward(at: Callable[[int, int], T]) -> T:
    """Call a function inside of a new forward level, of which it gets the number and that of the dual numbers."""
    # Loaded late, as by torch: with it comes half a compiler. And it counts the levels.
    from torch._functorch import eager_transforms as counter

    _maybe_load_decompositions()  # type: ignore[no-untyped-call]
    recording = _is_fwd_grad_enabled()
    level = counter.enter_jvp_nesting()
    try:
        _set_fwd_grad_enabled(True)
        if counter.JVP_NESTING > 1:
            return at(level, forward_ad._current_level)
        with forward_ad.dual_level() as dual:
            return at(level, dual)
    finally:
        _set_fwd_grad_enabled(recording)
        counter.exit_jvp_nesting()


@contextmanager
def _no_inference() -> Iterator[None]:
    """Leave inference mode, and nothing else as it is there."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    recording, dual = torch.is_grad_enabled(), _is_fwd_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(recording):
        _set_fwd_grad_enabled(dual)
        yield


def _differentiable(xs: Trees, level: int) -> tuple[Trees, list[Tensor]]:
    """Return the arguments as the level knows them, and their leaves."""
    inputs: list[Tensor] = []

    def differentiable(leaf: Tensor) -> Tensor:
        wrapped = _wrap_for_grad(leaf, level)
        inputs.append(wrapped)
        return wrapped.requires_grad_()

    allowed = get_inplace_requires_grad_allowed()
    set_inplace_requires_grad_allowed(True)
    try:
        return tree_map(differentiable, xs), inputs
    finally:
        set_inplace_requires_grad_allowed(allowed)


def _outside(level: int) -> Callable[[Tensor], Tensor]:
    return lambda leaf: _unwrap_for_grad(leaf, level)


def _leave(tree: T, level: int) -> T:
    """Return a tree as it is known outside of a level."""
    return map_tensors(_outside(level), tree)  # type: ignore[no-any-return]
