"""Layers that are no pure functions, of every kind, and whether the right one is told."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import luxtorch as lt
from luxtorch import InputError
from luxtorch.core import tree_leaves
from luxtorch.inspect._purity import check_purity


class Faulty(lt.Layer):
    """Count calls, in one of many wrong ways."""

    fault: str

    def initial_parameters(self, key):
        return {"weight": torch.ones(3), "inner": {"bias": torch.zeros(3)}}

    def initial_states(self, key):
        return {"count": torch.zeros(()), "other": {"mean": torch.zeros(3)}, "training": lt.Static(True)}

    def __call__(self, x, ps, st):
        return FAULTS[self.fault][0](x, ps, st)


def without(tree, name):
    return {key: value for key, value in tree.items() if key != name}


def assigned(x, ps, st):
    st["count"] = st["count"] + 1
    return x, st


def removed(x, ps, st):
    st.pop("count")
    return x, st


def switched(x, ps, st):
    st["training"] = lt.Static(False)
    return x, st


def unnoticed(x, ps, st):
    x.data[0] = 7
    return x, st


CALLS = []


def growing(x, ps, st):
    CALLS.append(x.shape)
    return x * len(CALLS), st


FAULTS = {
    "input": (lambda x, ps, st: (x.mul_(2), st), "mutates", "changes its input in place"),
    "input, same numbers": (lambda x, ps, st: (x.mul_(1), st), "mutates", "changes its input in place"),
    "input, unnoticed": (unnoticed, "mutates", "changes its input in place"),
    "parameter": (lambda x, ps, st: (x * ps["weight"].mul_(2), st), "mutates", "changes its parameter 'weight'"),
    "inner parameter": (
        lambda x, ps, st: (x + ps["inner"]["bias"].add_(2), st), "mutates", "changes its parameter 'inner.bias'"),
    "state": (lambda x, ps, st: (x, {**st, "count": st["count"].add_(1)}), "mutates", "changes its state 'count'"),
    "assignment": (assigned, "mutates", "replaces its state 'count' in the dict"),
    "removal": (removed, "mutates", "removes its state 'count' from the dict"),
    "addition": (
        lambda x, ps, st: (x, (st["other"].update(new=x), st)[1]), "mutates", "adds the state 'other.new' to the dict"),
    "switch": (switched, "mutates", "changes a switch in the states"),
    "torch": (lambda x, ps, st: (x + torch.rand(3), st), "random", "global random numbers of torch"),
    "dropout": (lambda x, ps, st: (torch.dropout(x, 0.5, True), st), "random", "global random numbers of torch"),
    "NumPy": (lambda x, ps, st: (x + np.random.rand(), st), "random", "global random numbers of NumPy"),
    "Python": (lambda x, ps, st: (x + random.random(), st), "random", "global random numbers of Python"),
    "dropped": (lambda x, ps, st: (x, without(st, "count")), "state", "does not return the state 'count'"),
    "dropped inside": (
        lambda x, ps, st: (x, {**st, "other": {}}), "state", "does not return the state 'other.mean'"),
    "extra": (lambda x, ps, st: (x, {**st, "new": x}), "state", "returns the state 'new', which it was not given"),
    "number": (lambda x, ps, st: (x, {**st, "count": 1}), "state", "returns the state 'count' as int"),
    "shape": (lambda x, ps, st: (x, {**st, "count": torch.zeros(2)}), "state", "as torch.float32 (2,), and was given"),
    "dtype": (lambda x, ps, st: (x, {**st, "count": torch.tensor(1)}), "state", "as torch.int64 (), and was given"),
    "attached": (
        lambda x, ps, st: (x, {**st, "count": ps["weight"].sum()}), "state", "'count' without detaching it"),
    "static": (
        lambda x, ps, st: (x, {**st, "training": lt.Static(False)}), "state", "states of another structure"),
    "nothing": (lambda x, ps, st: (x, None), "state", "returns NoneType instead of its states"),
    "hidden": (growing, "unrepeatable", "returns something else when it is called again"),
    "forked": (
        lambda x, ps, st: (forked(x), st), "unrepeatable", "returns something else when it is called again"),
}  # fmt: skip


IN_DICTS = ("removal", "addition", "switch")


def forked(x):
    """Read global random numbers, and put them back."""
    with torch.random.fork_rng([]):
        return x + torch.rand(3)


def places(layer):
    """Yield models with a layer at the end of a path."""
    yield layer, ""
    yield lt.Chain(lt.Dense(3, 3), layer), "layer_2"
    inner = lt.Chain(lt.LayerNorm(3), lt.SkipConnection(layer, lambda y, x: y), lt.Dropout(0.5))
    yield lt.Chain(one=lt.BatchNorm(3), two=inner), "two.layer_2"


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_told_and_placed(make_key, fault):
    _, kind, words = FAULTS[fault]
    for model, path in places(Faulty(fault)):
        ps, st = lt.setup(make_key(), model)
        report = check_purity(model, lt.random.normal(make_key(), (4, 3)), lt.ComponentVector(ps) if path else ps, st)
        finding, *others = report.findings
        assert (finding.path, finding.kind) == (path, kind) and words in finding.what, str(report)
        # Who takes a dict apart that is not his returns it so, too.
        assert [(each.path, each.kind) for each in others] == [(path, "state")] * (fault in IN_DICTS)
        assert finding.layer == f"Faulty '{fault}'" and not report
        text = str(report)
        assert text.startswith(f"{1 + len(others)} found:\n- ") and words in text and "fix: " in text


def test_a_container_that_drops_states_is_told():
    class Forgets(lt.ContainerLayer):
        norm: lt.BatchNorm
        rest: lt.Chain

        def __call__(self, x, ps, st):
            x, _ = self.norm(x, ps["norm"], st["norm"])
            x, rest = self.rest(x, ps["rest"], st["rest"])
            return x, {"norm": st["norm"], "rest": rest}

    model = lt.Chain(a=Forgets(lt.BatchNorm(3), lt.Chain(lt.Dense(3, 3), lt.BatchNorm(3))))
    x = torch.arange(12.0).view(4, 3)
    report = check_purity(model, x)
    assert [(each.path, each.kind) for each in report.findings] == [("a", "state")]
    assert "does not return the new states of 'norm'" in str(report)
    assert check_purity(model, x, st=lt.test_mode(lt.initial_states(0, model)))  # when they do not change


def test_several_faults_are_all_told(make_key):
    model = lt.Chain(Faulty("input"), Faulty("dropped"), lt.Chain(Faulty("torch"), Faulty("input")))
    report = check_purity(model, torch.ones(4, 3))
    assert [(each.path, each.kind) for each in report.findings] == [
        ("layer_1", "mutates"), ("layer_2", "state"), ("layer_3.layer_1", "random"), ("layer_3.layer_2", "mutates"),
    ]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checker_is_pure_itself(make_key, fault):
    model = lt.Chain(Faulty(fault))
    ps, st = lt.setup(make_key(), model)
    x = lt.random.normal(make_key(), (4, 3))
    before = [(leaf.clone(), leaf._version) for leaf in tree_leaves((x, ps, st))]
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    check_purity(model, x, ps, st)
    for leaf, (copy, version) in zip(tree_leaves((x, ps, st)), before, strict=True):
        assert torch.equal(leaf, copy) and leaf._version == version and not leaf.requires_grad
    assert torch.equal(torch.get_rng_state(), generators[0]) and (np.random.get_state()[1] == generators[1]).all()
    assert random.getstate() == generators[2]


def test_pure_models_are_pure(make_key):
    model = lt.Chain(
        lt.Dense(3, 8, torch.tanh),
        lt.SkipConnection(lt.Chain(lt.BatchNorm(8), lt.Dropout(0.5)), torch.add),
        lt.Ensemble(lt.Chain(lt.Dense(8, 2), lt.AlphaDropout(0.1)), 3),
    )
    report = check_purity(model, lt.random.normal(make_key(), (4, 3)), rng=make_key())
    assert report and not report.findings and str(report) == "Every layer is a pure function."


@pytest.mark.parametrize("fault", ["input", "state", "dropped", "attached", "hidden"])
def test_inside_transforms_too(fault):
    report = check_purity(lt.Chain(lt.Ensemble(lt.Chain(Faulty(fault)), 2)), torch.ones(4, 3))
    assert ("layer_1.layer_1", FAULTS[fault][1]) in [(each.path, each.kind) for each in report.findings]


def test_errors_of_the_model_come_through():
    with pytest.raises(InputError, match=r"model\.layer_1 \(Dense 2 -> 3\)"):
        check_purity(lt.Chain(lt.Dense(2, 3)), torch.ones(4, 3))
    with pytest.raises(InputError, match="layer must be a layer"):
        check_purity(torch.tanh, torch.ones(4, 3))


class Remembering(lt.Layer):
    """Keep what the first call has computed from its parameters."""

    cache: dict

    def initial_parameters(self, key):
        return {"weight": torch.ones(2)}

    def __call__(self, x, ps, st):
        if "weight" not in self.cache:
            self.cache["weight"] = 2 * ps["weight"]
        return x * self.cache["weight"], st


def test_what_a_call_remembers_of_earlier_parameters_is_found():
    report = lt.check_purity(Remembering({}), torch.ones(3, 2))
    assert not report
    assert "other parameters" in str(report)
