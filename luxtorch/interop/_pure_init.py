"""The initializers of torch.nn.init that hide their draws from a mode, drawing from a key."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch._torch import calculate_correct_fan

from ._keys import Keys
from ._pure_filling import fill_normal, fill_uniform
from ._pure_random import keyed


def _uniform(keys: Keys, tensor: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    with torch.no_grad():
        return fill_uniform(keys, tensor, a, b)


def _normal(keys: Keys, tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    with torch.no_grad():
        return fill_normal(keys, tensor, mean, std)


def _kaiming_uniform(
    keys: Keys, tensor: Tensor, a: float = 0, mode: Any = "fan_in", nonlinearity: Any = "leaky_relu"
) -> Tensor:
    if 0 in tensor.shape:
        return tensor
    fan = calculate_correct_fan(tensor, mode)
    bound = nn.init.calculate_gain(nonlinearity, a) * math.sqrt(3 / fan)
    return _uniform(keys, tensor, -bound, bound)


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    function: keyed(function, replacement)
    for function, replacement in (
        (nn.init.uniform_, _uniform),
        (nn.init.normal_, _normal),
        (nn.init.kaiming_uniform_, _kaiming_uniform),
    )
}
