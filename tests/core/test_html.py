"""What notebooks show: well-formed HTML without scripts, of every layer and of every kind of tree."""

from __future__ import annotations

import re
import runpy
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.core import describe, tree_map
from luxtorch.core._table import MANY, Line, plain, section, shown
from luxtorch.core._table import html as table

VOID = {"br", "hr", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """Read HTML, and refuse what is not well-formed, runs anything, or loads anything.

    Attributes:
        words: The text, in its order.
        red: The text in red.
        opened: How many groups are open at first.
        closed: How many are not.
    """

    def __init__(self, html):
        super().__init__()
        self.stack, self.words, self.red, self.opened, self.closed = [], [], [], 0, 0
        self.feed(html)
        self.close()
        assert not self.stack, f"{self.stack} stay open"

    def handle_starttag(self, tag, attrs):
        assert tag in {"div", "span", "details", "summary", "pre"}
        assert {name for name, _ in attrs} <= {"style", "open"}
        if tag == "summary":
            assert self.stack[-1][0] == "details"
        if tag == "details":
            self.opened, self.closed = self.opened + (("open", None) in attrs), self.closed + (not attrs)
        style = dict(attrs).get("style") or ""
        assert "url(" not in style and all(
            re.fullmatch(r"\s*[a-z-]+: [^:;{}]+", part) for part in style.split(";") if part
        )
        # The one color of its own: the rest takes the notebook's, be it light or dark.
        assert "background" not in style and ("color" not in style or "color: #e5484d" in style)
        self.stack.append((tag, "color" in style))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        self.words += filter(None, [data.strip()])
        if any(red for _, red in self.stack):
            self.red.append(data)

    def handle_comment(self, data):
        raise AssertionError("a comment")

    @property
    def text(self):
        return " ".join(self.words)


def forms():
    """Yield each form of a layer that the tests of layers have."""
    for file in sorted((Path(__file__).parents[1] / "layers").glob("test_*.py")):
        if "\nFORMS = {" in file.read_text():
            for name, form in runpy.run_path(str(file))["FORMS"].items():
                yield f"{file.name}: {name}", form[0]


def test_every_layer_is_shown_with_its_parameters_and_states():
    seen = set()
    for name, layer in forms():
        page, (ps, st) = Page(layer._repr_html_()), lt.setup(0, layer)
        assert type(layer).__name__ in page.text, name
        for number in {lt.parameter_length(ps), lt.state_length(st)} - {0}:
            assert f"{number:_}" in page.words, name
        for tree in (ps, st):
            assert Page(describe(tree)._repr_html_()).text.split() == repr(describe(tree)).split(), name
        seen.add(type(layer))
    assert len(seen) > 50


def test_a_model_is_the_tree_that_is_printed():
    model = lt.Chain(
        lt.Dense(2, 8, torch.tanh), *[lt.Dense(8, 8)] * 3, lt.SkipConnection(lt.BatchNorm(8), torch.add), torch.exp
    )
    assert Page(model._repr_html_()).text.splitlines() == [
        "parameters states Chain 256 17 layer_1 = Dense(2 -> 8, tanh) weight (8, 2), bias (8,) 24 "
        "layer_(2-4) = Dense(8 -> 8) weight (8, 8), bias (8,) 3 x 72 "
        "layer_5 = SkipConnection(add) 16 17 BatchNorm(8) weight (8,), bias (8,) 16 17 layer_6 = WrappedFunction(exp)"
    ]


def test_a_single_layer_has_nothing_to_open():
    page = Page(lt.Dense(2, 1)._repr_html_())
    assert page.words == ["parameters", "Dense(2 -> 1)", "weight (1, 2), bias (1,)", "3"]
    assert page.opened == page.closed == 0


@given(st.text(), st.text())
def test_names_and_values_are_escaped(name, value):
    name, value = f"<script>{name.replace('.', '')}&amp;</script>", f"<b>{value}"
    vector = lt.ComponentVector({name: torch.ones(2)})
    matrix = lt.ComponentMatrix(torch.ones(2, 2), vector.axes)
    for page in (describe({name: torch.ones(2)})._repr_html_(), vector._repr_html_(), matrix._repr_html_()):
        assert name in Page(page).words
    assert name in Page(plain(name)).words
    assert Page(section(name, [plain(name)], "note")).words == [name, "note", name]
    assert f"= {value!r:.60}".strip() in Page(describe({"x": value})._repr_html_()).words


def test_what_to_worry_about_is_red_on_every_line_above_it():
    tree = {"a": {"weight": torch.tensor([torch.nan, 1.0, torch.inf])}, "b": {"weight": torch.ones(2)}}
    assert Page(describe(tree)._repr_html_()).red == ["1 NaN, 1 Inf"] * 3
    assert not Page(describe({"b": tree["b"]})._repr_html_()).red


def test_small_trees_are_open_and_big_ones_closed_below_their_top():
    def page(layers):
        return Page(
            describe({f"layer_{i}": {"a": torch.ones(i + 1), "b": torch.ones(2)} for i in range(layers)})._repr_html_()
        )

    small, big = page(MANY // 4), page(MANY)
    assert (small.opened, small.closed) == (1 + MANY // 4, 0)
    assert (big.opened, big.closed) == (1, MANY)
    assert len([word for word in big.words if word.startswith("layer_")]) == MANY


def test_like_groups_of_a_big_tree_are_folded_and_all_there():
    page = Page(describe({f"layer_{i}": {"a": torch.ones(2), "b": torch.ones(2)} for i in range(MANY)})._repr_html_())
    assert f"layer_(0-{MANY - 1})" in page.words and f"layer_{MANY // 2}" in page.words
    assert (page.opened, page.closed) == (1, 1 + MANY)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_depth_is_that_of_the_text(depth):
    description = describe({"a": {"b": {"c": torch.ones(2)}}, "d": torch.ones(3)}, depth=depth)
    assert Page(description._repr_html_()).text.split() == repr(description).split()


def test_tables_leave_empty_columns_out():
    line = Line("root", cells=("", "1"), below=(Line("leaf", cells=("",)),))
    assert Page(table(("a", "b"), line)).text.split() == ["b", "root", "1", "leaf"]


@pytest.mark.parametrize("value", [lt.Dense(2, 1), lt.ComponentVector({"a": torch.ones(2)}), describe({})], ids=type)
def test_nothing_else_is_promised_to_notebooks(value):
    names = ("_ipython_canary_method_should_not_exist_", "_ipython_display_", "_repr_mimebundle_", "_repr_latex_")
    assert hasattr(value, "_repr_html_") and not any(hasattr(value, name) for name in names)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_a_vector_shows_its_components(batch):
    vector = lt.ComponentVector(
        {"a": {"w": torch.ones(*batch, 2, 5)}, "e": {}, "b": torch.zeros(batch)}, batch_dims=len(batch)
    )
    words = Page(vector._repr_html_()).words
    assert f"ComponentVector of {vector.numel()} elements" in words
    assert str((*batch, 2, 5)) in words and str(batch) in words and "(empty)" in words


def test_a_matrix_shows_its_blocks(rng):
    layout = lt.axes({"a": torch.zeros(2), "b": {"c": torch.zeros(3)}})
    data = torch.randn(5, 5, generator=rng)
    page = Page(lt.ComponentMatrix(data, layout, layout)._repr_html_())
    assert "ComponentMatrix of shape (5, 5)" in page.words
    assert [word for word in page.words if re.fullmatch(r"\(\d, \d\)", word)] == [
        "(2, 2)",
        "(2, 3)",
        "(3, 2)",
        "(3, 3)",
    ]
    for block in (data[:2, :2], data[:2, 2:], data[2:, :2], data[2:, 2:]):
        assert f"{block.mean():.4g}" in page.words and f"{block.std(correction=0):.4g}" in page.words
    assert ":" in Page(lt.ComponentMatrix(data, layout)._repr_html_()).words
    assert "(4, 2, 2)" in Page(lt.ComponentMatrix(data.expand(4, 5, 5), layout, layout)._repr_html_()).words


MODEL = lt.Chain(lt.Dense(3, 2), lt.BatchNorm(2))


@pytest.fixture
def ts():
    return training.TrainState(MODEL, *lt.setup(0, MODEL), optim.Adam(0.1))


def test_a_training_state_shows_its_parts(ts):
    text = Page(ts._repr_html_()).text
    order = [
        "TrainState",
        "step 0, 12 parameters",
        "Dense(3 -> 2)",
        "Adam(lr=0.1",
        "parameters",
        "states",
        "running_var",
    ]
    places = [text.index(order[0])]
    for word in order[1:]:
        places.append(text.index(word, places[-1]))
    assert places == sorted(places)


def test_a_box_shows_its_parts():
    ps, st = lt.setup(0, MODEL)
    text = Page(lt.StatefulLayer(MODEL, ps, st)._repr_html_()).text
    assert all(word in text for word in ("StatefulLayer", "Dense(3 -> 2)", "parameters", "states", "running_var"))
    without = Page(lt.StatefulLayer(MODEL, None, st)._repr_html_()).text
    assert "weight" in text.split("running_var")[0].split("parameters (")[1]
    assert "parameters (" not in without and "running_var" in without


class Blocks(torch.nn.Module):
    """Call modules in a list, which is not called itself: it has no row."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
        self.last = torch.nn.Tanh()

    def forward(self, x):
        return self.last(self.blocks[1](self.blocks[0](x)))


def test_a_summary_shows_the_rows_that_are_printed():
    layer, _, _ = lt.from_torch(Blocks())
    table = lt.summary(lt.Chain(layer, lt.Dense(2, 3)), (4, 2))
    printed = [line for line in str(table).splitlines() if not line.startswith("-")]
    page = Page(table._repr_html_())
    assert page.text.split() == " ".join(printed).removeprefix("layer").split()
    assert page.opened == 2


def test_a_function_is_a_model_too():
    ts = training.TrainState(torch.exp, {"x": torch.ones(2)}, {}, optim.Descent(0.1))
    assert "<built-in method exp" in Page(ts._repr_html_()).text


def test_values_are_shown_in_whatever_state_they_are(ts):
    ps = lt.ComponentVector(ts.parameters)
    matrix = lt.ComponentMatrix(torch.ones(2, 2), lt.axes({"a": torch.zeros(2)}))
    pages = []
    for value in (ts, ts.replace(parameters=ps), ps, matrix):
        for change in (lambda leaf: leaf.to("meta"), lambda leaf: leaf * torch.nan):
            pages.append(shown(tree_map(change, value)))
        torch.vmap(lambda _, value=value: pages.append(shown(value)) or torch.ones(()))(torch.ones(2))
    for stack in (lt.stack([ts, ts]), lt.stack([ps, ps])):
        torch.vmap(lambda tree: pages.append(shown(tree)) or torch.ones(()))(stack)
    pages += [shown(tree_map(lambda leaf: None, value)) for value in (ps, matrix)]
    assert len(list(map(Page, pages))) == 4 * 3 + 2 + 2


def test_a_state_that_was_given_away_says_so(ts):
    x = torch.ones(4, 3)
    *_, after = training.single_train_step(lt.MSELoss(), (x, x[:, :2]), ts, donate=True)
    assert "given away" in Page(ts._repr_html_()).text
    assert "step 1" in Page(after._repr_html_()).text


def test_a_page_is_made_without_changing_what_it_shows(ts):
    before = repr(ts), lt.flatten_names(ts.parameters)["layer_1.weight"].clone()
    state = torch.get_rng_state()
    ts._repr_html_()
    assert repr(ts) == before[0] and torch.equal(ts.parameters["layer_1"]["weight"], before[1])
    assert torch.equal(torch.get_rng_state(), state)
