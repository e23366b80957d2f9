"""The layers of a transformer, `TransformerEncoderLayer` and `TransformerDecoderLayer`, and stacks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

from luxtorch.core import ContainerLayer, Layer, Parameters, States, out_of_range

from ._activations import Activation
from ._attention import MultiHeadAttention
from ._containers import NamedLayers
from ._dropout import Dropout
from ._embedding import RotaryPositionalEmbedding
from ._layernorm import LayerNorm
from ._linear import Dense
from ._shared import require_size, unfit

_Call: TypeAlias = Callable[[str, Any], Tensor]
"""A function that calls one of the layers inside by name."""


class _TransformerLayer(ContainerLayer):
    """Base class of both layers: residual steps with normalization and dropout."""

    norm_first: bool

    def _caller(self, ps: Parameters, st: States) -> tuple[_Call, dict[str, Any]]:
        """Return a function that calls a layer by name, and the states that it fills in."""
        new = dict(st)

        def call(name: str, x: Any) -> Tensor:
            y: Tensor
            y, new[name] = getattr(self, name)(x, ps[name], st[name])
            return y

        return call, new

    def _residual(self, call: _Call, number: int, step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        norm, dropout = f"norm{number}", f"dropout{number}"
        if self.norm_first:
            return x + call(dropout, step(call(norm, x)))
        return call(norm, x + call(dropout, step(x)))

    def _parts(self, x: Any, most: int, least: int) -> tuple[Any, ...]:
        """Return the parts of an input, None for those that are missing."""
        parts = x if isinstance(x, tuple) else (x,)
        if not least <= len(parts) <= most:
            raise unfit(self, parts, f"The input must have {least} to {most} parts.")
        return (*parts, *(None,) * (most - len(parts)))

    def extra_repr(self) -> str:
        """Return `norm_first=True`, if it is."""
        return "norm_first=True" if self.norm_first else ""


class TransformerEncoderLayer(_TransformerLayer):
    """Transformer encoder layer: self-attention, then a feed-forward network.

    Args:
        embed_dim: The width of the sequence.
        num_heads: The number of heads.
        dim_feedforward: The width between the two dense layers.
        dropout: The probability of a zero, in the attention's weights and after each step, while training.
        activation: A function of a tensor, or the name of one, between the dense layers.
        norm_first: Whether each step's input is normalized, instead of the sum of its input and output.
        eps: Added to the variance where it is normalized.
        bias: Whether the dense layers, projections and normalizations have biases.
        is_causal: Whether an element attends to itself and those before it only; a mask applies as well.
        rotary: A layer that rotates the queries and keys of each head by their positions, of size
            `embed_dim / num_heads`; or None.

    Parameters:
        self_attn: Those of `MultiHeadAttention`.
        linear1, linear2: Those of `Dense`.
        norm1, norm2: Those of `LayerNorm`.

    States:
        Those of `Dropout`, under self_attn.attention_dropout, dropout, dropout1 and dropout2.

    Shape:
        x (..., length, embed_dim), or `(x, mask)`, to the same as x. The mask is that of `MultiHeadAttention`, True
        where an element may attend to another. Only x is returned: several layers under one mask are a
        `TransformerEncoder`, as in a `Chain` the mask would reach the first of them alone, which is refused.

    Raises:
        InputError: If the heads do not divide the width, or an input has another shape.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.TransformerEncoderLayer(8, 2, 16, norm_first=True)
        >>> ps, st = lt.setup(0, model)
        >>> padding = torch.tensor([[True, True, False]] * 5)
        >>> y, st = model((torch.ones(5, 3, 8), padding[:, None, None, :]), ps, st)
        >>> y.shape
        torch.Size([5, 3, 8])

    Source: `torch.nn.TransformerEncoderLayer`; Vaswani et al., "Attention is all you need", 2017.
    """

    self_attn: MultiHeadAttention
    linear1: Dense
    dropout: Dropout
    linear2: Dense
    norm1: LayerNorm
    norm2: LayerNorm
    dropout1: Dropout
    dropout2: Dropout

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int = 2048,
        *,
        dropout: float = 0.1,
        activation: Activation | str | None = "relu",
        norm_first: bool = False,
        eps: float = 1e-5,
        bias: bool = True,
        is_causal: bool = False,
        rotary: RotaryPositionalEmbedding | None = None,
    ) -> None:
        norm, drop = LayerNorm(embed_dim, eps=eps, bias=bias), Dropout(dropout)
        self._set(
            norm_first=norm_first,
            self_attn=MultiHeadAttention(
                embed_dim, num_heads, bias=bias, dropout=dropout, is_causal=is_causal, rotary=rotary
            ),
            linear1=Dense(embed_dim, dim_feedforward, activation, bias=bias),
            linear2=Dense(dim_feedforward, embed_dim, bias=bias),
            norm1=norm,
            norm2=norm,
            dropout=drop,
            dropout1=drop,
            dropout2=drop,
        )

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the sequence after attention and dense layers, and the states of the dropouts."""
        x, mask = self._parts(x, most=2, least=1)
        call, new = self._caller(ps, st)
        x = self._residual(call, 1, lambda x: call("self_attn", (x, x, x, mask)), x)
        x = self._residual(call, 2, lambda x: call("linear2", call("dropout", call("linear1", x))), x)
        return x, new

    def has_mask(self, x: Any) -> bool:
        """Return whether an input includes a mask."""
        return isinstance(x, tuple) and len(x) == 2 and x[1] is not None

    def expected_input(self) -> str:
        """Name the width, and the tuple."""
        return f"x (..., length, {self.linear1.in_features}), or a tuple (x, mask)"


class TransformerDecoderLayer(_TransformerLayer):
    """Transformer decoder layer: self-attention, cross-attention to a memory, then a feed-forward network.

    Args:
        embed_dim: The width of both sequences.
        num_heads: The number of heads.
        dim_feedforward: The width between the two dense layers.
        dropout: The probability of a zero, in the attentions' weights and after each step, while training.
        activation: A function of a tensor, or the name of one, between the dense layers.
        norm_first: Whether each step's input is normalized, instead of the sum of its input and output.
        eps: Added to the variance where it is normalized.
        bias: Whether the dense layers, projections and normalizations have biases.
        is_causal: Whether an element attends to itself and those before it only; the mask applies as well. All of
            them attend to the whole memory.
        rotary: A layer that rotates the queries and keys of each head in the self-attention by their positions, of
            size `embed_dim / num_heads`; or None.

    Parameters:
        self_attn, multihead_attn: Those of `MultiHeadAttention`.
        linear1, linear2: Those of `Dense`.
        norm1, norm2, norm3: Those of `LayerNorm`.

    States:
        Those of `Dropout`, under self_attn.attention_dropout, multihead_attn.attention_dropout, dropout, dropout1,
        dropout2 and dropout3.

    Shape:
        A tuple of x (..., length, embed_dim), memory (..., memory_length, embed_dim), and perhaps a mask for each,
        `(x, memory, mask, memory_mask)`, either of which may be None; to the same as x. Masks are those of
        `MultiHeadAttention`, True where an element may attend to another. Several layers with one memory are a
        `TransformerDecoder`.

    Raises:
        InputError: If the heads do not divide the width, or an input has another shape.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.TransformerDecoderLayer(8, 2, 16, is_causal=True)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model((torch.ones(5, 3, 8), torch.ones(5, 4, 8)), ps, st)
        >>> y.shape
        torch.Size([5, 3, 8])

    Source: `torch.nn.TransformerDecoderLayer`; Vaswani et al., "Attention is all you need", 2017.
    """

    self_attn: MultiHeadAttention
    multihead_attn: MultiHeadAttention
    linear1: Dense
    dropout: Dropout
    linear2: Dense
    norm1: LayerNorm
    norm2: LayerNorm
    norm3: LayerNorm
    dropout1: Dropout
    dropout2: Dropout
    dropout3: Dropout

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int = 2048,
        *,
        dropout: float = 0.1,
        activation: Activation | str | None = "relu",
        norm_first: bool = False,
        eps: float = 1e-5,
        bias: bool = True,
        is_causal: bool = False,
        rotary: RotaryPositionalEmbedding | None = None,
    ) -> None:
        norm, drop = LayerNorm(embed_dim, eps=eps, bias=bias), Dropout(dropout)
        self._set(
            norm_first=norm_first,
            self_attn=MultiHeadAttention(
                embed_dim, num_heads, bias=bias, dropout=dropout, is_causal=is_causal, rotary=rotary
            ),
            multihead_attn=MultiHeadAttention(embed_dim, num_heads, bias=bias, dropout=dropout),
            linear1=Dense(embed_dim, dim_feedforward, activation, bias=bias),
            linear2=Dense(dim_feedforward, embed_dim, bias=bias),
            norm1=norm,
            norm2=norm,
            norm3=norm,
            dropout=drop,
            dropout1=drop,
            dropout2=drop,
            dropout3=drop,
        )

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the sequence after both attentions and the dense layers, and the states of the dropouts."""
        x, memory, mask, memory_mask = self._parts(x, most=4, least=2)
        call, new = self._caller(ps, st)
        x = self._residual(call, 1, lambda x: call("self_attn", (x, x, x, mask)), x)
        x = self._residual(call, 2, lambda x: call("multihead_attn", (x, memory, memory, memory_mask)), x)
        x = self._residual(call, 3, lambda x: call("linear2", call("dropout", call("linear1", x))), x)
        return x, new

    def has_mask(self, x: Any) -> bool:
        """Return whether an input includes a mask."""
        return isinstance(x, tuple) and any(mask is not None for mask in x[2:])

    def expected_input(self) -> str:
        """Name the width, and the tuples."""
        width = self.linear1.in_features
        return (
            f"a tuple of x (..., length, {width}) and memory (..., memory_length, {width}), "
            "and perhaps their masks: (x, memory, mask, memory_mask)"
        )


class _Stack(NamedLayers):
    """Base class of the stacks: layers one after another, each with the same masks and memory."""

    norm: Layer | None

    def _set_layers(self, layer: Any, kind: type[_TransformerLayer], num_layers: int, norm: Layer | None) -> None:
        if not isinstance(layer, kind):
            raise out_of_range("layer", layer, f"a {kind.__name__}")
        if norm is not None and not isinstance(norm, Layer):
            raise out_of_range("norm", norm, "a layer, or None")
        require_size("num_layers", num_layers)
        self._set(names=tuple(f"layer_{i}" for i in range(1, num_layers + 1)), layers=(layer,) * num_layers, norm=norm)

    def children(self) -> Mapping[str, Layer]:
        """Return the layers by name, and the last one, if there is one."""
        layers = super().children()
        return layers if self.norm is None else {**layers, "norm": self.norm}

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the sequence after all layers, and their states."""
        y, *others = x if isinstance(x, tuple) else (x,)
        new = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            y, new[name] = layer((y, *others), ps[name], st[name])
        if self.norm is not None:
            y, new["norm"] = self.norm(y, ps["norm"], st["norm"])
        return y, new

    def has_mask(self, x: Any) -> bool:
        """Return whether an input includes a mask."""
        return self.layers[0].has_mask(x)  # type: ignore[attr-defined,no-any-return]

    def expected_input(self) -> str:
        """Name what each of the layers takes."""
        return self.layers[0].expected_input()


class TransformerEncoder(_Stack):
    """A stack of encoder layers, all with the same mask.

    Args:
        layer: The layer; each of the stack has initial values of its own.
        num_layers: How many there are.
        norm: A layer after the last one, such as `LayerNorm(embed_dim)` where the layers normalize first; or None.

    Parameters:
        layer_1, layer_2, ...: Those of the layers.
        norm: Those of the last one, if there is one.

    States:
        Likewise.

    Shape:
        Whatever the layer takes, x (..., length, embed_dim) or `(x, mask)`; to the same as x.

    Raises:
        InputError: If the layer is not a `TransformerEncoderLayer`, or there are none.

    Example:
        >>> import torch, luxtorch as lt
        >>> block = lt.TransformerEncoderLayer(8, 2, 16, norm_first=True)
        >>> model = lt.TransformerEncoder(block, 3, norm=lt.LayerNorm(8))
        >>> ps, st = lt.setup(0, model)
        >>> padding = torch.tensor([[True, True, False]] * 5)
        >>> y, st = model((torch.ones(5, 3, 8), padding[:, None, None, :]), ps, st)
        >>> y.shape
        torch.Size([5, 3, 8])

    Source: `torch.nn.TransformerEncoder`.
    """

    def __init__(self, layer: TransformerEncoderLayer, num_layers: int, norm: Layer | None = None) -> None:
        self._set_layers(layer, TransformerEncoderLayer, num_layers, norm)


class TransformerDecoder(_Stack):
    """A stack of decoder layers, all with the same memory and masks.

    Args:
        layer: The layer; each of the stack has initial values of its own.
        num_layers: How many there are.
        norm: A layer after the last one, such as `LayerNorm(embed_dim)` where the layers normalize first; or None.

    Parameters:
        layer_1, layer_2, ...: Those of the layers.
        norm: Those of the last one, if there is one.

    States:
        Likewise.

    Shape:
        Whatever the layer takes, `(x, memory)`, `(x, memory, mask)` or `(x, memory, mask, memory_mask)`; to the same
        as x.

    Raises:
        InputError: If the layer is not a `TransformerDecoderLayer`, or there are none.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.TransformerDecoder(lt.TransformerDecoderLayer(8, 2, 16, is_causal=True), 3)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model((torch.ones(5, 3, 8), torch.ones(5, 4, 8)), ps, st)
        >>> y.shape
        torch.Size([5, 3, 8])

    Source: `torch.nn.TransformerDecoder`.
    """

    def __init__(self, layer: TransformerDecoderLayer, num_layers: int, norm: Layer | None = None) -> None:
        self._set_layers(layer, TransformerDecoderLayer, num_layers, norm)
