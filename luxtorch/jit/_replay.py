"""Replay of a graph: its operators one by one as generated code, or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import getitem
from threading import Lock
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from ._donate import is_dense
from ._effects import writes
from ._trace import NO_OPS

Program: TypeAlias = Callable[[list[Any]], Sequence[Tensor]]
"""A function of a list of input tensors, which it may clear, that returns the outputs of a graph."""


def replay(graph: fx.GraphModule) -> Program:
    """Return a function that runs the operators of a graph, below autograd.

    It is generated Python code with a line for each operator, as that of torch.fx, but each line calls the operator in
    C++, and a tensor is deleted after its last use. Operators that matter to autograd alone are left out.

    Some operators return their numbers in another order in memory than the trace was told by torch's rules for fake
    tensors, and views of the result would fail, or see other numbers. The first call finds them, and from then on
    their results are copied into the order of the trace.

    Args:
        graph: A graph of ATen operators.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> program = replay(make_fx(lambda x: [x.sin() + 1])(torch.zeros(2)))
        >>> program([torch.zeros(2)])
        [tensor([1., 1.])]
    """
    orders: dict[fx.Node, tuple[int, ...]] = {}
    certain = True  # what runs on fake tensors finds nothing
    run: Program | None = None

    def checked(node: fx.Node, value: Any) -> Any:
        nonlocal certain
        certain = certain and (type(value) is Tensor or not isinstance(value, Tensor))
        # What an operator writes into is where its caller wants it.
        source: Any = node.args[0] if node.target is getitem else node
        order = None if writes(source.target) else _other_order(value, node.meta.get("val"))
        return value if order is None else _reordered(value, orders.setdefault(node, order))

    def first(inputs: list[Any]) -> Sequence[Tensor]:
        nonlocal run, certain
        certain = True
        outputs = _generated(graph, {node: partial(checked, node) for node in graph.graph.nodes})(inputs)
        if certain:
            run = _generated(graph, {node: partial(_reordered, order=order) for node, order in orders.items()})
        return outputs

    def program(inputs: list[Any]) -> Sequence[Tensor]:
        # Below autograd and not in inference mode: its tensors could not be used by autograd later.
        with torch._C._AutoDispatchBelowAutograd():
            return (run or first)(inputs)

    program._boxed_call = True  # type: ignore[attr-defined]  # so that AOTAutograd passes a list too
    return program


def _generated(graph: fx.GraphModule, then: Mapping[fx.Node, Callable[[Any], Any]]) -> Program:
    """Return the code of a graph as a function, which passes the results of some operators through functions."""
    names: dict[Any, str] = {}
    constants: dict[str, Any] = {}
    lines: list[str] = []
    last = _last_uses(graph)

    def constant(value: Any) -> str:
        name = f"c{len(constants)}"
        constants[name] = value
        return name

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, (list, tuple)):
            inner = "".join(f"{text(item)}, " for item in value)
            return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        return constant(value)

    for node in graph.graph.nodes:
        names[node] = name = f"v{len(names)}"
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            names[node] = constant(getattr(graph, node.target))
            continue
        if node.op == "output":
            lines.append(f"return {text(node.args[0])}")
            break
        if node.target in NO_OPS:
            names[node] = names[node.args[0]]
            continue
        given = [text(value) for value in node.args] + [f"{key}={text(value)}" for key, value in node.kwargs.items()]
        operator = constant(getattr(node.target, "_op", node.target))
        lines.append(f"{name} = {operator}({', '.join(given)})")
        if node in then:
            lines.append(f"{name} = {constant(then[node])}({name})")
        lines += [f"del {names[gone]}" for gone in last.get(node, ())]

    inputs = [names[node] for node in graph.graph.nodes if node.op == "placeholder"]
    body = [f"[{', '.join(inputs)}] = inputs" if inputs else "pass", "inputs.clear()", *lines]
    source = "def run(inputs):\n" + "\n".join(f"    {line}" for line in body)
    exec(compile(source, "<luxtorch replay>", "exec"), constants)
    run: Program = constants["run"]
    return run


def _other_order(value: Any, fake: Any) -> tuple[int, ...] | None:
    """Return the order in memory that the trace saw, if the numbers of a result are in another one."""
    if not (isinstance(value, Tensor) and isinstance(fake, Tensor)) or fake.layout is not torch.strided:
        return None
    if not value.numel() or not is_dense(fake) or (is_dense(value) and _order(value) == _order(fake)):
        return None
    return _order(fake)


def _order(tensor: Tensor) -> tuple[int, ...]:
    """Return the dimensions of a dense tensor from the outermost in memory to the innermost; first those of size 1."""
    # Of a symbolic number the one that was traced.
    sizes, strides = ([getattr(n, "node", n) for n in numbers] for numbers in (tensor.shape, tensor.stride()))
    sizes, strides = ([getattr(n, "hint", n) for n in numbers] for numbers in (sizes, strides))
    inner = [dim for dim in range(tensor.ndim) if sizes[dim] != 1]
    outer = [dim for dim in range(tensor.ndim) if sizes[dim] == 1]
    return (*outer, *sorted(inner, key=lambda dim: -strides[dim]))


def _reordered(value: Tensor, order: tuple[int, ...]) -> Tensor:
    return torch.empty_permuted(value.shape, order, dtype=value.dtype, device=value.device).copy_(value)


def _last_uses(graph: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """Return the nodes that are used for the last time by each node."""
    last: dict[fx.Node, fx.Node] = {}

    def source(node: fx.Node) -> fx.Node:
        return source(node.all_input_nodes[0]) if node.target in NO_OPS else node

    for node in graph.graph.nodes:
        for used in node.all_input_nodes:
            last[source(used)] = node
    by_user: dict[fx.Node, list[fx.Node]] = {}
    for used, user in last.items():
        if used.op != "get_attr":
            by_user.setdefault(user, []).append(used)
    return by_user


_WARM_UP = 3


class CudaGraph:
    """Capture a program as a CUDA graph at the first call, and replay it from then on.

    A graph has memory of its own: inputs are copied into it, and outputs out of it, so that the next call does not
    overwrite results. It pays for many small kernels, not for few large tensors.

    Args:
        program: A program that runs on one GPU without synchronization.

    Source: `torch.cuda.CUDAGraph`; inductor's own graphs, those of `mode="reduce-overhead"`, overwrite earlier results.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._lock = Lock()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def __call__(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        with self._lock:  # the memory is shared: one call at a time
            if self._graph is None:
                self._capture(inputs)
            assert self._graph is not None
            if self._inputs:
                torch._foreach_copy_(self._inputs, inputs)
            inputs.clear()
            self._graph.replay()
            outputs = [torch.empty_like(output) for output in self._outputs]
            if outputs:
                torch._foreach_copy_(outputs, self._outputs)
            return outputs

    def _capture(self, inputs: list[Tensor]) -> None:
        self._inputs = [one.detach().clone(memory_format=torch.preserve_format) for one in inputs]
        # The first calls choose kernels and allocate workspaces, and must not be captured.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._program(list(self._inputs))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._outputs = list(self._program(list(self._inputs)))
        self._graph = graph
