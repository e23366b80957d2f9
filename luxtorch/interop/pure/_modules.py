"""Pure forwards for modules of torch.nn that update buffers in place, such as BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from luxtorch._torch import BatchNorms, InstanceNorms
from luxtorch._transforms import transformed, watched
from luxtorch.core import InputError, described
from luxtorch.layers._batchnorm import batch_normalized, instance_statistics, moments, normalized
from luxtorch.layers._layernorm import layer_normalized

from .._branch import Branch
from ._keys import Keys
from ._mode import PureMode
from ._norms import instance_normalized


class Pure(nn.Module):
    """Base class of modules of torch.nn with a pure forward, which replaces buffers by new tensors."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self).__bases__[1], self.__dict__)


class PureNorm(Pure):
    """Declare the attributes of a normalization of torch.nn."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor
    track_running_stats: bool
    momentum: float | None
    eps: float
    _check_input_dim: Callable[[Tensor], None]


class PureBatchNorm(PureNorm):
    """Compute new running statistics, also where torch.nn reads the value of a tensor."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized input."""
        self._check_input_dim(input)
        mean, var = self.running_mean, self.running_var
        if not self.training and mean is not None and var is not None:
            return normalized(input, mean, var, self.weight, self.bias, self.eps)
        if input.numel() == input.shape[1]:
            raise InputError("The input must have more than one value per feature.", got=described(input))
        if input.numel() == 0:  # the batch is counted, and the statistics are unchanged
            if self.track_running_stats and mean is not None:
                self._buffers.update(num_batches_tracked=self.num_batches_tracked + 1)
            nothing = input.new_zeros(input.shape[1])
            return normalized(input, nothing, nothing, self.weight, self.bias, self.eps)
        if not self.track_running_stats or mean is None or var is None:
            return normalized(input, *moments(input), self.weight, self.bias, self.eps)
        count = self.num_batches_tracked + 1
        weight = 1 / count.to(mean.dtype) if self.momentum is None else float(self.momentum)
        y, mean, var = batch_normalized(input, mean, var, self.weight, self.bias, weight, self.eps)
        self._buffers.update(running_mean=mean, running_var=var, num_batches_tracked=count)
        return y


class PureInstanceNorm(PureNorm):
    """Compute new running statistics."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if mean is not None and var is not None:
            if not self.training:
                return normalized(input, mean, var, self.weight, self.bias, self.eps)
            mean, var = instance_statistics(input, mean, var, float(self.momentum or 0.0))
            self._buffers.update(running_mean=mean, running_var=var)
        return instance_normalized(input, self.weight, self.bias, self.eps)


class PureLayerNorm(Pure):
    """Compute right derivatives of every order."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized input."""
        return layer_normalized(input, self.normalized_shape, self.weight, self.bias, self.eps)


class PureRNN(Pure):
    """Read the current weights, not those of when the module was made."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: Any) -> None:
        pass

    def _update_flat_weights(self) -> None:
        """Do nothing: the property is never out of date."""


class PureLookup(Pure):
    """Run the forward of torch.nn under `PureMode`, even if no other part of the model does; it draws no numbers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output."""
        pure = getattr(self, "max_norm", None) is None and not getattr(self, "sparse", False)
        if pure and not (transformed() or watched()):
            return super().forward(*args, **kwargs)
        with PureMode(Keys(torch.zeros(2, dtype=torch.uint64))):
            return super().forward(*args, **kwargs)


_PURE: dict[type[nn.Module], type[Pure]] = {
    BatchNorms: PureBatchNorm,
    InstanceNorms: PureInstanceNorm,
    nn.LayerNorm: PureLayerNorm,
    nn.RNNBase: PureRNN,
    nn.RNNCellBase: PureLookup,
    nn.Embedding: PureLookup,
    nn.EmbeddingBag: PureLookup,
    **dict.fromkeys(
        (
            nn.BCEWithLogitsLoss,
            nn.Bilinear,
            nn.CTCLoss,
            nn.CosineEmbeddingLoss,
            nn.CosineSimilarity,
            nn.CrossEntropyLoss,
            nn.GaussianNLLLoss,
            nn.GLU,
            nn.HingeEmbeddingLoss,
            nn.HuberLoss,
            nn.KLDivLoss,
            nn.LogSigmoid,
            nn.MSELoss,
            nn.MarginRankingLoss,
            nn.MultiLabelMarginLoss,
            nn.MultiLabelSoftMarginLoss,
            nn.MultiMarginLoss,
            nn.PairwiseDistance,
            nn.SmoothL1Loss,
            nn.SoftMarginLoss,
            nn.TripletMarginLoss,
            nn.TripletMarginWithDistanceLoss,
        ),
        PureLookup,
    ),
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # since torch 2.14
    _PURE[nn.LinearCrossEntropyLoss] = PureLookup


def make_pure(module: nn.Module) -> None:
    """Change the class of a module to one with a pure forward, unless its own class defines a forward."""
    if isinstance(module, Branch):
        module._in_place = False
    if isinstance(module, nn.RNNBase):  # replaced by a property
        for name in ("_flat_weights", "_flat_weight_refs"):
            module.__dict__.pop(name, None)
    # A fast path of torch's encoders has no derivatives, and its own checks do not always see that some are needed.
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0
    if isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False
    for kind, pure in _PURE.items():
        if isinstance(module, Pure):
            return
        if isinstance(module, kind) and (pure is PureRNN or type(module).forward.__module__.startswith("torch.nn.")):
            module.__class__ = _pure_class(pure, type(module))


def make_traceable(module: nn.Module) -> None:
    """Change the class of a pure LSTM, GRU or RNN to one that torch.compile traces.

    The compiler refuses subclasses of these three, so the class copies their attributes instead of inheriting.
    """
    if issubclass(type(module), PureRNN):
        module.__class__ = _pure_class(PureRNN, type(module), _not_compiled)


_not_compiled = (nn.RNN, nn.GRU, nn.LSTM)

_classes: dict[Any, type[nn.Module]] = {}


def _pure_class(pure: type[Pure], cls: type[nn.Module], without: tuple[type[nn.Module], ...] = ()) -> type[nn.Module]:
    """Return a class derived from both; attributes of the bases `without` are copied instead of inherited."""
    if (pure, cls, without) not in _classes:
        bases = tuple(base for base in cls.__mro__ if not issubclass(base, without)) if without else (pure, cls)
        copied = {
            name: value
            for base in reversed(cls.__mro__)
            if issubclass(base, without)
            for name, value in vars(base).items()
            if not (name.startswith("__") or name in vars(pure))
        }
        # It has the name and module of the original class.
        _classes[pure, cls, without] = type(cls.__name__, bases, {**copied, "__module__": cls.__module__})
    return _classes[pure, cls, without]


def _rebuild(cls: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    module = cls.__new__(cls)
    module.__dict__.update(state)
    make_pure(module)
    return module
