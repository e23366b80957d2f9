"""Conversion of a tree to the names, values and structure in a checkpoint, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchopt.base import ChainedGradientTransformation, GradientTransformation

from luxtorch.components import Axes, ComponentVector
from luxtorch.core import DTypeError, KeyNameError, Static, path_name, tree_flatten_with_path, tree_unflatten
from luxtorch.core._renamed import current_names, same_after_renaming
from luxtorch.core._tree import TreeSpec
from luxtorch.optim import OptState
from luxtorch.optim._torchopt import TorchOpt

from ._checkpoint_format import Contents, Stored, dtype_name, is_storable

_VALUES = (bool, int, float, complex, str, type(None))


@dataclass(frozen=True)
class Named:
    """Hold the leaves of a tree by their dotted names, and its static values among them."""

    leaves: dict[str, Any]
    structure: dict[str, str]
    spec: TreeSpec

    def rebuilt(self, leaves: Mapping[str, Any]) -> Any:
        """Return a tree of the same structure with other leaves."""
        return tree_unflatten([leaves[name] for name in self.leaves], self.spec)


def name_leaves(tree: Any) -> Named:
    """Return the leaves and static values of a tree by their names.

    Raises:
        KeyNameError: If two of them have the same dotted name, or one is called `__metadata__`.
    """
    pairs, spec = tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, Static))
    leaves: dict[str, Any] = {}
    for path, leaf in pairs:
        name = path_name(path)
        if name in leaves or name == "__metadata__":
            fix = "Rename one of them; names with dots, and numbers beside strings, easily collide."
            headline = (
                f"A checkpoint must not have {'two leaves' if name in leaves else 'a leaf'} of the name '{name}'."
            )
            raise KeyNameError(headline, fix=fix)
        leaves[name] = leaf
    structure = dict(_structure(tree, ""))
    structure |= {name: _text(leaf) for name, leaf in leaves.items() if isinstance(leaf, Static) and not _is_flag(leaf)}
    return Named(leaves, structure, spec)


def contents_of(named: Named, note: Mapping[str, Any]) -> tuple[Contents, list[Tensor]]:
    """Return the description of a tree, and its tensors in the order of the file.

    Raises:
        DTypeError: If a leaf is neither a tensor with data nor a Python number, string or None.
    """
    contents = Contents(structure=named.structure, note=dict(note))
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, leaf in named.leaves.items():
        if isinstance(leaf, Static):
            if _is_flag(leaf):
                contents.flags[name] = leaf.value
        elif not isinstance(leaf, Tensor):
            if type(leaf) not in _VALUES:
                raise _cannot_hold(name, type(leaf).__name__)
            contents.values[name] = leaf
        elif id(leaf) in first:
            contents.same[name] = first[id(leaf)]
        else:
            _check_tensor(name, leaf)
            first[id(leaf)] = name
            tensors[name] = leaf
    # Sorted from wide to narrow dtypes, so that each tensor is aligned in the file.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    for name in order:
        leaf = tensors[name]
        contents.tensors[name] = Stored(dtype_name(leaf.dtype), tuple(leaf.shape), _memory_order(leaf))
    return contents, [tensors[name] for name in order]


def with_current_names(contents: Contents, named: Named) -> Contents:
    """Return the description of a file with former names replaced by those of a tree."""
    file, tree = describe_contents(contents), describe_tree(named)
    names = current_names(file, tree)
    structure = {}
    for name, text in contents.structure.items():
        wanted = tree.get(names[name], text)
        structure[names[name]] = wanted if same_after_renaming(text, wanted) else text
    return replace(
        contents,
        tensors={names[name]: stored for name, stored in contents.tensors.items()},
        same={names[name]: names[other] for name, other in contents.same.items()},
        structure=structure,
    )


def describe_tree(named: Named) -> dict[str, str]:
    """Describe, by name, what a file must hold to be loaded into a tree."""
    described = dict(named.structure)
    for name, leaf in named.leaves.items():
        if isinstance(leaf, Tensor):
            described[name] = _tensor_text(dtype_name(leaf.dtype), tuple(leaf.shape))
        elif _is_flag(leaf):
            described[name] = "a flag"
        elif not isinstance(leaf, Static):
            described[name] = _value_text(leaf)
    return described


def describe_contents(contents: Contents) -> dict[str, str]:
    """Describe, by name, what a file holds."""
    described = dict(contents.structure)
    described |= {name: _tensor_text(stored.dtype, stored.shape) for name, stored in contents.tensors.items()}
    described |= {name: described[other] for name, other in contents.same.items()}
    described |= {name: _value_text(value) for name, value in contents.values.items()}
    return described | dict.fromkeys(contents.flags, "a flag")


def _is_flag(leaf: Any) -> bool:
    return isinstance(leaf, Static) and isinstance(leaf.value, bool)


def _text(value: Any) -> str:
    """Return the repr of a value without memory addresses."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _value_text(value: Any) -> str:
    return "None" if value is None else f"a Python {type(value).__name__}"


def _tensor_text(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} of shape {shape}"


def _memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the dimensions from the outermost to the innermost in memory; None if they are in order."""
    if tensor.is_contiguous():
        return None
    # The strides of dimensions of size 1 have no meaning: they come first, so that equal layouts have one description.
    sizes, strides = tensor.shape, tensor.stride()
    order = tuple(sorted(range(len(sizes)), key=lambda dim: (sizes[dim] > 1, -strides[dim])))
    large = [dim for dim in order if sizes[dim] > 1]
    return order if large != sorted(large) else None


def _structure(tree: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield further structure that must be equal for the leaves to have the same meaning."""
    nodes = tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, (ComponentVector, OptState)))[0]
    for path, node in nodes:
        name = prefix + "".join(f"{key}." for key in [path_name(path)] if key)
        if isinstance(node, ComponentVector):
            yield from _components(f"{name}flat", node.axes)
        elif isinstance(node, OptState):
            layout = node.layout
            yield f"{name}rule", _rule_text(layout.rule)
            yield f"{name}frozen", ", ".join(layout.frozen) or "nothing"
            for vector, axes in layout.vectors:
                yield from _components(f"{name}vectors.{vector}", axes)
            yield from _structure(node.state, f"{name}0.")


def _components(name: str, axes: Axes) -> Iterator[tuple[str, str]]:
    """Yield the components of a flat vector and their order."""
    shapes = axes.shapes
    for component, shape in shapes.items():
        yield f"{name}[{component}]", f"a component of shape {shape}"
    yield f"order of {name}", ", ".join(shapes)


def _rule_text(rule: GradientTransformation) -> str:
    """Return the name of a rule, with those of the rules inside."""
    if isinstance(rule, TorchOpt):
        rule = rule.given
    if isinstance(rule, ChainedGradientTransformation):
        return f"chain({', '.join(map(_rule_text, rule.transformations))})"
    inner = [part for value in getattr(rule, "__dict__", {}).values() for part in _rules_in(value)]
    return type(rule).__name__ + (f"({', '.join(map(_rule_text, inner))})" if inner else "")


def _rules_in(value: Any) -> list[GradientTransformation]:
    values = value if type(value) is tuple else (value,)
    return [part for part in values if isinstance(part, GradientTransformation)]


def _check_tensor(name: str, leaf: Tensor) -> None:
    if type(leaf) not in (Tensor, nn.Parameter):
        raise _cannot_hold(name, f"a tensor of the class {type(leaf).__name__}")
    if leaf.layout != torch.strided or leaf.is_meta or not is_storable(leaf.dtype):
        device = " on the meta device" if leaf.is_meta else ""
        raise _cannot_hold(name, f"{leaf.dtype}, {leaf.layout}{device}")


def _cannot_hold(name: str, got: str) -> DTypeError:
    headline = f"The leaf '{name}' of a checkpoint must be a dense tensor with data, a number, a string, or None."
    return DTypeError(headline, got=got, fix="Make it a tensor or a plain value, or wrap a constant in lt.Static.")
