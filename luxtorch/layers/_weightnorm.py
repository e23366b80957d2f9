"""Parameters as a length times a direction: `WeightNorm`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from luxtorch._transforms import transformed
from luxtorch.core import InputError, KeyNameError, Parameters, States, suggest

from ._normalise import euclidean_norm
from ._reparametrized import Reparametrized


class WeightNorm(Reparametrized):
    """Replace parameters of a layer by a length and a direction each: `weight = weight_g * weight_v / norm(weight_v)`.

    It starts as the layer itself would start from the same key: with the weight as direction, and its norm as length.

    Args:
        layer: A layer.
        names: The names of its parameters to replace.
        dim: The dimension along which each slice has a length of its own; None for one length in all.

    Parameters:
        normalized: `weight_g`, of size 1 in all dimensions but `dim` (a single number for `dim=None`), and
            `weight_v`, of the weight's shape; likewise for each name.
        unnormalized: The other parameters of the layer.

    States:
        Those of the layer.

    Shape:
        What the layer takes to what it returns.

    Raises:
        KeyNameError: If the layer has no parameter of that name.
        InputError: If what has the name is a group of parameters, or lacks the dimension; in `setup`, if a slice
            starts at zero and has no direction.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.WeightNorm(lt.Dense(3, 2))
        >>> model
        WeightNorm(Dense(3 -> 2))    # 10 parameters: normalized.weight_g (2, 1), normalized.weight_v (2, 3), unnormalized.bias (2,)
        >>> ps, st = lt.setup(0, model)
        >>> y, st = model(torch.ones(5, 3), ps, st)
        >>> y.shape
        torch.Size([5, 2])

    Source: Lux's `WeightNorm`, `torch.nn.utils.parametrizations.weight_norm`; Salimans and Kingma, "Weight
    normalization", 2016.
    """  # noqa: E501

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return the layer's own, taken apart."""
        return self.taken_apart(self.layer.initial_parameters(key))

    def taken_apart(self, ps: Parameters) -> dict[str, Any]:
        """Return parameters of the layer as lengths, directions and others."""
        ps, normalized = dict(ps), {}
        for name in self.names:
            normalized[f"{name}_g"] = _norm(ps[name], self.dim)
            normalized[f"{name}_v"] = ps.pop(name)
            self._require_directions(name, normalized[f"{name}_g"])
        return {"normalized": normalized, "unnormalized": ps}

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return those of the layer."""
        return self.layer.initial_states(key)

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return what the layer returns with the weights put together."""
        normalized, unnormalized = ps["normalized"], ps["unnormalized"]
        if not torch.compiler.is_compiling():
            self._require_names("normalized", normalized, self._wanted[0])
            self._require_names("unnormalized", unnormalized, self._wanted[1])
        return self.layer(x, self.put_together(ps), st)

    def put_together(self, ps: Parameters) -> dict[str, Any]:
        """Return the parameters of the layer."""
        normalized, whole = ps["normalized"], dict(ps["unnormalized"])
        for name in self.names:
            v = normalized[f"{name}_v"]
            whole[name] = v * (normalized[f"{name}_g"] / _norm(v, self.dim))
        return whole

    @cached_property
    def _wanted(self) -> tuple[frozenset[str], frozenset[str]]:
        normalized = frozenset(f"{name}_{part}" for name in self.names for part in "gv")
        return normalized, self.layer._names[0].difference(self.names)

    def _require_names(self, group: str, tree: Parameters, wanted: Iterable[str]) -> None:
        """Raise an error that names the group, unless it has the right names."""
        if tree.keys() == wanted:
            return
        missing, extra = sorted(set(wanted) - set(tree)), sorted(set(tree) - set(wanted))
        error = KeyNameError(
            f"The group has no parameter '{extra[0]}'." if extra else f"The group lacks the parameter '{missing[0]}'.",
            expected=", ".join(map(repr, sorted(wanted))) or "nothing",
            got=", ".join(map(repr, sorted(tree))) or "nothing",
            fix=f"{suggest(extra[0], missing) if extra else ''} Use those that lt.setup makes for this model.".strip(),
        )
        error.inside = (group,)
        raise error

    def _require_directions(self, name: str, norm: Tensor) -> None:
        readable = not transformed() and norm.device.type != "meta"
        if readable and bool((norm == 0).any()):
            raise InputError(
                f"The parameter '{name}' starts at zero, or a slice of it does, and zero has no direction.",
                expected="initial values other than zero",
                got=f"{int((norm == 0).sum())} of {norm.numel()} norms are zero",
                fix="Leave the parameter out of names, give it another initializer, or choose another dim.",
            )


def _norm(v: Tensor, dim: int | None) -> Tensor:
    """Return the Euclidean norm over all dimensions but one, which are kept with size 1; or over all, not kept."""
    if v.ndim == 1 and dim is not None:
        return v.abs()
    others = None if dim is None else [other for other in range(v.ndim) if other != dim % v.ndim]
    return euclidean_norm(v, others, keepdim=dim is not None)
