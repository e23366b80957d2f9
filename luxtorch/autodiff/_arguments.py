"""Checks of arguments and of what the differentiated function returns, with errors that name the leaf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from luxtorch.components import ComponentVector
from luxtorch.core import (
    DTypeError,
    InputError,
    described,
    named_leaves,
    out_of_range,
    suggest,
    tree_flatten,
    tree_leaves,
    wrong_shape,
    wrong_type,
)

from ._torch_func import Tree

Mode = Literal["reverse", "forward"]


def check_mode(mode: str) -> None:
    """Raise unless the mode is one of the two."""
    if mode not in ("reverse", "forward"):
        raise out_of_range("mode", mode, "'reverse' or 'forward'", fix=suggest(mode, ["reverse", "forward"]))


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise unless the chunk size is None or a positive integer."""
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        fix = "Leave it out for everything at once."
        raise out_of_range("chunk_size", chunk_size, "at least 1, and an integer", fix=fix)


def split(output: Tree, has_aux: bool) -> tuple[Tree, Tree]:
    """Return a function's value and its auxiliary output, `()` where it has none."""
    if not has_aux:
        return output, ()
    if not (isinstance(output, tuple) and len(output) == 2):
        raise InputError(
            "With has_aux=True the function must return a pair.",
            expected="(value, aux)",
            got=described(output),
            fix="Return (value, aux), or drop has_aux=True.",
        )
    return output


def join(value: Tree, aux: Tree, has_aux: bool) -> Tree:
    """Return what the function itself returned: undo `split`."""
    return (value, aux) if has_aux else value


def _differentiable(leaf: object, real: bool) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or (leaf.is_complex() and not real))


def check_inputs(xs: Sequence[Tree], *, real: bool = False) -> None:
    """Raise if a leaf of a function's arguments cannot be differentiated, naming the leaf.

    Args:
        xs: The arguments.
        real: Refuse complex tensors as well.
    """
    if not xs:
        raise InputError(
            "There is nothing to differentiate by.",
            expected="the function and its arguments",
            got="the function alone",
            fix="Write gradient(f, x), where torch.func has grad(f)(x).",
        )
    if all(_differentiable(leaf, real) for leaf in tree_leaves(xs)):
        return
    for i, x in enumerate(xs):
        argument = "x" if len(xs) == 1 else f"argument {i}"
        _raise_for_leaf(x, argument, real, "Close over it, as in `gradient(lambda ps: f(ps, labels), ps)`.")


def check_outputs(y: Tree, *, real: bool = False) -> None:
    """Raise if a leaf of a function's value cannot be differentiated, naming the leaf.

    Args:
        y: The value.
        real: Refuse complex tensors as well.
    """
    if not all(_differentiable(leaf, real) for leaf in tree_leaves(y)):
        _raise_for_leaf(y, "f(x)", real, "Return it as auxiliary output, with has_aux=True.")


def check_tensors(y: Tree) -> None:
    """Raise if a leaf of a function's value is not a tensor."""
    if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(y)):
        _raise_for_leaf(y, "f(x)", False, "Return it as auxiliary output, with has_aux=True.")


def _raise_for_leaf(tree: Tree, whole: str, real: bool, fix: str) -> None:
    for path, leaf in named_leaves(tree):
        if not _differentiable(leaf, real):
            if _differentiable(leaf, real=False):
                fix = "Work with its real and imaginary parts, as torch.view_as_real gives them."
            expected = "a real floating point tensor" if real else "a floating point tensor"
            raise wrong_type(f"'{whole}.{path}'" if path else f"'{whole}'", leaf, expected, fix=fix)


def check_scalar(y: Tree) -> Tensor:
    """Return the value of a function to take the gradient of, or raise if it is not a real scalar."""
    if isinstance(y, Tensor) and y.dim() == 0 and y.is_floating_point():
        return y
    if isinstance(y, Tensor) and y.dim() == 0:
        raise DTypeError(
            "The function must return a real floating point scalar.",
            got=described(y),
            fix="Take .abs() or .real of a complex value; an integer has no gradient.",
        )
    reduce = "Reduce it with .sum() or .mean(), or take jacobian(f, x)."
    raise InputError(
        "The function must return a scalar to have a gradient.",
        expected="a tensor of shape ()",
        got=described(y),
        fix="Pass has_aux=True if it returns (loss, aux)." if isinstance(y, tuple) else reduce,
    )


def check_like(u: Tree, x: Tree, like: str) -> list[Tensor]:
    """Return the leaves of a vector, or raise unless it has the structure, shapes and dtypes of a tree.

    Args:
        u: The vector.
        x: The tree, of floating point tensors.
        like: What the tree is called in the error.
    """
    if _alike(u, x):
        return tree_leaves(u)
    vectors, vectors_spec = tree_flatten(u)
    leaves, spec = tree_flatten(x)
    if vectors_spec != spec:
        raise InputError(
            f"The vector must have the structure of {like}.",
            expected=_outline(x),
            got=_outline(u),
            fix=f"Build it from {like}, as tree_map(torch.ones_like, ...) does.",
        )
    if not all(map(_alike, vectors, leaves)):
        for (path, vector), leaf in zip(named_leaves(u), leaves, strict=True):
            name = f"The vector at the leaf '{path}'" if path else "The vector"
            if not isinstance(vector, Tensor) or vector.dtype != leaf.dtype:
                expected = f"of the dtype of {like}, {leaf.dtype}"
                raise wrong_type(name, vector, expected, fix=f"Convert it with .to({leaf.dtype}).")
            if vector.shape != leaf.shape:
                raise wrong_shape(name, vector, f"{tuple(leaf.shape)}, that of {like}", fix="Reshape it.")
    return vectors


def _alike(u: Tree, x: Tree) -> bool:
    """Tell whether two trees of dicts, tuples and vectors are alike; False also where that takes a closer look."""
    if isinstance(x, Tensor):
        return isinstance(u, Tensor) and u.shape == x.shape and u.dtype == x.dtype
    kind = type(x)
    if type(u) is not kind:
        return False
    if kind is dict:
        return list(u) == list(x) and all(map(_alike, u.values(), x.values()))
    if kind is tuple or kind is list:
        return len(u) == len(x) and all(map(_alike, u, x))
    return kind is ComponentVector and u.axes is x.axes and _alike(u.flat, x.flat)


def _outline(tree: Tree) -> str:
    names = [path for path, _ in named_leaves(tree) if path]
    return f"{type(tree).__name__} with the leaves {', '.join(names)}" if names else described(tree)
