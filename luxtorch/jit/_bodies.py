"""Bodies of loops and branches: graphs that one operator of a larger graph calls by name.

An operator has no argument that is a graph, so it gets the name of one. The name is a digest of what the graph does and
of the shapes that it is for: equal bodies are one body, and a program that a compiler keeps on disk calls the same body
in the next process. Who holds a program holds its bodies; what nobody holds is gone from the table.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from luxtorch._errors import user_line
from luxtorch.core import LuxtorchError

from ._purity import ConstantFolding, TracingError
from ._replay import Program, replay
from ._trace import record

_BODIES: WeakValueDictionary[str, Body] = WeakValueDictionary()
_KEEPERS: ContextVar[tuple[list[Any], ...]] = ContextVar("keepers", default=())

CALLERS: dict[Any, tuple[int, ...]] = {}
"""Operators that call bodies, and which of their arguments are names, several with spaces between."""

Form: TypeAlias = "Callable[[Body, fx.GraphModule], tuple[Callable[..., Sequence[Tensor]], list[Any]]]"
"""Takes a body and its graph to the function that is compiled for it, and the tensors and numbers that this takes.

It is called where new tensors are fake ones, and its `repr` tells it from others."""

FORMS: dict[Any, Callable[[Sequence[Any]], Form]] = {}
"""Operators that call compiled bodies otherwise than the body itself, and the form by the operator's arguments."""


class Body:
    """Hold a graph that operators call by name.

    Attributes:
        name: The name.
        graph: The graph, of ATen operators and without constants.
        fakes: What its arguments were while tracing.
        outputs: What it returned then.
        program: Runs it.
        form: The form in which the program was compiled; None if it takes what the graph takes.
        small: Whether that is faster with one thread.
        inner: The bodies that its operators call.
    """

    def __init__(self, name: str, graph: fx.GraphModule, fakes: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self.name, self.graph, self.fakes, self.outputs = name, graph, list(fakes), list(outputs)
        self.inner: list[Any] = []
        self.program: Program = replay(graph)
        self.form: Form | None = None
        self.small = False

    def __deepcopy__(self, memo: Any) -> Body:
        return self  # it does not change, and is found by its name


def body_of(graph: fx.GraphModule, fakes: Sequence[Tensor], outputs: Sequence[Tensor], inner: list[Any]) -> Body:
    """Return the body for a graph, and let it live as long as what is traced at the moment."""
    about = [(tuple(fake.shape), fake.stride(), fake.dtype, str(fake.device)) for fake in fakes]
    code = [part.code for part in graph.modules() if isinstance(part, fx.GraphModule)]
    name = hashlib.sha256(f"{code}{about}".encode()).hexdigest()[:32]

    def make() -> Body:
        body = Body(name, graph, fakes, outputs)
        body.inner = inner
        return body

    return _entered(name, make)


def _entered(name: str, make: Callable[[], Body]) -> Body:
    body = _BODIES.get(name)
    if body is None:
        body = _BODIES.setdefault(name, make())
    keep(body)
    return body


def keep(body: Any) -> None:
    """Let a body, or what else a graph calls by name, live as long as whoever keeps bodies at the moment."""
    for kept in _KEEPERS.get():
        kept.append(body)


@contextlib.contextmanager
def keeping(kept: list[Any]) -> Iterator[None]:
    """Put the bodies that are made or called for meanwhile into a list."""
    token = _KEEPERS.set((*_KEEPERS.get(), kept))
    try:
        yield
    finally:
        _KEEPERS.reset(token)


def hold(operator: Any, bodies: Sequence[Any]) -> None:
    """Let bodies and the like live as long as the graph in which an operator that calls them was recorded just now."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    nodes = reversed(mode.tracer.graph.nodes) if mode is not None else ()
    node = next((node for node in nodes if node.target is operator), None)
    if node is not None:
        node.meta["luxtorch_bodies"] = tuple(bodies)


def body_named(name: str) -> Body:
    """Return the body of a name.

    Raises:
        LuxtorchError: If it is gone.
    """
    body = _BODIES.get(name)
    if body is None:
        raise LuxtorchError(
            "The body of a loop or branch is gone: a graph lives on that was traced with it.",
            fix="Keep what was traced first, or trace by lt.jit.",
        )
    return body


def in_table() -> int:
    """Return how many bodies there are."""
    return len(_BODIES)


def calls_of_bodies(graph: fx.GraphModule) -> list[tuple[str, list[Any]]]:
    """Return the operators of a graph that call bodies, by name, with those of their arguments that are known."""
    nodes = [node for node in graph.graph.nodes if node.op == "call_function" and node.target in CALLERS]
    return [(str(node.target), fx.map_arg(node.args, lambda _: None)) for node in nodes]


def with_bodies(graph: fx.GraphModule, change: Callable[[Body, Form | None], Body]) -> None:
    """Let the operators of a graph call other bodies, in place in the graph."""
    changed = False
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in CALLERS:
            node.args = changed_call(node.target, node.args, change)
            changed = True
    if changed:
        graph.recompile()


def changed_call(operator: Any, args: Sequence[Any], change: Callable[[Body, Form | None], Body]) -> tuple[Any, ...]:
    """Return the arguments of an operator, so that it calls other bodies."""
    form = FORMS[operator](args) if operator in FORMS else None
    made = list(args)
    for place in CALLERS[operator]:
        made[place] = " ".join(change(body_named(name), form).name for name in args[place].split())
    return tuple(made)


def compiled_body(
    body: Body,
    form: Form | None,
    compile_body: Callable[[Body, Form | None], tuple[Program, Form | None, bool]],
    settings: Mapping[str, Any],
) -> Body:
    """Return a body that is run by a compiled program."""
    name = f"{body.name}-{hashlib.sha256(repr((form, sorted(settings.items()))).encode()).hexdigest()[:8]}"

    def make() -> Body:
        made = Body(name, body.graph, body.fakes, body.outputs)
        inner: list[Body] = []
        with keeping(inner):
            made.program, made.form, made.small = compile_body(body, form)
        made.inner = inner
        return made

    return _entered(name, make)


def traced_body(function: Callable[..., Sequence[Tensor]], like: Sequence[Tensor]) -> tuple[Body, list[Tensor]]:
    """Trace a function of tensors by itself, whatever is traced at the moment; return the body, and its constants.

    Args:
        function: Takes tensors to tensors.
        like: Tensors of the shapes, dtypes and devices of its arguments.

    Returns:
        The body, and the tensors that it takes after the arguments: those that the function closes over.

    Raises:
        TracingError: If it closes over a tensor without numbers, or depends on the values of tensors.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    known = ConstantFolding()
    inner: list[Any] = []

    def contiguous(*tensors: Tensor) -> list[Tensor]:
        with known:
            # What a step returns is what the next one gets, so it has to lie in memory as that was compiled for.
            return known.outputs([tensor.contiguous() for tensor in function(*tensors)])

    with _disable_current_modes(), torch.no_grad(), keeping(inner):
        with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:  # Inductor's cache needs one
            fakes = [torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in like]
        graph = record(contiguous, fakes, {})
        constants = _lifted(graph)
        with mode:
            fakes += [torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in constants]
    outputs: Any = graph.graph.output_node().args[0]
    return body_of(graph, fakes, [node.meta["val"] for node in outputs], inner), constants


def _lifted(graph: fx.GraphModule) -> list[Tensor]:
    """Make arguments of the tensors that a graph closes over, and return these."""
    constants: dict[str, Tensor] = {}
    nodes = [node for node in graph.graph.find_nodes(op="get_attr") if isinstance(getattr(graph, node.target), Tensor)]
    after = [node for node in graph.graph.nodes if node.op == "placeholder"]
    new: dict[str, fx.Node] = {}
    for node in nodes:
        value = getattr(graph, node.target)
        if isinstance(value, FakeTensor):
            raise TracingError(
                "The body of a loop or branch closes over a tensor in a way that cannot be followed.",
                got=f"a tensor of shape {tuple(value.shape)} that is traced outside of the body",
                fix="Pass it as a part of the carry, of the sequence, or as an operand.",
                where=user_line(),
            )
        if node.target not in new:
            constants[node.target] = value
            with graph.graph.inserting_after(after[-1]) if after else graph.graph.inserting_before():
                new[node.target] = graph.graph.placeholder(f"constant_{len(new)}")
            after.append(new[node.target])
            new[node.target].meta["val"] = node.meta.get("val", value)
        node.replace_all_uses_with(new[node.target])
        graph.graph.erase_node(node)
    for name in constants:
        delattr(graph, name)
    graph.recompile()
    return list(constants.values())
