"""Modules inside a module of torch.nn, perturbed: what `lt.Perturbed` makes of a `ModuleLayer`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch.core import TRAINING, KeyNameError, Layer, Parameters, States, Static, suggest, tree_map
from luxtorch.layers._perturbed import OUTPUT, PERTURBATION, added, changed, without_tap

from ._duplicate import Duplicate
from ._inputs import Inputs, arguments
from ._module_layer import ModuleLayer
from ._names import NAMES
from ._part import tensors_of
from ._skeleton import RNG, Skeleton

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
        states = {
            "module": {name: value for name, value in own.items() if name not in (RNG, NAMES)},
            TRAINING: Static(False),
        }
        # The probe wants a key also where its module draws nothing.
        states[RNG] = own[RNG] if RNG in own else torch.zeros(2, dtype=torch.uint64)
        try:
            (y, outputs), new = _call(self._probe, Inputs(x, perturbations), {"module": ps}, states)
        except Exception as error:
            error.inside = getattr(error, "inside", ())[1:]  # type: ignore[attr-defined]  # without the "module" above
            raise
        st = {**new["module"], **{name: own[name] for name in (NAMES,) if name in own}}
        st = {**st, RNG: new[RNG]} if RNG in own else st
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
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, y)
