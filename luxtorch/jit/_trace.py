"""Tracing of a function with fake tensors to a graph of ATen operators."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from luxtorch._errors import user_line

from ._constants import REGISTER, NotComparable, fingerprint, is_mutable, texts
from ._effects import writes
from ._flatten import Spec, flatten, flatten_torch_nodes, fresh_contexts, path_text
from ._purity import FunctionCheck, TraceCheck, TracingError, can_draw, storage, tracing_errors
from ._signature import Signature
from ._sizes import Expression, Sizes, hides_symbols, is_number


@dataclass
class Trace:
    """Hold the graph of a function, and how results are assembled from its outputs.

    Attributes:
        function: The traced function, of the tensors alone; it returns the tensors that it makes.
        graph: The graph. Arguments that are returned unchanged are not outputs of it.
        fakes: The fake tensors of the arguments: of their shapes, without values.
        signature: The guards.
        out_spec: The structure of the result.
        results: The leaves of the result: `("output", i)`, `("input", i)`, `("number", i)`, or constants:
            `("argument", i)`, a leaf of the arguments; `("static", value)`; and `("copied", value)`, of which each
            call returns a copy.
        sizes: The symbols among the sizes of the arguments.
        numbers: A function of the arguments for results that depend on sizes alone; None if there are none.
        strides: Whether the function has read strides.
    """

    function: Callable[..., list[Tensor]]
    graph: fx.GraphModule
    fakes: list[Any]
    signature: Signature
    out_spec: Spec
    results: list[tuple[str, Any]]
    sizes: Sizes
    numbers: Expression | None
    strides: bool

    @property
    def symbolic(self) -> bool:
        """Whether any size is a symbol."""
        return any(isinstance(size, torch.SymInt) for fake in self.fakes for size in fake.shape)

    def constants(self) -> list[Tensor]:
        """Return the tensors that the graph closes over."""
        nodes = self.graph.graph.find_nodes(op="get_attr")
        return [one for one in (getattr(self.graph, node.target) for node in nodes) if isinstance(one, Tensor)]

    def outputs(self) -> list[Any]:
        """Return the fake tensors of the outputs; closed-over tensors are themselves."""
        nodes: Any = self.graph.graph.output_node().args[0]
        return [node.meta["val"] if "val" in node.meta else getattr(self.graph, node.target) for node in nodes]


def trace(fn: Callable[..., Any], leaves: list[Any], spec: Spec, dynamic: Mapping[int, Collection[int]]) -> Trace:
    """Trace a function.

    Args:
        fn: A function of `(args, kwargs)`.
        leaves: The leaves of these.
        spec: Their structure.
        dynamic: The dynamic dimensions of leaves.

    Raises:
        TracingError: If the function is not pure, or depends on the values of tensors.
        InputError: If it closes over a tensor that autograd records.
    """
    sizes = Sizes()
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    fakes = [sizes.fake(leaves[i], n, dynamic.get(i, ())) for n, i in enumerate(places)]
    parts: dict[str, Any] = {}
    values = list(leaves)

    def function(*tensors: Tensor) -> list[Tensor]:
        full = list(values)
        for i, tensor in zip(places, tensors, strict=True):
            full[i] = tensor
        arguments = spec.unflatten(full)
        result = fn(*arguments)
        with fresh_contexts():
            out, parts["spec"] = flatten_torch_nodes(*flatten(result))
        if "results" in parts:  # traced again for its derivative
            return [leaf for leaf, (kind, _) in zip(out, parts["results"], strict=True) if kind == "output"]
        _check_unchanged(arguments, full, spec)
        if "FakeTensor(" in str(parts["spec"]):
            raise _text_of_tensor("result, in its structure", parts["spec"])
        given = {id(tensor): n for n, tensor in enumerate(tensors)}
        constants = {id(leaf): i for i, leaf in enumerate(full) if not isinstance(leaf, Tensor)}
        parts["results"], parts["numbers"] = [], []
        made: list[Tensor] = []
        for i, leaf in enumerate(out):
            if id(leaf) in constants:
                parts["results"].append(("argument", constants[id(leaf)]))
            elif is_number(leaf):
                parts["results"].append(("number", len(parts["numbers"])))
                parts["numbers"].append(leaf)
            elif not isinstance(leaf, Tensor):
                parts["results"].append((_kind(leaf, parts["spec"], i), leaf))
            elif type(leaf) in (Tensor, torch.nn.Parameter) and id(leaf) not in given and not watch.owns(leaf):
                parts["results"].append(("static", leaf))  # it is closed over
            elif id(leaf) in given:
                parts["results"].append(("input", given[id(leaf)]))
            else:
                parts["results"].append(("output", len(made)))
                made.append(leaf)
        return made

    for i in places:
        values[i] = None  # so that the arguments of the first call are not kept alive
    watch = TraceCheck()
    functions = FunctionCheck(watch)

    def watched(*tensors: Tensor) -> list[Tensor]:
        with watch.with_arguments(tensors), functions:
            made = watch.outputs(function(*tensors))
        watch.check_given(tensors)
        return made

    def with_fixed_sizes(line: str, reason: str) -> Trace:
        fixed = trace(fn, leaves, spec, {})
        fixed.sizes.fixed_by(line, reason, sizes)
        return fixed

    try:
        with sizes.printed_as_numbers() if dynamic else contextlib.nullcontext():
            graph = record(watched, fakes, {}, bool(dynamic))
    except Exception as error:
        if not dynamic:
            raise
        # Some operators of torch do not support symbols, symbols have no hash, and so on. With fixed sizes it may work;
        # if not, the error has the numbers.
        return with_fixed_sizes(user_line(error), f"{type(error).__name__}: {str(error).splitlines()[0]}")
    fakes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    watch.check_leaks()  # from here on, only leaks reference traced tensors
    statics = [value for kind, value in parts["results"] if kind in ("static", "copied")]
    if dynamic and hides_symbols([parts["spec"], *statics]):
        return with_fixed_sizes(user_line(), "it is in the structure of the result")
    signature = Signature(leaves, spec, fakes)
    numbers = sizes.numbers(parts["numbers"]) if parts["numbers"] else None
    return Trace(function, graph, fakes, signature, parts["spec"], parts["results"], sizes, numbers, functions.strides)


def _check_unchanged(arguments: Any, leaves: list[Any], spec: Spec) -> None:
    """Raise if a function has changed dicts or other nodes of its arguments."""
    after, structure = flatten_torch_nodes(*flatten(arguments))
    if structure != spec or any(one is not other for one, other in zip(leaves, after, strict=True)):
        headline = "A jitted function must not change a dict or another node of its arguments in place."
        raise TracingError(headline, fix="Make a new one and return it: {**ps, name: value}.", where=user_line())


def _kind(value: Any, spec: Spec, leaf: int) -> str:
    """Return whether each call returns the same object for a leaf of the result ("static"), or a copy ("copied").

    Raises:
        TracingError: If neither is possible, since it holds a traced tensor or is an iterator.
    """
    place = f"result{path_text(spec.paths()[leaf])}"
    try:
        key, mutable = fingerprint(value), is_mutable(value)
        if mutable:
            copy.deepcopy(value)
    except Exception as error:
        held = f", which holds {error.what} at {place}{error.place}" if isinstance(error, NotComparable) else ""
        got, fix = (
            f"a {type(value).__name__} at {place}{held}",
            f"Return tensors, or make it a pytree node, {REGISTER}.",
        )
        headline = "A jitted function must return tensors and constants, in any pytree."
        raise TracingError(headline, got=got, fix=fix, where=user_line()) from None
    if any("FakeTensor(" in text for text in texts(key)):
        raise _text_of_tensor(place, value)
    return "copied" if mutable else "static"


def _text_of_tensor(place: str, value: Any) -> TracingError:
    got, fix = f"{value!r:.80} at {place}", "Return the tensor, and format it outside."
    headline = "A jitted function must not return the text of a traced tensor, which has no values."
    return TracingError(headline, got=got, fix=fix, where=user_line())


def record(function: Any, fakes: list[Any], decompositions: dict[Any, Any], symbolic: bool = False) -> fx.GraphModule:
    """Trace a function of fake tensors to a graph."""
    from torch.fx.experimental.proxy_tensor import make_fx

    kind: Literal["symbolic", "fake"] = "symbolic" if symbolic else "fake"
    traced = make_fx(function, decompositions, tracing_mode=kind, _allow_non_fake_inputs=True)
    with tracing_errors():
        graph = traced(*fakes)
    graph.shape_env = None  # it is that of the fake tensors; with it Inductor's cache does not take the graph
    _tidy(graph)
    return graph


def _tidy(graph: fx.GraphModule) -> None:
    """Remove operators and constants that no output depends on."""
    # torch.fx keeps operators that write to a tensor, but writes on the meta device have no effect.
    for node in reversed(graph.graph.nodes):
        value = node.meta.get("val")
        if not node.users and node.op == "call_function" and isinstance(value, Tensor) and value.is_meta:
            graph.graph.erase_node(node)
    for node in graph.graph.find_nodes(op="call_function", target=_WITH_STRIDES):
        # It copies the strides of its argument, and is written to, which expanded tensors do not allow.
        if all(isinstance(size, int) for size in node.meta["val"].shape):
            node.target = torch.ops.aten.new_zeros.default
            node.args, node.kwargs = (node.args[0], list(node.meta["val"].shape)), {}
    _merge_equal(graph.graph)
    graph.graph.eliminate_dead_code()
    _overlap_collectives(graph.graph)
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    constants = [name for name, _ in (*graph.named_buffers(), *graph.named_parameters())]
    for name in constants:
        if name not in used:
            delattr(graph, name)
    graph.recompile()


def _merge_equal(graph: fx.Graph) -> None:
    """Let operators that do the same with the same tensors be one, and leave out those that do nothing.

    The gradient of a weight, for example, is transposed twice.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if any(writes(node.target) for node in calls):
        return  # the same operator may have other values later
    # Outputs stay apart, and so does what shares memory with one.
    outputs: Any = graph.output_node().all_input_nodes
    kept = {storage(node.meta["val"]) for node in outputs if _has_storage(node.meta.get("val"))}
    known: dict[Any, fx.Node] = {}
    for node in calls:
        value = node.meta.get("val")
        if not (_has_storage(value) and isinstance(node.target, torch._ops.OpOverload)):
            continue
        if storage(value) in kept or node.target.namespace != "aten" or can_draw(node.target):
            continue
        source: Any = node.args[0] if node.args else None
        if node.target in NO_OPS:
            node.replace_all_uses_with(source)
            continue
        if node.target is _TRANSPOSE and isinstance(source, fx.Node) and source.target is _TRANSPOSE:
            node.replace_all_uses_with(source.args[0])
            continue
        try:
            key = node.target, _exact(node.args), _exact(tuple(node.kwargs.items()))
            first = known.setdefault(key, node)
        except TypeError:  # an argument has no hash
            continue
        if first is not node:
            node.replace_all_uses_with(first)


def _overlap_collectives(graph: fx.Graph) -> None:
    """Let the processor work while messages travel: wait when a result is needed, and send the next one before.

    The order in which collectives start stays, as all ranks must agree on it. At most two are under way, since what
    they send and receive is in memory: of a model whose parameters are gathered layer by layer, this layer's and the
    next one's.
    """
    nodes = list(graph.nodes)
    starts = [node for node in nodes if _is_collective(node) and not _is_wait(node)]
    if not starts or any(node.op == "call_function" and writes(node.target) for node in nodes):
        return
    waits = {node.all_input_nodes[0]: node for node in nodes if _is_wait(node)}
    order: dict[fx.Node, None] = {}
    upcoming, under_way = iter(starts), list[fx.Node]()
    following = next(upcoming, None)

    def emit(node: fx.Node) -> None:
        nonlocal following
        for given in node.all_input_nodes:
            if given not in order:
                emit(given)
        if node is following:
            if len(under_way) == _UNDER_WAY:
                finish(waits[under_way[0]])
            if node in waits:
                under_way.append(node)
            following = next(upcoming, None)
        if not _is_wait(node):
            order[node] = None
            return
        finish(node)
        if following is not None and _is_ready(following, order):
            emit(following)

    def finish(wait: fx.Node) -> None:
        if wait.all_input_nodes[0] in under_way:
            under_way.remove(wait.all_input_nodes[0])
        order[wait] = None

    for node in nodes:
        if node not in order and not _is_wait(node) and node.op != "output":
            emit(node)
    output = graph.output_node()
    emit(output)
    for node in order:
        if node is not output:
            output.prepend(node)


_UNDER_WAY = 2


def _is_collective(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == "_c10d_functional"


def _is_wait(node: fx.Node) -> bool:
    return _is_collective(node) and "wait_tensor" in str(node.target)


def _is_ready(node: fx.Node, order: Collection[fx.Node]) -> bool:
    """Return whether what a collective sends is there, but for a few operators that wait for nothing."""
    missing, left = [given for given in node.all_input_nodes if given not in order], 4
    while missing and left:
        one, left = missing.pop(), left - 1
        if _is_collective(one):
            return False
        missing += [given for given in one.all_input_nodes if given not in order]
    return not missing


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided


def _exact(value: Any) -> Any:
    """Return what tells arguments apart, also 1 from True and 1.0, and 0.0 from -0.0."""
    if isinstance(value, (list, tuple)):
        return type(value).__name__, *map(_exact, value)
    return type(value), repr(value) if isinstance(value, float) else value


_TRANSPOSE = torch.ops.aten.t.default
NO_OPS = frozenset((torch.ops.aten.detach.default, torch.ops.aten.alias.default))
"""Operators without effect, since derivatives are a part of the graph already."""
_WITH_STRIDES = torch.ops.aten._new_zeros_with_same_feature_meta.default


def aliases(trace: Trace) -> tuple[list[set[int]], list[set[int]]]:
    """Return the outputs that share memory with each input, and the inputs and outputs that do with each output."""
    outputs = list(map(storage, trace.outputs()))
    inputs = [storage(fake) for fake in trace.fakes]
    of_inputs = [{j for j, out in enumerate(outputs) if out == one} for one in inputs]
    others = [
        {-1 - i for i, given in enumerate(inputs) if given == one}
        | {k for k, out in enumerate(outputs) if out == one and k != j}
        for j, one in enumerate(outputs)
    ]
    return of_inputs, others
