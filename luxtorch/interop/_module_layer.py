"""The layer that a module with a forward of its own becomes, and with perturbations inside."""

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
    KeyNameError,
    Layer,
    Parameters,
    States,
    Static,
    map_tensors,
    suggest,
    tree_map,
)
from luxtorch.layers._perturbed import OUTPUT, PERTURBATION, added, changed, without_tap

from ._duplicate import Duplicate
from ._inputs import Inputs, arguments
from ._names import NAMES
from ._part import Part, tensors_of
from ._reset import reset
from ._skeleton import RNG, Skeleton
from .pure._keys import Keys
from .pure._mode import PureMode

_NO_ROOM = ("(self, *extra_args) is not possible because", "doesn't match the broadcast shape")
"""What torch says where vmap computes a batch that is to be written into one new tensor."""


class ModuleLayer(Layer):
    """Call a `torch.nn.Module` as a pure function; `lt.from_torch` makes one.

    The module's own `forward` runs, on parameters and states from outside.

    Args:
        skeleton: The module, without its tensors.
        method: The method that a call of the layer calls.

    Parameters:
        Those of the module, nested by its own names. Tied ones stand in the first of their places.

    States:
        Buffers and other tensors of the module, nested likewise; for modules that may ask for it `training`; and at
        the top `rng`, if there may be random numbers, and `state_dict`, if its names differ from those of the trees.

    Shape:
        What the module takes, several arguments as `lt.Inputs`, to what it returns.
    """

    skeleton: Skeleton
    method: str = "forward"

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return new parameters, as the modules' own `reset_parameters` draw them."""
        return reset(self.skeleton, key, warn=True)[0]

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the buffers as the modules start out, and the key of the first random numbers."""
        return {**reset(self.skeleton, key)[1], **self.skeleton.own_states(key.clone())}

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return what the module returns, and the states as it leaves them."""
        try:
            return self._called(x, ps, st)
        except RuntimeError as error:
            if torch.compiler.is_compiling() or not functional() or not any(text in str(error) for text in _NO_ROOM):
                raise
            try:
                return self._called(x, ps, st, room=True)
            except Exception:
                raise error from None

    def _called(self, x: Any, ps: Parameters, st: States, *, room: bool = False) -> tuple[Any, States]:
        """Call the module; with `room`, new tensors are batches of all that is one."""
        skeleton = self.skeleton
        args, kwargs = arguments(_copied(x) if skeleton.writes else x)
        body, keys = skeleton.borrow(), None
        try:
            own, ours = _apart(st)
            body.lend(ps, own)
            if not skeleton.random:
                return body.function(self.method)(*args, **kwargs), {**body.take(own), **ours}
            keys = Keys(st[RNG], (args, kwargs, ps) if room else ())
            if torch.compiler.is_compiling():
                with PureMode(keys):
                    y = body.function(self.method)(*args, **kwargs)
            else:
                with body.running(keys):
                    y = body.function(self.method)(*args, **kwargs)
            return y, {**body.take(own), **ours, RNG: keys.rng}
        except Exception as error:
            if torch.compiler.is_compiling():
                raise
            explained: Any = _explained(error)
            if not getattr(error, "inside", ()):
                explained.inside = _place(error.__traceback__, body.root)
            if explained is error:
                raise
            raise explained from error
        finally:
            skeleton.give_back(body, keys)

    def bind(self, ps: Parameters, st: States) -> Bound:
        """Return the module with values, to use it as a module: `layer.bind(ps, st).generate(ids)`.

        Args:
            ps: The parameters.
            st: The states.
        """
        return Bound(self, ps, st)

    def tapped(self, path: str) -> Layer:
        """Return the layer with a module inside it perturbed, for `lt.Perturbed`."""
        return PerturbedModule(self, (path,))

    def tappable(self) -> list[str]:
        """Return the paths of the modules inside that are called."""
        called = (part for part in self.skeleton.root if type(part.module).forward is not nn.Module.forward)
        return [".".join(part.path) for part in called if part.path]

    def extra_repr(self) -> str:
        """Return the name of the module's class."""
        name = type(self.skeleton.root.module).__name__
        return name if self.method == "forward" else f"{name}.{self.method}"


class Bound:
    """Use a module with parameters and states as a module: call it, or its methods, one after another.

    As a context, it is the module itself, for a while.

    Args:
        layer: The layer; `layer.bind(ps, st)` makes one.
        ps: Its parameters.
        st: Its states.

    Attributes:
        st: The states as the calls so far have left them.

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
        own, ours = _apart(st)
        body, keys = skeleton.borrow(), Keys(st.get(RNG, torch.zeros(2, dtype=torch.uint64)))
        try:
            body.lend(self._ps, own)
            with body.running(keys):
                yield body.module
            self._given = {**body.take(own), **ours, **({RNG: keys.rng} if RNG in ours else {})}
            self.st = self._kept(self._given)
        finally:
            skeleton.give_back(body, keys)


def _apart(st: States) -> tuple[States, dict[str, Any]]:
    """Return the states of the module, and those that are luxtorch's own."""
    ours = {name: st[name] for name in (RNG, NAMES) if name in st}
    return ({name: value for name, value in st.items() if name not in ours} if ours else st), ours


def _copied(x: Any) -> Any:
    """Copy all tensors of a tree, one that stands in several places once."""
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
    """Return an error that says what to do, where torch's own does not; else the error itself."""
    if not isinstance(error, RuntimeError) or "must override the setup_context" not in str(error):
        return error
    return InputError(
        "The module calls an autograd.Function whose forward takes a ctx, as no transform of torch.func can.",
        expected="a forward(*args) without ctx, and a setup_context(ctx, inputs, output)",
        fix="Write its forward in these two parts, or differentiate on a tape, as training steps (in lt.jit too) and "
        "loss.backward() do.",
    )


def _place(traceback: TracebackType | None, root: Part) -> tuple[str, ...]:
    """Return the path of the innermost module whose code an exception came through."""
    paths = {id(part.module): part.path for part in root}
    place: tuple[str, ...] = ()
    while traceback is not None:
        place = paths.get(id(traceback.tb_frame.f_locals.get("self")), place)
        traceback = traceback.tb_next
    return place


# Without what names the layer in an error, which is to be this one and not the probe.
_call: Callable[..., tuple[Any, Any]] = ModuleLayer.__call__.__wrapped__  # type: ignore[attr-defined]


class PerturbedModule(Layer):
    """Call a module, and perturb modules inside, by way of the state as `Tap` does.

    Args:
        inside: The module as a layer.
        paths: The names of the modules to perturb.
    """

    inside: ModuleLayer
    paths: tuple[str, ...]

    def __post_init__(self) -> None:
        root = self.inside.skeleton.root
        names = [".".join(part.path) for part in root]
        for path in self.paths:
            if path not in names:
                raise KeyNameError(
                    f"{type(root.module).__name__} has no module '{path}'.",
                    expected=", ".join(names[1:]) or "no name, as there are no modules inside",
                    got=path,
                    fix=suggest(path, names),
                )
        self._probe  # noqa: B018  # made now, since a compiler could not trace it

    @cached_property
    def _probe(self) -> ModuleLayer:
        return ModuleLayer(Skeleton(Probe(self.inside.skeleton.root.module, self.paths)))

    def tapped(self, path: str) -> Layer:
        """Return the layer with one more module perturbed."""
        return PerturbedModule(self.inside, (*self.paths, path))

    def tappable(self) -> list[str]:
        """Return the paths of the modules inside that are called."""
        return self.inside.tappable()

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return those of the module."""
        return self.inside.initial_parameters(key)

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return those of the module, and no perturbations."""
        st: Any = self.inside.initial_states(key)
        for path in self.paths:
            st = changed(st, path.split("."), lambda own: {**own, PERTURBATION: (), OUTPUT: ()})
        return st  # type: ignore[no-any-return]

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return what the module returns, perturbed inside."""
        own, perturbations = st, dict.fromkeys(self.paths, ())
        for path in self.paths:

            def take(st: States, path: str = path) -> States:
                perturbations[path] = st[PERTURBATION]
                return without_tap(st)

            own = changed(own, path.split("."), take)
        of_module, ours = _apart(own)
        # The probe wants a key also where its module draws nothing.
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
    """Call a module on one input and on perturbations, that hooks add to the outputs of modules inside."""

    def __init__(self, module: nn.Module, paths: tuple[str, ...]) -> None:
        super().__init__()
        self.module = Duplicate(
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
    # What comes after may write into it.
    return map_tensors(lambda leaf: leaf.clone(), y)
