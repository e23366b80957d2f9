"""Functions of torch that are written in Python and draw random numbers, or call what has to be replaced, inside."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import transformed


def _opened(function: Any) -> Callable[..., Any]:
    """Return a function of torch without its first question, whether a mode wants to take the call over.

    A mode is asked about the function as a whole, and what the function calls then happens out of its sight. Without
    the question the function is ordinary code, like that of a module, and it stays torch's own in every version.
    """
    scope = {**function.__globals__, **dict.fromkeys(_QUESTIONS, _nobody)}
    if "_check_key_padding_mask" in scope:
        scope["_check_key_padding_mask"] = _check_key_padding_mask
    opened = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


_QUESTIONS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _nobody(*args: Any) -> bool:
    """Say that no mode wants to take a call over."""
    return False


def _check_key_padding_mask(mask: Tensor, src_len: int, bsz: int) -> None:
    """Check what torch checks, in a way that torch.compile can trace where a mode is about."""
    if mask.shape != (bsz, src_len):
        raise AssertionError(f"Expected a key_padding_mask of shape {(bsz, src_len)}, but got {tuple(mask.shape)}")


OPENED: dict[Any, Callable[..., Any]] = {
    function: _opened(function)
    for function in (
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
        F.rrelu,
        F.gumbel_softmax,
        F.fractional_max_pool2d_with_indices,
        F.fractional_max_pool3d_with_indices,
        F.multi_head_attention_forward,
        F.multilabel_soft_margin_loss,
        F.triplet_margin_with_distance_loss,
    )
}
"""The functions, each with one that runs the same code in sight of the mode."""


def _either(with_indices: Callable[..., Any]) -> Callable[..., Any]:
    """Return a pooling that returns indices where it is asked to; the compiler shows it to a mode undecided."""

    def pool(
        input: Tensor,
        kernel_size: Any,
        output_size: Any = None,
        output_ratio: Any = None,
        return_indices: bool = False,
        _random_samples: Tensor | None = None,
    ) -> Any:
        both = with_indices(input, kernel_size, output_size, output_ratio, True, _random_samples)
        return both if return_indices else both[0]

    return pool


OPENED[F.fractional_max_pool2d] = _either(F.fractional_max_pool2d_with_indices)
OPENED[F.fractional_max_pool3d] = _either(F.fractional_max_pool3d_with_indices)


def _in_one_piece(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the loss without chunks inside transforms: in chunks it has one derivative, by reverse mode."""

    def whole(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
        return loss(*args, options=None if transformed() else options, **kwargs)

    return whole


if hasattr(F, "linear_cross_entropy"):  # since torch 2.14
    OPENED[F.linear_cross_entropy] = _in_one_piece(_opened(F.linear_cross_entropy))
