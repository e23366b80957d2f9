"""Transformers of torch.nn read a mask, to see whether it is causal; converted ones need no numbers in it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import grad, grad_and_value, jvp, vmap

import luxtorch as lt
from luxtorch.core import flatten_names
from luxtorch.interop import Inputs, from_torch

CAUSAL = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
MASKS = {
    "causal": CAUSAL,
    "boolean": CAUSAL.isinf(),
    "leaning": CAUSAL + 0.1 * torch.arange(4, dtype=torch.float64),
    "wide": torch.ones(4, 4, dtype=torch.bool).triu(2),
}
KINDS = ("encoder", "decoder", "both")


def converted(kind):
    """Return a module with the names of its arguments, and the model that it becomes."""
    options = {"dropout": 0.0, "dtype": torch.float64}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says so where it cannot use nested tensors
        if kind == "encoder":
            module = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, **options), 2)
        elif kind == "decoder":
            module = nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 8, **options), 2)
        else:
            module = nn.Transformer(4, 2, 1, 1, 8, **options)
    return module, {"encoder": "mask", "decoder": "tgt_mask", "both": "src_mask"}[kind], from_torch(module)


def drawn(rng, kind):
    return [torch.randn(4, 2, 4, generator=rng, dtype=torch.float64) for _ in range(1 if kind == "encoder" else 2)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_values_and_gradients_are_torchs_without_the_numbers(rng, kind, mask, training):
    module, name, (layer, ps, st) = converted(kind)
    inputs, mask = drawn(rng, kind), MASKS[mask]
    st = st if training else lt.test_mode(st)

    def loss(ps, mask):
        return layer(Inputs(*inputs, **{name: mask}), ps, st)[0].sin().sum()

    number = copy.deepcopy(module).train(training)(*inputs, **{name: mask}).sin().sum()
    slopes = torch.autograd.grad(module.train()(*inputs, **{name: mask}).sin().sum(), list(module.parameters()))
    wanted = dict(zip(dict(module.named_parameters()), slopes, strict=True))
    torch.testing.assert_close(loss(ps, mask), number.detach())
    for call in (grad_and_value(loss), lt.jit(grad_and_value(loss), backend="replay")):
        slopes, value = call(ps, mask)
        torch.testing.assert_close(value, number.detach())
        torch.testing.assert_close(flatten_names(slopes), wanted)
    masks = torch.stack([mask, torch.zeros_like(mask)])
    alone = torch.stack([loss(ps, each) for each in masks])
    torch.testing.assert_close(vmap(loss, (None, 0))(ps, masks), alone)


@pytest.mark.sampled(3)
@pytest.mark.skipif(torch.__version__ < "2.14", reason="before, the compiler could not trace unflatten under a mode")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(rng, kind):
    _, name, (layer, ps, st) = converted(kind)
    inputs = drawn(rng, kind)

    def call(ps, mask):
        return layer(Inputs(*inputs, **{name: mask}), ps, st)[0]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ps, CAUSAL), call(ps, CAUSAL))


@pytest.mark.parametrize("kind", KINDS)
def test_a_causal_mask_has_derivatives(rng, kind):
    """Torch leaves the mask out once it has seen that it is causal, so that its derivative is 0; here it is right."""
    _, name, (layer, ps, st) = converted(kind)
    inputs, direction = drawn(rng, kind), torch.randn(4, 4, generator=rng, dtype=torch.float64)

    def loss(mask):
        return layer(Inputs(*inputs, **{name: mask}), ps, st)[0].sin().sum()

    h = 1e-5
    by_differences = (loss(CAUSAL + h * direction) - loss(CAUSAL - h * direction)) / (2 * h)
    taped = CAUSAL.clone().requires_grad_()
    (on_a_tape,) = torch.autograd.grad(loss(taped), taped)
    assert by_differences.abs() > 1e-3
    for slope in ((grad(loss)(CAUSAL) * direction).sum(), (on_a_tape * direction).sum()):
        torch.testing.assert_close(slope, by_differences, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(jvp(loss, (CAUSAL,), (direction,))[1], by_differences, rtol=1e-7, atol=1e-8)


def test_what_is_read_outside_is_as_it_was():
    ask = nn.modules.transformer._detect_is_causal_mask
    assert ask(CAUSAL) and ask(CAUSAL, None, 4) and ask(None, True)
    assert not (ask(MASKS["wide"]) or ask(None) or ask(CAUSAL, False) or ask(CAUSAL, size=3))
