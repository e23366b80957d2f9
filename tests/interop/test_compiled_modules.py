"""Modules that torch.compile has wrapped, at the root or inside, are converted as if it had not."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn
from torch.func import grad, jvp, vmap

import luxtorch as lt
from luxtorch.core import flatten_names, tree_leaves, tree_map


class Block(nn.Module):
    """Have a statistic, and tensors in a module inside."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return x + self.norm(self.dense(x)).tanh()


class Net(nn.Module):
    """Hold blocks of which some are wrapped, one of them in two places."""

    def __init__(self, wrap):
        super().__init__()
        self.block = wrap(Block())
        self.plain = Block()
        self.again = wrap(self.plain)
        self.blocks = nn.Sequential(wrap(Block()), wrap(nn.Linear(3, 3)))
        self.nothing = None

    def forward(self, x):
        return self.blocks(self.again(self.plain(self.block(x))))


class Forward(Block):
    """Have its own forward compiled."""

    def __init__(self, wrap):
        super().__init__()
        self.forward = wrap(self.forward)


def in_place(wrap):
    module = Block()
    if wrap is not itself:
        module.compile(backend="eager")
    return module


def itself(module):
    return module


def wrapped(module):
    return torch.compile(module, backend="eager")


MAKE = {
    "root": lambda wrap: wrap(Block()),
    "of torch": lambda wrap: wrap(nn.Linear(3, 3)),
    "sequential": lambda wrap: wrap(nn.Sequential(nn.Linear(3, 3), nn.Tanh())),
    "children": Net,
    "everything": lambda wrap: wrap(Net(wrap)),
    "in a sequential": lambda wrap: nn.Sequential(wrap(Block()), nn.Linear(3, 3)),
    "in a list": lambda wrap: nn.Sequential(nn.Sequential(nn.Sequential(wrap(nn.Linear(3, 3))))),
    "forward": Forward,
    "in place": in_place,
    "parametrized": lambda wrap: wrap(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's compiler asks for it
@pytest.mark.parametrize(("make", "called"), list(product(MAKE, (False, True))))
def test_the_original_is_converted(rng, make, called):
    before = torch.get_rng_state()
    plain = MAKE[make](itself)
    torch.set_rng_state(before)
    module = MAKE[make](wrapped)
    x = torch.randn(4, 3, generator=rng)
    if called:
        module(x)
        plain(x)
    kinds, shown = [type(part) for part in module.modules()], list(module.state_dict())
    layer, ps, st = lt.from_torch(module)
    wanted_layer, wanted_ps, wanted_st = lt.from_torch(plain)
    assert [type(part) for part in module.modules()] == kinds and list(module.state_dict()) == shown
    assert list(flatten_names(ps)) == list(flatten_names(wanted_ps))
    torch.testing.assert_close((ps, flatten_names(st)), (wanted_ps, flatten_names(wanted_st)))
    y, new = layer(x, ps, st)
    torch.testing.assert_close((y, flatten_names(new)), _tensors(wanted_layer(x, wanted_ps, wanted_st)))

    def loss(ps, x):
        return layer(x, ps, st)[0].square().sum()

    def wanted(ps):
        return wanted_layer(x, ps, wanted_st)[0].square().sum()

    torch.testing.assert_close(grad(loss)(ps, x), grad(wanted)(wanted_ps))
    assert tree_leaves(grad(loss)(ps, x))[0].any()  # it sees the parameters that it is given
    torch.testing.assert_close(jvp(lambda ps: loss(ps, x), (ps,), (ps,)), jvp(wanted, (ps,), (ps,)))
    models = tree_map(lambda leaf: torch.stack([leaf, leaf]), ps)
    torch.testing.assert_close(vmap(loss, (0, None))(models, x)[1], wanted(ps))
    jitted = lt.jit(lambda ps, x: grad(loss)(ps, x), backend="replay")
    torch.testing.assert_close(jitted(ps, x), grad(loss)(ps, x))


def _tensors(result):
    return result[0], flatten_names(result[1])


def test_two_conversions_are_equal():
    net = Block()
    assert lt.from_torch(wrapped(net)).layer == lt.from_torch(net).layer


def test_hooks_of_the_wrapper_are_refused():
    module = wrapped(Block())
    module.register_forward_hook(lambda module, args, y: y)
    with pytest.raises(lt.InputError, match="Hooks must belong to the module"):
        lt.from_torch(nn.Sequential(module))
    with pytest.raises(lt.DTypeError, match="module must be a torch.nn.Module"):
        lt.from_torch(torch.compile(lambda x: x, backend="eager"))


@pytest.mark.slow
def test_the_converted_module_is_compiled(rng):
    layer, ps, st = lt.from_torch(Net(wrapped))
    x = torch.randn(4, 3, generator=rng)
    step = grad(lambda ps, x: layer(x, ps, st)[0].square().sum())
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(ps, x), step(ps, x))
