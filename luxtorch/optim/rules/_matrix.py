"""Rules for matrices, which look at rows and columns: Muon, Adafactor."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from luxtorch._transforms import functional
from luxtorch.core import InputError, out_of_range

from .._hyperparameters import Fixed, Number, Positive, Share
from .._leafwise import LeafwiseRule, counted, rms, zeros
from .._rule_state import Slots

# The quintic that Jordan chose: it pulls all singular values to about one in few steps.
_QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(LeafwiseRule):
    """Step along the orthogonal matrix nearest to the momentum; for the matrices of hidden layers alone.

    Args:
        lr: The learning rate.
        weight_decay: How much the parameters shrink, relative to the learning rate.
        momentum: How much of the average gradient is kept.
        eps: The least norm by which the momentum is divided.
        nesterov: Whether the step is along the momentum that the next step will have.
        ns_steps: The number of Newton-Schulz steps towards the orthogonal matrix.
        adjust_lr_fn: How the step of an m x n matrix is scaled: "original" by `max(1, m / n)**0.5`,
            "match_rms_adamw" by `0.2 * max(m, n)**0.5`, "spectral_unclamped" by `(m / n)**0.5`.
        ns_dtype: The dtype of the Newton-Schulz steps; None is that of the parameter.
        ns_coefficients: The coefficients of x, x**3 and x**5 in a Newton-Schulz step.

    Raises:
        InputError: If a parameter is not a matrix. Give the others another rule.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.zeros(2, 2)}
        >>> opt_state = optim.setup(optim.Muon(0.5), ps)
        >>> opt_state, ps = optim.update(opt_state, ps, {"weight": torch.tensor([[3.0, 0.0], [0.0, -3.0]])})
        >>> ps
        {'weight': tensor([[-0.5625,  0.0000],
                [ 0.0000,  0.5625]])}

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. The numbers and defaults are
    those of `torch.optim.Muon`, whose Newton-Schulz steps always have bfloat16.
    """

    lr: Number = 0.001
    weight_decay: Number = 0.1
    momentum: Share = 0.95
    eps: Number = 1e-7
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr_fn: str = "original"
    ns_dtype: torch.dtype | None = torch.bfloat16
    ns_coefficients: Fixed[tuple[float, float, float]] = _QUINTIC

    needs_params = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adjust_lr_fn not in ("original", "match_rms_adamw", "spectral_unclamped"):
            raise out_of_range(
                "adjust_lr_fn", self.adjust_lr_fn, "'original', 'match_rms_adamw' or 'spectral_unclamped'"
            )

    def splits_vectors(self) -> bool:
        return True

    def slots(self, p: Tensor) -> Slots:
        if p.ndim != 2:
            raise InputError(
                "Muon is for matrices.",
                expected="a parameter of 2 dimensions",
                got=f"shape {tuple(p.shape)}",
                fix="Give the other parameters another rule, such as AdamW.",
            )
        return zeros(p, "momentum_buffer")

    def shared(self, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {**super().shared(h), "1-momentum": 1 - h["momentum"]}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        average = slots["momentum_buffer"] + h["1-momentum"] * (g - slots["momentum_buffer"])
        ahead = g + h["momentum"] * (average - g) if self.nesterov else average
        x = ahead.to(self.ns_dtype or p.dtype)
        direction = _orthogonal(x, h["eps"], self.ns_steps, self.ns_coefficients).to(p.dtype)
        return h["-lr"] * (self._scale(*p.shape) * direction + h["weight_decay"] * p), {"momentum_buffer": average}

    def _scale(self, rows: int, columns: int) -> float:
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        ratio = rows / columns
        return math.sqrt(ratio if self.adjust_lr_fn == "spectral_unclamped" else max(1.0, ratio))


def _orthogonal(x: Tensor, eps: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """Return about the orthogonal matrix nearest to x: x with singular values that are all about one."""
    if x.shape[0] > x.shape[1]:
        return _orthogonal(x.T, eps, steps, coefficients).T
    norm = torch.linalg.vector_norm(x)
    x = x / torch.maximum(norm, eps.to(norm.dtype))
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.T
        x = _addmm(x, _addmm(gram, gram, gram, b, c), x, a, 1.0)
    return x


def _addmm(base: Tensor, x: Tensor, y: Tensor, beta: float, alpha: float) -> Tensor:
    """Return `beta * base + alpha * (x @ y)`, rounded once, as torch.addmm does; under vmap it would round thrice."""
    if x.dtype not in (torch.bfloat16, torch.float16) or not functional():
        return torch.addmm(base, x, y, beta=beta, alpha=alpha)
    return (beta * base.float() + alpha * (x.float() @ y.float())).to(x.dtype)


class Adafactor(LeafwiseRule):
    """Scale the gradient by its average square, of which only the means of rows and of columns are kept.

    The state of a matrix is as long as its two sides. Steps are in proportion to the parameter's own size.
    Each component of a ComponentVector is a parameter of its own.

    Args:
        lr: The most that a step may be, relative to the parameter: `min(lr, step**-0.5)`.
        decay_rate: The averages keep `1 - step**-decay_rate`.
        d: The root mean square from which on an update is scaled down.
        weight_decay: How much the parameters shrink, relative to the learning rate.
        eps2: The least size of a parameter.
        eps1: Lower bound on the RMS of the second moment; None is `torch.finfo(dtype).eps`.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> ps = {"weight": torch.full((2, 3), 2.0)}
        >>> opt_state = optim.setup(optim.Adafactor(0.25), ps)
        >>> opt_state.state.leaves["weight"]["row_var"].shape
        torch.Size([2, 1])
        >>> opt_state, ps = optim.update(opt_state, ps, {"weight": torch.ones(2, 3)})
        >>> ps
        {'weight': tensor([[1.5000, 1.5000, 1.5000],
                [1.5000, 1.5000, 1.5000]])}

    Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", 2018. The numbers and
    defaults are those of `torch.optim.Adafactor`, whose `beta2_decay` is `-decay_rate` and whose `eps` is
    `(eps1, eps2)`.
    """

    lr: Number = 0.01
    decay_rate: Number = 0.8
    d: Positive = 1.0
    weight_decay: Number = 0.0
    eps2: Number = 1e-3
    eps1: float | None = None

    needs_params = True

    def splits_vectors(self) -> bool:
        return True

    def slots(self, p: Tensor) -> Slots:
        if p.ndim < 2:
            return counted(p, "variance")
        row_var, col_var = p.new_zeros((*p.shape[:-1], 1)), p.new_zeros((*p.shape[:-2], 1, p.shape[-1]))
        return {**counted(p), "row_var": row_var, "col_var": col_var}

    def shared(self, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"decay": h["lr"] * h["weight_decay"]}

    def by_count(self, counts: Slots, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        step = counts["step"] + 1
        return {"new_share": step ** -h["decay_rate"], "-relative": -torch.minimum(h["lr"], step.rsqrt())}

    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        eps1 = torch.finfo(p.dtype).eps if self.eps1 is None else self.eps1
        if p.ndim < 2:
            averages = {"variance": g * g}
        else:
            averages = {"row_var": _mean_square(g, -1), "col_var": _mean_square(g, -2)}
        new = {name: slots[name] + h["new_share"] * (mean - slots[name]) for name, mean in averages.items()}
        if p.ndim < 2:
            variance = new["variance"]
        else:
            variance = new["row_var"] * new["col_var"] / new["row_var"].mean(-2, keepdim=True).clamp(min=eps1)
        update = (g * variance.clamp(min=eps1 * eps1).rsqrt()).to(p.dtype)
        size = torch.maximum(rms(p).to(h["eps2"].dtype), h["eps2"])
        excess = torch.clamp(rms(update).to(h["d"].dtype) / h["d"], min=1.0)
        step = h["-relative"] * size / excess * update - h["decay"] * p
        return step, {"step": slots["step"] + 1, **new}


def _mean_square(g: Tensor, dim: int) -> Tensor:
    return (g * g).mean(dim, keepdim=True)
