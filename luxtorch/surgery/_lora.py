"""Low-rank adaptation of weights: `LoRA`, `lora` and `merge_lora`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from luxtorch.core import InputError, Layer, Parameters, States, flatten_names, out_of_range, unflatten_names
from luxtorch.core._paths import Path
from luxtorch.core._tree import META_KEY
from luxtorch.init import Initializer, kaiming_uniform
from luxtorch.layers._containers import as_layer
from luxtorch.random import Rng, as_key, fold_in

from ._frozen import frozen_names, unfrozen, with_frozen
from ._partition import closed, join, ordered
from ._rewired import Rewired, Triple, everywhere, layers_of, matrices, opened, require_shapes

_BASE, _A, _B = "base", "lora_A", "lora_B"
_PARTS = frozenset((_BASE, _A, _B))

_Make: TypeAlias = Callable[[str, Any], Any]


class LoRA(Rewired):
    """Call a layer, some of whose weights are a base plus a product of two thin matrices.

    `weight = base + alpha / rank * (lora_B @ lora_A)`, the product in the weight's shape. It starts as the layer itself
    would, since `lora_B` starts at zero. To adapt a model that is set up, and freeze the rest of it, call `lora`.

    Args:
        layer: A layer or a plain function.
        *paths: Which weights: dotted paths such as `"layer_1"`, which stand for everything below them, globs such as
            `"*.attention"`, predicates on dotted names, or lists of these; see `freeze`. Of these, all with at least
            two dimensions; without paths, of all parameters.
        rank: The size that both matrices share.
        alpha: The scale of the change, divided by the rank; `rank` if None.
        init_weight: The initializer of `lora_A`.

    Parameters:
        Those of the layer, with a dict in the place of each weight: `base` of the weight's shape (out, ...), `lora_A`
        (rank, in) where `in` is the product of the other dimensions, and `lora_B` (out, rank).

    States:
        Those of the layer, not nested.

    Shape:
        What the layer takes to what it returns.

    Raises:
        KeyNameError: If a path stands for no parameter.
        InputError: If the rank is not at least 1, or no parameter has two dimensions.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.LoRA(lt.Dense(100, 50), rank=4)
        LoRA('weight', rank=4,
            Dense(100 -> 50),     # 5_650 parameters: weight.base (50, 100), weight.lora_A (4, 100), weight.lora_B (50, 4), bias (50,)
        )                         # total: 5_650 parameters

    Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2021.
    """  # noqa: E501

    layer: Layer
    names: tuple[str, ...]
    rank: int
    alpha: float
    init_weight: Initializer

    undone: ClassVar[str] = "Call lt.merge_lora first, and lt.lora again after the change."

    def __init__(
        self,
        layer: Layer | Callable[[Any], Any],
        *paths: Path,
        rank: int = 8,
        alpha: float | None = None,
        init_weight: Initializer = kaiming_uniform(gain=1.0),  # noqa: B008  # a value
    ) -> None:
        if isinstance(rank, bool) or not (isinstance(rank, int) and rank >= 1):
            raise out_of_range("rank", rank, "a whole number of at least 1")
        layer = as_layer(layer)
        names = tuple(matrices(paths, flatten_names(layer.initial_parameters(META_KEY))))
        self._set(
            layer=layer, names=names, rank=rank, alpha=float(rank if alpha is None else alpha), init_weight=init_weight
        )

    @cached_property
    def _places(self) -> dict[str, Any]:
        """The places of the weights, nested."""
        return unflatten_names(dict.fromkeys(self.names))

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return those of the layer, the weights taken apart."""
        return self.taken_apart(key, self.layer.initial_parameters(key))

    def taken_apart(self, key: Tensor, ps: dict[str, Any]) -> dict[str, Any]:
        """Return parameters of the layer with a base and two new matrices in the place of each weight."""
        weights = flatten_names(ps)
        parts = {}
        for name in self.names:
            base = weights[name]
            shape = (self.rank, math.prod(base.shape[1:]))
            a = self.init_weight(fold_in(key, f"{name}.{_A}"), shape).to(base.device, base.dtype)
            parts[name] = {_BASE: base, _A: a, _B: base.new_zeros(base.shape[0], self.rank)}
        return _replaced(ps, self._places, lambda name, _: parts[name])

    def plain(self, ps: Parameters, st: States) -> tuple[dict[str, Any], Any]:
        """Return the parameters with the weights put together, and the states."""
        return _replaced(ps, self._places, lambda _, parts: self._weight(parts)), st

    def _weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        if not isinstance(parts, Mapping) or parts.keys() != _PARTS:
            raise KeyError(_BASE)
        base = parts[_BASE]
        return base + self.alpha / self.rank * (parts[_B] @ parts[_A]).reshape(base.shape)

    def extra_repr(self) -> str:
        """Return the names of the weights and the sizes."""
        names = [*map(repr, self.names[:4]), *([f"... ({len(self.names)} in all)"] if len(self.names) > 4 else [])]
        scale = [] if self.alpha == self.rank else [f"alpha={self.alpha:g}"]
        return ", ".join([*names, f"rank={self.rank}", *scale])


def lora(
    layer: Layer,
    ps: Parameters,
    st: States,
    *paths: Path,
    rng: Rng,
    rank: int = 8,
    alpha: float | None = None,
    init_weight: Initializer = kaiming_uniform(gain=1.0),  # noqa: B008  # a value
) -> tuple[Layer, Any, dict[str, Any]]:
    """Adapt a model by low-rank changes of its weights, and freeze all else.

    The model computes what it did before, and `ps` holds what is to be trained: two thin matrices for each weight. To
    train other parameters as well, call `unfreeze` with their paths. Each call puts the weights together, which takes
    little beside a matrix product of many rows.

    Args:
        layer: The model.
        ps: Its parameters.
        st: Its states.
        *paths: Which weights: dotted paths such as `"layer_1"`, which stand for everything below them, globs such as
            `"*.attention"`, predicates on dotted names, or lists of these; see `freeze`. Of these, all with at least
            two dimensions; without paths, of all parameters. Of an
            `Ensemble`, a weight is that of all members, so that the change would be low-rank over all: adapt the
            member instead.
        rng: A seed, a key or a `torch.Generator`, which is moved on.
        rank: The size that both matrices share.
        alpha: The scale of the change, divided by the rank; `rank` if None.
        init_weight: The initializer of the first matrix. The second starts at zero.

    Returns:
        `(layer, ps, st)`: the model as `Frozen` around `LoRA`, with its trees; what was passed in stays as it is.

    Raises:
        KeyNameError: If a path stands for no parameter, or the trees' names are not those of the model.
        InputError: If the rank is not at least 1, no parameter has two dimensions, a weight has not the shape that it
            has in the layer, or the model is adapted already.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Dense(64, 64, torch.tanh), lt.Dense(64, 10))
        >>> ps, st = lt.setup(0, model)
        >>> adapted, few, st = lt.lora(model, ps, st, "layer_1", rng=1, rank=4)
        >>> list(lt.flatten_names(few)), lt.parameter_length(few)
        (['layer_1.weight.lora_A', 'layer_1.weight.lora_B'], 512)
        >>> adapted, few, st = lt.unfreeze(adapted, few, st, "layer_2")  # and the last layer as a whole

    Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2021. The names and the first values are
    those of Hugging Face's PEFT.
    """
    own_ps, own_st = opened("lora(layer, ps, st, *paths, rng=...)", layer, ps, st)
    if _is_adapted(layer):
        raise InputError("The model must not be adapted already.", expected="a model without LoRA", fix=LoRA.undone)
    layer, own_ps, own_st = unfrozen(layer, own_ps, own_st, frozen_names(layer))
    adapted = LoRA(layer, *paths, rank=rank, alpha=alpha, init_weight=init_weight)
    require_shapes(layer, own_ps, adapted.names)
    apart = adapted.taken_apart(as_key(rng), own_ps)
    trained = {f"{name}.{part}" for name in adapted.names for part in (_A, _B)}
    rest = [name for name in flatten_names(apart) if name not in trained]
    layer, own_ps, own_st = with_frozen(adapted, apart, own_st, rest)
    return layer, closed(own_ps, ps), own_st


def merge_lora(layer: Layer, ps: Parameters, st: States) -> tuple[Layer, Any, dict[str, Any]]:
    """Put the low-rank changes of an adapted model into its weights: the plain model, which computes the same.

    Args:
        layer: The model; it, or layers inside, are what `lora` returned, or `LoRA`.
        ps: Its parameters.
        st: Its states.

    Returns:
        `(layer, ps, st)`: the model as it was before `lora`, with the weights as they are now. Nothing in it is frozen.

    Raises:
        KeyNameError: If the trees' names are not those of the model.
        InputError: If nothing in the model is adapted.

    Example:
        >>> import luxtorch as lt
        >>> model = lt.Dense(64, 10)
        >>> ps, st = lt.setup(0, model)
        >>> same, merged_ps, st = lt.merge_lora(*lt.lora(model, ps, st, rng=1))
        >>> same == model, list(merged_ps), st
        (True, ['weight', 'bias'], {})

    Source: `merge_and_unload` of Hugging Face's PEFT.
    """

    def change(layer: Layer, ps: Any, st: Any, _: str) -> Triple | None:
        return (layer.layer, *layer.plain(ps, st)) if isinstance(layer, LoRA) else None

    own_ps, own_st = opened("merge_lora(layer, ps, st)", layer, ps, st)
    if not _is_adapted(layer):
        raise InputError("Nothing in the model is adapted.", expected="a model from lt.lora", got=type(layer).__name__)
    layer, own_ps, own_st = everywhere(change, *unfrozen(layer, own_ps, own_st, frozen_names(layer)))
    return layer, closed(ordered(own_ps, layer.initial_parameters(META_KEY)), ps), own_st


def _is_adapted(layer: Layer) -> bool:
    return any(isinstance(inner, LoRA) for _, inner in layers_of(layer))


def _replaced(tree: Mapping[str, Any], places: Mapping[str, Any], make: _Make, path: str = "") -> dict[str, Any]:
    """Return a tree with something else in some places: what a function makes of the name and what stands there."""
    new = dict(tree)
    for name, below in places.items():
        where = join(path, name)
        new[name] = make(where, tree[name]) if below is None else _replaced(tree[name], below, make, where)
    return new
