"""Converters from modules of torch.nn to layers of luxtorch: Linear to Dense, Conv2d to Conv, and so on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luxtorch.core import InputError, Layer, Parameters, States, Value, WrapperLayer, out_of_range, show_value
from luxtorch.core._call_errors import single_input
from luxtorch.layers import (
    ACTIVATIONS,
    GLU,
    AdaptiveMaxPool,
    AdaptiveMeanPool,
    AlphaDropout,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    Dropout,
    Embedding,
    FeatureDropout,
    FlattenLayer,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    LPPool,
    MaxPool,
    MeanPool,
    NoOpLayer,
    Pad,
    PReLU,
    RMSNorm,
    Upsample,
    WrappedFunction,
)

from ._inputs import Inputs, bound
from ._submodule import has_hooks, tensors_of


class Function(Value):
    """Call a function of a tensor with options; two with the same function and options are equal.

    `functools.partial` has no such equality, which layers need.

    Args:
        function: The function. It is one of a module, so that it can be pickled.
        options: The names and values of further arguments.
    """

    function: Callable[..., Tensor]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Call the function."""
        return self.function(x, **dict(self.options))

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options)
        return f"{show_value(self.function)}({options})"


def function(function: Callable[..., Tensor], **options: Any) -> Function:
    """Return a function with options."""
    return Function(function, tuple(options.items()))


class Unbatched(WrapperLayer):
    """Add a batch dimension to an unbatched input of a layer, and remove it from the output.

    Args:
        layer: The layer.
        ndim: The number of dimensions of a batch.

    Shape:
        The input of the layer to its output, both with or both without the first dimension.
    """

    layer: Layer
    ndim: int

    def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the layer's output, unbatched if the input is, and its states."""
        if x.ndim != self.ndim - 1:
            y, st = self.layer(x, ps, st)
            return y, st
        y, st = self.layer(x.unsqueeze(0), ps, st)
        return y.squeeze(0), st


Converter = Callable[[Any], Layer | None]


def _plain(activation: Any) -> Converter:
    return lambda module: WrappedFunction(activation)


def _with(activation: Callable[..., Tensor], *names: str) -> Converter:
    """Return a converter to an activation function with the options of these names."""
    return lambda module: WrappedFunction(function(activation, **{name: getattr(module, name) for name in names}))


def _softmax2d(module: nn.Softmax2d) -> Layer:
    return WrappedFunction(function(F.softmax, dim=-3))


def _glu(module: nn.GLU) -> Layer:
    return GLU(module.dim)


def _prelu(module: nn.PReLU) -> Layer:
    return PReLU(module.num_parameters, module.init)


_ACTIVATIONS: dict[type[nn.Module], Converter] = {
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


class SizedConvTranspose(ConvTranspose):
    """Compute a `ConvTranspose` with an optional output size, as `torch.nn.ConvTranspose2d` takes it.

    Args:
        kernel_size: As in `ConvTranspose`, like all others.
        in_channels: The size of the input's second dimension.
        out_channels: The size of the output's second dimension.
        activation: A function of a tensor; None for none.

    Shape:
        (batch, in_channels, *dims), or `Inputs` of it and of an `output_size`, to (batch, out_channels, *new dims).

    Source: `torch.nn.ConvTranspose2d`.
    """

    def __call__(self, x: Tensor | Inputs, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the transposed convolution of the input, and `st`."""
        image, size = bound(x, "input", "output_size") if isinstance(x, Inputs) else (x, None)
        # A layer with the output padding for this size, as ConvTranspose itself does not take sizes.
        plain = ConvTranspose.__call__
        return plain(self if size is None else replace(self, output_padding=self._missing(image, size)), image, ps, st)

    def _missing(self, x: Tensor, size: Sequence[int]) -> tuple[int, ...]:
        """Return the output padding for an output size."""
        steps, ends = self.stride, zip(self._cut, self._extent, strict=True)
        least = [
            (n - 1) * step - low - high + reach + 1
            for n, step, ((low, high), reach) in zip(x.shape[-self._dims :], steps, ends, strict=True)  # type: ignore[arg-type]
        ]
        more = tuple(n - m for n, m in zip(size[-self._dims :], least, strict=True))
        if min(more) < 0:
            raise out_of_range("output_size", tuple(size), f"at least {tuple(least)}")
        return more


def _conv(module: Any) -> Conv:
    return Conv(*_sizes(module), padding_mode=module.padding_mode, **_options(module))


def _conv_transpose(module: Any) -> ConvTranspose:
    return SizedConvTranspose(*_sizes(module), output_padding=module.output_padding, **_options(module))


def _sizes(module: Any) -> tuple[Any, int, int]:
    return module.kernel_size, module.in_channels, module.out_channels


def _options(module: Any) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "groups")
    return {**{name: getattr(module, name) for name in names}, "bias": module.bias is not None}


_CONVOLUTIONS: dict[type[nn.Module], Callable[[Any], Layer | None]] = {
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.ConvTranspose1d: _conv_transpose,
    nn.ConvTranspose2d: _conv_transpose,
    nn.ConvTranspose3d: _conv_transpose,
}


class Identity(NoOpLayer):
    """Return the input; unlike `NoOpLayer`, take one input only, as `torch.nn.Identity` does.

    Shape:
        Any one input to the same.

    Source: `torch.nn.Identity`.
    """

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return `(x, st)`."""
        return x if isinstance(x, Tensor) else single_input(self, x), st


def _linear(module: nn.Linear) -> Dense:
    return Dense(module.in_features, module.out_features, bias=module.bias is not None)


def _identity(module: nn.Identity) -> Identity:
    return Identity()


def _embedding(module: nn.Embedding) -> Embedding | None:
    if module.max_norm is not None or module.scale_grad_by_freq:
        return None
    return Embedding(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx)


_DENSE: dict[type[nn.Module], Callable[[Any], Layer | None]] = {
    nn.Linear: _linear,
    nn.Identity: _identity,
    nn.Embedding: _embedding,
}


def _dropout(module: nn.Dropout) -> Dropout:
    return Dropout(module.p)


def _alpha_dropout(module: nn.AlphaDropout) -> AlphaDropout:
    return AlphaDropout(module.p)


def _dropout1d(module: nn.Dropout1d) -> Layer:
    return Unbatched(FeatureDropout(module.p), 3)


def _dropout2d(module: nn.Dropout2d) -> FeatureDropout:
    return FeatureDropout(module.p)  # torch takes three dimensions for a batch of sequences


def _dropout3d(module: nn.Dropout3d) -> Layer:
    return Unbatched(FeatureDropout(module.p), 5)


_DROPOUTS: dict[type[nn.Module], Callable[[Any], Layer | None]] = {
    nn.Dropout: _dropout,
    nn.AlphaDropout: _alpha_dropout,
    nn.Dropout1d: _dropout1d,
    nn.Dropout2d: _dropout2d,
    nn.Dropout3d: _dropout3d,
}


def _batch_norm(module: Any) -> Layer:
    momentum, tracked = module.momentum, module.track_running_stats
    momentum = None if momentum is None else float(momentum)
    return BatchNorm(module.num_features, momentum=momentum, track_running_stats=tracked, **_norm_options(module))


def _instance_norm(ndim: int, module: Any) -> Layer | None:
    if not module.affine:  # then torch's takes any number of channels
        return None
    momentum, tracked = float(module.momentum or 0.0), module.track_running_stats
    layer = InstanceNorm(module.num_features, momentum=momentum, track_running_stats=tracked, **_norm_options(module))
    return Unbatched(layer, ndim)


def _group_norm(module: nn.GroupNorm) -> Layer:
    return GroupNorm(module.num_channels, module.num_groups, **_norm_options(module))


def _layer_norm(module: nn.LayerNorm) -> Layer:
    affine = module.elementwise_affine
    bias = module.bias is not None or not affine
    return LayerNorm(module.normalized_shape, eps=module.eps, affine=affine, bias=bias)


def _rms_norm(module: nn.RMSNorm) -> Layer:
    return RMSNorm(module.normalized_shape, eps=module.eps, affine=module.elementwise_affine)


def _norm_options(module: Any) -> dict[str, Any]:
    bias = module.bias is not None or not module.affine
    return {"eps": module.eps, "affine": module.affine, "bias": bias}


_NORMS: dict[type[nn.Module], Callable[[Any], Layer | None]] = {
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.InstanceNorm1d: partial(_instance_norm, 3),
    nn.InstanceNorm2d: partial(_instance_norm, 4),
    nn.InstanceNorm3d: partial(_instance_norm, 5),
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
}


def _per_dim(value: Any, dims: int) -> tuple[Any, ...]:
    """Return a number for each dimension, where torch may have a single one."""
    return tuple(value) if isinstance(value, tuple | list) else (value,) * dims


def _max_pool(dims: int, module: Any) -> MaxPool | None:
    if module.return_indices:
        return None
    return MaxPool(
        _per_dim(module.kernel_size, dims),
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        ceil_mode=module.ceil_mode,
    )


def _mean_pool(dims: int, module: Any) -> MeanPool:
    return MeanPool(
        _per_dim(module.kernel_size, dims),
        stride=module.stride,
        padding=module.padding,
        ceil_mode=module.ceil_mode,
        count_include_pad=module.count_include_pad,
        divisor_override=getattr(module, "divisor_override", None),
    )


def _lp_pool(dims: int, module: Any) -> LPPool:
    return LPPool(
        _per_dim(module.kernel_size, dims),
        stride=module.stride,
        ceil_mode=module.ceil_mode,
        p=float(module.norm_type),
    )


def _adaptive_max_pool(dims: int, module: Any) -> AdaptiveMaxPool | None:
    return None if module.return_indices else AdaptiveMaxPool(_per_dim(module.output_size, dims))


def _adaptive_mean_pool(dims: int, module: Any) -> AdaptiveMeanPool:
    return AdaptiveMeanPool(_per_dim(module.output_size, dims))


_POOLS: dict[type[nn.Module], Callable[[Any], Layer | None]] = {
    nn.MaxPool1d: partial(_max_pool, 1),
    nn.MaxPool2d: partial(_max_pool, 2),
    nn.MaxPool3d: partial(_max_pool, 3),
    nn.AvgPool1d: partial(_mean_pool, 1),
    nn.AvgPool2d: partial(_mean_pool, 2),
    nn.AvgPool3d: partial(_mean_pool, 3),
    nn.LPPool1d: partial(_lp_pool, 1),
    nn.LPPool2d: partial(_lp_pool, 2),
    nn.LPPool3d: partial(_lp_pool, 3),
    nn.AdaptiveMaxPool1d: partial(_adaptive_max_pool, 1),
    nn.AdaptiveMaxPool2d: partial(_adaptive_max_pool, 2),
    nn.AdaptiveMaxPool3d: partial(_adaptive_max_pool, 3),
    nn.AdaptiveAvgPool1d: partial(_adaptive_mean_pool, 1),
    nn.AdaptiveAvgPool2d: partial(_adaptive_mean_pool, 2),
    nn.AdaptiveAvgPool3d: partial(_adaptive_mean_pool, 3),
}


def _flatten(module: nn.Flatten) -> FlattenLayer:
    return FlattenLayer(module.start_dim, module.end_dim)


def _unflatten(module: nn.Unflatten) -> Layer | None:
    if not isinstance(module.dim, int):  # a named dimension
        return None
    return WrappedFunction(function(torch.unflatten, dim=module.dim, sizes=tuple(module.unflattened_size)))


def _pad(mode: str, module: Any) -> Pad:
    flat = module.padding
    # torch's numbers begin with those of the last dimension.
    pairs = tuple(zip(flat[-2::-2], flat[::-2], strict=True))
    return Pad(pairs, mode, value=getattr(module, "value", 0) if mode == "constant" else 0)


def _upsample(module: nn.Upsample) -> Upsample | None:
    if module.recompute_scale_factor:
        return None
    return Upsample(
        module.mode,
        scale_factor=module.scale_factor,
        size=module.size,
        align_corners=bool(module.align_corners),
    )


# luxtorch's own shuffles take any number of spatial dimensions; torch's take two, and any number of batch dimensions.
def _pixel_shuffle(module: nn.PixelShuffle) -> WrappedFunction:
    return WrappedFunction(function(F.pixel_shuffle, upscale_factor=module.upscale_factor))


def _pixel_unshuffle(module: nn.PixelUnshuffle) -> WrappedFunction:
    return WrappedFunction(function(F.pixel_unshuffle, downscale_factor=module.downscale_factor))


_MODES = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "constant": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}

_SHAPES: dict[type[nn.Module], Callable[[Any], Layer | None]] = {
    nn.Flatten: _flatten,
    nn.Unflatten: _unflatten,
    nn.PixelShuffle: _pixel_shuffle,
    nn.PixelUnshuffle: _pixel_unshuffle,
    nn.Upsample: _upsample,
    nn.UpsamplingNearest2d: _upsample,
    nn.UpsamplingBilinear2d: _upsample,
    **{kind: partial(_pad, mode) for mode, kinds in _MODES.items() for kind in kinds},
}


CONVERTERS: dict[type[nn.Module], Callable[[Any], Layer | None]] = {
    **_ACTIVATIONS,
    **_CONVOLUTIONS,
    **_DENSE,
    **_DROPOUTS,
    **_NORMS,
    **_POOLS,
    **_SHAPES,
}
"""A function for each kind of module that returns the layer, or None where an option has no counterpart."""

_ONE = (
    *(AdaptiveMaxPool, AdaptiveMeanPool, AlphaDropout, BatchNorm, Conv, Dense, Dropout, Embedding, FeatureDropout),
    *(FlattenLayer, GLU, GroupNorm, Identity, InstanceNorm, LayerNorm, LPPool, MaxPool, MeanPool, Pad, PReLU),
    *(Unbatched, Upsample, WrappedFunction),
)

ARGUMENTS: dict[type[Layer], str] = {**dict.fromkeys(_ONE, "input"), RMSNorm: "x"}
"""The name that torch gives to the input of the modules that become a layer."""


def native(module: nn.Module) -> Layer | None:
    """Return the layer that computes what a module does, with tensors of the same names; None if there is none.

    A module of a subclass, or one with hooks or parametrizations, may compute something else.
    """
    convert = CONVERTERS.get(type(module))
    if convert is None or has_hooks(module) or module._modules or "forward" in vars(module):
        return None
    try:
        layer = convert(module)
    except InputError:  # options that luxtorch refuses; torch raises at the call
        return None
    return layer if layer is not None and _same_names(module, layer) else None


def _same_names(module: nn.Module, layer: Layer) -> bool:
    """Return whether a module has exactly the tensors that the layer needs."""
    ps, st = layer._names
    states = {name for name, store, _ in tensors_of(module) if store is not module._parameters}
    return ps == {name for name, value in module._parameters.items() if value is not None} and states <= st
