"""Models written as one function: `compact`, `init_fn` and `non_trainable`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from luxtorch import init as initializers
from luxtorch.core import InputError, Layer, StatefulLayer, Static, described, out_of_range, show_value, wrong_type
from luxtorch.core._container import refuse_modules

from ._compact_parts import Body, Compact, Constant, Content, Drawn, Group, Leaf, Part


def as_part(value: Any, what: str, *, trainable: bool = True) -> Part:
    """Return the part that a value stands for.

    Args:
        value: The value.
        what: What the value is, for errors.
        trainable: Whether tensors become parameters; otherwise, states.
    """
    kind = _kind(value, what)
    if isinstance(value, Layer):
        return value
    if isinstance(value, Leaf):
        return Leaf(value.start, trainable and value.trainable)
    if isinstance(value, Tensor):
        if trainable and not (value.is_floating_point() or value.is_complex()):
            fix = "Make it a state, lt.non_trainable(...), or convert it, .float()."
            raise wrong_type(what, value, "a floating point or complex tensor, as it is a parameter", fix=fix)
        return Leaf(Content.of(value), trainable)
    if kind is None:
        return Constant(_static(value, what))
    stem, first = ("layer_", 1) if kind == "a layer" else ("", 0)
    named = value if isinstance(value, dict) else {f"{stem}{i}": item for i, item in enumerate(value, first)}
    for name in named:
        check_name(name, what)
    parts = tuple(as_part(item, f"{what}, '{name}',", trainable=trainable) for name, item in named.items())
    return Group(tuple(named), parts, isinstance(value, dict))


def as_state(value: Any, what: str) -> Part:
    """Return the part that a value stands for, as a state."""
    if isinstance(value, Static):
        return Leaf(value, trainable=False)
    if _kind(value, what) not in ("a tensor", "a state"):
        kinds = "a tensor, lt.init_fn(...), a list or dict of these, or an lt.Static"
        raise out_of_range(what, value, kinds, fix="Write torch.tensor(...). What never changes needs no wrapper.")
    return as_part(value, what, trainable=False)


def check_name(name: Any, what: str) -> None:
    """Raise unless a name can be read as an attribute, or stand in a path."""
    if not isinstance(name, str) or not name or "." in name or name.startswith("_"):
        raise InputError(
            f"{what} has an invalid name.", expected="a string without dots or a leading underscore", got=repr(name)
        )


def _kind(value: Any, what: str) -> str | None:
    """Return the kind of a value, or of all items of a list or dict; None for anything but layers and tensors."""
    if isinstance(value, Group) or (isinstance(value, Leaf) and not value.trainable):
        return "a state"
    if isinstance(value, Tensor | Leaf):
        return "a tensor"
    if isinstance(value, Layer):
        return "a layer"
    if not isinstance(value, list | tuple | dict):
        return None
    kinds = {_kind(item, what): item for item in (value.values() if isinstance(value, dict) else value)}
    if len(kinds) > 1:
        raise InputError(
            f"{what} mixes kinds.",
            expected="layers only, tensors only, or neither",
            got=" and ".join(kind or f"{item!r:.40}" for kind, item in kinds.items()),
            fix="Make separate parts of them; a function among layers becomes one by lt.WrappedFunction(function).",
        )
    return next(iter(kinds), None)


def _static(value: Any, what: str) -> Any:
    """Return a value that is part of the model's description, made hashable."""
    if isinstance(value, list | tuple):
        return tuple(_static(item, what) for item in value)
    if isinstance(value, type) and issubclass(value, Layer):
        raise out_of_range(what, value, "a layer, not a class", fix=f"{value.__name__}(...)")
    problem = "holds tensors of its own" if isinstance(value, torch.nn.Module | StatefulLayer) else ""
    try:
        hash(value)
    except TypeError:
        problem = "cannot be hashed"
    if problem:
        raise InputError(
            f"{what} {problem}, and is neither a layer nor a tensor.",
            expected="a layer, a tensor, a list or dict of these, or a plain hashable value",
            got=described(value),
            fix="Arrays become tensors by torch.as_tensor; the layer of a StatefulLayer is its attribute layer."
            + " A module becomes a layer by lt.from_torch." * isinstance(value, torch.nn.Module),
        )
    refuse_modules(value, what)
    return value


@overload
def compact(function: Body, /, **parts: Any) -> Compact: ...


@overload
def compact(**parts: Any) -> Callable[[Body], Compact]: ...


def compact(function: Body | None = None, /, **parts: Any) -> Compact | Callable[[Body], Compact]:
    """Make a layer of a function, whose layers, parameters and states are declared beside it.

    The function is called as `function(m, x)`, where `m` has the parts as attributes, see `Parts`; it returns the
    output alone. Layers are called as `m.dense(x)`: their parameters and states are passed on behind the scenes, also
    where one is called twice. With a third argument, `function(m, x, ps)`, it gets all parameters, unchanged.

    As a decorator, `compact` makes the one model that the function's name then stands for. As a call on a function, it
    makes models of several sizes that share a body: see the second example. Two models are equal if their functions are
    the same one and their parts are equal; so define the function at the top of a module, where pickle finds it too,
    rather than inside a function that makes models. To pass `ps` and `st` by hand, write a class of `ContainerLayer`.

    Args:
        function: The body. Without it, a decorator is returned.
        **parts: By name; the value decides the kind:

            - a layer: a layer inside;
            - a tensor: a parameter, which starts with these numbers;
            - `init_fn(init, shape)`: a parameter that is drawn by `setup`;
            - `non_trainable(...)` of either: a state;
            - a list, tuple or dict of layers, or one of tensors: all of them, the tensors in `ps` and `st` named by
              their keys, list items of layers `layer_1`, `layer_2`, ..., list items of tensors `0`, `1`, ...;
            - anything else, such as a number, a string or a function: a constant, which is part of the model.

    Parameters:
        Those of each layer, under its name; and the tensors that are not wrapped in `non_trainable`.

    States:
        Those of each layer, under its name; and the tensors that are.

    Raises:
        InputError: If the function has another signature, a part is none of the above, or a list mixes kinds. In a
            call: if anything but a state is assigned, if it changes its shape or dtype, or if nothing is returned.
        KeyNameError: In a call, if the function asks for a part that is not there.

    Example:
        >>> import torch, luxtorch as lt
        >>> @lt.compact(hidden=[lt.Dense(2, 8, torch.tanh), lt.Dense(8, 8, torch.tanh)], head=lt.Dense(8, 1),
        ...             scale=torch.ones(()), calls=lt.non_trainable(torch.tensor(0)), power=2)
        ... def model(m, x):
        ...     for layer in m.hidden:
        ...         x = layer(x)
        ...     m.calls = m.calls + 1
        ...     return m.head(x) * m.scale ** m.power
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.ones(4, 2), ps, st)
        >>> y.shape, st["calls"]
        (torch.Size([4, 1]), tensor(1))
        >>> model
        Compact(model, scale=parameter (), calls=state (), power=2,
            hidden = Group(
                layer_1 = Dense(2 -> 8, tanh),                         # 24 parameters: weight (8, 2), bias (8,)
                layer_2 = Dense(8 -> 8, tanh),                         # 72 parameters: weight (8, 8), bias (8,)
            ),
            head = Dense(8 -> 1),                                      # 9 parameters: weight (1, 8), bias (1,)
        )                                                              # total: 106 parameters, 1 states

        One body, models of any size:

        >>> def residual(m, x):
        ...     return x + m.inner(x)
        >>> def block(width):
        ...     return lt.compact(residual, inner=lt.Dense(width, width))
        >>> block(3) == block(3), block(3) == block(4)
        (True, False)
        >>> lt.parameter_length(lt.Chain(block(3), block(3)))
        24

    Source: Lux's `@compact`, whose `@return` is Python's `return`.
    """
    if function is None:
        return lambda function: _compact(function, parts)
    return _compact(function, parts)


def non_trainable(value: Any) -> Any:
    """Make a state, not a parameter, of what is passed to `compact`.

    Args:
        value: A tensor, `init_fn(...)`, or a list or dict of these; or an `lt.Static`, a switch that no call changes:
            one called `training` is switched by `lt.train_mode` and `lt.test_mode`.

    Raises:
        InputError: If it is anything else.

    Example:
        >>> import torch, luxtorch as lt
        >>> @lt.compact(steps=lt.non_trainable(torch.tensor(0)), training=lt.non_trainable(lt.Static(True)))
        ... def count(m, x):
        ...     if m.training:
        ...         m.steps = m.steps + 1
        ...     return x
        >>> ps, st = lt.setup(0, count)
        >>> y, st = count(torch.ones(2), ps, st)
        >>> y, st = count(torch.ones(2), ps, lt.test_mode(st))
        >>> st
        {'steps': tensor(1), 'training': Static(False)}

    Source: Lux's `@non_trainable`.
    """
    return as_state(value, "The argument of non_trainable")


def init_fn(init: Callable[..., Tensor], shape: tuple[int, ...] | int | None = None) -> Any:
    """Let `setup` draw a tensor that is passed to `compact`.

    Args:
        init: An initializer, called as `init(key, shape)`; without a shape, any function of a key.
        shape: The shape.

    Raises:
        InputError: If `init` is not a function, or an initializer of luxtorch comes without a shape.

    Example:
        >>> import torch, luxtorch as lt
        >>> @lt.compact(
        ...     weight=lt.init_fn(lt.init.glorot_uniform, (3, 2)),
        ...     rng=lt.non_trainable(lt.init_fn(torch.clone)),  # a key
        ... )
        ... def noisy(m, x):
        ...     key, m.rng = lt.random.split(m.rng)  # a key for now, and one for the next call
        ...     return x @ m.weight.T + lt.random.normal(key, (3,))
        >>> ps, st = lt.setup(0, noisy)
        >>> y, st = noisy(torch.ones(4, 2), ps, st)
        >>> y.shape
        torch.Size([4, 3])

    Source: Lux's `@init_fn`.
    """
    if not callable(init) or isinstance(init, Layer):
        fix = (
            "Pass a tensor to compact directly."
            if isinstance(init, Tensor)
            else "Write lt.init_fn(lt.init.ones, (3,))."
        )
        raise out_of_range("init", init, "a function that makes a tensor", fix=fix)
    if shape is None and _is_initializer(init):
        raise InputError(
            f"The initializer {show_value(init)} needs a shape.", fix=f"lt.init_fn({show_value(init)}, (3,))"
        )
    return Leaf(Drawn(init, (shape,) if isinstance(shape, int) else None if shape is None else tuple(shape)))


def _compact(function: Any, parts: dict[str, Any]) -> Compact:
    title = _checked(function, parts)
    found = {}
    for name, value in parts.items():
        what = f"The part '{name}' of {title}"
        check_name(name, what)
        if _is_initializer(value):
            raise InputError(
                f"{what} is an initializer without a shape.",
                got=show_value(value),
                fix=f"{name}=lt.init_fn({show_value(value)}, (3,))",
            )
        found[name] = as_part(value, what)
    return Compact(tuple(found), tuple(found.values()), function)


def _checked(function: Any, parts: dict[str, Any]) -> str:
    """Return a function's name, or raise if it cannot be the body of a model."""
    if not callable(function) or isinstance(function, type | Layer):
        raise out_of_range(
            "The body of a compact model",
            function,
            "a function",
            fix="Parts are keyword arguments: lt.compact(function, name=part, ...).",
        )
    title = show_value(function)
    if not parts:
        raise InputError(
            f"{title} has no parts.",
            expected="@lt.compact(name=part, ...)",
            fix="A function without parts becomes a layer by lt.WrappedFunction(function).",
        )
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function written in C
        signature = inspect.Signature()
    arguments = signature.parameters.values()
    plain = all(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in arguments)
    required = all(each.default is each.empty for each in arguments)
    if not (plain and required and (len(arguments) == 2 or list(signature.parameters)[2:] == ["ps"])):
        raise InputError(
            f"{title} has a signature that a compact model cannot call.",
            expected="(m, x): the parts and the input; or (m, x, ps), to get the parameters too",
            got=str(signature),
            fix="States are threaded behind the scenes; parts are read from m; several inputs are one tuple.",
        )
    return title


def _is_initializer(value: Any) -> bool:
    """Return whether a value is one of luxtorch's initializers, with or without options."""
    return isinstance(value, initializers.BoundInitializer) or any(
        value is each for each in vars(initializers).values() if hasattr(each, "__wrapped__")
    )
