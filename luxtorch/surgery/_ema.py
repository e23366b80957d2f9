"""Exponential moving averages of parameters: `EMA`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import InputError, Value, named_leaves, out_of_range, tree_leaves, tree_map


class EMA(Value):
    """Average parameters over a training, recent ones the most: an exponential moving average.

    The average weighs the parameters of n steps ago by `decay**n`, and all weights sum to one from the start: the bias
    to the first values that a plain recursion has is corrected. There are three functions, all of them pure, so that
    they can be compiled, vmapped and differentiated: `init` makes a state, `update` takes in the parameters after a
    step, and `parameters` gives the average. Of tensors that autograd records, such as the parameters of a
    `torch.nn.Module`, the average is on their tape: call these under `torch.no_grad()` beside an optimizer of torch.

    Args:
        decay: The factor by which a weight shrinks in a step, at least 0 and below 1.
        dtype: The dtype of the average; that of the parameters if None. In a 16-bit dtype an average stands still
            when the steps get small: keep that of such parameters in torch.float32.

    Raises:
        InputError: If the decay is not in the range, or the dtype is not a floating point one.

    Example:
        >>> import torch, luxtorch as lt
        >>> ema = lt.EMA(0.5)
        >>> state = ema.init({"weight": torch.tensor(1.0)})
        >>> state = ema.update(state, {"weight": torch.tensor(4.0)})
        >>> ema.parameters(state)  # (0.5 * 1 + 1 * 4) / 1.5
        {'weight': tensor(3.)}

        In a training:

        >>> from luxtorch import optim
        >>> model = lt.Dense(3, 1)
        >>> ps, st = lt.setup(0, model)
        >>> ema, opt_state = lt.EMA(0.999), optim.setup(optim.Adam(), ps)
        >>> average = ema.init(ps)
        >>> for x in torch.eye(3):
        ...     grads = torch.func.grad(lambda ps: (model(x, ps, st)[0] ** 2).sum())(ps)
        ...     opt_state, ps = optim.update(opt_state, ps, grads)
        ...     average = ema.update(average, ps)
        >>> y, _ = model(torch.ones(3), ema.parameters(average), lt.test_mode(st))

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; Kingma and Ba, "Adam",
    2014, for the correction; `torch.optim.swa_utils.AveragedModel`, whose average starts at the first values instead.
    """

    decay: float = 0.999
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if isinstance(self.decay, bool) or not (isinstance(self.decay, (int, float)) and 0 <= self.decay < 1):
            raise out_of_range("decay", self.decay, "a number of at least 0 and below 1, such as 0.999")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise out_of_range("dtype", self.dtype, "a floating point dtype, such as torch.float32, or None")

    def init(self, ps: Any) -> dict[str, Any]:
        """Return a state whose average is that of these parameters alone.

        Args:
            ps: Parameters: nested dicts of tensors, a ComponentVector, or any other pytree of tensors. Integers, as in
                states, are not averaged: the last ones count.

        Returns:
            A dict of `count`, the number of parameters taken in, and `average`, a tree like `ps`.
        """
        leaves = tree_leaves(ps)
        device = leaves[0].device if leaves else None
        one = torch.ones((), dtype=torch.int64, device=device)
        # Of its own: an optimizer of torch.optim goes on writing into its parameters.
        return {"count": one, "average": tree_map(lambda leaf: self._kept(leaf).clone(), ps)}

    def update(self, st: dict[str, Any], ps: Any) -> dict[str, Any]:
        """Return the state after the parameters of one more step.

        Args:
            st: The state; it stays as it is.
            ps: The parameters, a tree like the one given to `init`.
        """
        count = st["count"] + 1
        weight = self._weight(count, {leaf.dtype for leaf in tree_leaves(st["average"])})

        def moved(average: Tensor, leaf: Tensor) -> Tensor:
            leaf = self._kept(leaf)
            if leaf.shape != average.shape:
                raise ValueError(f"the shapes {tuple(average.shape)} and {tuple(leaf.shape)} differ")
            if not _is_averaged(leaf):
                return leaf
            return average + weight.to(average.device, average.real.dtype) * (leaf - average)

        try:
            return {"count": count, "average": tree_map(moved, st["average"], ps)}
        except ValueError as error:
            raise InputError(
                "The parameters do not match those that the average began with.",
                expected=_names(st["average"]),
                got=_names(ps),
                fix=f"Begin again with ema.init(ps). The cause: {error}",
            ) from error

    def parameters(self, st: dict[str, Any]) -> Any:
        """Return the average, to be used as parameters."""
        return st["average"]

    def _weight(self, count: Tensor, dtypes: set[torch.dtype]) -> Tensor:
        """Return the weight of the newest of some trees, (1 - decay) / (1 - decay**count)."""
        wide = count.to(torch.float64 if dtypes & {torch.float64, torch.complex128} else torch.float32)
        # Decays near 1 would lose their digits in the power.
        return (1 - self.decay) / -torch.expm1(wide * math.log(self.decay)) if self.decay else torch.ones_like(wide)

    def _kept(self, leaf: Tensor) -> Tensor:
        return leaf if self.dtype is None or not leaf.is_floating_point() else leaf.to(self.dtype)


def _names(tree: Any) -> str:
    return f"a {type(tree).__name__} of {', '.join(name for name, _ in named_leaves(tree)[:20]) or 'nothing'}"


def _is_averaged(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()
