"""Parameters divided by their largest singular value: `SpectralNorm`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch.core import TRAINING, InputError, Parameters, States, Static
from luxtorch.core._nowhere import NOWHERE
from luxtorch.init import normal
from luxtorch.random import fold_in

from ._normalise import euclidean_norm
from ._reparametrized import Reparametrized


class SpectralNorm(Reparametrized):
    """Divide parameters of a layer by their largest singular value, which bounds how far the layer stretches.

    The value is estimated by power iteration, some steps in each call in train mode; test mode takes the estimate as
    it is. The singular vectors are constants of the derivative, as in torch: in train mode finite differences, which
    move them, agree with the gradient only after they have converged. They start as random directions; `refine`
    brings them near those of given parameters. A parameter of one dimension is divided by its Euclidean norm.

    Args:
        layer: A layer.
        names: The names of its parameters to divide.
        n_power_iterations: The steps of power iteration in each call in train mode.
        eps: The smallest number that a vector is divided by.
        dim: The dimension of a parameter that makes the rows of a matrix, all others making the columns: that of the
            outputs, which is 0 for most layers and 1 for `ConvTranspose`.

    Parameters:
        Those of the layer, not divided.

    States:
        weight_u: (rows,), an estimate of the first left singular vector; likewise for each name.
        weight_v: (columns,), an estimate of the right one.
        training: Whether the estimates are improved.
        Besides, those of the layer.

    Shape:
        What the layer takes to what it returns.

    Raises:
        KeyNameError: If the layer has no parameter of that name.
        InputError: If what has the name is a group of parameters, or lacks the dimension, or if the layer has states
            of these names itself.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.SpectralNorm(lt.Dense(3, 3, bias=False))
        >>> ps, st = lt.setup(0, model)
        >>> st = model.refine({"weight": torch.diag(torch.tensor([1.0, 2.0, 4.0]))}, st)
        >>> y, st = model(torch.ones(3), {"weight": torch.diag(torch.tensor([1.0, 2.0, 4.0]))}, st)
        >>> y
        tensor([0.2500, 0.5000, 1.0000])

    Source: `torch.nn.utils.parametrizations.spectral_norm`; Miyato et al., "Spectral normalization for generative
    adversarial networks", 2018.
    """

    _: KW_ONLY
    n_power_iterations: int = 1
    eps: float = 1e-12

    def __post_init__(self) -> None:
        if self.dim is None:
            raise InputError(
                "SpectralNorm makes a matrix of a parameter.", expected="dim, a whole number", got="dim=None"
            )
        super().__post_init__()
        if not (isinstance(self.n_power_iterations, int) and self.n_power_iterations >= 1):
            raise InputError(
                "SpectralNorm takes a number of steps.",
                expected="n_power_iterations, a whole number of at least 1",
                got=f"n_power_iterations={self.n_power_iterations!r}",
            )
        taken = {f"{name}_{part}" for name in self.names for part in "uv"} & self.layer._names[1]
        if taken:
            raise InputError(
                f"The layer has a state '{min(taken)}' itself.",
                expected="a layer without it",
                got=repr(self.layer),
                fix="Wrap a layer only once, with all names.",
            )

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return those of the layer."""
        return self.layer.initial_parameters(key)

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return those of the layer, random directions for each parameter, and the mode."""
        st = dict(self.layer.initial_states(key))
        for name, weight in self._matrices(self.layer.initial_parameters(NOWHERE)):
            for part, size in zip("uv", weight.shape, strict=True):
                drawn = normal(fold_in(key, f"{name}_{part}"), (size,), dtype=weight.dtype)
                st[f"{name}_{part}"] = F.normalize(drawn, dim=0, eps=self.eps)
            st[TRAINING] = Static(True)
        return st

    def refine(self, ps: Parameters, st: States, n_power_iterations: int = 15) -> dict[str, Any]:
        """Return the states after more steps of power iteration on given parameters.

        torch does 15 of them when it wraps a module.
        """
        new = dict(st)
        for name, weight in self._matrices(ps):
            u, v = st[f"{name}_u"], st[f"{name}_v"]
            new[f"{name}_u"], new[f"{name}_v"] = _iterated(weight, u, v, n_power_iterations, self.eps)
        return new

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return what the layer returns with the parameters divided, and the states with the new estimates."""
        new = self.refine(ps, st, self.n_power_iterations) if st.get(TRAINING) else dict(st)
        divided = dict(ps)
        for name in self.names:
            if ps[name].ndim == 1:
                divided[name] = ps[name] / euclidean_norm(ps[name], None).clamp_min(self.eps)
        for name, weight in self._matrices(ps):
            u, v = new[f"{name}_u"].detach(), new[f"{name}_v"].detach()
            divided[name] = ps[name] / torch.vdot(u, torch.mv(weight, v))
        y, inside = self.layer(x, divided, {name: st[name] for name in self.layer._names[1]})
        return y, {**new, **inside}

    def _matrices(self, ps: Parameters) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter of more than one dimension as a matrix, by name."""
        for name in self.names:
            if ps[name].ndim > 1:
                yield name, ps[name].movedim(self.dim, 0).flatten(1)


def _iterated(weight: Tensor, u: Tensor, v: Tensor, steps: int, eps: float) -> tuple[Tensor, Tensor]:
    weight, u, v = weight.detach(), u.detach(), v.detach()
    for _ in range(steps):
        u = F.normalize(torch.mv(weight, v), dim=0, eps=eps)
        v = F.normalize(torch.mv(weight.mH, u), dim=0, eps=eps)
    return u, v
