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
    pending: list[Any] = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            pending.append(tensor.grad_fn)
        elif tensor.requires_grad and id(tensor) not in own:
            return True
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        inputs = node.next_functions
        for source, _ in inputs:
            if source is not None:
                pending.append(source)
        if not inputs and id(getattr(node, "variable", None)) not in own:
            return True
    return False
