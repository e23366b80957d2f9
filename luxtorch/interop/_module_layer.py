"""`ModuleLayer`: a layer that calls the forward of a torch.nn module, also bound or with perturbations inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch._transforms import functional
from luxtorch.core import (
    TRAINING,
    InputError,
    Layer,
    Parameters,
    States,
    Static,
    map_tensors,
    tree_map,
    unknown_name,
)
from luxtorch.layers._perturbed import OUTPUT, PERTURBATION, added, changed, without_tap

from ._inputs import Inputs, arguments
from ._module_copy import ModuleCopy
from ._names import NAMES
from ._reset import reset
from ._skeleton import RNG, Skeleton
from ._submodule import Submodule, tensors_of
from .pure._keys import Keys
from .pure._mode import PureMode

_NOT_BATCHED = ("(self, *extra_args) is not possible because", "doesn't match the broadcast shape")
"""Errors of torch for writing a batched value into a new tensor that is not batched, under vmap."""


class ModuleLayer(Layer):
    """Call a `torch.nn.Module` as a pure function; `lt.from_torch` makes one.

    The module's own `forward` runs, with the parameters and states that are passed in.

    Args:
        skeleton: The module without its tensors, functionalized.
        method: The method that a call of the layer calls.

    Parameters:
        Those of the module, nested by its own names. Tied ones are listed under their first name.

    States:
        Buffers and other tensors of the module, nested likewise; `training` for modules that may read it; and at the
        top `rng`, if random numbers may be drawn, and `state_dict`, if its names differ from those of the trees.

    Shape:
        What the module takes, several arguments as `lt.Inputs`, to what it returns.
    """

    skeleton: Skeleton
    method: str = "forward"

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return new parameters, from the submodules' `reset_parameters`."""
        return reset(self.skeleton, key, warn=True)[0]

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the initial buffers, and the key of the first random numbers."""
        return {**reset(self.skeleton, key)[1], **self.skeleton.own_states(key.clone())}

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the module's output and new states."""
        try:
            return self._called(x, ps, st)
        except RuntimeError as error:
            if (
                torch.compiler.is_compiling()
                or not functional()
                or not any(text in str(error) for text in _NOT_BATCHED)
            ):
                raise
            try:
                return self._called(x, ps, st, batched=True)
            except Exception:
                raise error from None

    def _called(self, x: Any, ps: Parameters, st: States, *, batched: bool = False) -> tuple[Any, States]:
        """Call the module; with `batched`, new tensors are batched by every vmap around."""
        skeleton = self.skeleton
        args, kwargs = arguments(_copied(x) if skeleton.writes else x)
        copy, keys = skeleton.acquire(), None
        try:
            own, ours = _split_states(st)
            copy.swap_in(ps, own)
            if not skeleton.random:
                return copy.function(self.method)(*args, **kwargs), {**copy.read_states(own), **ours}
            keys = Keys(st[RNG], (args, kwargs, ps) if batched else ())
            if torch.compiler.is_compiling():
                with PureMode(keys):
                    y = copy.function(self.method)(*args, **kwargs)
            else:
                with copy.running(keys):
                    y = copy.function(self.method)(*args, **kwargs)
            return y, {**copy.read_states(own), **ours, RNG: keys.rng}
        except Exception as error:
            if torch.compiler.is_compiling():
                raise
            explained: Any = _explained(error)
            if not getattr(error, "inside", ()):
                explained.inside = _place(error.__traceback__, copy.root)
            if explained is error:
                raise
            raise explained from error
        finally:
            skeleton.release(copy, keys)

    def bind(self, ps: Parameters, st: States) -> Bound:
        """Bind parameters and states, to use the module itself: `layer.bind(ps, st).generate(ids)`.

        Args:
            ps: The parameters.
            st: The states.
        """
        return Bound(self, ps, st)

    def tapped(self, path: str) -> Layer:
        """Return the layer with a perturbed submodule, for `lt.Perturbed`."""
        return PerturbedModule(self, (path,))

    def tappable(self) -> list[str]:
        """Return the paths of the submodules that have a forward."""
        called = (part for part in self.skeleton.root if type(part.module).forward is not nn.Module.forward)
        return [".".join(part.path) for part in called if part.path]

    def extra_repr(self) -> str:
        """Return the name of the module's class."""
        name = type(self.skeleton.root.module).__name__
        return name if self.method == "forward" else f"{name}.{self.method}"


class Bound:
    """Call a module with bound parameters and states, or its methods, one after another.

    As a context manager, it yields the module itself with the values swapped in.

    Args:
        layer: The layer; `layer.bind(ps, st)` makes one.
        ps: Its parameters.
        st: Its states.

    Attributes:
        st: The states after the calls so far.

    Example:
        >>> import torch, luxtorch as lt
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder, self.decoder = torch.nn.Linear(4, 2), torch.nn.Linear(2, 4)
        ...     def encode(self, x):
        ...         return self.encoder(x).tanh()
        ...     def forward(self, x):
        ...         return self.decoder(self.encode(x))
        >>> layer, ps, st = lt.from_torch(Net())
        >>> layer.bind(ps, st).encode(torch.ones(3, 4)).shape
        torch.Size([3, 2])
        >>> with layer.bind(ps, st) as net:
        ...     y = net.decoder(net.encode(torch.ones(3, 4)))

    Source: `bind` of Flax.
    """

    def __init__(self, layer: ModuleLayer, ps: Parameters, st: States) -> None:
        self._layer, self._ps, self.st = layer, ps, st
        self._kept: Callable[[States], States] = lambda st: st
        self._given = st
        self._context: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("forward", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._layer.skeleton.root.module, name)
        if not callable(value) or isinstance(value, nn.Module):
            return value
        return partial(self._call, name)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        y, self._given = ModuleLayer(self._layer.skeleton, method)(Inputs(*args, **kwargs), self._ps, self._given)
        self.st = self._kept(self._given)
        return y

    def __enter__(self) -> nn.Module:
        self._context = self._entered()
        return self._context.__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *exc: Any) -> None:
        self._context.__exit__(*exc)

    @contextmanager
    def _entered(self) -> Iterator[nn.Module]:
        skeleton, st = self._layer.skeleton, self._given
        own, ours = _split_states(st)
        copy, keys = skeleton.acquire(), Keys(st.get(RNG, torch.zeros(2, dtype=torch.uint64)))
        try:
            copy.swap_in(self._ps, own)
            with copy.running(keys):
                yield copy.module
            self._given = {**copy.read_states(own), **ours, **({RNG: keys.rng} if RNG in ours else {})}
            self.st = self._kept(self._given)
        finally:
            skeleton.release(copy, keys)


def _split_states(st: States) -> tuple[States, dict[str, Any]]:
    """Return the states of the module, and those that luxtorch adds."""
    ours = {name: st[name] for name in (RNG, NAMES) if name in st}
    return ({name: value for name, value in st.items() if name not in ours} if ours else st), ours


def _copied(x: Any) -> Any:
    """Copy all tensors of a tree; one that occurs twice is copied once."""
    if isinstance(x, Tensor):
        return x.clone()
    copies: dict[int, Tensor] = {}

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in copies:
            copies[id(leaf)] = leaf.clone()
        return copies[id(leaf)]

    return tree_map(copied, x)


def _explained(error: Exception) -> Exception:
    """Return an error with a fix for those of torch that have none; any other unchanged."""
    if not isinstance(error, RuntimeError) or "must override the setup_context" not in str(error):
        return error
    return InputError(
        "Inside of torch.func, an autograd.Function must have a setup_context, and no forward that takes a ctx.",
        expected="a forward(*args) without ctx, and a setup_context(ctx, inputs, output)",
        fix="Write its forward in these two parts, or differentiate by autograd, as training steps (in lt.jit too) and "
        "loss.backward() do.",
    )


def _place(traceback: TracebackType | None, root: Submodule) -> tuple[str, ...]:
    """Return the path of the innermost submodule in an exception's traceback."""
    paths = {id(part.module): part.path for part in root}
    place: tuple[str, ...] = ()
    while traceback is not None:
        place = paths.get(id(traceback.tb_frame.f_locals.get("self")), place)
        traceback = traceback.tb_next
    return place


# Without the wrapper that names the layer in errors, so that they name this layer and not the probe.
_call: Callable[..., tuple[Any, Any]] = ModuleLayer.__call__.__wrapped__  # type: ignore[attr-defined]


class PerturbedModule(Layer):
    """Call a module with perturbed submodules; perturbations and outputs are in the states, as in `Tap`.

    Args:
        inside: The module as a layer.
        paths: The paths of the submodules to perturb.
    """

    inside: ModuleLayer
    paths: tuple[str, ...]

    def __post_init__(self) -> None:
        root = self.inside.skeleton.root
        names = [".".join(part.path) for part in root]
        for path in self.paths:
            if path not in names:
                raise unknown_name(path, names[1:], "module")
        self._probe  # noqa: B018  # made now, since torch.compile cannot trace it

    @cached_property
    def _probe(self) -> ModuleLayer:
        return ModuleLayer(Skeleton(Probe(self.inside.skeleton.root.module, self.paths)))

    def tapped(self, path: str) -> Layer:
        """Return the layer with one more perturbed submodule."""
        return PerturbedModule(self.inside, (*self.paths, path))

    def tappable(self) -> list[str]:
        """Return the paths of the submodules that have a forward."""
        return self.inside.tappable()

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return the parameters of the module."""
        return self.inside.initial_parameters(key)

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the states of the module, without perturbations."""
        st: Any = self.inside.initial_states(key)
        for path in self.paths:
            st = changed(st, path.split("."), lambda own: {**own, PERTURBATION: (), OUTPUT: ()})
        return st  # type: ignore[no-any-return]

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the output of the perturbed module, and new states."""
        own, perturbations = st, dict.fromkeys(self.paths, ())
        for path in self.paths:

            def take(st: States, path: str = path) -> States:
                perturbations[path] = st[PERTURBATION]
                return without_tap(st)

            own = changed(own, path.split("."), take)
        of_module, ours = _split_states(own)
        # The probe needs a key even if its module draws nothing.
        key = ours[RNG] if RNG in ours else torch.zeros(2, dtype=torch.uint64)
        states = {"module": of_module, TRAINING: Static(False), RNG: key}
        try:
            (y, outputs), new = _call(self._probe, Inputs(x, perturbations), {"module": ps}, states)
        except Exception as error:
            error.inside = getattr(error, "inside", ())[1:]  # type: ignore[attr-defined]  # without the "module" above
            raise
        st = {**new["module"], **ours, **({RNG: new[RNG]} if RNG in ours else {})}
        for path in self.paths:
            kept = {PERTURBATION: perturbations[path], OUTPUT: outputs[path]}
            st = changed(st, path.split("."), lambda own, kept=kept: {**own, **kept})  # type: ignore[misc]
        return y, st

    def extra_repr(self) -> str:
        """Return the name of the module's class."""
        return self.inside.extra_repr()


class Probe(nn.Module):
    """Call a module on an input and on perturbations, which forward hooks add to the outputs of submodules."""

    def __init__(self, module: nn.Module, paths: tuple[str, ...]) -> None:
        super().__init__()
        self.module = ModuleCopy(
            module, {}, shared={id(v): v for m in module.modules() for _, _, v in tensors_of(m)}
        ).module
        self.paths = paths
        for path in paths:
            self.module.get_submodule(path).register_forward_hook(_perturb)

    def forward(self, x: Any, perturbations: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        modules = {path: self.module.get_submodule(path) for path in self.paths}
        args, kwargs = arguments(x)
        try:
            for path, module in modules.items():
                module.__dict__[PERTURBATION], module.__dict__[OUTPUT] = perturbations[path], ()
            y = self.module(*args, **kwargs)
            return y, {path: module.__dict__[OUTPUT] for path, module in modules.items()}
        finally:
            for module in modules.values():
                module.__dict__[PERTURBATION], module.__dict__[OUTPUT] = (), ()


def _perturb(module: nn.Module, _: Any, y: Any) -> Any:
    y = added(y, module.__dict__[PERTURBATION])
    module.__dict__[OUTPUT] = (y,)
    # Later code may write into it.
    return map_tensors(lambda leaf: leaf.clone(), y)
