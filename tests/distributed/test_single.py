"""A process of its own, in which everything is the identity; and what can be checked without others."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
import torchopt
from hypothesis import given
from hypothesis import strategies as some
from torch.utils.data import TensorDataset

import luxtorch as lt
from luxtorch import distributed, optim

from .work import MODEL, problem

PS, ST, BATCHES = problem()


def test_a_process_of_its_own_is_the_first_of_one():
    distributed.initialize()
    distributed.shutdown()
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
    assert not distributed.initialized()


@pytest.mark.parametrize("form", [dict, lt.ComponentVector])
@pytest.mark.parametrize(
    "operation",
    [
        distributed.synchronize,
        distributed.average_gradients,
        distributed.average_states,
        distributed.fold_in_rank,
        distributed.shard_data,
        distributed.shard_parameters,
    ],
)
def test_alone_everything_is_the_identity(operation, form):
    tree = form({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    assert operation(tree) is tree


@pytest.mark.parametrize("form", [dict, lt.ComponentVector])
def test_alone_gathering_and_scattering_keep_the_tensors(form):
    tree = form({"weight": torch.ones(2, 3)})
    for result in (distributed.gather_parameters(tree), distributed.scatter_gradients(tree, tree)):
        assert type(result) is type(tree)
        assert all(a is b for a, b in zip(lt.core.tree_leaves(result), lt.core.tree_leaves(tree), strict=True))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rank": 0}, r"passed together[\s\S]*rank=0"),
        ({"init_method": "file:///nowhere"}, r"passed together[\s\S]*nowhere"),
        (
            {"init_method": "file:///nowhere", "rank": 2, "world_size": 2},
            r"rank must be at least 0 and below world_size, which is 2",
        ),
        ({"timeout": 0.0}, r"timeout must be positive[\s\S]*0.0"),
        ({"timeout": float("nan")}, "timeout must be positive"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(arguments, said):
    with pytest.raises(lt.InputError, match=said):
        distributed.initialize(**arguments)
    assert not distributed.initialized()


def test_half_of_an_environment_is_an_error(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(lt.InputError, match=r"cannot meet[\s\S]*WORLD_SIZE[\s\S]*torchrun"):
        distributed.initialize()


def test_nobody_else_comes_in_time(tmp_path):
    with pytest.raises(distributed.DistributedError, match="The meeting of all ranks failed"):
        distributed.initialize(init_method=f"file://{tmp_path}/meet", rank=0, world_size=2, timeout=1.0)
    assert not distributed.initialized()


def test_an_initialized_world_of_one_is_the_identity_too(tmp_path):
    distributed.initialize(init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        distributed.initialize()  # the second time, nothing happens
        tree = {"weight": torch.ones(2)}
        assert distributed.initialized() and distributed.world_size() == 1
        assert distributed.shard_parameters(tree) is tree and distributed.synchronize(tree) is tree
        distributed.save_checkpoint(tmp_path / "step", tree)
        assert torch.equal(distributed.load_checkpoint(tmp_path / "step", tree)["weight"], tree["weight"])
    finally:
        distributed.shutdown()


# The rule.


@pytest.mark.parametrize("form", [dict, lt.ComponentVector])
@pytest.mark.parametrize(
    "rule",
    [
        optim.Descent(0.1),
        optim.Adam(0.1),
        optim.LAMB(0.1),
        optim.OptimiserChain(optim.AccumGrad(2), optim.ClipNorm(0.1), optim.AdamW(0.1)),
        optim.MixedPrecision(optim.Adam(0.1)),
        torchopt.sgd(0.1, momentum=0.9),
        torchopt.adam(0.1),
    ],
    ids=lambda rule: str(rule) if isinstance(rule, optim.ListRule) else None,
)
def test_alone_the_rule_is_the_one_inside(rule, form):
    ps = form(PS)
    wrapped = optim.setup(distributed.DistributedRule(rule), ps)
    bare, expected = optim.setup(rule, ps), ps
    for _ in range(4):
        wrapped, ps = optim.update(wrapped, ps, lt.gradient(loss, ps))
        bare, expected = optim.update(bare, expected, lt.gradient(loss, expected))
    for found, wanted in zip(lt.core.tree_leaves(ps), lt.core.tree_leaves(expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def loss(ps):
    x, y = BATCHES[0]
    return (MODEL(x, ps, ST)[0] - y).square().mean()


def test_the_rule_is_adjusted_and_frozen_like_any_other():
    opt_state = optim.setup(distributed.DistributedRule(optim.Descent(0.5)), PS)
    opt_state = optim.freeze(optim.adjust(opt_state, 0.25), "layer_1")
    assert "Descent(lr=0.25)" in str(opt_state) and "frozen: layer_1" in str(opt_state)
    grads = lt.core.tree_map(torch.ones_like, PS)
    _, new = optim.update(opt_state, PS, grads)
    assert torch.equal(new["layer_2"]["bias"], PS["layer_2"]["bias"] - 0.25)
    assert torch.equal(new["layer_1"]["bias"], PS["layer_1"]["bias"])


def test_a_rule_is_a_value():
    rule = distributed.DistributedRule(optim.Adam(0.1))
    assert rule == distributed.DistributedRule(optim.Adam(0.1)) != distributed.DistributedRule(optim.Adam(0.2))
    assert hash(rule) == hash(pickle.loads(pickle.dumps(rule)))
    assert repr(rule) == f"DistributedRule({optim.Adam(0.1)!r})" and rule.rule == optim.Adam(0.1)


@pytest.mark.parametrize("wrong", [optim.Adam, 0.1, torch.optim.SGD([torch.ones(1, requires_grad=True)], 0.1)])
def test_what_is_no_rule_is_an_error(wrong):
    with pytest.raises(lt.DTypeError, match=r"rule must be a rule such as optim.Adam\(1e-3\)"):
        distributed.DistributedRule(wrong)


# The data, with other worlds in place of the real one.


@pytest.fixture
def place(monkeypatch):
    def set_place(rank, ranks):
        monkeypatch.setattr("luxtorch.distributed._world.rank", lambda: rank)
        monkeypatch.setattr("luxtorch.distributed._world.world_size", lambda: ranks)

    return set_place


@given(size=some.integers(1, 60), ranks=some.integers(1, 9), uneven=some.sampled_from(["error", "drop", "repeat"]))
def test_the_shares_are_equal_and_together_all(size, ranks, uneven):
    rows = torch.arange(3 * size).reshape(size, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("luxtorch.distributed._world.world_size", lambda: ranks)
        shares = []
        for rank in range(ranks):
            patch.setattr("luxtorch.distributed._world.rank", lambda rank=rank: rank)
            try:
                x, tree = distributed.shard_data((rows, {"y": rows.numpy()[:, 0]}), uneven=uneven)
                subset = distributed.shard_data(TensorDataset(rows), uneven=uneven)
            except lt.InputError:
                assert (size % ranks and uneven == "error") or (size < ranks and uneven == "drop")
                return
            assert torch.equal(x[:, 0], torch.from_numpy(tree["y"]))
            assert torch.equal(x, torch.stack([subset[i][0] for i in range(len(subset))]))
            shares.append(x)
    assert len({len(share) for share in shares}) == 1
    joined, whole = torch.cat(shares), size // ranks * ranks
    if uneven == "repeat":
        repeated = rows.repeat(ranks + 1, 1)
        assert len(joined) < size + ranks and torch.equal(joined, repeated[: len(joined)])
    else:
        assert torch.equal(joined, rows[:whole])


def test_a_slice_of_a_tensor_is_no_copy(place):
    place(1, 2)
    x = torch.arange(6.0)
    assert distributed.shard_data(x).data_ptr() == x[3:].data_ptr()


def test_a_list_of_samples_is_a_dataset(place):
    place(1, 2)
    assert list(distributed.shard_data(["a", "b", "c", "d"])) == ["c", "d"]


@pytest.mark.parametrize("wrong", [{}, {"a": 3}, 3, torch.tensor(1.0), None])
def test_what_has_no_items_cannot_be_shared_out(wrong, place):
    place(0, 2)
    with pytest.raises(lt.LuxtorchError, match=r"dataset must be tensors with a common first dimension|multiple"):
        distributed.shard_data(wrong)


def test_importing_luxtorch_does_not_load_this():
    """Most programs have one process: what this needs of torch comes when it is asked for."""
    code = "import sys, luxtorch; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
