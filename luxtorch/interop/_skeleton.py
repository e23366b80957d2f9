"""A module without its tensors, which are lent to it for the time of a call."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch._torch import storage_id
from luxtorch._transforms import in_reverse, unwrapped
from luxtorch.core import InputError, LuxtorchError, Parameters, States, Static

from ._code import check_code, draws_checked, functions_of, sources_of
from ._duplicate import Alias, Duplicate
from ._identity import Identity, identity_of
from ._late import Called, carried
from ._names import NAMES, names_of
from ._part import Part, Placeholder, tensors_of, writes_parameter
from ._reach import asks_for_parameters, left_by_calls
from ._reset import Place, untouched
from ._shared import NOTHING, Shared
from .pure._keys import Keys
from .pure._mode import PureMode
from .pure._modules import make_pure, make_traceable

RNG = "rng"
"""The name under which the state of a module with random or unknown code keeps its key."""


def shares(tensor: Any, other: Any) -> bool:
    """Say whether to write into a tensor is to write into another one."""
    return tensor is other or _storage_of(tensor) == _storage_of(other)


def _storage_of(tensor: Any) -> int:
    """Return what two tensors have in common if to write into one is to write into the other."""
    try:
        return storage_id(unwrapped(tensor))
    except Exception:  # a kind of tensor without one
        return id(tensor)


def _call_of(module: Any) -> Callable[..., Any]:
    """Return the call of a module, without holding the module."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module()._call_impl(*args, **kwargs)

    return call


class Body:
    """Hold a copy of a module for one call at a time.

    Args:
        duplicate: The copy, with placeholders.
        draws: The global sources of random numbers that its code may draw from.
        shared: What its code may change besides the module.
        traced: Whether it is for a compiler.

    Attributes:
        module: The copy.
        root: Its parts.
    """

    def __init__(
        self,
        duplicate: Duplicate,
        draws: frozenset[str] = frozenset(),
        shared: Shared = NOTHING,
        *,
        traced: bool = False,
    ) -> None:
        self.module = duplicate.module
        self.root = Part(duplicate.module, (), set())
        self._parts = [part for part in self.root if part.busy]
        self._duplicate = duplicate
        self._draws, self._shared = draws, shared
        self._sources: dict[int, tuple[Part, str]] = {}
        first = set()
        for part in self.root:
            for name, store in part.stores.items():
                self._sources[id(store[name])] = part, name
                first.add((id(store), name))
        asked = any(asks_for_parameters(part.module) for part in self.root)
        for part in self.root:
            part.as_parameters, part.traced, part.apart = asked, traced, part.apart and not traced
        self._lent_apart = {id(part.module._parameters): part.module for part in self.root if part.apart}
        self._aliases = [alias for alias in duplicate.aliases if (id(alias.container), alias.name) not in first]
        self._kept_as_given: set[int] | None = None
        self._hooked = [part for part in self.root if part.module._backward_hooks or part.module._backward_pre_hooks]
        duplicate.settle(self._lent_apart)

    @property
    def free(self) -> bool:
        """Whether nobody holds what belongs to the copy."""
        return self._duplicate.free

    def lend(self, ps: Parameters, st: States) -> None:
        """Put parameters and states into the copy, wherever they stand."""
        self._kept_as_given = None
        self.root.lend(ps, st)
        for alias in self._aliases:
            self._put(alias, self._duplicate.filled(alias.content, self._value))

    def _value(self, placeholder: Any) -> Any:
        part, name = self._sources[id(placeholder)]
        return part.value(name)

    def _put(self, alias: Alias, value: Any) -> None:
        module = self._lent_apart.get(id(alias.container))
        if module is None:
            alias.put(value)
        else:  # another dict stands in the place of the container
            own: dict[str, Any] = module._parameters
            own[alias.name] = value

    def function(self, method: str) -> Callable[..., Any]:
        """Return a method of the module; its call, where that is its forward."""
        return self.module if method == "forward" else getattr(self.module, method)

    @contextmanager
    def running(self, keys: Keys) -> Iterator[None]:
        """Let the module run, with random numbers from keys."""
        if self._hooked and in_reverse():
            raise self._hooked[0].located(
                InputError(
                    "The module has full backward hooks, which only an autograd tape runs.",
                    expected="a tape, as that of training.single_train_step or of y.backward()",
                    got="a transform of torch.func",
                    fix="Remove them before from_torch: handle.remove().",
                )
            )
        own = self._duplicate.generators
        watched = draws_checked(self._draws, own) if self._draws or own else nullcontext()
        with self._shared.put_back(), watched, Called(self, keys), PureMode(keys, self):
            yield

    def take(self, st: States) -> dict[str, Any]:
        """Return the states after a call; `st` are those before it."""
        for part in self._parts:
            if part.parameters:
                part.check_parameters()
        return self.root.take(st)

    def clear(self) -> None:
        """Take the tensors away again, and put back whatever else a call has changed."""
        for alias in self._aliases:
            self._put(alias, alias.content)
        for part in self._parts:
            part.clear()
        if not torch.compiler.is_compiling():
            self._duplicate.restore()

    def protected(self, tensor: Tensor, touches: Callable[[Any, Any], bool] = shares) -> LuxtorchError | None:
        """Return the error of a forward that changes a tensor, if it must not.

        Args:
            tensor: The tensor.
            touches: Whether to change a tensor is to change another one.
        """
        for part in self.root:
            for name in part.parameters:
                if touches(tensor, part.value(name)):
                    return part.located(writes_parameter(name))
        for value in self._duplicate.constants.values():
            if touches(tensor, value):
                return InputError(
                    "The module's forward changes a tensor that is neither its parameter nor its buffer.",
                    expected="states in buffers, which a call returns",
                    got=f"a write into a tensor of shape {tuple(value.shape)}",
                    fix="Register it by register_buffer.",
                )
        return None

    def written(self, tensor: Tensor) -> LuxtorchError | None:
        """Return the error of a forward that writes into a tensor, if it must not."""
        if self._kept_as_given is None:  # most calls write into many tensors, or into none
            lent = (value for part in self._parts for value in part.lent)
            self._kept_as_given = {*map(_storage_of, (*lent, *self._duplicate.constants.values()))}
        return self.protected(tensor) if _storage_of(tensor) in self._kept_as_given else None

    def requires_gradient(self, tensor: Tensor) -> bool:
        """Say whether a tensor stands for a parameter that requires a gradient in the module."""
        for part in self.root:
            for name in part.trainable:
                if part.value(name) is tensor:
                    return True
        return False

    def call_later(self, keys: Keys) -> None:
        """Let modules of the copy that something has kept, such as an adjoint solver, be called after the call."""
        for module in self._duplicate.modules:
            vars(module)["_compiled_call_impl"] = carried(_call_of(weakref.ref(module)), self, keys)


class Skeleton:
    """Copy a module without its tensors, for calls with tensors from outside.

    Copies are lent out one call at a time, so that calls from several threads do not meet in one. A copy that
    something holds after the call, such as a checkpoint, keeps what it was lent until it is let go.

    Args:
        module: The module, which stays as it is.
        kept: What to take for `kept`; by default, what the module holds.
        identity: What to take for `identity`; by default, made from the module.
        drawn: What to take for `drawn`; likewise.

    Attributes:
        root: The parts of a copy that nobody calls, for a look.
        random: Whether the module may ask for random numbers.
        writes: Whether it may write into its input: in torch's own modules an option says so, of others nobody knows.
        draws: The sources of random numbers, besides torch's functions, that its code may draw from.
        shared: What its code may change besides the module: caches and counters of classes and globals.
        kept: The tensors that no `reset_parameters` makes anew, by place.
        drawn: Those of these that seem to be drawn at random: parameters whose elements differ.
        names: How its `state_dict` differs from the trees.
        identity: What tells it from others, besides `kept`.
    """

    def __init__(
        self,
        module: nn.Module,
        kept: dict[Place, Tensor] | None = None,
        identity: Identity | None = None,
        drawn: frozenset[Place] | None = None,
    ) -> None:
        functions = functions_of(module)
        check_code(module, functions)
        self.draws, self.shared = sources_of(module, functions), Shared(module, functions)
        placeholders = {
            id(value): value if isinstance(value, Placeholder) else Placeholder(value)
            for each in module.modules()
            for _, _, value in tensors_of(each)
        }
        first = Duplicate(module, placeholders, left_by_calls)
        for each in first.modules:
            make_pure(each)
        self._constants = first.constants
        self.root = Body(first).root
        self.random = any(part.modal for part in self.root)
        self.writes = any(part.written for part in self.root)
        self.kept, certain = untouched(Part(module, (), set()), self._copy()) if kept is None else (kept, True)
        self.names = names_of(self.root.module)
        parameters = {(part.path, name) for part in self.root for name in part.parameters}
        varying = frozenset(place for place, value in self.kept.items() if place in parameters and _varies(value))
        self.drawn = (varying if certain else frozenset()) if drawn is None else drawn
        self.identity = (
            identity_of(self.root.module, [(part.path, part.names) for part in self.root])
            if identity is None
            else identity
        )
        self._idle: list[Body] = []
        self._out: list[Body] = []
        self._most_out = 8
        self._traced = self._copy(traced=True)
        for part in self._traced.root:
            make_traceable(part.module)

    def own_states(self, key: Tensor) -> dict[str, Any]:
        """Return the states that are not the module's: a key, if it may ask for one, and names."""
        named = {NAMES: Static(self.names)} if any(self.names) else {}
        return {RNG: key, **named} if self.random else named

    def borrow(self) -> Body:
        """Return a copy that no other call uses."""
        if torch.compiler.is_compiling():  # which traces a call once, alone
            return self._traced
        try:
            return self._idle.pop()
        except IndexError:
            return self._returned() or self._copy()

    def give_back(self, body: Body, keys: Keys | None = None) -> None:
        """Keep a copy for the next call, if nothing holds it; else when it is let go.

        Args:
            body: The copy.
            keys: What random numbers come from, if something holds it and calls it.
        """
        if torch.compiler.is_compiling():
            body.clear()
        elif body.free:
            body.clear()
            self._idle.append(body)
        else:
            if keys is not None:
                body.call_later(keys)
            self._out.append(body)

    def _returned(self) -> Body | None:
        """Return a copy that was held after its call, and is no longer."""
        for attempt in range(2):
            for i, body in enumerate(self._out):
                if body.free:
                    del self._out[i]
                    body.clear()
                    return body
            if attempt or len(self._out) < self._most_out:
                return None
            gc.collect()  # what holds them may itself be waiting for that
            self._most_out = 2 * len(self._out)
        return None

    def _copy(self, *, traced: bool = False) -> Body:
        # Its copies share the placeholders: a first call may be inside a transform or a trace, where none can be made.
        stood = [value for part in self.root for value in part.stood.values()]
        shared = {id(value): value.tensor if traced else value for value in stood}
        return Body(Duplicate(self.root.module, shared, shared=self._constants), self.draws, self.shared, traced=traced)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Skeleton) or self.identity != other.identity:
            return False
        return self.kept.keys() == other.kept.keys() and all(
            value is other.kept[place] or place in self.drawn & other.drawn or _equal(value, other.kept[place])
            for place, value in self.kept.items()
        )

    def __hash__(self) -> int:
        return hash(self.identity)

    def __deepcopy__(self, memo: Any) -> Skeleton:
        return self  # it does not change

    def __reduce__(self) -> tuple[Any, ...]:
        return Skeleton, (self.root.module, self.kept, self.identity, self.drawn)

    def __repr__(self) -> str:
        return type(self.root.module).__name__


def _varies(value: Tensor) -> bool:
    return value.numel() > 1 and not value.is_meta and bool((value != value.flatten()[0]).any())


def _equal(value: Tensor, other: Tensor) -> bool:
    if value.is_meta or other.is_meta:
        return value.is_meta and other.is_meta
    return torch.equal(value, other)
