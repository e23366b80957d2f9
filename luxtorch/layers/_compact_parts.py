"""The layer that `compact` makes: its parts, and the handle by which its function reads them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from importlib import import_module
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from luxtorch._torch import compile_constant, is_wrapped
from luxtorch._transforms import transform_level
from luxtorch.core import (
    ContainerLayer,
    InputError,
    KeyNameError,
    Layer,
    Parameters,
    StatefulLayer,
    States,
    Static,
    Value,
    described,
    show_value,
    suggest,
)
from luxtorch.random import fold_in


class Content(Value):
    """A tensor's values as bytes, so that they can be compared, hashed and pickled with a layer."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> Content:
        """Copy the numbers of a tensor."""
        if tensor.is_meta or is_wrapped(tensor):
            raise InputError(
                "A tensor of a compact model must have values, as they are part of the model.",
                got="a tensor on the meta device, or inside a transform of torch.func",
                fix="Make the model outside, or let lt.init_fn make the tensor.",
            )
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return cls(tensor.dtype, tuple(tensor.shape), bytes(flat.view(torch.uint8).tolist()))

    def __call__(self, key: Tensor) -> Tensor:
        """Return the tensor, on the key's device."""
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
    """A function that makes a tensor from a key."""

    function: Callable[..., Tensor]
    shape: tuple[int, ...] | None

    def __call__(self, key: Tensor) -> Tensor:
        """Draw the tensor."""
        return self.function(key) if self.shape is None else self.function(key, self.shape)

    def __repr__(self) -> str:
        return show_value(self.function) + (f" {self.shape}" if self.shape is not None else "")


class Leaf(Value):
    """The initial value of one tensor of a model, and whether it is trained.

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
    """A part that is neither a layer nor a tensor."""

    value: Any

    def __repr__(self) -> str:
        return show_value(self.value)


Part: TypeAlias = Layer | Leaf | Constant
"""What a model is made of; a `Group` is a layer."""


class Holder(ContainerLayer):
    """Parts under names; parameters and states are nested under these names."""

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

    def values(self, ps: Parameters, st: States) -> dict[str, Any]:
        """Return what the function gets for each part: a `StatefulLayer` for a layer, a tensor for a tensor."""
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

    def new_states(self, seen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the states after the function has run, detached."""
        new = {}
        for name, part in zip(self.names, self.parts, strict=True):
            value = seen[name]
            if isinstance(part, Leaf):
                if not part.trainable:
                    new[name] = value.detach() if isinstance(value, Tensor) else value
            elif type(part) is Group:
                new[name] = part.new_states(part.by_name(value))
            elif not isinstance(part, Constant):
                new[name] = value.states
        return new


class Group(Holder):
    """A list or dict of layers or of tensors; the function gets a tuple or a dict of them."""

    keyed: bool

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return what the function gets; called as a layer, so that wrong names in the trees are located."""
        seen = self.values(ps, st)
        return seen if self.keyed else tuple(seen.values()), st

    def by_name(self, seen: Any) -> Mapping[str, Any]:
        """Return the values of a group by name."""
        return seen if self.keyed else dict(zip(self.names, seen, strict=True))


class Parts:
    """Give the body of a compact model its parts as attributes, during one call.

    A layer is read as a `StatefulLayer`, called on the input alone; a parameter or a state as its tensor; anything else
    as it was given. A list is read as a tuple, a dict as a dict. States are assigned: `m.count = m.count + 1` changes
    what is read from then on in the same call, and the state that the model returns. Nothing else can be assigned.

    A layer that the body calls inside a further transform, for instance to differentiate it by its input, keeps no
    states from that call, see `StatefulLayer`.
    """

    def __init__(self, model: Compact, ps: Parameters, st: States) -> None:
        for name, part in {**model.values(ps, st), "_model": model, "_level": transform_level()}.items():
            object.__setattr__(self, name, part)

    def __getattr__(self, name: str) -> Any:
        # Python asks here only for what it has not found.
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._unknown(name)

    def __setattr__(self, name: str, value: Any) -> None:
        model: Compact = self._model
        if name not in model.names:
            raise self._unknown(name)
        part = model.parts[model.names.index(name)]
        if not _is_state(part):
            raise InputError(
                f"'{name}' of {model.title} cannot be assigned, as it is not a state.",
                expected="an assignment to a state" + (f": {', '.join(states)}" if (states := self._states()) else ""),
                fix=f"Use another variable; or declare a state, {name}=lt.non_trainable(torch.tensor(...)).",
            )
        if transform_level() != self._level:
            raise InputError(
                f"The state '{name}' of {model.title} cannot be assigned inside a transform of torch.func.",
                fix="Return the value from the transformed function, with has_aux=True, and assign it outside.",
            )
        difference = _difference(value, self.__dict__[name])
        if difference:
            raise InputError(
                f"The state '{name}' of {model.title} must keep its shape and dtype.",
                expected=difference[0],
                got=difference[1],
                fix="Convert the value, .to(dtype), or declare the state as what it becomes.",
            )
        self.__dict__[name] = value

    def _unknown(self, name: str) -> KeyNameError:
        model: Compact = self._model
        fix = suggest(name, model.names) or f"Declare it: lt.compact({name}=..., ...)."
        if name in ("ps", "st"):
            fix = "Parts have theirs already: m.dense(x). For all parameters, the function takes a third argument, ps."
        return KeyNameError(f"{model.title} has no part '{name}'.", expected=", ".join(model.names), got=name, fix=fix)

    def _states(self) -> list[str]:
        return [name for name, part in self._model.items() if _is_state(part)]


def _is_state(part: Any) -> bool:
    if isinstance(part, Group):
        return all(_is_state(item) for item in part.parts)
    return isinstance(part, Leaf) and not part.trainable


def _difference(new: Any, old: Any) -> tuple[str, str] | None:
    """Describe the old and the new value of a state, if structure, shape or dtype would change."""
    if isinstance(old, Tensor):
        same = isinstance(new, Tensor) and new.shape == old.shape and new.dtype == old.dtype
        return None if same else (described(old), described(new))
    if isinstance(old, tuple | dict):
        new_items, old_items = _items(new), _items(old)
        if type(new) is not type(old) or new_items.keys() != old_items.keys():
            return described(old), described(new)
        for name in old_items:
            if found := _difference(new_items[name], old_items[name]):
                return found
        return None
    return None if new == old else (f"{old}, which no call changes", f"{new}")


def _items(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, tuple) else {}


Body: TypeAlias = Callable[..., Any]
"""A function of the parts, an input and optionally the model's parameters: `(m, x)` or `(m, x, ps)`."""


class Compact(Holder):
    """The layer that `compact` makes: it calls a function on its parts."""

    function: Body
    takes_parameters: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._set(takes_parameters=len(inspect.signature(self.function).parameters) == 3)

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return what the function returns, and the states that it leaves."""
        m = Parts(self, ps, st)
        y = self.function(m, x, ps) if self.takes_parameters else self.function(m, x)
        if y is None:
            raise InputError(f"{self.title} must return a value.", got="None", fix="return y")
        return y, self.new_states(m.__dict__)

    @property
    def title(self) -> str:
        """Return the function's name."""
        return show_value(self.function)

    def extra_repr(self) -> str:
        """Return the function's name and the parts that are not layers."""
        return ", ".join(
            [self.title, *(f"{name}={part!r}" for name, part in self.items() if not isinstance(part, Layer))]
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The decorated name stands for the layer, so pickle would not find the function under it.
        place = _Place(self.function.__module__, self.function.__qualname__) if _is_decorated(self.function) else None
        return _rebuilt, (place or self.function, self.names, self.parts)


class _Place(Value):
    """The place of a decorated function: its module, and the name that now stands for its layer."""

    module: str
    name: str

    def find(self) -> Any:
        found: Any = import_module(self.module)
        return attrgetter(self.name)(found)


def _rebuilt(place: _Place | Body, names: tuple[str, ...], parts: tuple[Part, ...]) -> Compact:
    return Compact(names, parts, place.find().function if isinstance(place, _Place) else place)


def _is_decorated(function: Any) -> bool:
    """Return whether the name of a function in its module now stands for its layer."""
    try:
        found = attrgetter(function.__qualname__)(sys.modules[function.__module__])
    except (AttributeError, KeyError):
        return False
    return isinstance(found, Compact) and found.function is function
