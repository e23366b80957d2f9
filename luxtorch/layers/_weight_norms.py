"""Layers with reparametrized weights: `WeightNorm` and `SpectralNorm`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, fields
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luxtorch._transforms import reverse_alone, transformed
from luxtorch.core import TRAINING, InputError, KeyNameError, Layer, Parameters, States, Static, out_of_range, suggest
from luxtorch.core._tree import META_KEY
from luxtorch.init import normal
from luxtorch.random import fold_in

from ._containers import as_layer
from ._shared import require_size


class Reparametrized(Layer):
    """Base class of both: a layer, the names of the parameters to compute, and the dimension not normalized over.

    The trees of a subclass are not those of the layer inside, which is therefore a hyperparameter, not a child.
    """

    layer: Layer
    names: tuple[str, ...] = ("weight",)
    _: KW_ONLY
    dim: int | None = 0

    def __post_init__(self) -> None:
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        self._set(layer=as_layer(self.layer), names=names)
        if not names or len(set(names)) < len(names):
            raise out_of_range("names", names, "different names of parameters, such as ('weight',)")
        ps = self.layer.initial_parameters(META_KEY)
        for name in names:
            self._check(name, ps)

    def _check(self, name: str, ps: Mapping[str, Any]) -> None:
        where = f"{type(self).__name__}({inline(self.layer)})"
        inside = "Wrap the layer inside, which has the parameter itself."
        if name not in ps:
            raise KeyNameError(
                f"The layer has no parameter '{name}'.",
                expected=", ".join(f"'{other}'" for other in ps) or "a layer with parameters",
                got=f"'{name}'",
                fix=suggest(name, ps) or inside * any(isinstance(entry, Mapping) for entry in ps.values()),
                where=where,
            )
        if not isinstance(ps[name], Tensor):
            raise InputError(
                f"'{name}' must be a tensor, not a group of parameters.",
                got=f"a group with {', '.join(map(repr, ps[name])) or 'nothing in it'}",
                fix=inside,
                where=where,
            )
        ndim = ps[name].ndim
        if self.dim is not None and not (isinstance(self.dim, int) and -ndim <= self.dim < ndim):
            limits = f"from {-ndim} to {ndim - 1}" if ndim else "None, as the parameter has no dimensions"
            raise out_of_range(f"dim of '{name}', of shape {tuple(ps[name].shape)},", self.dim, limits, where=where)

    def expected_input(self) -> str:
        """Say what the layer inside takes."""
        return self.layer.expected_input()

    def extra_repr(self) -> str:
        """Return for instance `Dense(3 -> 2), dim=1`."""
        options = [item for item in fields(self) if item.name != "layer" and getattr(self, item.name) != item.default]
        return ", ".join([inline(self.layer), *(f"{item.name}={getattr(self, item.name)}" for item in options)])


def inline(layer: Layer) -> str:
    """Return a layer, with the layers inside, on one line.

    Example:
        >>> import luxtorch as lt
        >>> inline(lt.Chain(lt.Dense(3, 2), lt.Dropout(0.1)))
        'Chain(layer_1 = Dense(3 -> 2), layer_2 = Dropout(0.1))'
    """
    inside = [f"{name} = {inline(child)}" if name else inline(child) for name, child in layer.children().items()]
    return f"{type(layer).__name__}({', '.join(filter(None, [layer.extra_repr(), *inside]))})"


class WeightNorm(Reparametrized):
    """Weight normalization of a layer's parameters: `weight = weight_g * weight_v / norm(weight_v)`.

    It starts as the layer itself would from the same key: `weight_v` is the weight, and `weight_g` its norm.

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
        """Return those of the layer, as lengths and directions."""
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
                f"The initial value of '{name}', and of each slice of it, must have a direction, and not be zero.",
                got=f"{int((norm == 0).sum())} of {norm.numel()} norms are zero",
                fix="Leave the parameter out of names, give it another initializer, or choose another dim.",
            )


def _norm(v: Tensor, dim: int | None) -> Tensor:
    """Return the Euclidean norm over all dimensions but one, which are kept with size 1; or over all, not kept."""
    if v.ndim == 1 and dim is not None:
        return v.abs()
    others = None if dim is None else [other for other in range(v.ndim) if other != dim % v.ndim]
    return euclidean_norm(v, others, keepdim=dim is not None)


class SpectralNorm(Reparametrized):
    """Spectral normalization: divide a layer's parameters by their largest singular value.

    The value is estimated by power iteration, some steps in each call in train mode; test mode uses the last
    estimate. The singular vectors are constants of the derivative, as in torch: in train mode finite differences, which
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
            raise out_of_range("dim", None, "an integer")
        super().__post_init__()
        require_size("n_power_iterations", self.n_power_iterations)
        taken = {f"{name}_{part}" for name in self.names for part in "uv"} & self.layer._names[1]
        if taken:
            raise InputError(
                f"The layer must not have a state '{min(taken)}' itself.",
                got=repr(self.layer),
                fix="Wrap a layer only once, with all names.",
            )

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return those of the layer."""
        return self.layer.initial_parameters(key)

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return those of the layer, random directions for each parameter, and the mode."""
        st = dict(self.layer.initial_states(key))
        for name, weight in self._matrices(self.layer.initial_parameters(META_KEY)):
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


def euclidean_norm(v: Tensor, dims: list[int] | None, *, keepdim: bool = False) -> Tensor:
    """Return the square root of the sum of squares over some dimensions, or over all; at 0 its derivatives are 0."""
    if reverse_alone():
        norm: Tensor = torch.linalg.vector_norm(v, dim=dims, keepdim=keepdim)
        return norm
    # torch does not differentiate what it computes of a norm in forward mode twice in reverse mode.
    squares = v.square().sum(dims, keepdim=keepdim)
    zero = squares == 0
    return squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)
