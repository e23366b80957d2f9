"""A training state in notebooks."""

from __future__ import annotations

from luxtorch.core._html import plain, section, shown
from luxtorch.core._outline import tree_html

from ._train_state import TrainState, progress


def train_state_html(ts: TrainState) -> str:
    """Return a training state as HTML: how far it is, its model, its optimizer, its parameters and its states."""
    trees = ts._trees
    if trees is None:
        return plain(repr(ts))  # it was given away
    parameters, states = tree_html(trees.parameters, "parameters"), tree_html(trees.states, "states")
    parts = [shown(ts.model), plain(repr(trees.optimizer_state)), parameters, states]
    return section("TrainState", parts, progress(trees))
