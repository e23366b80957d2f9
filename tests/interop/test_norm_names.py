"""A model written by hand takes the state_dict of a module of the same names: every normalization, every option."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

import luxtorch as lt

SHAPES = {"1d": [(6, 4, 3), (6, 4), (0, 4, 3)], "2d": [(3, 4, 2, 3)], "3d": [(2, 4, 2, 1, 3)]}
OTHERS = {
    "LocalResponseNorm": "it has no parameters and no statistics",
    **{f"Lazy{kind}Norm{dims}": f"it becomes {kind}Norm{dims}" for kind in ("Batch", "Instance") for dims in SHAPES},
}
"""Why some normalizations of torch.nn are not here."""


def options(**values):
    """Return every choice of some options."""
    return [dict(zip(values, choice, strict=True)) for choice in product(*values.values())]


def cases():
    both, affine = [True, False], {"affine": [True, False], "bias": [True, False]}
    for dims, shapes in SHAPES.items():
        for chosen in options(**affine, track_running_stats=both, momentum=[0.1, 0.5, None]):
            kind = f"BatchNorm{dims}"
            yield kind, getattr(nn, kind)(4, **chosen), lt.BatchNorm(4, **chosen), shapes
        for chosen in options(**affine, track_running_stats=both, momentum=[0.1, 0.5]):
            kind = f"InstanceNorm{dims}"
            yield kind, getattr(nn, kind)(4, **chosen), lt.InstanceNorm(4, **chosen), shapes[:1]
    for chosen in options(affine=both, track_running_stats=both):
        yield "SyncBatchNorm", nn.SyncBatchNorm(4, **chosen), lt.BatchNorm(4, **chosen), SHAPES["1d"][:2]
    for chosen in options(**affine, eps=[1e-5, 0.1]):
        yield "GroupNorm", nn.GroupNorm(2, 4, **chosen), lt.GroupNorm(4, 2, **chosen), [(6, 4, 3), (3, 4)]
    for shape, has, bias in product([(4,), (3, 4)], both, both):
        module, layer = (
            nn.LayerNorm(shape, elementwise_affine=has, bias=bias),
            lt.LayerNorm(shape, affine=has, bias=bias),
        )
        yield "LayerNorm", module, layer, [(6, 3, 4), (0, 3, 4)]
    for shape, has in product([(4,), (3, 4)], both):
        yield "RMSNorm", nn.RMSNorm(shape, elementwise_affine=has), lt.RMSNorm(shape, affine=has), [(6, 3, 4)]


CASES = list(cases())


def test_every_normalization_of_torch_is_here():
    assert {name for name in dir(nn) if name.endswith(("Norm", "1d", "2d", "3d")) and "Norm" in name} == {
        *OTHERS,
        *(kind for kind, *_ in CASES),
    }


def changed(module, key):
    """Return a module with other numbers than those that it starts with."""
    with torch.no_grad():
        for i, value in enumerate(module.state_dict().values()):
            draw = lt.random.uniform(lt.random.fold_in(key, i), value.shape, low=0.5, high=2.0)
            value.copy_(draw if value.is_floating_point() else torch.tensor(3))
    return module


def tensors(ps, st):
    return {**lt.flatten_names(ps), **lt.flatten_names(st)}


def assert_loads(layer, module, inputs):
    """Assert that a layer has the names of a module, and with its state_dict computes the same, and keeps the same."""
    ps, st = lt.setup(0, layer)
    assert [*lt.flatten_names(ps)] == [name for name, _ in module.named_parameters()]
    assert tensors(ps, st).keys() == module.state_dict().keys()
    ps, st, report = lt.load_weights(module.state_dict(), ps, st)
    assert report.complete and not report.cast
    for training, mode in ((True, lt.train_mode), (False, lt.test_mode)):
        module.train(training)
        st = mode(st)
        for x in inputs:
            y, st = layer(x, ps, st)
            torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(tensors(ps, st), dict(module.state_dict()))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning")
@pytest.mark.parametrize(
    "module, layer, shapes", [pytest.param(*case, id=f"{i}-{kind}") for i, (kind, *case) in enumerate(CASES)]
)
def test_a_normalization_takes_the_state_dict_of_torch(make_key, module, layer, shapes):
    inputs = [lt.random.normal(make_key(), shape, mean=1.0, std=2.0) for shape in shapes]
    assert_loads(layer, changed(module, make_key()), inputs)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return x + self.fc(self.norm(x))


class Net(nn.Module):
    """A module as people write them; `WRITTEN` is the same in luxtorch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.last = nn.RMSNorm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.instance(self.group(self.bn(self.conv(x)).relu()))
        return self.head(self.last(self.blocks(x.flatten(1))))


def block(width):
    return lt.SkipConnection(lt.Chain(norm=lt.LayerNorm(width), fc=lt.Dense(width, width)), torch.add)


WRITTEN = lt.Chain(
    conv=lt.Conv((3, 3), 2, 4, bias=False),
    bn=lt.BatchNorm(4, "relu"),
    group=lt.GroupNorm(4, 2),
    instance=lt.InstanceNorm(4, affine=True, track_running_stats=True),
    flatten=lt.FlattenLayer(),
    blocks=lt.Chain(**{"0": block(16), "1": block(16)}),
    last=lt.RMSNorm(16),
    head=lt.Dense(16, 3),
)


def test_a_model_written_by_hand_takes_the_state_dict_of_a_module(make_key):
    assert_loads(WRITTEN, changed(Net(), make_key()), [lt.random.normal(make_key(), (5, 2, 4, 4)) for _ in range(3)])


def test_a_module_takes_the_names_of_a_model_written_by_hand(make_key):
    ps, st = lt.setup(make_key(), WRITTEN)
    module = Net()
    module.load_state_dict(tensors(ps, st))
    x = lt.random.normal(make_key(), (5, 2, 4, 4))
    torch.testing.assert_close(module(x), WRITTEN(x, ps, st)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False], ids=["dicts", "vector"])
def test_weights_with_the_former_name_are_loaded(make_key, whole):
    source = changed(Net(), make_key()).state_dict()
    norms = ("bn", "group", "instance", "norm", "last")
    former = {
        name.removesuffix("weight") + "scale"
        if name.split(".")[-2] in norms and name.endswith("weight")
        else name: value
        for name, value in source.items()
        if not name.endswith("tracked")
    }
    assert "bn.scale" in former and "blocks.1.norm.scale" in former and "conv.weight" in former
    ps, st = lt.setup(0, WRITTEN)
    ps = ps if whole else lt.ComponentVector(ps)
    new_ps, new_st, report = lt.load_weights({f"net.{name}": value for name, value in former.items()}, ps, st,
                                             rename=[(r"^net\.", "")])  # fmt: skip
    assert report.complete
    counts = {name: value * 0 for name, value in source.items() if name.endswith("tracked")}
    torch.testing.assert_close(tensors(new_ps, new_st), source | counts, rtol=0, atol=0)


def test_a_former_name_is_no_other_name():
    own = lt.compact(lambda m, x: x * m.scale, scale=torch.ones(3))
    ps, st = lt.setup(0, own)
    assert lt.load_weights({"scale": torch.zeros(3)}, ps, st).ps["scale"].sum() == 0
    with pytest.raises(lt.KeyNameError, match="'weight' is only in the file"):
        lt.load_weights({"weight": torch.zeros(3)}, ps, st)
    ps, st = lt.setup(0, lt.LayerNorm(3))
    bias = torch.zeros(3)
    with pytest.raises(lt.KeyNameError, match="'scale' is only in the file"):
        lt.load_weights({"weight": torch.ones(3), "scale": torch.ones(3), "bias": bias}, ps, st)
    with pytest.raises(lt.InputError, match="'weight' does not fit"):
        lt.load_weights({"scale": torch.ones(2), "bias": bias}, ps, st)
    ps, st = lt.setup(0, lt.BatchNorm(3))
    with pytest.raises(lt.KeyNameError, match="(?s)'running_mean' is not.*'num_batches_tracked' is not"):
        lt.load_weights({"weight": torch.ones(3), "bias": bias, "running_var": bias}, ps, st)
