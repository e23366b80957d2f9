"""Tracing: from a function and the shapes of its arguments to a graph of ATen operators."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ._flatten import Spec, flatten
from ._purity import Outs, TracingError, Watch, storage
from ._signature import Signature


@dataclass
class Trace:
    """Hold the graph of a function, and how its outputs make up what the function returns.

    Attributes:
        function: The function of the tensors alone that was traced; it returns the tensors that it makes.
        graph: What it does. Arguments that are returned as they are, are no outputs of it.
        fakes: What the arguments were while tracing: tensors of their shapes, without numbers.
        signature: What all this depends on.
        out_spec: The structure of the result.
        results: The leaves of the result: `("output", i)`, `("input", i)`, or `("static", value)`.
    """

    function: Callable[..., list[Tensor]]
    graph: fx.GraphModule
    fakes: list[Any]
    signature: Signature
    out_spec: Spec
    results: list[tuple[str, Any]]

    @property
    def symbolic(self) -> bool:
        """Whether any size is a symbol."""
        return any(isinstance(size, torch.SymInt) for fake in self.fakes for size in fake.shape)

    def outputs(self) -> list[Any]:
        """Return what the outputs of the graph were while tracing; those that it closes over are as they are."""
        nodes: Any = self.graph.graph.output_node().args[0]
        return [node.meta["val"] if "val" in node.meta else getattr(self.graph, node.target) for node in nodes]


def trace(fn: Callable[..., Any], leaves: list[Any], spec: Spec, dynamic: Collection[int]) -> Trace:
    """Trace a function.

    Args:
        fn: Takes `(args, kwargs)`.
        leaves: The leaves of these.
        spec: Their structure.
        dynamic: Which leaves may have another first dimension later.

    Raises:
        TracingError: If the function is not pure, or depends on the values of tensors.
        InputError: If it closes over a tensor that autograd records.
    """
    # All this takes seconds to import, and only who compiles needs it.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    symbolic = bool(dynamic)
    # Sizes and numbers that depend on the values of tensors are errors.
    shapes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes, static_shapes=True)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    fakes = [_fake(mode, leaves[i], f"input{n}", i in dynamic) for n, i in enumerate(places)]
    parts: dict[str, Any] = {}
    values = list(leaves)

    def function(*tensors: Tensor) -> list[Tensor]:
        full = list(values)
        for i, tensor in zip(places, tensors, strict=True):
            full[i] = tensor
        out, parts["spec"] = flatten(fn(*spec.unflatten(full)))
        given = {id(tensor): n for n, tensor in enumerate(tensors)}
        parts["results"] = []
        made: list[Tensor] = []
        for leaf in out:
            if not isinstance(leaf, Tensor):
                parts["results"].append(("static", leaf))
            elif id(leaf) in given:
                parts["results"].append(("input", given[id(leaf)]))
            else:
                parts["results"].append(("output", len(made)))
                made.append(leaf)
        return made

    for i in places:
        values[i] = None  # or the arguments of the first call would be kept
    watch = Watch()

    def watched(*tensors: Tensor) -> list[Tensor]:
        with watch.given(tensors), Outs():
            return function(*tensors)

    graph = record(watched, fakes, {}, symbolic)
    watch.check_leaks()
    fakes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    free = {n: fake.shape[0] for n, fake in enumerate(fakes) if fake.dim() and isinstance(fake.shape[0], torch.SymInt)}
    return Trace(function, graph, fakes, Signature(leaves, spec, free), parts["spec"], parts["results"])


def record(function: Any, fakes: list[Any], decompositions: dict[Any, Any], symbolic: bool = False) -> fx.GraphModule:
    """Return the graph of a function of fake tensors."""
    from torch.fx.experimental.proxy_tensor import make_fx

    kind: Literal["symbolic", "fake"] = "symbolic" if symbolic else "fake"
    traced = make_fx(function, decompositions, tracing_mode=kind, _allow_non_fake_inputs=True)
    try:
        with _unlogged():
            graph = traced(*fakes)
    except RuntimeError as error:
        if "not supported for tensor subclasses" in str(error):
            raise TracingError(
                "A jitted function takes the numbers out of a tensor, but what it traces has none.",
                got=str(error),
                fix="Keep to torch's functions of tensors.",
            ) from error
        raise
    _tidy(graph)
    return graph


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keep torch from logging, traceback and all, an error that it raises anyway."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _tidy(graph: fx.GraphModule) -> None:
    """Leave out what no output depends on, constants too."""
    # torch.fx keeps what writes to a tensor; but on the meta device, where shapes are worked out, nothing is written.
    for node in reversed(graph.graph.nodes):
        value = node.meta.get("val")
        if not node.users and node.op == "call_function" and isinstance(value, Tensor) and value.is_meta:
            graph.graph.erase_node(node)
    for node in graph.graph.find_nodes(op="call_function", target=_WITH_STRIDES):
        # It takes the strides of its argument, and is written to; what was expanded while tracing cannot be written.
        if all(isinstance(size, int) for size in node.meta["val"].shape):
            node.target = torch.ops.aten.new_zeros.default
            node.args, node.kwargs = (node.args[0], list(node.meta["val"].shape)), {}
    graph.graph.eliminate_dead_code()
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    constants = [name for name, _ in (*graph.named_buffers(), *graph.named_parameters())]
    for name in constants:
        if name not in used:
            delattr(graph, name)
    graph.recompile()


_WITH_STRIDES = torch.ops.aten._new_zeros_with_same_feature_meta.default


def aliases(trace: Trace) -> tuple[list[set[int]], list[set[int]]]:
    """Return which outputs of a graph share memory with each input, and which inputs and outputs with each output."""
    outputs = list(map(storage, trace.outputs()))
    inputs = [storage(fake) for fake in trace.fakes]
    of_inputs = [{j for j, out in enumerate(outputs) if out == one} for one in inputs]
    others = [
        {-1 - i for i, given in enumerate(inputs) if given == one}
        | {k for k, out in enumerate(outputs) if out == one and k != j}
        for j, one in enumerate(outputs)
    ]
    return of_inputs, others


def _fake(mode: Any, tensor: Tensor, name: str, dynamic: bool) -> Any:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    if not dynamic or tensor.dim() == 0:
        return mode.from_tensor(tensor, source=ConstantSource(name))
    kinds = [DimDynamic.DUCK] + [DimDynamic.STATIC] * (tensor.dim() - 1)
    context: Any = StatelessSymbolicContext(kinds)
    return mode.from_tensor(tensor, static_shapes=False, source=ConstantSource(name), symbolic_context=context)
