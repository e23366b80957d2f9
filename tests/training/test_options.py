"""The options of a step: microbatches, mixed precision, steps that are not finite; each alone, and all together."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.layers import Checkpointed
from luxtorch.optim import ClipNorm, OptimiserChain

PLAIN = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.Dense(4, 2))


# Gradient accumulation.


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_microbatches_give_the_gradient_of_the_whole(new, tree, data, objective, equal, n):
    ts = new(tree, model=PLAIN)
    whole = training.single_train_step(objective, data, ts)
    grads, loss, stats, after = training.single_train_step(objective, data, ts, accumulate=n)
    equal((grads, loss, after), (whole[0], whole[1], whole[3]), rtol=1e-10, atol=1e-12)
    assert after.step == 1
    if n > 1:
        assert len(stats) == n and all(int(one["count"]) == 8 // n for one in stats)
        torch.testing.assert_close(torch.stack([one["largest"] for one in stats]).max(), whole[2]["largest"])


def test_states_go_from_one_microbatch_to_the_next(new, data, objective, equal):
    ts = new()
    after = training.compute_gradients(objective, data, ts, accumulate=2)[3]
    st = ts.states
    for part in (0, 4):
        st = ts.model(data[0][part : part + 4], ts.parameters, st)[1]
    equal(after.states, st)
    assert not torch.equal(after.states["layer_3"]["rng"], ts.states["layer_3"]["rng"])


def test_what_has_no_batch_is_in_every_microbatch(new, data):
    def objective(model, ps, st, data):
        y_hat, st = model(data["x"], ps, st)
        return data["scale"] * y_hat.square().mean(), st, {"name": data["name"]}

    batch = {"x": data[0], "scale": torch.tensor(2.0, dtype=torch.float64), "name": "a"}
    ts = new(model=PLAIN)
    loss, stats = training.compute_gradients(objective, batch, ts, accumulate=4)[1:3]
    torch.testing.assert_close(loss, training.compute_gradients(objective, batch, ts)[1])
    assert stats == ({"name": "a"},) * 4


@pytest.mark.parametrize(
    ("change", "n", "text"),
    [
        (lambda data: data, 3, r"0 \(8, 3\), 1 \(8, 2\)"),
        (lambda data: (data[0], data[1][:4]), 4, r"1 \(4, 2\)"),
        (lambda data: (data[0][:0], data[1][:0]), 2, r"0 \(0, 3\)"),
        (lambda data: 3.0, 2, "3.0 of type float"),
        (lambda data: data, 0, "positive integer"),
        (lambda data: data, 2.0, "positive integer"),
    ],
)
def test_data_that_cannot_be_split(new, data, objective, change, n, text):
    with pytest.raises(lt.InputError, match=text):
        training.single_train_step(objective, change(data), new(model=PLAIN), accumulate=n)


# Mixed precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_model_computes_in_a_lower_precision(new, tree, data, dtype):
    seen = {}

    class Spy(lt.WrapperLayer):
        layer: lt.Layer

        def __call__(self, x, ps, st):
            y, st = self.layer(x, ps, st)
            seen.update(x=x.dtype, y=y.dtype, ps=ps["layer_1"]["weight"].dtype)
            return y, st

    def objective(model, ps, st, data):
        y_hat, st = model(data[0], ps, st)
        assert model.layer == new().model  # it has the attributes of the model that it casts for
        seen.update(y_hat=y_hat.dtype, target=data[1].dtype, outside=ps["layer_1"]["weight"].dtype)
        return (y_hat - data[1]).square().mean(), st, {}

    ts, batch = new(tree, model=Spy(new().model), dtype=torch.float32), lt.f32(data)
    grads, loss, _, after = training.single_train_step(objective, batch, ts, dtype=dtype)
    assert seen["x"] == seen["ps"] == seen["y"] == dtype
    assert seen["y_hat"] == seen["target"] == seen["outside"] == torch.float32
    exact, exact_loss, _, exact_after = training.single_train_step(lt.MSELoss(), batch, ts)
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss, exact_loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(pytree.tree_leaves(grads), pytree.tree_leaves(exact), rtol=tolerance, atol=tolerance)
    for a, b in zip(pytree.tree_leaves(after), pytree.tree_leaves(exact_after), strict=True):
        assert a.dtype == b.dtype


def test_a_scaled_loss_keeps_small_gradients_of_float16(new, data):
    def objective(model, ps, st, data):
        return model(data[0], ps, st)[0].square().mean() * 1e-7, st, {}

    ts = new(model=PLAIN, dtype=torch.float32)
    batch = lt.f32(data)
    exact = training.compute_gradients(objective, batch, ts)
    lost = training.compute_gradients(objective, batch, ts, dtype=torch.float16)
    kept = training.compute_gradients(objective, batch, ts, dtype=torch.float16, loss_scale=2.0**20)
    torch.testing.assert_close(kept[1], exact[1], rtol=1e-2, atol=0.0)
    weight = exact[0]["layer_1"]["weight"]
    torch.testing.assert_close(kept[0]["layer_1"]["weight"], weight, rtol=2e-2, atol=float(weight.abs().max()) * 1e-2)
    assert (lost[0]["layer_1"]["weight"] - weight).abs().max() > 0.05 * weight.abs().max()


def test_a_loss_scale_alone_changes_nothing(new, tree, data, objective, equal):
    ts = new(tree)
    scaled = training.single_train_step(objective, data, ts, loss_scale=torch.tensor(1024.0))
    equal(scaled, training.single_train_step(objective, data, ts), rtol=1e-12, atol=1e-14)


def test_a_dtype_without_fractions(new, data, objective):
    with pytest.raises(lt.DTypeError, match="must be a floating point dtype"):
        training.single_train_step(objective, data, new(), dtype=torch.int32)


# Steps that are not finite.


def _spoilt(value):
    def objective(model, ps, st, data):
        y_hat, st = model(data[0], ps, st)
        return (y_hat * value).square().mean(), st, {}

    return objective


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("donate", [False, True])
def test_a_step_that_is_not_finite_is_skipped(new, tree, data, objective, equal, value, donate):
    ts = training.single_train_step(objective, data, new(tree))[3]
    before = pytree.tree_map(torch.clone, ts)
    after = training.single_train_step(_spoilt(value), data, ts, skip_nonfinite=True, donate=donate)[3]
    assert after.skipped == 1 and after.step == 1
    equal(after.replace(skipped=before.skipped), before)
    again = training.single_train_step(objective, data, after, skip_nonfinite=True)[3]
    assert again.skipped == 1 and again.step == 2
    equal(again.replace(skipped=before.skipped), training.single_train_step(objective, data, before)[3])


def test_without_the_option_nan_goes_through(new, data):
    after = training.single_train_step(_spoilt(float("nan")), data, new())[3]
    assert after.parameters["layer_1"]["weight"].isnan().all()


def test_the_halves_skip_too(new, data, objective, equal):
    ts = new()
    grads, _, _, half = training.compute_gradients(_spoilt(float("nan")), data, ts, skip_nonfinite=True)
    equal(half, ts)
    after = training.apply_gradients(half, grads, skip_nonfinite=True)
    equal(after.replace(skipped=ts.skipped), ts)
    assert after.skipped == 1


def test_one_graph_and_one_batch_for_both_outcomes(new, tree, data, equal):
    counter = CompileCounterWithBackend("aot_eager")

    def step(factor, ts):
        return training.single_train_step(_spoilt(factor), data, ts, skip_nonfinite=True)[3]

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    ts = eager = new(tree, model=PLAIN)
    for factor in (1.0, float("nan"), 2.0):
        number = torch.tensor([factor], dtype=torch.float64)
        ts, eager = compiled(number, ts), step(number, eager)
    assert counter.frame_count == 1 and ts.step == 2 and ts.skipped == 1
    equal(ts, eager, rtol=1e-10, atol=1e-12)
    factors = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    many = torch.vmap(step, in_dims=(0, None))(factors, new(tree, model=PLAIN))
    assert many.step.tolist() == [1, 0] and many.skipped.tolist() == [0, 1]


def test_states_that_change_their_structure(new, data):
    def objective(model, ps, st, data):
        return model(data[0], ps, st)[0].mean(), {}, {}

    with pytest.raises(lt.InputError, match="must keep the structure"):
        training.single_train_step(objective, data, new(), skip_nonfinite=True)


# Together.

OPTIONS = {
    "accumulate": {"accumulate": 2},
    "dtype": {"dtype": torch.float32, "loss_scale": 8.0},
    "skip": {"skip_nonfinite": True},
    "donate": {"donate": True},
}
COMBINATIONS = [names for n in range(2, 5) for names in itertools.combinations(OPTIONS, n)]


@pytest.mark.parametrize("names", COMBINATIONS, ids="-".join)
def test_together(new, tree, data, objective, equal, names):
    options = {name: value for option in names for name, value in OPTIONS[option].items()}
    ts, exact = new(tree, model=PLAIN), new(tree, model=PLAIN)
    for _ in range(3):
        ts = training.single_train_step(objective, data, ts, **options)[3]
        exact = training.single_train_step(objective, data, exact)[3]
    assert ts.step == 3 and ts.skipped == 0
    close = {"rtol": 1e-3, "atol": 1e-4} if "dtype" in names else {"rtol": 1e-9, "atol": 1e-11}
    equal(ts, exact, **close)


@pytest.mark.slow
def test_all_compiled(new, tree, data, objective, equal):
    options = {name: value for option in OPTIONS.values() for name, value in option.items()}

    def step(data, ts):
        return training.single_train_step(objective, data, ts, **options)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    ts, eager = new(tree, model=PLAIN), new(tree, model=PLAIN)
    for _ in range(3):
        ts, eager = compiled(data, ts)[3], step(data, eager)[3]
    assert counter.frame_count == 1
    equal(ts, eager, rtol=1e-3, atol=1e-4)


def test_checkpointed_layers_change_no_number(new, tree, data, objective, equal):
    model = new().model
    less = lt.Chain(*[Checkpointed(layer) for layer in model])
    ts, exact = new(tree, model=less), new(tree, model=model)
    for options in ({}, {"accumulate": 2}, {"donate": True}):
        ts = training.single_train_step(objective, data, ts, **options)[3]
        exact = training.single_train_step(objective, data, exact, **options)[3]
    # Norms are computed by another formula there, as the hooks of a checkpoint let tensors be read once.
    equal(ts.replace(model=model), exact, rtol=1e-13, atol=1e-13)


def test_a_chain_that_clips_is_stepped(new, tree, data, objective):
    ts = new(tree, OptimiserChain(ClipNorm(1e-3), optim.Descent(1.0)))
    after = training.single_train_step(objective, data, ts, donate=True)[3]
    moved = pytree.tree_map(torch.sub, after.parameters, new(tree).parameters)
    assert torch.cat([leaf.flatten() for leaf in pytree.tree_leaves(moved)]).norm() <= 1.001e-3
