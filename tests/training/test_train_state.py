"""The training state as a value: fields, printing, changes, errors, and what a pytree is good for."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.utils import _pytree as pytree

import luxtorch as lt
from luxtorch import optim, training


def test_fields(new):
    ts = new(rule=optim.Adam(0.1))
    assert ts.model is new().model and ts.rule == optim.Adam(0.1)
    assert ts.step.dtype == torch.int64 and ts.step == 0 and ts.skipped == 0
    assert isinstance(ts.optimizer_state, optim.OptState)
    assert set(ts.parameters) == set(ts.states)


def test_is_a_pytree_of_tensors(new, tree, equal):
    ts = new(tree)
    names = [name for name, _ in lt.core.named_leaves(ts)]
    assert names[0].startswith("parameters.") and names[-2:] == ["step", "skipped"]
    leaves, spec = pytree.tree_flatten(ts)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    equal(pytree.tree_unflatten(leaves, spec), ts)


def test_states_that_differ_in_the_learning_rate_have_one_structure(new):
    one, other = new(rule=optim.Adam(0.1)), new(rule=optim.Adam(0.2))
    assert pytree.tree_structure(one) == pytree.tree_structure(other)
    assert hash(one._statics) == hash(other._statics)
    assert pytree.tree_structure(one) != pytree.tree_structure(new(rule=optim.Descent(0.1)))


def test_prints(new, data, objective):
    ts = new(rule=optim.Descent(0.5))
    text = repr(training.single_train_step(objective, data, ts)[3])
    assert text.startswith("TrainState(\n    step 1, 34 parameters\n    OptState(Descent(lr=0.5), 6 parameters)\n")
    assert "layer_2 = BatchNorm(4)" in text
    shown = []
    torch.vmap(lambda x: shown.append(repr(ts.replace(step=ts.step + x))) or x)(torch.arange(2))
    assert "step <traced>" in shown[0]
    skipped = ts.replace(skipped=ts.skipped + 2)
    assert "step 0 (2 skipped)" in repr(skipped)


def test_adjust(new, data, objective):
    ts = new(rule=optim.Momentum(0.1, 0.5))
    ts = training.single_train_step(objective, data, ts)[3]
    slower = ts.adjust(0.0, momentum=0.0)
    equal_to_before = training.single_train_step(objective, data, slower)[3].parameters
    assert torch.equal(equal_to_before["layer_1"]["weight"], ts.parameters["layer_1"]["weight"])
    assert "lr=0.1, momentum=0.5" in repr(ts) and "lr=0.0, momentum=0.0" in repr(slower)
    with pytest.raises(lt.KeyNameError, match="no hyperparameter 'momentun'"):
        ts.adjust(momentun=0.1)


def test_adjust_by_path(new, data, objective):
    ts = new(rule=optim.Descent(0.1)).adjust(lr=0.0, path="layer_1")
    after = training.single_train_step(objective, data, ts)[3].parameters
    assert torch.equal(after["layer_1"]["weight"], ts.parameters["layer_1"]["weight"])
    assert not torch.equal(after["layer_4"]["weight"], ts.parameters["layer_4"]["weight"])


def test_replace(new):
    ts = new()
    other = ts.replace(states=lt.test_mode(ts.states), model=lt.NoOpLayer())
    assert other.model == lt.NoOpLayer() and other.parameters is ts.parameters
    assert not other.states["layer_2"]["training"] and ts.states["layer_2"]["training"]
    with pytest.raises(lt.KeyNameError, match="no field 'parameter'") as error:
        ts.replace(parameter={})
    assert "Did you mean 'parameters'?" in str(error.value)
    with pytest.raises(lt.KeyNameError, match="no field 'rule'") as error:
        ts.replace(rule=optim.Adam())
    assert "Make a new one" in str(error.value)


def test_does_not_change(new):
    ts = new()
    with pytest.raises(lt.InputError, match="does not change"):
        ts.parameters = {}
    with pytest.raises(lt.InputError, match="does not change"):
        del ts.step
    with pytest.raises(AttributeError):
        _ = ts.params


def test_wrong_parts():
    ps, st = lt.setup(0, lt.Dense(2, 2))
    with pytest.raises(lt.InputError, match="model must be a layer or a function"):
        training.TrainState(ps, ps, st, optim.Adam())
    with pytest.raises(lt.InputError, match="model must be a layer or a function"):
        training.TrainState(lt.Dense, ps, st, optim.Adam())
    with pytest.raises(lt.DTypeError, match="not a gradient transformation"):
        training.TrainState(lt.Dense(2, 2), ps, st, torch.optim.Adam)
    with pytest.raises(lt.DTypeError, match="not a tensor"):
        training.TrainState(lt.Dense(2, 2), {"weight": 1.0}, st, optim.Adam())


def test_copies_and_saves(new, tree, equal):
    ts = new(tree)
    equal(copy.deepcopy(ts), ts)
    buffer = io.BytesIO()  # torch does not load a key that pickle has written by itself
    torch.save(ts, buffer)
    buffer.seek(0)
    equal(torch.load(buffer, weights_only=False), ts)


def test_moves_to_a_device(new, tree, data, objective, device):
    ts = new(tree)
    moved = lt.to_device(ts, device)
    assert isinstance(moved, training.TrainState)
    x, y = lt.to_device(data, device)
    moved = training.single_train_step(objective, (x, y), moved)[3]
    assert lt.get_device(moved).device == device and moved.step == 1
    shapes = lt.to_device(ts, "meta")
    assert lt.get_device(shapes).device.type == "meta" and shapes.model is ts.model
    assert "step <traced>" in repr(shapes)
    halved = lt.cpu_device(dtype=torch.float32)(ts)
    assert halved.step.dtype == torch.int64 and tree(halved.parameters)["layer_1"]["weight"].dtype == torch.float32


def test_is_made_and_stepped_in_a_batch(new, tree, data, objective, make_key, equal):
    model = new().model
    keys = lt.random.split(make_key(), 4)
    rates = torch.tensor([0.1, 0.01, 0.001, 0.0])

    def made(key, lr):
        ps, st = lt.f64(lt.setup(key, model))
        return training.TrainState(model, tree(ps), st, optim.Adam(lr))

    def steps(ts):
        for _ in range(3):
            grads, loss, stats, ts = training.single_train_step(objective, data, ts)
        return grads, loss, stats, ts

    many = torch.vmap(made)(keys, rates)
    assert many.step.shape == (4,)
    results = torch.vmap(steps)(many)
    for i in range(4):
        alone = steps(made(keys[i], rates[i].item()))
        equal(pytree.tree_map(lambda leaf, i=i: leaf[i], results), alone, rtol=1e-10, atol=1e-12)
