"""Every layer under autocast gives inside transforms what it gives without them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import luxtorch as lt
from luxtorch.core import tree_leaves, tree_map
from luxtorch.testing._subject import is_real, weighted

from .test_higher_order_derivatives import FORMS_OF_ALL

ONE_EACH = {type(layer).__name__: name for name, (layer, *_) in reversed(FORMS_OF_ALL.items())}
# Two forms of one class that take different paths.
CHOSEN = sorted({*ONE_EACH.values(), *(name for name in FORMS_OF_ALL if name.startswith("normalization"))})


def low(function):
    """Return a function that runs under autocast."""

    def run(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*args)

    return run


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # of torch's rms_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CHOSEN)
def test_transforms_under_autocast(make_key, draw, name, dtype):
    """The input is a batch as it comes, or what a layer under autocast makes of it."""
    layer, inputs, *_ = FORMS_OF_ALL[name]
    ps, st = lt.setup(make_key(), layer)
    x = draw(inputs[0])
    if isinstance(layer, lt.Bilinear | lt.Checkpointed) and dtype != torch.float32:
        pytest.skip("torch's bilinear takes no two dtypes; a checkpoint is computed again without autocast")
    if not all(isinstance(leaf, Tensor) and is_real(leaf) for leaf in tree_leaves(x)) or not tree_leaves(ps):
        pytest.skip("nothing to differentiate by, or nothing to vmap over")
    st = lt.test_mode(st)

    @low
    def loss(ps, x):
        x = tree_map(lambda leaf: leaf.to(dtype), x)
        return weighted(tree_map(lambda leaf: leaf.float() if is_real(leaf) else leaf, layer(x, ps, st)[0]))

    gradient = torch.func.grad(loss)
    xs = [x, tree_map(lambda leaf: 1.1 * leaf, x)]
    expected = [by_tape(loss, ps, x) for x in xs]
    same(gradient(ps, x), expected[0])
    many = torch.vmap(gradient, (None, 0))(ps, tree_map(lambda *leaves: torch.stack(leaves), *xs))
    same(many, tree_map(lambda *leaves: torch.stack(leaves), *expected))
    if not isinstance(layer, lt.Checkpointed):  # autocast leaves the jit's trace a tape
        same(lt.jit(gradient, backend="replay")(ps, x), expected[0])
    along = tree_map(torch.ones_like, ps)
    _, slope = torch.func.jvp(lambda ps: loss(ps, x), (ps,), (along,))
    same(slope, sum(leaf.double().sum() for leaf in tree_leaves(expected[0])))


def by_tape(loss, ps, x):
    leaves = tree_map(lambda leaf: leaf.clone().requires_grad_(), ps)
    names = iter(torch.autograd.grad(loss(leaves, x), tree_leaves(leaves), materialize_grads=True, allow_unused=True))
    return tree_map(lambda leaf: next(names), ps)


def same(got, expected):
    # Eight bits of each number; what cancels in a sum leaves less.
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert torch.isfinite(a).all()
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), rtol=0.0, atol=0.1 * scale)
