"""What a model computes inside, to look at, to perturb and to differentiate by: `Perturbed`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from luxtorch._torch import compile_constant
from luxtorch.core import (
    InputError,
    KeyNameError,
    Layer,
    LuxtorchError,
    Parameters,
    States,
    WrapperLayer,
    suggest,
    tree_map,
)
from luxtorch.core._paths import Name, is_glob, places

from ._branches import Layers
from ._cell import Cell
from ._chain import as_layer
from ._compact_parts import Group
from ._repeated import AlternatePrecision
from ._tap import changed, with_perturbation, with_tap, without_output


class Perturbed(WrapperLayer):
    """Call a model with perturbations, that are added to what some of the layers inside return.

    A perturbation is an input like any other. So the derivative by one that is zero is the derivative by what the layer
    returned, in forward mode and of any order; `intermediate_gradients` takes the first.

    Args:
        layer: The model.
        *paths: The layers inside, by the names that lead to their parameters: `"layer_2"`, `"encoder.layer_1"`; by
            globs such as `"*.attention"`, in which `*` stands for dots too; or by predicates on such names.

    Parameters:
        Those of the model, not nested.

    States:
        Likewise.

    Shape:
        A tuple of the model's input and a dict of perturbations by path. One has the shape, and the structure, of what
        the layer returns, or broadcasts to it; where there is none, none is added. To a tuple of the model's output
        and a dict of what the layers return, perturbation included.

    Raises:
        InputError: If no path is given. In a call: if a layer was not called, or was called otherwise than as a layer,
            as a cell is in `Recurrence`; or if a perturbation does not fit.
        KeyNameError: If a path leads to no layer, or a perturbation has the name of none.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Perturbed(lt.Chain(lt.Dense(2, 8, torch.tanh), lt.Dense(8, 1)), "layer_1")
        >>> ps, st = lt.setup(0, model)
        >>> x = torch.ones(4, 2)
        >>> (y, inside), st = model((x, {}), ps, st)
        >>> inside["layer_1"].shape
        torch.Size([4, 8])
        >>> along = {"layer_1": torch.ones(8)}  # the same for all samples
        >>> (moved, _), st = model((x, along), ps, st)
        >>> torch.allclose(moved - y, ps["layer_2"]["weight"].sum())
        True

    In a model from `lt.from_torch`, paths are the modules' own names, as for `torch.nn.Module.get_submodule`.

    A layer that is called several times, as in `RepeatedLayer`, is perturbed each time, and its last output is
    returned. What lies inside `Checkpointed` can be perturbed, but is itself returned as a constant; of
    `AlternatePrecision` only the whole can be perturbed.

    Source: `Module.perturb` of Flax.
    """

    layer: Layer
    paths: tuple[str, ...]

    def __init__(self, layer: Layer | Callable[[Any], Any], *paths: Name) -> None:
        layer = as_layer(layer)
        self._set(layer=layer, paths=layer_paths(layer, paths))
        if not paths or not all(isinstance(path, str) for path in self.paths):
            raise InputError(
                "Perturbed takes the paths of layers.",
                expected='Perturbed(model, "layer_1")',
                got=", ".join(map(repr, paths)) or "none",
            )
        self._tapped  # noqa: B018  # a path that leads nowhere is an error now

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[tuple[Any, dict[str, Any]], States]:
        """Return the output with what the layers inside return, and the new states."""
        if not (isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], Mapping)):
            raise InputError(
                "The input of a perturbed model has two parts.",
                expected="a tuple (x, perturbations), the latter a dict by path",
                got=f"a {type(x).__name__}",
                fix="Without perturbations: model((x, {}), ps, st).",
            )
        x, perturbations = x
        for path in perturbations:
            if path not in self.paths:
                raise KeyNameError(
                    f"No layer is perturbed under the name '{path}'.",
                    expected=", ".join(self.paths),
                    got=path,
                    fix=suggest(path, self.paths),
                )
        for path in self.paths:
            st = changed(st, path.split("."), with_perturbation(perturbations.get(path, ())))
        y, st = self._tapped(x, ps, st)
        inside: dict[str, Any] = {}
        for path in self.paths:
            st = changed(st, path.split("."), without_output(path, inside))
        return (y, inside), st

    @cached_property
    def _tapped(self) -> Layer:
        """The model, with each layer that a path leads to replaced by one that perturbs it."""
        model = self.layer
        for path in self.paths:
            try:
                model = with_tap(model, path.split("."))
            except LuxtorchError as error:
                error.where = f"the path '{path}'"
                raise
        return model

    def extra_repr(self) -> str:
        """Return the paths."""
        return ", ".join(map(repr, self.paths))


HOLDERS = Group, Layers
"""Layers that hold others for the one around them, and are taken apart rather than called."""


@compile_constant
def layer_paths(layer: Layer, paths: Sequence[Name]) -> tuple[str, ...]:
    """Return paths of layers inside, with what globs and predicates find in their place.

    Raises:
        KeyNameError: If one finds none.
    """
    searching = [path for path in paths if callable(path) or (isinstance(path, str) and is_glob(path))]
    known = list(dict.fromkeys((*tappable(layer), *tappable(layer, True)))) if searching else []
    found: list[Any] = []
    for path in paths:
        found += places(path, known, "layer", below=False) if path in searching else [path]
    return tuple(dict.fromkeys(found))


def tappable(layer: Layer, modules: bool = False, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the paths of the layers inside that a tap can be put on; and of modules of torch.nn inside of these."""
    # These do not call what is inside with states that have taps in them.
    if isinstance(layer, Cell | AlternatePrecision | Perturbed):
        return
    if modules and hasattr(type(layer), "tappable"):
        yield from (".".join((*path, name)) for name in layer.tappable())  # type: ignore[attr-defined]
    for name, child in layer.children().items():
        if name and not isinstance(child, (Cell, *HOLDERS)):
            yield ".".join((*path, name))
        yield from tappable(child, modules, (*path, name) if name else path)


def intermediate_gradients(
    loss: Callable[[Any], Tensor], model: Perturbed, x: Any, ps: Parameters, st: States
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compute what layers inside a model return, and the gradient of a loss by it.

    Args:
        loss: A function of the model's output that returns a scalar.
        model: The model, as `Perturbed` in these layers.
        x: The model's input.
        ps: Its parameters.
        st: Its states.

    Returns:
        `(outputs, gradients)`: two dicts by path. The model is called twice, the first time for the shapes.

    Raises:
        InputError: If the model is not `Perturbed`.

    Example:
        Grad-CAM, which shows where in an image a class is seen:

        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Conv((3, 3), 1, 8, torch.relu), lt.GlobalMeanPool(), lt.FlattenLayer(), lt.Dense(8, 10))
        >>> ps, st = lt.setup(0, model)
        >>> x, inside = torch.ones(4, 1, 28, 28), lt.Perturbed(model, "layer_1")
        >>> outputs, gradients = lt.intermediate_gradients(lambda y: y[:, 3].sum(), inside, x, ps, st)
        >>> weights = gradients["layer_1"].mean((2, 3), keepdim=True)
        >>> torch.relu((weights * outputs["layer_1"]).sum(1)).shape
        torch.Size([4, 26, 26])

    Source: `retain_grad` in torch; Selvaraju et al., "Grad-CAM", 2017.
    """
    if not isinstance(model, Perturbed):
        raise InputError(
            "The layers to differentiate by are not told.",
            expected='a perturbed model: lt.Perturbed(model, "layer_1")',
            got=f"a {type(model).__name__}",
        )
    (_, outputs), _ = model((x, {}), ps, st)

    def of_perturbations(perturbations: dict[str, Any]) -> Tensor:
        (y, _), _ = model((x, perturbations), ps, st)
        return loss(y)

    return outputs, torch.func.grad(of_perturbations)(tree_map(torch.zeros_like, outputs))
