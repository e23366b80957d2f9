"""What a step promises whatever the rule: purity, missing gradients, torchopt's optimizers, errors that say where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils._pytree as pytree
import torchopt
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.components import ComponentVector
from luxtorch.core import DTypeError, InputError, KeyNameError


def copy(tree: Any) -> Any:
    return pytree.tree_map(torch.clone, tree)


def same(a: Any, b: Any) -> bool:
    """Say whether two trees are equal in structure and bits."""
    (xs, spec_a), (ys, spec_b) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return spec_a == spec_b and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(xs, ys, strict=True))


def test_the_page_of_lux():
    ps = {"weight": torch.ones(2, 1), "bias": torch.zeros(2)}
    gs = {"weight": torch.full((2, 1), 2.0), "bias": torch.tensor([1.0, -1.0])}

    opt = optim.Descent(0.01)
    opt_state = optim.setup(opt, ps)
    opt_state, ps = optim.update(opt_state, ps, gs)

    torch.testing.assert_close(ps, {"weight": torch.full((2, 1), 0.98), "bias": torch.tensor([-0.01, 0.01])})


def test_nothing_is_changed(rule, kind, draw):
    ps, grads = kind.make(draw()), kind.make(draw())
    opt_state, ps = optim.update(optim.setup(rule, ps), ps, grads)
    before = copy((opt_state, ps, grads))
    optim.update(opt_state, ps, grads)
    assert same((opt_state, ps, grads), before)


def test_nothing_is_changed_by_torchopt(foreign, kind, draw):
    ps, grads = kind.make(draw()), kind.make(draw())
    opt_state, ps = optim.update(optim.setup(foreign(), ps), ps, grads)
    before = copy((opt_state, ps, grads))
    optim.update(opt_state, ps, grads)
    assert same((opt_state, ps, grads), before)


def test_a_rule_asked_to_work_in_place_does_not(rule, draw):
    ps, grads = draw(), draw()
    state = rule.init(ps)
    before = copy((state, ps, grads))
    rule.update(grads, state, params=ps, inplace=True)
    assert same((state, ps, grads), before)


def test_steps_repeat_bit_for_bit(rule, kind, draw):
    ps, grads = kind.make(draw(dtype=torch.float32)), kind.make(draw(dtype=torch.float32))
    opt_state = optim.setup(rule, ps)
    assert same(optim.update(opt_state, ps, grads), optim.update(opt_state, ps, grads))


def test_torchopt_as_it_is(foreign, kind, draw):
    ps, all_grads = kind.make(draw()), [kind.make(draw()) for _ in range(5)]
    rule = foreign()
    state, expected = rule.init(ps), ps
    opt_state, actual = optim.setup(foreign(), ps), ps
    for grads in all_grads:
        updates, state = rule.update(grads, state, params=expected, inplace=False)
        expected = torchopt.apply_updates(expected, updates, inplace=False)
        opt_state, actual = optim.update(opt_state, actual, grads)
    torch.testing.assert_close(kind.leaves(actual), kind.leaves(expected), rtol=1e-12, atol=1e-12)


def test_rules_in_a_torchopt_chain(case, kind, draw):
    """Clip the global norm by torchopt and by torch, then step by our rule and by torch's."""
    ps, grads = kind.make(draw()), kind.make(draw())
    parameters = [torch.nn.Parameter(leaf.clone()) for leaf in kind.leaves(ps)]
    for p, g in zip(parameters, kind.leaves(grads), strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    case.reference(parameters).step()
    chain = torchopt.chain(torchopt.clip_grad_norm(0.5), case.rule)
    _, new = optim.update(optim.setup(chain, ps), ps, grads)
    # torch adds 1e-6 to the norm that it divides by.
    torch.testing.assert_close(kind.leaves(new), [p.detach() for p in parameters], rtol=1e-5, atol=1e-6)


def test_torchopt_rules_compile(draw):
    ps, grads = draw(), draw()
    for rule in (torchopt.sgd(0.1), torchopt.chain(torchopt.sgd(0.5), optim.Adam(0.01))):
        torch._dynamo.reset()
        opt_state = optim.setup(rule, ps)
        new = torch.compile(optim.update, backend="aot_eager", fullgraph=True)(opt_state, ps, grads)[1]
        torch.testing.assert_close(new, optim.update(opt_state, ps, grads)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("missing", [None, "absent"])
@pytest.mark.parametrize("path", ["layer_1", "layer_2.bias"])
def test_missing_gradients_leave_alone(rule, draw, path, missing):
    ps, grads = draw(), draw()
    opt_state, ps = optim.update(optim.setup(rule, ps), ps, grads)
    *outer, last = path.split(".")
    node = grads[outer[0]] if outer else grads
    if missing is None:
        node[last] = None
    else:
        del node[last]
    new_state, new = optim.update(opt_state, ps, grads)
    for name, slots in opt_state.state.leaves.items():
        leaf, new_leaf = _at(ps, name), _at(new, name)
        left_alone = name.startswith(path)
        assert torch.equal(leaf, new_leaf) == left_alone
        if slots:
            assert same(slots, new_state.state.leaves[name]) == left_alone


def _at(tree: Any, name: str) -> Tensor:
    for key in name.split("."):
        tree = tree[key]
    return tree


def test_all_gradients_missing(kind, draw):
    ps = kind.make(draw())
    for rule in (optim.AdamW(0.1), torchopt.adamw(0.1)):
        opt_state = optim.setup(rule, ps)
        assert same(optim.update(opt_state, ps, None), (opt_state, ps))


def test_missing_gradients_with_torchopt(draw):
    ps, grads = draw(), draw()
    grads["layer_1"] = None
    opt_state, new = optim.update(optim.setup(torchopt.adamw(0.1), ps), ps, grads)
    assert same(new["layer_1"], ps["layer_1"])
    assert not torch.equal(new["layer_2"]["weight"], ps["layer_2"]["weight"])


def test_nan_goes_through(rule, kind, draw):
    ps, grads = kind.make(draw()), kind.make(draw())
    bad = pytree.tree_map(lambda g: torch.full_like(g, float("nan")), grads)
    for step in (optim.update, torch.func.vmap(optim.update, in_dims=(None, None, 0))):
        given = bad if step is optim.update else pytree.tree_map(lambda g: g[None], bad)
        new = step(optim.setup(rule, ps), ps, given)[1]
        assert all(leaf.isnan().all() for leaf in pytree.tree_leaves(new))


def test_trees_of_any_pytree(rule, draw):
    tree = draw()
    ps = [tree["layer_1"], (tree["layer_2"]["weight"], torch.zeros(2, dtype=torch.float64))]
    grads = pytree.tree_map(torch.ones_like, ps)
    opt_state, new = optim.update(optim.setup(rule, ps), ps, grads)
    assert pytree.tree_structure(new) == pytree.tree_structure(ps)
    assert opt_state.layout.names == ("0.weight", "0.bias", "1.0", "1.1")


def test_empty_groups(rule):
    ps = {"relu": {}, "dense": {"weight": torch.ones(2)}}
    _, new = optim.update(optim.setup(rule, ps), ps, {"dense": {"weight": torch.ones(2)}})
    assert new["relu"] == {}
    _, nothing = optim.update(optim.setup(rule, {}), {}, {})
    assert nothing == {}


@pytest.mark.parametrize("rule", ["Nesterov", "AdamW"], indirect=True)
@pytest.mark.parametrize("kind", ["dict", "vector"], indirect=True)
def test_setup_and_steps_in_one_graph(rule, kind, draw):
    torch._dynamo.reset()
    ps, grads = kind.make(draw()), kind.make(draw())

    def both(ps: Any, grads: Any, lr: Tensor) -> Any:
        opt_state = optim.setup(type(rule)(lr=lr), ps)
        for _ in range(2):
            opt_state, ps = optim.update(opt_state, ps, grads)
            opt_state = optim.adjust(opt_state, lr=lr * 0.5)
        return ps

    lr = torch.tensor(0.1)
    new = torch.compile(both, backend="aot_eager", fullgraph=True)(ps, grads, lr)
    torch.testing.assert_close(kind.leaves(new), kind.leaves(both(ps, grads, lr)), rtol=1e-12, atol=1e-12)


class Clipped(optim.LeafwiseRule):
    """A rule as a user may write it: one number, one flag, and memory of another shape than the parameter."""

    limit: float | Tensor = 1.0
    by_sign: bool = False

    def slots(self, p: Tensor) -> dict[str, Tensor]:
        return {"largest": torch.zeros(1, dtype=p.dtype)}

    def delta(self, g, p, slots, h):
        largest = torch.maximum(slots["largest"], g.abs().amax().reshape(1))
        return -h["limit"] * (g.sign() if self.by_sign else g / largest), {"largest": largest}


class Fixed(optim.LeafwiseRule):
    """A rule without numbers."""

    def delta(self, g, p, slots, h):
        return -g, slots


class Uphill(optim.Adam):
    """A known rule with another formula."""

    def delta(self, g, p, slots, h):
        delta, slots = super().delta(g, p, slots, h)
        return -delta, slots


class TestRulesOfUsers:
    @pytest.mark.parametrize("donate", [False, True])
    def test_another_formula_is_not_overruled_by_the_kernel_of_the_class_above(self, donate):
        model = lt.Scale(2, bias=False)
        ts = training.TrainState(model, {"weight": torch.zeros(2)}, {}, Uphill(0.5))
        ts = training.apply_gradients(ts, {"weight": torch.tensor([1.0, -9.0])}, donate=donate)
        torch.testing.assert_close(ts.parameters["weight"], torch.tensor([0.5, -0.5]))

    def test_flags_are_structure_and_numbers_are_not(self):
        p = torch.ones(2)
        states = [optim.setup(Clipped(*args), p) for args in ((1.0, False), (2.0, False), (1.0, True))]
        specs = [pytree.tree_structure(state) for state in states]
        assert specs[0] == specs[1] != specs[2]

    @pytest.mark.parametrize("by_sign", [False, True])
    def test_steps(self, by_sign):
        torch._dynamo.reset()
        p, g = torch.zeros(2), torch.tensor([2.0, -4.0])
        opt_state = optim.setup(Clipped(0.5, by_sign), p)
        expected = torch.tensor([-0.5, 0.5]) if by_sign else torch.tensor([-0.25, 0.5])
        for step in (optim.update, torch.compile(optim.update, backend="aot_eager", fullgraph=True)):
            torch.testing.assert_close(step(opt_state, p, g)[1], expected)
        many = torch.vmap(lambda limit: optim.update(optim.setup(Clipped(limit, by_sign), p), p, g)[1])
        torch.testing.assert_close(many(torch.tensor([0.5, 1.0])), torch.stack([expected, 2 * expected]))

    def test_no_numbers_at_all(self):
        p = torch.ones(2)
        opt_state = optim.setup(Fixed(), p)
        torch.testing.assert_close(optim.update(opt_state, p, p)[1], torch.zeros(2))
        torch.testing.assert_close(
            torch.vmap(optim.update, in_dims=(None, 0, 0))(opt_state, p[None], p[None])[1][0], torch.zeros(2)
        )
        assert repr(opt_state) == "OptState(Fixed(), 1 parameter)"
        with pytest.raises(InputError, match="no hyperparameters that can be reached"):
            optim.adjust(opt_state, lr=0.1)
        chain = optim.setup(torchopt.chain(optim.Descent(0.1), Fixed()), p)
        torch.testing.assert_close(optim.update(optim.adjust(chain, lr=0.5), p, p)[1], torch.full((2,), 1.5))


class TestKernel:
    """The fused kernel runs where it may, and nowhere else; the numbers are right in both cases."""

    @pytest.fixture
    def calls(self, monkeypatch):
        calls = []
        kernel = torch._fused_adamw_

        def spy(*args, **kwargs):
            calls.append(args)
            return kernel(*args, **kwargs)

        monkeypatch.setattr("luxtorch.optim.rules._adam.fused_adamw_", spy)
        return calls

    def test_runs_once_for_all_leaves(self, calls, kind, draw):
        ps, grads = kind.make(draw()), kind.make(draw())
        optim.update(optim.setup(optim.AdamW(), ps), ps, grads)
        assert [len(args[0]) for args in calls] == [len(pytree.tree_leaves(ps))]

    def test_runs_under_no_grad(self, calls, draw):
        ps, grads = draw(), draw()
        for p in pytree.tree_leaves(ps):
            p.requires_grad_()
        with torch.no_grad():
            _, new = optim.update(optim.setup(optim.AdamW(), ps), ps, grads)
        assert len(calls) == 1
        assert not any(p.requires_grad for p in pytree.tree_leaves(new))

    @pytest.mark.parametrize("which", ["parameter", "gradient", "hyperparameter", "memory"])
    def test_leaves_the_tape_whole(self, calls, which):
        p, g, lr = torch.ones(3), torch.tensor([1.0, 2.0, 3.0]), torch.tensor(0.1)
        {"parameter": p, "gradient": g, "hyperparameter": lr}.get(which, p.clone()).requires_grad_()
        opt_state = optim.setup(optim.AdamW(lr), p)
        if which == "memory":
            opt_state.state.leaves[""]["exp_avg"].requires_grad_()
        new_state, new = optim.update(opt_state, p, g)
        assert not calls
        assert new.requires_grad

    def test_not_inside_transforms(self, calls, draw):
        p, g = torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
        opt_state = optim.setup(optim.AdamW(), p)
        expected = optim.update(opt_state, p, g)[1]
        calls.clear()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(p, torch.ones(3))
            new = optim.update(opt_state, dual, g)[1]
            assert torch.autograd.forward_ad.unpack_dual(new).tangent is not None
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(new).primal, expected)
        traced = torch.fx.experimental.proxy_tensor.make_fx(lambda p, g: optim.update(opt_state, p, g)[1])(p, g)
        torch.testing.assert_close(traced(p, g), expected)
        torch.testing.assert_close(torch.vmap(lambda p: optim.update(opt_state, p, g)[1])(p[None])[0], expected)
        assert not calls

    @pytest.mark.parametrize("which", ["parameter", "gradient", "both", "memory"])
    def test_strides(self, calls, which, rng):
        """The kernel reads memory in order, whatever the strides: a transposed tensor must not reach it."""
        p, g = torch.randn(3, 4, generator=rng), torch.randn(3, 4, generator=rng)
        opt_state, p = optim.update(optim.setup(optim.AdamW(0.1), p), p, g)
        expected = optim.update(opt_state, p, g)
        turned = lambda x: x.t().contiguous().t()  # noqa: E731
        if which == "memory":
            slots = opt_state.state.leaves[""]
            slots["exp_avg_sq"] = turned(slots["exp_avg_sq"])
        new = optim.update(
            opt_state,
            turned(p) if which in ("parameter", "both") else p,
            turned(g) if which in ("gradient", "both") else g,
        )
        torch.testing.assert_close(pytree.tree_leaves(new), pytree.tree_leaves(expected))

    def test_expanded_gradient(self, calls):
        p = torch.ones(3)
        _, new = optim.update(optim.setup(optim.AdamW(0.5, weight_decay=0.0), p), p, torch.ones(()).expand(3))
        torch.testing.assert_close(new, torch.full((3,), 0.5))

    def test_mixed_dtypes(self, calls):
        ps = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.float64)}
        _, new = optim.update(optim.setup(optim.AdamW(0.5, weight_decay=0.0), ps), ps, ps)
        torch.testing.assert_close(new, pytree.tree_map(lambda p: torch.full_like(p, 0.5), ps))

    def test_a_state_of_another_dtype(self, rule):
        """After a cast of the parameters the memory may stay more precise; the parameters keep their dtype."""
        p = torch.ones(3)
        opt_state = optim.setup(rule, p)
        new_state, new = optim.update(opt_state, p.bfloat16(), p.bfloat16())
        assert new.dtype == torch.bfloat16
        assert [x.dtype for x in pytree.tree_leaves(new_state)] == [x.dtype for x in pytree.tree_leaves(opt_state)]


class TestErrors:
    def ps(self) -> dict[str, Any]:
        return {"layer_1": {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, "scale": torch.ones(())}

    @pytest.mark.parametrize("make", [optim.Adam, optim.Descent, lambda: torchopt.adam(0.1)])
    def test_shape(self, make):
        grads = self.ps()
        grads["layer_1"]["weight"] = torch.ones(3)
        with pytest.raises(InputError, match="another shape") as error:
            optim.update(optim.setup(make(), self.ps()), self.ps(), grads)
        assert str(error.value) == (
            "layer_1.weight: The gradient has another shape than its parameter.\n"
            "  expected: (2, 3)\n"
            "  got:      (3,)\n"
            "  fix:      Pass the gradient with respect to these parameters."
        )

    def test_dtype(self):
        grads = self.ps()
        grads["layer_1"]["bias"] = torch.ones(2, dtype=torch.float64)
        with pytest.raises(DTypeError, match=r"layer_1\.bias: .*dtype(.|\n)*torch.float32\n.*torch.float64"):
            optim.update(optim.setup(optim.Adam(), self.ps()), self.ps(), grads)

    def test_unknown_name(self):
        grads = self.ps()
        grads["layer_1"]["wieght"] = torch.ones(2, 3)
        with pytest.raises(KeyNameError, match=r"lack: 'layer_1.wieght'(.|\n)*Did you mean 'weight'"):
            optim.update(optim.setup(optim.Adam(), self.ps()), self.ps(), grads)

    @pytest.mark.parametrize(
        "name, bad",
        [("layer_1", torch.ones(2)), ("layer_1", [torch.ones(2, 3), torch.ones(2)]), ("scale", {}), ("scale", 1.0)],
    )
    def test_structure(self, name, bad):
        with pytest.raises(InputError) as error:
            optim.update(optim.setup(optim.Adam(), self.ps()), self.ps(), {**self.ps(), name: bad})
        assert str(error.value).startswith(f"{name}: The gradient")

    def test_length(self):
        ps = {"list": [torch.ones(2), torch.ones(2)]}
        with pytest.raises(InputError, match="list: The gradients have another structure"):
            optim.update(optim.setup(optim.Adam(), ps), ps, {"list": [torch.ones(2)]})

    def test_vectors(self):
        ps = {"model": ComponentVector(self.ps())}
        opt_state = optim.setup(optim.Adam(), ps)
        for bad in (self.ps(), ps["model"].flat, ComponentVector({"other": torch.ones(9)})):
            with pytest.raises(InputError, match="model: The gradients have another structure"):
                optim.update(opt_state, ps, {"model": bad})

    @pytest.mark.parametrize("make", [optim.Descent, optim.Adam, optim.Momentum])
    def test_state_of_other_names(self, make):
        opt_state = optim.setup(make(), self.ps())
        with pytest.raises(KeyNameError, match="state belongs to other parameters"):
            optim.update(opt_state, {"other": torch.ones(2)}, {"other": torch.ones(2)})

    @pytest.mark.parametrize("make", [optim.Momentum, optim.Nesterov, optim.Adam, optim.AdamW])
    @pytest.mark.parametrize("shape", [(3,), (1,), (2, 3)])
    def test_state_of_another_shape(self, make, shape):
        opt_state = optim.setup(make(), {"a": {"weight": torch.ones(shape)}})
        ps = {"a": {"weight": torch.ones(2)}}
        if shape == (1,):  # it broadcasts, whatever one may think of it
            assert optim.update(opt_state, ps, ps)[1]["a"]["weight"].shape == (2,)
            return
        with pytest.raises(
            InputError, match=r"a.weight: The optimizer state has '(velocity|exp_avg)' of another shape"
        ):
            optim.update(opt_state, ps, ps)

    @pytest.mark.parametrize("rule", [torch.optim.Adam, torch.optim.Adam([torch.ones(1)]), 0.1, optim.Adam])
    def test_not_a_rule(self, rule):
        with pytest.raises(DTypeError, match="not a gradient transformation") as error:
            optim.setup(rule, self.ps())
        assert "change parameters in place" in str(error.value)

    def test_leaf_that_is_no_tensor(self):
        with pytest.raises(DTypeError, match="layer.gain: A leaf is not a tensor"):
            optim.setup(optim.Adam(), {"layer": {"gain": 1.0}})

    def test_names_that_collide(self):
        ps = {"a.b": torch.ones(2), "a": {"b": torch.ones(2)}}
        with pytest.raises(KeyNameError, match="Two parameters have the same dotted name(.|\n)*a.b"):
            optim.setup(optim.Adam(), ps)

    def test_adamw_without_params(self):
        rule, ps = optim.AdamW(), self.ps()
        with pytest.raises(InputError, match="AdamW needs the parameters"):
            rule.update(ps, rule.init(ps))

    def test_adam_without_params(self):
        rule, ps = optim.Adam(0.5), self.ps()
        updates, _ = rule.update(ps, rule.init(ps))
        torch.testing.assert_close(updates["scale"], torch.tensor(-0.5))


names = st.text("abcdef", min_size=1, max_size=3)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
trees = st.recursive(shapes, lambda children: st.dictionaries(names, children, max_size=3), max_leaves=6)
trees = st.dictionaries(names, trees, min_size=1, max_size=3)


def fill(tree: Any, rng: torch.Generator) -> Any:
    if isinstance(tree, dict):
        return {name: fill(child, rng) for name, child in tree.items()}
    return torch.randn(tree, generator=rng, dtype=torch.float64)


@given(tree=trees, seed=st.integers(0, 2**31), which=st.sampled_from(["Descent", "Nesterov", "AdamW"]))
def test_any_tree_and_its_vector_step_alike(tree, seed, which):
    rng = torch.Generator().manual_seed(seed)
    ps, grads = fill(tree, rng), fill(tree, rng)
    rule = getattr(optim, which)(0.1)
    opt_state, vector, vector_grads = (
        optim.setup(rule, ps),
        ComponentVector(ps, dtype=torch.float64),
        ComponentVector(grads, dtype=torch.float64),
    )
    vector_state = optim.setup(rule, vector)
    assert vector_state.layout.names == opt_state.layout.names
    for _ in range(3):
        opt_state, ps = optim.update(opt_state, ps, grads)
        vector_state, vector = optim.update(vector_state, vector, vector_grads)
    torch.testing.assert_close(vector.to_dict(), ps, rtol=1e-13, atol=1e-13)


@given(tree=trees, seed=st.integers(0, 2**31), data=st.data())
def test_any_gradients_may_be_missing(tree, seed, data):
    rng = torch.Generator().manual_seed(seed)
    ps, grads = fill(tree, rng), fill(tree, rng)
    leaves, spec = pytree.tree_flatten(grads)
    kept = data.draw(st.lists(st.booleans(), min_size=len(leaves), max_size=len(leaves)))
    grads = pytree.tree_unflatten([g if keep else None for g, keep in zip(leaves, kept, strict=True)], spec)
    rule = optim.AdamW(0.1)
    opt_state = optim.setup(rule, ps)
    new_state, new = optim.update(opt_state, ps, grads)
    for keep, old, after, slots in zip(
        kept, pytree.tree_leaves(ps), pytree.tree_leaves(new), new_state.state.leaves.values(), strict=True
    ):
        assert torch.equal(old, after) == (not keep or old.numel() == 0)
        assert slots["step"].item() == keep
