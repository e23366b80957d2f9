"""Base classes of layers that hold layers: containers, which nest their trees under names, and wrappers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch._errors import InputError
from luxtorch._torch import Dropouts
from luxtorch.random import fold_in

from ._layer import Layer
from ._plain import Value
from ._stateful import StatefulLayer


class ContainerLayer(Layer):
    """Hold layers in fields; parameters and states are nested under the fields' names.

    The name of each child is folded into its key, so that adding a child does not change the initial values of others.
    A subclass defines `__call__`, and passes each child its own part of `ps` and `st`.

    Example:
        >>> import torch, luxtorch as lt
        >>> class Residual(lt.ContainerLayer):
        ...     inner: lt.Dense
        ...
        ...     def __call__(self, x, ps, st):
        ...         y, st_inner = self.inner(x, ps["inner"], st["inner"])
        ...         return x + y, {"inner": st_inner}
        >>> ps, st = lt.setup(0, Residual(lt.Dense(3, 3)))
        >>> list(ps), list(ps["inner"])
        (['inner'], ['weight', 'bias'])
    """

    def children(self) -> Mapping[str, Layer]:
        """Return the layers in fields, by the fields' names."""
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        return {name: value for name, value in values if isinstance(value, Layer)}

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return the children's initial parameters under their names."""
        children = self.children()
        if "" in children:
            return children[""].initial_parameters(key)
        return {name: child.initial_parameters(fold_in(key, name)) for name, child in children.items()}

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the children's initial states under their names."""
        children = self.children()
        if "" in children:
            return children[""].initial_states(key)
        return {name: child.initial_states(fold_in(key, name)) for name, child in children.items()}

    def extra_repr(self) -> str:
        """Return an empty string: the children are shown on lines of their own."""
        return ""


class WrapperLayer(ContainerLayer):
    """Hold one layer in a field; parameters and states are those of that layer, not nested.

    Calling a wrapper calls the layer inside; a subclass overrides the call.

    Example:
        >>> import torch, luxtorch as lt
        >>> class Doubled(lt.WrapperLayer):
        ...     layer: lt.Layer
        ...
        ...     def __call__(self, x, ps, st):
        ...         y, st = self.layer(x, ps, st)
        ...         return 2 * y, st
        >>> ps, st = lt.setup(0, Doubled(lt.Dense(3, 3)))
        >>> list(ps)
        ['weight', 'bias']
    """

    def children(self) -> Mapping[str, Layer]:
        """Return the layer inside, under the empty name, since its trees are not nested.

        Raises:
            InputError: If the fields hold no layer, or more than one.
        """
        layers = list(super().children().values())
        if len(layers) != 1:
            headline = f"The wrapper {type(self).__name__} must have one field that holds a layer."
            fix = "Derive from lt.ContainerLayer to hold several layers."
            raise InputError(headline, got=f"{len(layers)} of them", fix=fix)
        return {"": layers[0]}

    def __call__(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        """Call the layer inside."""
        return self.children()[""](x, ps, st)


def refuse_modules(value: Any, what: str, where: str = "") -> None:
    """Raise if a value that becomes part of a model holds tensors of its own.

    A module of torch.nn, or a function that calls one, looks like a function of the input; but its tensors would be
    neither parameters nor states, and so be left out of training, saving, moving and switching modes.

    Args:
        value: The value.
        what: Its name, for the error.
        where: The layer that it belongs to, for the error.

    Raises:
        InputError: If it does.
    """
    if torch.compiler.is_compiling():
        return
    found = next(_tensor_holders(value, True, set()), None)
    if found is None:
        return
    is_tensor, is_box = isinstance(found, Tensor), isinstance(found, StatefulLayer)
    got = f"a tensor of shape {tuple(found.shape)} that requires grad" if is_tensor else f"{found!r:.80}"
    fix = "Convert it with its tensors: layer, ps, st = lt.from_torch(module)."
    if isinstance(found, nn.Module) and not any(True for _ in _tensors(found)):
        fix = "Use the layer or the function of the same kind, such as lt.Dropout, or lt.from_torch(module)[0]."
    if is_tensor or is_box:
        fix = "Make it a parameter of a layer." if is_tensor else "Use the layer of the StatefulLayer, `.layer`."
    got = got if found is value else f"{got}, in {value!r:.80}"
    headline = f"{what} must be a layer or a pure function, without tensors that are neither parameters nor states."
    raise InputError(headline, got=got, fix=fix, where=where)


def _tensor_holders(value: Any, direct: bool, seen: set[int]) -> Iterator[Any]:
    """Yield objects in a value that hold tensors; of what a function refers to, only those with trainable ones."""
    if id(value) in seen or isinstance(value, type | Layer):
        return
    seen.add(id(value))
    inside: list[Any] = []
    if isinstance(value, nn.Module):
        if _is_impure(value) if direct else any(tensor.requires_grad for tensor in _tensors(value)):
            yield value
    elif isinstance(value, StatefulLayer) or (isinstance(value, Tensor) and value.requires_grad):
        yield value
    elif isinstance(value, list | tuple):
        inside = list(value)
    elif isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        inside = [value.__self__, value.__func__]
    elif isinstance(value, FunctionType):
        code, kept = value.__code__, [cell for cell in value.__closure__ or () if cell is not None]
        read = [value.__globals__.get(name) for name in code.co_names]
        closed = [cell.cell_contents for cell in kept if _is_filled(cell)]
        inside = [*closed, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        # A name may also be that of an attribute: of globals, only trainable ones count, and nothing inside of them.
        inside += [each for each in read if isinstance(each, nn.Module | Tensor | StatefulLayer)]
        direct = False
    elif not isinstance(value, Value | ModuleType):
        held = getattr(value, "__dict__", {}).values()
        inside, direct = [each for each in held if isinstance(each, nn.Module | Tensor | StatefulLayer)], False
    for each in inside:
        yield from _tensor_holders(each, direct, seen)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a module: parameters, buffers, and other attributes."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        yield from (value for value in vars(part).values() if isinstance(value, Tensor))


_RANDOM = (Dropouts, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


def _is_impure(module: nn.Module) -> bool:
    """Return whether a module has tensors, draws random numbers, or writes in place."""
    impure = any(isinstance(part, _RANDOM) or getattr(part, "inplace", False) for part in module.modules())
    return impure or any(True for _ in _tensors(module))
