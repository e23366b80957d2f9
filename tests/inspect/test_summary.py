"""The table of a model, against counts by hand, by torch and by running it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import luxtorch as lt
from luxtorch import InputError, KeyNameError
from luxtorch.inspect._summary import amount, summary

SIZES = some.integers(1, 9)


@given(SIZES, SIZES, some.lists(SIZES, max_size=3))
def test_flops_of_dense(ins, outs, batch):
    row = summary(lt.Dense(ins, outs, torch.tanh), (*batch, ins)).total
    samples = torch.Size(batch).numel()
    assert row.flops == 2 * samples * ins * outs
    assert row.output == (*batch, outs) and row.parameters == outs * (ins + 1)
    assert row.weight_bytes == 4 * row.parameters and row.output_bytes == 4 * samples * outs


@given(SIZES, some.integers(1, 3), some.integers(1, 3), some.integers(1, 3), some.integers(0, 1), some.integers(1, 2))
def test_flops_of_convolutions(batch, groups, ins, outs, padding, stride):
    layer = lt.Conv((3, 2), ins * groups, outs * groups, padding=padding, stride=stride, groups=groups)
    row = summary(layer, (batch, ins * groups, 7, 6)).total
    height, width = (7 + 2 * padding - 3) // stride + 1, (6 + 2 * padding - 2) // stride + 1
    assert row.output == (batch, outs * groups, height, width)
    assert row.flops == 2 * batch * outs * groups * height * width * ins * 3 * 2


@given(some.integers(1, 4), some.integers(1, 4), some.integers(1, 7), some.integers(1, 7), some.booleans())
def test_flops_of_attention(heads, width, queries, keys, causal):
    size = heads * width
    layer = lt.MultiHeadAttention(size, num_heads=heads, is_causal=causal and queries == keys)
    q, k = (torch.empty(2, number, size, device="meta") for number in (queries, keys))
    row = summary(layer, (q, k, k)).total
    projections = 2 * 2 * size * size * (queries + keys + keys + queries)
    assert row.flops == projections + 2 * (2 * 2 * queries * keys * size)  # scores, and means of values
    assert row.output == (2, queries, size)


@pytest.mark.parametrize(("cell", "gates"), [(lt.RNNCell, 1), (lt.GRUCell, 3), (lt.LSTMCell, 4)])
def test_flops_of_recurrent_layers(cell, gates):
    table = summary(lt.Chain(lt.Recurrence(cell(3, 5))), (2, 7, 3))
    assert table["layer_1"].flops == 7 * 2 * 2 * gates * 5 * (3 + 5)
    stacked = summary(lt.Recurrence(lt.StackedCell(cell(3, 5), cell(5, 4))), (2, 7, 3))
    assert stacked["layer_2"].flops == 7 * 2 * 2 * gates * 4 * (5 + 4)
    assert stacked.total.flops == table.total.flops + stacked["layer_2"].flops


def network():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        nn.ConvTranspose2d(8, 4, 3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


class Own(nn.Module):
    """A forward of its own, of two inputs."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.out = nn.Bilinear(5, 2, 3)

    def forward(self, x, z):
        return self.out(torch.relu(self.net(x)), z), z


def test_against_the_counter_of_torch_on_a_real_run():
    module, x, z = Own(), torch.ones(2, 3, 9, 9), torch.ones(2, 2)
    with FlopCounterMode(display=False) as counter:
        module(x, z)
    layer, ps, st = lt.from_torch(module)
    table = summary(lt.Chain(mine=layer), lt.Inputs(x, z))
    counts = {name.removeprefix("Own."): sum(by.values()) for name, by in counter.get_flop_counts().items()}
    for name in ("net", "net.0", "net.0.0", "net.1", "net.4", "out"):
        row = table[f"mine.{name}"]
        assert row.flops == counts.get(name, 0)
        assert row.parameters == sum(p.numel() for p in module.get_submodule(name).parameters())
    assert table.total.flops == counter.get_total_flops() > 0
    assert table.total.parameters == lt.parameter_length(ps) and table.total.states == lt.state_length(st)
    assert table["mine"].output == ((2, 3), (2, 2))
    assert "net = Sequential" in str(table) and "out = Bilinear" in str(table)


def test_a_native_model_has_the_same_counts():
    with FlopCounterMode(display=False) as counter:
        network()(torch.ones(2, 3, 9, 9))
    layer, ps, _ = lt.from_torch(network())
    table = summary(layer, (2, 3, 9, 9))
    assert table.total.flops == counter.get_total_flops()
    assert list(dict.fromkeys(row.path for row in table.rows)) == ["", "0", "0.0", "0.1", "0.2", "1", "2", "3", "4"]
    assert table.total.parameters == lt.parameter_length(ps)


def test_rows_add_up():
    model = lt.Chain(
        a=lt.Dense(4, 8),
        b=lt.SkipConnection(lt.Chain(lt.LayerNorm(8), lt.FlattenLayer(), lt.Dense(8, 8)), torch.add),
        c=lt.RepeatedLayer(lt.Dense(8, 8), 3),
        d=lt.Ensemble(lt.Dense(8, 2), 5),
    )
    table = summary(model, (6, 4))
    parts = [table[name] for name in "abcd"]
    for what in ("parameters", "states", "flops", "weight_bytes", "output_bytes"):
        assert getattr(table.total, what) == sum(getattr(row, what) for row in parts)
    assert [row.flops for row in parts] == [2 * 6 * 4 * 8, 2 * 6 * 64, 3 * 2 * 6 * 64, 5 * 2 * 6 * 8 * 2]
    assert [row.output_bytes for row in parts] == [4 * 6 * 8, 2 * 4 * 6 * 8, 3 * 4 * 6 * 8, 4 * 5 * 6 * 2]
    assert table["b.layer_2"].output_bytes == 0  # a view
    assert [row.calls for row in table.rows if row.path == "c"] == [1, 3] and "Dense(8 -> 8) x3" in str(table)
    assert table["d"].parameters == 5 * (8 * 2 + 2) and table["d"].output == (5, 6, 2)
    assert table.input_bytes == 4 * 6 * 4


def test_what_is_not_called_has_no_output():
    class Half(lt.ContainerLayer):
        used: lt.Dense
        unused: lt.Dense

        def __call__(self, x, ps, st):
            y, used = self.used(x, ps["used"], st["used"])
            return y, {**st, "used": used}

    table = summary(Half(lt.Dense(2, 3), lt.Dense(2, 4)), (5, 2))
    assert (table["unused"].output, table["unused"].calls, table["unused"].flops) == (None, 0, 0)
    assert table["unused"].parameters == 12 and table.total.parameters == 21
    assert [line.split()[-2:] for line in str(table).splitlines() if "unused" in line] == [["48", "B"]]


def test_nothing_of_the_models_size_is_allocated():
    model = lt.Chain(*[lt.TransformerEncoderLayer(4096, 32, 16384)] * 48, lt.Dense(4096, 50_000))
    table = summary(model, (1, 128, 4096))
    assert table.total.parameters == lt.parameter_length(model) > 9e9
    assert table.total.weight_bytes > 39e9 and "9_871_082_320 parameters" in str(table)
    matrices = 48 * (4 * 4096**2 + 2 * 4096 * 16384) + 4096 * 50_000
    assert table.total.flops == 2 * 128 * matrices + 48 * 2 * 2 * 128 * 128 * 4096


def test_how_deep_it_is_shown():
    model = lt.Chain(lt.Chain(lt.Dense(2, 2), lt.Chain(torch.tanh)))
    lines = [len(str(summary(model, (1, 2), depth=depth)).splitlines()) for depth in (0, 1, 2, 3, None)]
    assert lines == [6, 7, 9, 10, 10]
    assert len(summary(model, (1, 2), depth=0).rows) == 5


def test_it_is_shown_in_notebooks():
    table = summary(lt.Chain(lt.Dense(2, 3), name_of_a_class_with_signs), (4, 2))
    html = table._repr_html_()
    assert html.count("<details") == 1 and "output shape" in html
    assert "Dense(2 -&gt; 3)" in html and "total: 9 parameters" in html
    assert repr(table) == str(table)


def name_of_a_class_with_signs(x):
    return x


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234567, "1.23 MB"), (999_999, "1 MB")]
)
def test_amounts(number, text):
    assert amount(number, "B") == text


def test_wrong_arguments():
    with pytest.raises(InputError, match="from_torch"):
        summary(nn.Linear(2, 2), (1, 2))
    with pytest.raises(InputError, match="depth"):
        summary(lt.Dense(2, 2), (1, 2), depth=-1)
    with pytest.raises(InputError, match=r"model\.layer_2 \(Dense 3 -> 1\)"):
        summary(lt.Chain(lt.Dense(2, 2), lt.Dense(3, 1)), (1, 2))
    with pytest.raises(KeyNameError, match="Did you mean 'layer_1'"):
        summary(lt.Chain(lt.Dense(2, 2)), (1, 2))["layer1"]
