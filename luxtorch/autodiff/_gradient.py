"""Gradients of scalar functions over any tree; all that luxtorch differentiates goes through here or `_torch_func`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from luxtorch._transforms import transformed
from luxtorch.components import ComponentVector
from luxtorch.components._views import split_once
from luxtorch.core import InputError, map_tensors, tree_flatten, tree_unflatten

from ._arguments import Mode, check_chunk_size, check_inputs, check_mode, check_scalar, join, split
from ._torch_func import Tree, WithAux, gradients, value_and_gradients
from ._vmap import columns


def withgradient(
    f: Callable[..., Tree], *xs: Tree, mode: Mode = "reverse", has_aux: bool = False, chunk_size: int | None = None
) -> tuple[Tree, Tree]:
    """Compute a scalar function and its gradient.

    Args:
        f: A function of as many trees as `xs` has, that returns a scalar, or `(scalar, aux)`.
        xs: Trees of floating point tensors: tensors, nested dicts, `ComponentVector`s. Complex tensors are allowed in
            reverse mode, with torch's convention.
        mode: `"reverse"` costs a few evaluations of `f`. `"forward"` costs one for every element of `xs`; it needs no
            backward rules and less memory. It ignores `torch.no_grad()` in `f`: only `detach()` makes constants.
        has_aux: Whether `f` returns a pair. `aux` may be any tree, and its leaves need not be tensors.
        chunk_size: How many elements a forward mode evaluation takes at once; all by default. With 1 there is no
            `vmap`, for functions that it does not support.

    Returns:
        What `f` returned, and the gradient: a tree like `x` for one argument, a tuple of trees for several.

    Raises:
        InputError: The function does not return a scalar.
        DTypeError: A leaf of `xs` is not a floating point tensor.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.withgradient(lambda p: (p["w"] ** 2).sum(), {"w": torch.tensor([1.0, 2.0])})
        (tensor(5.), {'w': tensor([2., 4.])})

    Source:
        `Zygote.withgradient`; `torch.func.grad_and_value`, whose meaning and numbers this has.
    """
    check_mode(mode)
    check_chunk_size(chunk_size)
    if mode == "forward":
        return _forward(f, xs, has_aux, chunk_size)

    def loss(*args: Tree) -> tuple[Tensor, Tree]:
        value, aux = split(f(*args), has_aux)
        return check_scalar(value), aux

    try:
        value, aux, slopes = value_and_gradients(loss, xs)
    except Exception:
        check_inputs(xs)
        raise
    return join(value, aux, has_aux), slopes[0] if len(xs) == 1 else slopes


def gradient(
    f: Callable[..., Tree], *xs: Tree, mode: Mode = "reverse", has_aux: bool = False, chunk_size: int | None = None
) -> Tree:
    """Compute the gradient of a scalar function.

    Args:
        f: A function of as many trees as `xs` has, that returns a scalar, or `(scalar, aux)`.
        xs: Trees of floating point tensors.
        mode: `"reverse"` or `"forward"`, as for `withgradient`. Forward mode ignores `torch.no_grad()` in `f`.
        has_aux: Whether `f` returns a pair.
        chunk_size: How many elements a forward mode evaluation takes at once.

    Returns:
        The gradient, a tree like `x` for one argument and a tuple of trees for several; `(gradient, aux)` with
        `has_aux`.

    Raises:
        InputError: The function does not return a scalar.
        DTypeError: A leaf of `xs` is not a floating point tensor.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.gradient(lambda x: x @ x / 2, torch.tensor([3.0, 4.0]))
        tensor([3., 4.])
        >>> lt.gradient(lambda a, b: a * b, torch.tensor(2.0), torch.tensor(5.0))
        (tensor(5.), tensor(2.))

    Source:
        `Zygote.gradient`, but that one argument gives its gradient and not a tuple of one.
    """
    value, slopes = withgradient(f, *xs, mode=mode, has_aux=has_aux, chunk_size=chunk_size)
    return (slopes, value[1]) if has_aux else slopes


def differentiate(f: WithAux, x: Tree, *, differentiable: bool = False) -> tuple[Tensor, Tree, Tree]:
    """Return the scalar `f(x)`, its auxiliary output and the gradient, by the cheapest way; `f` is called once.

    The plain tape costs less than a transform and lets torch's fused kernels be used, with the same numbers. But an
    outer transform or an outer tape would not see through it: where one is to see all, the gradient is torch.func's.

    Args:
        f: Takes a tree to `(value, aux)`.
        x: The tree.
        differentiable: Whether the results are to be on the tape of what `f` closes over.
    """
    found = None if differentiable or transformed() else _by_tape(f, x)
    if found is not None:
        return found
    (value, aux), gradient = withgradient(f, x, has_aux=True)
    return value, aux, gradient


def _by_tape(f: WithAux, x: Tree) -> tuple[Tensor, Tree, Tree] | None:
    """Return the same by torch.autograd.grad, on no tape at all, or None where a leaf forbids it."""
    if torch.is_inference_mode_enabled():
        raise InputError("There are no gradients in inference mode.", fix="Use torch.no_grad() instead.")
    inputs: list[Tensor] = []

    def recorded(p: Tensor) -> Tensor:
        inputs.append(p.detach().requires_grad_() if p.is_floating_point() or p.is_complex() else p)
        return inputs[-1]

    tree = map_tensors(recorded, x)
    if not inputs or not all(leaf.requires_grad for leaf in inputs):
        return None
    if isinstance(tree, ComponentVector):
        tree = split_once(tree)
    with torch.enable_grad():
        value, aux = f(tree)
    aux = map_tensors(lambda tensor: tensor.detach() if tensor.requires_grad else tensor, aux)
    found = iter(gradients((value,), None, inputs, retain=False, create=False))
    return value.detach(), aux, map_tensors(lambda _: next(found), tree)


def _forward(f: Callable[..., Tree], xs: tuple[Tree, ...], has_aux: bool, chunk_size: int | None) -> tuple[Tree, Tree]:
    check_inputs(xs, real=True)
    value, aux = split(f(*xs), has_aux)
    check_scalar(value)
    leaves, spec = tree_flatten(xs)

    def loss(*args: Tensor) -> tuple[Tree, Tree]:
        return split(f(*tree_unflatten(args, spec)), has_aux)

    (slopes,) = columns(loss, (value,), leaves, chunk_size)
    # A column has the dtype of the value, a gradient that of its leaf.
    matching = [slope.to(leaf.dtype) for slope, leaf in zip(slopes, leaves, strict=True)]
    by_argument = tree_unflatten(matching, spec)
    return join(value, aux, has_aux), by_argument[0] if len(xs) == 1 else by_argument
