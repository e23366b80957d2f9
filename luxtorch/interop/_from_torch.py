"""`from_torch`: convert a `torch.nn.Module` to a layer with its parameters and states."""

from __future__ import annotations

import sys
from itertools import permutations
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from luxtorch.core import TRAINING, InputError, Layer, Static, suggest, tree_map, wrong_type
from luxtorch.layers import Chain
from luxtorch.random import Rng, as_key, fold_in
from luxtorch.surgery import freeze

from ._module_layer import ModuleLayer
from ._native import native
from ._reach import OF_A_MODULE, everything
from ._skeleton import Skeleton
from ._submodule import Submodule, has_hooks
from ._to_torch import LayerModule, layer_of


def uncompiled(module: Any) -> Any:
    """Return a module without the wrappers that `torch.compile` has put around it, its submodules or their methods.

    A module without such wrappers is returned itself. Others are new, and share their attributes.
    """
    # Only who has compiled something has loaded the compiler; to import it takes seconds.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None or not isinstance(module, nn.Module):
        return module
    return _original(module, compiler.OptimizedModule, {})


def _original(module: nn.Module, wrapper: type[nn.Module], done: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in done:
        if isinstance(module, wrapper):
            if module._forward_hooks or module._forward_pre_hooks:
                fix, where = "Register the hooks before the module is compiled.", type(module._orig_mod).__name__
                raise InputError("Hooks must belong to the module, not to its compiled form.", fix=fix, where=where)
            original = _original(module._orig_mod, wrapper, done)  # type: ignore[arg-type]
        else:
            done[id(module)] = module  # for modules that contain themselves
            children = {
                name: child if child is None else _original(child, wrapper, done)
                for name, child in module._modules.items()
            }
            methods = {name: value for name, value in vars(module).items() if _compiled(value)}
            original = module
            if methods or any(new is not module._modules[name] for name, new in children.items()):
                original = type(module).__new__(type(module))
                originals = {
                    name: _rebound(getattr(value, _ORIGINAL), module, original) for name, value in methods.items()
                }
                vars(original).update({**vars(module), **originals, "_modules": children})
        done[id(module)] = original
    return done[id(module)]


def _compiled(value: Any) -> bool:
    return isinstance(value, FunctionType) and hasattr(value, _ORIGINAL)


_ORIGINAL = "_torchdynamo_orig_callable"
"""The attribute in which torch.compile keeps the function that it compiled."""


def _rebound(function: Any, module: nn.Module, other: nn.Module) -> Any:
    """Return a method of a module bound to another."""
    return MethodType(function.__func__, other) if getattr(function, "__self__", None) is module else function


class Model(NamedTuple):
    """Hold a layer with its parameters and states."""

    layer: Layer
    ps: dict[str, Any]
    st: dict[str, Any]


def from_torch(module: nn.Module, rng: Rng = 0, *, method: str = "forward") -> Model:
    """Convert a `torch.nn.Module` to a layer that computes the same, with its parameters and states.

    Modules that luxtorch has a layer for become that layer, and an `nn.Sequential` becomes a `Chain`. Any other module
    keeps its own `forward`, which runs with the parameters and states that are passed in: batch normalization returns
    its statistics, and random numbers come from a key in the state. So the model is a pure function: wherever the code
    reads a tensor of the module, it gets that of `ps` or `st`, and its changes to the module are undone.

    Args:
        module: The module. It is not changed, and shares no memory with the result. For one that `torch.compile`
            has wrapped, the original is converted.
        rng: A seed, a key or a generator, for dropout and other random numbers of the module.
        method: The method that a call of the layer calls, such as `"generate"`. To call several, see
            `layer.bind`, which a module with a forward of its own has: `layer.bind(ps, st).generate(ids)`.

    Returns:
        `(layer, ps, st)`. The parameters are nested by the module's own names, and `lt.flatten_names(ps)` has those of
        `module.named_parameters()`: a tied parameter is listed under its first name alone. The states are the
        buffers, the mode of each module that has one, and the keys. Parameters with `requires_grad=False` are frozen,
        as by `lt.freeze`.

    Raises:
        DTypeError: If it is not a module.
        InputError: If it is a lazy module that was not called yet, a data-parallel wrapper or a script; if its code
            reads its own tensors through globals; or if it has no such method.

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

    Several arguments, or keyword arguments, are passed as `lt.Inputs`. What a forward stores on the module besides its
    parameters and buffers, such as a list that grows, is not part of the state and is lost. A forward that changes its
    parameters is an error when it is called. Gradients are dense: `sparse=True` of an embedding has no effect, and its
    gradient is as large as its table.

    Source: Lux's `FromFluxAdaptor`.
    """
    module = uncompiled(module)
    _check(module)
    key = as_key(rng)
    for value in (*module.parameters(), *module.buffers()):
        key = key.to(value.device)  # random numbers are drawn on the device of the module
        break
    if method != "forward" and not callable(getattr(module, method, None)):
        fix = suggest(method, [name for name in dir(module) if not name.startswith("_")])
        raise InputError(f"{type(module).__name__} has no method '{method}'.", fix=fix)
    model = _adapted(module, key, method)
    frozen = [name for name, value in module.named_parameters() if not value.requires_grad and _differentiable(value)]
    return Model(*freeze(*model, *frozen)) if frozen else model


def _differentiable(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _adapted(module: nn.Module, key: Any, method: str) -> Model:
    if (
        method == "forward"
        and isinstance(module, LayerModule)
        and not has_hooks(module)
        and (model := layer_of(module))
    ):
        return Model(*model)
    if method == "forward" and _is_chain(module):
        parts: Any = module._modules
        children = {name: _adapted(child, fold_in(key, name), method) for name, child in parts.items()}
        ps = {name: child.ps for name, child in children.items()}
        st = {name: child.st for name, child in children.items()}
        return Model(Chain(**{name: child.layer for name, child in children.items()}), ps, st)
    values = Submodule(module, (), set())
    ps, st = (tree_map(lambda value: value.detach().clone(), values.tree(kind)) for kind in ("parameters", "states"))
    layer = native(module) if method == "forward" else None
    if layer is None:
        skeleton = Skeleton(module)
        for name in skeleton.own_states(key).keys() & st.keys():
            headline = f"A buffer or submodule must not be called '{name}', which is a name of luxtorch's own."
            fix = "Rename it, or put the module into an nn.ModuleList or another module."
            raise InputError(headline, fix=fix, where=type(module).__name__)
        return Model(ModuleLayer(skeleton, method), ps, {**st, **skeleton.own_states(key)})
    if TRAINING in (start := layer.initial_states(key)):
        start[TRAINING] = Static(module.training)
    return Model(layer, ps, {name: st.get(name, value) for name, value in start.items()})


def _is_chain(module: nn.Module) -> bool:
    """Return whether a module is a plain nn.Sequential, none of whose children references another."""
    if (
        type(module) is not nn.Sequential
        or not module._modules
        or has_hooks(module)
        or vars(module).keys() - OF_A_MODULE
    ):
        return False
    if module._parameters or module._buffers:
        return False
    parts: list[Any] = [*module._modules.values()]
    reached: list[dict[int, Any]] = [
        {id(each): each for _, each in everything(part) if isinstance(each, Tensor | nn.Module)} for part in parts
    ]
    for one, other in permutations(range(len(parts)), 2):
        inside = {id(each) for each in parts[one].modules()}  # a module without tensors may be a child of both
        for each in reached[one].keys() & reached[other].keys():
            if isinstance(reached[one][each], Tensor) or each not in inside:
                return False
    return True


def _check(module: Any) -> None:
    if not isinstance(module, nn.Module):
        fix = "Make an instance of the class." if isinstance(module, type) else ""
        raise wrong_type("module", module, "a torch.nn.Module", fix=fix)
    for name, part in module.named_modules():
        where = f"module.{name}" if name else "module"
        if isinstance(part, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise InputError("A data-parallel wrapper must be removed.", fix="Pass wrapper.module.", where=where)
        if isinstance(part, torch.jit.ScriptModule):
            raise InputError("The module must not be a script.", fix="Pass the module it came from.", where=where)
        if any(nn.parameter.is_lazy(value) for value in (*part._parameters.values(), *part._buffers.values())):
            fix = "Call the module once on an input."
            raise InputError("A lazy module must be initialized.", fix=fix, where=where)
