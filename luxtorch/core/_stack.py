"""`stack` and `unstack`: trees of equal structure as one with a new first dimension, for vmap over models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from luxtorch._errors import DTypeError, InputError, KeyNameError, LuxtorchError, described, suggest

from ._mode import Static
from ._tree import named_leaves, path_name, tree_flatten, tree_flatten_with_path, tree_unflatten


def stack(trees: Iterable[Any]) -> Any:
    """Stack trees of equal structure: each tensor gets a new first dimension, with one index for each tree.

    So `torch.vmap` calls many models at once: `torch.vmap(model, in_dims=(None, 0, 0))(x, ps, st)`.

    Args:
        trees: Parameters, states, tuples of both, training states, or any other pytrees. Values that are not tensors
            must be equal in all, and are kept. A `ComponentVector` becomes a batch of vectors.

    Returns:
        A tree of the same structure.

    Raises:
        InputError: If there are no trees, or a shape, a device, a `Static` or another value that is not a tensor
            differs.
        KeyNameError: If the names differ.
        DTypeError: If a dtype differs.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Dense(3, 2)
        >>> ps, st = lt.stack([lt.setup(seed, model) for seed in range(8)])
        >>> ps["weight"].shape
        torch.Size([8, 2, 3])
        >>> y, st = torch.vmap(model, in_dims=(None, 0, 0))(torch.ones(5, 3), ps, st)
        >>> y.shape
        torch.Size([8, 5, 2])

    Source: `torch.func.stack_module_state`.
    """
    trees = list(trees)
    if not trees:
        raise InputError("trees must have at least one tree.", got="none")
    leaves, spec = tree_flatten(trees[0])
    rows = [leaves]
    for number, tree in enumerate(trees[1:], 1):
        others, other_spec = tree_flatten(tree)
        if other_spec != spec:
            raise _other_structure(trees[0], tree, number)
        rows.append(others)
    columns = list(zip(*rows, strict=True))
    if not all(map(_alike, columns)):
        raise _other_leaf(trees)
    return tree_unflatten([_stacked(column) for column in columns], spec)


def unstack(tree: Any) -> list[Any]:
    """Split a stack of trees: the inverse of `stack`.

    Args:
        tree: A tree whose tensors have a common first dimension.

    Returns:
        The trees, whose tensors are views of those in the stack.

    Raises:
        InputError: If there is no tensor, or the first dimensions differ.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.unstack({"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
        [{'weight': tensor([1., 2.])}, {'weight': tensor([3., 4.])}]
    """
    leaves, spec = tree_flatten(tree)
    sizes = {leaf.shape[:1] for leaf in leaves if isinstance(leaf, Tensor)}
    if len(sizes) != 1 or () in sizes:
        raise _no_stack(tree)
    number = sizes.pop()[0]
    columns = [leaf.unbind() if isinstance(leaf, Tensor) else (leaf,) * number for leaf in leaves]
    return [tree_unflatten([column[i] for column in columns], spec) for i in range(number)]


def _stacked(column: tuple[Any, ...]) -> Any:
    return torch.stack(column) if isinstance(column[0], Tensor) else column[0]


def _alike(column: tuple[Any, ...]) -> bool:
    first = column[0]
    return all(_same(leaf, first) for leaf in column[1:])


def _same(leaf: Any, first: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype, leaf.device) == (first.shape, first.dtype, first.device)
    return leaf is first or (type(leaf) is type(first) and not isinstance(first, Tensor) and bool(leaf == first))


def _other_structure(first: Any, tree: Any, number: int) -> LuxtorchError:
    """Return the error for a tree of another structure."""
    path, wanted, got = _difference(first, tree, ()) or ((), first, tree)
    place = f"'{path_name(path)}' of tree {number}" if path else f"Tree {number}"
    if isinstance(wanted, Mapping) and isinstance(got, Mapping) and wanted.keys() != got.keys():
        missing, extra = [name for name in wanted if name not in got], [name for name in got if name not in wanted]
        headline = f"{place} lacks '{missing[0]}'." if missing else f"{place} has '{extra[0]}', which the first lacks."
        expected, found = (", ".join(names) or "no names" for names in (wanted, got))
        fix = suggest(extra[0], missing) if missing and extra else ""
        return KeyNameError(headline, expected=expected, got=found, fix=fix)
    expected, found = _outline(wanted), _outline(got)
    fix = "lt.train_mode sets all alike." * isinstance(wanted, Static)
    return InputError(f"{place} must have the structure of the first.", expected=expected, got=found, fix=fix)


def _difference(first: Any, tree: Any, path: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any, Any] | None:
    """Return the path at which two trees begin to differ in structure, and the two nodes there."""
    (children, spec), (others, other_spec) = _one_level(first), _one_level(tree)
    if spec != other_spec:
        return path, first, tree
    for (step, child), (_, other) in zip(children, others, strict=True):
        found = _difference(child, other, path + step) if step else None
        if found:
            return found
    return None


def _one_level(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Return the children of a node with their keys, and the structure of the node alone."""
    return tree_flatten_with_path(node, is_leaf=lambda inner: inner is not node)


def _outline(node: Any) -> str:
    return repr(node) if isinstance(node, Static) else f"{_one_level(node)[1]!s:.200}"


def _other_leaf(trees: list[Any]) -> LuxtorchError:
    """Return the error for a leaf that differs in trees of equal structure."""
    columns = zip(*map(named_leaves, trees), strict=True)
    name, number, first, leaf = next(
        (column[0][0], number, column[0][1], leaf)
        for column in columns
        for number, (_, leaf) in enumerate(column)
        if not _same(leaf, column[0][1])
    )
    error = DTypeError if isinstance(first, Tensor) and getattr(leaf, "dtype", None) != first.dtype else InputError
    headline = (
        f"'{name}' of tree {number} differs from that of the first."
        if name
        else f"Tree {number} differs from the first."
    )
    return error(headline, expected=_with_device(first), got=_with_device(leaf))


def _no_stack(tree: Any) -> InputError:
    """Return the error for a tree that is not a stack."""
    tensors = [(name, leaf) for name, leaf in named_leaves(tree) if isinstance(leaf, Tensor)]
    if not tensors:
        return InputError("A stack of trees must hold tensors.", got="a tree without tensors")
    name, wrong = next((pair for pair in tensors if pair[1].shape[:1] != tensors[0][1].shape[:1]), tensors[0])
    size = f"({', '.join([*map(str, tensors[0][1].shape[:1]), '...'])})" if tensors[0][1].ndim else "(trees, ...)"
    expected, got = f"tensors of shape {size}, as lt.stack makes them", f"'{name}' of shape {tuple(wrong.shape)}"
    return InputError("The tensors of a stack must have a common first dimension.", expected=expected, got=got)


def _with_device(leaf: Any) -> str:
    return f"{described(leaf)} on {leaf.device}" if isinstance(leaf, Tensor) else f"{leaf!r:.80}"
