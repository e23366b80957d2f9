"""The tutorial page is replayed figure for figure, and the demo notices when a figure is off."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch

import luxtorch as lt

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = json.loads((EXAMPLES / "data" / "lux_tutorial.json").read_text())
TABLE = PAGE["loss_table"]
MODEL = lt.Dense(10, 5)
X, Y = torch.tensor(PAGE["x_samples"]).T, torch.tensor(PAGE["y_samples"]).T
PS = {"weight": torch.tensor(PAGE["weight"]), "bias": torch.tensor(PAGE["bias"])}


def loss(ps):
    return ((MODEL(X, ps, {})[0] - Y) ** 2).sum()


def step(opt_state, ps):
    return lt.optim.update(opt_state, ps, lt.gradient(loss, ps))


@pytest.mark.parametrize("form", [dict, lt.ComponentVector])
@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_the_losses_are_those_of_the_page(form, backend):
    ps = form(PS)
    opt_state = lt.optim.setup(lt.optim.Descent(0.01), ps)
    run = step if backend is None else torch.compile(step, fullgraph=True, backend=backend)
    losses = {}
    for iteration in range(1, 101):
        opt_state, ps = run(opt_state, ps)
        losses[iteration] = float(loss(ps))
    assert isinstance(ps, form)
    assert [losses[iteration] for iteration in TABLE["iteration"]] == pytest.approx(TABLE["loss"], rel=1e-5)
    truth = {"weight": torch.tensor(PAGE["W"]), "bias": torch.tensor(PAGE["b"])}
    assert float(loss(truth)) == pytest.approx(TABLE["ground_truth_loss"], rel=1e-5)


def test_the_pages_weights_survive_a_component_vector_to_the_bit():
    vector = lt.ComponentVector(PS)
    assert torch.equal(vector.weight, PS["weight"])
    assert torch.equal(lt.ComponentVector.from_flat(vector.flat, vector.axes).to_dict()["weight"], PS["weight"])
    assert vector.weight.untyped_storage().data_ptr() == vector.flat.untyped_storage().data_ptr()


def run_copy(folder, page):
    """Run a copy of the example on other data, and return what it ends with."""
    (folder / "data").mkdir()
    (folder / "data" / "lux_tutorial.json").write_text(json.dumps(page))
    shutil.copy(EXAMPLES / "basics.py", folder)
    return runpy.run_path(str(folder / "basics.py"))


def test_the_example_runs_and_draws(tmp_path, capsys):
    run_copy(tmp_path, PAGE)
    *_, agreement, following = capsys.readouterr().out.splitlines()
    assert agreement.startswith("22 of 22 figures agree")
    named = re.search(r"examples/(\w+\.py)", following)
    assert following.startswith("Try next: ") and named and (EXAMPLES / named[1]).is_file()
    assert (tmp_path / "output" / "basics.png").read_bytes().startswith(b"\x89PNG")


def test_the_example_fails_if_a_figure_is_off(tmp_path, capsys):
    off = {**PAGE, "loss_table": {**TABLE, "loss": [*TABLE["loss"][:-1], TABLE["loss"][-1] * 1.001]}}
    with pytest.raises(SystemExit, match="some figures are off"):
        run_copy(tmp_path, off)
    assert "DIFFERS" in capsys.readouterr().out
