"""Functions of torch whose forward-mode derivative has no right derivative itself: replaced where they can be.

Inside of another derivative the functions of this folder that use forward mode show what they differentiate a mode,
which puts in others that are right, or warns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from luxtorch._linalg import RULES, by_rule
from luxtorch._transforms import differentiated


def differentiable(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for forward mode whose derivatives can be differentiated by what is at work around."""
    if torch.compiler.is_compiling() or not differentiated():
        return f

    @wraps(f)
    def shown(*args: Any) -> Any:
        with _Rules():
            return f(*args)

    return shown


class _Rules(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WRONG:
            warnings.warn(
                f"The derivative of {_WRONG[func]} that torch takes by forward mode is a wrong number where another "
                "transform differentiates it. Take it by reverse mode, or forward mode of a reverse-mode gradient.",
                stacklevel=2,
            )
        kwargs = kwargs or {}
        return by_rule(func, *args, **kwargs) if func in RULES else func(*args, **kwargs)


_WRONG: dict[Any, str] = {
    F.layer_norm: "layer_norm, unlike that of lt.LayerNorm,",
    F.batch_norm: "batch_norm, unlike that of lt.BatchNorm,",
    F.instance_norm: "instance_norm, unlike that of lt.InstanceNorm,",
    torch.layer_norm: "layer_norm, unlike that of lt.LayerNorm,",
    torch.batch_norm: "batch_norm, unlike that of lt.BatchNorm,",
    torch.linalg.householder_product: "householder_product",
    torch.cholesky_inverse: "cholesky_inverse",
    Tensor.cholesky_inverse: "cholesky_inverse",
}
