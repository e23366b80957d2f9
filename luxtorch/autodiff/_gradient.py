"""Gradients of scalar functions over any tree."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from luxtorch.core import tree_flatten, tree_unflatten

from ._arguments import Mode, check_inputs, check_mode, check_scalar, join, split
from ._torch_func import Tree, value_and_gradients
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
    if mode == "forward":
        return _forward(f, xs, has_aux, chunk_size)

    def loss(*args: Tree) -> tuple[Tensor, Tree]:
        value, aux = split(f(*args), has_aux)
        return check_scalar(value), aux

    try:
        value, aux, gradients = value_and_gradients(loss, xs)
    except Exception:
        check_inputs(xs)
        raise
    return join(value, aux, has_aux), gradients[0] if len(xs) == 1 else gradients


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
    value, gradients = withgradient(f, *xs, mode=mode, has_aux=has_aux, chunk_size=chunk_size)
    return (gradients, value[1]) if has_aux else gradients


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
    gradients = tree_unflatten(matching, spec)
    return join(value, aux, has_aux), gradients[0] if len(xs) == 1 else gradients
