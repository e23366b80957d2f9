"""What a compact model is made of: layers, tensors by their values, and groups of either."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from luxtorch._torch import compile_constant, is_wrapped
from luxtorch.core import (
    ContainerLayer,
    InputError,
    Layer,
    Parameters,
    StatefulLayer,
    States,
    Static,
    Value,
    show_value,
)
from luxtorch.random import fold_in


class Content(Value):
    """Hold a tensor's numbers as bytes, so that they can be compared, hashed and pickled with a layer."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> Content:
        """Copy the numbers of a tensor."""
        if tensor.is_meta or is_wrapped(tensor):
            raise InputError(
                "A tensor of a compact model has to have values, as they are part of the model.",
                got="a tensor on the meta device, or inside a transform of torch.func",
                fix="Make the model outside, or let lt.init_fn make the tensor.",
            )
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return cls(tensor.dtype, tuple(tensor.shape), bytes(flat.view(torch.uint8).tolist()))

    def __call__(self, key: Tensor) -> Tensor:
        """Make the tensor anew, on the key's device."""
        if key.is_meta or not self.data:
            return torch.empty(self.shape, dtype=self.dtype, device=key.device)
        if torch.compiler.is_compiling():
            flat = torch.tensor(_numbers(self.data), dtype=torch.uint8).view(self.dtype)
        else:
            flat = torch.frombuffer(bytearray(self.data), dtype=self.dtype)
        return flat.reshape(self.shape).to(key.device)

    def __repr__(self) -> str:
        return f"{self.shape}"


@compile_constant  # which cannot trace through bytes
def _numbers(data: bytes) -> list[int]:
    return list(data)


class Drawn(Value):
    """Hold how a tensor is made from a key."""

    function: Callable[..., Tensor]
    shape: tuple[int, ...] | None

    def __call__(self, key: Tensor) -> Tensor:
        """Draw the tensor."""
        return self.function(key) if self.shape is None else self.function(key, self.shape)

    def __repr__(self) -> str:
        return show_value(self.function) + (f" {self.shape}" if self.shape is not None else "")


class Leaf(Value):
    """Hold what one tensor of a model starts as, and whether it is trained.

    A `Static` instead of a tensor is a switch among the states.
    """

    start: Content | Drawn | Static[Any]
    trainable: bool = True

    def initial(self, key: Tensor) -> Any:
        """Return the first value."""
        return self.start if isinstance(self.start, Static) else self.start(key)

    def __repr__(self) -> str:
        return f"{'parameter' if self.trainable else 'state'} {self.start!r}"


class Constant(Value):
    """Hold a part that is neither a layer nor a tensor."""

    value: Any

    def __repr__(self) -> str:
        return show_value(self.value)


Part: TypeAlias = Layer | Leaf | Constant
"""What a model is made of; a `Group` is a layer."""


class Holder(ContainerLayer):
    """Hold parts under names; parameters and states are nested under these names."""

    names: tuple[str, ...]
    parts: tuple[Part, ...]

    def items(self) -> Iterator[tuple[str, Part]]:
        """Iterate over the names and the parts."""
        return zip(self.names, self.parts, strict=True)

    def children(self) -> Mapping[str, Layer]:
        """Return the parts that are layers, groups among them."""
        return {name: part for name, part in self.items() if isinstance(part, Layer)}

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return the parameters of the layers, and the tensors to be trained."""
        return self._initial(key, trainable=True)

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the states of the layers, and the tensors not to be trained."""
        return self._initial(key, trainable=False)

    def _initial(self, key: Tensor, trainable: bool) -> dict[str, Any]:
        found = {}
        for name, part in self.items():
            if isinstance(part, Layer):
                make = part.initial_parameters if trainable else part.initial_states
                found[name] = make(fold_in(key, name))
            elif isinstance(part, Leaf) and part.trainable == trainable:
                found[name] = part.initial(fold_in(key, name))
        return found

    def opened(self, ps: Parameters, st: States) -> dict[str, Any]:
        """Return what the body of a model sees of each part: a box for a layer, a tensor for a tensor."""
        seen: dict[str, Any] = {}
        for name, part in zip(self.names, self.parts, strict=True):
            if isinstance(part, Leaf):
                seen[name] = (ps if part.trainable else st)[name]
            elif isinstance(part, Constant):
                seen[name] = part.value
            elif type(part) is Group:
                seen[name], _ = part(None, ps[name], st[name])
            else:
                seen[name] = StatefulLayer(part, ps[name], st[name])
        return seen

    def closed(self, seen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the states that the body left, detached."""
        new = {}
        for name, part in zip(self.names, self.parts, strict=True):
            value = seen[name]
            if isinstance(part, Leaf):
                if not part.trainable:
                    new[name] = value.detach() if isinstance(value, Tensor) else value
            elif type(part) is Group:
                new[name] = part.closed(part.by_name(value))
            elif not isinstance(part, Constant):
                new[name] = value.states
        return new


class Group(Holder):
    """Hold a list or dict of layers or of tensors; a body sees a tuple or a dict of them."""

    keyed: bool

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return what a body sees; calling it as a layer lets a wrong name be noticed and located."""
        seen = self.opened(ps, st)
        return seen if self.keyed else tuple(seen.values()), st

    def by_name(self, seen: Any) -> Mapping[str, Any]:
        """Return what a body sees, or left, under the names."""
        return seen if self.keyed else dict(zip(self.names, seen, strict=True))
