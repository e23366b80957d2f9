"""What `WeightNorm` and `SpectralNorm` share: a layer, some of whose parameters are computed from others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, fields
from typing import Any

from torch import Tensor

from luxtorch.core import InputError, KeyNameError, Layer, suggest
from luxtorch.core._nowhere import NOWHERE

from ._chain import as_layer


class Reparametrized(Layer):
    """Hold a layer, the names of the parameters to compute, and the dimension that is not normalised over.

    The trees of a subclass are not those of the layer inside, which is therefore a hyperparameter and no child.
    """

    layer: Layer
    names: tuple[str, ...] = ("weight",)
    _: KW_ONLY
    dim: int | None = 0

    def __post_init__(self) -> None:
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        self._set(layer=as_layer(self.layer), names=names)
        if not names or len(set(names)) < len(names):
            raise InputError(
                f"{type(self).__name__} takes the names of parameters.",
                expected="different names, such as ('weight',)",
                got=f"names={names}",
            )
        ps = self.layer.initial_parameters(NOWHERE)
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
                f"'{name}' is not one parameter, but a group of them.",
                expected="names of tensors",
                got=f"a group with {', '.join(map(repr, ps[name])) or 'nothing in it'}",
                fix=inside,
                where=where,
            )
        ndim = ps[name].ndim
        if self.dim is not None and not (isinstance(self.dim, int) and -ndim <= self.dim < ndim):
            raise InputError(
                f"The parameter '{name}' has no dimension {self.dim!r}.",
                expected=f"dim from {-ndim} to {ndim - 1}" if ndim else "a parameter with dimensions",
                got=f"dim={self.dim!r} for a shape of {tuple(ps[name].shape)}",
                where=where,
            )

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
