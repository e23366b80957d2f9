"""Private gradients against a loop over the samples by hand, their noise, and batches that are drawn by chance."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
from scipy import stats as distributions
from torch import nn
from torch.utils import _pytree as pytree

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.random import fold_in
from luxtorch.training import poisson_batch, private_gradients

N, CLIP = 7, 0.5
PLAIN = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.Dense(4, 2))
MSE = lt.MSELoss()
QUIET = {"clip": CLIP, "noise": 0.0}

every_chunk = pytest.mark.parametrize("chunk_size", [None, 1, 3, 20])
every_size = pytest.mark.parametrize("size", [0, 1, N])


def close(a, b):
    a, b = pytree.tree_leaves(a), pytree.tree_leaves(b)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.fixture
def ts(new, tree):
    return new(tree, model=PLAIN)


@pytest.fixture
def key(make_key):
    return make_key()


@pytest.fixture
def batch(data):
    return data[0][:N], data[1][:N]


def by_hand(ts, batch, clip=CLIP, present=None, objective=MSE):
    """Return the sum of the clipped gradients, sample by sample, as a flat list, and the losses."""
    total, losses = 0.0, []
    for i in range(len(batch[0])):
        if present is not None and not present[i]:
            continue
        leaves, spec = pytree.tree_flatten(ts.parameters)
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        sample = batch[0][i : i + 1], batch[1][i : i + 1]
        loss = objective(ts.model, pytree.tree_unflatten(leaves, spec), ts.states, sample)[0]
        g = flat(torch.autograd.grad(loss, leaves))
        total = total + g / max(1.0, float(g.norm()) / clip)
        losses.append(loss.detach())
    return total, losses


def flat(tree):
    leaves = pytree.tree_leaves(tree)
    return torch.cat([(torch.view_as_real(g) if g.is_complex() else g).flatten() for g in leaves])


class TestWithoutNoise:
    @every_chunk
    def test_it_is_what_a_loop_computes(self, ts, batch, key, chunk_size):
        grads, loss, stats, after = private_gradients(MSE, batch, ts, **QUIET, key=key, chunk_size=chunk_size)
        total, losses = by_hand(ts, batch)
        assert type(grads) is type(ts.parameters) and stats == {}
        close(flat(grads), total / N)
        close(loss, torch.stack(losses).mean())
        close(after, ts)
        assert float(total.norm()) < CLIP * N and any(x > CLIP for x in self.norms(ts, batch))

    @staticmethod
    def norms(ts, batch):
        return [float(by_hand(ts, (x[None], y[None]), math.inf)[0].norm()) for x, y in zip(*batch, strict=True)]

    def test_a_clip_that_no_gradient_reaches_leaves_the_mean(self, ts, batch, key):
        grads, loss, _, _ = private_gradients(MSE, batch, ts, clip=1e9, noise=0.0, key=key)
        expected, mean, _, _ = training.compute_gradients(MSE, batch, ts)
        close((grads, loss), (expected, mean))

    @every_chunk
    @every_size
    def test_an_expected_size_takes_the_place_of_the_number(self, ts, batch, key, size, chunk_size):
        part = batch[0][:size], batch[1][:size]
        grads, loss, _, _ = private_gradients(MSE, part, ts, **QUIET, key=key, batch_size=3.5, chunk_size=chunk_size)
        total, losses = by_hand(ts, part)
        close(flat(grads), total / 3.5 if size else torch.zeros_like(flat(ts.parameters)))
        close(loss, torch.stack(losses).mean() if size else torch.tensor(math.nan, dtype=torch.float64))

    @every_chunk
    @pytest.mark.parametrize("kept", [(), (0,), (2, 3, 5), range(N)], ids=len)
    def test_what_the_mask_leaves_out_is_not_there(self, ts, batch, key, kept, chunk_size):
        mask = torch.tensor([i in kept for i in range(N)])
        spoilt = torch.where(mask[:, None], batch[0], math.nan), batch[1]
        options = {"key": key, "mask": mask, "batch_size": 4, "chunk_size": chunk_size}
        grads, loss, _, _ = private_gradients(MSE, spoilt, ts, **QUIET, **options)
        total, losses = by_hand(ts, batch, present=mask)
        close(flat(grads), total / 4 if kept else torch.zeros_like(flat(ts.parameters)))
        close(loss, torch.stack(losses).mean() if kept else torch.tensor(math.nan, dtype=torch.float64))

    @every_chunk
    def test_stats_are_those_of_each_sample(self, ts, batch, key, objective, chunk_size):
        def named(*args):
            loss, st, stats = objective(*args)
            return loss, st, {**stats, "name": "a"}

        for size in (0, N):
            part = batch[0][:size], batch[1][:size]
            *_, stats, _ = private_gradients(named, part, ts, **QUIET, key=key, batch_size=1, chunk_size=chunk_size)
            expected = [
                objective(ts.model, ts.parameters, ts.states, (x[None], y[None]))[2] for x, y in zip(*part, strict=True)
            ]
            assert stats["name"] == "a" and stats["count"].tolist() == [1] * size
            assert stats["largest"].tolist() == pytest.approx([float(one["largest"]) for one in expected])

    @every_chunk
    def test_each_sample_has_a_dropout_of_its_own(self, make_key, key, batch, tree, chunk_size):
        model = lt.Chain(lt.Dense(3, 40, torch.tanh), lt.Dropout(0.5), lt.Dense(40, 2))
        ps, st = lt.f64(lt.setup(make_key(), model))
        ts = training.TrainState(model, tree(ps), st, optim.Adam())
        same = tuple(leaf[:1].expand(N, -1) for leaf in batch)
        grads, _, _, after = private_gradients(MSE, same, ts, **QUIET, key=key, chunk_size=chunk_size)
        total = 0.0
        for i in range(N):
            own = {**st, "layer_2": {**st["layer_2"], "rng": fold_in(st["layer_2"]["rng"], i)}}
            total = total + by_hand(ts.replace(states=own), (same[0][:1], same[1][:1]))[0]
        close(flat(grads), total / N)
        assert not torch.equal(after.states["layer_2"]["rng"], st["layer_2"]["rng"])
        again = private_gradients(MSE, same, after, **QUIET, key=key, chunk_size=chunk_size)[0]
        assert not torch.equal(flat(again), flat(grads))

    def test_a_parameter_without_dimensions_or_elements(self, key):
        ps = {"a": torch.tensor(2.0), "none": torch.zeros(0), "b": torch.ones(2, dtype=torch.float64)}

        def objective(model, ps, st, x):
            return (ps["a"] * x.sum() + (ps["b"] * x).sum() + ps["none"].sum()), st, {}

        ts = training.TrainState(lt.NoOpLayer(), ps, {}, optim.Descent(0.1))
        x = torch.tensor([[3.0, 1.0], [0.3, 0.4]], dtype=torch.float64)
        for chunk_size in (None, 1):
            grads = private_gradients(objective, x, ts, clip=1.0, noise=0.0, key=key, chunk_size=chunk_size)[0]
            vectors = torch.cat([x.sum(1, keepdim=True), x], 1)
            expected = (vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1)).sum(0) / 2
            assert [g.dtype for g in grads.values()] == [p.dtype for p in ps.values()]
            torch.testing.assert_close(grads["a"], expected[0].float())
            torch.testing.assert_close(grads["b"], expected[1:])
            training.apply_gradients(ts, grads)

    def test_complex_parameters_are_clipped_as_their_parts(self, key, rng):
        ps = {"w": torch.randn(3, 2, generator=rng, dtype=torch.complex128), "s": torch.tensor(1.0 + 1j).cdouble()}

        def objective(model, ps, st, data):
            return ((data[0].cdouble() @ ps["w"] * ps["s"]).abs() - data[1]).square().mean(), st, {}

        x, y = (torch.randn(N, n, generator=rng, dtype=torch.float64) for n in (3, 2))
        ts = training.TrainState(lt.NoOpLayer(), ps, {}, optim.Descent(0.1))
        grads = private_gradients(objective, (x, y), ts, **QUIET, key=key)[0]
        close(flat(grads), by_hand(ts, (x, y), objective=objective)[0] / N)
        noisy = private_gradients(objective, (x, y), ts, clip=CLIP, noise=1.0, key=key)[0]
        difference = flat(noisy) - flat(grads)
        assert bool((difference != 0).all()) and len(set(difference.tolist())) == 14
        training.apply_gradients(ts, noisy)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("whole", [False, True], ids=["model", "parameters"])
    def test_in_a_lower_precision(self, new, tree, batch, key, dtype, whole):
        ts, batch = new(tree, model=PLAIN, dtype=torch.float32), lt.f32(batch)
        exact = private_gradients(MSE, batch, ts, **QUIET, key=key)[0]
        if whole:
            ts = new(tree, model=PLAIN, dtype=dtype)
            batch = pytree.tree_map(lambda x: x.to(dtype), batch)
        grads = private_gradients(MSE, batch, ts, **QUIET, key=key, dtype=None if whole else dtype)[0]
        assert all(g.dtype == (dtype if whole else torch.float32) for g in pytree.tree_leaves(grads))
        torch.testing.assert_close(flat(grads).float(), flat(exact), rtol=0.05, atol=0.02)

    def test_frozen_and_shared_parameters(self, make_key, key, batch, tree):
        model = lt.Chain(lt.Dense(3, 3, torch.tanh), lt.Dense(3, 3, torch.tanh), lt.Dense(3, 2))
        shared = lt.share_parameters(model, *lt.f64(lt.setup(make_key(), model)), ["layer_1", "layer_2"])
        model, ps, st = lt.freeze(*shared, "layer_3.bias")
        ts = training.TrainState(model, tree(ps), st, optim.Descent(0.1))
        grads, _, _, after = private_gradients(MSE, batch, ts, **QUIET, key=key)
        close(flat(grads), by_hand(ts, batch)[0] / N)
        close(after.states, st)


class TestGradientsThatAreNotFinite:
    @every_chunk
    @pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
    def test_one_counts_as_zero_and_is_seen_in_the_loss(self, ts, batch, key, value, chunk_size):
        x = batch[0].clone()
        x[2] = value
        ts = ts.replace(model=lt.Chain(lt.Dense(3, 4), lt.Dense(4, 2)))
        grads, loss, _, _ = private_gradients(MSE, (x, batch[1]), ts, **QUIET, key=key, chunk_size=chunk_size)
        close(flat(grads), by_hand(ts, batch, present=torch.arange(N) != 2)[0] / N)
        assert loss.isnan()

    @pytest.mark.parametrize("scale", [1e-300, 1e100])
    def test_gradients_of_any_size_are_clipped(self, ts, batch, key, scale):
        def objective(*args):
            loss, st, stats = MSE(*args)
            return loss * scale, st, stats

        grads, loss, _, _ = private_gradients(objective, batch, ts, **QUIET, key=key)
        assert loss.isfinite() and bool((flat(grads) != 0).any())
        assert float(flat(grads).norm()) <= CLIP * (1 + 1e-12)

    def test_a_gradient_of_zero_stays_and_has_a_derivative(self, key):
        ts = training.TrainState(lt.NoOpLayer(), {"w": torch.zeros(2)}, {}, optim.Descent(0.1))

        def objective(model, ps, st, x):
            return (ps["w"] * x).square().sum(), st, {}

        def total(w):
            new = ts.replace(parameters={"w": w})
            return private_gradients(objective, torch.ones(3, 2), new, **QUIET, key=key)[0]["w"]

        assert torch.equal(total(torch.zeros(2)), torch.zeros(2))
        torch.testing.assert_close(torch.func.jacrev(total)(torch.zeros(2)), 2 * torch.eye(2))


class TestNoise:
    def difference(self, ts, batch, key, noise, clip=CLIP, **options):
        noisy, quiet = (
            private_gradients(MSE, batch, ts, clip=clip, noise=sigma, key=key, **options)[0] for sigma in (noise, 0.0)
        )
        return flat(noisy) - flat(quiet)

    @pytest.mark.parametrize("noise", [0.5, 2.0])
    @pytest.mark.parametrize("clip", [0.1, 3.0])
    def test_it_is_normal_with_the_deviation_that_was_asked_for(self, make_key, tree, noise, clip):
        model = lt.Dense(40, 50)
        ts = training.TrainState(model, tree(lt.setup(make_key(), model)[0]), {}, optim.Descent(0.1))
        batch = torch.zeros(4, 40), torch.zeros(4, 50)
        drawn = self.difference(ts, batch, make_key(), noise, clip, batch_size=5) * 5 / (noise * clip)
        assert distributions.kstest(drawn.double().numpy(), "norm").pvalue > 1e-3
        assert float(drawn.std()) == pytest.approx(1.0, abs=0.07)

    @pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"chunk_size": 3}, {"chunk_size": 5}], ids=str)
    def test_it_is_drawn_once_and_knows_nothing_of_chunks_and_data(self, ts, batch, key, options):
        empty = batch[0][:0], batch[1][:0]
        alone = flat(private_gradients(MSE, empty, ts, clip=CLIP, noise=1.5, key=key, batch_size=N)[0])
        assert bool((alone != 0).all()) and len(set(alone.tolist())) == len(alone)
        close(self.difference(ts, batch, key, 1.5, **options), alone)
        mask = torch.zeros(N, dtype=torch.bool)
        none = private_gradients(MSE, batch, ts, clip=CLIP, noise=1.5, key=key, batch_size=N, mask=mask, **options)[0]
        close(flat(none), alone)

    def test_one_key_serves_a_whole_run(self, ts, batch, key):
        first, again = (self.difference(ts, batch, key, 1.0) for _ in range(2))
        assert torch.equal(first, again)
        later = ts.replace(step=ts.step + 1)
        assert not torch.isclose(self.difference(later, batch, key, 1.0), first).any()
        assert not torch.isclose(self.difference(ts, batch, fold_in(key, 1), 1.0), first).any()

    def test_no_global_generator_is_read(self, ts, batch, key):
        state = torch.get_rng_state()
        private_gradients(MSE, batch, ts, clip=CLIP, noise=1.0, key=key)
        poisson_batch(key, batch, 0.5)
        assert torch.equal(torch.get_rng_state(), state)


class TestTransforms:
    @pytest.mark.parametrize(("chunk_size", "masked"), [(None, False), (1, True), (3, False), (3, True)])
    def test_replay_gives_the_same(self, ts, batch, key, chunk_size, masked):
        def step(key, ts, batch, mask):
            options = {"mask": mask, "batch_size": 5} if masked else {}
            found = private_gradients(MSE, batch, ts, clip=CLIP, noise=1.0, key=key, chunk_size=chunk_size, **options)
            return found[0], found[1], training.apply_gradients(found[3], found[0])

        jitted = lt.jit(step, backend="replay")
        masks = torch.arange(N) < 3, torch.arange(N) < 0, torch.arange(N) % 2 == 0
        eager = now = ts
        for i, mask in enumerate(masks):
            *found, now = jitted(fold_in(key, i), now, batch, mask)
            *expected, eager = step(fold_in(key, i), eager, batch, mask)
            close(found, expected)
        close(now, eager)
        assert jitted.cache_info().misses == 1

    def test_a_whole_private_step_is_one_graph(self, ts, batch, key):
        def step(key, ts, data):
            drawn, mask = poisson_batch(key, data, 0.4)
            grads, loss, _, ts = private_gradients(
                MSE, drawn, ts, clip=CLIP, noise=0.1, key=key, batch_size=0.4 * N, mask=mask
            )
            return training.apply_gradients(ts, grads), loss

        jitted, now, eager = lt.jit(step, backend="replay"), ts, ts
        for i in range(4):
            now, loss = jitted(fold_in(key, i), now, batch)
            eager, expected = step(fold_in(key, i), eager, batch)
            close(loss, expected)
        close(now, eager)

    def test_one_graph_serves_batches_of_many_sizes(self, new, data, key):
        jitted = lt.jit(lambda *args: found(*args)[:2], backend="replay", dynamic=True)

        def found(key, ts, data):
            return private_gradients(MSE, data, ts, clip=CLIP, noise=1.0, key=key, batch_size=5)

        for size in (7, 5, 8, 0):
            part = data[0][:size], data[1][:size]
            close(jitted(key, new(model=PLAIN), part), found(key, new(model=PLAIN), part)[:2])
        assert jitted.cache_info().misses == 2  # an empty batch has a graph of its own

    @pytest.mark.slow
    @pytest.mark.parametrize("chunk_size", [None, 3])
    def test_torch_compile_gives_the_same(self, new, batch, key, chunk_size):
        ts = new(lt.ComponentVector, model=PLAIN)

        def found(key, ts, data):
            return private_gradients(MSE, data, ts, clip=CLIP, noise=1.0, key=key, chunk_size=chunk_size)

        close(torch.compile(found, fullgraph=True, backend="aot_eager")(key, ts, batch), found(key, ts, batch))

    @pytest.mark.parametrize("chunk_size", [None, 1, 3])
    def test_vmap_over_keys_models_and_masks(self, make_key, new, tree, batch, key, chunk_size):
        members = [lt.f64(lt.setup(make_key(), PLAIN)) for _ in range(3)]
        states = [training.TrainState(PLAIN, tree(ps), st, optim.Adam()) for ps, st in members]
        stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *states)
        keys, masks = lt.random.split(key, 3), torch.arange(N) >= torch.tensor([[0], [3], [N]])

        def found(key, ts, mask, clip):
            options = {"mask": mask, "batch_size": 5, "chunk_size": chunk_size}
            return private_gradients(MSE, batch, ts, clip=clip, noise=1.0, key=key, **options)[:2]

        clips = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
        together = torch.vmap(found)(keys, stacked, masks, clips)
        for i in range(3):
            close(pytree.tree_map(lambda leaf, i=i: leaf[i], together), found(keys[i], states[i], masks[i], clips[i]))

    @pytest.mark.parametrize("chunk_size", [None, 1, 3])
    def test_derivatives_go_through_it(self, new, batch, key, chunk_size):
        """By a number in the data, forward, backward and by the tape, against differences."""
        ts = new(lt.ComponentVector, model=PLAIN)

        def f(a, ts=ts):
            found = private_gradients(MSE, (a * batch[0], batch[1]), ts, **QUIET, key=key, chunk_size=chunk_size)
            return found[0].flat.square().sum()

        a = torch.tensor(1.3, dtype=torch.float64)
        expected = (f(a + 1e-6) - f(a - 1e-6)) / 2e-6
        for derivative in (torch.func.grad(f), torch.func.jacfwd(f)):
            torch.testing.assert_close(derivative(a), expected, rtol=1e-6, atol=1e-8)
        leaf = ts.parameters.flat.clone().requires_grad_()
        recorded = ts.replace(parameters=lt.ComponentVector.from_flat(leaf, ts.parameters.axes))
        (slope,) = torch.autograd.grad(f(a, recorded), leaf)
        plain = torch.func.grad(
            lambda flat: f(a, ts.replace(parameters=lt.ComponentVector.from_flat(flat, ts.parameters.axes)))
        )(ts.parameters.flat)
        torch.testing.assert_close(slope, plain)

    def test_nothing_is_on_a_tape(self, ts, batch, key):
        module = nn.Linear(3, 3).double()

        def objective(model, ps, st, data):
            y, st = model(module(data[0]), ps, st)
            return (y - data[1]).square().mean(), st, {"y": y}

        x = batch[0].clone().requires_grad_()
        found = private_gradients(objective, (x, batch[1]), ts, **QUIET, key=key)
        assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(found))

    def test_the_gradients_of_one_chunk_are_in_memory(self, key):
        alive, most = weakref.WeakSet(), []

        class Watched(torch.autograd.Function):
            generate_vmap_rule = False

            @staticmethod
            def forward(x):
                return x.clone()

            @staticmethod
            def setup_context(ctx, inputs, output):
                pass

            @staticmethod
            def backward(ctx, gradient):
                found = gradient.clone()
                alive.add(found)
                most.append(len(alive))
                return found

        def objective(model, ps, st, x):
            return (Watched.apply(ps["w"]) * x).sum(), st, {}

        ts = training.TrainState(lt.NoOpLayer(), {"w": torch.ones(5)}, {}, optim.Descent(0.1))
        private_gradients(objective, torch.ones(30, 5), ts, **QUIET, key=key, chunk_size=1)
        assert len(most) == 30 and max(most) <= 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"clip": 0.0}, lt.InputError, "clip must be a finite number above 0"),
        ({"clip": math.inf}, lt.InputError, "clip must be a finite number above 0"),
        ({"clip": torch.ones(2)}, lt.InputError, "clip has the wrong shape"),
        ({"noise": -1.0}, lt.InputError, "noise must be a finite number of at least 0"),
        ({"noise": True}, lt.InputError, "noise must be a finite number"),
        ({"noise": None}, lt.InputError, "noise must be a finite number"),
        ({"key": 0}, lt.DTypeError, "key must be a key.*lt.random.key"),
        ({"key": lt.random.split(lt.random.key(0))}, lt.DTypeError, r"key must be a key.*shape \(2, 2\)"),
        ({"batch_size": 0}, lt.InputError, "batch_size must be a finite number above 0"),
        ({"mask": torch.ones(N)}, lt.DTypeError, "mask must be a boolean tensor"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, lt.InputError, r"mask has the wrong shape.*\(7,\)"),
        ({"mask": torch.ones(N, dtype=torch.bool)}, lt.InputError, "batch_size, the expected number.*rate"),
        ({"data": (torch.ones(0, 3), torch.ones(0, 2))}, lt.InputError, "batch_size, the expected number.*an empty"),
        ({"data": (torch.ones(3, 3), torch.ones(4, 2))}, lt.InputError, "same number of samples"),
        ({"data": (torch.ones(3, 3), 1.0)}, lt.DTypeError, "'1' of the batch must be a tensor"),
        ({"chunk_size": 0}, lt.InputError, "chunk_size must be at least 1"),
        ({"objective": lt.MSELoss}, lt.DTypeError, "Make the loss"),
        ({"objective": lambda *args: 1.0}, lt.InputError, "must return three things"),
        ({"objective": lt.MSELoss(agg="none")}, lt.InputError, "must be a scalar"),
        ({"objective": lambda m, ps, st, d: (MSE(m, ps, st, d)[0], {}, {})}, lt.InputError, "structure of the states"),
        (
            {"objective": lambda m, ps, st, d: (MSE.sum_and_weight(m(d[0], ps, st)[0], d[1]), st, {})},
            lt.InputError,
            "must be a number",
        ),
        ({"ts": None}, lt.InputError, "ts must be a TrainState"),
    ],
)
def test_mistakes_are_explained(new, batch, change, error, words):
    arguments = {"objective": MSE, "data": batch, "ts": new(model=PLAIN), **QUIET, "key": lt.random.key(0), **change}
    objective, data, ts = (arguments.pop(name) for name in ("objective", "data", "ts"))
    with pytest.raises(error, match=f"(?s){words}"):
        private_gradients(objective, data, ts, **arguments)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("shape", [(), (4, 4)])
def test_statistics_over_samples_are_refused(make_key, key, shape, chunk_size):
    """Of images, one sample has a mean and a variance of its own; they would be kept, and tell of it."""
    layers = (lt.Conv((1, 1), 3, 4), lt.BatchNorm(4)) if shape else (lt.Dense(3, 4), lt.BatchNorm(4))
    model = lt.Chain(*layers)
    ts = training.TrainState(model, *lt.setup(make_key(), model), optim.Adam())
    x = torch.ones(5, 3, *shape)
    data = x, torch.zeros(5, 4, *shape)
    words = "running_mean.*test_mode.*GroupNorm" if shape else r"model.layer_2 \(BatchNorm 4\)"
    with pytest.raises(lt.InputError, match=f"(?s){words}"):
        private_gradients(MSE, data, ts, **QUIET, key=key, chunk_size=chunk_size)
    test = ts.replace(states=lt.test_mode(ts.states))
    grads, _, _, after = private_gradients(MSE, data, test, **QUIET, key=key, chunk_size=chunk_size)
    assert grads["layer_2"]["bias"].shape == (4,)
    close(after, test)


def test_weights_of_classes_are_refused_in_a_mean_and_right_in_a_sum(new, batch, key):
    ts, data = new(model=PLAIN), (batch[0], torch.arange(N) % 2)
    with pytest.raises(lt.InputError, match="(?s)weight of a class cancels.*agg='sum'"):
        private_gradients(lt.CrossEntropyLoss(weight=(1.0, 3.0)), data, ts, **QUIET, key=key)
    objective = lt.CrossEntropyLoss(weight=(1.0, 3.0), agg="sum")
    grads = private_gradients(objective, data, ts, clip=1e9, noise=0.0, key=key)[0]
    expected = training.compute_gradients(objective, data, ts)[0]
    close(pytree.tree_map(lambda g: N * g, grads), expected)


class TestPoissonBatches:
    def test_each_sample_is_drawn_with_the_rate_independently(self, key):
        n, rate, draws = 12, 0.3, 4000
        keys = lt.random.split(key, draws)
        batch, mask = torch.vmap(lambda key: poisson_batch(key, torch.arange(n), rate, max_size=n))(keys)
        drawn = torch.zeros(draws, n).scatter(1, batch, mask.float())
        assert batch.sort(1).values.equal(torch.arange(n).expand(draws, n))
        error = math.sqrt(rate * (1 - rate) / draws)
        assert float((drawn.mean(0) - rate).abs().max()) < 4.5 * error
        assert float((drawn.T.cov() - rate * (1 - rate) * torch.eye(n)).abs().max()) < 4.5 * rate / math.sqrt(draws)
        counts = np.bincount(mask.sum(1).numpy(), minlength=n + 1)
        expected = distributions.binom(n, rate).pmf(np.arange(n + 1)) * draws
        few = expected > 5
        assert (
            distributions.chisquare([*counts[few], counts[~few].sum()], [*expected[few], expected[~few].sum()]).pvalue
            > 1e-3
        )

    @pytest.mark.parametrize("n", [1, 7, 1000, 60_000])
    @pytest.mark.parametrize("rate", [0.001, 0.1, 0.9, 1.0])
    def test_the_size_is_hardly_ever_exceeded(self, key, n, rate):
        batch, mask = poisson_batch(key, torch.arange(n), rate)
        tail, size = distributions.binom(n, rate).sf, len(batch)
        assert tail(size) < 1e-12 and (rate < 1 or bool(mask.all()))
        assert size == n or (tail(0.95 * size - 2) > 1e-14 and not mask.all())  # nor is it much too large

    def test_a_smaller_size_leaves_out_some_by_chance(self, key):
        kept = [poisson_batch(fold_in(key, i), torch.arange(20), 0.9, max_size=4) for i in range(200)]
        assert all(bool(mask.all()) for _, mask in kept)
        counts = torch.cat([batch for batch, _ in kept]).bincount(minlength=20)
        assert distributions.chisquare(counts.numpy()).pvalue > 1e-3

    def test_trees_are_drawn_together(self, key):
        data = {"x": torch.arange(30.0).reshape(10, 3), "y": (torch.arange(10),)}
        batch, mask = poisson_batch(key, data, 0.5, max_size=8)
        assert batch["x"].shape == (8, 3) and mask.shape == (8,)
        assert torch.equal(batch["x"][:, 0], 3.0 * batch["y"][0])

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"rate": 0.0}, lt.InputError, "rate must be a number above 0 and at most 1"),
            ({"rate": 30}, lt.InputError, "rate must be a number above 0 and at most 1"),
            ({"rate": math.nan}, lt.InputError, "rate must be a number above 0 and at most 1"),
            ({"max_size": 0}, lt.InputError, "max_size must be a whole number from 1 to 10"),
            ({"max_size": 11}, lt.InputError, "max_size must be a whole number from 1 to 10"),
            ({"data": torch.ones(0, 2)}, lt.InputError, "must have samples"),
            ({"data": ([1, 2],)}, lt.DTypeError, "must be a tensor"),
            ({"key": 0}, lt.DTypeError, "must be a uint64 tensor"),
        ],
    )
    def test_mistakes_are_explained(self, change, error, words):
        arguments = {"key": lt.random.key(0), "data": torch.ones(10, 2), "rate": 0.5, **change}
        with pytest.raises(error, match=words):
            poisson_batch(**arguments)
