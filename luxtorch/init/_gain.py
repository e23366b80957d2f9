"""The factors by which activations shrink a signal, for the initializers to make up for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from luxtorch._errors import InputError, suggest

_GAINS = {
    "identity": 1.0,
    "linear": 1.0,
    "sigmoid": 1.0,
    "tanh": 5.0 / 3.0,
    "relu": math.sqrt(2.0),
    "selu": 3.0 / 4.0,
}


def calculate_gain(activation: str | Callable[..., Any], negative_slope: float = 0.01) -> float:
    """Return the gain that an initializer should use before an activation.

    Args:
        activation: The name of an activation; or the function itself, for instance `torch.tanh`, which is looked up
            by its name. A function that is not in the table has gain 1.
        negative_slope: The slope of leaky_relu below zero; other activations ignore it.

    Returns:
        The gain, as in `torch.nn.init.calculate_gain`.

    Raises:
        InputError: If there is no activation of that name.

    Example:
        >>> import torch
        >>> from luxtorch.init import calculate_gain, glorot_uniform
        >>> calculate_gain(torch.tanh) == calculate_gain("tanh") == 5 / 3
        True
        >>> glorot_uniform(gain=calculate_gain("relu"))
        glorot_uniform(gain=1.4142135623730951)
    """
    name = activation if isinstance(activation, str) else getattr(activation, "__name__", "")
    if name == "leaky_relu":
        return math.sqrt(2.0 / (1.0 + negative_slope**2))
    if isinstance(activation, str) and name not in _GAINS:
        known = [*_GAINS, "leaky_relu"]
        raise InputError(
            f"There is no gain for an activation '{name}'.", expected=", ".join(known), fix=suggest(name, known)
        )
    return _GAINS.get(name, 1.0)
