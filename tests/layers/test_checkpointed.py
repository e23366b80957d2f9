"""Checkpointing: the numbers of the layer itself under every transform, and less memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import luxtorch as lt
from luxtorch import Checkpointed

BLOCK = lt.Chain(lt.Dense(3, 5, torch.tanh), lt.BatchNorm(5), lt.Dropout(0.3), lt.Dense(5, 3))
PLAIN = lt.Chain(BLOCK, lt.Chain(BLOCK, BLOCK))
LESS = lt.Chain(Checkpointed(BLOCK), Checkpointed(lt.Chain(Checkpointed(BLOCK), BLOCK)))  # nested, too

FORMS = {"Checkpointed": (Checkpointed(BLOCK), [(4, 3)])}


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


def _loss(model, ps, x, st):
    y, st = model(x, ps, st)
    return y.square().sum(), st


def _tape(model, ps, x, st, create_graph=False):
    ps = pytree.tree_map(lambda p: p.detach().requires_grad_(), ps)
    leaves = pytree.tree_leaves(ps)
    loss, st = _loss(model, ps, x, st)
    grads = torch.autograd.grad(loss, leaves, create_graph=create_graph)
    if create_graph:
        grads = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    return grads, st


def _func(model, ps, x, st):
    return torch.func.grad(_loss, argnums=1, has_aux=True)(model, ps, x, st)


def _squared_gradient(model, ps, x, st):
    return sum(g.square().sum() for g in pytree.tree_leaves(_func(model, ps, x, st)[0]))


def _twice(tree):
    return pytree.tree_map(lambda leaf: torch.stack([leaf, 0.9 * leaf]), tree)


WAYS = {
    "forward": _loss,
    "tape": _tape,
    "tape twice": lambda *args: _tape(*args, create_graph=True),
    "grad": _func,
    "grad, no_grad": lambda *args: torch.no_grad()(_func)(*args),
    "grad of grad": lambda model, ps, x, st: torch.func.grad(_squared_gradient, argnums=1)(model, ps, x, st),
    "grad by x": lambda model, ps, x, st: torch.func.grad(lambda x: _loss(model, ps, x, st)[0])(x),
    "vmap(grad) over x": lambda model, ps, x, st: torch.vmap(lambda x: _func(model, ps, x, st))(_twice(x)),
    "vmap(grad) over ps": lambda model, ps, x, st: torch.vmap(lambda ps: _func(model, ps, x, st))(_twice(ps)),
    "grad(vmap)": lambda model, ps, x, st: torch.func.grad(
        lambda many: torch.vmap(lambda ps: _loss(model, ps, x, st)[0])(many).sum()
    )(_twice(ps)),
    "jvp": lambda model, ps, x, st: torch.func.jvp(lambda x: _loss(model, ps, x, st), (x,), (x,), has_aux=True),
    "jvp of grad": lambda model, ps, x, st: torch.func.jvp(lambda x: _func(model, ps, x, st)[0], (x,), (x,)),
    "grad of jvp": lambda model, ps, x, st: torch.func.grad(
        lambda x: torch.func.jvp(lambda ps: _loss(model, ps, x, st)[0], (ps,), (ps,))[1]
    )(x),
    "hessian": lambda model, ps, x, st: torch.func.hessian(lambda x: _loss(model, ps, x, st)[0])(x),
    "jacrev twice": lambda model, ps, x, st: torch.func.jacrev(torch.func.jacrev(lambda x: _loss(model, ps, x, st)[0]))(
        x
    ),
    "tape of grad": lambda model, ps, x, st: torch.autograd.grad(
        _squared_gradient(model, ps, own := x.clone().requires_grad_(), st), own
    ),
    "compiled grad": lambda model, ps, x, st: torch.compile(
        lambda ps, x, st: _func(model, ps, x, st), fullgraph=True, backend="aot_eager"
    )(ps, x, st),
}


@pytest.mark.parametrize("tree", [dict, lt.ComponentVector])
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (way == "compiled grad")) for way in WAYS]
)
def test_the_numbers_are_those_of_the_layer(make_key, rng, way, tree):
    ps, st = lt.f64(lt.setup(make_key(), PLAIN))
    again = lt.f64(lt.setup(make_key(), LESS))
    assert pytree.tree_structure((ps, st)) == pytree.tree_structure(again)
    x = torch.randn(6, 3, generator=rng, dtype=torch.float64)
    expected = WAYS[way](PLAIN, tree(ps), x, st)
    found = WAYS[way](LESS, tree(ps), x, st)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        scale = float(b.double().abs().max()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * (1 + scale))


class _Peak(TorchDispatchMode):
    """Count the bytes of the storages that are alive, and keep the largest count."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, key, size)
        return result

    def _freed(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize(("way", "share"), [("tape", 0.6), ("grad", 0.5)])
def test_memory_is_saved(make_key, way, share):
    block = lt.Chain(*[lt.Dense(32, 32, torch.tanh) for _ in range(8)])
    x = torch.ones(256, 32)
    peaks = []
    for model in (lt.Chain(*[block] * 8), lt.Chain(*[Checkpointed(block)] * 8)):
        ps, st = lt.setup(make_key(), model)
        with _Peak() as memory:
            WAYS[way](model, ps, x, st)
        peaks.append(memory.peak)
    assert peaks[1] < share * peaks[0]


def test_outputs_of_several_kinds(make_key, rng):
    class Mixed(lt.Layer):
        def __call__(self, x, ps, st):
            return {"same": x["a"], "none": x["none"], "twice": 2 * x["a"], "index": x["a"].argmax(), "b": x["b"]}, st

    x = {"a": torch.randn(3, generator=rng), "b": torch.tensor(3)}
    layer = Checkpointed(Mixed())

    def f(a):
        y, st = layer({"none": None, "a": a, "b": x["b"]}, {}, {})
        assert y["none"] is None and y["b"] == 3
        assert y["index"].dtype == torch.int64 and not y["index"].requires_grad
        return (y["same"] * y["twice"]).sum()

    torch.testing.assert_close(torch.func.grad(f)(x["a"]), 4 * x["a"])
    torch.testing.assert_close(torch.func.grad(lambda a: torch.func.grad(f)(a).sum())(x["a"]), torch.full((3,), 4.0))


def test_an_error_names_the_layer():
    model = lt.Chain(Checkpointed(lt.Chain(lt.Dense(2, 3), lt.Dense(4, 1))))
    ps, st = lt.setup(0, model)
    with pytest.raises(lt.InputError, match=r"model\.layer_1\.layer_2 \(Dense"):
        torch.func.grad(lambda ps: model(torch.ones(1, 2), ps, st)[0].sum())(ps)
    with pytest.raises(lt.InputError, match=r"model\.layer_1\.layer_2 \(Dense"):
        model(torch.ones(1, 2), ps, st)


def test_prints():
    assert "Checkpointed" in repr(lt.Chain(Checkpointed(lt.Dense(2, 3))))


def test_jitted_with_data_that_is_closed_over(make_key, draw):
    x, (ps, st) = draw((4, 3)), lt.setup(make_key(), LESS)

    def gradient(ps):
        return lt.gradient(lambda ps: _loss(LESS, ps, x, st)[0], ps)

    torch.testing.assert_close(lt.jit(gradient, backend="replay")(ps), gradient(ps))
