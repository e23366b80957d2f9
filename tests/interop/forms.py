"""The forms in which each module of torch.nn is tested."""

from __future__ import annotations

import inspect
from functools import partial

import torch
import torch.nn.functional as F

from luxtorch.interop import Inputs as I

from .grid import (
    CL,
    Form,
    K,
    N,
    S,
    U,
    nn,
    orthogonal,
    orthogonal_cayley,
    orthogonal_householder,
    packed,
    seen,
    spectral_norm,
    weight_norm,
)

TRAIN, ALWAYS = (True,), (True, False)

# Why torch cannot do what a law asks for.
PACKED = dict.fromkeys(("purity", "vmap_inputs", "vmap_models", "jit"), "a PackedSequence is not a tree of tensors")
SCALED = dict.fromkeys(("forward", "orders"), "the gradient that scale_grad_by_freq scales is not a derivative")
OLD = {
    **dict.fromkeys(
        ("gradient", "forward", "orders", "vmap_inputs"),
        "an autograd.Function without setup_context, which no transform takes",
    ),
    "compile": "the compiler has no resize_as_",
}
EMPTY = {"orders": "torch cannot reshape the gradient of no rows"}
READ = {"gradient": "once torch has read that a mask is causal, it gives no derivative by it"}
CLUSTERS = dict.fromkeys(
    ("vmap_inputs", "vmap_models", "jit"), "how many targets lie in a cluster decides about shapes"
)
CLUSTERS |= {"compile": CLUSTERS["vmap_inputs"]}
CTC = {"gradient": "torch takes the gradient by the scores of which log_softmax was taken"}
UNPICKLED = {"copy": "torch refuses to pickle parametrized modules"}

LOOPED = {
    "MaxUnpool1d": "max_unpool2d",
    "MaxUnpool2d": "max_unpool2d",
    "MaxUnpool3d": "max_unpool3d",
    "orthogonal": "tril_",
    "orthogonal_cayley": "tril_",
    "orthogonal_householder": "tril_",
}
"""Modules, or parametrizations, and their torch functions that vmap has no rule for: it loops, and warns."""

IMAGES = (N(2, 3, 6, 5), N(3, 6, 5))
DIMS = {1: (7,), 2: (6, 5), 3: (4, 5, 3)}


def _dense():
    yield Form(nn.Linear(3, 2), N(4, 3), N(3), N(2, 4, 3), N(0, 3))
    yield Form(nn.Linear(3, 2, bias=False), N(4, 3))
    yield Form(nn.LazyLinear(2), N(4, 3), prepare=seen(1, 3))
    yield Form(nn.Identity(), N(4, 3), K(5, 2))
    yield Form(nn.Identity(5, unused=2), N(4, 3))
    yield Form(nn.Bilinear(3, 4, 2), I(N(5, 3), N(5, 4)), I(N(3), N(4)), I(N(2, 5, 3), N(2, 5, 4)))
    yield Form(nn.Bilinear(3, 4, 2, bias=False), I(input1=N(5, 3), input2=N(5, 4)))
    yield Form(nn.Embedding(6, 3), K(6, 4), K(6, 2, 4), K(6))
    yield Form(nn.Embedding(6, 3), K(6, 0), skip=EMPTY)
    for options in ({"padding_idx": 2}, {"padding_idx": -1}, {"max_norm": 0.5}, {"max_norm": 0.5, "norm_type": 1.0}):
        yield Form(nn.Embedding(6, 3, **options), K(6, 8))
    yield Form(nn.Embedding(6, 3, scale_grad_by_freq=True), K(6, 8), skip=SCALED)
    for mode in ("mean", "sum", "max"):
        yield Form(nn.EmbeddingBag(6, 3, mode=mode), K(6, 4, 2), I(K(6, 5), torch.tensor([0, 2, 2])))
        yield Form(nn.EmbeddingBag(6, 3, mode=mode, padding_idx=1), K(6, 4, 2))
    yield Form(nn.EmbeddingBag(6, 3, mode="sum"), I(K(6, 4, 2), per_sample_weights=N(4, 2)))
    yield Form(nn.EmbeddingBag(6, 3, max_norm=0.5), K(6, 4, 2))
    yield Form(nn.EmbeddingBag(6, 3, include_last_offset=True), I(K(6, 5), torch.tensor([0, 2, 5])))


def _convolutions():
    for dims, sizes in DIMS.items():
        kind = getattr(nn, f"Conv{dims}d")
        yield Form(kind(4, 6, 3), N(2, 4, *sizes), N(4, *sizes), N(0, 4, *sizes))
        for options in (
            {"stride": 2, "padding": 1},
            {"padding": "same", "dilation": 2},
            {"padding": "valid", "bias": False},
            {"groups": 2, "stride": 2, "padding": (1,) * dims},
        ):
            yield Form(kind(4, 6, (2, 3, 3)[-dims:], **options), N(2, 4, *sizes))
        for mode in ("reflect", "replicate", "circular"):
            yield Form(kind(4, 6, 3, padding=(1, 2, 1)[:dims], padding_mode=mode), N(2, 4, *sizes))
        yield Form(kind(4, 6, (2, 3, 3)[:dims], padding="same", padding_mode="circular"), N(2, 4, *sizes))
        yield Form(getattr(nn, f"LazyConv{dims}d")(6, 3), N(2, 4, *sizes), prepare=seen(1, 4, *sizes))

        kind = getattr(nn, f"ConvTranspose{dims}d")
        yield Form(kind(4, 6, 3), N(2, 4, *sizes), N(4, *sizes))
        yield Form(kind(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False), N(2, 4, *sizes))
        yield Form(kind(4, 6, (2, 3, 3)[-dims:], stride=2, groups=2, dilation=2), N(2, 4, *sizes))
        larger = tuple(2 * size + 1 for size in sizes)
        yield Form(kind(4, 6, 2, stride=2), N(2, 4, *sizes), options={"output_size": larger})
        yield Form(getattr(nn, f"LazyConvTranspose{dims}d")(6, 3), N(2, 4, *sizes), prepare=seen(1, 4, *sizes))
    yield Form(nn.Conv2d(4, 8, 3, padding=1), CL(2, 4, 6, 5))
    yield Form(nn.ConvTranspose2d(4, 8, 3), CL(2, 4, 6, 5))
    yield Form(nn.Unfold(2), N(2, 3, 6, 5), N(3, 6, 5))
    yield Form(nn.Unfold((2, 3), dilation=2, padding=1, stride=(2, 1)), N(2, 3, 6, 5))
    yield Form(nn.Fold((4, 5), 2), N(2, 12, 12), N(12, 12))
    yield Form(nn.Fold((4, 5), (2, 3), padding=1, stride=2), N(2, 18, 9))


def _poolings():
    for dims, sizes in DIMS.items():
        x = (N(2, 3, *sizes), N(3, *sizes))
        for options in (
            {},
            {"stride": 1, "padding": 1},
            {"stride": 2, "ceil_mode": True},
            {"dilation": 2, "stride": 1, "padding": (1,) * dims},
        ):
            yield Form(getattr(nn, f"MaxPool{dims}d")(2, **options), *x)
        yield Form(getattr(nn, f"MaxPool{dims}d")(2, return_indices=True), *x)
        for options in (
            {},
            {"stride": 1, "padding": 1},
            {"stride": 2, "padding": (1,) * dims, "ceil_mode": True, "count_include_pad": False},
        ):
            yield Form(getattr(nn, f"AvgPool{dims}d")(3, **options), *x)
        if dims > 1:
            yield Form(getattr(nn, f"AvgPool{dims}d")((2, 3, 2)[:dims], divisor_override=2), *x)
        positive = (U(2, 3, *sizes), U(3, *sizes))
        for norm, options in ((1, {}), (2, {"stride": 1}), (3.5, {"stride": 2, "ceil_mode": True})):
            yield Form(getattr(nn, f"LPPool{dims}d")(norm, 2, **options), *positive)
        for size in (1, (3, 2, 2)[:dims], *([(None, 3, 2)[:dims]] if dims > 1 else [])):
            yield Form(getattr(nn, f"AdaptiveAvgPool{dims}d")(size), *x)
            yield Form(getattr(nn, f"AdaptiveMaxPool{dims}d")(size), *x)
        yield Form(getattr(nn, f"AdaptiveMaxPool{dims}d")(2, return_indices=True), *x)
        grid = torch.arange(8**dims).reshape((8,) * dims)[(slice(None, None, 2),) * dims][None].contiguous()
        yield Form(getattr(nn, f"MaxUnpool{dims}d")(2), I(N(1, *(4,) * dims), grid))
        yield Form(
            getattr(nn, f"MaxUnpool{dims}d")(2), I(N(1, *(4,) * dims), grid), options={"output_size": (9,) * dims}
        )
    yield Form(nn.MaxPool2d(3, 2, 1), CL(2, 3, 6, 5))
    yield Form(nn.AvgPool2d(3, 2, 1), CL(2, 3, 6, 5))
    for dims, sizes in ((2, (6, 5)), (3, (5, 6, 5))):
        kind = getattr(nn, f"FractionalMaxPool{dims}d")
        yield Form(kind(2, output_size=(2,) * dims), N(2, 3, *sizes), N(3, *sizes), random=ALWAYS)
        yield Form(kind(2, output_ratio=0.6, return_indices=True), N(2, 3, *sizes), random=ALWAYS)
        samples = torch.rand(2, 3, dims, generator=torch.Generator().manual_seed(0))
        for options in ({"output_size": 2}, {"output_ratio": 0.5, "return_indices": True}):
            # In three dimensions, one image may come with the samples of a batch.
            inputs = (N(2, 3, *sizes), *([N(3, *sizes)] if dims == 3 else []))
            yield Form(kind(2, _random_samples=samples, **options), *inputs)


def _normalizations():
    for dims, sizes in DIMS.items():
        batches = (N(4, 3, *sizes), N(2, 3, *sizes), N(0, 3, *sizes), *([N(5, 3)] if dims == 1 else []))
        kind = getattr(nn, f"BatchNorm{dims}d")
        yield Form(kind(3), *batches)
        for options in (
            {"momentum": None},
            {"momentum": 1},
            {"affine": False, "eps": 0.1},
            {"track_running_stats": False},
        ):
            yield Form(kind(3, **options), *batches)
        yield Form(getattr(nn, f"LazyBatchNorm{dims}d")(), *batches[:2], prepare=seen(2, 3, *sizes))
        samples = (N(4, 3, *sizes), N(3, *sizes))
        kind = getattr(nn, f"InstanceNorm{dims}d")
        for options in (
            {},
            {"affine": True},
            {"eps": 0.1, "affine": True, "track_running_stats": True},
            {"momentum": 0.5, "track_running_stats": True},
        ):
            yield Form(kind(3, **options), *samples)
        yield Form(getattr(nn, f"LazyInstanceNorm{dims}d")(), *samples, prepare=seen(2, 3, *sizes))
    yield Form(nn.BatchNorm2d(3), CL(2, 3, 6, 5))
    for call, x in (
        (nn.BatchNorm1d(3, bias=False), N(4, 3)),
        (nn.InstanceNorm1d(3, affine=True, bias=False), N(4, 3, 5)),
        (nn.GroupNorm(2, 4, bias=False), N(3, 4, 5)),
    ):
        if "bias" in inspect.signature(getattr(torch.nn, call.name)).parameters:  # not in every version
            yield Form(call, x)
    yield Form(nn.SyncBatchNorm(3), N(4, 3, 5), N(4, 3))
    yield Form(nn.LayerNorm(4), N(3, 4), N(4), N(2, 3, 4), N(0, 4))
    for options in ({"eps": 0.1}, {"elementwise_affine": False}, {"bias": False}):
        yield Form(nn.LayerNorm((3, 4), **options), N(2, 3, 4), N(3, 4))
    yield Form(nn.RMSNorm(4), N(3, 4), N(4), N(2, 3, 4), N(0, 4))
    yield Form(nn.RMSNorm((3, 4), eps=0.1), N(2, 3, 4))
    yield Form(nn.RMSNorm(4, elementwise_affine=False), N(3, 4))
    yield Form(nn.GroupNorm(2, 4), N(3, 4, 5), N(3, 4), N(1, 4, 2, 3), N(0, 4, 5))
    yield Form(nn.GroupNorm(4, 4, eps=0.1), N(3, 4, 5))
    yield Form(nn.GroupNorm(1, 4, affine=False), N(3, 4, 5))
    for options in ({}, {"alpha": 0.5, "beta": 0.6, "k": 2.0}):
        yield Form(nn.LocalResponseNorm(3, **options), N(2, 5, 4), N(2, 5, 3, 4))
        yield Form(nn.CrossMapLRN2d(3, **options), N(2, 5, 3, 4), skip=OLD)


def _activations():
    x = (N(4, 3), N(2, 3, 4), N(), N(0, 3))
    for name in [
        "CELU",
        "ELU",
        "GELU",
        "Hardshrink",
        "Hardsigmoid",
        "Hardswish",
        "Hardtanh",
        "LeakyReLU",
        "LogSigmoid",
        "Mish",
        "ReLU",
        "ReLU6",
        "SELU",
        "SiLU",
        "Sigmoid",
        "Softplus",
        "Softshrink",
        "Softsign",
        "Tanh",
        "Tanhshrink",
    ]:
        kind = getattr(nn, name)
        yield Form(kind(), *x)
        if "inplace" in inspect.signature(getattr(torch.nn, name)).parameters:
            yield Form(kind(inplace=True), *x)
    for call in (
        nn.CELU(0.5),
        nn.ELU(0.5),
        nn.GELU("tanh"),
        nn.Hardshrink(0.1),
        nn.Hardtanh(-0.5, 0.1),
        nn.LeakyReLU(-0.5),
        nn.Softplus(2.0, 1.0),
        nn.Softshrink(0.1),
        nn.Threshold(0.1, 20.0),
        nn.Threshold(0.1, 20.0, inplace=True),
    ):
        yield Form(call, *x)
    for name in ("Softmax", "LogSoftmax", "Softmin"):
        yield Form(getattr(nn, name)(dim=-1), N(4, 3), N(3), N(2, 3, 4))
        yield Form(getattr(nn, name)(dim=1), N(4, 3), N(2, 3, 4))
    yield Form(nn.Softmax2d(), *IMAGES)
    yield Form(nn.GLU(), N(3, 4), N(4))
    yield Form(nn.GLU(1), N(3, 4, 2))
    yield Form(nn.PReLU(), N(4, 3), N(3), N())
    yield Form(nn.PReLU(3, init=0.5), N(4, 3), N(4, 3, 2))
    yield Form(nn.RReLU(), N(4, 3), N(3), random=TRAIN)
    yield Form(nn.RReLU(0.2, 0.9, inplace=True), N(4, 3), random=TRAIN)
    yield Form(nn.RReLU(0.3, 0.3), N(4, 3))


def _dropouts():
    for name, shapes in {
        "Dropout": [(4, 3), (3,)],
        "AlphaDropout": [(4, 3), (3,)],
        "FeatureAlphaDropout": [(2, 3, 4), (2, 3, 4, 5)],
        "Dropout1d": [(2, 3, 7), (3, 7)],
        "Dropout2d": [(2, 3, 6, 5)],
        "Dropout3d": [(2, 3, 2, 3, 2), (3, 2, 3, 2)],
    }.items():
        for p in (0.5, 0.0, 1.0):
            yield Form(getattr(nn, name)(p), *(N(*shape) for shape in shapes), random=TRAIN if 0 < p < 1 else ())
        yield Form(getattr(nn, name)(0.3, inplace=True), *(N(*shape) for shape in shapes), random=TRAIN)


def _shapes():
    yield Form(nn.Flatten(), N(2, 3, 4), N(2, 3), N(0, 3, 4))
    yield Form(nn.Flatten(0, 1), N(2, 3, 4))
    yield Form(nn.Unflatten(1, (2, 3)), N(4, 6), N(4, 6, 5))
    yield Form(nn.Unflatten(-1, [2, -1]), N(4, 6), N(6))
    for dims, sizes in DIMS.items():
        x = (N(2, 3, *sizes), N(3, *sizes))
        for sides in (1, (1, 2, 0, 1, 2, 1)[: 2 * dims]):
            yield Form(getattr(nn, f"ConstantPad{dims}d")(sides, 3.5), *x)
            for mode in ("Zero", "Reflection", "Replication", "Circular"):
                yield Form(getattr(nn, f"{mode}Pad{dims}d")(sides), *x)
        yield Form(getattr(nn, f"ZeroPad{dims}d")((-1, 1) * dims), *x)
        linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims]
        for options in (
            {"scale_factor": 2},
            {"size": (5, 7, 3)[:dims]},
            {"size": 4, "mode": "nearest-exact"},
            {"scale_factor": 1.7, "mode": "area"},
            {"scale_factor": (1.5, 2.0, 0.7)[:dims], "mode": linear},
            {"size": 6, "mode": linear, "align_corners": True},
            {"scale_factor": 1.3, "mode": linear, "recompute_scale_factor": True},
        ):
            yield Form(nn.Upsample(**options), N(2, 3, *sizes))
    yield Form(nn.Upsample(scale_factor=2, mode="bicubic"), N(2, 3, 6, 5))
    yield Form(nn.Upsample(size=(4, 9), mode="bicubic", align_corners=True), N(2, 3, 6, 5))
    yield Form(nn.UpsamplingNearest2d(scale_factor=2), N(2, 3, 6, 5))
    yield Form(nn.UpsamplingBilinear2d(size=(4, 9)), N(2, 3, 6, 5))
    yield Form(nn.PixelShuffle(2), N(2, 8, 2, 3), N(8, 2, 3), N(2, 2, 4, 2, 3))
    yield Form(nn.PixelUnshuffle(2), N(2, 2, 4, 6), N(2, 4, 6), N(2, 2, 1, 4, 6))
    yield Form(nn.ChannelShuffle(2), N(2, 6, 3), N(2, 6, 2, 3))


def _recurrent():
    for name, states in (("RNN", 1), ("GRU", 1), ("LSTM", 2)):
        kind = getattr(nn, name)
        hidden = [N(1, 2, 4), (N(1, 2, 4), N(1, 2, 4))][states - 1]
        lone = [N(1, 4), (N(1, 4), N(1, 4))][states - 1]
        yield Form(kind(3, 4), N(5, 2, 3), I(N(5, 2, 3), hidden), N(5, 3), I(N(5, 3), lone))
        for options in (
            {"num_layers": 2, "bidirectional": True, "batch_first": True},
            {"bias": False},
            {"num_layers": 3},
            *([{"nonlinearity": "relu"}] if name == "RNN" else []),
            *([{"proj_size": 2, "bidirectional": True}] if name == "LSTM" else []),
        ):
            yield Form(kind(3, 4, **options), N(5, 2, 3))
        yield Form(kind(3, 4, num_layers=2, dropout=0.5), N(5, 2, 3), random=TRAIN)
        yield Form(kind(3, 4, bidirectional=True), packed(3, 5, 2), skip=PACKED)
        cell = getattr(nn, f"{name}Cell")
        start = [N(2, 4), (N(2, 4), N(2, 4))][states - 1]
        yield Form(cell(3, 4), N(2, 3), I(N(2, 3), start), N(3))
        yield Form(cell(3, 4, bias=False), I(N(2, 3), start))
    yield Form(nn.RNNCell(3, 4, nonlinearity="relu"), N(2, 3))


def _transformers():
    q, same = N(2, 5, 4), I(N(2, 5, 4), N(2, 6, 4), N(2, 6, 4))
    mask = torch.ones(5, 6, dtype=torch.bool).triu(2)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    attention = partial(nn.MultiheadAttention, 4, 2, batch_first=True)
    yield Form(nn.MultiheadAttention(4, 2), I(N(5, 2, 4), N(6, 2, 4), N(6, 2, 4)), I(N(5, 4), N(6, 4), N(6, 4)))
    yield Form(attention(), same)
    yield Form(attention(), I(*same.args, attn_mask=mask))
    yield Form(attention(), I(*same.args, attn_mask=N(5, 6)))
    yield Form(attention(), I(*same.args, key_padding_mask=padding))
    yield Form(attention(), same, options={"need_weights": False})
    yield Form(attention(), same, options={"average_attn_weights": False})
    yield Form(attention(), I(*[q] * 3, attn_mask=mask[:, :5]), options={"is_causal": True, "need_weights": False})
    yield Form(attention(bias=False, add_bias_kv=True, add_zero_attn=True), same)
    yield Form(attention(kdim=3, vdim=2), I(N(2, 5, 4), N(2, 6, 3), N(2, 6, 2)))
    yield Form(attention(dropout=0.5), same, random=TRAIN)
    encoder = partial(nn.TransformerEncoderLayer, 4, 2, 8, batch_first=True)
    decoder = partial(nn.TransformerDecoderLayer, 4, 2, 8, batch_first=True)
    still = {"dropout": 0.0}
    causal = torch.nn.Transformer.generate_square_subsequent_mask(5)
    for options in ({}, {"norm_first": True, "activation": "gelu"}, {"bias": False, "activation": F.silu}):
        yield Form(encoder(**still, **options), q, I(q, src_mask=causal))
        yield Form(decoder(**still, **options), I(q, N(2, 6, 4)), I(q, N(2, 6, 4), tgt_mask=causal))
    yield Form(encoder(**still), I(q, src_key_padding_mask=padding[:, :5]))
    yield Form(nn.TransformerEncoderLayer(4, 2, 8, 0.0), N(5, 2, 4), N(5, 4))
    yield Form(nn.TransformerDecoderLayer(4, 2, 8, 0.0), I(N(5, 2, 4), N(6, 2, 4)))
    yield Form(encoder(), q, random=TRAIN)
    yield Form(decoder(), I(q, N(2, 6, 4)), random=TRAIN)
    nested = {"enable_nested_tensor": False}
    yield Form(nn.TransformerEncoder(encoder(**still), 2, **nested), q)
    yield Form(nn.TransformerEncoder(encoder(**still), 2, **nested), I(q, mask=causal), skip=READ)
    yield Form(nn.TransformerEncoder(encoder(**still), 2, nn.LayerNorm(4), **nested), q)
    yield Form(nn.TransformerDecoder(decoder(**still), 2), I(q, N(2, 6, 4)))
    yield Form(nn.TransformerDecoder(decoder(**still), 2, nn.LayerNorm(4)), I(q, N(2, 6, 4)))
    yield Form(nn.Transformer(4, 2, 1, 1, 8, 0.0, batch_first=True), I(N(2, 6, 4), q), I(N(6, 4), N(5, 4)))
    yield Form(nn.Transformer(4, 2, 1, 1, 8, 0.0), I(N(6, 2, 4), N(5, 2, 4), tgt_mask=causal), skip=READ)


def _distances():
    pair = (I(N(4, 3), N(4, 3)), I(N(3), N(3)))
    yield Form(nn.CosineSimilarity(), I(N(4, 3), N(4, 3)), I(N(4, 3, 2), N(4, 3, 2)))
    yield Form(nn.CosineSimilarity(dim=-1, eps=0.1), *pair)
    yield Form(nn.PairwiseDistance(), *pair)
    yield Form(nn.PairwiseDistance(p=1.0, eps=0.1, keepdim=True), *pair)


def _losses():
    x, y = N(4, 3), N(4, 3)
    positive, chance = U(4, 3), U(4, 3)
    for reduction in ("mean", "sum", "none"):
        r = {"reduction": reduction}
        for call in (nn.L1Loss(**r), nn.MSELoss(**r), nn.SmoothL1Loss(**r, beta=0.5), nn.HuberLoss(**r, delta=0.5)):
            yield Form(call, I(x, y), I(N(), N()))
        yield Form(nn.SoftMarginLoss(**r), I(x, S(4, 3)))
        yield Form(nn.HingeEmbeddingLoss(**r, margin=0.5), I(x, S(4, 3)))
        yield Form(nn.MarginRankingLoss(**r, margin=0.2), I(N(4), N(4), S(4)))
        yield Form(nn.CosineEmbeddingLoss(**r, margin=0.2), I(x, y, S(4)))
        yield Form(nn.TripletMarginLoss(**r), I(x, y, N(4, 3)))
        yield Form(nn.TripletMarginWithDistanceLoss(**r), I(x, y, N(4, 3)))
        yield Form(nn.BCELoss(**r), I(positive, chance))
        yield Form(nn.BCELoss(torch.tensor([0.5, 1.0, 2.0]), **r), I(positive, chance))
        yield Form(nn.BCEWithLogitsLoss(**r), I(x, chance))
        yield Form(nn.BCEWithLogitsLoss(torch.tensor([0.5, 1.0, 2.0]), pos_weight=torch.tensor(3.0), **r), I(x, chance))
        yield Form(nn.PoissonNLLLoss(**r), I(x, positive))
        yield Form(nn.PoissonNLLLoss(**r, log_input=False, full=True), I(positive, U(4, 3)))
        yield Form(nn.GaussianNLLLoss(**r), I(x, y, positive))
        yield Form(nn.GaussianNLLLoss(**r, full=True), I(x, y, U(4, 1)))
        yield Form(nn.KLDivLoss(**r), I(x, positive))
        yield Form(nn.KLDivLoss(**r, log_target=True), I(x, y))
        yield Form(nn.CrossEntropyLoss(**r), I(x, K(3, 4)), I(N(3), K(3)), I(N(2, 3, 5), K(3, 2, 5)), I(x, positive))
        yield Form(
            nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0]), label_smoothing=0.1, **r), I(x, K(3, 4)), I(x, U(4, 3))
        )
        yield Form(nn.CrossEntropyLoss(ignore_index=1, **r), I(N(9, 3), K(3, 9)))
        yield Form(nn.NLLLoss(**r), I(x, K(3, 4)), I(N(3), K(3)), I(N(2, 3, 5), K(3, 2, 5)))
        yield Form(nn.NLLLoss(torch.tensor([0.5, 1.0, 2.0]), ignore_index=1, **r), I(N(9, 3), K(3, 9)))
        yield Form(nn.MultiMarginLoss(**r), I(x, K(3, 4)), I(N(3), K(3)))
        yield Form(nn.MultiMarginLoss(p=2, margin=0.5, weight=torch.tensor([0.5, 1.0, 2.0]), **r), I(x, K(3, 4)))
        yield Form(nn.MultiLabelMarginLoss(**r), I(x, torch.tensor([[0, 2, -1], [1, -1, 0], [-1, 0, 1], [2, 1, 0]])))
        yield Form(nn.MultiLabelSoftMarginLoss(**r), I(x, K(2, 4, 3)))
        yield Form(nn.MultiLabelSoftMarginLoss(torch.tensor([0.5, 1.0, 2.0]), **r), I(x, U(4, 3)))
        yield Form(
            nn.CTCLoss(**r),
            I(N(6, 2, 4), torch.tensor([[1, 2, 3], [2, 2, 1]]), torch.tensor([6, 5]), torch.tensor([3, 2])),
            skip=CTC,
        )
        yield Form(
            nn.CTCLoss(blank=3, zero_infinity=True, **r),
            I(N(6, 2, 4), torch.tensor([[1, 2], [2, 0]]), torch.tensor([6, 5]), torch.tensor([2, 2])),
            skip=CTC,
        )
    yield Form(
        nn.CTCLoss(),
        I(N(6, 2, 4), torch.tensor([1, 2, 3, 2, 2]), torch.tensor([6, 5]), torch.tensor([3, 2])),
        I(N(6, 4), torch.tensor([1, 1]), torch.tensor(5), torch.tensor(2)),
        skip=CTC,
    )
    yield Form(nn.KLDivLoss(reduction="batchmean"), I(x, positive), I(N(), U()))
    yield Form(nn.TripletMarginLoss(p=1.0, swap=True, margin=0.3), I(x, y, N(4, 3)))
    yield Form(nn.TripletMarginWithDistanceLoss(distance_function=F.pairwise_distance, swap=True), I(x, y, N(4, 3)))
    for bias in (True, False):
        yield Form(
            nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3, 6], div_value=2.0, head_bias=bias),
            I(N(5, 4), K(9, 5)),
            skip=CLUSTERS,
        )
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        yield Form(nn.LinearCrossEntropyLoss(4, 3), I(N(5, 4), K(3, 5)))
        yield Form(
            nn.LinearCrossEntropyLoss(4, 3, bias=True, label_smoothing=0.1, reduction="sum"), I(N(5, 4), K(3, 5))
        )
        chunks = nn.LinearCrossEntropyOptions(allow_retain_graph=True, batch_chunk_size=2)
        yield Form(nn.LinearCrossEntropyLoss(4, 3, options=chunks), I(N(5, 4), K(3, 5)))


def _containers():
    yield Form(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), N(5, 3))
    yield Form(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Dropout2d(), nn.Flatten())), N(2, 3, 6, 5), random=TRAIN
    )
    yield Form(nn.Sequential(), N(2, 3))


def _parametrized():
    for prepare in (weight_norm, spectral_norm, orthogonal, orthogonal_cayley, orthogonal_householder):
        yield Form(nn.Linear(3, 4), N(5, 3), prepare=prepare, skip=UNPICKLED)
    yield Form(nn.Conv2d(3, 4, 2), N(2, 3, 6, 5), prepare=weight_norm, skip=UNPICKLED)
    yield Form(nn.ConvTranspose2d(3, 4, 2), N(2, 3, 6, 5), prepare=spectral_norm, skip=UNPICKLED)


FORMS = [
    form
    for family in (
        _dense,
        _convolutions,
        _poolings,
        _normalizations,
        _activations,
        _dropouts,
        _shapes,
        _recurrent,
        _transformers,
        _distances,
        _losses,
        _containers,
        _parametrized,
    )
    for form in family()
]
