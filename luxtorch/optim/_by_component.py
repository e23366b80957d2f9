"""Taking the state of flat vectors apart, so that their components can be treated differently."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from luxtorch.components import Axes
from luxtorch.core import InputError, tree_map

from ._fused import Slots
from ._leaves import components
from ._opt_state import OptState
from ._rule_state import RuleState


def by_component(opt_state: OptState) -> OptState:
    """Return a state in which the components of each ComponentVector are leaves of their own.

    Such a state steps as that of a dict of the same components would, bit for bit. The parameters stay one vector.

    Raises:
        InputError: If a part of the state is torchopt's own, which cannot be taken apart.
    """
    layout = opt_state.layout
    if layout.by_component or not layout.vectors:
        return opt_state
    vectors = dict(layout.vectors)

    def split(node: Any) -> Any:
        if isinstance(node, RuleState):
            return _split_rule_state(node, vectors, layout.in_parts)
        raise InputError(
            "The components of a ComponentVector cannot be told apart in the state of a torchopt optimizer.",
            fix="Optimize ps.to_dict(), or use a rule of luxtorch.optim.",
        )

    state = tree_map(split, opt_state.state, is_leaf=lambda node: isinstance(node, RuleState))
    return OptState(layout._replace(by_component=True), state)


def _split_rule_state(state: RuleState, vectors: Mapping[str, Axes], in_parts: Collection[str]) -> RuleState:
    # Where a state is that of many models, from vmap, all of it has leading dimensions. A slot with no more than
    # these is a count, of which every component gets one; the others hold a number for each element of the vector.
    assert isinstance(state.hyper, Tensor)  # by parameter only once the vectors are apart
    batch_ndim = state.hyper.ndim - 1
    leaves: dict[str, Slots] = {}
    for name, slots in state.leaves.items():
        if name not in vectors:
            leaves[name] = slots
            continue
        parts = components(name, vectors[name])
        sizes = [prod(shape) for shape in parts.values()]
        pieces: dict[str, list[Tensor]] = {}
        for slot, value in slots.items():
            if value.ndim > batch_ndim:
                dim = value.ndim - 1 - (name in in_parts)
                pieces[slot] = [
                    piece.reshape(*value.shape[:dim], *shape, *value.shape[dim + 1 :])
                    for piece, shape in zip(torch.split(value, sizes, dim), parts.values(), strict=True)
                ]
        for i, part in enumerate(parts):
            leaves[part] = {slot: pieces[slot][i] if slot in pieces else value.clone() for slot, value in slots.items()}
    return state._replace(leaves=leaves)
