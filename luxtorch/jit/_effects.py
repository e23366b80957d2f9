"""Operators with effects, such as printing: they run at each call of a program, in order, needed or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._library.effects import EffectType

EFFECTS: set[Any] = set()
"""The operators of luxtorch that have effects."""


def register_effect(operator: Any) -> None:
    """Let all compilers keep the calls of an operator, and their order."""
    EFFECTS.add(operator)
    torch.library._register_effectful_op(operator, EffectType.ORDERED)


def has_effects(graph: fx.GraphModule) -> bool:
    """Tell whether an operator of a graph has effects."""
    return any(is_effect(node) for node in graph.graph.nodes)


def is_effect(node: fx.Node) -> bool:
    """Tell whether a node of a graph has effects."""
    return node.op == "call_function" and node.target in EFFECTS
