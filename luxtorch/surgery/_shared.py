"""Share (tie) parameters between places of a model: `Shared`, `share_parameters` and `unshare_parameters`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, equal

from luxtorch.core import InputError, Layer, Parameters, States, flatten_names, tree_map, unflatten_names
from luxtorch.core._paths import Name, places
from luxtorch.core._statistics import physical
from luxtorch.core._tree import META_KEY
from luxtorch.layers._containers import as_layer

from ._partition import closed, merged, ordered, taken
from ._rewired import Rewired, Triple, everywhere, names_of, opened


class Shared(Rewired):
    """Call a layer in which parameters of several places are one and the same.

    To share parameters of a model that is set up, call `share_parameters`.

    Args:
        layer: A layer or a plain function.
        *groups: For each group of places that are one, their dotted paths: of parameters, or of layers with the same
            parameters. The parameters stand in the first of the places. A glob such as `"layers.*.attention"`, or a
            predicate on the names of parameters, stands for all places that it finds; see `freeze`.

    Parameters:
        Those of the layer, without those of all places but the first of each group. A layer inside with nothing left
        keeps an empty dict.

    States:
        Those of the layer, not nested.

    Shape:
        What the layer takes to what it returns.

    Raises:
        KeyNameError: If a path stands for no parameter.
        InputError: If the parameters of a group differ in names, shapes or dtypes, or a parameter is in two places.

    Example:
        >>> import torch, luxtorch as lt
        >>> inside = lt.Chain(embed=lt.Embedding(50, 8), mix=lt.Dense(8, 8, torch.tanh), logits=lt.Dense(8, 50))
        >>> model = lt.Shared(inside, ("embed.weight", "logits.weight"))
        >>> ps, st = lt.setup(0, model)
        >>> list(lt.flatten_names(ps))
        ['embed.weight', 'mix.weight', 'mix.bias', 'logits.bias']

    Source: Press and Wolf, "Using the output embedding to improve language models", 2017, for the example.
    """

    layer: Layer
    groups: tuple[tuple[str, ...], ...]

    undone: ClassVar[str] = "Call lt.unshare_parameters first, and share again after the change."

    def __init__(self, layer: Layer | Callable[[Any], Any], *groups: Name | Sequence[Name]) -> None:
        layer = as_layer(layer)
        names, found = names_of(layer), []
        for group in groups or [()]:
            paths = group if isinstance(group, Sequence) and not isinstance(group, str) else (group,)
            named = all(isinstance(path, str) or callable(path) for path in paths)
            found.append(tuple(place for path in paths for place in places(path, names)) if named else ())
            if len(found[-1]) < 2:
                raise InputError(
                    "A group of shared parameters must have at least two places.",
                    expected="at least one group of at least two, such as ('embed.weight', 'logits.weight')",
                    got=f"{group!r:.80}" if groups else "no group",
                    fix="Put the paths of a group in parentheses." * isinstance(group, str),
                )
        self._set(layer=layer, groups=tuple(found))
        self.copies  # noqa: B018  # what is wrong with the groups is an error now

    @cached_property
    def copies(self) -> dict[str, str]:
        """The names of the parameters that the model sees in a second place, each with the one in the first."""
        like = flatten_names(self.layer.initial_parameters(META_KEY))
        copies: dict[str, str] = {}
        seen: Counter[str] = Counter()
        for group in self.groups:
            first, *others = (_below(path, like) for path in group)
            seen.update(first.values())
            for path, other in zip(group[1:], others, strict=True):
                _require_alike(group[0], first, path, other, like)
                seen.update(other.values())
                copies.update({other[name]: first[name] for name in first})
        twice = [name for name, times in seen.items() if times > 1]
        if twice:
            raise InputError(
                "Groups of shared parameters must not overlap.",
                expected="places that have nothing in common",
                got=f"'{twice[0]}' in both",
                fix="Make one group of the two.",
            )
        return copies

    @cached_property
    def _sources(self) -> dict[str, Any]:
        """The paths of the shared parameters, nested as the places that the model sees them in."""
        return unflatten_names({copy: tuple(source.split(".")) for copy, source in self.copies.items()})

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return those of the layer, the shared ones once."""
        return taken(self.layer.initial_parameters(key), self.copies)[0]

    def plain(self, ps: Parameters, st: States) -> tuple[dict[str, Any], Any]:
        """Return the parameters with the shared ones in all their places, and the states."""
        return merged(ps, _looked_up(self._sources, ps)), st

    def around(self, layer: Layer, ps: dict[str, Any], st: dict[str, Any]) -> Triple:
        """Share the same places of another layer.

        Raises:
            InputError: If the parameters there are not the same.
        """
        values = flatten_names(ps)
        for copy, source in self.copies.items():
            if copy not in values or source not in values or not _equal(values[copy], values[source]):
                raise InputError(
                    f"'{source}' and '{copy}' are shared, and would not be the same any more.",
                    expected="a change that leaves shared parameters alone, or changes all of them alike",
                    fix=self.undone,
                )
        return Shared(layer, *self.groups), taken(ps, self.copies)[0], st

    def extra_repr(self) -> str:
        """Return the groups."""
        return ", ".join(map(str, self.groups))


def share_parameters(
    layer: Layer, ps: Parameters, st: States, *groups: Name | Sequence[Name]
) -> tuple[Layer, Any, dict[str, Any]]:
    """Make parameters in several places of a model one.

    The parameters then stand in `ps` once, in the first place. So they stay shared whatever is done to `ps`: by an
    optimizer, a `ComponentVector`, a checkpoint, another device. Their gradient is the sum of those in all places.

    Args:
        layer: The model.
        ps: Its parameters.
        st: Its states.
        *groups: For each group of places that become one, their dotted paths: of parameters, or of layers with the
            same parameters. A glob such as `"layers.*.attention"`, or a predicate on the names of parameters, stands
            for all places that it finds; see `freeze`.

    Returns:
        `(layer, ps, st)`: the model as `Shared`, with its trees; what was passed in stays as it is. The values are
        those of the first place of each group.

    Raises:
        KeyNameError: If a path stands for no parameter, or the trees' names are not those of the model.
        InputError: If the parameters of a group differ in names, shapes or dtypes, or a parameter is in two places.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(*[lt.Dense(8, 8, torch.tanh)] * 3)
        >>> ps, st = lt.setup(0, model)
        >>> model, ps, st = lt.share_parameters(model, ps, st, ("layer_1", "layer_3"))
        >>> list(lt.flatten_names(ps))
        ['layer_1.weight', 'layer_1.bias', 'layer_2.weight', 'layer_2.bias']
        >>> y, st = model(torch.ones(4, 8), ps, st)

    Source: Lux's `Experimental.share_parameters`, which puts one array in several places of `ps`: that is undone
    silently by whatever copies it.
    """
    own_ps, own_st = opened("share_parameters(layer, ps, st, *groups)", layer, ps, st)
    shared = Shared(layer, *groups)
    return shared, closed(taken(own_ps, shared.copies)[0], ps), own_st


def unshare_parameters(layer: Layer, ps: Parameters, st: States) -> tuple[Layer, Any, dict[str, Any]]:
    """Give each place of a model parameters of its own: the inverse of `share_parameters`.

    Args:
        layer: The model; it, or layers inside, are `Shared`.
        ps: Its parameters.
        st: Its states.

    Returns:
        `(layer, ps, st)`; the places start with equal values.

    Raises:
        KeyNameError: If the trees' names are not those of the model.

    Example:
        >>> import luxtorch as lt
        >>> model = lt.Chain(lt.Dense(8, 8), lt.Dense(8, 8))
        >>> ps, st = lt.setup(0, model)
        >>> shared, ps, st = lt.share_parameters(model, ps, st, ("layer_1.weight", "layer_2.weight"))
        >>> same, ps, st = lt.unshare_parameters(shared, ps, st)
        >>> same == model, bool((ps["layer_1"]["weight"] == ps["layer_2"]["weight"]).all())
        (True, True)
    """

    def change(layer: Layer, ps: Any, st: Any, path: str) -> Triple | None:
        if not isinstance(layer, Shared):
            return None
        # Of its own is not only by name: what is written over the one must not be seen in the other.
        copied = tree_map(lambda leaf: leaf.clone(), _looked_up(layer._sources, ps))
        return everywhere(change, layer.layer, merged(ps, copied), st, path)

    own_ps, own_st = opened("unshare_parameters(layer, ps, st)", layer, ps, st)
    layer, own_ps, own_st = everywhere(change, layer, own_ps, own_st)
    return layer, closed(ordered(own_ps, layer.initial_parameters(META_KEY)), ps), own_st


def _looked_up(sources: Mapping[str, Any], ps: Parameters) -> dict[str, Any]:
    """Return a tree of paths with what stands in `ps` at each."""
    found: dict[str, Any] = {}
    for name, entry in sources.items():
        if isinstance(entry, tuple):
            found[name] = ps
            for part in entry:
                found[name] = found[name][part]
        else:
            found[name] = _looked_up(entry, ps)
    return found


def _below(path: str, like: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names of the parameters that a path stands for, by what they are called below it."""
    names = [name for name in like if name == path or name.startswith(f"{path}.")]
    return {name.removeprefix(path).lstrip("."): name for name in names}


def _require_alike(
    place: str, first: Mapping[str, str], path: str, other: Mapping[str, str], like: Mapping[str, Tensor]
) -> None:
    described = [
        {below: (tuple(like[name].shape), like[name].dtype) for below, name in names.items()}
        for names in (first, other)
    ]
    if described[0] != described[1]:
        expected, got = (
            ", ".join(f"{place}.{name} {shape}, {dtype}".replace(". ", " ") for name, (shape, dtype) in these.items())
            for place, these in zip((place, path), described, strict=True)
        )
        raise InputError(
            f"The parameters of '{place}' and '{path}' differ.",
            expected=f"the same names, shapes and dtypes as {expected}",
            got=got,
            fix="Share those parameters alone that are alike, by their own paths.",
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other or one.shape != other.shape or one.dtype != other.dtype:
        return one is other
    # Under vmap, that of all models at once.
    whole, other_whole = physical(one), physical(other)
    return whole.shape == other_whole.shape and equal(whole, other_whole)
