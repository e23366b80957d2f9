"""Linear modules as layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from luxtorch.core import Layer
from luxtorch.layers import Dense, Embedding, NoOpLayer


def _linear(module: nn.Linear) -> Dense:
    return Dense(module.in_features, module.out_features, bias=module.bias is not None)


def _identity(module: nn.Identity) -> NoOpLayer:
    return NoOpLayer()


def _embedding(module: nn.Embedding) -> Embedding | None:
    if module.max_norm is not None or module.scale_grad_by_freq:
        return None
    return Embedding(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx)


CONVERTERS: dict[type[nn.Module], Callable[[Any], Layer | None]] = {
    nn.Linear: _linear,
    nn.Identity: _identity,
    nn.Embedding: _embedding,
}
