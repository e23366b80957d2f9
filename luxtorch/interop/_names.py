"""Names in the `state_dict` of a module that differ from the trees: tied and non-persistent tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn

from luxtorch.core import Static

NAMES = "state_dict"
"""The key of `Names` in the states of a converted module, if it has any."""


class Names(NamedTuple):
    """Record how the `state_dict` of a module differs from its trees.

    Attributes:
        tied: Second names of tensors, each with the first name.
        transient: The names of states that are not in it: attributes, and non-persistent buffers.
    """

    tied: tuple[tuple[str, str], ...] = ()
    transient: tuple[str, ...] = ()


def names_of(module: nn.Module) -> Names:
    """Return the tied and transient names of a module."""
    first: dict[int, str] = {}
    tied = []
    members = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    for name, value in members:
        if first.setdefault(id(value), name) != name:
            tied.append((name, first[id(value)]))
    transient = [
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        for name in (*part._non_persistent_buffers_set, *(k for k, v in vars(part).items() if _is_tensor(v)))
    ]
    return Names(tuple(tied), tuple(sorted(transient)))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "like")


def names_in(st: Any, prefix: str = "") -> Iterator[tuple[str, Names]]:
    """Yield the `Names` in states, each with the dotted prefix of its module."""
    for name, value in st.items() if isinstance(st, Mapping) else ():
        if name == NAMES and isinstance(value, Static):
            yield prefix, value.value
        elif isinstance(value, Mapping):
            yield from names_in(value, prefix if _FROZEN.fullmatch(name) else f"{prefix}{name}.")


_FROZEN = re.compile("frozen_params_*")


def public(name: str) -> str:
    """Return the name of a tensor in a `state_dict`: without `frozen_params`."""
    return ".".join(part for part in name.split(".") if not _FROZEN.fullmatch(part))
