"""Activation functions as layers. `inplace=True` is forgotten: no layer writes into its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luxtorch.core import Layer
from luxtorch.layers import ACTIVATIONS, GLU, PReLU, WrappedFunction

from ._function import function

Converter = Callable[[Any], Layer | None]


def _plain(activation: Any) -> Converter:
    return lambda module: WrappedFunction(activation)


def _with(activation: Callable[..., Tensor], *names: str) -> Converter:
    """Return what takes a module to a function, with the options of these names."""
    return lambda module: WrappedFunction(function(activation, **{name: getattr(module, name) for name in names}))


def _softmax2d(module: nn.Softmax2d) -> Layer:
    return WrappedFunction(function(F.softmax, dim=-3))


def _glu(module: nn.GLU) -> Layer:
    return GLU(module.dim)


def _prelu(module: nn.PReLU) -> Layer:
    return PReLU(module.num_parameters, module.init)


CONVERTERS: dict[type[nn.Module], Converter] = {
    nn.CELU: _with(F.celu, "alpha"),
    nn.ELU: _with(F.elu, "alpha"),
    nn.GELU: _with(F.gelu, "approximate"),
    nn.GLU: _glu,
    nn.Hardshrink: _with(F.hardshrink, "lambd"),
    nn.Hardsigmoid: _plain(ACTIVATIONS["hardsigmoid"]),
    nn.Hardswish: _plain(F.hardswish),
    nn.Hardtanh: _with(F.hardtanh, "min_val", "max_val"),
    nn.LeakyReLU: _with(F.leaky_relu, "negative_slope"),
    nn.LogSigmoid: _plain(ACTIVATIONS["logsigmoid"]),
    nn.LogSoftmax: _with(F.log_softmax, "dim"),
    nn.Mish: _plain(F.mish),
    nn.PReLU: _prelu,
    nn.ReLU: _plain(torch.relu),
    nn.ReLU6: _plain(F.relu6),
    nn.SELU: _plain(torch.selu),
    nn.SiLU: _plain(F.silu),
    nn.Sigmoid: _plain(torch.sigmoid),
    nn.Softmax: _with(F.softmax, "dim"),
    nn.Softmax2d: _softmax2d,
    nn.Softmin: _with(F.softmin, "dim"),
    nn.Softplus: _with(F.softplus, "beta", "threshold"),
    nn.Softshrink: _with(F.softshrink, "lambd"),
    nn.Softsign: _plain(F.softsign),
    nn.Tanh: _plain(torch.tanh),
    nn.Tanhshrink: _plain(F.tanhshrink),
    nn.Threshold: _with(F.threshold, "threshold", "value"),
}
