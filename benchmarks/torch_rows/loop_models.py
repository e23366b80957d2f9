"""The models with a loop inside, as modules of torch.nn and as layers of luxtorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import luxtorch as lt

from ..problems import ODE_STEPS

Step = Callable[[Tensor, Any], tuple[Tensor, Tensor]]


class Looping(nn.Module):
    """Loop in Python, or by torch's scan, which exists under torch.compile alone."""

    scans = False

    def over(self, step: Step, carry: Tensor, xs: Any) -> tuple[Tensor, Tensor]:
        """Return the last carry and all outputs of a step over tensors along their first dimension."""
        if self.scans:
            from torch._higher_order_ops.scan import scan

            found: tuple[Tensor, Tensor] = scan(step, carry, xs)
            return found
        ys = []
        for x in zip(*xs, strict=True) if isinstance(xs, tuple) else xs:
            carry, y = step(carry, x)
            ys.append(y)
        return carry, torch.stack(ys)


def gated(h: Tensor, projected: Tensor, recurrent: Tensor) -> Tensor:
    """Return the next hidden state of a GRU."""
    reset, update, new = projected.chunk(3, -1)
    reset_h, update_h, new_h = recurrent.chunk(3, -1)
    new = torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h)
    update = torch.sigmoid(update + update_h)
    return new + update * (h - new)


class GRU(Looping):
    """Return the mean of all hidden states of sequences (time, batch, features)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.input, self.hidden = nn.Linear(inputs, 3 * hidden), nn.Linear(hidden, 3 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, hidden)."""

        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            h = gated(h, self.input(x), self.hidden(h))
            return h, h.clone()  # torch's scan refuses outputs that share their memory

        return self.over(step, x.new_zeros(x.shape[1], self.hidden.in_features), x)[1].mean(0)


class LuxGRU(lt.ContainerLayer):
    """The same for luxtorch."""

    input: lt.Dense
    hidden: lt.Dense

    def __call__(self, x: Tensor, ps: Any, st: Any) -> tuple[Tensor, Any]:
        """Return (batch, hidden)."""

        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            projected, _ = self.input(x, ps["input"], st["input"])
            recurrent, _ = self.hidden(h, ps["hidden"], st["hidden"])
            h = gated(h, projected, recurrent)
            return h, h

        return lt.scan(step, x.new_zeros(x.shape[1], self.hidden.in_features), x)[1].mean(0), st


def rk4(slope: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """Return where a point is after one step of the classic method, of `ODE_STEPS` in the unit of time."""
    dt = 1 / ODE_STEPS
    k1 = slope(y)
    k2 = slope(y + dt / 2 * k1)
    k3 = slope(y + dt / 2 * k2)
    k4 = slope(y + dt * k3)
    return y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


class Solved(Looping):
    """Follow where a module says that points move."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, y: Tensor) -> Tensor:
        """Return the points after a unit of time."""

        def step(y: Tensor, _: Any) -> tuple[Tensor, Tensor]:
            return rk4(self.field, y), y.new_zeros(())

        return self.over(step, y, y.new_zeros(ODE_STEPS))[0]


class LuxSolved(lt.WrapperLayer):
    """The same for luxtorch."""

    field: lt.Layer

    def __call__(self, y: Tensor, ps: Any, st: Any) -> tuple[Tensor, Any]:
        """Return the points after a unit of time."""

        def step(y: Tensor, _: None) -> tuple[Tensor, None]:
            return rk4(lambda y: self.field(y, ps, st)[0], y), None

        return lt.scan(step, y, length=ODE_STEPS)[0], st


class Equal(Looping):
    """Chain equal layers, each with a connection around it."""

    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        """Return what has the shape of the input."""
        if not self.scans:
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return x

        def step(x: Tensor, ps: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return x + torch.tanh(nn.functional.linear(x, *ps)), x.new_zeros(())

        stacked = (torch.stack([getattr(layer, name) for layer in self.layers]) for name in ("weight", "bias"))
        return self.over(step, x, tuple(stacked))[0]


def lux_equal(width: int, number: int) -> lt.Layer:
    """Return the same for luxtorch."""
    return lt.ScannedChain(lt.SkipConnection(lt.Dense(width, width, "tanh"), torch.add), number)
