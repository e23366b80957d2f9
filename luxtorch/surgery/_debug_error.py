"""The error of debug mode, and where in a model something happens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from luxtorch.core import Layer, LuxtorchError
from luxtorch.core._values import Statistics

from ._watch import Path, describe


@dataclass(frozen=True)
class Place:
    """Hold where in a model something happens: in a layer, or in a module of torch.nn inside one.

    Attributes:
        names: The names that lead there.
        layer: The layer; of a module, the layer that it is in.
        what: The layer, or the module, on one line.
        outer: Whether there are others inside, between which there may be code.
    """

    names: tuple[str, ...]
    layer: Layer
    what: str
    outer: bool

    @staticmethod
    def of(layer: Layer, path: Path) -> Place:
        """Return the place of a layer."""
        return Place(tuple(filter(None, path)), layer, describe(layer), bool(layer.children()))

    def inside(self, name: str, module: nn.Module) -> Place:
        """Return the place of a module inside a layer."""
        what = f"{type(module).__name__} {module.extra_repr()}".strip()
        return Place((*self.names, *name.split(".")), self.layer, what, any(True for _ in module.children()))

    @property
    def name(self) -> str:
        """The last name that leads there."""
        return self.names[-1] if self.names else "model"

    def __str__(self) -> str:
        return f"{'.'.join(('model', *self.names))} ({describe(self.layer)})"


class NonFiniteError(LuxtorchError, FloatingPointError):
    """Report where NaN or Inf first appeared; `lt.debug_mode` raises it.

    Attributes:
        path: The path of the layer, such as `"encoder.layer_2"`; empty for the model itself.
        direction: `"forward"` or `"backward"`.
    """

    path: str = ""
    direction: str = ""

    @staticmethod
    def at(place: Place, direction: str, problem: str, *, got: list[str], fix: str = "") -> NonFiniteError:
        """Return the error for a place."""
        shown = ("\n" + " " * 12).join(got)
        error = NonFiniteError(problem, expected="finite numbers", got=shown, fix=fix, where=str(place))
        error.path, error.direction = ".".join(place.names), direction
        error.__dict__["_place"] = place
        return error


def note(error: Exception, place: Place, inputs: list[tuple[str, Tensor]]) -> None:
    """Add to an exception in which layer it arose, once; it keeps its type, which others may wait for."""
    if isinstance(error, LuxtorchError) or hasattr(error, "_luxtorch_place"):
        return
    error._luxtorch_place = place  # type: ignore[attr-defined]
    notes = [
        *getattr(error, "__notes__", []),
        f"In {place}, called on",
        *(f"  {title}: {leaf.dtype} {tuple(leaf.shape)}" for title, leaf in inputs),
    ]
    error.__notes__ = notes  # type: ignore[attr-defined]  # Python 3.10 has no add_note, and shows none


@dataclass(frozen=True)
class Observation:
    """Hold statistics of what went into a layer, or came out of it; `lt.debug_mode(record=...)` makes them.

    Attributes:
        path: The path of the layer, such as `"encoder.layer_2"`; empty for the model itself.
        layer: The layer on one line.
        what: `"input"`, `"output"`, `"gradient by input"`, `"gradient by output"` or
            `"gradient by parameter 'weight'"`; where there are several inputs or outputs, with the name of the one.
        statistics: The statistics.
    """

    path: str
    layer: str
    what: str
    statistics: Statistics

    def __str__(self) -> str:
        return f"{self.path or 'the model'} ({self.layer}), {self.what}: {self.statistics}"
