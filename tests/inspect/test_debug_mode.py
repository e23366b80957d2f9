"""Debug mode: that it changes no number, what it says, its options, and what it does where there are no numbers."""

from __future__ import annotations

import math
import pickle
import sys
import traceback

import pytest
import torch
from hypothesis import given, strategies
from torch import nn

import luxtorch as lt
from luxtorch import InputError, LayerError
from luxtorch.core import tree_leaves, tree_map
from luxtorch.core._statistics import Statistics
from luxtorch.inspect._debug import NonFiniteError, debug_mode

MODEL = lt.Chain(first=lt.Dense(2, 3), block=lt.Chain(act=torch.sqrt, last=lt.Dense(3, 1)))


def found(call):
    with pytest.raises(NonFiniteError) as caught:
        call()
    return caught.value


class Between(lt.ContainerLayer):
    """Do something of one's own between two layers."""

    before: lt.Dense = lt.Dense(2, 2)
    after: lt.Dense = lt.Dense(2, 2)
    function: str = "nan"

    def __call__(self, x, ps, st):
        y, _ = self.before(x, ps["before"], st["before"])
        y = {"nan": y * torch.nan, "inf": y / 0, "root": y + (0 * y).sqrt()}[self.function]
        y, _ = self.after(y, ps["after"], st["after"])
        return y, st


@pytest.mark.parametrize(("function", "direction"), [("nan", "forward"), ("inf", "forward"), ("root", "backward")])
def test_code_between_layers_is_the_containers(make_key, function, direction):
    model = lt.Chain(lt.NoOpLayer(), lt.Chain(mine=Between(function=function)))
    ps, st = lt.setup(make_key(), model)
    x = torch.ones(4, 2)
    error = found(lambda: torch.func.grad(lambda ps: debug_mode(model)(x, ps, st)[0].sum())(ps))
    assert (error.path, error.direction) == ("layer_2.mine", direction)
    assert "no layer inside returned that" in str(error) and "between the layers" in error.fix
    assert {"forward": "'after'", "backward": "'before'"}[direction] in str(error)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_was_wrong_before_is_said_to_be(make_key, value):
    model = lt.Chain(lt.NoOpLayer(), lt.BatchNorm(2))
    ps, st = lt.setup(make_key(), model)
    bad, x = torch.full((2,), value), lt.random.normal(make_key(), (4, 2))
    word = "NaN" if math.isnan(value) else "Inf"
    broken = lt.unflatten_names({"layer_2.weight": bad}, like=ps)
    error = found(lambda: debug_mode(model)(x, broken, st))
    assert error.path == "layer_2" and f"The parameter 'weight' holds {word}" in str(error)
    if math.isnan(value):
        error = found(lambda: debug_mode(model)(x, ps, lt.unflatten_names({"layer_2.running_mean": bad}, like=st)))
        assert error.path == "layer_2" and "The state 'running_mean' holds NaN" in str(error)
        error = found(lambda: debug_mode(model)(x * bad, ps, st))
        assert error.path == "" and "The model's input holds NaN" in str(error) and "data" in error.fix
    factor = torch.tensor(value)

    def loss(ps):
        return debug_mode(model)(x, ps, st)[0].sum() * factor

    error = found(lambda: torch.func.grad(loss)(ps))
    assert error.path == "" and "gradient by the model's output" in str(error) and "loss" in error.fix


def test_infinities_that_come_in_may_go_anywhere(make_key):
    attention = lt.Chain(lt.MultiHeadAttention(4, num_heads=2))
    ps, st = lt.setup(make_key(), attention)
    x = lt.random.normal(make_key(), (2, 5, 4))
    mask = torch.full((5, 5), -torch.inf).triu(1)
    y, _ = debug_mode(attention)((x, x, x, mask), ps, st)
    torch.testing.assert_close(y, attention((x, x, x, mask), ps, st)[0])
    # but a layer that has none, and makes one, is named
    model = lt.Chain(a=lambda x: x[0], b=torch.log)
    error = found(lambda: debug_mode(model)((torch.zeros(2), mask), {"a": {}, "b": {}}, {"a": {}, "b": {}}))
    assert error.path == "b"


def test_infinities_may_be_allowed(make_key):
    model = lt.Chain(torch.log, torch.exp)
    ps, st = lt.setup(0, model)
    assert found(lambda: debug_mode(model)(torch.zeros(2), ps, st)).path == "layer_1"
    y, _ = debug_mode(model, inf_check=False)(torch.zeros(2), ps, st)
    assert torch.equal(y, torch.zeros(2))
    assert found(lambda: debug_mode(model, inf_check=False)(-torch.ones(2), ps, st)).path == "layer_1"


def test_states_that_a_layer_makes_are_looked_at():
    class Count(lt.Layer):
        def initial_states(self, key):
            return {"mean": torch.zeros(())}

        def __call__(self, x, ps, st):
            return x, {"mean": st["mean"] / 0}

    model = lt.Chain(lt.NoOpLayer(), Count())
    ps, st = lt.setup(0, model)
    error = found(lambda: debug_mode(model)(torch.ones(2), ps, st))
    assert error.path == "layer_2" and "new state 'mean' holds NaN" in str(error)


@pytest.mark.parametrize("check", ["none", "forward", "backward", "both"])
def test_the_passes_to_check(check):
    ps, st = lt.setup(0, MODEL)
    zero = tree_map(torch.zeros_like, ps)
    negative = lt.unflatten_names({"first.bias": -torch.ones(3)}, like=zero)
    model, x = debug_mode(MODEL, nan_check=check), torch.ones(4, 2)

    def forward():
        return model(x, negative, st)

    def backward():
        return torch.func.grad(lambda ps: model(x, ps, st)[0].square().sum())(
            lt.unflatten_names({"block.last.weight": torch.ones(1, 3), "block.last.bias": torch.ones(1)}, like=zero)
        )

    for direction, call in (("forward", forward), ("backward", backward)):
        if check in (direction, "both"):
            error = found(call)
            assert (error.path, error.direction) == ("block.act", direction)
        else:
            assert not all(bool(leaf.isfinite().all()) for leaf in tree_leaves(call()))


def test_statistics_of_what_went_in_are_said():
    ps, st = lt.setup(0, MODEL)
    ps = lt.unflatten_names({"first.weight": torch.zeros(3, 2), "first.bias": torch.tensor([-4.0, 1.0, 3.0])}, like=ps)
    text = str(found(lambda: debug_mode(MODEL)(torch.ones(1, 2), ps, st)))
    assert text.splitlines()[0] == "model.block.act (WrappedFunction sqrt): The layer's output holds NaN."
    assert "output: torch.float32 (1, 3): 1 NaN, 0 Inf, the others from 1 to 1.732" in text
    assert "input: torch.float32 (1, 3): from -4 to 3, mean 0, std 2.944" in text


def test_it_may_be_a_part_of_a_model():
    ps, st = lt.setup(0, MODEL)
    ps = lt.unflatten_names({"first.bias": -100 * torch.ones(3)}, like=ps)
    whole = lt.Chain(encoder=lt.SkipConnection(debug_mode(MODEL), lambda y, x: y))
    error = found(lambda: whole(torch.ones(1, 2), {"encoder": ps}, {"encoder": st}))
    assert error.where == "model.encoder.block.act (WrappedFunction sqrt)"
    assert error.path == "block.act"  # in the model that is debugged


def failing(wrong):
    def fails(x):
        raise wrong("no more")

    return lt.Chain(lt.NoOpLayer(), lt.Chain(hit=fails))


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("wrong", [AssertionError, torch.OutOfMemoryError, StopIteration, KeyboardInterrupt])
def test_exceptions_that_others_may_wait_for_keep_their_type_and_say_where(wrong, check):
    model = failing(wrong)
    with pytest.raises(wrong, match="no more") as caught:
        debug_mode(model, error_check=check)(torch.ones(4, 2), *lt.setup(0, model))
    notes = getattr(caught.value, "__notes__", [])
    expected = ["In model.layer_2.hit (WrappedFunction fails), called on", "  input: torch.float32 (4, 2)"]
    assert notes == (expected if check and wrong is not KeyboardInterrupt else [])
    if notes and sys.version_info >= (3, 11):
        assert "WrappedFunction fails" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("check", [True, False])
def test_exceptions_that_a_layer_explains_say_where_in_any_case(check):
    model = failing(ValueError)
    with pytest.raises(LayerError, match="no more") as caught:
        debug_mode(model, error_check=check)(torch.ones(4, 2), *lt.setup(0, model))
    assert caught.value.where == "model.layer_2.hit (WrappedFunction fails)" and "(4, 2)" in caught.value.got


@pytest.mark.parametrize("checked", [debug_mode, lambda model: model])
def test_shape_errors_in_functions_of_the_users_say_where(checked):
    model = checked(lt.Chain(lt.Dense(2, 3), lt.Chain(mine=lambda x: x.view(7, 7))))
    with pytest.raises(LayerError, match=r"model\.layer_2\.mine \(WrappedFunction <lambda>\)"):
        model(torch.ones(4, 2), *lt.setup(0, model))


def test_what_is_recorded(make_key):
    seen = []
    model = debug_mode(MODEL, nan_check="none", record=seen.append)
    ps, st = lt.setup(make_key(), MODEL)
    ps = lt.unflatten_names({"first.bias": 10 * torch.ones(3)}, like=ps)
    x = torch.ones(4, 2)
    gradients = torch.func.grad(lambda ps: model(x, ps, st)[0].sum())(ps)
    paths = {(each.path, each.what) for each in seen}
    for path in ("", "first", "block", "block.act", "block.last"):
        assert {(path, "input"), (path, "output"), (path, "gradient by output")} <= paths
    by_weight = next(
        each for each in seen if (each.path, each.what) == ("block.last", "gradient by parameter 'weight'")
    )
    assert by_weight.statistics == Statistics.of(gradients["block"]["last"]["weight"])
    assert by_weight.layer == "Dense 3 -> 1"
    assert str(by_weight).startswith("block.last (Dense 3 -> 1), gradient by parameter 'weight': torch.float32 (1, 3)")
    order = [each.path for each in seen if each.what == "gradient by input"]
    assert order == ["block.last", "block.act", "block"]  # nothing is differentiated by the input of the first
    assert next(each for each in seen if each.what == "input").statistics.mean == 1


@given(
    strategies.lists(
        strategies.floats(width=32) | strategies.sampled_from([math.nan, math.inf, -math.inf]), max_size=20
    ),
    strategies.sampled_from([torch.float32, torch.float64, torch.complex64]),
)
def test_statistics_are_those_of_the_finite_numbers(values, dtype):
    tensor = torch.tensor(values, dtype=torch.float32).to(dtype)
    got = Statistics.of(tensor)
    finite = tensor[tensor.isfinite()]
    finite = (finite.abs() if finite.is_complex() else finite).double()
    assert (got.nan, got.inf) == (int(tensor.isnan().sum()), int(tensor.isinf().sum()))
    assert got.finite == (len(finite) == len(values)) and got.shape == (len(values),) and got.dtype == dtype
    if len(finite):
        assert (got.minimum, got.maximum) == (float(finite.min()), float(finite.max()))
        assert got.mean == pytest.approx(float(finite.mean()), nan_ok=True)
        assert got.std == pytest.approx(float(finite.std(correction=0)), nan_ok=True)
    else:
        assert math.isnan(got.mean)
    assert str(got).startswith(f"{dtype} ({len(values)},): ")


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_inside_a_compiled_function_it_runs_uncompiled(backend):
    ps, st = lt.setup(0, MODEL)
    good = lt.unflatten_names({"first.bias": 10 * torch.ones(3)}, like=ps)
    bad = lt.unflatten_names({"first.bias": -10 * torch.ones(3)}, like=ps)
    model, x = debug_mode(MODEL), torch.ones(4, 2)

    def call(x, ps, st):
        return 2 * model(x, ps, st)[0] + 1

    compiled = torch.compile(call, backend=backend)
    torch.testing.assert_close(compiled(x, good, st), call(x, good, st))
    error = found(lambda: compiled(x, bad, st))
    assert error.path == "block.act" and error.where.startswith("model.block.act (")


def test_where_there_are_no_numbers_it_says_so():
    ps, st = lt.setup(0, MODEL)
    model, x = debug_mode(MODEL), torch.ones(4, 2)
    # torch 2.13 says only where.
    with pytest.raises(torch._dynamo.exc.Unsupported, match="debug_mode reads numbers|_debug.py"):
        torch.compile(model, backend="eager", fullgraph=True)(x, ps, st)
    with pytest.raises(InputError, match="cannot be read while the call is being traced"):
        lt.jit(lambda ps: model(x, ps, st)[0])(ps)


def test_on_the_meta_device_nothing_is_checked():
    assert lt.output_shape(debug_mode(MODEL), (5, 2)) == (5, 1)
    meta = tree_map(lambda leaf: leaf.to("meta"), lt.setup(0, MODEL))
    seen = []
    y, _ = debug_mode(MODEL, record=seen.append)(torch.empty(5, 2, device="meta"), *meta)
    assert y.is_meta and not seen


def test_it_is_a_layer_with_the_trees_of_the_model():
    model = debug_mode(MODEL)
    assert model == debug_mode(MODEL) != debug_mode(MODEL, nan_check="none")
    assert hash(model) == hash(debug_mode(MODEL)) and pickle.loads(pickle.dumps(model)) == model
    assert lt.parameter_length(model) == lt.parameter_length(MODEL)
    error = found(lambda: debug_mode(lt.Chain(torch.log))(-torch.ones(1), {"layer_1": {}}, {"layer_1": {}}))
    copied = pickle.loads(pickle.dumps(error))
    assert str(copied) == str(error) and isinstance(copied, FloatingPointError)
    assert (copied.path, copied.direction) == ("layer_1", "forward")


@pytest.mark.slow
def test_the_law_checker_takes_it(make_key):
    model = debug_mode(lt.Chain(lt.Dense(3, 4, torch.tanh), lt.BatchNorm(4), lt.Dropout(0.5), lt.Dense(4, 2)))
    lt.testing.check_layer(model, lt.random.normal(make_key(), (5, 3)), rng=make_key(), skip=["compile", "jit"])


def test_nothing_that_is_shared_stays_changed(make_key):
    hooks = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    net, ps, st = lt.from_torch(Mine())
    debug_mode(net)(torch.ones(3, 2), ps, st)
    found(lambda: debug_mode(net)(torch.full((3, 2), 1e38), ps, st))
    assert not any(hooks)


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x) * 1e38


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nan_check": "foward"}, ["nan_check", "'both'", "Did you mean 'forward'?"]),
        ({"nan_check": True}, ["nan_check", "True"]),
        ({"record": []}, ["record", "append"]),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(InputError) as caught:
        debug_mode(MODEL, **options)
    assert all(word in str(caught.value) for word in words)


def test_only_layers_are_debugged():
    with pytest.raises(InputError, match="model must be a layer"):
        debug_mode(nn.Linear(2, 2))
