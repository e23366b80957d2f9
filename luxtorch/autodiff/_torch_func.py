"""`grad_and_value`, `vjp` and `jvp` of torch.func over any trees, with any auxiliary output, at less cost.

In eager code they enter the same functorch levels in the same order as torch.func, but without its Python, which walks
each tree six times. For this the file uses private names of torch. `usable` tells whether they are there and may stand
for torch.func; where it says no, torch.func itself is called.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from luxtorch._formulas import RULES, by_rule
from luxtorch._transforms import differentiated
from luxtorch.core import map_tensors, register_node, tree_flatten, tree_leaves, tree_map, tree_unflatten
from luxtorch.core._sharded import beside, is_sharded
from luxtorch.core._tree import TreeSpec

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

Tree: TypeAlias = Any
Trees: TypeAlias = "tuple[Tree, ...]"
WithAux: TypeAlias = Callable[..., tuple[Tree, Tree]]
"""A function that returns a value and an auxiliary output, each a tree."""
T = TypeVar("T")

_NO_HOOKS = "Gradients of functions do not support hooks on saved tensors: enter save_on_cpu and the like outside."


def usable() -> bool:
    """Tell whether the private names may stand for torch.func.

    They may not where torch.func's own functions have to be seen, by a compiler or a torch function mode; nor where
    torch.func does more than is done here: in inference mode, and with compiled autograd.
    """
    return (
        _AVAILABLE
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_function_stack()
        and not torch.is_inference_mode_enabled()
        and not getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "compiled_autograd_enabled", False)
    )


def value_and_gradients(f: WithAux, xs: Trees) -> tuple[Tensor, Tree, Trees]:
    """Return the scalar `f(*xs)`, its auxiliary output, and the gradients: trees like the arguments."""
    if not usable():
        transform: Callable[..., Any] = torch.func.grad_and_value(_packed(f), tuple(range(len(xs))), has_aux=True)
        grads, (value, aux) = transform(*xs)
        return value, unpack(aux), grads

    def at(level: int) -> tuple[Tensor, Tree, Trees]:
        args, inputs = _wrapped(xs, level)
        value, aux = f(*args)
        slopes = map(_outside(level), gradients((value,), None, inputs, retain=False, create=True))
        return _unwrap_for_grad(value, level), _leave(aux, level), tree_map(lambda _: next(slopes), args)

    return _reverse(at)


def vjp(f: WithAux, xs: Trees) -> tuple[Tree, Callable[[Tree], Trees], Tree]:
    """Return the value of `f(*xs)`, its pullback, and the auxiliary output."""
    if not usable():
        return _vjp_of_torch(f, xs)

    def at(level: int) -> tuple[Tree, Tree, list[Tensor], Trees, list[Tensor]]:
        args, inputs = _wrapped(xs, level)
        value, aux = f(*args)
        return _leave(value, level), _leave(aux, level), tree_leaves(value), args, inputs

    value, aux, outputs, args, inputs = _reverse(at)

    def back(u: Tree) -> Trees:
        with _no_inference():
            create = torch.is_grad_enabled()
            products = iter(gradients(outputs, tree_leaves(u), inputs, retain=True, create=create))
        return tree_map(lambda _: next(products), args)  # type: ignore[no-any-return]

    return value, back, aux


def _vjp_of_torch(f: WithAux, xs: Trees) -> tuple[Tree, Callable[[Tree], Trees], Tree]:
    leaves, spec = tree_flatten(xs)
    if not leaves:
        value, aux = f(*xs)
        return value, lambda u: xs, aux
    transform: Callable[..., Any] = torch.func.vjp
    value, back, aux = transform(_packed(f, spec), *leaves, has_aux=True)
    return value, lambda u: tree_unflatten(back(u), spec), unpack(aux)


def jvp(f: WithAux, xs: Trees, us: Sequence[Tensor]) -> tuple[Tree, Tree, Tree]:
    """Return the value of `f(*xs)`, the product of its Jacobian with vectors, one for each leaf, and the aux."""
    f = _with_rules(f)
    leaves = tree_leaves(xs)
    if any(map(is_sharded, leaves)):
        # torch has no forward mode for sharded tensors.
        value, product, aux = linearized(f, xs)
        return value, product([beside(u, x) for u, x in zip(us, leaves, strict=True)]), aux
    if not usable():
        return _jvp_of_torch(f, xs, us)
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


def _jvp_of_torch(f: WithAux, xs: Trees, us: Sequence[Tensor]) -> tuple[Tree, Tree, Tree]:
    leaves, spec = tree_flatten(xs)
    if not leaves:
        value, aux = f(*xs)
        return value, tree_map(torch.zeros_like, value), aux
    transform: Callable[..., Any] = torch.func.jvp
    value, product, aux = transform(_packed(f, spec), tuple(leaves), tuple(us), has_aux=True)
    return value, product, unpack(aux)


def linearized(f: WithAux, xs: Trees) -> tuple[Tree, Callable[[Sequence[Tensor]], Tree], Tree]:
    """Return the value of `f(*xs)`, its Jacobian as a function of vectors, one for each leaf, and the auxiliary output.

    A pullback is linear, so that the pullback of a pullback is the Jacobian itself. `f` is called inside of both, so
    that it can tell that it is differentiated twice. Afterwards only the outer one may be called.
    """
    if not usable():
        value, aux = f(*xs)
        spec = tree_flatten(xs)[1]
        pulled = vjp(lambda u: (vjp(f, xs)[1](u), None), (tree_map(torch.zeros_like, value),))[1]
        return value, lambda us: pulled(tree_unflatten(us, spec))[0], aux

    def at(level: int) -> tuple[Tree, Tree, list[Tensor], list[Tensor]]:
        value, back, aux = vjp(f, xs)
        # All that is computed in a level is wrapped by it.
        (u,), inputs = _wrapped((_leave(tree_map(torch.zeros_like, value), level),), level)
        return _leave(value, level), _leave(aux, level), tree_leaves(back(u)), inputs

    value, aux, products, inputs = _reverse(at)

    def forward(us: Sequence[Tensor]) -> Tree:
        with _no_inference():
            found = iter(gradients(products, us, inputs, retain=True, create=torch.is_grad_enabled()))
        return tree_map(lambda _: next(found), value)

    return value, forward, aux


# Functorch levels.


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
        retain: Whether the graph is kept, as by `retain_graph`.
        create: Whether the backward pass is recorded itself, as by `create_graph`.
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
        # The engine has threads for other devices, and torch does some Python for these.
        run = _run_here if recorded[0].is_cpu and inputs[0].is_cpu else _engine_run_backward
        found = run(recorded, tuple(weights), retain, create, tuple(inputs), True, accumulate_grad=False)
    return [_like(x, g) for g, x in zip(found, inputs, strict=True)]


def _like(x: Tensor, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.zeros_like(x)
    # Embedding lookups can have sparse gradients in autograd, which hardly anything takes.
    return gradient if gradient.layout is x.layout else gradient.to_dense()


def _reverse(at: Callable[[int], T]) -> T:
    """Call a function inside of a new reverse-mode level, of which it gets the number."""
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
    """Call a function inside of a new forward-mode level, of which it gets the number and that of the dual numbers."""
    # Imported late, as torch does, because it is slow. It also counts the levels.
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
    """Leave inference mode, but keep its grad modes."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    recording, dual = torch.is_grad_enabled(), _is_fwd_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(recording):
        _set_fwd_grad_enabled(dual)
        yield


def _wrapped(xs: Trees, level: int) -> tuple[Trees, list[Tensor]]:
    """Return the arguments wrapped for a level, and their leaves."""
    inputs: list[Tensor] = []

    def wrap(leaf: Tensor) -> Tensor:
        inputs.append(_wrap_for_grad(leaf, level))
        return inputs[-1].requires_grad_()

    allowed = get_inplace_requires_grad_allowed()
    set_inplace_requires_grad_allowed(True)
    try:
        return tree_map(wrap, xs), inputs
    finally:
        set_inplace_requires_grad_allowed(allowed)


def _outside(level: int) -> Callable[[Tensor], Tensor]:
    return lambda leaf: _unwrap_for_grad(leaf, level)


def _leave(tree: T, level: int) -> T:
    """Unwrap the tensors of a tree from a level."""
    return map_tensors(_outside(level), tree)  # type: ignore[no-any-return]


# Auxiliary outputs, of which torch.func accepts tensors only.


class _Packed:
    """Hold a tree whose leaves are not all tensors, with the tensors alone as its children."""

    def __init__(self, tensors: Iterable[Tensor], others: dict[int, object], spec: TreeSpec) -> None:
        self.tensors = tensors
        self.others = others
        self.spec = spec


register_node(
    _Packed,
    lambda node: (list(node.tensors), (node.others, node.spec)),
    lambda children, static: _Packed(children, *static),
)


def pack(aux: Tree) -> Tree:
    """Return a tree that a transform of torch.func can return, whatever its leaves are."""
    if isinstance(aux, Tensor):
        return aux
    leaves, spec = tree_flatten(aux)
    others = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    if not others:
        return aux
    return _Packed([leaf for leaf in leaves if isinstance(leaf, Tensor)], others, spec)


def unpack(aux: Tree) -> Tree:
    """Undo `pack`."""
    if not isinstance(aux, _Packed):
        return aux
    tensors = iter(aux.tensors)
    leaves = [aux.others[i] if i in aux.others else next(tensors) for i in range(aux.spec.num_leaves)]
    return tree_unflatten(leaves, aux.spec)


def _packed(f: WithAux, spec: TreeSpec | None = None) -> WithAux:
    """Return a function whose auxiliary output is packed; of leaves, where their structure is given."""

    def packed(*args: Any) -> tuple[Tree, Tree]:
        value, aux = f(*args) if spec is None else f(*tree_unflatten(args, spec))
        return value, pack(aux)

    return packed


# Functions of torch whose forward-mode derivative cannot be differentiated again.


def _with_rules(f: Callable[..., T]) -> Callable[..., T]:
    """Return a function for forward mode whose derivatives an outer transform can differentiate.

    Inside of another derivative, a mode puts functions with right derivatives in place of torch's, or warns.
    """
    if torch.compiler.is_compiling() or not differentiated():
        return f

    @wraps(f)
    def ruled(*args: Any) -> T:
        with _Rules():
            return f(*args)

    return ruled


class _Rules(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _WRONG:
            warnings.warn(
                f"The derivative of {_WRONG[func]} that torch takes by forward mode is a wrong number where another "
                "transform differentiates it. Take it by reverse mode, or forward mode of a reverse-mode gradient.",
                stacklevel=2,
            )
        kwargs = kwargs or {}
        return by_rule(func, *args, **kwargs) if func in RULES else func(*args, **kwargs)


_WRONG: dict[Callable[..., Any], str] = {
    F.layer_norm: "layer_norm, unlike that of lt.LayerNorm,",
    F.batch_norm: "batch_norm, unlike that of lt.BatchNorm,",
    F.instance_norm: "instance_norm, unlike that of lt.InstanceNorm,",
    torch.layer_norm: "layer_norm, unlike that of lt.LayerNorm,",
    torch.batch_norm: "batch_norm, unlike that of lt.BatchNorm,",
    torch.linalg.householder_product: "householder_product",
    torch.cholesky_inverse: "cholesky_inverse",
    Tensor.cholesky_inverse: "cholesky_inverse",
}
