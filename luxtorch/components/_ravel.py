"""Ravel a tree of tensors: its axes and its flat vector, with errors that name the leaf."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import index
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from luxtorch._transforms import unwrapped
from luxtorch.core import DTypeError, InputError, LuxtorchError, wrong_shape, wrong_type

from ._axes import Axes, Shape, intern
from ._functions import Named

NamedLeaves: TypeAlias = "list[tuple[str, Tensor]]"


def axes_and_leaves(tree: Any, batch_dims: int = 0) -> tuple[Axes, NamedLeaves]:
    """Return the axes of a tree, and its leaves with their dotted names, in the order of the axes."""
    if not isinstance(tree, (Mapping, list, tuple)):
        fix = "Name the tensor, as in {'weight': tensor}." if isinstance(tree, Tensor) else ""
        raise wrong_type("The tree", tree, "a dict, a list or a tuple of tensors, nested or not", fix=fix)
    leaves: NamedLeaves = []
    return _axes(tree, "", batch_dims, leaves), leaves


def _axes(tree: Mapping[Any, Any] | Sequence[Any], prefix: str, batch_dims: int, leaves: NamedLeaves) -> Axes:
    entries: list[tuple[str, Axes | Shape]] = []
    for name, value in _children(tree):
        if not isinstance(name, str) or not name or "." in name:
            _refuse_name(name, prefix)
        path = prefix + name
        if isinstance(value, Tensor):
            if not is_dynamo_compiling():
                _check_kind(value, path)
            if value.dim() < batch_dims:
                expected = f"{batch_dims} leading batch dimensions, as batch_dims says"
                raise wrong_shape(f"The leaf '{path}'", value, expected)
            leaves.append((path, value))
            # `index`, because a size may be a SymInt under torch.compile, and axes have fixed sizes.
            entries.append((name, tuple(index(size) for size in value.shape[batch_dims:])))
        elif isinstance(value, (Mapping, list, tuple)):
            entries.append((name, _axes(value, f"{path}.", batch_dims, leaves)))
        else:
            fix = "Make it a tensor if it is a parameter; otherwise keep it in the states."
            raise wrong_type(f"The leaf '{path}'", value, "a tensor", fix=fix)
    return intern(tuple(entries))


def _check_kind(leaf: Tensor, path: str) -> None:
    """Raise unless a leaf is a dense tensor, which can be copied into a flat one."""
    if leaf.layout is not torch.strided or leaf.is_nested:
        raise DTypeError(
            f"The leaf '{path}' must be a dense tensor.",
            got="a nested tensor" if leaf.is_nested else f"the layout {leaf.layout}",
            fix="" if leaf.is_nested else "Make it dense, .to_dense().",
        )


def _children(tree: Mapping[Any, Any] | Sequence[Any]) -> Iterable[tuple[object, Any]]:
    if isinstance(tree, Mapping):
        return tree.items()
    return [(str(i), value) for i, value in enumerate(tree)]


def _refuse_name(name: object, prefix: str) -> NoReturn:
    raise InputError(
        "The name of a component must be a string, not empty and without dots.",
        expected="a name such as 'weight'; a dot leads into a group, as in 'layer_1.weight'",
        got=repr(name),
        fix="Rename it." if isinstance(name, str) else f"Use the string '{name}'.",
        where=prefix[:-1],
    )


def ravel(leaves: NamedLeaves, batch_dims: int, dtype: torch.dtype | None) -> Tensor:
    """Copy leaves into one tensor of shape (*batch, size)."""
    if dtype is not None:
        for path, leaf in leaves:
            if leaf.is_complex() and not dtype.is_complex:
                raise DTypeError(
                    f"The leaf '{path}' must be real, or a real vector would lose its imaginary parts.",
                    expected="a complex dtype, or real leaves",
                    got=f"dtype={dtype}",
                    fix=_TWO_PARTS,
                )
        leaves = [(path, leaf.to(dtype)) for path, leaf in leaves]
    for path, leaf in leaves:
        # By its name, as importing DTensor takes long, and most programs do not shard.
        if not is_dynamo_compiling() and type(unwrapped(leaf)).__name__ == "DTensor":
            raise DTypeError(
                f"The leaf '{path}' must not be sharded: copying it into one vector would gather it on every rank.",
                got="a DTensor",
                fix="Make the vector first, then shard it: distributed.shard_parameters(lt.ComponentVector(ps)).",
            )
        if not (leaf.is_floating_point() or leaf.is_complex()):
            fix = "Keep it in the states, or pass dtype= to cast every leaf."
            raise wrong_type(f"The leaf '{path}'", leaf, "a floating point or complex tensor", fix=fix)
    kinds = {leaf.is_complex() for _, leaf in leaves}
    fix = "Cast the tree first, or pass dtype= to cast every leaf." if len(kinds) < 2 else _TWO_PARTS
    _check_one(leaves, "dtype", lambda leaf: leaf.dtype, fix)
    _check_one(leaves, "device", lambda leaf: leaf.device, "Move the whole tree to one device first.")
    _check_one(leaves, "batch", lambda leaf: tuple(leaf.shape[:batch_dims]), "Expand the leaves first.", InputError)
    if not leaves:
        return torch.zeros(0, dtype=dtype)
    rows = [leaf.flatten(batch_dims) if leaf.dim() > batch_dims else leaf.unsqueeze(-1) for _, leaf in leaves]
    return torch.cat(rows, dim=-1)


_TWO_PARTS = (
    "Put torch.view_as_real(leaf) of the complex leaves into the tree, and take torch.view_as_complex of them in the "
    "model: real leaves that were cast to a complex dtype would get imaginary parts in training."
)


def _check_one(
    leaves: NamedLeaves,
    what: str,
    read: Callable[[Tensor], Hashable],
    fix: str,
    error: type[LuxtorchError] = DTypeError,
) -> None:
    """Check that all leaves share one dtype, device or batch."""
    first: dict[Hashable, str] = {}
    for path, leaf in leaves:
        first.setdefault(read(leaf), path)
    if len(first) > 1:
        raise error(
            f"The leaves of one vector must share one {what}.",
            got=", ".join(f"'{path}' has {value}" for value, path in first.items()),
            fix=fix,
        )


def check_flat(flat: object, axes: Axes) -> None:
    """Raise unless the last dimension of a tensor has the size of the axes."""
    if not isinstance(flat, Tensor):
        fix = "Read a Jacobian between two vectors by ComponentMatrix.from_jacobian." if isinstance(flat, Named) else ""
        raise wrong_type("The data of a ComponentVector", flat, "a tensor", fix=fix)
    if flat.dim() == 0 or flat.shape[-1] != axes.size:
        fix = "Read a Jacobian by ComponentMatrix.from_jacobian; for other data, pass the axes it was made with."
        raise wrong_shape("The flat tensor", flat, f"(..., {axes.size}), the size of the axes", fix=fix)
