"""Whether an outer tape of autograd would see what was computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def on_other_tapes(tensors: Iterable[Tensor], leaves: Iterable[Tensor]) -> bool:
    """Tell whether tensors depend, by autograd's records, on any other tensor than the given leaves.

    Every record ends in leaves of the graph, so a walk over the graph finds what a function has closed over, however
    it got hold of it. The walk costs a few percent of a small model's step; under `torch.no_grad` there is no outer
    tape, and no need for it.
    """
    own = {id(leaf) for leaf in leaves}
    nodes: list[Any] = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            nodes.append(tensor.grad_fn)
        elif tensor.requires_grad and id(tensor) not in own:
            return True
    seen = set(nodes)
    for node in nodes:  # which grows meanwhile
        sources = node.next_functions
        if not sources and id(getattr(node, "variable", None)) not in own:
            return True
        for source, _ in sources:
            if source is not None and source not in seen:
                seen.add(source)
                nodes.append(source)
    return False
