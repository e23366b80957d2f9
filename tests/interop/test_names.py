"""Which parameters are trainable, the names of the state_dict, new values, and methods besides forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad

import luxtorch as lt
from luxtorch.core import InputError, flatten_names
from luxtorch.interop import from_torch

from .test_drop_in import Base


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.body = nn.Linear(3, 3)
        self.again = self.body
        self.norm = nn.BatchNorm1d(3)
        self.body.bias.requires_grad_(False)
        self.order = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False)
        self.register_buffer("frequencies", torch.ones(3), persistent=False)
        self.register_buffer("offset", torch.ones(3))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.norm(self.again(self.body(self.embed(x)))[:, self.order] * self.frequencies + self.offset)
        return self.head(self.drop(y))


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: nn.Sequential(nn.Identity(), module)])
def test_names_go_out_and_come_back(rng, wrap):
    module, other = wrap(Mixed()), wrap(Mixed())
    layer, ps, st = from_torch(module)
    trainable = {name for name, value in module.named_parameters() if value.requires_grad}
    assert set(flatten_names(ps)) == trainable
    back = lt.to_torch(layer, ps, st)
    assert back.state_dict().keys() == module.state_dict().keys()
    other.load_state_dict(back.state_dict(), strict=True)
    torch.testing.assert_close(other.state_dict(), module.state_dict(), rtol=0, atol=0)
    assert {name for name, value in back.named_parameters() if value.requires_grad} == trainable
    other = wrap(Mixed())
    loaded = lt.load_weights(other.state_dict(), ps, st)
    x = torch.tensor([1, 2, 4])
    eval_st = lt.test_mode(loaded.st)
    torch.testing.assert_close(layer(x, loaded.ps, eval_st)[0], other.eval()(x).detach())
    again = from_torch(back)
    torch.testing.assert_close(flatten_names(again.ps), flatten_names(ps), rtol=0, atol=0)


def test_a_buffer_that_is_an_attribute_further_up_keeps_its_own_name(rng):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("degrees", torch.ones(3))
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            self.degrees.add_(1)
            return x * self.weight * self.degrees

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()
            self.degrees = self.inner.degrees

        def forward(self, x):
            return self.inner(x) + self.degrees

    module, x = Outer(), torch.randn(3, generator=rng)
    layer, ps, st = from_torch(module)
    back = lt.to_torch(layer, ps, st)
    assert list(back.state_dict()) == list(module.state_dict())
    loaded = lt.load_weights(module.state_dict(), ps, st)
    assert torch.equal(loaded.st["inner"]["degrees"], torch.ones(3))
    for _ in range(2):
        y, st = layer(x, ps, st)
        torch.testing.assert_close(y, module(x).detach())
        assert torch.equal(st["inner"]["degrees"], module.inner.degrees)


def test_frozen_parameters_stay_where_they_are(rng):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    net[0].requires_grad_(False)
    layer, ps, st = from_torch(net)
    ts = lt.training.TrainState(layer, ps, st, lt.optim.Adam(0.1))
    ts = lt.training.single_train_step(lt.MSELoss(), (torch.ones(6, 4), torch.ones(6, 1)), ts)[3]
    back = lt.to_torch(layer, ts.parameters, ts.states)
    assert torch.equal(back.get_parameter("0.weight"), net[0].weight)
    assert not torch.equal(back.get_parameter("1.weight"), net[1].weight)
    assert [value.requires_grad for value in back.parameters()] == [False, False, True, True]
    plain, all_ps, _ = lt.unfreeze(layer, ts.parameters, ts.states)
    assert list(flatten_names(all_ps)) == [name for name, _ in net.named_parameters()]
    assert isinstance(plain, lt.Chain)


# Modules made on the meta device, and what no key decides.


def test_modules_on_the_meta_device():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 3), Mixed().norm, nn.LSTMCell(3, 2))
        mixed = Base()
    layer, _, _ = from_torch(net)
    ps, st = lt.setup(0, layer)
    assert not any(
        leaf.is_meta for leaf in [*flatten_names(ps).values(), *flatten_names(st).values()] if isinstance(leaf, Tensor)
    )
    assert ps["0"]["weight"].std() > 0
    layer, ps, st = from_torch(mixed)
    with pytest.raises(InputError, match="'weight', 'scale'"):
        lt.setup(0, layer)
    loaded = lt.load_weights(Base().state_dict(), ps, st)
    assert layer(torch.ones(2, 3, dtype=torch.float64), loaded.ps, loaded.st)[0].shape == (2, 3)


def test_setup_says_what_it_cannot_make(rng):
    one, two = from_torch(Base()), from_torch(Base())
    assert one.layer != two.layer  # their buffers differ
    two.layer.skeleton.kept.update(
        {place: value for place, value in one.layer.skeleton.kept.items() if place[1] == "scale"}
    )
    assert one.layer == two.layer
    with pytest.warns(UserWarning, match="'weight'"):
        ps, _ = lt.setup(1, one.layer)
    assert torch.equal(ps["weight"], one.ps["weight"]) and not torch.equal(
        ps["linear"]["weight"], one.ps["linear"]["weight"]
    )
    with pytest.raises(InputError, match="outside of lt.jit"):
        lt.jit(lambda key: lt.initial_parameters(key, one.layer), backend="replay")(lt.random.key(0))


# Methods besides forward.


class Coder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.drop = nn.Linear(4, 2), nn.Linear(2, 4), nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(2)

    def encode(self, x, scale=1.0):
        return self.norm(self.drop(self.encoder(x))) * scale

    def forward(self, x):
        return self.decoder(self.encode(x))


def test_other_methods_than_forward(rng):
    module = Coder()
    x = torch.randn(5, 4, generator=rng)
    encode, ps, st = from_torch(module, method="encode")
    whole = from_torch(module)
    y, new = encode(lt.Inputs(x, scale=2.0), ps, st)
    bound = whole.layer.bind(ps, st)
    assert torch.equal(bound.encode(x, scale=2.0), y)
    torch.testing.assert_close(
        {name: leaf for name, leaf in flatten_names(bound.st).items() if isinstance(leaf, Tensor)},
        {name: leaf for name, leaf in flatten_names(new).items() if isinstance(leaf, Tensor)},
    )
    with whole.layer.bind(ps, st) as net:
        assert torch.equal(net.encode(x, 2.0), y)
    slope = grad(lambda ps: whole.layer.bind(ps, st).encode(x).sum())(ps)
    torch.testing.assert_close(slope, grad(lambda ps: encode(x, ps, st)[0].sum())(ps))
    frozen = lt.freeze(whole.layer, ps, st, "encoder")
    assert torch.equal(frozen[0].bind(*frozen[1:]).encode(x, 2.0), y)
    with pytest.raises(InputError, match="'encode'"):
        from_torch(module, method="encod")
