"""The handle by which the body of a compact model reads its parts and assigns its states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from luxtorch._transforms import transform_level
from luxtorch.core import InputError, KeyNameError, Parameters, States, suggest

from ._compact_parts import Group, Leaf

if TYPE_CHECKING:
    from ._compact_layer import Compact


class Parts:
    """Give the body of a compact model its parts as attributes, for the time of one call.

    A layer is read as a `StatefulLayer`, called on the input alone; a parameter or a state as its tensor; anything else
    as it was given. A list is read as a tuple, a dict as a dict. States are assigned: `m.count = m.count + 1` changes
    what is read from then on in the same call, and the state that the model returns. Nothing else can be assigned.

    A layer that the body calls inside a further transform, for instance to differentiate it by its input, keeps no
    states from that call, see `StatefulLayer`.
    """

    def __init__(self, model: Compact, ps: Parameters, st: States) -> None:
        for name, part in {**model.opened(ps, st), "_model": model, "_level": transform_level()}.items():
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
                f"'{name}' of {model.title} cannot be assigned, as it is no state.",
                expected="an assignment to a state" + (f": {', '.join(states)}" if (states := self._states()) else ""),
                fix=f"Use another variable; or declare a state, {name}=lt.non_trainable(torch.tensor(...)).",
            )
        if transform_level() != self._level:
            raise InputError(
                f"The state '{name}' of {model.title} is assigned inside a transform of torch.func.",
                fix="Return the value from the transformed function, with has_aux=True, and assign it outside.",
            )
        difference = _difference(value, self.__dict__[name])
        if difference:
            raise InputError(
                f"The state '{name}' of {model.title} has to stay what it is.",
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
    """Say how a state would change in more than its numbers: what it is, and what it would be."""
    if isinstance(old, Tensor):
        same = isinstance(new, Tensor) and new.shape == old.shape and new.dtype == old.dtype
        return None if same else (_described(old), _described(new))
    if isinstance(old, tuple | dict):
        new_items, old_items = _items(new), _items(old)
        if type(new) is not type(old) or new_items.keys() != old_items.keys():
            return _described(old), _described(new)
        for name in old_items:
            if found := _difference(new_items[name], old_items[name]):
                return found
        return None
    return None if new == old else (f"{old}, which no call changes", f"{new}")


def _items(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, tuple) else {}


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, dict):
        return f"a dict with the names {', '.join(map(str, value))}"
    return f"{value!r:.80} of type {type(value).__name__}"
