"""From a `torch.nn.Module` to a layer with its parameters and states."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from luxtorch.core import TRAINING, DTypeError, InputError, Layer, Static, tree_map
from luxtorch.layers import Chain
from luxtorch.random import Rng, as_key, fold_in

from ._module_layer import ModuleLayer
from ._native import hooked, native
from ._part import Part, tensors_of
from ._skeleton import RNG, Skeleton
from ._to_torch import LayerModule, held


class Model(NamedTuple):
    """Hold a layer with its parameters and states."""

    layer: Layer
    ps: dict[str, Any]
    st: dict[str, Any]


def from_torch(module: nn.Module, rng: Rng = 0) -> Model:
    """Return a layer that computes what a `torch.nn.Module` does, with its parameters and states.

    Modules that luxtorch has a layer for become that layer, and an `nn.Sequential` becomes a `Chain`. Any other module
    keeps its own `forward`, which runs on the parameters and states that it is given: batch normalisation returns its
    statistics, and random numbers come from a key in the state. So the model is a pure function in either case.

    Args:
        module: The module. It stays as it is, and shares no memory with what is returned.
        rng: A seed, a key or a generator, for dropout and whatever else the module draws.

    Returns:
        `(layer, ps, st)`. The parameters are nested by the module's own names, and `lt.flatten_names(ps)` has those of
        `module.named_parameters()`: a tied parameter stands in the first of its places alone. The states are the
        buffers, the mode of each module that has one, and the keys.

    Raises:
        DTypeError: If it is no module.
        InputError: If it is a lazy module that has seen no input yet, or a wrapper or script whose inside cannot be
            reached.

    Example:
        >>> import torch, luxtorch as lt
        >>> module = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> layer, ps, st = lt.from_torch(module)
        >>> x = torch.ones(4, 2)
        >>> y, st = layer(x, ps, st)
        >>> torch.equal(y, module(x))
        True
        >>> list(ps["0"])
        ['weight', 'bias']

    Several or keyword arguments are passed as `lt.Inputs`. What a forward keeps on the module besides its parameters
    and buffers, such as a list that grows, is no part of the state and is forgotten. Gradients are dense: `sparse=True`
    of an embedding is without effect, and its gradient is as large as its table.

    Source: Lux's `FromFluxAdaptor`.
    """
    _check(module)
    key = as_key(rng)
    for value in (*module.parameters(), *module.buffers()):
        key = key.to(value.device)  # what is drawn belongs beside them
        break
    return _adapted(module, key)


def _adapted(module: nn.Module, key: Any) -> Model:
    if isinstance(module, LayerModule) and not hooked(module) and (model := held(module)):
        return Model(*model)
    if type(module) is nn.Sequential and len(module) and not hooked(module) and not _share(module._modules.values()):
        children = {name: _adapted(child, fold_in(key, name)) for name, child in module._modules.items()}
        ps = {name: child.ps for name, child in children.items()}
        st = {name: child.st for name, child in children.items()}
        return Model(Chain(**{name: child.layer for name, child in children.items()}), ps, st)
    values = Part(module, (), {})
    ps, st = (tree_map(lambda value: value.detach().clone(), values.tree(kind)) for kind in ("parameters", "states"))
    layer = native(module)
    if layer is None:
        skeleton = Skeleton(module)
        if skeleton.random and RNG in st:
            raise InputError(
                f"The module has a buffer or a part called '{RNG}', which is the name of its key.",
                fix="Rename it, or put the module into an nn.ModuleList or another module.",
                where=type(module).__name__,
            )
        return Model(ModuleLayer(skeleton), ps, {**st, RNG: key} if skeleton.random else st)
    if TRAINING in (start := layer.initial_states(key)):
        start[TRAINING] = Static(module.training)
    return Model(layer, ps, {name: st.get(name, value) for name, value in start.items()})


def _share(modules: Iterable[nn.Module]) -> bool:
    """Say whether one tensor belongs to several of some modules."""
    seen: set[int] = set()
    for module in modules:
        own = {id(value) for part in module.modules() for _, _, value in tensors_of(part)}
        if not seen.isdisjoint(own):
            return True
        seen |= own
    return False


def _check(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise DTypeError(
            "from_torch takes a module.",
            expected="a torch.nn.Module",
            got=f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__,
            fix="Make an instance of the class." if isinstance(module, type) else "",
        )
    for name, part in module.named_modules():
        where = f"module.{name}" if name else "module"
        if isinstance(part, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise InputError("A data-parallel wrapper is no function.", fix="Pass wrapper.module.", where=where)
        if isinstance(part, torch.jit.ScriptModule):
            raise InputError(
                "The code of a script cannot be reached.", fix="Pass the module it came from.", where=where
            )
        if any(nn.parameter.is_lazy(value) for value in (*part._parameters.values(), *part._buffers.values())):
            raise InputError(
                "A lazy module does not know its shapes yet.", fix="Call the module once on an input.", where=where
            )
