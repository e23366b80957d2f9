"""Linear modules as layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from luxtorch.core import Layer, Parameters, States
from luxtorch.core._locate import opened
from luxtorch.layers import Dense, Embedding, NoOpLayer


class Identity(NoOpLayer):
    """Be a `NoOpLayer` that takes one input, as `torch.nn.Identity` does.

    Shape:
        Anything, but several arguments, to the same.

    Source: `torch.nn.Identity`.
    """

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return `(x, st)`."""
        return x if isinstance(x, Tensor) else opened(self, x), st


def _linear(module: nn.Linear) -> Dense:
    return Dense(module.in_features, module.out_features, bias=module.bias is not None)


def _identity(module: nn.Identity) -> Identity:
    return Identity()


def _embedding(module: nn.Embedding) -> Embedding | None:
    if module.max_norm is not None or module.scale_grad_by_freq:
        return None
    return Embedding(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx)


CONVERTERS: dict[type[nn.Module], Callable[[Any], Layer | None]] = {
    nn.Linear: _linear,
    nn.Identity: _identity,
    nn.Embedding: _embedding,
}
