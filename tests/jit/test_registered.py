"""Classes registered with torch's pytree, as outputs of models and caches are, go into jitted functions and out."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

import luxtorch as lt
from luxtorch.jit import jit

W = torch.arange(6.0).reshape(2, 3)


class ModelOutput(OrderedDict):
    """Be a dict whose entries are attributes too, as the outputs of many models are; None is left out."""

    def __init__(self, **entries: Any) -> None:
        super().__init__({name: value for name, value in entries.items() if value is not None})
        for name, value in entries.items():
            object.__setattr__(self, name, value)


class Scores(ModelOutput):
    """Be one of a subclass, which is registered by itself."""


for cls in (ModelOutput, Scores):
    pytree.register_pytree_node(
        cls,
        lambda node: (list(node.values()), list(node)),
        lambda values, names, cls=cls: cls(**dict(zip(names, values, strict=True))),
    )


class Cache:
    """Grow with each call, as a cache of keys and values does, and know its options."""

    def __init__(self, layers: list[Any], options: dict[str, Any]) -> None:
        self.layers, self.options = layers, options

    def updated(self, new: torch.Tensor) -> Cache:
        return Cache([torch.cat((layer, new)) for layer in self.layers], self.options)


pytree.register_pytree_node(
    Cache, lambda cache: ([cache.layers], cache.options), lambda children, options: Cache(children[0], options)
)


@dataclasses.dataclass
class Batch:
    x: Any
    mask: Any = None
    kind: str = "train"


pytree.register_pytree_node(
    Batch, lambda batch: ([batch.x, batch.mask], batch.kind), lambda children, kind: Batch(*children, kind)
)


@dataclasses.dataclass
class Pair:
    x: Any
    y: Any


pytree.register_dataclass(Pair)


class Config:
    """Be a constant."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.factor == other.factor

    def __hash__(self) -> int:
        return hash(self.factor)


pytree.register_constant(Config)


def same(one: Any, other: Any) -> None:
    """Assert that two trees have the same nodes, contexts and numbers."""
    assert type(one) is type(other)
    leaves, spec = pytree.tree_flatten(one)
    others, other_spec = pytree.tree_flatten(other)
    assert spec == other_spec
    torch.testing.assert_close(leaves, others, rtol=0, atol=0)


TREES = {
    "output": lambda x: ModelOutput(loss=x.sum(), logits=x, hidden=None),
    "subclass": lambda x: Scores(logits=(x, x + 1)),
    "cache": lambda x: Cache([x, x * 2], {"window": 3}),
    "dataclass": lambda x: Pair(x, {"inner": x + 1}),
    "dataclass with a context": lambda x: Batch(x, Pair(x, [x]), "test"),
    "constant": lambda x: (x, Config(2.0)),
    "nested": lambda x: {
        "out": ModelOutput(logits=x, cache=Cache([x], {"a": [1]})),
        "rest": [Batch(Scores(logits=x), (Config(3.0), Pair(x, {})), "test")],
    },
}


@pytest.mark.parametrize("name", TREES)
def test_they_go_in_and_out(name):
    calls = []

    def double(tree, k):
        calls.append(type(tree))
        leaves = pytree.tree_map_only(torch.Tensor, lambda leaf: leaf * k, tree)
        return {"tree": leaves, "made": TREES[name](pytree.tree_leaves(tree)[0] * k)}

    jitted = jit(double, backend="replay")
    for x in (W, W + 1, W * 2):
        same(jitted(TREES[name](x), 3.0), double(TREES[name](x), 3.0))
    assert jitted.cache_info()[:2] == (2, 1)


@pytest.mark.parametrize("name", TREES)
def test_derivatives_by_what_is_inside(name):
    def loss(tree):
        return sum(leaf.square().sum() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))

    # A constant has no leaves, and goes along.
    step = jit(torch.func.grad(loss), backend="replay")
    same(step(TREES[name](W)), torch.func.grad(loss)(TREES[name](W)))


def test_what_is_static_decides_what_is_compiled():
    def run(batch, cache, config):
        factor = 2 if batch.kind == "train" else 5
        return batch.x * factor * cache.options["scale"] * config.factor

    jitted = jit(run, backend="replay")
    for kind, scale, factor in (("train", 1, 1.0), ("test", 1, 1.0), ("train", 3, 1.0), ("train", 1, 7.0)) * 2:
        arguments = Batch(W, kind=kind), Cache([], {"scale": scale}), Config(factor)
        assert torch.equal(jitted(*arguments), run(*arguments))
    assert jitted.cache_info()[:2] == (4, 4)


def test_a_cache_grows_from_call_to_call():
    step = jit(lambda cache, x: cache.updated(x), backend="replay")
    cache, plain = Cache([W], {"window": 3}), Cache([W], {"window": 3})
    for i in range(3):
        cache, plain = step(cache, W[:1] + i), plain.updated(W[:1] + i)
        same(cache, plain)


def test_results_share_no_context():
    """What a caller does with a result is seen by no other call."""
    jitted = jit(lambda x: Cache([x + 1], {"window": [3]}), backend="replay")
    first = jitted(W)
    first.options["window"].append(4)
    assert jitted(W).options == {"window": [3]}
    passed = jit(lambda cache: Cache([cache.layers[0] + 1], cache.options), backend="replay")
    options = {"window": [3]}
    first = passed(Cache([W], options))
    options["window"].append(4)
    assert first.options == {"window": [3]}
    assert passed(Cache([W], options)).options == {"window": [3, 4]}
    assert passed(Cache([W], {"window": [3]})).options == {"window": [3]}
    assert passed.cache_info()[:2] == (1, 2)


class Checked:
    """Look at its numbers when it is made, as distributions do."""

    def __init__(self, x: Any) -> None:
        assert not isinstance(x, torch.Tensor) or bool((x >= 0).all())
        self.x = x


pytree.register_pytree_node(Checked, lambda node: ([node.x], None), lambda children, _: Checked(*children))


def test_results_are_not_put_together_before_they_have_numbers():
    jitted = jit(lambda make, x: make(x + 1), backend="replay", static="make")

    def make(x):
        node = Checked(0)
        node.x = x
        return node

    jitted(make, W)
    assert torch.equal(jitted(make, W).x, W + 1)


class Unknown:
    def __init__(self, x: Any) -> None:
        self.x = x


def test_others_are_refused():
    with pytest.raises(lt.DTypeError, match="must be a tensor or a constant[\\s\\S]*Unknown"):
        jit(lambda node: node.x, backend="replay")({"a": Unknown(W)})
    with pytest.raises(lt.LuxtorchError, match="must be a tensor or a constant|must return tensors and constants"):
        jit(lambda x: ModelOutput(logits=Unknown(x)), backend="replay")(W)


def test_a_tensor_in_a_context_is_refused():
    text = "The context of the pytree node Cache must be a constant[\\s\\S]*tensor[\\s\\S]*context\\['scale'\\]"
    with pytest.raises(lt.DTypeError, match=text):
        jit(lambda cache: cache.layers[0], backend="replay")({"cache": Cache([W], {"scale": W})})
    with pytest.raises(lt.DTypeError, match=text):
        jit(lambda x: Cache([x], {"scale": x * 2}), backend="replay")(W)


def test_the_text_of_a_traced_tensor_in_a_context_is_refused():
    for make in (lambda x: Cache([x], {"a": [f"{x}"]}), lambda x: {f"{x}": x}):
        with pytest.raises(lt.LuxtorchError, match="the text of a traced tensor"):
            jit(make, backend="replay")(W)


def test_a_donated_node_is_reused_or_left_alone():
    step = jit(
        lambda cache, x: Cache([layer + x for layer in cache.layers], cache.options), donate="cache", backend="replay"
    )
    cache = Cache([W.clone(), W + 1], {})
    for _ in range(3):
        expected = [layer + 1 for layer in cache.layers]
        cache = step(cache, torch.ones(()))
        torch.testing.assert_close(cache.layers, expected)


def test_layers_take_them(make_key):
    class Apply(lt.Layer):
        def __call__(self, x, ps, st):
            return ModelOutput(logits=x.x * 2, kind=x.kind), st

    model, batch = Apply(), Batch(W)
    step = jit(lambda batch: model(batch, {}, {})[0], backend="replay")
    assert torch.equal(step(batch).logits, 2 * W) and step(batch)["kind"] == "train"
