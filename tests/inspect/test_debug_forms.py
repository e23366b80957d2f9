"""Looking inside, for every form that the tests of the layers know."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import luxtorch as lt
from luxtorch.core import tree_leaves, tree_map
from luxtorch.inspect._capture import capture
from luxtorch.inspect._debug import debug_mode
from luxtorch.inspect._purity import check_purity
from luxtorch.inspect._summary import summary
from luxtorch.interop import Inputs
from tests.interop.forms import FORMS

FILES = [
    file
    for file in sorted((Path(__file__).parents[1] / "layers").glob("test_*.py"))
    if "\nFORMS = {" in file.read_text()
]


def draw(spec, key):
    if isinstance(spec, Tensor):
        return spec
    if isinstance(spec, dict):
        return {name: draw(part, lt.random.fold_in(key, name)) for name, part in spec.items()}
    if all(isinstance(size, int) for size in spec):
        return lt.random.normal(key, spec)
    return tuple(draw(part, lt.random.fold_in(key, i)) for i, part in enumerate(spec))


def forms(file, make_key, cast=lambda trees: trees):
    """Yield each form of a file: its name, the layer, an input, parameters and states."""
    assert FILES
    for name, (layer, inputs, *_) in runpy.run_path(str(file))["FORMS"].items():
        for spec in inputs:
            yield name, layer, *cast((draw(spec, make_key()), *lt.setup(make_key(), layer)))


def objective(layer, x, st):
    def of_parameters(ps):
        y, new = layer(x, ps, st)
        real = [leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return sum((leaf.square().sum() for leaf in real), torch.zeros(())), (y, new)

    return of_parameters


def same(name, got, expected):
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda text: f"{name}: {text}")
        else:
            assert a == b, name


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_debug_mode_changes_no_number(make_key, file):
    # In double precision, as gradients that cancel depend on the order of sums.
    for name, layer, x, ps, st in forms(file, make_key, lt.f64):
        seen = []
        model = debug_mode(layer, record=seen.append)
        same(name, model(x, ps, st), layer(x, ps, st))
        if not tree_leaves(ps):
            continue
        expected = torch.func.grad(objective(layer, x, st), has_aux=True)(ps)
        same(name, torch.func.grad(objective(model, x, st), has_aux=True)(ps), expected)
        vector = torch.func.grad(objective(model, x, st), has_aux=True)(lt.ComponentVector(ps))[0]
        same(name, vector.to_dict(), expected[0])
        taped = tree_map(lambda leaf: leaf.clone().requires_grad_(), ps)
        objective(model, x, st)(taped)[0].backward()
        same(
            name, tree_map(lambda leaf: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, taped), expected[0]
        )
        assert seen


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_capture_changes_no_number(make_key, file):
    for name, layer, x, ps, st in forms(file, make_key):
        (y, inside), new = capture(layer, x, ps, st)
        same(name, (y, new), layer(x, ps, st))
        assert isinstance(inside, dict)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_summary_knows_what_the_layer_returns(make_key, file):
    for name, layer, x, ps, st in forms(file, make_key):
        table = summary(layer, x)
        y, _ = layer(x, ps, st)
        shapes = tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf, y)
        assert table.total.output == shapes, name
        assert (table.total.parameters, table.total.states) == (lt.parameter_length(ps), lt.state_length(st)), name
        assert str(table).count("\n") == len(table.rows) + 4 and table._repr_html_()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [lt.train_mode, lt.test_mode])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_layer_of_luxtorch_is_pure(make_key, file, mode):
    excused = {name: form[2] for name, form in runpy.run_path(str(file))["FORMS"].items() if len(form) > 2}
    for name, layer, x, ps, st in forms(file, make_key):
        report = check_purity(layer, x, ps, mode(st))
        # Of a form that is excused from the law `state`, states may come back as they were computed.
        assert all(found.kind in excused.get(name, ()) for found in report.findings), f"{name}: {report}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(empty|zero-element|Initializing|support size|nested_tensor|oneDNN):UserWarning")
@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_modules_of_torch_inside_others(make_key, form):
    layer, ps, st = lt.from_torch(form.module(make_key()))
    x = form.draw(0, make_key())
    if form.options:
        x = Inputs(*x.args, **x.kwargs, **form.options) if isinstance(x, Inputs) else Inputs(x, **form.options)
    model, ps, st = lt.Chain(inside=layer), {"inside": ps}, {"inside": st}
    expected = model(x, ps, st)
    same(form, debug_mode(model)(x, ps, st), expected)
    report = check_purity(model, x, ps, st)
    assert report, str(report)
    try:
        lt.output_shape(model, x)
    except Exception:
        return  # what it does depends on numbers, and is not known without them
    assert summary(model, x).total.parameters == lt.parameter_length(ps)
