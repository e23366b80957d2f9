"""Products that are transposed at once: they are computed the other way round, in the order in which they are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.bmm.default)


def turn_products(graph: fx.GraphModule) -> None:
    """Replace the transpose of a product by the product of the transposes, in place in the graph.

    The gradient of a weight, batched over models, is the transpose of a product. A loop over the weight, as that of
    Adam, would read it across the rows, and inductor has it transposed for each use: a step of 32 models took 1000 us,
    of which half was Adam's, and takes 650. The product itself takes as long either way.
    """
    for node in graph.graph.nodes:
        product: Any = node.args[0] if _transposes(node) else None
        if isinstance(product, fx.Node) and product.target in _PRODUCTS and len(product.users) == 1:
            with graph.graph.inserting_before(node):
                turned = graph.graph.call_function(product.target, tuple(map(_transpose, reversed(product.args))))
            turned.meta["val"] = node.meta["val"].contiguous()
            node.replace_all_uses_with(turned)
            for old in dict.fromkeys((node, product, *product.args)):
                if old.op == "call_function" and not old.users:
                    graph.graph.erase_node(old)
    graph.recompile()


def _transposes(node: fx.Node) -> bool:
    """Tell whether a node exchanges the last two dimensions, and no others."""
    if node.target is not _aten.permute.default:
        return False
    dims: Any = node.args[1]
    return len(dims) >= 2 and [dim % len(dims) for dim in dims] == _exchange(len(dims))


def _transpose(factor: Any) -> Any:
    if _transposes(factor):
        return factor.args[0]
    order = _exchange(factor.meta["val"].ndim)
    node = factor.graph.call_function(_aten.permute.default, (factor, order))
    node.meta["val"] = factor.meta["val"].permute(order)
    return node


def _exchange(ndim: int) -> list[int]:
    return [*range(ndim - 2), ndim - 1, ndim - 2]
