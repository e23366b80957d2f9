"""Outputs of layers inside a model, to read, perturb and differentiate by: `Perturbed`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from luxtorch._torch import compile_constant
from luxtorch.core import (
    InputError,
    Layer,
    LuxtorchError,
    Parameters,
    States,
    WrapperLayer,
    described,
    out_of_range,
    tree_leaves,
    tree_map,
    tree_structure,
    unknown_name,
)
from luxtorch.core._paths import Name, is_glob, places, replace_children

from ._compact_parts import Group
from ._containers import Layers, as_layer
from ._repeated import AlternatePrecision
from .recurrent import Cell

# Names in the state of a perturbed layer: what to add to its output, and what the output was.
PERTURBATION, OUTPUT = "(perturbation)", "(output)"


class Tap(WrapperLayer):
    """Add a perturbation from the state to a layer's output, and store the sum in the state."""

    layer: Layer

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return those of the layer, and no perturbation."""
        return {**self.layer.initial_states(key), PERTURBATION: (), OUTPUT: ()}

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the perturbed output."""
        y, new = self.layer(x, ps, without_tap(st))
        y = added(y, st[PERTURBATION])
        return y, {**new, PERTURBATION: st[PERTURBATION], OUTPUT: (y,)}

    def __getattr__(self, name: str) -> Any:
        # Attributes that a container reads from its layer, such as the width.
        if name == "layer" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.layer, name)


def with_tap(model: Layer, names: list[str]) -> Layer:
    """Return a model with a `Tap` around the layer at a path."""
    if not names:
        return Tap(model)
    children = model.children()
    # A wrapped layer, whose trees are not nested, is not named in a path either.
    name, rest = ("", names) if "" in children else (names[0], names[1:])
    if not children and hasattr(type(model), "tapped"):  # a module of torch.nn, for instance
        return model.tapped(".".join(names))  # type: ignore[attr-defined,no-any-return]
    child = children.get(name)
    return replace_children(model, {name: model if child is None else with_tap(child, rest)})


def added(y: Any, perturbation: Any) -> Any:
    """Return an output with a perturbation added; `()` stands for none."""
    if isinstance(perturbation, tuple) and not perturbation:
        return y
    if tree_structure(perturbation) == tree_structure(y):
        pairs = zip(tree_leaves(perturbation), tree_leaves(y), strict=True)
        if all(_broadcasts(tuple(leaf.shape), tuple(to.shape)) for leaf, to in pairs):
            return tree_map(torch.add, y, perturbation)
    raise InputError(
        "The perturbation must have the shape of the layer's output.",
        expected=f"{tree_map(_shape, y)}",
        got=f"{tree_map(_shape, perturbation)}",
        fix="Start from torch.zeros_like of what the perturbed model returns for the layer.",
    )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    ends = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, wanted) for size, wanted in ends)


def _shape(leaf: Any) -> Any:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf


def changed(tree: States, names: list[str], change: Callable[[States], States]) -> States:
    """Return a tree with a function applied to the part at a path; a tree without that part is returned unchanged."""
    if not names:
        return change(tree)
    if names[0] not in tree:  # the layer that lacks it raises the error
        return tree
    return {**tree, names[0]: changed(tree[names[0]], names[1:], change)}


def without_tap(st: States) -> dict[str, Any]:
    """Return the state of a layer without the entries of its `Tap`."""
    return {name: value for name, value in st.items() if name not in (PERTURBATION, OUTPUT)}


def with_perturbation(perturbation: Any) -> Callable[[States], States]:
    """Return a function that puts a perturbation into the state of a layer."""
    return lambda st: {**st, PERTURBATION: perturbation, OUTPUT: ()}


def without_output(path: str, outputs: dict[str, Any]) -> Callable[[States], States]:
    """Return a function that takes a layer's output out of its state, and puts it into a dict."""

    def without(st: States) -> States:
        if not st[OUTPUT]:
            raise InputError(
                f"The layer '{path}' must be called by its container, as layer(x, ps, st).",
                fix="Perturb the container, or another layer.",
            )
        (outputs[path],) = st[OUTPUT]
        return without_tap(st)

    return without


class Perturbed(WrapperLayer):
    """Add perturbations to the outputs of some layers inside a model, and return these outputs too.

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
        KeyNameError: If there is no layer at a path, or a perturbation has another name.

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
            raise out_of_range("paths", paths, "one or more paths of layers", fix='Perturbed(model, "layer_1")')
        self._tapped  # noqa: B018  # a path without a layer is an error now

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[tuple[Any, dict[str, Any]], States]:
        """Return the output with what the layers inside return, and the new states."""
        if not (isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], Mapping)):
            raise InputError(
                "The input of a perturbed model must be a tuple (x, perturbations), the latter a dict by path.",
                got=described(x),
                fix="Without perturbations: model((x, {}), ps, st).",
            )
        x, perturbations = x
        for path in perturbations:
            if path not in self.paths:
                raise unknown_name(path, self.paths, "perturbed layer")
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
"""Layers that only hold others for the container around them, and are not called with an input."""


@compile_constant
def layer_paths(layer: Layer, paths: Sequence[Name]) -> tuple[str, ...]:
    """Return paths of layers inside, with globs and predicates replaced by the paths that they match.

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
    """Yield the paths of the layers inside that can have a `Tap`, and of modules of torch.nn inside these."""
    # These do not pass states with taps to the layers inside.
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
    """Compute outputs of layers inside a model, and the gradients of a loss with respect to them.

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
            "model must be an lt.Perturbed.", got=f"a {type(model).__name__}", fix='lt.Perturbed(model, "layer_1")'
        )
    (_, outputs), _ = model((x, {}), ps, st)

    def of_perturbations(perturbations: dict[str, Any]) -> Tensor:
        (y, _), _ = model((x, perturbations), ps, st)
        return loss(y)

    return outputs, torch.func.grad(of_perturbations)(tree_map(torch.zeros_like, outputs))
