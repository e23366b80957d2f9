"""A module of torch.nn as a layer."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch.core import Layer, Parameters, States, tree_map

from ._inputs import arguments
from ._keys import Keys
from ._part import Part
from ._pure_mode import PureMode
from ._reset import reset
from ._skeleton import RNG, Skeleton


class ModuleLayer(Layer):
    """Call a `torch.nn.Module` as a pure function; `lt.from_torch` makes one.

    The module's own `forward` runs, on parameters and states from outside.

    Args:
        skeleton: The module, without its tensors.

    Parameters:
        Those of the module, nested by its own names. Tied ones stand in the first of their places.

    States:
        Buffers and other tensors of the module, nested likewise; for modules that may ask for it `training`; and at
        the top `rng`, if there may be random numbers.

    Shape:
        What the module takes, several arguments as `lt.Inputs`, to what it returns.
    """

    skeleton: Skeleton

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return new parameters, as the modules' own `reset_parameters` draw them."""
        return reset(self.skeleton, key)[0]

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the buffers as the modules start out, and the key of the first random numbers."""
        st = reset(self.skeleton, key)[1]
        return {**st, RNG: key.clone()} if self.skeleton.random else st

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return what the module returns, and the states as it leaves them."""
        args, kwargs = arguments(_copied(x) if self.skeleton.writes else x)
        part = self.skeleton.borrow()
        try:
            if not self.skeleton.random:
                part.lend(ps, st)
                return part.module(*args, **kwargs), part.take(st)
            own = {name: value for name, value in st.items() if name != RNG}
            part.lend(ps, own)
            keys = Keys(st[RNG])
            with PureMode(keys):
                y = part.module(*args, **kwargs)
            return y, {**part.take(own), RNG: keys.rng}
        except Exception as error:
            if not torch.compiler.is_compiling() and not getattr(error, "inside", ()):
                error.inside = _place(error.__traceback__, part)  # type: ignore[attr-defined]
            raise
        finally:
            self.skeleton.give_back(part)

    def tapped(self, path: str) -> Layer:
        """Return the layer with a module inside it perturbed, for `lt.Perturbed`."""
        from ._perturbed_module import PerturbedModule  # which is made of such a layer

        return PerturbedModule(self, (path,))

    def tappable(self) -> list[str]:
        """Return the paths of the modules inside that are called."""
        called = (part for part in self.skeleton.root if type(part.module).forward is not nn.Module.forward)
        return [".".join(part.path) for part in called if part.path]

    def extra_repr(self) -> str:
        """Return the name of the module's class."""
        return type(self.skeleton.root.module).__name__


def _copied(x: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, x)


def _place(traceback: TracebackType | None, root: Part) -> tuple[str, ...]:
    """Return the path of the innermost module whose code an exception came through."""
    paths = {id(part.module): part.path for part in root}
    place: tuple[str, ...] = ()
    while traceback is not None:
        place = paths.get(id(traceback.tb_frame.f_locals.get("self")), place)
        traceback = traceback.tb_next
    return place
