"""Surgery inside of a transform: it decides what is an argument, and never what is differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import luxtorch as lt

MODEL = lt.Chain(
    enc=lt.Chain(lt.Dense(3, 3, torch.tanh), lt.LayerNorm((3,))),
    mid=lt.RepeatedLayer(lt.Dense(3, 3, torch.sin), 2),
    head=lt.Dense(3, 3, torch.tanh),
)
SAME = ("enc.layer_1", "head")


def scaled(layer: Any, ps: Any, st: Any, _: str) -> Any:
    return layer, tree_map(lambda leaf: 2 * leaf, ps), st


def with_part(path: str, *triple: Any) -> Any:
    return lt.replace_layer(*triple, path, *lt.get_layer(*triple, path))


def with_average(layer: Any, ps: Any, st: Any) -> Any:
    ema = lt.EMA(0.5)
    state = ema.update(ema.init(tree_map(torch.sin, ps)), ps)
    return layer, ema.parameters(state), st


def average(ps: Any) -> Any:
    return tree_map(lambda leaf: (0.5 * leaf.sin() + leaf) / 1.5, ps)


def both(ps: Any) -> Any:
    """The parameters with those of the first place in the second."""
    return {**ps, "head": dict(ps["enc"]["layer_1"])}


def same(ps: Any) -> Any:
    return ps


def parted(layer: Any, ps: Any, st: Any) -> Any:
    return layer, lt.combine(*lt.partition(ps, "head", lambda name: name.endswith("enc.layer_1.bias"))), st


def stacked(layer: Any, ps: Any, st: Any) -> Any:
    return layer, lt.unstack(lt.stack([tree_map(torch.cos, ps), ps]))[1], st


def vector(layer: Any, ps: Any, st: Any) -> Any:
    return layer, lt.ComponentVector(ps), st


def frozen(*paths: str) -> Callable[..., Any]:
    return lambda *triple: lt.freeze(*triple, *paths)


SURGERIES: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "freeze": (frozen(), same),
    "freeze some": (frozen("enc", "head.bias"), same),
    "freeze twice": (lambda *t: lt.freeze(*lt.freeze(*t, "enc"), "head"), same),
    "freeze a vector": (lambda *t: lt.freeze(*vector(*t), "enc", "head.bias"), same),
    "unfreeze": (lambda *t: lt.unfreeze(*lt.freeze(*t)), same),
    "unfreeze some": (lambda *t: lt.unfreeze(*lt.freeze(*t, "enc", "head"), "head.weight"), same),
    "lora": (lambda *t: lt.lora(*t, rng=1, rank=2), same),
    "lora of frozen": (lambda *t: lt.lora(*lt.freeze(*t, "enc"), rng=1, rank=2), same),
    "lora, unfreeze": (lambda *t: lt.unfreeze(*lt.lora(*t, rng=1, rank=2), "head"), same),
    "merge_lora": (lambda *t: lt.merge_lora(*lt.lora(*t, rng=1, rank=2)), same),
    "share_parameters": (lambda *t: lt.share_parameters(*t, SAME), both),
    "share, freeze": (lambda *t: lt.freeze(*lt.share_parameters(*t, SAME), "enc"), both),
    "unshare_parameters": (lambda *t: lt.unshare_parameters(*lt.share_parameters(*t, SAME)), both),
    "weight_norm": (lambda *t: lt.weight_norm(*t), same),
    "weight_norm, freeze": (lambda *t: lt.freeze(*lt.weight_norm(*t), "enc"), same),
    "remove_weight_norm": (lambda *t: lt.remove_weight_norm(*lt.weight_norm(*t)), same),
    "replace_layer": (lambda *t: with_part("enc", *t), same),
    "replace in frozen": (lambda *t: with_part("head", *lt.freeze(*t, "enc")), same),
    "layer_map": (lambda *t: lt.layer_map(scaled, *t), lambda ps: tree_map(lambda leaf: 2 * leaf, ps)),
    "layer_map in frozen": (
        lambda *t: lt.layer_map(scaled, *lt.freeze(*t, "enc")),
        lambda ps: tree_map(lambda leaf: 2 * leaf, ps),
    ),
    "layer_map in shared": (
        lambda *t: lt.layer_map(scaled, *lt.share_parameters(*t, SAME)),
        lambda ps: tree_map(lambda leaf: 2 * leaf, both(ps)),
    ),
    "EMA": (with_average, average),
    "EMA, freeze": (lambda *t: lt.freeze(*with_average(*t), "enc"), average),
    "partition": (parted, same),
    "stack": (stacked, same),
}

Loss = Callable[[Any], Tensor]


def on_the_tape(loss: Loss, ps: Any, _: Any) -> Any:
    leaves = tree_map(lambda leaf: leaf.clone().requires_grad_(), ps)
    loss(leaves).backward()
    return tree_map(lambda leaf: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, leaves)


def stack_of(ps: Any) -> Any:
    return tree_map(lambda leaf: torch.stack([leaf, leaf.sin()]), ps)


TRANSFORMS: dict[str, Callable[[Loss, Any, Any], Any]] = {
    "tape": on_the_tape,
    "grad": lambda loss, ps, _: torch.func.grad(loss)(ps),
    "jvp": lambda loss, ps, us: torch.func.jvp(loss, (ps,), (us,))[1],
    "vmap": lambda loss, ps, _: torch.func.vmap(loss)(stack_of(ps)),
    "vmap(grad)": lambda loss, ps, _: torch.func.vmap(torch.func.grad(loss))(stack_of(ps)),
    "jvp(grad)": lambda loss, ps, us: torch.func.jvp(torch.func.grad(loss), (ps,), (us,))[1],
    "jacobian_vector_product": lambda loss, ps, us: lt.autodiff.jacobian_vector_product(loss, ps, us),
}


def named(tree: Any) -> dict[str, Tensor]:
    return {"": tree} if isinstance(tree, Tensor) else lt.flatten_names(tree)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("surgery", SURGERIES)
def test_surgery_is_differentiable(make_key, surgery: str, transform: str) -> None:
    change, by_hand = SURGERIES[surgery]
    ps, st = lt.f64(lt.setup(make_key(), MODEL))
    ps = tree_map(lambda leaf: leaf + 0.1 * lt.random.normal(make_key(), leaf.shape, dtype=leaf.dtype), ps)
    us = tree_map(lambda leaf: lt.random.normal(make_key(), leaf.shape, dtype=leaf.dtype), ps)
    x = lt.random.normal(make_key(), (4, 3), dtype=torch.float64)

    def changed(ps: Any) -> Tensor:
        layer, new_ps, new_st = change(MODEL, ps, st)
        return layer(x, new_ps, new_st)[0].square().sum()

    def expected(ps: Any) -> Tensor:
        return MODEL(x, by_hand(ps), st)[0].square().sum()

    take = TRANSFORMS[transform]
    torch.testing.assert_close(named(take(changed, ps, us)), named(take(expected, ps, us)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("surgery", ["freeze some", "lora", "EMA, freeze"])
def test_surgery_is_differentiable_when_compiled(make_key, surgery: str) -> None:
    ps, st = lt.f64(lt.setup(make_key(), MODEL))
    x = lt.random.normal(make_key(), (4, 3), dtype=torch.float64)

    def loss(ps: Any) -> Tensor:
        layer, new_ps, new_st = SURGERIES[surgery][0](MODEL, ps, st)
        return layer(x, new_ps, new_st)[0].square().sum()

    slope = torch.func.grad(loss)
    torch.testing.assert_close(named(lt.jit(slope, backend="replay")(ps)), named(slope(ps)))


def test_a_step_inside_of_a_step_reaches_what_is_frozen(make_key) -> None:
    """Adapting the head alone, and learning the encoder by it."""
    ps, st = lt.f64(lt.setup(make_key(), MODEL))
    x = lt.random.normal(make_key(), (4, 3), dtype=torch.float64)

    def loss(layer: Any, ps: Any, st: Any) -> Tensor:
        return layer(x, ps, st)[0].square().sum()

    def by_freezing(ps: Any) -> Tensor:
        layer, some, own = lt.freeze(MODEL, ps, st, "enc", "mid")
        grads = torch.func.grad(lambda some: loss(layer, some, own))(some)
        return loss(layer, tree_map(lambda p, g: p - 0.1 * g, some, grads), own)

    def by_hand(ps: Any) -> Tensor:
        grads = torch.func.grad(lambda head: loss(MODEL, {**ps, "head": head}, st))(ps["head"])
        return loss(MODEL, {**ps, "head": tree_map(lambda p, g: p - 0.1 * g, ps["head"], grads)}, st)

    for take in (torch.func.grad, lambda f: lambda ps: on_the_tape(f, ps, None)):
        torch.testing.assert_close(named(take(by_freezing)(ps)), named(take(by_hand)(ps)))


def test_the_state_that_is_returned_holds_the_very_same_frozen_parameters(make_key) -> None:
    layer, ps, st = lt.freeze(MODEL, *lt.setup(make_key(), MODEL), "enc")
    new = layer(torch.ones(2, 3), ps, st)[1]
    assert all(a is b for a, b in zip(tree_leaves(st["frozen_params"]), tree_leaves(new["frozen_params"]), strict=True))
