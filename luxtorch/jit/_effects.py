"""Operators with effects, such as printing: they run at each call of a program, in order, needed or not."""

from __future__ import annotations

from operator import getitem
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


def with_tokens(graph: fx.GraphModule) -> None:
    """Chain the operators with effects, in place in the graph, so that Inductor keeps them and their order."""
    from torch._higher_order_ops.effects import with_effects

    nodes = [node for node in graph.graph.nodes if is_effect(node)]
    if not nodes:
        return
    prims = torch.ops.prims
    with graph.graph.inserting_before(nodes[0]):
        token = graph.graph.call_function(prims._make_token.default)
        token.meta["val"] = torch.empty(0)
    for node in nodes:
        with graph.graph.inserting_before(node):
            call = graph.graph.call_function(with_effects, (token, node.target, *node.args), node.kwargs)
            token = graph.graph.call_function(getitem, (call, 0))
            result = graph.graph.call_function(getitem, (call, 1))
        value = node.meta.get("val")
        call.meta["val"], token.meta["val"], result.meta["val"] = (torch.empty(0), value), torch.empty(0), value
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
        if not result.users:
            graph.graph.erase_node(result)
    with graph.graph.inserting_before(graph.graph.output_node()):
        graph.graph.call_function(prims._sink_tokens.default, ([token],))
    graph.recompile()
