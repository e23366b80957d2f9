"""`PureMode`: replaces torch functions that are not pure, or lack a derivative, while a module's forward runs."""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from luxtorch._formulas import RULES, by_rule
from luxtorch._torch import compile_constant, let_modes_replace
from luxtorch._transforms import first_order, functional, transformed

from . import (
    _attention,
    _lookup,
    _losses,
    _norms,
    _random,
    _recurrent,
)
from ._keys import Keys


def _without_check(function: Any) -> Callable[..., Any]:
    """Copy a torch.nn.functional function with its `has_torch_function` check disabled.

    With the check, a mode sees the call of the function, but not those inside of it. Without, the mode sees the inner
    calls, as in the code of a module; and the code is torch's own in every version.
    """
    scope = {**function.__globals__, **dict.fromkeys(_CHECKS, _false)}
    if "_check_key_padding_mask" in scope:
        scope["_check_key_padding_mask"] = _check_key_padding_mask
    unchecked = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    unchecked.__kwdefaults__ = function.__kwdefaults__
    return unchecked


_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _false(*args: Any) -> bool:
    """Return False: no mode handles the call."""
    return False


def _check_key_padding_mask(mask: Tensor, src_len: int, bsz: int) -> None:
    """Check the shape as torch does, in a way that torch.compile can trace under a mode."""
    if mask.shape != (bsz, src_len):
        raise AssertionError(f"Expected a key_padding_mask of shape {(bsz, src_len)}, but got {tuple(mask.shape)}")


UNCHECKED: dict[Any, Callable[..., Any]] = {
    function: _without_check(function)
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
"""The functions, each with a copy whose inner calls the mode sees."""


def _either(with_indices: Callable[..., Any]) -> Callable[..., Any]:
    """Return a pooling with the option `return_indices`, which a mode gets under torch.compile."""

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


UNCHECKED[F.fractional_max_pool2d] = _either(F.fractional_max_pool2d_with_indices)
UNCHECKED[F.fractional_max_pool3d] = _either(F.fractional_max_pool3d_with_indices)


def _in_one_piece(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the loss without chunks inside transforms; with chunks it has one derivative, by reverse mode."""

    def whole(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
        return loss(*args, options=None if transformed() else options, **kwargs)

    return whole


if hasattr(F, "linear_cross_entropy"):  # since torch 2.14
    UNCHECKED[F.linear_cross_entropy] = _in_one_piece(_without_check(F.linear_cross_entropy))


if TYPE_CHECKING:
    from .._skeleton import WorkingCopy


def _in_any_nesting(function: Any) -> Callable[..., Any]:
    """Return a linear algebra function with right derivatives in nested forward mode, where torch's are wrong."""

    def chosen(keys: Keys, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if first_order() else by_rule(function, *args, **kwargs)

    return chosen


def _requires_grad_(keys: Keys, tensor: Tensor, requires_grad: bool = True) -> Tensor:
    """Return a tensor unchanged inside of a transform, which records it anyway, and where torch forbids the call.

    Code of torch itself, such as a gradient inside of the module's forward, relies on the flag: there it is set.
    """
    if not (requires_grad and functional()) or not torch.compiler.is_compiling() and _called_by_torch():
        return tensor.requires_grad_(requires_grad)
    return tensor


def _called_by_torch() -> bool:
    """Return whether the replaced function was called by code of torch, which relies on its real results."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and (name := frame.f_globals.get("__name__", "")).startswith("luxtorch."):
        frame = frame.f_back
    return frame is not None and name.startswith("torch.")


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    **_attention.REPLACEMENTS,
    **_lookup.REPLACEMENTS,
    **_losses.REPLACEMENTS,
    **_norms.REPLACEMENTS,
    **_random.REPLACEMENTS,
    **_recurrent.REPLACEMENTS,
    **{function: _in_any_nesting(function) for function in RULES},
    Tensor.requires_grad_: _requires_grad_,
}
"""The replacement of each torch function: it takes the `Keys`, and the same arguments."""


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_WRITES: dict[Any, bool] = {
    getattr(owner, name): True
    for owner in (Tensor, torch, F, nn.init)
    for name in dir(owner)
    if name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "share_memory_", "rename_")
}
_WRITES.update({getattr(Tensor, f"__i{name}__"): True for name in _OPERATORS})
_WRITES.update({Tensor.__setitem__: True, Tensor.data.__set__: True})  # type: ignore[attr-defined]
_KINDS: dict[Any, str] = {
    **dict.fromkeys(_WRITES, "writes"),
    **dict.fromkeys(UNCHECKED, "unchecked"),
    **dict.fromkeys(REPLACEMENTS, "replaced"),
    Tensor.requires_grad.__get__: "asks",  # type: ignore[attr-defined]
    Tensor.requires_grad.__set__: "flags",  # type: ignore[attr-defined]
    Tensor.requires_grad_: "flags",
}


class PureMode(TorchFunctionMode):
    """Replace the torch functions that draw from the global generator or lack a derivative, inside of this mode.

    The replacements are in the table `REPLACEMENTS`. Writes into parameters and constants raise an error.

    Args:
        keys: The keys of all random numbers.
        copy: The module that runs; None while its parameters are made.
    """

    def __init__(self, keys: Keys, copy: WorkingCopy | None = None) -> None:
        super().__init__()
        self.keys = keys
        self.copy = copy
        if torch.compiler.is_compiling():
            _show_to_compiler()

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _KINDS.get(func)
        if kind is None and not kwargs:
            return func(*args)
        kwargs = kwargs or {}
        if self.copy is not None and not torch.compiler.is_compiling():  # a part of it may be compiled
            if kind == "asks":
                return func(*args) or not _called_by_torch() and self.copy.requires_gradient(args[0])
            if kind == "flags" and (error := self.copy.error_if_changed(args[0], operator.is_)) is not None:
                if bool([*args, *kwargs.values(), True][1]) != self.copy.requires_gradient(args[0]):
                    raise error
                return args[0]
            if func in _WRITES or "out" in kwargs or kwargs.get("inplace"):
                _untraced(self._check_write)(self.copy, args, kwargs)
        replacement = REPLACEMENTS.get(func)
        if replacement is not None:
            return replacement(self.keys, *args, **kwargs)
        unchecked = UNCHECKED.get(func)
        if unchecked is None:
            return func(*args, **kwargs)
        with self:  # torch disables the mode during this method
            return unchecked(*args, **kwargs)

    @staticmethod
    def _check_write(copy: WorkingCopy, args: Any, kwargs: Any) -> None:
        for target in (*args[:1], *(kwargs[name] for name in ("out", "input", "self", "tensor") if name in kwargs)):
            for each in target if isinstance(target, list | tuple) else (target,):
                error = copy.error_if_written(each) if isinstance(each, Tensor) else None
                if error is not None:
                    raise error


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that torch.compile, if loaded, does not trace: after a graph break it may try to."""
    compiler = sys.modules.get("torch._dynamo")
    return function if compiler is None else compiler.disable(function)


@compile_constant
def _show_to_compiler() -> bool:
    """Let torch.compile dispatch to modes for all functions for which eager code does."""
    let_modes_replace(REPLACEMENTS)
    return True
