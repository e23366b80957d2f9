"""Freeze parameters, so that no optimizer sees them: `Frozen`, `freeze` and `unfreeze`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from luxtorch._torch import is_view
from luxtorch.core import InputError, Layer, Parameters, States, flatten_names, tree_map
from luxtorch.core._paths import Path, select_any
from luxtorch.core._tree import META_KEY
from luxtorch.layers._containers import as_layer

from ._partition import closed, join, merged, ordered, pruned, taken
from ._rewired import Rewired, Triple, everywhere, layers_of, names_of, opened


class Frozen(Rewired):
    """Call a layer, some of whose parameters are kept among the states, where no optimizer changes them.

    To freeze parameters of a model that is set up, call `freeze`. Running statistics are not parameters: a `BatchNorm`
    in training mode goes on moving its own.

    Args:
        layer: A layer or a plain function.
        *paths: What to freeze: dotted paths such as `"layer_1"`, which stand for everything below them, globs such as
            `"*.bias"`, predicates on dotted names, or lists of these; see `freeze`. Without any, all parameters.

    Parameters:
        Those of the layer but the frozen ones. A layer inside with nothing left keeps an empty dict.

    States:
        frozen_params: The frozen ones, nested as in the layer's parameters. (With underscores at the end where the
            layer has a state of that name.) The layer returns them as they came, so that derivatives by what they
            were made of pass; all other states are detached, as everywhere.

        Besides, those of the layer, not nested.

    Shape:
        What the layer takes to what it returns.

    Raises:
        KeyNameError: If a path stands for no parameter.

    Example:
        >>> import torch, luxtorch as lt
        >>> backbone = lt.Chain(lt.Dense(2, 8, torch.tanh), lt.Dense(8, 8))
        >>> model = lt.Chain(lt.Frozen(backbone), lt.Dense(8, 1))
        >>> ps, st = lt.setup(0, model)
        >>> list(lt.flatten_names(ps))
        ['layer_2.weight', 'layer_2.bias']
        >>> list(lt.flatten_names(st))[:2]
        ['layer_1.frozen_params.layer_1.weight', 'layer_1.frozen_params.layer_1.bias']

    Source: Lux's `Experimental.FrozenLayer`, whose states are nested.
    """

    layer: Layer
    names: tuple[str, ...]

    undone: ClassVar[str] = "Call lt.unfreeze first."

    def __init__(self, layer: Layer | Callable[[Any], Any], *paths: Path) -> None:
        layer = as_layer(layer)
        self._set(layer=layer, names=tuple(select_any(paths, names_of(layer))))

    @cached_property
    def place(self) -> str:
        """The name of the frozen parameters among the states."""
        name = "frozen_params"
        while name in self.layer._names[1]:
            name += "_"
        return name

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return those that are not frozen."""
        return taken(self.layer.initial_parameters(key), self.names)[0]

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return the states of the layer, and the frozen parameters; states have a key of their own to draw from."""
        frozen = pruned(taken(self.layer.initial_parameters(key), self.names)[1])
        return {**self.layer.initial_states(key), self.place: frozen}

    def plain(self, ps: Parameters, st: States) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return all parameters of the layer, and its states."""
        return merged(ps, st[self.place]), {name: entry for name, entry in st.items() if name != self.place}

    def kept(self, new: States, st: States) -> States:
        """Return the new states with the same frozen parameters."""
        return {name: entry if name == self.place else new[name] for name, entry in st.items()}

    def around(self, layer: Layer, ps: dict[str, Any], st: dict[str, Any]) -> Triple:
        """Freeze the same names of another layer.

        Raises:
            InputError: If it has none of a name.
        """
        lost = [name for name in self.names if name not in flatten_names(ps)]
        if lost:
            raise InputError(
                f"The frozen parameter '{lost[0]}' would be lost.",
                expected="a change that leaves the names of frozen parameters as they are",
                got=f"a {type(layer).__name__} with {', '.join(flatten_names(ps)) or 'no parameters'}",
                fix=self.undone,
            )
        return with_frozen(layer, ps, st, self.names)

    def extra_repr(self) -> str:
        """Return the names of what is frozen."""
        shown = ", ".join(map(repr, self.names[:4]))
        return shown + (f", ... ({len(self.names)} in all)" if len(self.names) > 4 else "")


def freeze(layer: Layer, ps: Parameters, st: States, *paths: Path) -> tuple[Layer, Any, dict[str, Any]]:
    """Freeze parameters of a model: they move from the parameters to the states.

    Whatever then takes the parameters, be it a gradient, an optimizer or a `ComponentVector`, sees only the others.
    That is a matter of what is an argument, not of what is differentiable: inside of a transform, or on an autograd
    tape, derivatives by what the frozen parameters were made of are those of the plain model.

    Args:
        layer: The model.
        ps: Its parameters.
        st: Its states.
        *paths: What to freeze. Without any, all parameters; what is frozen already stays so. One of them is

            - a dotted path such as `"layer_1"`, which stands for everything below it;
            - a glob such as `"*.bias"` or `"encoder.block_?.norm"`, which stands for all that it matches and everything
              below that. As in `fnmatch.fnmatchcase`, `*` is any number of characters and `?` is one, dots among them;
              `[ab]` is one of these, `[!ab]` any other. What is literally so called comes first;
            - a predicate on dotted names;
            - a list, tuple or set of these, for what any of them stands for.

    Returns:
        `(layer, ps, st)`: the model as `Frozen`, with its trees; what was passed in stays as it is.

    Raises:
        KeyNameError: If a path stands for no parameter, or the trees' names are not those of the model.
        DTypeError: If something is not a path.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Dense(2, 8, torch.tanh), lt.Dense(8, 1))
        >>> ps, st = lt.setup(0, model)
        >>> model, ps, st = lt.freeze(model, ps, st, "layer_1", "layer_2.bias")
        >>> list(lt.flatten_names(ps)), list(st)
        (['layer_2.weight'], ['layer_1', 'layer_2', 'frozen_params'])
        >>> y, st = model(torch.ones(4, 2), ps, st)

    Source: Lux's `Experimental.freeze`, which ignores unknown names. `lt.optim.freeze` leaves the parameters where they
    are, and only the optimizer leaves them alone.
    """
    own_ps, own_st = opened("freeze(layer, ps, st, *paths)", layer, ps, st)
    names: Collection[str] = ()
    if isinstance(layer, Frozen):
        names, (own_ps, own_st) = layer.names, layer.plain(own_ps, own_st)
        layer = layer.layer
    names = {*names, *select_any(paths, names_of(layer))}
    layer, own_ps, own_st = with_frozen(layer, own_ps, own_st, names)
    return layer, closed(own_ps, ps), own_st


def unfreeze(layer: Layer, ps: Parameters, st: States, *paths: Path) -> tuple[Layer, Any, dict[str, Any]]:
    """Make frozen parameters of a model trainable again: the inverse of `freeze`.

    Args:
        layer: The model; it, or layers inside, are `Frozen`.
        ps: Its parameters.
        st: Its states.
        *paths: Which of the frozen parameters; see `freeze`. Without any, all.

    Returns:
        `(layer, ps, st)`; the model itself, without `Frozen`, where nothing is frozen any more.

    Raises:
        KeyNameError: If a path stands for no frozen parameter, or the trees' names are not those of the model.

    Example:
        >>> import luxtorch as lt
        >>> model = lt.Dense(2, 8)
        >>> ps, st = lt.setup(0, model)
        >>> frozen, some, st = lt.freeze(model, ps, st, "weight")
        >>> same, all_of_them, st = lt.unfreeze(frozen, some, st)
        >>> same == model, list(all_of_them), st
        (True, ['weight', 'bias'], {})

    Source: Lux's `Experimental.unfreeze`.
    """
    own_ps, own_st = opened("unfreeze(layer, ps, st, *paths)", layer, ps, st)
    names = select_any(paths, frozen_names(layer), "frozen parameter")
    layer, own_ps, own_st = unfrozen(layer, own_ps, own_st, names)
    return layer, closed(own_ps, ps), own_st


def frozen_names(layer: Layer) -> list[str]:
    """Return the dotted names of all frozen parameters of a model."""
    frozen = ((path, inner) for path, inner in layers_of(layer) if isinstance(inner, Frozen))
    return [join(path, name) for path, inner in frozen for name in inner.names]


def unfrozen(layer: Layer, ps: dict[str, Any], st: dict[str, Any], names: Collection[str]) -> Triple:
    """Return a model with some of its frozen parameters among the others."""

    def change(layer: Layer, ps: Any, st: Any, path: str) -> Triple | None:
        if not isinstance(layer, Frozen) or not any(join(path, name) in names for name in layer.names):
            return None
        remaining = [name for name in layer.names if join(path, name) not in names]
        inside = everywhere(change, layer.layer, *layer.plain(ps, st), path)
        return with_frozen(*inside, remaining)

    layer, ps, st = everywhere(change, layer, ps, st)
    return layer, ordered(ps, layer.initial_parameters(META_KEY)), st


def with_frozen(layer: Layer, ps: dict[str, Any], st: dict[str, Any], names: Collection[str]) -> Triple:
    """Return a layer with some of its parameters frozen; as it is without names."""
    if not names:
        return layer, ps, st
    frozen = Frozen(layer, *names)
    rest, chosen = taken(ordered(ps, layer.initial_parameters(META_KEY)), names)
    # A view would keep the whole of a ComponentVector in memory, and in each file. Nothing is detached: to freeze says
    # what is an argument, and a transform or a tape around it sees through.
    alone = tree_map(lambda leaf: leaf.clone() if is_view(leaf) else leaf, pruned(chosen))
    return frozen, rest, {**st, frozen.place: alone}
