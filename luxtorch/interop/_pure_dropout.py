"""The dropouts of torch, and its randomized ReLU, by a key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch import random as lr
from luxtorch._transforms import functional
from luxtorch.core import InputError
from luxtorch.layers._dropout import alpha_dropped, dropped

from ._keys import Keys
from ._pure_random import keyed


def _functional_dropout(
    keys: Keys, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    y = _dropout(keys, input, p, training)
    return _written(input, y) if inplace else y


def _dropout(keys: Keys, input: Tensor, p: float, train: bool) -> Tensor:
    return dropped(input, keys.next(), p, tuple(input.shape)) if _drops(p, train) else input


def _feature_dropout(keys: Keys, input: Tensor, p: float, train: bool) -> Tensor:
    return dropped(input, keys.next(), p, _one_a_feature(input)) if _drops(p, train) else input


def _alpha_dropout(keys: Keys, input: Tensor, p: float, train: bool) -> Tensor:
    return alpha_dropped(input, keys.next(), p, tuple(input.shape)) if _drops(p, train) else input


def _feature_alpha_dropout(keys: Keys, input: Tensor, p: float, train: bool) -> Tensor:
    return alpha_dropped(input, keys.next(), p, _one_a_feature(input)) if _drops(p, train) else input


def _rrelu(keys: Keys, input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False) -> Tensor:
    slope: Tensor | float = (lower + upper) / 2
    if training:
        slope = lr.uniform(keys.next(), tuple(input.shape), low=lower, high=upper, dtype=input.dtype)
    # Not leaky_relu, whose derivative wants to see the input again, which may have been written over.
    return torch.where(input > 0, input, input * slope)


def _drops(p: float, train: bool) -> bool:
    if not 0 <= p <= 1:
        raise InputError("Dropout takes a probability.", expected="0 <= p <= 1", got=f"p={p}")
    return train and p > 0


def _one_a_feature(input: Tensor) -> tuple[int, ...]:
    if input.ndim < 2:
        raise InputError(
            "Without channels there are none to drop.",
            expected="an input of at least two dimensions",
            got=str(tuple(input.shape)),
        )
    return (*input.shape[:2], *(1,) * (input.ndim - 2))


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def filled(keys: Keys, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _written(input, function(keys, input, *args, **kwargs))

    return filled


def _written(input: Tensor, y: Tensor) -> Tensor:
    if y is input:
        return input
    try:
        return input.copy_(y)
    except RuntimeError:
        # Under vmap over keys, y may be a batch where the input is none. Nearly all code uses what is returned.
        if not functional():
            raise
        return y


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    F.dropout: _functional_dropout,
    torch.dropout: _dropout,
    torch.dropout_: _in_place(_dropout),
    torch.feature_dropout: _feature_dropout,
    torch.feature_dropout_: _in_place(_feature_dropout),
    torch.alpha_dropout: _alpha_dropout,
    torch.alpha_dropout_: _in_place(_alpha_dropout),
    torch.feature_alpha_dropout: _feature_alpha_dropout,
    torch.feature_alpha_dropout_: _in_place(_feature_alpha_dropout),
    torch.rrelu: keyed(torch.rrelu, _rrelu),
    torch.rrelu_: keyed(torch.rrelu_, _in_place(_rrelu)),
}
