"""What the cells of torch share: two weights, two biases, and a carry that starts as zeros, drawn or learned."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from luxtorch.core import InputError, Parameters, States, show_value
from luxtorch.init import Initializer, glorot_uniform, zeros
from luxtorch.random import fold_in, split

from ._cell import Cell, first_of
from ._fused_rnn import Carry, Kernel, scanned
from ._lengths import at_ends, before, where_before
from ._rnn_steps import project

GateInitializer: TypeAlias = Initializer | tuple[Initializer, ...]
"""An initializer for each gate by itself, or a tuple with one for each."""


class WeightedCell(Cell):
    """Hold what the cells share; a subclass says in `advance` how a carry becomes the next one."""

    gates: ClassVar[int]
    """How many blocks of `hidden_size` rows the weights have."""

    in_features: int
    hidden_size: int
    _: KW_ONLY
    bias: bool = True
    train_state: bool = False
    init_weight: GateInitializer = glorot_uniform
    init_recurrent_weight: GateInitializer | None = None
    init_bias: GateInitializer = zeros
    init_state: Initializer = zeros

    def __post_init__(self) -> None:
        for name in ("in_features", "hidden_size"):
            size = getattr(self, name)
            if not (isinstance(size, int) and size >= 1):
                raise InputError(
                    f"{type(self).__name__} takes sizes.", expected="a whole number of at least 1", got=f"{name}={size}"
                )
        if self.init_recurrent_weight is None:
            self._set(init_recurrent_weight=self.init_weight)
        for name in ("init_weight", "init_recurrent_weight", "init_bias"):
            init = getattr(self, name)
            if isinstance(init, list | tuple):
                if len(init) != self.gates:
                    raise InputError(
                        f"{type(self).__name__} has {self.gates} gates.",
                        expected=f"{name}, one initializer or a tuple of {self.gates}",
                        got=f"a tuple of {len(init)}",
                    )
                self._set(**{name: tuple(init)})

    @property
    @abstractmethod
    def kernel(self) -> Kernel | None:
        """The function of torch for a whole sequence, if there is one for this cell."""

    def project(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Return all that a step adds up before it looks at the carry, for one step or for many at once."""
        return project(x, weights)

    @abstractmethod
    def advance(self, projected: Tensor, carry: Carry, weights: Sequence[Tensor]) -> Carry:
        """Return the next carry, from what `project` returns and from the carry."""

    def _starts(self) -> dict[str, tuple[Initializer, bool]]:
        """Return for each tensor of the carry its initializer, and whether it is learned."""
        return {"hidden_state": (self.init_state, self.train_state)}

    def _drawn(self) -> bool:
        return any(init != zeros and not learned for init, learned in self._starts().values())

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return the weights, the biases if there are any, and the learned part of the carry."""
        size = self.hidden_size
        recurrent = self.init_recurrent_weight or self.init_weight
        ps = {
            "weight_ih": self._by_gate(key, "weight_ih", self.init_weight, (size, self.in_features)),
            "weight_hh": self._by_gate(key, "weight_hh", recurrent, (size, size)),
        }
        if self.bias:
            ps |= {name: self._by_gate(key, name, self.init_bias, (size,)) for name in ("bias_ih", "bias_hh")}
        starts = self._starts().items()
        return ps | {name: init(fold_in(key, name), (size,)) for name, (init, learned) in starts if learned}

    def _by_gate(self, key: Tensor, name: str, init: GateInitializer, shape: tuple[int, ...]) -> Tensor:
        inits = init if isinstance(init, tuple) else (init,) * self.gates
        keys = split(fold_in(key, name), self.gates)
        return torch.cat([draw(keys[i], shape) for i, draw in enumerate(inits)])

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the key of the first carry, if one is drawn."""
        return {"rng": key.clone()} if self._drawn() else {}

    def initial_carry(self, x: Tensor, ps: Parameters, st: States) -> tuple[tuple[Tensor, ...], States]:
        """Return zeros, numbers drawn for each sequence, or the learned ones, the same for all."""
        key, new = None, st
        if self._drawn():
            key, rng = split(st["rng"])
            new = {"rng": rng}
        shape = (*x.shape[:-1], self.hidden_size)
        carry = []
        for name, (init, learned) in self._starts().items():
            if learned:
                carry.append(ps[name].expand(shape))
            elif key is None or init == zeros:
                carry.append(ps["weight_hh"].new_zeros(shape))
            else:
                carry.append(init(fold_in(key, name), shape).to(ps["weight_hh"].dtype))
        return tuple(carry), new

    def step(self, x: Tensor, carry: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return the next hidden state as output, the next carry, and `st`."""
        carry, weights = self._fitted(x, carry, x.shape[:-1]), self._weights(ps)
        carry = self.advance(self.project(x, weights), carry, weights)
        return (carry[0], carry), st

    def scan(self, xs: Tensor, carry: Any, ps: Parameters, st: States) -> tuple[tuple[Any, Any], States]:
        """Return the hidden states of all steps, the last carry, and the new state."""
        if carry is None:
            carry, st = self.initial_carry(first_of(xs), ps, st)
        return scanned(self, xs, self._fitted(xs, carry, xs.shape[1:-1]), self._weights(ps)), st

    def scan_lengths(
        self, xs: Tensor, lengths: Tensor, carry: Any, ps: Parameters, st: States
    ) -> tuple[tuple[Any, Any], States]:
        """Return the hidden states, zeros after the ends; the carries at the ends; and the new state.

        All sequences run to the last step, so that a kernel can do it.
        """
        if carry is None:
            carry, st = self.initial_carry(first_of(xs), ps, st)
        carry = self._fitted(xs, carry, xs.shape[1:-1])
        xs, weights = self.closed(xs, before(lengths, xs.shape[0]), self._weights(ps))
        ys, last = scanned(self, xs, carry, weights)
        return (where_before(lengths, ys), (at_ends(lengths, ys, carry[0]), *last[1:])), st

    def closed(self, xs: Tensor, running: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Return inputs and weights by which what is carried beside the hidden state stays as it is after the ends.

        Args:
            xs: The inputs, (time, ..., features).
            running: Which of the steps come before the ends, (time, ...).
            weights: The weights.
        """
        return xs, weights

    def _weights(self, ps: Parameters) -> list[Tensor]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if self.bias else ("weight_ih", "weight_hh")
        return [ps[name] for name in names]

    def _fitted(self, x: Tensor, carry: Any, batch: torch.Size) -> Carry:
        """Return the carry for a batch; raise if it or the input is of another width."""
        if x.shape[-1:] != (self.in_features,):
            raise InputError(
                f"{type(self).__name__} takes inputs of another width.",
                expected=f"{self.in_features} features in the last dimension",
                got=f"a tensor of shape {tuple(x.shape)}",
            )
        shape = (*batch, self.hidden_size)
        try:
            if isinstance(carry, tuple) and len(carry) == len(self._starts()):
                return tuple(part if part.shape == shape else part.expand(shape) for part in carry)
        except RuntimeError:
            pass
        carry = carry if isinstance(carry, tuple) else (carry,)
        raise InputError(
            f"{type(self).__name__} takes another carry.",
            expected=f"{self._carry_text()} of shape {shape}",
            got=", ".join(map(_described, carry)),
            fix="Pass (x, carry) with the carry that the cell returned: (y, carry), st = cell(x, ps, st).",
        )

    def _carry_text(self) -> str:
        return "(h,)" if len(self._starts()) == 1 else "(h, c)"

    def expected_input(self) -> str:
        """Name the widths of the input and of the carry."""
        return (
            f"a tensor of shape (..., {self.in_features}), or a tuple of one and a carry {self._carry_text()} "
            f"of shape (..., {self.hidden_size})"
        )

    def extra_repr(self) -> str:
        """Return for instance `3 -> 5, bias=False`."""
        activation = getattr(self, "activation", None)
        shown = [f"{self.in_features} -> {self.hidden_size}", *([show_value(activation)] if activation else [])]
        shown += [] if self.bias else ["bias=False"]
        flags = ("train_state", "train_memory")
        return ", ".join(shown + [f"{name}=True" for name in flags if getattr(self, name, False)])


def _described(part: Any) -> str:
    return str(tuple(part.shape)) if isinstance(part, Tensor) else f"a {type(part).__name__}"
