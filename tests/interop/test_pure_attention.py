"""Attention in the forward of a module: torch's numbers, under every transform."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, jvp, vmap

import luxtorch as lt
import luxtorch.random as lr
from luxtorch.core import Static, flatten_names, tree_map
from luxtorch.interop import Inputs, from_torch
from luxtorch.interop.pure._keys import Keys
from luxtorch.interop.pure._mode import PureMode

KEEP = torch.tensor([[False, False, False], [True, True, False], [True, False, True]])
MASKS = {
    "no mask": None,
    "boolean": KEEP,
    "added": torch.tensor([[-math.inf] * 3, [0.5, -1.0, -math.inf], [0.0, 0.3, 2.0]], dtype=torch.float64),
}
SHAPES = {
    "matrices": ((3, 4),) * 3,
    "batch": ((2, 3, 4),) * 3,
    "heads": ((2, 2, 3, 4),) * 3,
    "broadcast": ((2, 2, 3, 4), (2, 3, 4), (1, 1, 3, 4)),
}


@pytest.fixture
def draw(rng):
    return lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)


def pure(function, key):
    def call(*args, **kwargs):
        with PureMode(Keys(key)):
            return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(("mask", "is_causal"), [*((mask, False) for mask in MASKS), ("no mask", True)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients_are_torchs(make_key, draw, shapes, mask, scale, is_causal):
    inputs = [draw(*shape) for shape in SHAPES[shapes]]
    options = {"attn_mask": MASKS[mask], "is_causal": is_causal, "scale": scale}
    taped = [x.clone().requires_grad_() for x in inputs]
    expected = F.scaled_dot_product_attention(*taped, **options)
    expected_grads = torch.autograd.grad(expected.sin().sum(), taped)
    attention = pure(F.scaled_dot_product_attention, make_key())

    def loss(*inputs):
        return attention(*inputs, **options).sin().sum()

    torch.testing.assert_close(attention(*inputs, **options), expected.detach())
    grads = grad(loss, (0, 1, 2))(*inputs)
    torch.testing.assert_close(grads, expected_grads)
    directions = tuple(draw(*x.shape) for x in inputs)
    _, slope = jvp(loss, tuple(inputs), directions)
    pairs = zip(expected_grads, directions, strict=True)
    torch.testing.assert_close(slope, sum((g * direction).sum() for g, direction in pairs))
    batch = [torch.stack([x, 2 * x]) for x in inputs]
    ys = vmap(lambda *inputs: attention(*inputs, **options))(*batch)
    torch.testing.assert_close(ys[1], attention(*(2 * x for x in inputs), **options))


def test_second_derivatives_of_an_ordinary_tape(make_key, draw):
    q = draw(2, 2, 3, 4).requires_grad_()
    attention = pure(F.scaled_dot_product_attention, make_key())
    (first,) = torch.autograd.grad(attention(q, q, q).square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), q)
    ones = torch.ones_like(q)
    _, like = jvp(grad(lambda q: attention(q, q, q).square().sum()), (q.detach(),), (ones,))
    torch.testing.assert_close(second, like)


def test_groups_of_heads(make_key, draw):
    q, k, v = draw(2, 4, 3, 8), draw(2, 2, 5, 8), draw(2, 2, 5, 6)
    attention = pure(F.scaled_dot_product_attention, make_key())
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, enable_gqa=True), expected)
    with pytest.raises(RuntimeError):
        attention(q, k, v)


def test_two_masks_are_refused_as_by_torch(make_key, draw):
    q = draw(2, 3, 4)
    with pytest.raises(RuntimeError, match="is_causal"):
        pure(F.scaled_dot_product_attention, make_key())(q, q, q, KEEP, is_causal=True)


def test_dropped_weights_are_scaled(make_key):
    value = torch.eye(200)
    zeros = torch.zeros(200, 3)
    weights = pure(F.scaled_dot_product_attention, make_key())(zeros, zeros, value, dropout_p=0.25)
    kept = weights > 0
    assert abs(kept.double().mean() - 0.75) < 0.01
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / 200 / 0.75))


CONSTRUCTOR = {
    "plain": {},
    "no bias": {"bias": False},
    "bias of keys": {"add_bias_kv": True},
    "a zero": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "widths": {"kdim": 3, "vdim": 5},
    "batch first": {"batch_first": True},
}
PADDING = torch.tensor([[False, False, True, False], [False, True, True, False]])
CALL = {
    "plain": {},
    "no weights": {"need_weights": False},
    "every head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "padding, no weights": {"key_padding_mask": PADDING, "need_weights": False},
    "added padding": {"key_padding_mask": torch.zeros(2, 4, dtype=torch.float64).masked_fill(PADDING, -1.0)},
    "mask": {"attn_mask": torch.ones(3, 4, dtype=torch.bool).triu(2)},
    "mask of heads": {"attn_mask": torch.linspace(-1, 1, 48, dtype=torch.float64).view(4, 3, 4), "need_weights": False},
    "causal": {"attn_mask": torch.ones(3, 4, dtype=torch.bool).triu(1), "is_causal": True, "need_weights": False},
}


def multihead(draw, constructor):
    module = nn.MultiheadAttention(4, 2, dtype=torch.float64, **CONSTRUCTOR[constructor])
    kdim, vdim = (CONSTRUCTOR[constructor].get(name, 4) for name in ("kdim", "vdim"))
    inputs = [draw(3, 2, 4), draw(4, 2, kdim), draw(4, 2, vdim)]
    return module, [x.transpose(0, 1) if module.batch_first else x for x in inputs]


def leaves(y):
    return [part for part in y if part is not None]


@pytest.mark.parametrize("constructor", CONSTRUCTOR)
@pytest.mark.parametrize("call", CALL)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_multihead_attention_is_torchs(draw, constructor, call, training):
    module, inputs = multihead(draw, constructor)
    module.train(training)
    layer, ps, st = from_torch(module)
    y, _ = layer(Inputs(*inputs, **CALL[call]), ps, st)
    expected = copy.deepcopy(module)(*inputs, **CALL[call])
    torch.testing.assert_close(y, expected)

    def loss(ps):
        return sum(part.sin().sum() for part in leaves(layer(Inputs(*inputs, **CALL[call]), ps, st)[0]))

    names = [name for name, _ in module.named_parameters()]
    sum(part.sin().sum() for part in leaves(module(*inputs, **CALL[call]))).backward()
    grads = flatten_names(grad(loss)(ps))
    for name in names:
        wanted = module.get_parameter(name).grad
        torch.testing.assert_close(grads[name], torch.zeros_like(grads[name]) if wanted is None else wanted)
    _, slope = jvp(loss, (ps,), (tree_map(torch.ones_like, ps),))
    torch.testing.assert_close(slope, sum(g.sum() for g in grads.values()))


@pytest.mark.parametrize(("constructor", "call"), [("both", "padding"), ("widths", "mask of heads")])
def test_multihead_attention_under_vmap_and_compiled(make_key, draw, constructor, call):
    module, inputs = multihead(draw, constructor)
    module.dropout = 0.5
    layer, ps, st = from_torch(module)

    def run(ps, key, *inputs):
        return leaves(layer(Inputs(*inputs, **CALL[call]), ps, {**st, "rng": key})[0])

    keys = lr.split(make_key(), 2)
    models = tree_map(lambda leaf: torch.stack([leaf, leaf * 0.5]), ps)
    ys = vmap(run, (0, 0, None, None, None))(models, keys, *inputs)
    for i in range(2):
        alone = run(tree_map(lambda leaf: leaf[i], models), keys[i], *inputs)  # noqa: B023
        torch.testing.assert_close([y[i] for y in ys], alone)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ps, keys[0], *inputs), run(ps, keys[0], *inputs))


@pytest.mark.parametrize(("norm_first", "activation"), [(False, "relu"), (True, "gelu")])
@pytest.mark.parametrize("tape", [False, True], ids=["no grad", "grad"])
def test_an_encoder_does_not_take_the_path_that_has_no_derivatives(draw, norm_first, activation, tape):
    part = nn.TransformerEncoderLayer(
        4, 2, 8, dropout=0.3, activation=activation, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says so where it cannot use nested tensors
        module = nn.TransformerEncoder(part, 2).eval()
    layer, ps, st = from_torch(module)
    x, padding = draw(2, 4, 4), torch.tensor([[False, False, False, True], [False, False, True, True]])
    with torch.set_grad_enabled(tape), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own path for padding calls itself a prototype
        expected = module(x, src_key_padding_mask=padding)
    y, _ = layer(Inputs(x, src_key_padding_mask=padding), ps, st)
    # Where it takes the fast path, torch's encoder returns zeros for what is padding.
    torch.testing.assert_close(y[~padding], expected[~padding].detach())
    models = tree_map(lambda leaf: torch.stack([leaf, leaf]), ps)

    def loss(ps, x):
        return layer(Inputs(x, src_key_padding_mask=padding), ps, st)[0].square().sum()

    slopes = vmap(grad(loss), (0, None))(models, x)
    torch.testing.assert_close(tree_map(lambda leaf: leaf[1], slopes), grad(loss)(ps, x))


def test_a_transformer_in_train_mode_drops_by_its_key(make_key, draw):
    module = nn.Transformer(4, 2, 1, 1, 8, dropout=0.5, batch_first=True, dtype=torch.float64)
    layer, ps, st = from_torch(module)
    inputs = Inputs(draw(2, 3, 4), draw(2, 3, 4))
    before = torch.get_rng_state()
    (first, after), (again, _) = layer(inputs, ps, st), layer(inputs, ps, st)
    second, _ = layer(inputs, ps, after)
    assert torch.equal(first, again) and not torch.equal(first, second)
    keys = lr.split(make_key(), 2)
    ys = vmap(lambda key: layer(inputs, ps, {**st, "rng": key})[0])(keys)
    torch.testing.assert_close(ys[1], layer(inputs, ps, {**st, "rng": keys[1]})[0])
    assert not torch.equal(ys[0], ys[1])
    quiet = lt.test_mode(st)
    torch.testing.assert_close(layer(inputs, ps, quiet)[0], module.eval()(*inputs.args).detach())
    assert torch.equal(torch.get_rng_state(), before)
    assert quiet["training"] == Static(False)


@pytest.mark.skipif(torch.__version__ < "2.14", reason="there Dynamo cannot trace Tensor.unflatten under a mode")
@pytest.mark.parametrize("kind", ["attention", "encoder"])
def test_compiled_gradients_in_test_mode(rng, kind):
    x, padding = (
        torch.randn(2, 4, 4, generator=rng),
        torch.tensor([[False, False, False, True], [False, False, True, True]]),
    )
    if kind == "attention":
        module, inputs = nn.MultiheadAttention(4, 2, batch_first=True), Inputs(x, x, x, key_padding_mask=padding)
    else:
        part = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        module, inputs = nn.TransformerEncoder(part, 1), Inputs(x, src_key_padding_mask=padding)
    layer, ps, st = from_torch(module.eval())

    def loss(ps):
        y = layer(inputs, ps, st)[0]
        return (y[0] if kind == "attention" else y).sin().sum()

    slopes = torch.compile(grad(loss), fullgraph=True, backend="aot_eager")(ps)
    torch.testing.assert_close(slopes, grad(loss)(ps))
