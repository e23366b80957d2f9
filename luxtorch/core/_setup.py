"""Making a model's parameters and states, measuring them, and calling it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from luxtorch._errors import DTypeError, InputError, LuxtorchError
from luxtorch.random import Rng, as_key, fold_in

from ._container import refuse_modules
from ._layer import Layer, Parameters, States
from ._nowhere import NOWHERE, without_numbers
from ._static import Static
from ._tree import count, map_tensors


def setup(rng: Rng, layer: Layer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the initial parameters and states of a model.

    Args:
        rng: A seed, a key, or a `torch.Generator`, which is moved on. The tensors are made on the key's or the
            generator's device.
        layer: The model.

    Returns:
        `(ps, st)`: two nested dicts. A layer's values depend on the key and on its path alone.

    Raises:
        InputError: If the model is none, or a layer in it does not make nested dicts with strings as names.
        DTypeError: If a parameter is not a tensor of real or complex numbers, or a state neither a tensor nor `Static`.

    Example:
        >>> import luxtorch as lt
        >>> ps, st = lt.setup(0, lt.Dense(3, 2))
        >>> ps["weight"].shape, ps["bias"]
        (torch.Size([2, 3]), tensor([0., 0.]))

    Source: Lux's `setup`.
    """
    _checked(layer)
    key = as_key(rng)
    return initial_parameters(key, layer), initial_states(key, layer)


def initial_parameters(rng: Rng, layer: Layer) -> dict[str, Any]:
    """Make the initial parameters of a model: the first half of `setup`.

    Example:
        >>> import luxtorch as lt
        >>> list(lt.initial_parameters(0, lt.Dense(3, 2)))
        ['weight', 'bias']
    """
    return _sound(_checked(layer).initial_parameters(as_key(rng)), layer, "parameter")


def initial_states(rng: Rng, layer: Layer) -> dict[str, Any]:
    """Make the initial states of a model: the second half of `setup`.

    Example:
        >>> import luxtorch as lt
        >>> lt.initial_states(0, lt.Dense(3, 2))
        {}
    """
    return _sound(_checked(layer).initial_states(fold_in(as_key(rng), "states")), layer, "state")


def parameter_length(model: Layer | Parameters) -> int:
    """Count the numbers in a model's parameters, without making them.

    Args:
        model: A layer, or the parameters themselves.

    Example:
        >>> import luxtorch as lt
        >>> lt.parameter_length(lt.Dense(3, 2))
        8
    """
    return count(initial_parameters(NOWHERE, model) if isinstance(model, Layer) else model)


def state_length(model: Layer | States) -> int:
    """Count the numbers in a model's states, without making them; `Static` values do not count.

    Args:
        model: A layer, or the states themselves.

    Example:
        >>> import luxtorch as lt
        >>> lt.state_length(lt.BatchNorm(3))
        7
    """
    return count(initial_states(NOWHERE, model) if isinstance(model, Layer) else model)


def output_shape(layer: Layer, x: Any) -> Any:
    """Find the shape of a model's output without computing anything.

    Args:
        layer: The model.
        x: An input, of which only shapes and dtypes matter; or the shape of one, batch included.

    Returns:
        The shape of the output, batch included; for a tree of outputs, a tree of shapes.

    Example:
        >>> import luxtorch as lt
        >>> lt.output_shape(lt.Dense(3, 2), (20, 3))
        torch.Size([20, 2])

    Source: Lux's `outputsize`, which leaves the batch out.
    """
    y, _ = layer(without_numbers(x), *setup(NOWHERE, layer))
    return map_tensors(lambda leaf: leaf.shape, y)


def apply(layer: Layer, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
    """Call a layer: `layer(x, ps, st)`, as a function that can be passed on.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.apply(lt.NoOpLayer(), torch.ones(2), {}, {})
        >>> y
        tensor([1., 1.])
    """
    return layer(x, ps, st)


def stateless_apply(layer: Layer, x: Any, ps: Parameters) -> Any:
    """Call a model that has no states, and return its output alone.

    Args:
        layer: A model without states.
        x: The input.
        ps: The parameters.

    Raises:
        InputError: If the model has states.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Dense(3, 2)
        >>> ps, _ = lt.setup(0, model)
        >>> lt.stateless_apply(model, torch.ones(5, 3), ps).shape
        torch.Size([5, 2])
    """
    return layer(x, ps, _empty_states(layer))[0]


def _empty_states(layer: Layer) -> dict[str, Any]:
    children = layer.children()
    if "" in children:
        return _empty_states(children[""])
    if children:
        return {name: _empty_states(child) for name, child in children.items()}
    states = {} if type(layer).initial_states is Layer.initial_states else layer.initial_states(NOWHERE)
    if states:
        raise InputError(
            "Only a model without states can be called without them.",
            expected="no states",
            got=f"{type(layer).__name__} with the states {sorted(states)}",
            fix="Call model(x, ps, st).",
        )
    return states


def _checked(layer: Any) -> Layer:
    if not isinstance(layer, Layer):
        raise InputError(
            "Only a layer can be set up.",
            expected="a luxtorch layer",
            got=f"{layer!r:.80} of type {type(layer).__name__}",
            fix="A module becomes a layer with its trees: layer, ps, st = lt.from_torch(module)."
            if isinstance(layer, torch.nn.Module)
            else "The order is lt.setup(rng, model). A plain function becomes a layer by lt.WrappedFunction.",
        )
    if not torch.compiler.is_compiling():
        _check_fields(layer, ())
    return layer


def _check_fields(layer: Layer, path: tuple[str, ...]) -> None:
    """Raise if a layer, or one inside, has a field that holds tensors of its own."""
    for item in fields(layer):
        value = getattr(layer, item.name)
        if not isinstance(value, str | int | float):
            where = f"{'.'.join(('model', *path))} ({type(layer).__name__})"
            refuse_modules(value, f"The field '{item.name}'", where)
    for name, child in layer.children().items():
        _check_fields(child, (*path, name) if name else path)


def _sound(tree: dict[str, Any], layer: Layer, what: str, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a tree that a layer has made, or raise unless it is what every function on trees expects."""
    if not isinstance(tree, Mapping):
        raise _misshapen(tree, layer, what, path)
    owner, rest = _follow(layer, path)
    groups = {} if rest else owner.children()
    for name, entry in tree.items():
        if not isinstance(name, str) or not name or "." in name:
            raise InputError(
                f"The name of a {what} is not a string without dots.",
                expected="a string, not empty; dots separate the names in a path",
                got=repr(name),
                where=_owner(layer, path),
            )
        if isinstance(entry, Tensor) and name not in groups:
            if what == "parameter" and not (entry.is_floating_point() or entry.is_complex()):
                raise DTypeError(
                    f"The parameter '{'.'.join((*path, name))}' does not hold real or complex numbers.",
                    expected="a floating dtype, as it is differentiated by",
                    got=str(entry.dtype),
                    fix="Make it a state, in initial_states, or convert it, .float().",
                    where=_owner(layer, (*path, name)),
                )
        elif not (what == "state" and isinstance(entry, Static)):
            _sound(entry, layer, what, (*path, name))
    return tree


def _misshapen(entry: Any, layer: Layer, what: str, path: tuple[str, ...]) -> LuxtorchError:
    """Explain an entry that is neither a tensor nor a group."""
    where, name = _owner(layer, path), ".".join(path)
    place = f"'{name}'" if name else f"what initial_{what}s returned"
    if isinstance(entry, list | tuple | Tensor):
        return InputError(
            f"The {what}s of a layer are not nested dicts: {place} is a {type(entry).__name__}.",
            expected="a dict of tensors, nested or not",
            got=f"a tensor of shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else f"{len(entry)} entries",
            fix='Name the entries: {"0": ..., "1": ...}, read as ps["ws"]["0"].',
            where=where,
        )
    fix = "Make it a tensor, torch.tensor(...), or a field of the layer."
    return DTypeError(
        f"A {what} is not a tensor: {place}.",
        expected="a tensor" + ", or a lt.core.Static that never changes in a call" * (what == "state"),
        got=f"{entry!r:.80} of type {type(entry).__name__}",
        fix="Leave it out." if entry is None else fix,
        where=where,
    )


def _owner(layer: Layer, path: tuple[str, ...]) -> str:
    """Return the place of the layer that made what lies at a path, as errors name it."""
    owner, rest = _follow(layer, path)
    names = path[: len(path) - len(rest)]
    return f"{'.'.join(('model', *names))} ({f'{type(owner).__name__} {owner.extra_repr()}'.strip()})"


def _follow(layer: Layer, path: tuple[str, ...]) -> tuple[Layer, tuple[str, ...]]:
    """Return the innermost layer on a path, and what of the path lies inside of its own trees."""
    children = layer.children()
    if "" in children:
        return _follow(children[""], path)
    if path and path[0] in children:
        return _follow(children[path[0]], path[1:])
    return layer, path
