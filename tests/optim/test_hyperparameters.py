"""Hyperparameters are tensors: batched by vmap, differentiated, adjusted, and checked where they are written."""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
from typing import Annotated, Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils._pytree as pytree
import torchopt
from torch import Tensor

from luxtorch import optim
from luxtorch.components import ComponentVector
from luxtorch.core import DTypeError, InputError, KeyNameError


def run(opt_state: optim.OptState, ps: Any, noises: list[Any]) -> Any:
    for noise in noises:
        opt_state, ps = optim.update(opt_state, ps, pytree.tree_map(lambda p, n: torch.sin(p) + n, ps, noise))
    return ps


def test_vmap_over_learning_rates(rule, kind, draw):
    ps, noises, lrs = kind.make(draw()), [kind.make(draw()) for _ in range(5)], torch.tensor([0.1, 0.01, 0.001])
    lrs = lrs.double()
    many = torch.vmap(lambda lr: run(optim.setup(type(rule)(lr=lr), ps), ps, noises))(lrs)
    for i, lr in enumerate(lrs):
        one = run(optim.setup(type(rule)(lr=lr.item()), ps), ps, noises)
        torch.testing.assert_close(pytree.tree_map(lambda leaf, i=i: leaf[i], many), one, rtol=1e-12, atol=1e-12)


def test_vmap_over_states(rule, kind, draw):
    """A population: set up under vmap, adjusted as one or each by itself, then stepped together."""
    ps, noise = kind.make(draw()), kind.make(draw())
    lrs = torch.tensor([0.1, 0.01], dtype=torch.float64)
    many = torch.vmap(lambda lr: optim.setup(type(rule)(lr=lr), ps))(lrs)
    step = torch.vmap(lambda state: optim.update(state, ps, noise)[1])
    one = lambda lr: optim.update(optim.setup(type(rule)(lr=lr), ps), ps, noise)[1]  # noqa: E731
    expected = lambda a, b: pytree.tree_map(lambda x, y: torch.stack([x, y]), one(a), one(b))  # noqa: E731
    torch.testing.assert_close(step(many), expected(0.1, 0.01))
    torch.testing.assert_close(step(optim.adjust(many, lr=0.3)), expected(0.3, 0.3))
    torch.testing.assert_close(step(optim.adjust(many, lr=lrs.flip(0))), expected(0.01, 0.1))
    torch.testing.assert_close(step(torch.vmap(optim.adjust)(many, lrs.flip(0))), expected(0.01, 0.1))


def test_vmap_over_betas(draw):
    ps, noises = draw(), [draw() for _ in range(4)]
    betas = torch.tensor([[0.9, 0.999], [0.5, 0.9]], dtype=torch.float64)
    many = torch.vmap(lambda betas: run(optim.setup(optim.Adam(0.1, betas), ps), ps, noises))(betas)
    one = run(optim.setup(optim.Adam(0.1, (0.5, 0.9)), ps), ps, noises)
    torch.testing.assert_close(pytree.tree_map(lambda leaf: leaf[1], many), one, rtol=1e-12, atol=1e-12)


def test_batches_live_beside_the_parameters():
    """On a GPU a batch of hyperparameters on the CPU could not meet the parameters; the meta device stands for it."""
    ps = torch.ones(3, 2, device="meta")
    many = torch.vmap(lambda p: optim.setup(optim.Adam(0.1), p))(ps)
    assert many.state.hyper.device.type == "meta"
    torch.vmap(optim.update)(many, ps, ps)


def test_one_on_the_cpu_meets_parameters_anywhere(rule):
    ps = torch.ones(3, 2, device="meta")
    opt_state = optim.setup(rule, ps)
    assert opt_state.state.hyper.device.type == "cpu"
    new_state, new = optim.update(opt_state, ps, ps)
    assert new.device.type == "meta"
    assert all(value.device.type == "meta" for value in pytree.tree_leaves(new_state.state.leaves))


@pytest.mark.parametrize("by", ["func", "tape"])
@pytest.mark.parametrize(
    "make, values",
    [
        (optim.Descent, [0.1]),
        (optim.Momentum, [0.1, 0.8]),
        (optim.Nesterov, [0.1, 0.8]),
        (lambda lr, b1, b2, eps: optim.Adam(lr, torch.stack([b1, b2]), eps), [0.1, 0.8, 0.95, 1e-2]),
        (lambda lr, b1, b2, eps, wd: optim.AdamW(lr, torch.stack([b1, b2]), eps, wd), [0.1, 0.8, 0.95, 1e-2, 0.3]),
    ],
    ids=["Descent", "Momentum", "Nesterov", "Adam", "AdamW"],
)
def test_meta_gradients(make, values, by, kind, draw):
    """The derivative of what five steps lead to with respect to every hyperparameter, against differences."""
    ps, noises = kind.make(draw()), [kind.make(draw()) for _ in range(5)]

    def loss(*values: Tensor) -> Tensor:
        new = run(optim.setup(make(*values), ps), ps, noises)
        return sum((leaf**2).sum() for leaf in pytree.tree_leaves(new))

    tensors = [torch.tensor(value, dtype=torch.float64) for value in values]
    argnums = tuple(range(len(values)))
    if by == "func":
        slopes = torch.func.grad(loss, argnums)(*tensors)
    else:
        slopes = torch.autograd.grad(loss(*(t.requires_grad_() for t in tensors)), tensors)
    for i, slope in enumerate(slopes):
        up, down = ([t.detach() + (h if j == i else 0.0) for j, t in enumerate(tensors)] for h in (1e-6, -1e-6))
        torch.testing.assert_close(slope, (loss(*up) - loss(*down)) / 2e-6, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["Adam", "AdamW"], indirect=True)
def test_zero_gradients_have_finite_derivatives(rule):
    """The root of a zero second moment has an infinite derivative: one dead unit would make all of them NaN."""
    ps, x = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])

    def loss(lr: Tensor, ps: Tensor) -> Tensor:
        opt_state = optim.setup(type(rule)(lr), ps)
        for _ in range(3):
            opt_state, ps = optim.update(opt_state, ps, x * ps)
        return ps.sum()

    slopes = torch.func.grad(loss, (0, 1))(torch.tensor(0.1), ps)
    assert all(slope.isfinite().all() for slope in slopes)


def test_a_rule_leaves_its_numbers_in_the_state(rule):
    """Learning rates that differ make no other structure, hence no other graph."""
    ps = {"w": torch.ones(2)}
    states = [optim.setup(type(rule)(lr=lr), ps) for lr in (0.1, 0.2, torch.tensor(0.3))]
    assert len({hash(pytree.tree_structure(state).__repr__()) for state in states}) == 1
    assert pytree.tree_structure(states[0]) == pytree.tree_structure(states[1]) == pytree.tree_structure(states[2])
    assert all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(states[0]))
    halved = pytree.tree_map(lambda a, b: (a + b) / 2, states[0], states[1])
    assert "lr=0.15" in repr(halved)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dict", "vector"], indirect=True)
def test_one_graph_for_all_numbers(rule, kind, draw):
    torch._dynamo.reset()
    ps, grads = kind.make(draw()), kind.make(draw())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(optim.update, backend=counter, fullgraph=True)
    opt_state = expected_state = optim.setup(type(rule)(lr=0.1), ps)
    new = expected = ps
    for lr in (0.0, 1.0, 0.3):
        opt_state, new = compiled(optim.adjust(opt_state, lr), new, grads)
        expected_state, expected = optim.update(optim.adjust(expected_state, lr), expected, grads)
    compiled(optim.setup(type(rule)(lr=0.5), ps), ps, grads)
    torch.testing.assert_close(new, expected, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


class TestChecks:
    @pytest.mark.parametrize(
        "make, problem",
        [
            (lambda: optim.Descent(-0.1), r"lr must be in \[0, inf\)(.|\n)*-0.1"),
            (lambda: optim.Descent(float("nan")), "lr must be in"),
            (lambda: optim.Adam(betas=(0.9, 1.0)), r"betas must be in \[0, 1\)"),
            (lambda: optim.Adam(betas=(0.9, 0.99, 0.999)), r"betas has the wrong shape(.|\n)*shape \(3,\)"),
            (lambda: optim.Adam(betas=0.9), r"betas has the wrong shape(.|\n)*2 numbers"),
            (lambda: optim.Adam(torch.ones(3)), "lr has the wrong shape(.|\n)*torch.vmap"),
            (lambda: optim.AdamW(weight_decay=-1), "weight_decay must be in"),
        ],
    )
    def test_values(self, make, problem):
        with pytest.raises(InputError, match=problem):
            make()

    @pytest.mark.parametrize("bad", ["0.1", None.__class__, True, 1j, torch.tensor(1), [0.1, "x"]])
    def test_types(self, bad):
        with pytest.raises(DTypeError, match="lr must be 1 number"):
            optim.Descent(bad)

    def test_lists_become_tuples(self):
        assert optim.Adam(betas=[0.8, 0.9]) == optim.Adam(betas=(0.8, 0.9))
        assert hash(optim.Adam(betas=[0.8, 0.9])) == hash(optim.Adam(betas=(0.8, 0.9)))


class TestAdjust:
    @pytest.fixture
    def ps(self, draw):
        return draw()

    def test_adjusts_all(self, case, kind, draw):
        """A new learning rate takes effect at once, as when param_groups are changed in torch."""
        ps, grads = kind.make(draw()), kind.make(draw())
        parameters = [torch.nn.Parameter(leaf.clone()) for leaf in kind.leaves(ps)]
        optimizer = case.reference(parameters)
        opt_state = optim.setup(case.rule, ps)
        for lr in (None, 0.3, 0.03):
            if lr is not None:
                opt_state = optim.adjust(opt_state, lr)
                optimizer.param_groups[0]["lr"] = lr
            for p, g in zip(parameters, kind.leaves(grads), strict=True):
                p.grad = g
            optimizer.step()
            opt_state, ps = optim.update(opt_state, ps, grads)
        torch.testing.assert_close(kind.leaves(ps), [p.detach() for p in parameters], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("name, value", [("betas", (0.5, 0.6)), ("betas", torch.tensor([0.5, 0.6])), ("eps", 0.1)])
    def test_adjusts_any(self, ps, name, value):
        opt_state = optim.adjust(optim.setup(optim.Adam(), ps), **{name: value})
        expected = optim.setup(optim.Adam(**{name: value}), ps)
        torch.testing.assert_close(optim.update(opt_state, ps, ps)[1], optim.update(expected, ps, ps)[1])

    @pytest.mark.parametrize("as_vector", [False, True])
    def test_by_path_is_param_groups(self, case, draw, as_vector):
        ps, all_grads = draw(), [draw() for _ in range(6)]
        parameters = [torch.nn.Parameter(leaf.clone()) for leaf in pytree.tree_leaves(ps)]
        optimizer = case.reference(parameters[:2])
        optimizer.add_param_group({"params": parameters[2:]})
        convert = ComponentVector if as_vector else lambda tree: tree
        new = convert(ps)
        opt_state = optim.setup(case.rule, new)
        for i, grads in enumerate(all_grads):
            if i == 2:
                opt_state = optim.adjust(opt_state, lr=0.2, path="layer_2")
                optimizer.param_groups[1]["lr"] = 0.2
            if i == 4:
                opt_state = optim.adjust(opt_state, lr=0.01)
                optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.01
            for p, g in zip(parameters, pytree.tree_leaves(grads), strict=True):
                p.grad = g
            optimizer.step()
            opt_state, new = optim.update(opt_state, new, convert(grads))
        assert isinstance(new, ComponentVector) == as_vector
        leaves = pytree.tree_leaves(new.to_dict() if as_vector else new)
        torch.testing.assert_close(leaves, [p.detach() for p in parameters], rtol=1e-12, atol=1e-12)

    def test_by_predicate(self, ps):
        opt_state = optim.adjust(optim.setup(optim.Descent(0.5), ps), lr=0.0, path=lambda name: name.endswith("bias"))
        _, new = optim.update(opt_state, ps, ps)
        torch.testing.assert_close(new["layer_1"]["bias"], ps["layer_1"]["bias"])
        torch.testing.assert_close(new["layer_1"]["weight"], ps["layer_1"]["weight"] / 2)
        assert repr(opt_state) == "OptState(Descent(by path), 4 parameters)"

    def test_in_a_chain(self, ps):
        chain = lambda lr: torchopt.chain(torchopt.clip_grad_norm(1.0), optim.Adam(lr))  # noqa: E731
        opt_state = optim.adjust(optim.setup(chain(0.1), ps), lr=0.2)
        torch.testing.assert_close(
            optim.update(opt_state, ps, ps)[1], optim.update(optim.setup(chain(0.2), ps), ps, ps)[1]
        )
        assert repr(opt_state) == (
            "OptState(chain(torchopt optimizer, Adam(lr=0.2, betas=(0.9, 0.999), eps=1e-08)), 4 parameters)"
        )

    def test_does_not_change_the_old_state(self, ps):
        opt_state = optim.setup(optim.Adam(0.1), ps)
        optim.adjust(opt_state, lr=0.2)
        optim.adjust(opt_state, lr=0.2, path="layer_1")
        assert "lr=0.1" in repr(opt_state)

    def test_derivatives_flow_into_the_value(self, ps):
        opt_state = optim.setup(optim.Descent(0.1), ps)
        loss = lambda lr: optim.update(optim.adjust(opt_state, lr=lr), ps, ps)[1]["layer_2"]["bias"].sum()  # noqa: E731
        slope = torch.func.grad(loss)(torch.tensor(0.5, dtype=torch.float64))
        torch.testing.assert_close(slope, -ps["layer_2"]["bias"].sum())

    def test_by_path_in_one_graph(self, ps):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        step = lambda state, lr: optim.update(optim.adjust(state, lr, path="layer_1"), ps, ps)  # noqa: E731
        compiled = torch.compile(step, backend=counter, fullgraph=True)
        opt_state = expected = optim.adjust(optim.setup(optim.Momentum(), ps), lr=0.1, path="layer_1")
        for lr in torch.tensor([0.2, 0.3, 0.4]):
            (opt_state, new), (expected, expected_new) = compiled(opt_state, lr.clone()), step(expected, lr)
        torch.testing.assert_close(new, expected_new)
        assert counter.frame_count == 1

    def test_unknown_name(self, ps):
        with pytest.raises(KeyNameError, match="no hyperparameter 'weight_decy'(.|\n)*Did you mean 'weight_decay'"):
            optim.adjust(optim.setup(optim.AdamW(), ps), weight_decy=0.1)

    @pytest.mark.parametrize(
        "path, fix",
        [
            ("layer_3", "Did you mean 'layer_1'|Did you mean 'layer_2'"),
            ("layer_1.wait", "Did you mean 'layer_1.weight'"),
        ],
    )
    def test_unknown_path(self, ps, path, fix):
        with pytest.raises(KeyNameError, match=f"No parameter is named '{path}'(.|\n)*{fix}"):
            optim.adjust(optim.setup(optim.AdamW(), ps), lr=0.1, path=path)

    def test_prefixes_end_at_dots(self, ps):
        with pytest.raises(KeyNameError, match="No parameter is named 'layer'"):
            optim.adjust(optim.setup(optim.AdamW(), ps), lr=0.1, path="layer")

    def test_values_are_checked(self, ps):
        opt_state = optim.setup(optim.Adam(), ps)
        with pytest.raises(InputError, match="lr must be in"):
            optim.adjust(opt_state, lr=-1.0)
        with pytest.raises(InputError, match="lr has the wrong shape"):
            optim.adjust(opt_state, lr=torch.ones(2))
        with pytest.raises(InputError, match="nothing to adjust"):
            optim.adjust(opt_state)

    def test_torchopt_hides_its_numbers(self, ps):
        with pytest.raises(InputError, match="torchopt hides its own"):
            optim.adjust(optim.setup(torchopt.adam(), ps), lr=0.1)


class TestStates:
    @pytest.mark.parametrize("by", ["pickle", "weights_only"])
    @pytest.mark.parametrize("path", [None, "layer_1"])
    def test_save_and_load(self, rule, kind, draw, by, path):
        ps, grads = kind.make(draw()), kind.make(draw())
        opt_state, ps = optim.update(optim.setup(rule, ps), ps, grads)
        if path in [name.rpartition(".")[0] for name in opt_state.layout.names]:
            opt_state = optim.adjust(optim.freeze(opt_state, path), lr=0.3, path=path)
        if by == "pickle":
            loaded = pickle.loads(pickle.dumps(opt_state))
        else:
            file = io.BytesIO()
            torch.save(opt_state, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
        assert pytree.tree_structure(loaded) == pytree.tree_structure(opt_state)
        torch.testing.assert_close(
            optim.update(loaded, ps, grads)[1], optim.update(opt_state, ps, grads)[1], rtol=0, atol=0
        )

    def test_rules_pickle(self, case):
        assert pickle.loads(pickle.dumps(case.rule)) == case.rule

    def test_repr(self, draw):
        opt_state = optim.setup(optim.AdamW(1e-3), draw())
        assert repr(optim.freeze(opt_state, "layer_2")) == (
            "OptState(AdamW(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01), 4 parameters, "
            "frozen: layer_2.weight, layer_2.bias)"
        )
        many = torch.vmap(lambda lr: optim.setup(optim.Descent(lr), torch.ones(3)))(torch.ones(4))
        assert repr(many) == "OptState(Descent(lr=<4>), 1 parameter)"
        texts = []
        torch.vmap(lambda lr: texts.append(repr(optim.setup(optim.Descent(lr), torch.ones(3)))) or lr)(torch.ones(4))
        assert texts == ["OptState(Descent(lr=<traced>), 1 parameter)"]


RULES = [r for r in vars(optim).values() if isinstance(r, type) and issubclass(r, optim.Rule) and r.hyperparameters]
HYPERPARAMETERS = [(rule, name) for rule in RULES for name in rule.hyperparameters]


class TestRanges:
    """Every hyperparameter of every rule declares where it lies, and refuses the rest in one line."""

    @staticmethod
    def make(cls, name, value, place):
        rule = cls.__new__(cls)
        default = next(field.default for field in dataclasses.fields(cls) if field.name == name)
        values = list(default) if isinstance(default, tuple) else [default]
        values[place] = value
        needed = {field.name: 1 for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        rule.__init__(**needed, **{name: tuple(values) if isinstance(default, tuple) else values[0]})
        return rule

    @pytest.mark.parametrize("cls, name", HYPERPARAMETERS, ids=lambda value: getattr(value, "__name__", value))
    def test_ends(self, cls, name):
        (size,) = cls.hyperparameters[name] or (1,)
        for place, interval in enumerate((cls.ranges[name] * size)[:size]):
            least, most = map(float, str(interval)[1:-1].split(","))
            inside = [least] if str(interval)[0] == "[" else []
            inside += [most] if str(interval)[-1] == "]" else []
            outside = [math.nan, math.nextafter(least, -math.inf), math.nextafter(most, math.inf), math.inf, -math.inf]
            outside += [end for end in (least, most) if end not in inside]
            for value in (*inside, math.nextafter(least, most)):
                self.make(cls, name, value, place)
            for value in outside:
                with pytest.raises(InputError) as error:
                    self.make(cls, name, value, place)
                written = name if len(set(cls.ranges[name])) == 1 else f"{name}[{place}]"
                assert error.value.problem == f"{written} must be in {interval}."

    @pytest.mark.parametrize("cls, name", HYPERPARAMETERS, ids=lambda value: getattr(value, "__name__", value))
    def test_adjusted(self, cls, name):
        if cls.hyperparameters[name]:
            pytest.skip("a few of a kind are checked as one")
        ps = {"weight": torch.ones(2, 2)}
        opt_state = optim.setup(cls(), ps)
        with pytest.raises(InputError, match=f"{name} must be in"):
            optim.adjust(opt_state, **{name: -math.inf})

    def test_names_that_only_type_checkers_know(self):
        class Mine(optim.LeafwiseRule):
            lr: Unknown = 0.1  # noqa: F821
            share: Annotated[float, optim.Range("[0, 1]")] = 0.5

            def delta(self, g, p, slots, h):
                return -h["lr"] * g, slots

        assert Mine(lr=5.0, share=1.0).lr == 5.0
        with pytest.raises(InputError, match=r"share must be in \[0, 1\]"):
            Mine(share=1.5)
