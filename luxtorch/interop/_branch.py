"""The trees of a layer, held by a `torch.nn.Module`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch.core import TRAINING, DTypeError, InputError, Parameters, States, Static, tree_leaves, tree_map

_MODES = (Static(False), Static(True))


class Branch(nn.Module):
    """Hold one level of parameters and states, and the levels below in modules of their names.

    Parameters are the module's parameters and states its buffers, so that the names in its `state_dict` are the dotted
    names of the trees. Its own mode is the layer's mode.

    Random keys are kept as int64, the same bits: torch.distributed, which sends buffers around, has no uint64.

    Everything about a branch is private, for its public names are those of the layers.

    Args:
        ps: The parameters; they are copied.
        st: The states; they are copied.
        training: The mode where the states have none.
        path: The names that lead here.
    """

    def __init__(self, ps: Parameters, st: States, training: bool = True, path: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._names_of_ps = tuple(ps)
        self._names_of_st = tuple(st)
        self._keys: set[str] = set()
        self._statics: dict[str, Any] = {}
        # For states that are neither dicts nor tensors, such as the carry of an LSTM: the same with names for tensors.
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
                raise _no_tensor("parameter", (*path, name), value)
        for name, value in st.items():
            if isinstance(value, Static):
                self._statics[name] = value
            elif isinstance(value, Tensor):
                self._check_name(name, path)
                self._buffers[name] = self._stored(name, value).detach().clone()
            else:
                below[name] = below.get(name, ({}, {}))[0], self._opened(name, value, path)
        mode = self._statics.pop(TRAINING, None)
        self.training = training if mode is None else bool(mode)
        for name, (ps_below, st_below) in below.items():
            self._check_name(name, path)
            self._modules[name] = Branch(ps_below, st_below, self.training, (*path, name))

    @property
    def _modal(self) -> bool:
        return TRAINING in self._names_of_st

    def _read_ps(self) -> dict[str, Any]:
        """Return the parameters from here on, as they are now."""
        own: dict[str, Any] = self._parameters
        below: dict[str, Any] = self._modules
        return {
            # Who parametrizes or prunes a module leaves the value as an attribute.
            name: own[name] if name in own else below[name]._read_ps() if name in below else getattr(self, name)
            for name in self._names_of_ps
        }

    def _read_st(self) -> dict[str, Any]:
        """Return the states from here on, as they are now."""
        own: dict[str, Any] = self._buffers
        below: dict[str, Any] = self._modules
        # A call may save a state for the backward pass, and writing into that later would spoil it.
        written = self._in_place and (self.training or not self._modal)
        lend: Any = torch.clone if written and torch.is_grad_enabled() else _itself
        st: dict[str, Any] = {}
        for name in self._names_of_st:
            if name in self._keys:
                st[name] = own[name].to(torch.uint64)
            elif name in own:
                st[name] = lend(own[name])
            elif name in below:
                part = below[name]._read_st()
                st[name] = _filled(self._nodes[name], part) if name in self._nodes else part
            else:
                st[name] = _MODES[self.training] if name == TRAINING else self._statics[name]
        return st

    def _write_st(self, st: Any, lent: Any) -> None:
        """Keep the states after a call; `lent` are those before it."""
        below: dict[str, Any] = self._modules
        for name in () if st is lent else self._names_of_st:
            value, before = st[name], lent[name]
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
        if self._in_place:  # whoever holds the buffer, such as a CUDA graph, sees the new value
            own[name].copy_(value)
        else:
            own[name] = value

    def _stored(self, name: str, value: Tensor) -> Tensor:
        if value.dtype != torch.uint64:
            return value
        self._keys.add(name)
        self._non_persistent_buffers_set.add(name)
        return value.to(torch.int64)

    def _opened(self, name: str, value: Any, path: tuple[str, ...]) -> Mapping[str, Any]:
        """Return an entry of the states as a dict."""
        if isinstance(value, Mapping):
            return value
        leaves = _numbered(tree_leaves(value))
        if not all(isinstance(leaf, Tensor) for leaf in leaves.values()):
            raise _no_tensor("state", (*path, name), value)
        names = iter(leaves)
        self._nodes[name] = tree_map(lambda _: next(names), value)
        return leaves

    def _check_name(self, name: str, path: tuple[str, ...]) -> None:
        if not name or "." in name or hasattr(self, name):
            raise InputError(
                f"A module cannot have a parameter, buffer or part called '{name}'.",
                expected="one use of each name, without dots, that is not an attribute of torch.nn.Module",
                got=f"'{name}'",
                fix="Give the layer another name, or the tensor.",
                where=".".join(("model", *path)),
            )


def branches_only(module: nn.Module) -> bool:
    """Say whether all modules below one are branches: nobody has parametrized one, or put another in."""
    return all(type(part) is Branch for part in module.modules() if part is not module)


def _itself(value: Any) -> Any:
    return value


def _filled(node: Any, tensors: Mapping[str, Any]) -> Any:
    return tree_map(lambda name: tensors[name], node)


def _numbered(leaves: list[Any]) -> dict[str, Any]:
    return {str(i): leaf for i, leaf in enumerate(leaves)}


def _no_tensor(what: str, path: tuple[str, ...], value: Any) -> DTypeError:
    return DTypeError(
        f"The {what} '{path[-1]}' cannot be held by a module.",
        expected="tensors, nested in dicts by name",
        got=f"{value!r:.80} of type {type(value).__name__}",
        where=".".join(("model", *path)),
    )
