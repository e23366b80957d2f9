"""Graphs compiled by Inductor: its settings, what is rewritten in a graph before, and calls that autograd records."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from luxtorch.core import tensors

from ._bodies import Body, compiled_body, keeping, with_bodies
from ._donate import Pair
from ._purity import Known
from ._replay import Program, replay
from ._strides import kept
from ._trace import Trace, record

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
    found = tensors((arguments, result))
    if any(tensor.device.type != "cpu" or not isinstance(tensor.numel(), int) for tensor in found):
        return False
    operations = flop_registry.get(node.target.overloadpacket)
    if operations is not None:
        return bool(operations(*arguments[0], **arguments[1], out_val=result) <= _OPERATIONS)
    return max((tensor.numel() for tensor in found), default=0) <= _NUMBERS


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


DEFAULTS: Mapping[str, Any] = {
    # How many elements of a loop are worth a thread. With inductor's 512, small loops wait for threads: a step of ten
    # layers of width 32 took 1109 us, with 2048 862, with 8192 822, with 32768 860.
    "cpp.min_chunk_size": 8192,
    # What came was compared with what was compiled for already.
    "size_asserts": False,
    "alignment_asserts": False,
}


def compile_trace(trace: Trace, pairs: list[Pair], options: Mapping[str, Any]) -> tuple[Program, str]:
    """Compile a trace, and return the program and its code.

    What was compiled is kept on disk by inductor, and found there by the next process.

    Args:
        trace: The trace.
        pairs: Which inputs are overwritten by which outputs; these are then no outputs of the program.
        options: Settings of inductor, as for `torch.compile(options=...)`.
    """
    # These take seconds to import, and only who compiles needs them.
    from torch._inductor.compile_fx import _recursive_joint_graph_passes

    graph = lowered(trace, pairs)
    small = is_small(graph)
    with compiling(trace, {**options_for(graph), **options} if small else options):
        _recursive_joint_graph_passes(graph)
        code = compile_graph(graph, trace.fakes)
    # Called by itself, inductor's object would look for profilers and autotuners at each call.
    program = getattr(code, "current_callable", None) or code  # it is a plain function if there is nothing to do
    return on_one_thread(program) if small else program, getattr(code, "source_code", "")


def lowered(trace: Trace, pairs: list[Pair]) -> fx.GraphModule:
    """Return the graph as inductor takes it: without mutation, but for the donated inputs, and decomposed."""
    from torch._inductor.decomposition import select_decomp_table

    written = {output for _, output in pairs}

    def function(*tensors: Any) -> list[Any]:
        outputs = trace.graph(*tensors)
        for place, output in pairs:
            tensors[place].copy_(outputs[output])
        return [output for i, output in enumerate(outputs) if i not in written]

    graph = record(torch.func.functionalize(function), trace.fakes, select_decomp_table(), trace.symbolic)
    # A state that comes back with other strides would be compiled for a second time.
    states = kept(trace)
    remaining = [output for output in range(len(trace.outputs())) if output not in written]
    visible = [n for n, output in enumerate(remaining) if output in states]
    graph.graph.output_node().meta["user_visible_output_idxs"] = visible
    return graph


def compile_graph(graph: fx.GraphModule, fakes: Any, *, inference: bool = True, backward: bool = False) -> Any:
    """Compile a functional graph; to be called within `compiling`."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.utils import BoxedBool

    turn_products(graph)
    _keep_keys(graph)
    _compile_bodies(graph)
    return compile_fx_inner(
        graph,
        fakes,
        static_input_idxs=(),
        cudagraphs=BoxedBool(False),
        is_inference=inference,
        is_backward=backward,
        cpp_wrapper=_cpp_wrapper(),
    )


def _compile_bodies(graph: fx.GraphModule) -> None:
    """Let the operators of a graph call compiled bodies, in place in the graph."""
    from torch._inductor import config

    settings = {"inductor": config.get_hash().hex()}
    with_bodies(graph, lambda body: compiled_body(body, _compile_body, settings) if body.fakes else body)


def _compile_body(body: Body) -> tuple[Program, bool]:
    """Return the compiled program of a body, and whether it is for one thread."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import _recursive_joint_graph_passes
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V

    def function(*tensors: Any) -> list[Any]:
        return list(body.graph(*tensors))

    graph = record(torch.func.functionalize(function), body.fakes, select_decomp_table())
    outputs: Any = graph.graph.output_node()
    outputs.meta["user_visible_output_idxs"] = [*range(len(outputs.args[0]))]  # in the strides of the next step
    small = is_small(graph)
    mode: Any = body.fakes[0].fake_mode  # type: ignore[attr-defined]
    options = options_for(graph) if small else {}
    with torch.no_grad(), config.patch(options), tracing(TracingContext(mode)), V.set_fake_mode(mode):
        _recursive_joint_graph_passes(graph)
        code = compile_graph(graph, body.fakes)
    return getattr(code, "current_callable", None) or code, small


def _keep_keys(graph: fx.GraphModule) -> None:
    """Make constants that are keys matrices of one row, in place in the graph.

    Inductor writes vectors of up to eight numbers into its kernels, in a way that has no unsigned integers.
    """
    for node in graph.graph.find_nodes(op="get_attr"):
        value = getattr(graph, node.target)
        if isinstance(value, torch.Tensor) and value.ndim == 1 and value.dtype in _UNSIGNED:
            name = f"{node.target}_row"
            graph.register_buffer(name, value[None])
            with graph.graph.inserting_before(node):
                row = graph.graph.get_attr(name)
                key = graph.graph.call_function(torch.ops.aten.select.int, (row, 0, 0))
            key.meta.update(node.meta)
            node.replace_all_uses_with(key)
            graph.graph.erase_node(node)
            delattr(graph, node.target)
    graph.recompile()


_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


@contextlib.contextmanager
def compiling(trace: Trace, options: Mapping[str, Any]) -> Iterator[None]:
    """Set inductor up for a trace."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.virtualized import V

    mode = next((fake.fake_mode for fake in trace.fakes), None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(settings(trace, options))
        if mode is not None:
            stack.enter_context(tracing(TracingContext(mode)))
            stack.enter_context(V.set_fake_mode(mode))
        yield


def settings(trace: Trace, options: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Return the settings of inductor for a trace."""
    from torch._inductor import config

    # The asserts are also where a program learns of symbolic sizes.
    asserts = {"size_asserts": True} if trace.symbolic else {}
    return config.patch({**DEFAULTS, **asserts, **options})  # type: ignore[no-any-return]


def _cpp_wrapper() -> bool:
    from torch._inductor import config

    return bool(config.cpp_wrapper)


def has_compiler() -> bool:
    """Tell whether there is a C++ compiler that inductor can use."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return False
    return True


class _Function(torch.nn.Module):
    """A function in the form that AOTAutograd takes."""

    def __init__(self, function: Callable[..., Any], known: Known) -> None:
        super().__init__()
        self._function, self._known = function, known

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._known.outputs(self._function(*tensors)))


def recorded(trace: Trace, tensors: Sequence[Tensor], backend: str, options: Mapping[str, Any]) -> Program:
    """Return a differentiable program: its backward is compiled as well.

    The function itself is traced once more, together with its derivative, since the graph knows nothing of
    `torch.no_grad` and of functions with a backward of their own.

    Args:
        trace: The trace.
        tensors: The arguments.
        backend: `"replay"` or `"inductor"`.
        options: Settings of inductor.
    """
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    bodies: list[Any] = []

    def forward(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return replay(gm) if backend == "replay" else compile_graph(gm, example_inputs, inference=False)

    def backward(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        if backend == "replay":
            return replay(gm)
        # It is compiled at the first backward pass, long after the settings below have been left. What it reads was
        # saved by another program, so that sizes and strides are checked here.
        with torch.no_grad(), keeping(bodies), settings(trace, {"size_asserts": True, **options}):
            return compile_graph(gm, example_inputs, inference=False, backward=True)

    # As in the first trace, what is closed over can be read; the backward pass may use it too.
    known = Known()
    module: Any = _Function(trace.function, known)
    pairs = zip(trace.fakes, tensors, strict=True)
    with _as_inductor_takes_it(), known:
        compiled = aot_module_simplified(
            module,
            [fake.detach().requires_grad_(tensor.requires_grad) for fake, tensor in pairs],
            fw_compiler=forward,
            bw_compiler=backward,
            partition_fn=min_cut_rematerialization_partition,
            decompositions={} if backend == "replay" else select_decomp_table(),
        )
    return lambda inputs: compiled(*inputs)


@contextlib.contextmanager
def _as_inductor_takes_it() -> Iterator[None]:
    """Set AOTAutograd up as `torch._inductor.compile_fx` does."""
    from torch._functorch import config as aot_config

    # The order of effects, as of the check that a matrix was not singular, is kept by tokens. As inputs and outputs of
    # the graph they would shift the strides that inductor reports, and each saved tensor would be read by those of
    # its neighbour.
    tokens = {"unlift_effect_tokens": True}
    # What forward saves is not overwritten by backward, which may run again with `retain_graph=True`.
    with aot_config.patch({**tokens, "donated_buffer": False}):
        yield
