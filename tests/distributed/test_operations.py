"""What two ranks get of each operation, against the same in plain torch."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import luxtorch as lt

from .work import (
    COMPILED,
    DTYPES,
    FLOATS,
    MODEL,
    NUMBERS,
    TRANSFORMS,
    begin,
    compiled,
    everything,
    mistaken,
    plain,
    problem,
    sharded_derivatives,
    transformed,
    values,
)
from .world import run

RANKS = range(2)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run(everything, 2, tmp_path_factory.mktemp("first"))


def same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **(tolerance or {"rtol": 0, "atol": 0}))


def test_each_process_knows_its_place(found):
    assert [(one["rank"], one["ranks"], one["initialized"]) for one in found] == [(0, 2, True), (1, 2, True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank_gets_the_values_of_the_root(dtype, found):
    for one in found:
        for name, value in values(dtype, 1).items():
            got = one[f"synchronized {dtype}"][name]
            assert got.dtype == value.dtype and torch.equal(got.to(torch.complex128), value.to(torch.complex128))


def test_a_whole_training_state_is_synchronized(found):
    first, second = (one["synchronized state"] for one in found)
    same(first, second)
    ps, st = lt.setup(0, lt.Chain(lt.BatchNorm(2), lt.Dropout(0.5)))
    assert torch.equal(second["states.layer_2.rng"], st["layer_2"]["rng"])
    assert all(all(one["kept"]) for one in found)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_every_dtype_are_averaged(dtype, found):
    for one in found:
        same(one[f"averaged {dtype}"], values(dtype, 1))


def test_a_tree_of_several_dtypes_is_averaged(found):
    for one in found:
        mixed = one["averaged mixed"]
        assert mixed["b"] is None
        for name, dtype in (("a", "float32"), ("c", "float64")):
            expected = {leaf: value + 0.5 for leaf, value in values(dtype, 0).items()}
            same(mixed[name], expected)
        same(mixed["d"], torch.tensor(1.0))


def test_a_mean_of_large_numbers_is_finite(found):
    for one in found:
        same(one["averaged large"], torch.full((3,), 60000.0, dtype=torch.float16))


def test_statistics_are_averaged_and_keys_kept(found):
    own = [one["own states"] for one in found]
    for one, mine in zip(found, own, strict=True):
        for name in ("layer_1.running_mean", "layer_1.running_var"):
            assert not torch.equal(own[0][name], own[1][name])
            same(one["averaged states"][name], (own[0][name] + own[1][name]) / 2, rtol=1e-6, atol=0)
        assert torch.equal(one["averaged states"]["layer_2.rng"], mine["layer_2.rng"])


def test_each_rank_has_keys_of_its_own(found):
    key = lt.setup(0, lt.Chain(lt.BatchNorm(2), lt.Dropout(0.5)))[1]["layer_2"]["rng"]
    keys = [one["own key"] for one in found]
    assert len({tuple(k.tolist()) for k in (*keys, key)}) == 3
    for rank in RANKS:
        assert torch.equal(keys[rank], lt.random.fold_in(key, rank)) and found[rank]["own mode"]


def test_uneven_rows_are_dropped_or_repeated(found):
    rows = torch.arange(14.0).reshape(7, 2)
    for uneven, joined in (("drop", rows[:6]), ("repeat", torch.cat([rows, rows[:1]]))):
        for rank, part in enumerate(joined.chunk(2)):
            x, tree = found[rank][f"rows {uneven}"]
            same(x, part)
            same(tree["y"], part[:, 0])
    same(torch.cat([one["loaded"] for one in found]), rows[:6])


def test_sharded_parameters_are_those_of_the_first_rank(found):
    rows = torch.arange(14.0).reshape(7, 2)
    for rank in RANKS:
        whole = found[rank]["whole"]
        same(whole["count"], torch.tensor(rank))  # no parameter
        same([whole["matrix"], whole["bias"], whole["scale"]], [rows[:5], torch.tensor([2.0]), torch.tensor(3.0)])


def test_each_rank_holds_half_of_a_vector_and_of_its_optimizer(found):
    size = lt.parameter_length(MODEL)
    assert [one["own sizes"] for one in found] == [[size // 2, size // 2, size]] * 2
    # LAMB looks at components, and so puts the vector together.
    assert [one["sharded again"] for one in found] == [[size, size // 2]] * 2
    assert all(all(one["sharded kept"]) for one in found)


def reference(name):
    """Return what a transform makes of the mean of what both ranks compute."""

    def mean(x):
        return torch.stack([torch.sin((rank + 1) * x) for rank in RANKS]).mean(0)

    f = (lambda tree: {"x": mean(tree["x"])}) if name == "dict" else mean
    return TRANSFORMS[name](f, NUMBERS)


@pytest.fixture(scope="module")
def found_transformed(tmp_path_factory):
    return run(transformed, 2, tmp_path_factory.mktemp("transformed"))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("ignore")  # torch's own, of forward mode
def test_transforms_see_the_mean(name, found_transformed):
    for one in found_transformed:
        same(one[name], reference(name), rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def found_compiled(tmp_path_factory):
    return run(compiled, 2, tmp_path_factory.mktemp("compiled"))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_transforms_see_the_mean(name, found_compiled):
    for one in found_compiled:
        same(one[name], reference(name), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["averaged vector", "rule, dict", "scattered"])
def test_a_compiled_step_is_the_step(way, found_compiled):
    ts, step = begin(way, "clipped")  # in this process alone, on the whole batch
    for _ in range(3):
        _, ts = step(ts, problem()[2][0])
    for one in found_compiled:
        same(one[way], plain(ts.parameters), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_the_derivative_of_a_compiled_objective_is_sharded(found_compiled):
    for one in found_compiled:
        same(one["sharded gradient"], torch_derivatives()[0], rtol=1e-9, atol=1e-12)


def torch_derivatives():
    """Return gradient and its product with the Hessian, of the whole batch, by the plain tape."""
    ps, st, batches = problem()
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in lt.flatten_names(ps).items()}
    x, y = batches[0]
    hidden = nn.functional.linear(x, leaves["layer_1.weight"], leaves["layer_1.bias"]).tanh()
    loss = nn.functional.mse_loss(nn.functional.linear(hidden, leaves["layer_2.weight"], leaves["layer_2.bias"]), y)
    grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    products = torch.autograd.grad(sum((g * g.detach()).sum() for g in grads), list(leaves.values()))
    return [lt.unflatten_names(dict(zip(leaves, column, strict=True))) for column in (grads, products)]


@pytest.fixture(scope="module")
def found_derivatives(tmp_path_factory):
    return run(sharded_derivatives, 2, tmp_path_factory.mktemp("derivatives"))


@pytest.mark.filterwarnings("ignore")  # torch's own, of forward mode
@pytest.mark.parametrize("form", ["vector", "dict"])
@pytest.mark.parametrize("what", ["gradient", "rows", "hvp", "twice"])
def test_sharded_parameters_are_differentiated(form, what, found_derivatives):
    gradient, product = torch_derivatives()
    for one in found_derivatives:
        same(one[f"{what}, {form}"], product if what in ("hvp", "twice") else gradient, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return run(mistaken, 2, tmp_path_factory.mktemp("mistaken"))


MISTAKES = {
    "root": "InputError: root must be at least 0 and below the number of ranks, 2.*7",
    "negative root": "InputError: root must be at least 0.*-1",
    "shapes": r"InputError: All ranks must have.*rank 1 differs from.*shape \(2,\).*shape \(3,\).*same model",
    "dtypes": "InputError: All ranks must have the same tree.*float32.*float64",
    "names": "InputError: All ranks must have the same tree.*'a'.*'b'",
    "more": "InputError: All ranks must have the same tree.*no more leaves.*'1'",
    "inside": "InputError: .*must be called outside of transforms.*before training",
    "sharding inside": "InputError: .*must be called outside of transforms.*before training",
    "integers": "DTypeError: A gradient must be a floating point or complex tensor.*int64.*average_states",
    "uneven": 'InputError: The number of items must be a multiple of 2.*5.*uneven="drop".*uneven="repeat"',
    "too few": "InputError: The number of items must be at least 2",
    "way": "InputError: .*'error', 'drop' or 'repeat'.*'pad'",
    "stream": r"DTypeError: dataset must be tensors with.*list_iterator.*distributed.rank\(\)",
    "sizes": "InputError: .*same first dimension, the number of items.*'0' has 4, '1' has 6",
    "structure": r"InputError: .*must have the structure of the parameters.*weight.*bias.*gather_parameters\(ps\)",
    "shape": r"InputError: A gradient has the wrong shape.*\(4,\).*\(5,\)",
    "occupied": "DistributedError: .*cannot be written.*FileExistsError.*is not a checkpoint",
    "no folder": "DistributedError: .*cannot be written.*FileNotFoundError",
    "leaf": "DTypeError: The leaf 'a' must be a tensor.*3",
    "twice": "KeyNameError: .*two leaves of the name 'a.b'",
    "absent": "DistributedError: .*absent: The checkpoint cannot be read.*FileNotFoundError",
    "other names": "KeyNameError: .*must have the names.*without 'wieght'.*Did you mean 'weight'",
    "other shape": r"InputError: .*the shapes and dtypes.*'weight' is.*\(3,\).*'weight' is float32 of shape \(2,\)",
    "other dtype": "InputError: .*must have the shapes and dtypes.*'weight' is float64.*'weight' is float32.*precision",
    "other axes": r"InputError: .*must have the shapes and dtypes.*Axes\(b=.*Axes\(a=",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained_on_every_rank(mistake, said):
    for one in said:
        assert re.search(MISTAKES[mistake], one[mistake], re.DOTALL), one[mistake]


def test_no_mistake_is_left_out(said):
    assert said[0].keys() == MISTAKES.keys()
