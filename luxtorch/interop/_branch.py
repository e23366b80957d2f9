"""A `torch.nn.Module` that holds the parameters and states of a layer, nested dicts, as submodules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch.core import (
    TRAINING,
    DTypeError,
    Parameters,
    States,
    Static,
    out_of_range,
    tree_leaves,
    tree_map,
    wrong_type,
)

_MODES = (Static(False), Static(True))


class Branch(nn.Module):
    """Hold one level of parameters and states, and the levels below it in submodules of the same names.

    Parameters are the module's parameters and states its buffers, so that the names in its `state_dict` are the dotted
    names of the trees. Its own mode is the layer's mode.

    Random keys are stored as int64, bit by bit: torch.distributed, which broadcasts buffers, has no uint64.

    All attributes of the class are private, since its public names are those of the layers.

    Args:
        ps: The parameters; they are copied.
        st: The states; they are copied.
        training: The mode, if the states do not say it.
        path: The names that lead here from the root.
    """

    def __init__(self, ps: Parameters, st: States, training: bool = True, path: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._names_of_ps = tuple(ps)
        self._names_of_st = tuple(st)
        self._keys: set[str] = set()
        self._statics: dict[str, Any] = {}
        # For states that are pytrees but not dicts, such as the carry of an LSTM: the pytree with names for tensors.
        self._nodes: dict[str, Any] = {}
        self._in_place = True
        below: dict[str, tuple[Any, Any]] = {}
        for name, value in ps.items():
            if isinstance(value, Tensor):
                self._check_name(name, path)
                copy = value.detach().clone()
                self._parameters[name] = nn.Parameter(copy, copy.is_floating_point() or copy.is_complex())
            elif isinstance(value, Mapping):
                below[name] = value, {}
            else:
                raise _not_tensors("parameter", (*path, name), value)
        for name, value in st.items():
            if isinstance(value, Static):
                self._statics[name] = value
            elif isinstance(value, Tensor):
                self._check_name(name, path)
                self._buffers[name] = self._stored(name, value).detach().clone()
            else:
                below[name] = below.get(name, ({}, {}))[0], self._as_dict(name, value, path)
        mode = self._statics.pop(TRAINING, None)
        self.training = training if mode is None else bool(mode)
        for name, (ps_below, st_below) in below.items():
            self._check_name(name, path)
            self._modules[name] = Branch(ps_below, st_below, self.training, (*path, name))

    @property
    def _modal(self) -> bool:
        return TRAINING in self._names_of_st

    def _read_ps(self) -> dict[str, Any]:
        """Return the current parameters of this module and those below."""
        own: dict[str, Any] = self._parameters
        below: dict[str, Any] = self._modules
        return {
            # torch.nn.utils.parametrize and prune leave the value as an attribute.
            name: own[name] if name in own else below[name]._read_ps() if name in below else getattr(self, name)
            for name in self._names_of_ps
        }

    def _read_st(self) -> dict[str, Any]:
        """Return the current states of this module and those below."""
        own: dict[str, Any] = self._buffers
        below: dict[str, Any] = self._modules
        # A call may save a state for the backward pass, which the in-place update afterwards must not overwrite.
        written = self._in_place and (self.training or not self._modal)
        copied: Any = torch.clone if written and torch.is_grad_enabled() else _itself
        st: dict[str, Any] = {}
        for name in self._names_of_st:
            if name in self._keys:
                st[name] = own[name].to(torch.uint64)
            elif name in own:
                st[name] = copied(own[name])
            elif name in below:
                part = below[name]._read_st()
                st[name] = _unflatten(self._nodes[name], part) if name in self._nodes else part
            else:
                st[name] = _MODES[self.training] if name == TRAINING else self._statics[name]
        return st

    def _write_st(self, st: Any, old: Any) -> None:
        """Store the states that a call returned; `old` are those before it."""
        below: dict[str, Any] = self._modules
        for name in () if st is old else self._names_of_st:
            value, before = st[name], old[name]
            if name in self._buffers:
                if value is not before:
                    self._write_buffer(name, self._stored(name, value).detach())
            elif name in below:
                if name in self._nodes:
                    value, before = _numbered(tree_leaves(value)), _numbered(tree_leaves(before))
                below[name]._write_st(value, before)
            elif name == TRAINING:
                self.training = bool(value)
            elif self._in_place:
                self._statics[name] = value

    def _write_buffer(self, name: str, value: Tensor) -> None:
        own: dict[str, Any] = self._buffers
        if self._in_place:  # so that a CUDA graph, which holds the buffer, sees the new value
            own[name].copy_(value)
        else:
            own[name] = value

    def _stored(self, name: str, value: Tensor) -> Tensor:
        if value.dtype != torch.uint64:
            return value
        self._keys.add(name)
        self._non_persistent_buffers_set.add(name)
        return value.to(torch.int64)

    def _as_dict(self, name: str, value: Any, path: tuple[str, ...]) -> Mapping[str, Any]:
        """Return an entry of the states as a dict."""
        if isinstance(value, Mapping):
            return value
        leaves = _numbered(tree_leaves(value))
        if not all(isinstance(leaf, Tensor) for leaf in leaves.values()):
            raise _not_tensors("state", (*path, name), value)
        names = iter(leaves)
        self._nodes[name] = tree_map(lambda _: next(names), value)
        return leaves

    def _check_name(self, name: str, path: tuple[str, ...]) -> None:
        if not name or "." in name or hasattr(self, name):
            expected = "unique, without dots, and not an attribute of torch.nn.Module"
            fix, where = "Give the layer another name, or the tensor.", ".".join(("model", *path))
            raise out_of_range("The name of a parameter, buffer or submodule", name, expected, fix=fix, where=where)


def branches_only(module: nn.Module) -> bool:
    """Return whether all submodules are branches: none was parametrized, and none was replaced."""
    return all(type(part) is Branch for part in module.modules() if part is not module)


def _itself(value: Any) -> Any:
    return value


def _unflatten(node: Any, tensors: Mapping[str, Any]) -> Any:
    return tree_map(lambda name: tensors[name], node)


def _numbered(leaves: list[Any]) -> dict[str, Any]:
    return {str(i): leaf for i, leaf in enumerate(leaves)}


def _not_tensors(kind: str, path: tuple[str, ...], value: Any) -> DTypeError:
    expected = "a tensor, or tensors nested in dicts by name"
    return wrong_type(f"The {kind} '{path[-1]}'", value, expected, where=".".join(("model", *path)))
