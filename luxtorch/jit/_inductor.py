"""Compilation by Inductor: its settings, graph rewrites before it, and differentiable programs by AOTAutograd."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from luxtorch.core import tensors

from ._bodies import CALLERS, Body, Form, calls_of_bodies, changed_call, compiled_body, keeping, with_bodies
from ._donate import Pair, state_outputs
from ._programs import find, load, program_key, store
from ._purity import ConstantFolding
from ._replay import Program, replay
from ._toolchain import find_instructions
from ._trace import Trace, record

# A second thread makes a product of 2 x 64 x 64 x 64 operations slower (6.8 us with one thread, 8.1 with two), one of
# twice as many faster (12.5 and 10.5). A step with a loop of Adam over 52,800 numbers takes the same time with either.
_OPERATIONS = 2**19
_NUMBERS = 2**16

# With the C++ wrapper a step of 50 layers of width 32 takes 560 us, from Python 860, with two threads 1300. It saves no
# time on a few operators, nor on thousands of them, for which compiling takes 15 % longer.
_WRAPPED_SIZES = range(50, 2000)


def options_for(graph: fx.GraphModule) -> dict[str, Any]:
    """Return the settings of inductor for a small graph."""
    return {"cpp.threads": 1, "cpp_wrapper": len(graph.graph.nodes) in _WRAPPED_SIZES}


def is_small(graph: fx.GraphModule) -> bool:
    """Return whether no operator of a graph on the CPU has enough work for two threads."""
    return all(_is_small(node) for node in graph.graph.nodes if node.op == "call_function")


def on_one_thread(program: Program) -> Program:
    """Return a program that runs on one thread, and restores the number of threads."""
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
        return False  # it may do anything
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


def transpose_products(graph: fx.GraphModule) -> None:
    """Replace the transpose of a product by the product of the transposes, in place in the graph.

    The gradient of a weight, batched over models, is the transpose of a product. A loop over the weight, as in Adam,
    would read it across the rows, and inductor transposes it for each use: a step of 32 models took 1000 us, half of
    that in Adam, and takes 650. The product itself takes the same time.
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
    """Return whether a node transposes the last two dimensions alone."""
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


def _separate_biases(graph: fx.Graph) -> None:
    """Replace a product to which a bias is added by the product alone and a sum, in place in the graph."""
    for node in graph.find_nodes(op="call_function", target=_aten.addmm.default):
        value = node.meta["val"]
        if value.device.type != "cpu" or value.dtype not in (torch.float32, torch.float64) or node.kwargs:
            continue
        bias, *factors = node.args
        with graph.inserting_before(node):
            product = graph.call_function(_aten.mm.default, tuple(factors))
            product.meta["val"] = value
            total = graph.call_function(_aten.add.Tensor, (product, bias))
        total.meta.update(node.meta)
        node.replace_all_uses_with(total)
        graph.erase_node(node)


def last_pass() -> Any:
    """Return what Inductor is to do with a graph last: a user's own pass, or to add biases together with what follows.

    On the CPU, `addmm` would first copy the bias into the result. A step of 50 layers of width 32 took 1130 us, and
    takes 1015; on a ComponentVector 553 and 450. In half precision `addmm` stays, since it rounds once.
    """
    from torch._inductor import config

    return config.post_grad_custom_post_pass or _own_last_pass()


@functools.cache
def _own_last_pass() -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class LastPass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            _separate_biases(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__,))

    return LastPass()


def _exchange(ndim: int) -> list[int]:
    return [*range(ndim - 2), ndim - 1, ndim - 2]


DEFAULTS: Mapping[str, Any] = {
    # The least number of elements for each thread of a loop. With inductor's 512, small loops wait: a step of ten
    # layers of width 32 took 1109 us, with 2048 862, with 8192 822, with 32768 860.
    "cpp.min_chunk_size": 8192,
    # With how many loops that read the same tensor each is tried to be fused. With inductor's 64 that is the updates of
    # all leaves, which read the rate: 50 layers compile a tenth longer, to the same kernels.
    "max_fusion_buffer_group_pairwise_attempts": 8,
    # The signature has checked sizes and alignment already.
    "size_asserts": False,
    "alignment_asserts": False,
    # The C++ wrapper apart from the kernels, and with fewer optimizations: 50 layers compile in two thirds of the time,
    # and a step takes the same.
    "cpp_wrapper_build_separate": True,
}


def compile_trace(trace: Trace, pairs: list[Pair], options: Mapping[str, Any]) -> tuple[Program, str]:
    """Compile a trace, and return the program and its code; or find these on disk, where an earlier process left them.

    Args:
        trace: The trace.
        pairs: Inputs with the outputs that are written into them; these are not outputs of the program.
        options: Settings of inductor, as for `torch.compile(options=...)`.
    """
    key = program_key(trace.graph, trace.fakes, (pairs, _visible(trace, pairs)), options)
    code, known = None, find(key)
    if known:
        with compiling(trace, known["options"]):
            code = _found(known, trace.fakes)
    if code is None:
        code, known = _compile_new(trace, pairs, options)
        store(key, known)
    program = _callable(code)
    return on_one_thread(program) if known["small"] else program, getattr(code, "source_code", "")


def _compile_new(trace: Trace, pairs: list[Pair], options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Compile a trace; return the code, and what `_found` needs to find it again."""
    # Imported here, since it takes seconds.
    from torch._inductor.compile_fx import _recursive_joint_graph_passes

    find_instructions(trace.fakes)
    graph = lowered(trace, pairs)
    small = is_small(graph)
    options = {**options_for(graph), **options} if small else dict(options)
    with compiling(trace, options):
        _recursive_joint_graph_passes(graph)
        calls = calls_of_bodies(graph)
        code = compile_graph(graph, trace.fakes)
    return code, {"program": _name(code), "small": small, "options": options, "calls": calls}


def _found(known: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
    """Return the code that an earlier process has compiled, with the bodies that it calls; None if it is gone.

    It is to be called with the settings that it was compiled with.
    """
    find_instructions(inputs, wait=True)  # the names of kernels in Inductor's cache depend on them
    operators = {str(operator): operator for operator in CALLERS}
    for name, args in known["calls"]:
        changed_call(operators[name], args, _compiled)
    return load(known["program"], inputs)


def _name(code: Any) -> str | None:
    """Return the name of a program in Inductor's cache; None if it is not there."""
    return getattr(code, "_fx_graph_cache_key", None)


def _callable(code: Any) -> Program:
    # Inductor's object itself would look for profilers and autotuners at each call.
    return getattr(code, "current_callable", None) or code  # type: ignore[no-any-return]  # without operators: a function


def lowered(trace: Trace, pairs: list[Pair]) -> fx.GraphModule:
    """Return the graph for inductor: functionalized, except for writes into donated inputs, and decomposed."""
    from torch._inductor.decomposition import select_decomp_table

    written = {output for _, output in pairs}

    def function(*tensors: Any) -> list[Any]:
        outputs = trace.graph(*tensors)
        for place, output in pairs:
            tensors[place].copy_(outputs[output])
        return [output for i, output in enumerate(outputs) if i not in written]

    graph = record(torch.func.functionalize(function), trace.fakes, select_decomp_table(), trace.symbolic)
    graph.graph.output_node().meta["user_visible_output_idxs"] = _visible(trace, pairs)
    return graph


def _visible(trace: Trace, pairs: list[Pair]) -> list[int]:
    """Return the outputs that keep their strides, since a state with other ones would be compiled for again."""
    written = {output for _, output in pairs}
    remaining = [output for output in range(len(trace.outputs())) if output not in written]
    states = state_outputs(trace)
    return [n for n, output in enumerate(remaining) if output in states]


def compile_graph(graph: fx.GraphModule, fakes: Any, *, inference: bool = True, backward: bool = False) -> Any:
    """Compile a functional graph; to be called inside of `compiling`."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.utils import BoxedBool

    transpose_products(graph)
    _keys_as_rows(graph)
    with_bodies(graph, _compiled)
    find_instructions(fakes, wait=True)
    with config.patch(post_grad_custom_post_pass=last_pass()):
        return compile_fx_inner(
            graph,
            fakes,
            static_input_idxs=(),
            cudagraphs=BoxedBool(False),
            is_inference=inference,
            is_backward=backward,
            cpp_wrapper=_cpp_wrapper(),
        )


def _compiled(body: Body, form: Form | None) -> Body:
    """Return the body that is run by a compiled program."""
    from torch._inductor import config

    if not body.fakes:
        return body
    return compiled_body(body, form, _compile_body, {"inductor": config.get_hash().hex()})


def _compile_body(body: Body, form: Form | None) -> tuple[Program, Form | None, bool]:
    """Return the compiled program of a body, the form that it has, and whether it is for one thread."""
    from torch._inductor import config

    key = program_key(body.graph, body.fakes, form, {})
    code, known = None, find(key)
    with torch.no_grad():
        if known:
            inputs = body.fakes if form is None or not known["formed"] else _inputs(_formed(body, body.graph, form))
            with config.patch(known["options"]), _mode_of(inputs):
                code = _found(known, inputs)
        if code is None:
            code, known = _compile_new_body(body, form)
            store(key, known)
    return _callable(code), form if known["formed"] else None, known["small"]


def _compile_new_body(body: Body, form: Form | None) -> tuple[Any, dict[str, Any]]:
    """Compile a body; return the code, and what `_found` needs to find it again."""
    from torch._inductor import config
    from torch._inductor.compile_fx import _recursive_joint_graph_passes
    from torch._inductor.decomposition import select_decomp_table

    def function(*tensors: Any) -> list[Any]:
        return list(body.graph(*tensors))

    find_instructions(body.fakes)
    graph = record(torch.func.functionalize(function), body.fakes, select_decomp_table())
    small = is_small(graph)
    options = {**(options_for(graph) if small else {}), **_layout(graph), "size_asserts": False}
    inputs: Sequence[Any] = body.fakes
    with config.patch(options):
        with _mode_of(inputs):
            _recursive_joint_graph_passes(graph)
        # From Python to C++ each tensor takes time: with 20 layers of width 16, 42 us instead of 36.
        formed = form is not None and not _cpp_wrapper()
        if formed:
            graph = _formed(body, graph, form)
            inputs = _inputs(graph)
        outputs: Any = graph.graph.output_node()
        outputs.meta["user_visible_output_idxs"] = [*range(len(outputs.args[0]))]  # in the strides of the next step
        calls = calls_of_bodies(graph)
        with _mode_of(inputs):
            code = compile_graph(graph, inputs)
    return code, {"program": _name(code), "small": small, "options": options, "calls": calls, "formed": formed}


def _formed(body: Body, graph: fx.GraphModule, form: Any) -> fx.GraphModule:
    """Return the graph of a body in a form."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        call, given = form(body, graph)
    return record(call, given, {}, symbolic=True)


def _inputs(graph: fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]


def _keys_as_rows(graph: fx.GraphModule) -> None:
    """Reshape constants that are keys to matrices of one row, in place in the graph.

    Inductor inlines vectors of up to eight numbers into its kernels, but not unsigned integers.
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
    """Set up inductor for a trace."""
    with torch.no_grad(), settings(trace, options), _mode_of(trace.fakes):
        yield


@contextlib.contextmanager
def _mode_of(inputs: Sequence[Any]) -> Iterator[None]:
    """Let inductor find the mode of fake tensors, if there is one."""
    from torch._guards import TracingContext, tracing
    from torch._inductor.virtualized import V

    fakes: Any = tensors(inputs)
    if not fakes:
        yield
        return
    mode = fakes[0].fake_mode
    with tracing(TracingContext(mode)), V.set_fake_mode(mode):
        yield


def settings(trace: Trace, options: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Return the settings of inductor for a trace."""
    from torch._inductor import config

    # The asserts also define symbolic sizes in the program.
    asserts = {"size_asserts": True} if trace.symbolic else {}
    return config.patch({**DEFAULTS, **asserts, **_layout(trace.graph), **options})  # type: ignore[no-any-return]


def _layout(graph: fx.GraphModule) -> dict[str, bool]:
    """Return the setting by which convolutions on the CPU keep the layout of their inputs, for graphs with gradients.

    Inductor has them compute with channels last. Forward alone takes up to 1.8 times as long without. But a weight's
    gradient has them last too, and Adam would read it across its rows: a step of ResNet-18 took 240 ms, and takes 183.
    """
    backward = graph.graph.find_nodes(op="call_function", target=_aten.convolution_backward.default)
    on_cpu = any(node.args[1].meta["val"].device.type == "cpu" for node in backward)
    return {"layout_optimization": False} if on_cpu else {}


def _cpp_wrapper() -> bool:
    from torch._inductor import config

    return bool(config.cpp_wrapper)


class _Function(torch.nn.Module):
    """Wrap a function as a module, for AOTAutograd."""

    def __init__(self, function: Callable[..., Any], folding: ConstantFolding) -> None:
        super().__init__()
        self._function, self._known = function, folding

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._known.outputs(self._function(*tensors)))


def compile_differentiable(
    trace: Trace, tensors: Sequence[Tensor], backend: str, options: Mapping[str, Any]
) -> Program:
    """Compile a differentiable program, forward and backward.

    The function itself is traced again, together with its derivative, since the graph does not have
    `torch.no_grad` and custom backward functions.

    Args:
        trace: The trace.
        tensors: The arguments.
        backend: `"replay"` or `"inductor"`.
        options: Settings of inductor.
    """
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    decompositions: dict[Any, Any] = {}
    if backend == "inductor":
        from torch._inductor import lowering  # noqa: F401  # decompositions, as of max pooling, expect it to be there
        from torch._inductor.decomposition import select_decomp_table

        decompositions = select_decomp_table()
    bodies: list[Any] = []

    def forward(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return replay(gm) if backend == "replay" else compile_graph(gm, example_inputs, inference=False)

    def backward(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        if backend == "replay":
            return replay(gm)
        # It is compiled at the first backward pass, outside of the settings below. Its inputs were saved by another
        # program, so sizes and strides are checked here.
        with torch.no_grad(), keeping(bodies), settings(trace, {"size_asserts": True, **options}):
            return compile_graph(gm, example_inputs, inference=False, backward=True)

    # As in the first trace, closed-over tensors can be read; the backward pass may use them too.
    folding = ConstantFolding()
    module: Any = _Function(trace.function, folding)
    pairs = zip(trace.fakes, tensors, strict=True)
    with _aot_settings(), folding:
        compiled = aot_module_simplified(
            module,
            [fake.detach().requires_grad_(tensor.requires_grad) for fake, tensor in pairs],
            fw_compiler=forward,
            bw_compiler=backward,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=decompositions,
        )
    return lambda inputs: compiled(*inputs)


@contextlib.contextmanager
def _aot_settings() -> Iterator[None]:
    """Configure AOTAutograd as `torch._inductor.compile_fx` does."""
    from torch._functorch import config as aot_config

    # The order of effects, as of the check that a matrix was not singular, is kept by tokens. As inputs and outputs of
    # the graph they would shift the strides that inductor reports, and each saved tensor would be read by those of
    # its neighbor.
    tokens = {"unlift_effect_tokens": True}
    # The backward pass must not overwrite saved tensors, since it may run again with `retain_graph=True`.
    with aot_config.patch({**tokens, "donated_buffer": False}):
        yield
