"""`initializer` makes an initializer from a function: called with a key it draws, without one it binds options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast, overload

import torch
from torch import Tensor

from luxtorch._errors import InputError, out_of_range, suggest, wrong_type

Initializer: TypeAlias = Callable[..., Tensor]
"""What a layer takes: a function `init(key, shape)` that returns a tensor."""


class BindableInitializer(Protocol):
    """The two ways to call an initializer of this folder: with a key and a shape to draw, without to bind options."""

    @overload
    def __call__(
        self,
        key: Tensor,
        shape: Sequence[int] | int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> BindableInitializer: ...


@dataclass(frozen=True, repr=False)
class BoundInitializer:
    """Hold an initializer together with some of its options.

    It is what `glorot_uniform(gain=2.0)` returns: a value that can be compared, hashed and pickled, and so be a field
    of a layer.

    Args:
        init: The initializer, a function made by `initializer`.
        options: The bound options by name, in sorted order.

    Example:
        >>> from luxtorch.init import glorot_uniform
        >>> glorot_uniform(gain=2.0)
        glorot_uniform(gain=2.0)
        >>> glorot_uniform(gain=2.0) == glorot_uniform(gain=2)
        True
        >>> glorot_uniform(gain=1.0) is glorot_uniform  # the default: there is nothing to bind
        True
    """

    init: Callable[..., Any]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, key: Tensor | None = None, shape: Sequence[int] | int | None = None, **options: Any) -> Any:
        """Draw as the initializer does, or bind more options."""
        # A layer passes its own dtype and device, which are None by default.
        given = {name: value for name, value in options.items() if value is not None}
        return self.init(key, shape, **{**dict(self.options), **given})

    def __repr__(self) -> str:
        return f"{self.init.__name__}({', '.join(f'{name}={value!r}' for name, value in self.options)})"


def initializer(rule: Callable[..., Tensor]) -> BindableInitializer:
    """Turn a function into an initializer that checks its arguments and can bind its options.

    Args:
        rule: A function `rule(key, shape, dtype, *, option=default, ...)` that returns a tensor of `shape` and `dtype`
            on the key's device. Define it at the top of a module, where pickle finds it.

    Returns:
        A function `init(key, shape, *, dtype=None, device=None, **options)`. Without `dtype` it draws in torch's
        default dtype, without `device` on the key's device. Without a key and a shape it returns an initializer with
        the given options bound.

    Example:
        >>> import luxtorch.init as init, luxtorch.random as lr
        >>> @init.initializer
        ... def positive(key, shape, dtype, *, scale=1.0):
        ...     return init.uniform(key, shape, dtype=dtype, high=scale)
        >>> positive(scale=2.0)
        positive(scale=2.0)
        >>> positive(scale=2.0)(lr.key(0), (3,)).shape
        torch.Size([3])
    """
    name = rule.__name__
    parameters = [each for each in inspect.signature(rule).parameters.values() if each.kind is each.KEYWORD_ONLY]
    defaults = {each.name: each.default for each in parameters}
    required = tuple(each.name for each in parameters if each.default is each.empty)

    @functools.wraps(rule)
    def init(
        key: Tensor | None = None,
        shape: Sequence[int] | int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Any:
        _check_options(name, options, defaults)
        if key is None and shape is None:
            bound = {option: value for option, value in options.items() if value != defaults[option]}
            if dtype is not None:
                bound["dtype"] = dtype
            if device is not None:
                bound["device"] = torch.device(device)
            return BoundInitializer(init, tuple(sorted(bound.items()))) if bound else init
        missing = [option for option in required if option not in options]
        if missing:
            raise InputError(
                f"The initializer {name} needs the option {missing[0]}.",
                fix=f"Bind it, {name}({missing[0]}=...), or pass it beside the key and the shape.",
            )
        key = _checked_key(name, key)
        if device is not None:
            key = key.to(device)
        return rule(key, _checked_shape(name, shape), dtype or torch.get_default_dtype(), **options)

    public = [
        inspect.Parameter("key", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation="Tensor"),
        inspect.Parameter(
            "shape", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation="Sequence[int] | int"
        ),
        *parameters,
        inspect.Parameter("dtype", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="torch.dtype"),
        inspect.Parameter("device", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="torch.device | str"),
    ]
    init.__signature__ = inspect.Signature(public, return_annotation="Tensor")  # type: ignore[attr-defined]
    return cast(BindableInitializer, init)


def _check_options(name: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for option, value in options.items():
        if option not in defaults:
            raise InputError(
                f"The initializer {name} has no option '{option}'.",
                expected=", ".join([*defaults, "dtype", "device"]),
                fix=suggest(option, [*defaults, "dtype", "device"]),
            )
        if isinstance(value, (Tensor, list, dict, set)):
            expected = "a plain value, a number, a string or a tuple, as it is part of a layer"
            raise wrong_type(f"The option {option} of {name}", value, expected)


def _checked_key(name: str, key: Tensor | None) -> Tensor:
    if key is None:
        raise InputError(f"The initializer {name} needs a key.", fix="Pass lt.random.key(0) before the shape.")
    if not isinstance(key, Tensor) or key.dtype != torch.uint64 or key.shape != (2,):
        batched = isinstance(key, Tensor) and key.ndim > 1 and key.shape[-1] == 2
        fix = "For a batch of keys, use torch.vmap." if batched else "Make one with lt.random.key(0)."
        raise wrong_type(f"The key of {name}", key, "a uint64 tensor of shape (2,)", fix=fix)
    return key


def _checked_shape(name: str, shape: Sequence[int] | int | None) -> tuple[int, ...]:
    if shape is None:
        raise InputError(f"The initializer {name} needs a shape.", fix="Pass it after the key: (out, in).")
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(size < 0 for size in shape):
        raise out_of_range("Each size in shape", shape, "at least 0")
    return shape
