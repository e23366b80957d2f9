"""Small graphs, whose operators take less time than starting them: these want one thread, and to be called from C++."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ._replay import Program

# A second thread makes a product of 2 x 64 x 64 x 64 operations slower (6.8 us by one thread, 8.1 by two), one of twice
# as many faster (12.5 and 10.5). A step with a loop of Adam over 52,800 numbers takes as long either way.
_OPERATIONS = 2**19
_NUMBERS = 2**16

# Called from C++, a step of 50 layers of width 32 takes 560 us, from Python 860, with two threads 1300. But it saves
# nothing on a few operators, and on thousands of them the C++ compiler takes half as long again.
_WORTH_A_WRAPPER = range(50, 2000)


def options_for(graph: fx.GraphModule) -> dict[str, Any]:
    """Return the settings of inductor for a small graph."""
    return {"cpp.threads": 1, "cpp_wrapper": len(graph.graph.nodes) in _WORTH_A_WRAPPER}


def is_small(graph: fx.GraphModule) -> bool:
    """Tell whether no operator of a graph on the CPU has enough work for two threads."""
    return all(_is_small(node) for node in graph.graph.nodes if node.op == "call_function")


def on_one_thread(program: Program) -> Program:
    """Return a program that runs on one thread, and leaves torch with as many as there were."""
    threads = torch.get_num_threads()
    if threads == 1:
        return program

    def run(inputs: list[Any]) -> Sequence[Tensor]:
        torch.set_num_threads(1)
        try:
            return program(inputs)
        finally:
            torch.set_num_threads(threads)

    return run


def _is_small(node: fx.Node) -> bool:
    from torch.utils.flop_counter import flop_registry

    if node.target is operator.getitem:
        return True  # one of several results
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace not in ("aten", "prims"):
        return False  # who knows what is in it
    arguments = fx.map_arg((node.args, node.kwargs), lambda other: other.meta["val"])
    result = node.meta.get("val")
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((arguments, result)) if isinstance(leaf, Tensor)]
    if any(tensor.device.type != "cpu" or not isinstance(tensor.numel(), int) for tensor in tensors):
        return False
    operations = flop_registry.get(node.target.overloadpacket)
    if operations is not None:
        return bool(operations(*arguments[0], **arguments[1], out_val=result) <= _OPERATIONS)
    return max((tensor.numel() for tensor in tensors), default=0) <= _NUMBERS
