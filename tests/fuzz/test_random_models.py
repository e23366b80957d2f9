"""Random models out of all layers keep every law.

A model is grown from the shape of its input: whatever fits the shape may come next. `FUZZ_MODELS` says how many are
tried, `FUZZ_SEED` which; one in two is also jitted, and one in ten compiled and called with wrong names. `SpectralNorm`
is left out, whose derivative finite differences do not know, and `Embedding`, which takes no real numbers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch.nn.functional import softplus

import luxtorch as lt
from luxtorch.testing._laws import LAWS
from luxtorch.testing._orders import EVERY

MODELS = int(os.environ.get("FUZZ_MODELS", "80"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
LARGEST = 96  # numbers in a sample
BATCH = 4
EPS = 0.1  # with less a normalization of nearly equal numbers has no derivative to speak of

Shape = tuple[int, ...]
Draw = Callable[[st.SearchStrategy[Any]], Any]

# Finite differences mean little across many kinks at once: most functions are smooth.
ACTIVATIONS = st.sampled_from([None, "tanh", "sigmoid", "gelu", "softplus", "swish", "mish", torch.sin, torch.tanh])
FUNCTIONS = st.sampled_from([torch.tanh, torch.sin, torch.sigmoid, torch.neg])
JOINS = st.sampled_from([torch.add, torch.sub, torch.mul])
WIDTHS = st.integers(1, 4)
LINEAR = {1: ["linear"], 2: ["bilinear", "bicubic"], 3: ["trilinear"]}
MODES = st.sampled_from([lt.train_mode, lt.test_mode])
DTYPES = st.sampled_from([*[torch.float64] * 4, torch.float32, torch.bfloat16])
WORD = st.sampled_from([word for word in EVERY if len(word) == 3])  # two of them a model, drawn like the model
EXACT = ["setup", "purity", "state", "value", "names"]  # in other dtypes than double, rounding grows with the layers
# The laws that are left out: compiling takes longer than all others together, and jit as long.
SELDOM = st.sampled_from([("compile", "jit", "names")] * 5 + [("compile", "names")] * 4 + [()])


def channel_layer(draw: Draw, shape: Shape) -> lt.Layer:
    """Draw a layer for samples of features, or of channels and then anything."""
    n, activation = shape[0], draw(ACTIVATIONS)
    affine = draw(st.booleans())
    kinds = [
        lambda: lt.BatchNorm(
            n,
            activation,
            eps=EPS,
            affine=affine,
            track_running_stats=draw(st.booleans()),
            momentum=draw(st.sampled_from([0.1, 0.5, None])),
        ),
        lambda: lt.Chain(untied(shape), lt.PReLU(draw(st.sampled_from([1, n])))),
        lambda: lt.FlattenLayer(),
        lambda: lt.ReshapeLayer(math.prod(shape), 1),
        lambda: lt.WrappedFunction(draw(FUNCTIONS)),
        lambda: lt.NoOpLayer(),
    ]
    if groups := [g for g in (1, 2, 3, 4) if n % g == 0 and math.prod(shape) > g]:
        kinds.append(lambda: lt.GroupNorm(n, draw(st.sampled_from(groups)), activation, eps=EPS, affine=affine))
    return draw(st.sampled_from(kinds))()


def last_dim_layer(draw: Draw, shape: Shape) -> lt.Layer:
    """Draw a layer that works along the last dimension, or anywhere."""
    n, m, activation, bias = shape[-1], draw(WIDTHS), draw(ACTIVATIONS), draw(st.booleans())
    p = draw(st.sampled_from([0.0, 0.3, 0.5]))
    kinds = [
        lambda: lt.Dense(n, m, activation, bias=bias),
        lambda: lt.Scale(n, activation=activation, bias=bias),
        lambda: lt.Scale(*shape, activation=activation),
        lambda: lt.Bilinear(n, n, m, activation, bias=bias),
        lambda: lt.Chain(lt.Dense(n, 2 * m), lt.GLU()),
        lambda: lt.LayerNorm(shape[draw(st.integers(0, len(shape) - 1)) :], activation, eps=EPS),
        lambda: lt.RMSNorm(shape[draw(st.integers(0, len(shape) - 1)) :], eps=EPS),
        lambda: lt.Dropout(p),
        lambda: lt.AlphaDropout(p),
        lambda: lt.VariationalHiddenDropout(p),
        lambda: lt.WeightNorm(lt.Dense(n, m, activation, bias=bias), dim=draw(st.sampled_from([0, 1]))),
        lambda: lt.Chain(lt.Dense(n, 2), lt.RotaryPositionalEmbedding(2, max_sequence_length=LARGEST)),
        lambda: lt.SinusoidalPositionalEmbedding(2),
        lambda: lt.compact(residual, inner=lt.Dense(n, n, activation), scale=lt.init_fn(lt.init.ones, (n,))),
    ]
    if len(shape) == 1:
        kinds.append(lambda: lt.StatefulRecurrentCell(cell(draw, n), batch_size=BATCH))
    return draw(st.sampled_from(kinds))()


def cell(draw: Draw, n: int) -> lt.Cell:
    """Draw a recurrent cell for samples of n features."""
    m, bias, train = draw(WIDTHS), draw(st.booleans()), draw(st.booleans())
    kinds = [
        lambda: lt.RNNCell(n, m, draw(st.sampled_from(["tanh", "softplus"])), bias=bias, train_state=train),
        lambda: lt.LSTMCell(n, m, bias=bias, train_state=train, train_memory=not train),
        lambda: lt.GRUCell(n, m, bias=bias, train_state=train, init_state=lt.init.normal),
        lambda: lt.StackedCell(lt.GRUCell(n, m), lt.LSTMCell(m, 2), dropout=draw(st.sampled_from([0.0, 0.5]))),
    ]
    return draw(st.sampled_from(kinds))()


def sequence_layer(draw: Draw, shape: Shape) -> lt.Layer:
    """Draw a layer for samples of a time and of features."""
    n, heads, causal = shape[-1], draw(st.integers(1, 2)), draw(st.booleans())
    kv_heads, dropout = draw(st.integers(1, heads)) if heads < 3 else 1, draw(st.sampled_from([0.0, 0.3]))
    kinds = [
        lambda: lt.Recurrence(cell(draw, n), return_sequence=draw(st.booleans())),
        lambda: lt.BidirectionalRNN(lt.LSTMCell(n, 2), lt.GRUCell(n, 2), draw(st.sampled_from(["cat", torch.sub]))),
        lambda: lt.Chain(
            lt.Dense(n, 4),
            lt.MultiHeadAttention(4, heads, num_kv_heads=kv_heads, is_causal=causal, dropout=dropout),
        ),
        lambda: lt.Chain(
            lt.Dense(n, 4),
            lt.TransformerEncoderLayer(4, heads, 3, dropout=dropout, activation="gelu", norm_first=causal, eps=EPS),
        ),
    ]
    return draw(st.sampled_from(kinds))()


def spatial_layer(draw: Draw, shape: Shape) -> lt.Layer:
    """Draw a layer for samples of channels and one to three further dimensions."""
    (channels, *sizes), activation = shape, draw(ACTIVATIONS)
    dims = len(sizes)
    kernel = tuple(draw(st.integers(1, min(3, size))) for size in sizes)
    groups, bias = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0])), draw(st.booleans())
    padding = draw(st.sampled_from([0, 1, "same"]))
    pool_padding = draw(st.sampled_from([0, "same"]))
    stride = draw(st.integers(1, 2))
    kinds = [
        lambda: lt.Conv(
            kernel,
            channels,
            groups * draw(st.integers(1, 2)),
            activation,
            stride=stride,
            padding=padding,
            groups=groups,
            bias=bias,
            padding_mode=draw(st.sampled_from(["zeros", "replicate", "circular"])) if padding != 1 else "zeros",
        ),
        lambda: lt.ConvTranspose(
            kernel, channels, groups * draw(st.integers(1, 2)), activation, groups=groups, bias=bias
        ),
        lambda: lt.Chain(untied(shape), lt.MaxPool(kernel, stride=stride, padding=pool_padding)),
        lambda: lt.MeanPool(kernel, stride=stride, padding=pool_padding),
        lambda: lt.Chain(softplus, lt.LPPool(kernel, stride=stride, p=draw(st.sampled_from([1.0, 2.0, 3.0])))),
        lambda: lt.Chain(softplus, lt.GlobalLPPool()),
        lambda: lt.Chain(untied(shape), lt.GlobalMaxPool()),
        lambda: lt.GlobalMeanPool(),
        lambda: lt.Chain(untied(shape), lt.AdaptiveMaxPool(tuple(draw(st.integers(1, size)) for size in sizes))),
        lambda: lt.AdaptiveMeanPool(tuple(draw(st.integers(1, 3)) for _ in sizes)),
        lambda: lt.Upsample(
            scale_factor=2, mode=draw(st.sampled_from(["nearest", ["linear", "bilinear", "trilinear"][dims - 1]]))
        ),
        lambda: lt.Chain(lt.Conv((1,) * dims, channels, 2**dims), lt.PixelShuffle(2)),
        lambda: lt.FeatureDropout(draw(st.sampled_from([0.0, 0.5]))),
        lambda: lt.SelectDim(-1, draw(st.integers(0, sizes[-1] - 1))),
        lambda: lt.ReverseSequence(draw(st.integers(1, dims + 1))),
    ]
    if math.prod(sizes) > 1:
        kinds.append(lambda: lt.InstanceNorm(channels, activation, eps=EPS, affine=bias, track_running_stats=bias))
    return draw(st.sampled_from(kinds))()


def untied(shape: Shape) -> lt.Layer:
    """Return a layer that makes equal numbers different, as a maximum needs them to have a derivative."""
    return lt.Scale(*shape, init_bias=lt.init.normal)


def container(draw: Draw, shape: Shape, depth: int) -> lt.Layer:
    """Draw a container with models inside."""

    def inside() -> lt.Layer:
        return draw(models(shape, depth - 1))

    def same_shape() -> lt.Layer:
        """Draw a model whose output has the shape of its input."""
        layer = inside()
        return layer if shape_after(layer, shape) == shape else lt.Chain(lt.Scale(*shape), torch.tanh)

    def shapes_agree() -> list[lt.Layer]:
        return [same_shape() for _ in range(draw(st.integers(1, 3)))]

    kinds = [
        inside,
        lambda: lt.Chain(first=inside()),
        lambda: lt.SkipConnection(same_shape(), draw(JOINS)),
        lambda: lt.SkipConnection(same_shape(), lt.Parallel(draw(JOINS), lt.Scale(*shape), same_shape())),
        lambda: lt.Parallel(total, *shapes_agree()),
        lambda: lt.BranchLayer(*shapes_agree(), fusion=total),
        lambda: lt.PairwiseFusion(draw(JOINS), *shapes_agree()),
        lambda: lt.Maxout(untied(shape), lt.Chain(untied(shape), torch.cos)),
        lambda: repeated(same_shape(), draw(st.integers(1, 3))),
        lambda: lt.AlternatePrecision(torch.float64, inside()),
    ]
    return draw(st.sampled_from(kinds))()


def repeated(layer: lt.Layer, repeats: int) -> lt.Layer:
    """Repeat a layer, unless it holds a recurrent cell whose carry is in its state."""
    try:
        return lt.RepeatedLayer(layer, repeats)
    except lt.InputError:
        return layer


def residual(m: lt.Parts, x: torch.Tensor) -> torch.Tensor:
    """Be the body of a compact model."""
    return x + m.scale * m.inner(x)


def total(*ys: torch.Tensor) -> torch.Tensor:
    """Add what branches return."""
    return torch.stack(ys).sum(0)


def shape_after(layer: lt.Layer, shape: Shape) -> Shape:
    """Return the shape of a sample's output, by a call: for small inputs it is faster than `lt.output_shape`."""
    return tuple(layer(torch.ones(BATCH, *shape), *lt.setup(0, layer))[0].shape[1:])


@st.composite
def models(draw: Draw, shape: Shape, depth: int = 2, longest: int = 2) -> lt.Layer:
    """Draw a chain of layers, each fitted to the shape that comes out of the one before."""
    layers: list[lt.Layer] = []
    for _ in range(draw(st.integers(1, longest))):
        kinds = [last_dim_layer, channel_layer] * 2
        kinds += [spatial_layer] * 4 if 2 <= len(shape) <= 4 else []
        kinds += [sequence_layer] * 3 if len(shape) == 2 else []
        kinds += [lambda d, s: container(d, s, depth)] if depth else []
        layer = draw(st.sampled_from(kinds))(draw, shape)
        after = shape_after(layer, shape)
        if 0 < math.prod(after) <= LARGEST and len(after) > 0:
            layers.append(layer)
            shape = after
    return lt.Chain(*layers)


INPUTS = {
    "features": st.tuples(WIDTHS),
    "sequences": st.tuples(WIDTHS, st.integers(2, 5)),
    "images": st.tuples(WIDTHS, st.integers(2, 4), st.integers(2, 4)),
    "volumes": st.tuples(st.integers(1, 2), st.integers(2, 3), st.integers(2, 3), st.integers(2, 3)),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_random_models_keep_every_law(kind):
    @seed(SEED)
    @settings(
        max_examples=MODELS // len(INPUTS), suppress_health_check=list(HealthCheck), derandomize=False, database=None
    )
    @given(st.data())
    def check(data):
        shape = data.draw(INPUTS[kind], label="shape")
        model = data.draw(models(shape, longest=12), label="model")
        mode, number = data.draw(MODES), data.draw(st.integers(0, 2**32 - 1), label="seed")
        seldom = data.draw(SELDOM)
        words = (data.draw(WORD, label="word"), data.draw(WORD, label="word"))
        dtype = data.draw(DTYPES, label="dtype")
        torch.compiler.reset()
        with default_dtype(dtype):
            lt.testing.check_layer(
                model,
                lt.random.normal(lt.random.key(number), (BATCH, *shape)),
                rng=number,
                modes=(mode,),
                laws=[law for law in (LAWS if dtype == torch.float64 else EXACT) if law not in seldom],
                words=words,
            )

    check()


@contextmanager
def default_dtype(dtype):
    """Let parameters, states and inputs be made in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
