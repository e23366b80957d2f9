"""Dropouts as layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from luxtorch.core import Layer
from luxtorch.layers import AlphaDropout, Dropout, FeatureDropout

from ._unbatched import Unbatched


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


CONVERTERS: dict[type[nn.Module], Callable[[Any], Layer | None]] = {
    nn.Dropout: _dropout,
    nn.AlphaDropout: _alpha_dropout,
    nn.Dropout1d: _dropout1d,
    nn.Dropout2d: _dropout2d,
    nn.Dropout3d: _dropout3d,
}
