"""The law checker catches those who break a law: each outlaw breaks one."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch import Dense, InputError, Layer, Static
from luxtorch.testing import LawError, check_layer


class Lawful(Layer):
    """The base of the outlaws: one parameter, one state, all laws kept."""

    def initial_parameters(self, key):
        return {"shift": lt.random.normal(key, (3,))}

    def initial_states(self, key):
        return {"calls": torch.zeros((), device=key.device), "training": Static(True)}

    def __call__(self, x, ps, st):
        return self.compute(x, ps["shift"]), {**st, "calls": st["calls"] + 1}

    def compute(self, x, shift):
        return torch.sin(x * shift)


class ReadsGlobalRandomness(Lawful):
    def compute(self, x, shift):
        return x + shift + torch.rand(())


class MutatesItsInput(Lawful):
    def __call__(self, x, ps, st):
        return x.add_(0.0).mul_(2) + ps["shift"], st


class ChangesItsState(Lawful):
    def __call__(self, x, ps, st):
        return x + ps["shift"], {**st, "calls": torch.zeros(2)}


class LeaksGradientIntoItsState(Lawful):
    def __call__(self, x, ps, st):
        return x + ps["shift"], {**st, "calls": st["calls"] + ps["shift"].sum()}


class LosesTheGradient(Lawful):
    def compute(self, x, shift):
        return x * shift.detach() + 0 * shift


class RoundTrip(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class HasNoForwardMode(Lawful):
    def compute(self, x, shift):
        return RoundTrip.apply(x * shift)


class LooksAtTheValues(Lawful):
    def compute(self, x, shift):
        return x * shift if x.sum().item() > -1e9 else x + shift


class ForgetsItsSetup(Lawful):
    count = [0]

    def initial_parameters(self, key):
        self.count[0] += 1
        return {"shift": torch.full((3,), float(self.count[0]), device=key.device)}


OUTLAWS = {
    ReadsGlobalRandomness: "purity",
    MutatesItsInput: "purity",
    ChangesItsState: "state",
    LeaksGradientIntoItsState: "state",
    LosesTheGradient: "gradient",
    HasNoForwardMode: "forward",
    LooksAtTheValues: "vmap_inputs",
    ForgetsItsSetup: "setup",
}
X = torch.tensor([[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]])


def test_the_lawful_passes():
    check_layer(Lawful(), X, X[:1])


@pytest.mark.parametrize("outlaw", OUTLAWS)
def test_each_outlaw_is_caught_by_its_law(outlaw):
    with pytest.raises(LawError, match=f"{outlaw.__name__}.*mode.*: {OUTLAWS[outlaw]}"):
        check_layer(outlaw(), X.clone())


class Holds(Layer):
    """Breaks the law of values: it holds a function that cannot be pickled."""

    function: object

    def __call__(self, x, ps, st):
        return x, st


def test_values_that_cannot_be_pickled_are_caught():
    with pytest.raises(LawError, match="value[\\s\\S]*no lambdas"):
        check_layer(Holds(lambda x: x), X)
    check_layer(Holds(lambda x: x), X, skip=["value"])


def test_laws_are_named_and_chosen():
    with pytest.raises(InputError, match="'purty'[\\s\\S]*Did you mean 'purity'"):
        check_layer(Dense(3, 2), X, laws=["purty"])
    with pytest.raises(InputError, match="must be given an input"):
        check_layer(Dense(3, 2))
    with pytest.raises(LawError, match="Dense.*: purity: InputError"):
        check_layer(Dense(4, 2), X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounding_in_half_precision_is_no_fault(make_key, dtype):
    # vmap computes the lengths of the columns in another order than one call does.
    layer, before = lt.WeightNorm(Dense(4, 4), dim=1), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for _ in range(20):
            check_layer(layer, torch.ones(2, 4), rng=make_key(), laws=["setup"])
    finally:
        torch.set_default_dtype(before)
