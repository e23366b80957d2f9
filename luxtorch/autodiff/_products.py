"""Jacobian-vector, vector-Jacobian and Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from ._arguments import Mode, check_inputs, check_like, check_mode, check_outputs, check_tensors, join, split
from ._gradient import gradient
from ._torch_func import Tree, Trees, WithAux, jvp, linearized, vjp

X = TypeVar("X")
Y = TypeVar("Y")


def pullback(f: Callable[..., Tree], *xs: Tree, has_aux: bool = False) -> tuple[Tree, Callable[[Tree], Tree]]:
    """Compute a function and return, beside its value, the function that multiplies by its transposed Jacobian.

    Args:
        f: A function of as many trees as `xs` has, that returns a tree of floating point tensors, or `(tree, aux)`.
        xs: Trees of floating point tensors.
        has_aux: Whether `f` returns a pair. `aux` may be any tree, and its leaves need not be tensors.

    Returns:
        What `f` returned, and a function. It takes a tree like the value to a tree like `x` for one argument, and to
        a tuple of trees for several; it may be called any number of times.

    Raises:
        DTypeError: A leaf of `xs` or of the value is not a floating point tensor.
        InputError: The vector does not look like the value.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> value, back = lt.pullback(lambda x: x * x / 2, torch.tensor([1.0, 2.0]))
        >>> value, back(torch.ones(2))
        (tensor([0.5000, 2.0000]), tensor([1., 2.]))

    Source:
        `Zygote.pullback`; `torch.func.vjp`, whose meaning and numbers this has.
    """
    return record(f, xs, has_aux, like="f(x)")


def record(f: Callable[..., Tree], xs: Trees, has_aux: bool, like: str) -> tuple[Tree, Callable[[Tree], Tree]]:
    """Do the work of `pullback`; `like` is what its value is called in errors."""
    try:
        value, transposed, aux = vjp(_checked(f, has_aux, check_outputs), xs)
    except Exception:
        check_inputs(xs)
        raise

    def back(u: Tree) -> Tree:
        check_like(u, value, like)
        products = transposed(u)
        return products[0] if len(xs) == 1 else products

    return join(value, aux, has_aux), back


def pushforward(f: Callable[..., Tree], *xs: Tree, has_aux: bool = False) -> Callable[..., tuple[Tree, Tree]]:
    """Return the function that computes `f` together with the product of its Jacobian and a vector, by forward mode.

    Forward mode ignores `torch.no_grad()` in `f`: only `detach()` makes constants. Some of torch's linear algebra
    is wrong where another transform differentiates forward mode; it is replaced by right functions here, and where that
    is not possible a warning names the function.

    Args:
        f: A function of as many trees as `xs` has, that returns a tree of tensors, or `(tree, aux)`.
        xs: Trees of floating point tensors.
        has_aux: Whether `f` returns a pair. `aux` may be any tree, and its leaves need not be tensors.

    Returns:
        A function that takes a vector like `x` (one for each argument) to what `f` returns and the product.

    Raises:
        DTypeError: A leaf of `xs` is not a floating point tensor, or a leaf of the vector has another dtype.
        InputError: The vector does not look like `x`.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> pf = lt.pushforward(lambda x: x * x / 2, torch.tensor([1.0, 2.0]))
        >>> value, jvp = pf(torch.ones(2))
        >>> value, jvp
        (tensor([0.5000, 2.0000]), tensor([1., 2.]))

    Source:
        `torch.func.jvp`, whose meaning and numbers this has; the name is that of ForwardDiff's and Zygote's users.
    """
    check_inputs(xs)

    def forward(*us: Tree) -> tuple[Tree, Tree]:
        value, product, aux = jvp(_checked(f, has_aux, check_tensors), xs, _tangents(us, xs))
        return join(value, aux, has_aux), product

    return forward


def linearize(f: Callable[..., Tree], *xs: Tree, has_aux: bool = False) -> tuple[Tree, Callable[..., Tree]]:
    """Compute a function and return, beside its value, the function that multiplies by its Jacobian.

    `f` is called once, here. A product is one backward pass through what was recorded of the pullback, which is linear
    itself: so it costs about as much as `f`, and operators need second derivatives, but no forward rules. For a single
    product `jacobian_vector_product` takes less memory.

    Args:
        f: A function of as many trees as `xs` has, that returns a tree of floating point tensors, or `(tree, aux)`.
        xs: Trees of floating point tensors.
        has_aux: Whether `f` returns a pair. `aux` may be any tree, and its leaves need not be tensors.

    Returns:
        What `f` returned, and a function. It takes a vector like `x` (one for each argument) to a tree like the value,
        and may be called any number of times.

    Raises:
        DTypeError: A leaf of `xs` or of the value is not a floating point tensor, or a leaf of the vector has another
            dtype.
        InputError: The vector does not look like `x`.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> value, product = lt.linearize(lambda x: x * x / 2, torch.tensor([1.0, 2.0]))
        >>> value, product(torch.ones(2)), product(torch.tensor([0.0, 3.0]))
        (tensor([0.5000, 2.0000]), tensor([1., 2.]), tensor([0., 6.]))

    Source:
        `jax.linearize`. `torch.func.linearize` gives wrong numbers inside of `grad`, and does not run inside of `vmap`.
    """
    try:
        value, product, aux = linearized(_checked(f, has_aux, check_outputs), xs)
    except Exception:
        check_inputs(xs)
        raise

    def forward(*us: Tree) -> Tree:
        return product(_tangents(us, xs))

    return join(value, aux, has_aux), forward


def _tangents(us: Trees, xs: Trees) -> list[Tensor]:
    alone = len(xs) == len(us) == 1
    return check_like(us[0] if alone else us, xs[0] if alone else xs, like="x")


def _checked(f: Callable[..., Tree], has_aux: bool, check: Callable[[Tree], None]) -> WithAux:
    """Return the function of `f` and its auxiliary output, `()` if there is none, that checks its value."""

    def outputs(*args: Tree) -> tuple[Tree, Tree]:
        value, aux = split(f(*args), has_aux)
        check(value)
        return value, aux

    return outputs


def jacobian_vector_product(f: Callable[[X], Y], x: X, u: X) -> Y:
    """Compute the product of the Jacobian of `f` at `x` with a vector, by forward mode, as `pushforward` does.

    Args:
        f: A function of one tree that returns a tree of tensors.
        x: A tree of floating point tensors.
        u: A tree like `x`.

    Returns:
        A tree like `f(x)`. It is linear in `u`, and an outer transform differentiates it by `u` too.

    Raises:
        DTypeError: A leaf of `x` is not a floating point tensor, or a leaf of `u` has another dtype.
        InputError: `u` does not look like `x`.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.jacobian_vector_product(torch.square, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5]))
        tensor([2., 2.])

    Source:
        `Lux.jacobian_vector_product`; `torch.func.jvp`.
    """
    product: Y = pushforward(f, x)(u)[1]
    return product


def vector_jacobian_product(f: Callable[[X], Y], x: X, u: Y) -> X:
    """Compute the product of the transposed Jacobian of `f` at `x` with a vector, by reverse mode.

    Args:
        f: A function of one tree that returns a tree of floating point tensors.
        x: A tree of floating point tensors.
        u: A tree like `f(x)`.

    Returns:
        A tree like `x`. It is linear in `u`, and an outer transform differentiates it by `u` too.

    Raises:
        DTypeError: A leaf of `x` or of `f(x)` is not a floating point tensor.
        InputError: `u` does not look like `f(x)`.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.vector_jacobian_product(torch.square, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5]))
        tensor([2., 2.])

    Source:
        `Lux.vector_jacobian_product`; `torch.func.vjp`.
    """
    product: X = pullback(f, x)[1](u)
    return product


def hvp(f: Callable[[X], Tensor], x: X, u: X, *, mode: Mode = "reverse") -> X:
    """Compute the product of the Hessian of `f` at `x` with a vector: how the gradient changes along it.

    A complex tensor counts as two real ones, its real and its imaginary part, as in torch's gradients.

    Args:
        f: A function of one tree that returns a scalar.
        x: A tree of floating point tensors.
        u: A tree like `x`.
        mode: How the gradient is differentiated. `"reverse"` (reverse over reverse) is faster and needs no forward
            rules; `"forward"` (forward over reverse) needs less memory, and ignores `torch.no_grad()` in `f`.

    Returns:
        A tree like `x`.

    Raises:
        DTypeError: A leaf of `x` is not a floating point tensor.
        InputError: `u` does not look like `x`, or `f` does not return a scalar.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.hvp(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
    """
    check_mode(mode)
    check_inputs((x,))

    def slope(x: X) -> X:
        return gradient(f, x)  # type: ignore[no-any-return]

    if mode == "forward":
        return jacobian_vector_product(slope, x, u)
    product: X = record(slope, (x,), has_aux=False, like="x")[1](u)
    return product
