"""Functionalization of a module: parameters and states are swapped into a copy of it for the time of a call."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as of_torch

from luxtorch._torch import storage_id
from luxtorch._transforms import in_reverse, transformed, unwrapped, watched
from luxtorch.core import InputError, LuxtorchError, Parameters, States, Static

from ._code import NOTHING, Identity, SharedState, check_code, check_draws, functions_of, identity_of, sources_of
from ._module_copy import Alias, ModuleCopy
from ._names import NAMES, names_of
from ._reach import asks_for_parameters, left_by_calls
from ._reset import Place, not_reset
from ._submodule import Placeholder, Submodule, tensors_of, writes_parameter
from .pure._keys import Keys
from .pure._mode import PureMode
from .pure._modules import make_pure, make_traceable


class _Call(threading.local):
    """Hold the current call of a converted module, for each thread."""

    copy: WorkingCopy | None = None
    keys: Keys | None = None


_now = _Call()


class CurrentCall:
    """Set the current call for checkpoints inside; a class, since each call enters one and a generator is slower."""

    def __init__(self, copy: WorkingCopy, keys: Keys) -> None:
        self._call = copy, keys

    def __enter__(self) -> None:
        self._before = _now.copy, _now.keys
        _now.copy, _now.keys = self._call

    def __exit__(self, *_: object) -> None:
        _now.copy, _now.keys = self._before


def deferred(function: Callable[..., Any], copy: WorkingCopy, keys: Keys) -> Callable[..., Any]:
    """Return a function that runs later as it would now: with the same functions replaced and the same keys."""
    keys = keys.copy()

    @functools.wraps(function)
    def later(*args: Any, **kwargs: Any) -> Any:
        if _now.copy is copy:
            return function(*args, **kwargs)
        again = keys.copy()
        with CurrentCall(copy, again), PureMode(again, copy):
            return function(*args, **kwargs)

    return later


def _checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a replacement of the generator of torch's checkpoint that knows the current call."""

    @functools.wraps(original)
    def generator(function: Any, *args: Any, **kwargs: Any) -> Any:
        if _now.copy is None or _now.keys is None:
            return original(function, *args, **kwargs)
        if transformed() or watched():  # these save what they need themselves, and do not allow checkpoints
            return iter((None,))
        return original(deferred(function, _now.copy, _now.keys), *args, **kwargs)

    return generator


class _Reentrant(of_torch.CheckpointFunction):
    """Use non-reentrant checkpoints in the call of a converted module: this kind has no `autograd.grad`."""

    @classmethod
    def apply(cls, function: Any, preserve: bool, *args: Any) -> Any:
        if _now.copy is None:
            return of_torch_reentrant.apply(function, preserve, *args)
        return of_torch.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


of_torch_reentrant = of_torch.CheckpointFunction


def install() -> None:
    """Patch torch's checkpoint inside of the calls of converted modules; elsewhere it is unchanged."""
    for name in ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator"):
        if hasattr(of_torch, name):
            setattr(of_torch, name, _checkpoint(getattr(of_torch, name)))
            break
    of_torch.CheckpointFunction = _Reentrant  # type: ignore[misc]


install()


RNG = "rng"
"""The name under which the state of a module with random or unknown code keeps its key."""


def shares(tensor: Any, other: Any) -> bool:
    """Return whether two tensors share their storage."""
    return tensor is other or _storage_of(tensor) == _storage_of(other)


def _storage_of(tensor: Any) -> int:
    """Return an id that two tensors have in common if they share their storage."""
    try:
        return storage_id(unwrapped(tensor))
    except Exception:  # a kind of tensor without one
        return id(tensor)


def _call_of(module: Any) -> Callable[..., Any]:
    """Return the call of a module, given a weak reference to it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module()._call_impl(*args, **kwargs)

    return call


class WorkingCopy:
    """Run a copy of a module with swapped parameters and states, one call at a time.

    Args:
        copied: The copy, with placeholders.
        draws: The global random number generators that its code may draw from.
        shared: The state outside of the module that its code may change.
        traced: Whether it is for torch.compile.

    Attributes:
        module: The copy.
        root: The module itself as the root of its submodules.
    """

    def __init__(
        self,
        copied: ModuleCopy,
        draws: frozenset[str] = frozenset(),
        shared: SharedState = NOTHING,
        *,
        traced: bool = False,
    ) -> None:
        self.module = copied.module
        self.root = Submodule(copied.module, (), set())
        self._parts = [part for part in self.root if part.busy]
        self._copied = copied
        self._draws, self._shared = draws, shared
        self._sources: dict[int, tuple[Submodule, str]] = {}
        first = set()
        for part in self.root:
            for name, store in part.stores.items():
                self._sources[id(store[name])] = part, name
                first.add((id(store), name))
        asked = any(asks_for_parameters(part.module) for part in self.root)
        for part in self.root:
            part.as_parameters, part.traced, part.own_dict = asked, traced, part.own_dict and not traced
        self._own_dicts = {id(part.module._parameters): part.module for part in self.root if part.own_dict}
        self._aliases = [alias for alias in copied.aliases if (id(alias.container), alias.name) not in first]
        self._read_only: set[int] | None = None
        self._with_hooks = [
            part for part in self.root if part.module._backward_hooks or part.module._backward_pre_hooks
        ]
        copied.snapshot(self._own_dicts)

    @property
    def free(self) -> bool:
        """Whether nothing outside references objects of the copy."""
        return self._copied.free

    def swap_in(self, ps: Parameters, st: States) -> None:
        """Put parameters and states into the copy, in the places of all placeholders."""
        self._read_only = None
        self.root.swap_in(ps, st)
        for alias in self._aliases:
            self._put(alias, self._copied.resolve(alias.content, self._value))

    def _value(self, placeholder: Any) -> Any:
        part, name = self._sources[id(placeholder)]
        return part.value(name)

    def _put(self, alias: Alias, value: Any) -> None:
        module = self._own_dicts.get(id(alias.container))
        if module is None:
            alias.put(value)
        else:  # the container was replaced by a dict for this call
            own: dict[str, Any] = module._parameters
            own[alias.name] = value

    def function(self, method: str) -> Callable[..., Any]:
        """Return a method of the module; for "forward", its call with hooks."""
        return self.module if method == "forward" else getattr(self.module, method)

    @contextmanager
    def running(self, keys: Keys) -> Iterator[None]:
        """Run the module inside with random numbers from keys, and undo changes of shared state."""
        if self._with_hooks and in_reverse():
            raise self._with_hooks[0].located(
                InputError(
                    "A module with full backward hooks must be differentiated by autograd, as only that runs them.",
                    expected="training.single_train_step or y.backward()",
                    got="a transform of torch.func",
                    fix="Remove the hooks before from_torch: handle.remove().",
                )
            )
        own = self._copied.generators
        watched = check_draws(self._draws, own) if self._draws or own else nullcontext()
        with self._shared.restored(), watched, CurrentCall(self, keys), PureMode(keys, self):
            yield

    def read_states(self, st: States) -> dict[str, Any]:
        """Return the states after a call; `st` are those before it."""
        for part in self._parts:
            if part.parameters:
                part.check_parameters()
        return self.root.read_states(st)

    def swap_out(self) -> None:
        """Put the placeholders back, and undo all other changes of a call."""
        for alias in self._aliases:
            self._put(alias, alias.content)
        for part in self._parts:
            part.swap_out()
        if not torch.compiler.is_compiling():
            self._copied.restore_all()

    def error_if_changed(self, tensor: Tensor, touches: Callable[[Any, Any], bool] = shares) -> LuxtorchError | None:
        """Return the error for a forward that changes a parameter or a constant; None for other tensors.

        Args:
            tensor: The tensor that is changed.
            touches: Tells whether changing one tensor changes another.
        """
        for part in self.root:
            for name in part.parameters:
                if touches(tensor, part.value(name)):
                    return part.located(writes_parameter(name))
        for value in self._copied.constants.values():
            if touches(tensor, value):
                return InputError(
                    "The module's forward must not change a tensor that is neither its parameter nor its buffer.",
                    got=f"a write into a tensor of shape {tuple(value.shape)}",
                    fix="Register it by register_buffer: buffers are states, which a call returns.",
                )
        return None

    def error_if_written(self, tensor: Tensor) -> LuxtorchError | None:
        """Return the error for a forward that writes into a parameter or a constant; None for other tensors."""
        if self._read_only is None:  # most calls write into many tensors, or into none
            swapped = (value for part in self._parts for value in part.swapped)
            self._read_only = {*map(_storage_of, (*swapped, *self._copied.constants.values()))}
        return self.error_if_changed(tensor) if _storage_of(tensor) in self._read_only else None

    def requires_gradient(self, tensor: Tensor) -> bool:
        """Return whether a tensor was swapped in for a parameter that requires a gradient."""
        for part in self.root:
            for name in part.trainable:
                if part.value(name) is tensor:
                    return True
        return False

    def call_later(self, keys: Keys) -> None:
        """Let submodules that something still references, such as an adjoint solver, be called after the call."""
        for module in self._copied.modules:
            vars(module)["_compiled_call_impl"] = deferred(_call_of(weakref.ref(module)), self, keys)


class Skeleton:
    """Functionalize a module: hold a pool of copies without tensors, for calls with tensors from outside.

    A call acquires a copy for itself, so that threads do not share one. A copy that something still references after
    the call, such as a checkpoint, keeps its tensors until it is released.

    Args:
        module: The module, which is not changed.
        kept: A value for `kept`; by default, computed from the module.
        identity: A value for `identity`; likewise.
        drawn: A value for `drawn`; likewise.

    Attributes:
        root: The submodules of a copy that is never called, to look up names and shapes.
        random: Whether the module may draw random numbers.
        writes: Whether it may write into its input: modules of torch.nn have an option for it, any other may.
        draws: The random number generators, besides torch's global one, that its code may draw from.
        shared: The state outside of the module that its code may change: caches, class attributes and globals.
        kept: The tensors that no `reset_parameters` initializes, by place.
        drawn: Those of `kept` that seem to be drawn at random: parameters whose elements differ.
        names: How its `state_dict` differs from the trees.
        identity: The fingerprint that, with `kept`, tells it from others.
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
        self.draws, self.shared = sources_of(module, functions), SharedState(module, functions)
        placeholders = {
            id(value): value if isinstance(value, Placeholder) else Placeholder(value)
            for each in module.modules()
            for _, _, value in tensors_of(each)
        }
        first = ModuleCopy(module, placeholders, left_by_calls)
        for each in first.modules:
            make_pure(each)
        self._constants = first.constants
        self.root = WorkingCopy(first).root
        self.random = any(part.modal for part in self.root)
        self.writes = any(part.written for part in self.root)
        self.kept, certain = not_reset(Submodule(module, (), set()), self._copy()) if kept is None else (kept, True)
        self.names = names_of(self.root.module)
        parameters = {(part.path, name) for part in self.root for name in part.parameters}
        varying = frozenset(place for place, value in self.kept.items() if place in parameters and _varies(value))
        self.drawn = (varying if certain else frozenset()) if drawn is None else drawn
        self.identity = (
            identity_of(self.root.module, [(part.path, part.names) for part in self.root])
            if identity is None
            else identity
        )
        self._idle: list[WorkingCopy] = []
        self._in_use: list[WorkingCopy] = []
        self._limit = 8
        self._traced = self._copy(traced=True)
        for part in self._traced.root:
            make_traceable(part.module)

    def own_states(self, key: Tensor) -> dict[str, Any]:
        """Return the states that luxtorch adds to the module's: a key, if it draws random numbers, and names."""
        named = {NAMES: Static(self.names)} if any(self.names) else {}
        return {RNG: key, **named} if self.random else named

    def acquire(self) -> WorkingCopy:
        """Return a copy that no other call uses."""
        if torch.compiler.is_compiling():  # one call is traced at a time
            return self._traced
        try:
            return self._idle.pop()
        except IndexError:
            return self._returned() or self._copy()

    def release(self, copy: WorkingCopy, keys: Keys | None = None) -> None:
        """Return a copy to the pool for the next call, as soon as nothing references it.

        Args:
            copy: The copy.
            keys: The keys for random numbers, if something references the copy and calls it later.
        """
        if torch.compiler.is_compiling():
            copy.swap_out()
        elif copy.free:
            copy.swap_out()
            self._idle.append(copy)
        else:
            if keys is not None:
                copy.call_later(keys)
            self._in_use.append(copy)

    def _returned(self) -> WorkingCopy | None:
        """Return a copy that was referenced after its call, and no longer is."""
        for attempt in range(2):
            for i, copy in enumerate(self._in_use):
                if copy.free:
                    del self._in_use[i]
                    copy.swap_out()
                    return copy
            if attempt or len(self._in_use) < self._limit:
                return None
            gc.collect()  # the references may be in cycles
            self._limit = 2 * len(self._in_use)
        return None

    def _copy(self, *, traced: bool = False) -> WorkingCopy:
        # Copies share the placeholders: a first call may be inside a transform or a trace, where none can be made.
        originals = [value for part in self.root for value in part.originals.values()]
        shared = {id(value): value.tensor if traced else value for value in originals}
        return WorkingCopy(
            ModuleCopy(self.root.module, shared, shared=self._constants), self.draws, self.shared, traced=traced
        )

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
        return self  # it is immutable

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
