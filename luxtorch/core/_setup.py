"""`setup` of a model's parameters and states, their sizes, and ways to call it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from luxtorch._errors import InputError, LuxtorchError, described, out_of_range, wrong_type
from luxtorch.random import Rng, as_key, fold_in

from ._container import refuse_modules
from ._layer import Layer, Parameters, States
from ._mode import Static
from ._tree import META_KEY, count, map_tensors, to_meta


def setup(rng: Rng, layer: Layer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the initial parameters and states of a model.

    Args:
        rng: A seed, a key, or a `torch.Generator`, which is advanced. The tensors are made on the key's or the
            generator's device.
        layer: The model.

    Returns:
        `(ps, st)`: two nested dicts. A layer's values depend on the key and on its path alone.

    Raises:
        InputError: If the model is not a layer, or a layer in it does not make nested dicts with strings as names.
        DTypeError: If a parameter is not a tensor of real or complex numbers, or a state neither a tensor nor `Static`.

    Example:
        >>> import luxtorch as lt
        >>> ps, st = lt.setup(0, lt.Dense(3, 2))
        >>> ps["weight"].shape, ps["bias"]
        (torch.Size([2, 3]), tensor([0., 0.]))

    Source: Lux's `setup`.
    """
    _check_layer(layer)
    key = as_key(rng)
    return initial_parameters(key, layer), initial_states(key, layer)


def initial_parameters(rng: Rng, layer: Layer) -> dict[str, Any]:
    """Make the initial parameters of a model: the first half of `setup`.

    Example:
        >>> import luxtorch as lt
        >>> list(lt.initial_parameters(0, lt.Dense(3, 2)))
        ['weight', 'bias']
    """
    return _check_tree(_check_layer(layer).initial_parameters(as_key(rng)), layer, "parameter")


def initial_states(rng: Rng, layer: Layer) -> dict[str, Any]:
    """Make the initial states of a model: the second half of `setup`.

    Example:
        >>> import luxtorch as lt
        >>> lt.initial_states(0, lt.Dense(3, 2))
        {}
    """
    return _check_tree(_check_layer(layer).initial_states(fold_in(as_key(rng), "states")), layer, "state")


def parameter_length(model: Layer | Parameters) -> int:
    """Count the elements of a model's parameters, without allocating them.

    Args:
        model: A layer, or the parameters themselves.

    Example:
        >>> import luxtorch as lt
        >>> lt.parameter_length(lt.Dense(3, 2))
        8
    """
    return count(initial_parameters(META_KEY, model) if isinstance(model, Layer) else model)


def state_length(model: Layer | States) -> int:
    """Count the elements of a model's states, without allocating them; `Static` values do not count.

    Args:
        model: A layer, or the states themselves.

    Example:
        >>> import luxtorch as lt
        >>> lt.state_length(lt.BatchNorm(3))
        7
    """
    return count(initial_states(META_KEY, model) if isinstance(model, Layer) else model)


def output_shape(layer: Layer, x: Any) -> Any:
    """Infer the shape of a model's output, without computing it.

    Args:
        layer: The model.
        x: An input, of which only shapes and dtypes matter; or its shape, with the batch.

    Returns:
        The shape of the output, with the batch; for a tree of outputs, a tree of shapes.

    Example:
        >>> import luxtorch as lt
        >>> lt.output_shape(lt.Dense(3, 2), (20, 3))
        torch.Size([20, 2])

    Source: Lux's `outputsize`, which leaves the batch out.
    """
    y, _ = layer(to_meta(x), *setup(META_KEY, layer))
    return map_tensors(lambda leaf: leaf.shape, y)


def apply(layer: Layer, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
    """Call a layer: `layer(x, ps, st)`, as a function that can be passed to others.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.apply(lt.NoOpLayer(), torch.ones(2), {}, {})
        >>> y
        tensor([1., 1.])
    """
    return layer(x, ps, st)


def stateless_apply(layer: Layer, x: Any, ps: Parameters) -> Any:
    """Call a model without states, and return its output alone.

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
    states = {} if type(layer).initial_states is Layer.initial_states else layer.initial_states(META_KEY)
    if states:
        got = f"{type(layer).__name__} with the states {sorted(states)}"
        raise InputError("The model must be without states.", got=got, fix="Call model(x, ps, st).")
    return states


def _check_layer(layer: Any) -> Layer:
    if not isinstance(layer, Layer):
        fix = "The order is lt.setup(rng, model). A plain function becomes a layer by lt.WrappedFunction."
        if isinstance(layer, torch.nn.Module):
            fix = "A module becomes a layer with its trees: layer, ps, st = lt.from_torch(module)."
        raise InputError("The model must be a luxtorch layer.", got=described(layer), fix=fix)
    if not torch.compiler.is_compiling():
        _check_fields(layer, ())
    return layer


def _check_fields(layer: Layer, path: tuple[str, ...]) -> None:
    """Raise if a field of a layer, or of one inside, holds tensors."""
    for item in fields(layer):
        value = getattr(layer, item.name)
        if not isinstance(value, str | int | float):
            where = f"{'.'.join(('model', *path))} ({type(layer).__name__})"
            refuse_modules(value, f"The field '{item.name}'", where)
    for name, child in layer.children().items():
        _check_fields(child, (*path, name) if name else path)


def _check_tree(tree: dict[str, Any], layer: Layer, what: str, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a tree that a layer has made; raise if it is not made of nested dicts of tensors."""
    if not isinstance(tree, Mapping):
        raise _wrong_entry(tree, layer, what, path)
    owner, rest = _follow(layer, path)
    groups = {} if rest else owner.children()
    for name, entry in tree.items():
        if not isinstance(name, str) or not name or "." in name:
            expected = "a string without dots, which separate the names in a path, and not empty"
            raise out_of_range(f"The name of a {what}", name, expected, where=_owner_text(layer, path))
        if isinstance(entry, Tensor) and name not in groups:
            if what == "parameter" and not (entry.is_floating_point() or entry.is_complex()):
                place, where = f"The parameter '{'.'.join((*path, name))}'", _owner_text(layer, (*path, name))
                expected = "a tensor of real or complex numbers, to be differentiated by"
                fix = "Make it a state, in initial_states, or convert it, .float()."
                raise wrong_type(place, entry, expected, fix=fix, where=where)
        elif not (what == "state" and isinstance(entry, Static)):
            _check_tree(entry, layer, what, (*path, name))
    return tree


def _wrong_entry(entry: Any, layer: Layer, what: str, path: tuple[str, ...]) -> LuxtorchError:
    """Return the error for an entry that is neither a tensor nor a dict."""
    where, name = _owner_text(layer, path), ".".join(path)
    place = f"'{name}'" if name else f"what initial_{what}s returned"
    if isinstance(entry, list | tuple | Tensor):
        headline = f"The {what}s of a layer must be nested dicts of tensors, but {place} is a {type(entry).__name__}."
        fix = 'Name the entries: {"0": ..., "1": ...}, read as ps["ws"]["0"].'
        return InputError(headline, got=described(entry), fix=fix, where=where)
    fix = "Leave it out." if entry is None else "Make it a tensor, torch.tensor(...), or a field of the layer."
    expected = (
        "a tensor" + ", or a lt.core.Static that never changes in a call" * (what == "state") if name else "a dict"
    )
    return wrong_type(f"The {what} {place}" if name else place.capitalize(), entry, expected, fix=fix, where=where)


def _owner_text(layer: Layer, path: tuple[str, ...]) -> str:
    """Return the place of the layer that made the entry at a path, for errors."""
    owner, rest = _follow(layer, path)
    names = path[: len(path) - len(rest)]
    return f"{'.'.join(('model', *names))} ({f'{type(owner).__name__} {owner.extra_repr()}'.strip()})"


def _follow(layer: Layer, path: tuple[str, ...]) -> tuple[Layer, tuple[str, ...]]:
    """Return the innermost layer on a path, and the rest of the path inside of its own trees."""
    children = layer.children()
    if "" in children:
        return _follow(children[""], path)
    if path and path[0] in children:
        return _follow(children[path[0]], path[1:])
    return layer, path
