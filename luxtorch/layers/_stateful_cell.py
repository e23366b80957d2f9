"""A cell that finds its carry in the state: `StatefulRecurrentCell`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import InputError, Parameters, States, WrapperLayer, tree_map
from luxtorch.core._locate import wrong_names

from ._cell import Cell
from ._recurrence import check_cell

_OWN = ("carry", "started")


class StatefulRecurrentCell(WrapperLayer):
    """Keep a cell's carry in the state, so that the cell is called on one input after another.

    The first call starts with the cell's initial carry. `lt.update_state(st, "started", torch.tensor(False))` makes the
    next call a first one again. States are made for one size of batch; for another, make others with
    `lt.initial_states`, the parameters stay.

    A state is detached, and so gradients reach no step before the last: to train through time, use `Recurrence`, or
    the cell itself.

    Args:
        cell: The cell.
        batch_size: The size of the batch; None for single inputs, without a batch.

    Parameters:
        Those of the cell, not nested.

    States:
        Those of the cell, not nested, and:
        carry: The carry of the last call; zeros before the first one. The parts of a tuple are named "0", "1", ...
        started: Whether there was a call, a boolean tensor.

    Shape:
        (batch_size, features), or (features,), to what the cell returns, without the carry.

    Raises:
        InputError: If the batch has another size.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.StatefulRecurrentCell(lt.GRUCell(3, 5), batch_size=2)
        >>> ps, st = lt.setup(0, model)
        >>> first, st = model(torch.ones(2, 3), ps, st)
        >>> second, st = model(torch.ones(2, 3), ps, st)
        >>> again, st = model(torch.ones(2, 3), ps, lt.update_state(st, "started", torch.tensor(False)))
        >>> torch.equal(first, second), torch.equal(first, again)
        (False, True)

    Source: Lux's `StatefulRecurrentCell`, whose carry is None before the first call.
    """

    cell: Cell
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_cell(self.cell)
        if not isinstance(getattr(self.cell, "in_features", None), int):
            raise InputError(
                "To make its carry, the cell must know the width of its input.",
                expected="a cell with a field or property in_features",
                got=type(self.cell).__name__,
            )

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the cell's states, and a carry of zeros."""
        ps, st = self.cell.initial_parameters(key), self.cell.initial_states(key)
        carry, _ = self.cell.initial_carry(torch.zeros(self._shape(), device=key.device), ps, st)
        started = torch.zeros((), dtype=torch.bool, device=key.device)
        return {**st, "carry": _as_groups(tree_map(torch.zeros_like, carry)), "started": started}

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the cell's output, and the state with the new carry."""
        if not isinstance(x, Tensor) or tuple(x.shape) != self._shape():
            raise InputError(
                "The input is not of the shape that the state was made for.",
                expected=self.expected_input(),
                got=f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}",
                fix="Make a StatefulRecurrentCell with this batch_size, and its states with lt.initial_states.",
            )
        own: States = {name: value for name, value in st.items() if name not in _OWN}
        start, own = self.cell.initial_carry(x, ps, own)
        carry = tree_map(lambda a, b: torch.where(st["started"], a.to(b.dtype), b), _like(start, st["carry"]), start)
        (y, carry), own = self.cell((x, carry), ps, own)
        carry = tree_map(lambda new, old: new.detach().to(old.dtype), _as_groups(carry), st["carry"])
        return y, {**own, "carry": carry, "started": torch.ones_like(st["started"])}

    def _shape(self) -> tuple[int, ...]:
        features: int = self.cell.in_features  # type: ignore[attr-defined]
        return (features,) if self.batch_size is None else (self.batch_size, features)

    def expected_input(self) -> str:
        """Name the shape."""
        return f"a tensor of shape {self._shape()}"

    def extra_repr(self) -> str:
        """Return for instance `batch_size=8`."""
        return "" if self.batch_size is None else f"batch_size={self.batch_size}"


def _as_groups(carry: Any) -> Any:
    """Return a carry as states are: a tuple as a dict."""
    return {str(i): _as_groups(part) for i, part in enumerate(carry)} if isinstance(carry, tuple) else carry


def _like(carry: Any, groups: Any, path: tuple[str, ...] = ("carry",)) -> Any:
    """Return the carry that the groups stand for, given one of its structure."""
    if not isinstance(carry, tuple):
        return groups
    names = [str(i) for i in range(len(carry))]
    error = wrong_names(
        groups if isinstance(groups, Mapping) else {},
        frozenset(names),
        "state",
        "Make them anew with lt.initial_states.",
    )
    if error is not None:
        error.inside = path
        raise error
    parts = [_like(part, groups[name], (*path, name)) for name, part in zip(names, carry, strict=True)]
    return type(carry)(*parts) if hasattr(carry, "_fields") else tuple(parts)
