"""A training state that a compiled step returns is assembled when somebody looks into it, and is like any other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.jit import jit


@pytest.fixture
def start():
    model = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.BatchNorm(4), lt.Dropout(0.5), lt.Dense(4, 1))
    ps, st = lt.setup(0, model)
    return training.TrainState(model, ps, st, optim.Adam(0.01))


@pytest.fixture
def batch():
    return torch.linspace(0, 1, 12).reshape(4, 3), torch.ones(4, 1)


def step(ts, batch):
    _, loss, _, ts = training.single_train_step(lt.losses.MSELoss(), batch, ts)
    return loss, ts


def waits(ts):
    return ts._deferred is not None


def leaves(ts):
    return torch.utils._pytree.tree_leaves(ts)


KINDS = {"dict": lambda ps: ps, "vector": lt.ComponentVector}


def fresh(ts, kind):
    ps, st = copy.deepcopy((ts.parameters, ts.states))
    return training.TrainState(ts.model, KINDS[kind](ps), st, optim.Adam(0.01))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("donate", [(), "ts"], ids=["kept", "donated"])
def test_steps_go_on_without_assembling(start, batch, kind, donate, same):
    jitted = jit(step, backend="replay", donate=donate)
    ts, wanted = fresh(start, kind), fresh(start, kind)
    for i in range(5):
        loss, ts = jitted(ts, batch)
        loss_2, wanted = step(wanted, batch)
        torch.testing.assert_close(loss, loss_2)
        assert waits(ts)
        if i == 2:
            assert int(ts.step) == 3 and not waits(ts)
    assert jitted.cache_info().misses == 1 and jitted.cache_info().hits == 4
    same(ts, wanted)


USES = {
    "repr": repr,
    "html": lambda ts: ts._repr_html_(),
    "leaves": lambda ts: [leaf.tolist() for leaf in leaves(ts)],
    "parameters": lambda ts: [leaf.tolist() for leaf in leaves(ts.parameters)],
    "states": lambda ts: str(ts.states),
    "rule": lambda ts: ts.rule,
    "model": lambda ts: ts.model,
    "adjust": lambda ts: repr(ts.adjust(lr=0.5)),
    "replace": lambda ts: repr(ts.replace(step=torch.tensor(7))),
    "pickle": lambda ts: repr(pickle.loads(pickle.dumps(ts))),
    "copy": lambda ts: repr(copy.copy(ts)),
    "deepcopy": lambda ts: repr(copy.deepcopy(ts)),
    "eager step": lambda ts: step(ts, (torch.ones(4, 3), torch.ones(4, 1)))[0].item(),
    "donated step": lambda ts: training.single_train_step(
        lt.losses.MSELoss(), (torch.ones(4, 3), torch.ones(4, 1)), ts, donate=True
    )[1].item(),
    "another jit": lambda ts: jit(lambda ts: ts.step + 1, backend="replay")(ts).item(),
    "inside of a jit": lambda ts: jit(lambda x: x + leaves(ts.parameters)[0].sum(), backend="replay")(torch.ones(())),
    "device": lambda ts: repr(lt.to_device(ts, "cpu")),
    "unknown attribute": lambda ts: pytest.raises(AttributeError, getattr, ts, "nothing").value.args,
    "set": lambda ts: str(pytest.raises(lt.InputError, setattr, ts, "step", 1).value),
    "compile": lambda ts: torch.compile(lambda ps: leaves(ps)[0].sum(), backend="eager")(ts.parameters).item(),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("use", USES)
def test_it_is_like_any_other(start, batch, use):
    _, deferred = jit(step, backend="replay")(start, batch)
    _, assembled = jit(step, backend="replay")(start, batch)
    leaves(assembled)
    assert waits(deferred) and not waits(assembled)
    assert USES[use](deferred) == USES[use](assembled)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile_takes_it_whole(start, batch, kind, same):
    _, ts = jit(step, backend="replay")(fresh(start, kind), batch)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    same(compiled(ts, batch), step(ts, batch))


def test_what_was_changed_by_hand_counts(start, batch, same):
    jitted = jit(step, backend="replay")
    _, ts = jitted(start, batch)
    ts.parameters["layer_1"]["bias"] = torch.full((4,), 9.0)
    _, wanted = step(ts, batch)
    same(jitted(ts, batch)[1], wanted)
    assert jitted.cache_info().misses == 1


def test_another_shape_is_found_out(start, batch, same):
    jitted = jit(step, backend="replay")
    _, ts = jitted(start, batch)
    smaller = batch[0][:3], batch[1][:3]
    same(jitted(ts, smaller)[1], step(ts, smaller)[1])
    assert jitted.cache_info().misses == 2
    with torch.no_grad():
        same(jitted(jitted(start, batch)[1], batch)[1], step(step(start, batch)[1], batch)[1])


def test_it_goes_by_name_and_in_trees_too(start, batch, same):
    jitted = jit(lambda pair, *, scale: (step(*pair)[1], scale), backend="replay")
    ts, scale = jitted((start, batch), scale=torch.ones(()))
    assert waits(ts)
    again, _ = jitted((ts, batch), scale=scale)
    same(again, step(step(start, batch)[1], batch)[1])


def test_nodes_beside_it_may_insist_on_tensors(start, batch):
    class Strict:
        def __init__(self, x):
            self.x = x.detach()

    torch.utils._pytree.register_pytree_node(Strict, lambda one: ([one.x], None), lambda xs, _: Strict(*xs))
    jitted = jit(lambda ts, x: (step(ts, batch)[1], Strict(x + 1)), backend="replay")
    for _ in range(2):
        ts, strict = jitted(start, torch.zeros(2))
    assert int(ts.step) == 1 and strict.x.tolist() == [1.0, 1.0]


def test_a_donated_state_cannot_be_read_afterwards(start, batch):
    jitted = jit(step, backend="replay", donate="ts")
    _, ts = jitted(start, batch)
    jitted(ts, batch)
    with pytest.raises(lt.errors.LuxtorchError, match="donated"):
        _ = leaves(ts.parameters)[0] + 1


def test_under_transforms_the_state_is_read(start, batch):
    _, ts = jit(step, backend="replay")(start, batch)
    stacked = torch.func.vmap(lambda x: step(ts, (x, batch[1]))[0], randomness="same")(torch.ones(2, 4, 3))
    assert stacked.shape == (2,)
