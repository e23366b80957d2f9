"""What may be differentiated, and the errors for what may not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from luxtorch.components import ComponentVector
from luxtorch.core import DTypeError, InputError, named_leaves, suggest, tree_flatten, tree_leaves

from ._aux import Tree

Mode = Literal["reverse", "forward"]


def describe(value: Any) -> str:
    """Name a value in an error: a tensor by dtype and shape, anything else by its type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return type(value).__name__


def check_mode(mode: str) -> None:
    """Raise unless the mode is one of the two."""
    if mode not in ("reverse", "forward"):
        raise InputError(
            f"There is no mode {mode!r}.",
            expected="'reverse' or 'forward'",
            got=repr(mode),
            fix=suggest(mode, ["reverse", "forward"]),
        )


def _differentiable(leaf: Any, real: bool) -> bool:
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
    """Raise if a leaf of a function's value is no tensor."""
    for leaf in tree_leaves(y):
        if not isinstance(leaf, Tensor):
            _raise_for_leaf(y, "f(x)", False, "Return it as auxiliary output, with has_aux=True.")


def _raise_for_leaf(tree: Tree, whole: str, real: bool, fix: str) -> None:
    for path, leaf in named_leaves(tree):
        if _differentiable(leaf, real):
            continue
        if _differentiable(leaf, real=False):
            fix = "Work with its real and imaginary parts, as torch.view_as_real gives them."
        raise DTypeError(
            f"'{f'{whole}.{path}' if path else whole}' cannot be differentiated.",
            expected="a real floating point tensor" if real else "a floating point tensor",
            got=describe(leaf),
            fix=fix,
        )


def check_scalar(y: Any) -> Tensor:
    """Return the value of a function to take the gradient of, or raise if it is no real scalar."""
    if isinstance(y, Tensor) and y.dim() == 0 and y.is_floating_point():
        return y
    if isinstance(y, Tensor) and y.dim() == 0:
        raise DTypeError(
            "The function must return a real floating point scalar.",
            expected="a floating point tensor of shape ()",
            got=describe(y),
            fix="Take .abs() or .real of a complex value; an integer has no gradient.",
        )
    reduce = "Reduce it with .sum() or .mean(), or take jacobian(f, x)."
    raise InputError(
        "The function must return a scalar to have a gradient.",
        expected="a tensor of shape ()",
        got=describe(y),
        fix="Pass has_aux=True if it returns (loss, aux)." if isinstance(y, tuple) else reduce,
    )


def check_like(u: Tree, x: Tree, like: str) -> list[Tensor]:
    """Return the leaves of a vector, or raise unless it looks like the tree that it belongs to.

    Args:
        u: The vector.
        x: The tree, of floating point tensors.
        like: What the tree is called in the error.
    """
    if _alike(u, x):
        return tree_leaves(u)
    vectors, vectors_spec = tree_flatten(u)
    expected, spec = tree_flatten(x)
    if vectors_spec != spec:
        raise InputError(
            f"The vector has another structure than {like}.",
            expected=_describe_tree(x),
            got=_describe_tree(u),
            fix=f"Build it from {like}, as tree_map(torch.ones_like, ...) does.",
        )
    for vector, leaf in zip(vectors, expected, strict=True):
        if not (isinstance(vector, Tensor) and vector.shape == leaf.shape and vector.dtype == leaf.dtype):
            _raise_for_vector(u, x, like)
    return vectors


def _alike(u: Tree, x: Tree) -> bool:
    """Say quickly whether two trees of dicts, tuples and vectors are alike; False also where it takes a closer look."""
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


def _describe_tree(tree: Tree) -> str:
    names = [path for path, _ in named_leaves(tree) if path]
    return f"{type(tree).__name__} with the leaves {', '.join(names)}" if names else describe(tree)


def _raise_for_vector(u: Tree, x: Tree, like: str) -> None:
    for (path, vector), (_, leaf) in zip(named_leaves(u), named_leaves(x), strict=True):
        where = f" at the leaf '{path}'" if path else ""
        if not isinstance(vector, Tensor) or vector.dtype != leaf.dtype:
            problem, fix = f"The vector has another dtype than {like}{where}.", f"Convert it with .to({leaf.dtype})."
            raise DTypeError(problem, expected=describe(leaf), got=describe(vector), fix=fix)
        if vector.shape != leaf.shape:
            problem, fix = f"The vector has another shape than {like}{where}.", "Reshape it."
            raise InputError(problem, expected=describe(leaf), got=describe(vector), fix=fix)
