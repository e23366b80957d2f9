"""Whole Jacobians and Hessians, between any trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from luxtorch.core import tree_flatten, tree_leaves, tree_unflatten

from ._aux import Tree, join, split
from ._blocks import arrange
from ._checks import Mode, check_inputs, check_mode, check_outputs
from ._gradient import gradient
from ._rows import columns, rows
from ._transforms import vjp


def jacobian(
    f: Callable[..., Any], *xs: Tree, mode: Mode = "reverse", has_aux: bool = False, chunk_size: int | None = None
) -> Any:
    """Compute the Jacobian of a function.

    Args:
        f: A function of as many trees as `xs` has, that returns a tree of tensors, or `(tree, aux)`.
        xs: Trees of real floating point tensors.
        mode: `"reverse"` works row by row and suits many inputs; `"forward"` works column by column and suits many
            outputs. Forward mode does not heed `torch.no_grad()` in `f`: only `detach()` makes constants.
        has_aux: Whether `f` returns a pair. `aux` may be any tree, and its leaves need not be tensors.
        chunk_size: How many rows or columns are computed at once; all by default. With 1 there is no `vmap`, for
            functions that it does not know.

    Shape:
        The block of an output of shape `(*M)` by an input of shape `(*N)` has the shape `(*M, *N)`.

    Returns:
        The tree of the outputs, with a tree like `x` at each leaf (for several arguments, a tuple of trees). A
        `ComponentVector` among the outputs or inputs makes its blocks one `ComponentMatrix`.
        With `has_aux` it is `(jacobian, aux)`.

    Raises:
        DTypeError: A leaf of `xs` or of the value is no real floating point tensor.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.jacobian(lambda p: p["a"] * p["b"], {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)})
        {'a': tensor([[3., 0.],
                [0., 3.]]), 'b': tensor([1., 2.])}

    Source:
        `torch.func.jacrev` and `torch.func.jacfwd`, whose numbers these are.
    """
    check_mode(mode)
    check_inputs(xs, real=True)
    leaves, spec = tree_flatten(xs)

    def outputs(*args: Tensor) -> tuple[Tree, Tree]:
        value, aux = split(f(*tree_unflatten(args, spec)), has_aux)
        check_outputs(value, real=True)
        return value, aux

    if mode == "reverse":
        y, back, aux = vjp(outputs, tuple(leaves))
        y_leaves, y_spec = tree_flatten(y)
        blocks = rows(lambda us: back(tree_unflatten(us, y_spec)), y_leaves, leaves, chunk_size)
    else:
        y, aux = outputs(*leaves)
        y_leaves = tree_leaves(y)
        blocks = columns(outputs, y_leaves, leaves, chunk_size)
    return join(arrange(blocks, y, xs[0] if len(xs) == 1 else xs), aux, has_aux)


def hessian(
    f: Callable[..., Any], *xs: Tree, mode: Mode = "reverse", has_aux: bool = False, chunk_size: int | None = None
) -> Any:
    """Compute the Hessian of a scalar function.

    Args:
        f: A function of as many trees as `xs` has, that returns a scalar, or `(scalar, aux)`.
        xs: Trees of real floating point tensors.
        mode: How the gradient is differentiated. `"reverse"` (reverse over reverse) is faster and needs no forward
            rules; `"forward"` (forward over reverse) needs less memory, and does not heed `torch.no_grad()` in `f`.
        has_aux: Whether `f` returns a pair.
        chunk_size: How many rows or columns are computed at once; all by default, and with 1 without `vmap`.

    Returns:
        The tree of the gradient with a tree like `x` at each leaf: `H["a"]["b"]` is the derivative of the gradient
        by `a` with respect to `b`. The Hessian by a `ComponentVector` is a `ComponentMatrix`, with the blocks
        `H["a", "b"]`. With `has_aux` it is `(hessian, aux)`.

    Raises:
        InputError: The function does not return a scalar.
        DTypeError: A leaf of `xs` is no real floating point tensor.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.hessian(lambda x: x[0] ** 2 * x[1], torch.tensor([1.0, 2.0]))
        tensor([[4., 2.],
                [2., 0.]])

    Source:
        `Zygote.hessian`; `torch.func.hessian`, whose numbers these are.
    """

    def slope(*args: Tree) -> Any:
        return gradient(f, *args, has_aux=has_aux)

    return jacobian(slope, *xs, mode=mode, has_aux=has_aux, chunk_size=chunk_size)
