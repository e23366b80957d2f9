"""`traced_once`: in a trace, call a function for arguments of one kind once, and copy what it has recorded."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from luxtorch._torch import PROXY, functions_unseen, get_dispatch_mode, storage_id, without_modes
from luxtorch._transforms import functional

from ._tree import tree_flatten, tree_unflatten

R = TypeVar("R")


def traced_once(function: Callable[..., R]) -> Callable[..., R]:
    """Let a pure function that is called for many tensors, such as a formula for each parameter, be traced once.

    To trace an operator takes about a millisecond, to copy one that was traced a tenth of that. So in a trace by
    `make_fx`, as that of `lt.jit`, the function itself runs once for each kind of arguments: structure, shapes,
    strides and dtypes. For others of that kind its operators are copied, and the graph is the same as without. Where
    that may not be right, as in transforms, or if the function returns a view, it runs each time; so it does outside
    of traces.

    Args:
        function: A function of trees to a tree, which depends on nothing else. What is returned is for one trace.
    """
    known: dict[Any, _Recorded | None] = {}

    def call(*trees: Any) -> R:
        mode = None if torch.compiler.is_compiling() or functional() else get_dispatch_mode(PROXY)
        if mode is None:
            return function(*trees)
        leaves, spec = tree_flatten(trees)
        nodes = [_node(leaf, mode.tracer) for leaf in leaves]
        try:
            with functions_unseen():
                kinds = [*map(_kind, leaves)]
            key = spec, *kinds, *(None if node is None else nodes.index(node) for node in nodes)
            recorded = known.get(key)
        except TypeError:  # something has no hash, or is no plain tensor
            return function(*trees)
        if recorded is not None:
            return recorded.copied(nodes, leaves, mode.tracer)  # type: ignore[no-any-return]
        last = next(reversed(mode.tracer.graph.nodes))
        result = function(*trees)
        if key not in known:
            known[key] = _record(last, nodes, leaves, result, mode.tracer)
        return result

    return call


@dataclass(frozen=True)
class _Recorded:
    """What a call has recorded.

    Attributes:
        nodes: The nodes, in order.
        given: The nodes of its arguments; None for what is no traced tensor.
        results: For each leaf of the result the place of an argument, or the node with the tensor's shape, strides and
            dtype.
        spec: The structure of the result.
    """

    nodes: Sequence[fx.Node]
    given: Sequence[fx.Node | None]
    results: Sequence[int | tuple[fx.Node, tuple[Any, ...]]]
    spec: Any

    def copied(self, given: Sequence[fx.Node | None], leaves: Sequence[Any], tracer: Any) -> Any:
        """Record the same for other arguments, and return the result."""
        known: dict[Any, Any] = dict(zip(self.given, given, strict=True))
        for node in self.nodes:
            known[node] = tracer.graph.node_copy(node, known.__getitem__)
        mode = next(leaf.fake_mode for leaf, node in zip(leaves, given, strict=True) if node is not None)
        made = []
        with without_modes(), mode:
            for result in self.results:
                made.append(leaves[result] if isinstance(result, int) else _tensor(known[result[0]], result[1], tracer))
        return tree_unflatten(made, self.spec)


def _tensor(node: fx.Node, about: tuple[Any, ...], tracer: Any) -> Tensor:
    """Return a traced tensor that a node stands for."""
    from torch.fx.experimental.proxy_tensor import track_tensor_tree

    shape, strides, dtype, device = about
    tensor = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    return track_tensor_tree(tensor, fx.Proxy(node, tracer), constant=None, tracer=tracer)


def _record(
    last: fx.Node, given: Sequence[fx.Node | None], leaves: Sequence[Any], result: Any, tracer: Any
) -> _Recorded | None:
    """Return what was recorded after a node; None if it cannot be copied."""
    nodes = []
    node = last.next
    while node.op != "root":
        nodes.append(node)
        node = node.next
    inside = {*nodes, *given}
    if not any(given) or not all(_is_pure(node) and inside.issuperset(node.all_input_nodes) for node in nodes):
        return None
    made, spec = tree_flatten(result)
    memory = [storage_id(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    results: list[int | tuple[fx.Node, tuple[Any, ...]]] = []
    for leaf in made:
        place = next((i for i, one in enumerate(leaves) if one is leaf), None)
        if place is not None:
            results.append(place)
            continue
        node = _node(leaf, tracer)
        if node not in nodes or leaf.requires_grad or leaf.is_conj() or leaf.is_neg() or storage_id(leaf) in memory:
            return None
        memory.append(storage_id(leaf))
        results.append((node, (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)))
    return _Recorded(nodes, given, results, spec)


def _node(leaf: Any, tracer: Any) -> Any:
    """Return the node that stands for a tensor; None if there is none."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import get_proxy_slot

    slot = get_proxy_slot(leaf, tracer, None) if type(leaf) is FakeTensor else None
    return None if slot is None else slot.proxy.node


def _kind(leaf: Any) -> Any:
    """Return what an argument has in common with others of its kind.

    Raises:
        TypeError: If it is a tensor of which this does not say all.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    if type(leaf) is not FakeTensor:
        return id(leaf)  # it is a constant
    lazy = leaf.requires_grad, leaf.is_conj(), leaf.is_neg(), any(isinstance(n, torch.SymInt) for n in leaf.shape)
    if leaf.layout is not torch.strided or any(lazy):
        raise TypeError
    start = leaf.storage_offset() if leaf.ndim else 0  # a number may be one of several
    return tuple(leaf.shape), leaf.stride(), start, leaf.dtype, leaf.device


def _is_pure(node: fx.Node) -> bool:
    """Tell whether a node does nothing but compute its result from its arguments."""
    target = node.target
    if node.op != "call_function" or target is operator.getitem:
        return node.op == "call_function"
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
