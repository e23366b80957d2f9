"""Compiling a traced graph by inductor, torch.compile's own compiler, without what torch.compile puts around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from ._donate import Pair
from ._replay import Program
from ._small import is_small, on_one_thread, options_for
from ._strides import kept
from ._trace import Trace, record
from ._transposed import turn_products

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
    return compile_fx_inner(
        graph,
        fakes,
        static_input_idxs=(),
        cudagraphs=BoxedBool(False),
        is_inference=inference,
        is_backward=backward,
        cpp_wrapper=_cpp_wrapper(),
    )


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
