"""Bodies as functions of flat tensors: what they close over is an argument; and a body with its derivative as two."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from luxtorch._errors import user_line
from luxtorch._torch import (
    add_batch_dim,
    batch_dim_of,
    current_level,
    function_modes,
    get_unwrapped,
    is_batched,
    is_wrapped,
    level_of,
    no_tangents,
    outside_transforms,
    wrap_for_grad,
)
from luxtorch._transforms import is_silenced, silenced, traced, unwrapped
from luxtorch.components._views import Views, settled
from luxtorch.core import InputError, described, map_tensors, tensors, tree_flatten, tree_unflatten
from luxtorch.core._tree import is_node
from luxtorch.jit._bodies import Body, traced_body
from luxtorch.jit._effects import is_effect, tensors_in, written
from luxtorch.jit._purity import TracingError

_aten = torch.ops.aten

# What is computed again rather than saved, where what it is computed of is at hand.
_CHEAP = frozenset(
    (
        _aten.neg.default,
        _aten.rsub.Scalar,
        _aten.add.Scalar,
        _aten.sub.Scalar,
        _aten.mul.Scalar,
        _aten.div.Scalar,
        _aten.add.Tensor,
        _aten.sub.Tensor,
        _aten.mul.Tensor,
        _aten._to_copy.default,
        _aten.zeros_like.default,
        _aten.ones_like.default,
        _aten.full_like.default,
        _aten.clone.default,
    )
)


@dataclass(frozen=True)
class Split:
    """The two bodies, as functions of tensors.

    Attributes:
        forward: Takes the arguments and the constants to the results, and what is saved.
        backward: Takes the slopes, what is saved, the arguments that are used again, and the constants, to the slopes
            of the arguments.
        again: Which arguments are used again.
        saved: How many tensors are saved.
        constants: What both take after all else.
    """

    forward: Any
    backward: Any
    again: list[int]
    saved: int
    constants: list[Tensor]


def split(
    joint: Callable[..., Sequence[Tensor]], like: Sequence[Tensor], inputs: int, outputs: int, kept: Sequence[int]
) -> Split | None:
    """Split a function into its results and its slopes.

    Args:
        joint: Takes arguments, and slopes of the results, to the results, and slopes of the arguments.
        like: Tensors of the shapes of all of these.
        inputs: How many are arguments.
        outputs: How many of the results come first.
        kept: Arguments that are there for the slopes without being saved.

    Returns:
        The parts, or None if the function cannot be split, since it writes into memory.
    """
    with outside_transforms():
        body, constants = traced_body(joint, like)
        if is_in_place(body.graph):
            first = body  # with what its operators call
            functional = torch.func.functionalize(lambda *tensors: list(first.graph(*tensors)))
            body, _ = traced_body(functional, [*like, *constants])
            if is_in_place(body.graph):
                return None
    graph = body.graph.graph
    placeholders = graph.find_nodes(op="placeholder")
    arguments, slopes, rest = placeholders[:inputs], placeholders[inputs : len(like)], placeholders[len(like) :]
    results: Any = graph.output_node().args[0]
    later = set(slopes)  # what depends on the slopes
    fixed = {*(arguments[i] for i in kept), *rest}  # what depends on nothing but what need not be saved
    at_hand = set(fixed)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if any(source in later for source in node.all_input_nodes):
            later.add(node)
        elif all(source in fixed for source in node.all_input_nodes):
            fixed.add(node)
    needed = [node for node in graph.nodes if node not in later and any(user in later for user in node.users)]
    needed += [node for node in results[outputs:] if node not in later]

    def cheap(node: fx.Node) -> bool:
        return node in fixed or node.target in _CHEAP or _is_view(node)

    saved = dict.fromkeys(node for node in needed if node not in at_hand and not cheap(node))

    def computed() -> set[fx.Node]:
        """Return what can be computed again at little cost."""
        found = {*at_hand, *saved}
        for node in graph.nodes:
            simple = node.op == "call_function" and node not in later and isinstance(node.meta.get("val"), Tensor)
            if simple and cheap(node) and all(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    there = computed()
    for node in needed:
        if node in there:
            continue
        while _is_view(node):
            (node, *_) = node.all_input_nodes
        saved[node] = None
        there = computed()
    seen = [node for node in graph.nodes if is_effect(node)]  # forward, since pullbacks are silent
    forward, _ = _part(body.graph, [*arguments, *rest], [*results[:outputs], *saved], effects=seen)
    there_too = [arguments[i] for i in kept]
    backward, used = _part(body.graph, [*slopes, *saved, *there_too, *rest], results[outputs:], there_too)
    forward.meta["luxtorch_bodies"] = backward.meta["luxtorch_bodies"] = (body,)  # and so those that it calls
    again = [i for i in kept if arguments[i] in used]
    return Split(forward, backward, again, len(saved), constants)


def is_in_place(graph: fx.GraphModule) -> bool:
    """Tell whether an operator of a graph writes into what another has made, as `squeeze_` in a product does."""
    operators = (node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload))
    return any(operator._schema.is_mutable for operator in operators)


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return any(one.alias_info is not None for one in target._schema.returns)


def _part(
    graph: fx.GraphModule,
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    optional: Collection[fx.Node] = (),
    effects: Sequence[fx.Node] = (),
) -> tuple[fx.GraphModule, set[fx.Node]]:
    """Return the part of a graph from some nodes to others, and which of its inputs it uses.

    Args:
        graph: The graph.
        inputs: The nodes that are arguments of the part.
        outputs: The nodes that it returns.
        optional: Arguments that are left out if they are not used.
        effects: Nodes that belong to the part, whoever uses them.
    """
    given, wanted = set(inputs), set()
    stack = [*outputs, *effects]
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            stack += [] if node in given else node.all_input_nodes
    part = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(inputs):
        if node in wanted or node not in optional:
            known[node] = part.placeholder(f"input_{i}")
    for node in graph.graph.nodes:
        if node in wanted and node not in known:
            known[node] = part.node_copy(node, known.__getitem__)
    part.output([known[node] for node in outputs])
    return fx.GraphModule(graph, part), wanted & given


# How many bodies are being traced, one inside of the other: the modes below are for the tensors of one of them.
_DEPTH: ContextVar[int] = ContextVar("depth", default=0)


class Flat:
    """A function of tensors to a list of tensors, and what it was traced to.

    Args:
        call: The function.
    """

    def __init__(self, call: Callable[..., Sequence[Tensor]]) -> None:
        self.call = call
        self.derived: dict[Any, Any] = {}
        self._traced: dict[Any, tuple[Body, list[Tensor]]] = {}

    def traced(self, like: Sequence[Tensor]) -> tuple[Body, list[Tensor]]:
        """Return the body for arguments of these shapes, dtypes and devices, and its constants."""
        key = is_silenced(), *((tuple(map(_fixed, one.shape)), one.dtype, one.device) for one in like)
        if key not in self._traced:
            token = _DEPTH.set(_DEPTH.get() + 1)
            try:
                self._traced[key] = traced_body(self.call, like)
            finally:
                _DEPTH.reset(token)
        return self._traced[key]

    def split(self, joint: Callable[..., Any], like: Sequence[Any], *numbers: Any) -> Split | None:
        """Return what `split` does, of a function that belongs to the body; see there."""
        token = _DEPTH.set(_DEPTH.get() + 1)
        try:
            return split(joint, like, *numbers)
        finally:
            _DEPTH.reset(token)


def _fixed(size: Any) -> int:
    if not isinstance(size, int):
        raise RuntimeError("the body of a loop or branch is compiled for tensors of fixed sizes")
    return size


def explored(f: Callable[..., Any], *args: Any) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Call a function without recording the call; return its result, and the tensors that it closes over.

    Args:
        f: The function.
        args: Its arguments, any trees.

    Returns:
        The result, of which the shapes count, and pairs: the tensor that is closed over, and what stands for it here.

    Raises:
        TracingError: If it writes into a tensor that it closes over, or into an argument.
    """
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    made, records = _Made(), torch.is_grad_enabled()
    # Only shapes are asked for, so nothing is differentiated here.
    with disable_proxy_modes_tracing(), made, torch.no_grad(), no_tangents():
        # An argument may be closed over as well, and these are different things.
        args = map_tensors(lambda tensor: tensor.view_as(tensor), args)
        arguments = {id(unwrapped(tensor)) for tensor in tensors(args)}
        finder = _Finder(made, records)
        with made.watching(arguments), finder, silenced():
            result = f(*args)
        for tensor in tensors(result):
            finder.look(tensor)
    return result, list(finder.found.values())


def replaced(f: Callable[..., Any], originals: Sequence[Tensor], values: Sequence[Tensor], args: Any) -> Any:
    """Call a function with other tensors for those that it closes over."""
    with Replaced(originals, values) as mode:
        # What is in variables is replaced before, since transforms that are called with it directly ask no mode.
        result = rebound(f, dict(zip(map(id, originals), values, strict=True)))(*args)
    return map_tensors(mode.value, result)


def rebound(f: Any, table: Mapping[int, Tensor], *, always: bool = False, settle: bool = False) -> Any:
    """Return a function with other tensors in the variables that it closes over, and in its defaults.

    Args:
        f: The function.
        table: The new tensors, by the ids of the old ones.
        always: Whether variables with one of these get cells of their own even if nothing changes.
        settle: Whether vectors get components that are computed now, each of which is closed over by itself.
    """
    known: dict[int, Any] = {}

    def change(value: Any) -> Any:
        if isinstance(value, Views):
            return settled(value) if settle else changed_tree(value)
        if isinstance(value, (FunctionType, partial)):
            return changed_function(value)
        if isinstance(value, Tensor):
            return table.get(id(value), value)
        return value

    def tree(value: Any) -> Any:
        if isinstance(value, (FunctionType, partial, Tensor, Views)):
            return change(value)
        return changed_tree(value) if isinstance(value, (dict, list, tuple)) or is_node(value) else value

    def changed_tree(value: Any) -> Any:
        leaves, spec = tree_flatten(value, is_leaf=lambda inner: isinstance(inner, Views) and inner is not value)
        new = list(map(change, leaves))
        return value if all(map(operator.is_, leaves, new)) else tree_unflatten(new, spec)

    def affected(value: Any, new: Any) -> bool:
        return new is not value or (always and any(id(one) in table for one in tensors(value)))

    def changed_function(f: Any) -> Any:
        if id(f) in known:
            return known[id(f)]
        known[id(f)] = f
        if isinstance(f, partial):
            inner, args, kwargs = changed_function(f.func), tree(f.args), tree(f.keywords)
            if inner is not f.func or args is not f.args or kwargs is not f.keywords:
                known[id(f)] = partial(inner, *args, **kwargs)
            return known[id(f)]
        if not isinstance(f, FunctionType):
            return f
        cells, changed = [], False
        for cell in f.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # not yet assigned
                cells.append(cell)
                continue
            new = tree(value)
            if affected(value, new):
                changed = True
                cells.append(CellType(new))
            else:
                cells.append(cell)
        defaults, named = tree(f.__defaults__), tree(f.__kwdefaults__)
        if changed or defaults is not f.__defaults__ or named is not f.__kwdefaults__:
            new = FunctionType(f.__code__, f.__globals__, f.__name__, defaults, tuple(cells))
            new.__kwdefaults__ = named
            new.__dict__.update(f.__dict__)
            known[id(f)] = new
        return known[id(f)]

    return changed_function(f) if table or settle else f


def current(tensor: Tensor) -> Tensor:
    """Return what stands for a tensor, inside of bodies that close over it."""
    for mode in reversed(function_modes()):
        if isinstance(mode, Replaced) and mode.depth == _DEPTH.get():
            tensor = mode.value(tensor)
    return tensor


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note which tensors operators make, at the bottom of all transforms."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, Tensor] = {}
        self._arguments: set[int] | None = None

    def __contains__(self, tensor: Tensor) -> bool:
        return id(unwrapped(tensor)) in self._made

    @contextlib.contextmanager
    def watching(self, arguments: Iterable[int]) -> Iterator[None]:
        """Refuse writes into these tensors, and into those that were not made meanwhile."""
        self._arguments = set(arguments)
        try:
            yield
        finally:
            self._arguments = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._arguments is not None:
            for tensor in written(func, args, kwargs):
                base = tensor if tensor._base is None else tensor._base
                argument = id(tensor) in self._arguments or id(base) in self._arguments
                if argument or id(tensor) not in self._made:
                    what = "an argument" if argument else "what it closes over"
                    raise TracingError(
                        f"The body of a loop or branch must not change {what} in place, as {func} does.",
                        fix="Compute a new tensor, and return it as a part of the carry.",
                        where=user_line(),
                    )
        result = func(*args, **kwargs)
        for tensor in tensors_in(result if isinstance(result, (list, tuple)) else [result]):
            self._made.setdefault(id(tensor), tensor)
        return result


_GRAPH_READERS = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
"""What asks how their first argument was computed."""


class _Finder(TorchFunctionMode):
    """Find the tensors that a function uses, and that were not made inside of it."""

    def __init__(self, made: _Made, records: bool) -> None:
        super().__init__()
        self._made, self._records = made, records
        self._level = _level()
        self._depth = _DEPTH.get()
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._depth == _DEPTH.get():
            if func in _GRAPH_READERS and any(current(y) not in self._made for y in tensors(args[:1])):
                raise InputError(
                    "The body of a loop or branch must not differentiate what was computed outside of it.",
                    got=f"{func.__name__} of what it closes over, as by a function that torch.func.vjp returned",
                    fix="Take the derivative inside: call torch.func.vjp in the body.",
                    where=user_line(),
                )
            for tensor in tensors((args, kwargs)):
                self.look(tensor)
        return func(*args, **(kwargs or {}))

    def look(self, tensor: Tensor) -> None:
        """Note a tensor if it is closed over."""
        here = current(tensor)
        if here in self._made:
            return
        if here is tensor and is_constant(tensor):
            if self._records and tensor.requires_grad:
                raise InputError(
                    "The body of a loop or branch must not close over a tensor that requires grad: here it is fixed.",
                    got=described(tensor),
                    fix="Pass it as an argument of the jitted function, or detach it.",
                    where=user_line(),
                )
            return
        while is_wrapped(here) and level_of(here) > self._level:
            here = get_unwrapped(here)
        while current(tensor) is not here and is_wrapped(tensor):
            tensor = get_unwrapped(tensor)
        self.found.setdefault(id(tensor), (tensor, here))


def is_constant(tensor: Tensor) -> bool:
    """Tell whether a tensor is closed over by all that is traced: it has numbers, and stays as it is."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return not is_wrapped(tensor) and not isinstance(tensor, (FakeTensor, FunctionalTensor)) and traced()


def _level() -> int:
    level = current_level()
    return -1 if level is None else level


class Replaced(TorchFunctionMode):
    """Put other tensors in the place of some, also where a transform inside of the function has wrapped these.

    Args:
        originals: Which.
        values: By what.
    """

    def __init__(self, originals: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__()
        self._originals = list(originals)  # so that their ids stay theirs
        self._table = dict(zip(map(id, originals), values, strict=True))
        self._values = set(map(id, values))  # which may be the originals in a wrapper
        self._wrapped: dict[int, tuple[Tensor, Tensor]] = {}
        self.depth = _DEPTH.get()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._table and self.depth == _DEPTH.get():
            args, kwargs = map_tensors(self.value, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def value(self, tensor: Tensor) -> Tensor:
        """Return what stands in the place of a tensor."""
        if id(tensor) in self._table:
            return self._table[id(tensor)]
        if not is_wrapped(tensor) or id(tensor) in self._values:
            return tensor
        if id(tensor) in self._wrapped:
            return self._wrapped[id(tensor)][1]
        inner = get_unwrapped(tensor)
        value = self.value(inner)
        if value is inner:
            return tensor
        level = level_of(tensor)
        again = add_batch_dim(value, batch_dim_of(tensor), level) if is_batched(tensor) else wrap_for_grad(value, level)
        self._wrapped[id(tensor)] = tensor, again
        return again


def autocast_as_now(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return what enters the autocast that is on now."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
