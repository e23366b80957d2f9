"""A body and its derivative as two bodies: the first also returns what the second needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from luxtorch._torch import outside_transforms
from luxtorch.jit._bodies import traced_body
from luxtorch.jit._effects import is_effect

_aten = torch.ops.aten

# What is computed again rather than saved, where what it is computed of is at hand.
_CHEAP = frozenset(
    (
        _aten.neg.default,
        _aten.rsub.Scalar,
        _aten.add.Scalar,
        _aten.sub.Scalar,
        _aten.mul.Scalar,
        _aten.div.Scalar,
        _aten.add.Tensor,
        _aten.sub.Tensor,
        _aten.mul.Tensor,
        _aten._to_copy.default,
        _aten.zeros_like.default,
        _aten.ones_like.default,
        _aten.full_like.default,
        _aten.clone.default,
    )
)


@dataclass(frozen=True)
class Split:
    """The two bodies, as functions of tensors.

    Attributes:
        forward: Takes the arguments and the constants to the results, and what is saved.
        backward: Takes the slopes, what is saved, the arguments that are used again, and the constants, to the slopes
            of the arguments.
        again: Which arguments are used again.
        saved: How many tensors are saved.
        constants: What both take after all else.
    """

    forward: Any
    backward: Any
    again: list[int]
    saved: int
    constants: list[Tensor]


def split(
    joint: Callable[..., Sequence[Tensor]], like: Sequence[Tensor], inputs: int, outputs: int, kept: Sequence[int]
) -> Split | None:
    """Split a function into its results and its slopes.

    Args:
        joint: Takes arguments, and slopes of the results, to the results, and slopes of the arguments.
        like: Tensors of the shapes of all of these.
        inputs: How many are arguments.
        outputs: How many of the results come first.
        kept: Arguments that are there for the slopes without being saved.

    Returns:
        The parts, or None if the function cannot be split, since it writes into memory.
    """
    with outside_transforms():
        body, constants = traced_body(joint, like)
        if _writes(body.graph):
            first = body  # with what its operators call
            functional = torch.func.functionalize(lambda *tensors: list(first.graph(*tensors)))
            body, _ = traced_body(functional, [*like, *constants])
            if _writes(body.graph):
                return None
    graph = body.graph.graph
    placeholders = graph.find_nodes(op="placeholder")
    arguments, slopes, rest = placeholders[:inputs], placeholders[inputs : len(like)], placeholders[len(like) :]
    results: Any = graph.output_node().args[0]
    later = set(slopes)  # what depends on the slopes
    fixed = {*(arguments[i] for i in kept), *rest}  # what depends on nothing but what need not be saved
    at_hand = set(fixed)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if any(source in later for source in node.all_input_nodes):
            later.add(node)
        elif all(source in fixed for source in node.all_input_nodes):
            fixed.add(node)
    needed = [node for node in graph.nodes if node not in later and any(user in later for user in node.users)]
    needed += [node for node in results[outputs:] if node not in later]

    def cheap(node: fx.Node) -> bool:
        return node in fixed or node.target in _CHEAP or _is_view(node)

    saved = dict.fromkeys(node for node in needed if node not in at_hand and not cheap(node))

    def computed() -> set[fx.Node]:
        """Return what can be computed again at little cost."""
        found = {*at_hand, *saved}
        for node in graph.nodes:
            simple = node.op == "call_function" and node not in later and isinstance(node.meta.get("val"), Tensor)
            if simple and cheap(node) and all(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    there = computed()
    for node in needed:
        if node in there:
            continue
        while _is_view(node):
            (node, *_) = node.all_input_nodes
        saved[node] = None
        there = computed()
    seen = [node for node in graph.nodes if is_effect(node)]  # forward, since pullbacks are silent
    forward, _ = _part(body.graph, [*arguments, *rest], [*results[:outputs], *saved], effects=seen)
    there_too = [arguments[i] for i in kept]
    backward, used = _part(body.graph, [*slopes, *saved, *there_too, *rest], results[outputs:], there_too)
    forward.meta["luxtorch_bodies"] = backward.meta["luxtorch_bodies"] = (body,)  # and so those that it calls
    again = [i for i in kept if arguments[i] in used]
    return Split(forward, backward, again, len(saved), constants)


def _writes(graph: fx.GraphModule) -> bool:
    """Tell whether an operator of a graph writes into what another has made, as `squeeze_` in a product does."""
    operators = (node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload))
    return any(operator._schema.is_mutable for operator in operators)


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return any(one.alias_info is not None for one in target._schema.returns)


def _part(
    graph: fx.GraphModule,
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    optional: Collection[fx.Node] = (),
    effects: Sequence[fx.Node] = (),
) -> tuple[fx.GraphModule, set[fx.Node]]:
    """Return the part of a graph from some nodes to others, and which of its inputs it uses.

    Args:
        graph: The graph.
        inputs: The nodes that are arguments of the part.
        outputs: The nodes that it returns.
        optional: Arguments that are left out if they are not used.
        effects: Nodes that belong to the part, whoever uses them.
    """
    given, wanted = set(inputs), set()
    stack = [*outputs, *effects]
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            stack += [] if node in given else node.all_input_nodes
    part = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(inputs):
        if node in wanted or node not in optional:
            known[node] = part.placeholder(f"input_{i}")
    for node in graph.graph.nodes:
        if node in wanted and node not in known:
            known[node] = part.node_copy(node, known.__getitem__)
    part.output([known[node] for node in outputs])
    return fx.GraphModule(graph, part), wanted & given
