"""From a `torch.nn.Module` to a layer with its parameters and states."""

from __future__ import annotations

import sys
from itertools import permutations
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from luxtorch.core import TRAINING, DTypeError, InputError, Layer, Static, suggest, tree_map
from luxtorch.layers import Chain
from luxtorch.random import Rng, as_key, fold_in
from luxtorch.surgery import freeze

from ._module_layer import ModuleLayer
from ._native import native
from ._part import Part, hooked
from ._reach import OF_A_MODULE, everything
from ._skeleton import Skeleton
from ._to_torch import LayerModule, held


def uncompiled(module: Any) -> Any:
    """Return a module without what `torch.compile` has put around it, around modules inside, or around their methods.

    A module that has nothing of the kind inside is returned itself. Others are new, and share what they hold.
    """
    # Whoever has compiled something has loaded the compiler, and nobody else should have to.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None or not isinstance(module, nn.Module):
        return module
    return _opened(module, compiler.OptimizedModule, {})


def _opened(module: nn.Module, wrapper: type[nn.Module], done: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in done:
        if isinstance(module, wrapper):
            if module._forward_hooks or module._forward_pre_hooks:
                raise InputError(
                    "A hook of what torch.compile returned is not part of the module.",
                    fix="Register the hooks with the module itself, before it is compiled.",
                    where=type(module._orig_mod).__name__,
                )
            opened = _opened(module._orig_mod, wrapper, done)  # type: ignore[arg-type]
        else:
            done[id(module)] = module  # for modules that hold themselves
            children = {
                name: child if child is None else _opened(child, wrapper, done)
                for name, child in module._modules.items()
            }
            methods = {name: value for name, value in vars(module).items() if _compiled(value)}
            opened = module
            if methods or any(new is not module._modules[name] for name, new in children.items()):
                opened = type(module).__new__(type(module))
                originals = {
                    name: _rebound(getattr(value, _ORIGINAL), module, opened) for name, value in methods.items()
                }
                vars(opened).update({**vars(module), **originals, "_modules": children})
        done[id(module)] = opened
    return done[id(module)]


def _compiled(value: Any) -> bool:
    return isinstance(value, FunctionType) and hasattr(value, _ORIGINAL)


_ORIGINAL = "_torchdynamo_orig_callable"
"""Where torch.compile keeps what it compiled."""


def _rebound(function: Any, module: nn.Module, other: nn.Module) -> Any:
    """Return a method of a module as one of another."""
    return MethodType(function.__func__, other) if getattr(function, "__self__", None) is module else function


class Model(NamedTuple):
    """Hold a layer with its parameters and states."""

    layer: Layer
    ps: dict[str, Any]
    st: dict[str, Any]


def from_torch(module: nn.Module, rng: Rng = 0, *, method: str = "forward") -> Model:
    """Return a layer that computes what a `torch.nn.Module` does, with its parameters and states.

    Modules that luxtorch has a layer for become that layer, and an `nn.Sequential` becomes a `Chain`. Any other module
    keeps its own `forward`, which runs on the parameters and states that it is given: batch normalization returns its
    statistics, and random numbers come from a key in the state. So the model is a pure function: whatever
    way the code comes by a tensor of the module, it gets that of `ps` or `st`, and what it leaves behind is put back.

    Args:
        module: The module. It stays as it is, and shares no memory with what is returned. Of one that `torch.compile`
            has wrapped the original is taken.
        rng: A seed, a key or a generator, for dropout and whatever else the module draws.
        method: What a call of the layer calls, such as `"generate"`. To call several, see `layer.bind`, which a module
            with a forward of its own has: `layer.bind(ps, st).generate(ids)`.

    Returns:
        `(layer, ps, st)`. The parameters are nested by the module's own names, and `lt.flatten_names(ps)` has those of
        `module.named_parameters()`: a tied parameter stands in the first of its places alone. The states are the
        buffers, the mode of each module that has one, and the keys. Parameters with `requires_grad=False` come in
        frozen, as by `lt.freeze`.

    Raises:
        DTypeError: If it is not a module.
        InputError: If it is a lazy module that has seen no input yet, a wrapper or script whose inside cannot be
            reached, or one whose code reaches its own tensors by globals; or if it has no such method.

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

    Several or keyword arguments are passed as `lt.Inputs`, and so may one be, by the name that torch has for it. What a
    forward keeps on the module besides its parameters and buffers, such as a list that grows, is not part of the state
    and is forgotten. A forward that changes its parameters is an error when it is called. Gradients are dense:
    `sparse=True` of an embedding is without effect, and its gradient is as large as its table.

    Source: Lux's `FromFluxAdaptor`.
    """
    module = uncompiled(module)
    _check(module)
    key = as_key(rng)
    for value in (*module.parameters(), *module.buffers()):
        key = key.to(value.device)  # what is drawn belongs beside them
        break
    if method != "forward" and not callable(getattr(module, method, None)):
        raise InputError(
            f"{type(module).__name__} has no method '{method}'.",
            fix=suggest(method, [name for name in dir(module) if not name.startswith("_")]),
        )
    model = _adapted(module, key, method)
    frozen = [name for name, value in module.named_parameters() if not value.requires_grad and _smooth(value)]
    return Model(*freeze(*model, *frozen)) if frozen else model


def _smooth(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _adapted(module: nn.Module, key: Any, method: str) -> Model:
    if method == "forward" and isinstance(module, LayerModule) and not hooked(module) and (model := held(module)):
        return Model(*model)
    if method == "forward" and _is_chain(module):
        parts: Any = module._modules
        children = {name: _adapted(child, fold_in(key, name), method) for name, child in parts.items()}
        ps = {name: child.ps for name, child in children.items()}
        st = {name: child.st for name, child in children.items()}
        return Model(Chain(**{name: child.layer for name, child in children.items()}), ps, st)
    values = Part(module, (), set())
    ps, st = (tree_map(lambda value: value.detach().clone(), values.tree(kind)) for kind in ("parameters", "states"))
    layer = native(module) if method == "forward" else None
    if layer is None:
        skeleton = Skeleton(module)
        for name in skeleton.own_states(key).keys() & st.keys():
            raise InputError(
                f"The module has a buffer or a part called '{name}', which is a name of luxtorch's own.",
                fix="Rename it, or put the module into an nn.ModuleList or another module.",
                where=type(module).__name__,
            )
        return Model(ModuleLayer(skeleton, method), ps, {**st, **skeleton.own_states(key)})
    if TRAINING in (start := layer.initial_states(key)):
        start[TRAINING] = Static(module.training)
    return Model(layer, ps, {name: st.get(name, value) for name, value in start.items()})


def _is_chain(module: nn.Module) -> bool:
    """Say whether a module is the chain of its children and nothing more: none of them leads to another."""
    if type(module) is not nn.Sequential or not module._modules or hooked(module) or vars(module).keys() - OF_A_MODULE:
        return False
    if module._parameters or module._buffers:
        return False
    parts: list[Any] = [*module._modules.values()]
    leads: list[dict[int, Any]] = [
        {id(each): each for _, each in everything(part) if isinstance(each, Tensor | nn.Module)} for part in parts
    ]
    for one, other in permutations(range(len(parts)), 2):
        inside = {id(each) for each in parts[one].modules()}  # a module without tensors may stand in both
        for each in leads[one].keys() & leads[other].keys():
            if isinstance(leads[one][each], Tensor) or each not in inside:
                return False
    return True


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
            raise InputError("A data-parallel wrapper is not a function.", fix="Pass wrapper.module.", where=where)
        if isinstance(part, torch.jit.ScriptModule):
            raise InputError(
                "The code of a script cannot be reached.", fix="Pass the module it came from.", where=where
            )
        if any(nn.parameter.is_lazy(value) for value in (*part._parameters.values(), *part._buffers.values())):
            raise InputError(
                "A lazy module does not know its shapes yet.", fix="Call the module once on an input.", where=where
            )
