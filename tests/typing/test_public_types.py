"""The types that a user's checker and editor see: `make types` checks them by mypy and pyright, the tests run them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import assert_type

import luxtorch as lt
from luxtorch import optim, training
from luxtorch.core import Parameters, States
from luxtorch.jit import Jitted


def test_layers_and_setup() -> None:
    model = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.Dense(4, 2))
    ps, st = lt.setup(0, model)
    assert_type(model, lt.Chain)
    assert_type(ps, dict[str, Any])
    assert_type(st, dict[str, Any])
    y, new = model(torch.ones(5, 3), ps, st)
    assert_type(new, States)
    assert y.shape == (5, 2)
    y, new = lt.Dense(3, 4)(torch.ones(5, 3), *lt.setup(0, lt.Dense(3, 4)))
    assert_type(y, Tensor)
    assert_type(lt.test_mode(st), dict[str, Any])
    assert_type(lt.train_mode(st), dict[str, Any])
    assert_type(lt.parameter_length(model), int)


def test_jit_keeps_the_signature() -> None:
    def scaled(x: Tensor, factor: float = 2.0, *, shift: int = 0) -> tuple[Tensor, int]:
        return x * factor + shift, 1

    fast = lt.jit(scaled, backend="replay")
    assert_type(fast(torch.ones(2), 3.0, shift=1), tuple[Tensor, int])

    @lt.jit(backend="replay")
    def halved(x: Tensor) -> Tensor:
        return x / 2

    same: Jitted[[Tensor], Tensor] = halved
    assert same is halved
    assert_type(halved(torch.ones(2)), Tensor)


def mistakes_that_a_checker_finds() -> None:
    """Is read by the checkers alone: an error that one of them no longer finds is an unused comment."""

    @lt.jit(backend="replay")
    def halved(x: Tensor) -> Tensor:
        return x / 2

    halved("half")  # type: ignore[arg-type]
    halved(torch.ones(2), torch.ones(2))  # type: ignore[call-arg]
    lt.Dense(2, "three")  # type: ignore[arg-type]
    lt.Dense(2, 3, use_bias=True)  # type: ignore[call-arg]
    lt.Dense(2, 3)(torch.ones(2))  # type: ignore[call-arg]
    optim.Adam(learning_rate=0.1)  # type: ignore[call-arg]
    lt.random.normal(0)  # type: ignore[arg-type]


def test_component_vectors() -> None:
    ps, _ = lt.setup(0, lt.Chain(lt.Dense(2, 3), lt.Dense(3, 1)))
    vector = lt.ComponentVector(ps)
    assert_type(vector, lt.ComponentVector)
    assert_type(vector.flat, Tensor)
    assert_type(vector + vector, lt.ComponentVector)
    assert_type(vector * 2.0, lt.ComponentVector)
    # What stands below a name is known when the program runs: by attribute and by index it is the same.
    assert_type(vector.layer_1, Any)
    weight: Tensor = vector.layer_1.weight
    assert weight.shape == (3, 2)


def test_optimizers_and_training() -> None:
    model = lt.Dense(2, 1)
    ps, st = lt.setup(0, model)
    opt_state = optim.setup(optim.Adam(0.1), ps)
    assert_type(opt_state, optim.OptState)
    assert_type(optim.update(opt_state, ps, ps)[0], optim.OptState)
    ts = training.TrainState(model, ps, st, optim.Adam(0.1))
    assert_type(ts, training.TrainState)
    data = torch.ones(4, 2), torch.ones(4, 1)
    _, loss, _, after = training.single_train_step(lt.MSELoss(), data, ts)
    assert_type(loss, Tensor)
    assert_type(after, training.TrainState)
    assert_type(lt.MSELoss()(data[1], data[1]), Tensor)


def test_random_keys() -> None:
    key = lt.random.key(0)
    assert_type(key, Tensor)
    assert_type(lt.random.normal(key, (2, 3)), Tensor)
    assert_type(lt.random.split(key), Tensor)


def test_a_layer_of_ones_own() -> None:
    class Doubled(lt.Layer):
        def __call__(self, x: Tensor, ps: Parameters, st: States) -> tuple[Tensor, States]:
            return 2 * x, st

    y, _ = Doubled()(torch.ones(2), {}, {})
    assert_type(y, Tensor)
