"""Frozen parameters stay as they are, bit for bit, on trees and on flat vectors alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils._pytree as pytree
import torchopt

from luxtorch import optim
from luxtorch.components import ComponentVector
from luxtorch.core import KeyNameError


def identity(tree: Any) -> Any:
    return tree


KINDS = {
    "dict": identity,
    "vector": ComponentVector,
    "nested": lambda tree: {**tree, "layer_1": ComponentVector(tree["layer_1"])},
}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def leaves(tree: Any) -> list[torch.Tensor]:
    is_vector = lambda node: isinstance(node, ComponentVector)  # noqa: E731
    plain = pytree.tree_map(lambda node: node.to_dict() if is_vector(node) else node, tree, is_leaf=is_vector)
    return pytree.tree_leaves(plain)


@pytest.mark.parametrize("path", ["layer_1", "layer_1.bias", lambda name: "weight" in name, None])
def test_against_torch(case, make, draw, path):
    """Freeze after two steps and thaw after four: as torch does when gradients are None."""
    ps, names = make(draw()), ["layer_1.weight", "layer_1.bias", "layer_2.weight", "layer_2.bias"]
    frozen = [path is None or (path(name) if callable(path) else name.startswith(path)) for name in names]
    parameters = [torch.nn.Parameter(leaf.clone()) for leaf in leaves(ps)]
    optimizer, opt_state = case.reference(parameters), optim.setup(case.rule, ps)
    for i in range(6):
        grads = make(draw())
        if i == 2:
            opt_state = optim.freeze(opt_state, path)
            assert [name in opt_state.layout.frozen for name in opt_state.layout.names] == frozen
        if i == 4:
            opt_state = optim.thaw(opt_state, path)
            assert opt_state.layout.frozen == ()
        for p, g, off in zip(parameters, leaves(grads), frozen, strict=True):
            p.grad = None if off and 2 <= i < 4 else g
        optimizer.step()
        before = leaves(ps)
        opt_state, ps = optim.update(opt_state, ps, grads)
        for old, new, off in zip(before, leaves(ps), frozen, strict=True):
            assert torch.equal(old, new) == (off and 2 <= i < 4)
    torch.testing.assert_close(leaves(ps), [p.detach() for p in parameters], rtol=1e-12, atol=1e-12)


def test_memory_stays(rule, make, draw):
    ps = make(draw())
    opt_state, ps = optim.update(optim.setup(rule, ps), ps, make(draw()))
    opt_state = optim.freeze(opt_state, "layer_1")
    new_state, _ = optim.update(opt_state, ps, make(draw()))
    for name, slots in opt_state.state.leaves.items():
        for slot, value in slots.items():
            assert torch.equal(value, new_state.state.leaves[name][slot]) == name.startswith("layer_1")


def test_vectors_step_as_trees_do(rule, draw):
    """Once taken apart, the state of a vector is that of a dict, bit for bit."""
    ps, grads = draw(), draw()
    states = [optim.freeze(optim.setup(rule, tree), "layer_1.bias") for tree in (ps, ComponentVector(ps))]
    trees = [ps, ComponentVector(ps)]
    for _ in range(3):
        for i, convert in enumerate((identity, ComponentVector)):
            states[i], trees[i] = optim.update(states[i], trees[i], convert(grads))
    for a, b in zip(leaves(trees[0]), leaves(trees[1]), strict=True):
        assert torch.equal(a, b)
    flat = [pytree.tree_flatten(state.state) for state in states]
    assert flat[0][1] == flat[1][1]
    assert all(torch.equal(a, b) for a, b in zip(flat[0][0], flat[1][0], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["Momentum", "AdamW"], indirect=True)
def test_compiled(rule, make, draw):
    torch._dynamo.reset()
    ps, grads = make(draw()), make(draw())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(optim.update, backend=counter, fullgraph=True)
    opt_state = optim.adjust(optim.setup(rule, ps), lr=0.5, path="layer_1")
    opt_state = expected_state = optim.freeze(opt_state, "layer_1.bias")
    new = expected = ps
    for _ in range(3):
        opt_state, new = compiled(opt_state, new, grads)
        expected_state, expected = optim.update(expected_state, expected, grads)
    torch.testing.assert_close(leaves(new), leaves(expected), rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


def test_many_models(rule, make, draw):
    """A state from vmap is frozen as one of its models is."""
    models, grads = [make(draw()) for _ in range(2)], make(draw())
    ps = pytree.tree_map(lambda *each: torch.stack(each), *models)
    step = torch.vmap(optim.update, in_dims=(0, 0, None))
    opt_state, ps = step(torch.vmap(lambda ps: optim.setup(rule, ps))(ps), ps, grads)
    _, new = step(optim.freeze(opt_state, "layer_1.weight"), ps, grads)
    for i, model in enumerate(models):
        opt_state, one = optim.update(optim.setup(rule, model), model, grads)
        _, one = optim.update(optim.freeze(opt_state, "layer_1.weight"), one, grads)
        torch.testing.assert_close(leaves(pytree.tree_map(lambda leaf, i=i: leaf[i], new)), leaves(one))


def test_parameters_with_a_batch_dimension(rule, draw):
    """A vector of shape (N, P) is N models in one state, without vmap."""
    ps, grads = (ComponentVector(draw(2), batch_dims=1) for _ in range(2))
    opt_state = optim.freeze(optim.setup(rule, ps), "layer_1")
    _, new = optim.update(opt_state, ps, grads)
    assert new.axes == ps.axes
    assert torch.equal(new.layer_1.flat, ps.layer_1.flat)
    tree_state = optim.freeze(optim.setup(rule, ps.to_dict()), "layer_1")
    torch.testing.assert_close(leaves(new), leaves(optim.update(tree_state, ps.to_dict(), grads.to_dict())[1]))


def test_torchopt_on_a_tree(draw):
    ps, grads = draw(), draw()
    for rule in (torchopt.adamw(0.1), torchopt.chain(torchopt.clip_grad_norm(1.0), optim.Adam(0.1))):
        opt_state = optim.freeze(optim.setup(rule, ps), "layer_1")
        _, new = optim.update(opt_state, ps, grads)
        alone = {"layer_2": ps["layer_2"]}
        _, expected = optim.update(optim.setup(rule, alone), alone, {"layer_2": grads["layer_2"]})
        assert all(torch.equal(a, b) for a, b in zip(leaves(new["layer_1"]), leaves(ps["layer_1"]), strict=True))
        torch.testing.assert_close(new["layer_2"], expected["layer_2"])


def test_chain_on_a_vector(draw):
    """Where only rules of ours remember anything, a chain can be taken apart too."""
    ps, grads = ComponentVector(draw()), ComponentVector(draw())
    chain = torchopt.chain(torchopt.clip_grad_norm(0.1), optim.Adam(0.1))
    opt_state = optim.freeze(optim.setup(chain, ps), "layer_1")
    _, new = optim.update(opt_state, ps, grads)
    tree_state = optim.freeze(optim.setup(chain, ps.to_dict()), "layer_1")
    _, expected = optim.update(tree_state, ps.to_dict(), grads.to_dict())
    torch.testing.assert_close(new.to_dict(), expected)


def test_torchopt_on_a_vector(draw):
    """A component of a flat vector is frozen in a torchopt optimizer, in the middle of training, as in a dict."""
    ps, grads = draw(), [draw() for _ in range(4)]
    vector, noises = ComponentVector(ps), [ComponentVector(g) for g in grads]
    state, vector_state = (optim.setup(torchopt.adam(0.1), tree) for tree in (ps, vector))
    for i, (g, noise) in enumerate(zip(grads, noises, strict=True)):
        if i == 2:
            state, vector_state = optim.freeze(state, "layer_1"), optim.freeze(vector_state, "layer_1")
            kept = vector.layer_1.weight
        state, ps = optim.update(state, ps, g)
        vector_state, vector = optim.update(vector_state, vector, noise)
    assert torch.equal(vector.layer_1.weight, kept)
    torch.testing.assert_close(vector.to_dict(), ps, rtol=1e-12, atol=1e-12)


def test_structure_comes_back(rule, draw):
    """Freezing and thawing a tree leads to the structure, hence the compiled graph, there was before."""
    opt_state = optim.setup(rule, draw())
    frozen = optim.freeze(opt_state, "layer_1")
    assert pytree.tree_structure(frozen) != pytree.tree_structure(opt_state)
    assert pytree.tree_structure(optim.thaw(frozen)) == pytree.tree_structure(opt_state)
    assert optim.thaw(opt_state, "layer_2").layout == opt_state.layout


@pytest.mark.parametrize("change", [optim.freeze, optim.thaw])
def test_misspelt_paths(make, draw, change):
    opt_state = optim.setup(optim.Adam(), make(draw()))
    with pytest.raises(KeyNameError, match="No parameter is named 'layer_1.bais'(.|\n)*Did you mean 'layer_1.bias'"):
        change(opt_state, "layer_1.bais")
    with pytest.raises(KeyNameError, match="The predicate is true of no parameter"):
        change(opt_state, lambda name: False)
