"""`LeafwiseRule`: rules that treat each parameter by itself, by a formula, which a trace looks at once."""

from __future__ import annotations

import dataclasses
import math
import operator
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx

from luxtorch._torch import PROXY, functions_unseen, get_dispatch_mode, storage_id, without_modes
from luxtorch._transforms import functional
from luxtorch.core import InputError
from luxtorch.core._sharded import any_sharded, own_parts, sharded_as
from luxtorch.core._tree import tree_flatten, tree_unflatten

from ._hyperparameters import unpack
from ._kernels import InPlace, Kernel, numbers, on_clones, unobserved
from ._leaves import Leaves
from ._rule import ListRule, Updates, negative
from ._rule_state import COUNTS, RuleState, Slots, beside, check_names, groups

R = TypeVar("R")


def traced_once(function: Callable[..., R]) -> Callable[..., R]:
    """Let a pure function that is called for many tensors, such as a formula for each parameter, be traced once.

    To trace an operator takes about a millisecond, to copy one that was traced a tenth of that. So in a trace by
    `make_fx`, as that of `lt.jit`, the function itself runs once for each kind of arguments: structure, shapes,
    strides and dtypes. For others of that kind its operators are copied, and the graph is the same as without. Where
    that may not be right, as in transforms, or if the function returns a view, it runs each time; so it does outside
    of traces.

    Args:
        function: A function of trees to a tree, which depends on nothing else. What is returned is for one trace.
    """
    known: dict[Any, _Recorded | None] = {}

    def call(*trees: Any) -> R:
        mode = None if torch.compiler.is_compiling() or functional() else get_dispatch_mode(PROXY)
        if mode is None:
            return function(*trees)
        leaves, spec = tree_flatten(trees)
        nodes = [_node(leaf, mode.tracer) for leaf in leaves]
        try:
            with functions_unseen():
                kinds = [*map(_kind, leaves)]
            key = spec, *kinds, *(None if node is None else nodes.index(node) for node in nodes)
            recorded = known.get(key)
        except TypeError:  # something has no hash, or is no plain tensor
            return function(*trees)
        if recorded is not None:
            return recorded.copied(nodes, leaves, mode.tracer)  # type: ignore[no-any-return]
        last = next(reversed(mode.tracer.graph.nodes))
        result = function(*trees)
        if key not in known:
            known[key] = _record(last, nodes, leaves, result, mode.tracer)
        return result

    return call


@dataclass(frozen=True)
class _Recorded:
    """What a call has recorded.

    Attributes:
        nodes: The nodes, in order.
        given: The nodes of its arguments; None for what is no traced tensor.
        results: For each leaf of the result the place of an argument, or the node with the tensor's shape, strides and
            dtype.
        spec: The structure of the result.
    """

    nodes: Sequence[fx.Node]
    given: Sequence[fx.Node | None]
    results: Sequence[int | tuple[fx.Node, tuple[Any, ...]]]
    spec: Any

    def copied(self, given: Sequence[fx.Node | None], leaves: Sequence[Any], tracer: Any) -> Any:
        """Record the same for other arguments, and return the result."""
        known: dict[Any, Any] = dict(zip(self.given, given, strict=True))
        for node in self.nodes:
            known[node] = tracer.graph.node_copy(node, known.__getitem__)
        mode = next(leaf.fake_mode for leaf, node in zip(leaves, given, strict=True) if node is not None)
        made = []
        with without_modes(), mode:
            for result in self.results:
                made.append(leaves[result] if isinstance(result, int) else _tensor(known[result[0]], result[1], tracer))
        return tree_unflatten(made, self.spec)


def _tensor(node: fx.Node, about: tuple[Any, ...], tracer: Any) -> Tensor:
    """Return a traced tensor that a node stands for."""
    from torch.fx.experimental.proxy_tensor import track_tensor_tree

    shape, strides, dtype, device = about
    tensor = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    return track_tensor_tree(tensor, fx.Proxy(node, tracer), constant=None, tracer=tracer)


def _record(
    last: fx.Node, given: Sequence[fx.Node | None], leaves: Sequence[Any], result: Any, tracer: Any
) -> _Recorded | None:
    """Return what was recorded after a node; None if it cannot be copied."""
    nodes = []
    node = last.next
    while node.op != "root":
        nodes.append(node)
        node = node.next
    inside = {*nodes, *given}
    if not any(given) or not all(_is_pure(node) and inside.issuperset(node.all_input_nodes) for node in nodes):
        return None
    made, spec = tree_flatten(result)
    memory = [storage_id(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    results: list[int | tuple[fx.Node, tuple[Any, ...]]] = []
    for leaf in made:
        place = next((i for i, one in enumerate(leaves) if one is leaf), None)
        if place is not None:
            results.append(place)
            continue
        node = _node(leaf, tracer)
        if node not in nodes or leaf.requires_grad or leaf.is_conj() or leaf.is_neg() or storage_id(leaf) in memory:
            return None
        memory.append(storage_id(leaf))
        results.append((node, (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)))
    return _Recorded(nodes, given, results, spec)


def _node(leaf: Any, tracer: Any) -> Any:
    """Return the node that stands for a tensor; None if there is none."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import get_proxy_slot

    slot = get_proxy_slot(leaf, tracer, None) if type(leaf) is FakeTensor else None
    return None if slot is None else slot.proxy.node


def _kind(leaf: Any) -> Any:
    """Return what an argument has in common with others of its kind.

    Raises:
        TypeError: If it is a tensor of which this does not say all.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(leaf, Tensor):
        return type(leaf), leaf
    if type(leaf) is not FakeTensor:
        return id(leaf)  # it is a constant
    lazy = leaf.requires_grad, leaf.is_conj(), leaf.is_neg(), any(isinstance(n, torch.SymInt) for n in leaf.shape)
    if leaf.layout is not torch.strided or any(lazy):
        raise TypeError
    start = leaf.storage_offset() if leaf.ndim else 0  # a number may be one of several
    return tuple(leaf.shape), leaf.stride(), start, leaf.dtype, leaf.device


def _is_pure(node: fx.Node) -> bool:
    """Tell whether a node does nothing but compute its result from its arguments."""
    target = node.target
    if node.op != "call_function" or target is operator.getitem:
        return node.op == "call_function"
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


class LeafwiseRule(ListRule):
    """A rule that treats each parameter by itself.

    A rule is its hyperparameters, what it remembers of a parameter (`slots`), and its formula (`delta`).

    Args:
        maximize: Whether to step up instead of down: the formula gets the gradients with the other sign.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> class SignDescent(optim.LeafwiseRule):
        ...     lr: float | torch.Tensor = 0.1
        ...
        ...     def delta(self, g, p, slots, h):
        ...         return -h["lr"] * g.sign(), slots
        >>> p = torch.zeros(2)
        >>> opt_state = optim.setup(SignDescent(0.5), p)
        >>> opt_state, p = optim.update(opt_state, p, torch.tensor([3.0, -4.0]))
        >>> p
        tensor([-0.5000,  0.5000])
    """

    maximize: bool = dataclasses.field(default=False, kw_only=True)

    kernel: ClassVar[Kernel | None] = None
    """The formula over whole lists of leaves, for eager steps that nothing observes."""

    in_place: ClassVar[InPlace | None] = None
    """The same where the parameters and slots are, for steps whose caller gives the old ones away; also on copies,
    where there is no `kernel`."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        formula = ("delta", "shared", "by_count", "kernel")
        if not cls.__dict__.keys().isdisjoint(formula):  # what is inherited computes another one
            cls.kernel = cls.__dict__.get("kernel")
            cls.in_place = cls.__dict__.get("in_place")

    @abstractmethod
    def delta(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        """Return what to add to a parameter, or its new gradient where the rule does not descend, and the new slots.

        Args:
            g: The gradient.
            p: The parameter.
            slots: What the rule remembers of it.
            h: The hyperparameters, by name: 0-d tensors, or 1-d where the field is several numbers; and what `shared`
                and `by_count` make of them.
        """

    def shared(self, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what the formula needs of the hyperparameters alone; it is computed once for all parameters.

        Args:
            h: The hyperparameters, by name. What is returned is added to them, by names of its own.
        """
        return {"-lr": -h["lr"]} if "lr" in h else {}

    def by_count(self, counts: Slots, h: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what the formula needs of counts, such as the number of the step, and the hyperparameters alone.

        It is computed at once for all parameters, whose counts may differ, and `delta` gets each parameter's own.

        Args:
            counts: The slots of one number, in the dtype of the hyperparameters: as they are of one parameter, or of
                several in a dimension. What is returned has that dtype, and one number for each parameter, too.
            h: The hyperparameters, and what `shared` returns.
        """
        return {}

    def eval_parameter(self, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> Tensor:
        """Return what to evaluate with in the place of a parameter; for most rules the parameter."""
        return p

    def eval_parameters(self, leaves: Leaves, state: RuleState) -> list[Tensor]:
        if type(self).eval_parameter is LeafwiseRule.eval_parameter:
            return leaves.params
        new = list(leaves.params)
        for vector, places in groups(self.hyper_now(state), leaves.names, leaves.params, range(len(new))):
            h = self._terms(beside(new[places[0]], vector))
            for i in places:
                p = leaves.params[i]
                new[i] = self.eval_parameter(p, state.leaves[leaves.names[i]], h).to(p.dtype)
        return new

    def step(self, leaves: Leaves, state: RuleState) -> tuple[list[Tensor], RuleState]:
        """Return the new parameters and the new state, by the kernel where it can be used."""
        check_names(leaves.names, state.leaves)
        if any_sharded(leaves.params) and self.elementwise():
            return self._step_of_parts(leaves, state)
        try:
            return self._fused_step(leaves, state) or super().step(leaves, state)
        except RuntimeError:
            _check_shapes(self, leaves, state)
            raise

    def elementwise(self) -> bool:
        """Say whether the formula knows nothing but the elements, so that it may be that of this rank's part."""
        return not self.splits_vectors() and type(self).updates is LeafwiseRule.updates

    def _step_of_parts(self, leaves: Leaves, state: RuleState) -> tuple[list[Tensor], RuleState]:
        """Return the step of sharded parameters: that of this rank's parts, without torch's dispatch of each operator.

        The gradients are in the places of the parameters, and so is what the state remembers of them.
        """
        own = leaves._replace(params=own_parts(leaves.params), grads=own_parts(leaves.grads))
        params, new = self.step(own, state._replace(leaves=own_parts(state.leaves)))
        slots = {}
        for name, old in state.leaves.items():
            slots[name] = {slot: sharded_as(old[slot], value) for slot, value in new.leaves[name].items()}
        return list(map(sharded_as, leaves.params, params)), new._replace(leaves=slots)

    def updates(self, leaves: Leaves, state: RuleState) -> tuple[Updates, RuleState]:
        """Return what becomes of the gradients by the formula, and the new state."""
        check_names(leaves.names, state.leaves)
        updates: Updates = [None] * len(leaves.names)
        slots = dict(state.leaves)
        formula = traced_once(self._formula)
        for vector, places in groups(self.hyper_now(state), leaves.names, leaves.params, _given(leaves)):
            vector = beside(leaves.params[places[0]], vector)
            terms = self._terms_by_leaf(vector, [slots[leaves.names[i]] for i in places])
            for i, h in zip(places, terms, strict=True):
                name = leaves.names[i]
                updates[i], slots[name] = formula(leaves.grads[i], leaves.params[i], slots[name], h)
                if updates[i].shape != leaves.params[i].shape:  # type: ignore[union-attr]
                    _check_shapes(self, leaves, state)
        return updates, state.after(slots)

    def _formula(self, g: Tensor, p: Tensor, slots: Slots, h: Mapping[str, Tensor]) -> tuple[Tensor, Slots]:
        """Return what `delta` does, in the dtypes of the parameter and of the old slots."""
        # The square of a small float16 number is zero.
        g = g.float() if g.dtype == torch.float16 else g
        delta, new = self.delta(-g if self.maximize else g, p, slots, h)
        # A 0-d parameter would be promoted by the float64 hyperparameters.
        return delta.to(p.dtype), {slot: value.to(slots[slot].dtype) for slot, value in new.items()}

    def _terms(self, vector: Tensor) -> dict[str, Tensor]:
        h = unpack(vector, self.hyperparameters)
        return {**h, **self.shared(h)}

    def _terms_by_leaf(self, vector: Tensor, slots: Sequence[Slots]) -> Sequence[Mapping[str, Tensor]]:
        """Return what the formula gets besides the tensors of each parameter."""
        h = self._terms(vector)
        counts = [name for name in COUNTS if name in slots[0]]
        if not counts or type(self).by_count is LeafwiseRule.by_count:
            return [h] * len(slots)
        if len(slots) == 1:
            return [{**h, **self.by_count({name: slots[0][name].to(vector.dtype) for name in counts}, h)}]
        stacked = {name: torch.stack([leaf[name] for leaf in slots]).to(vector.dtype) for name in counts}
        found = self.by_count(stacked, h)
        # In one tensor: inductor computes that once, and not for each parameter again.
        rows = torch.stack([value.to(vector.dtype) for value in found.values()]).unbind()
        columns = zip(*(row.unbind() for row in rows), strict=True)
        return [{**h, **dict(zip(found, column, strict=True))} for column in columns]

    def _fused_step(self, leaves: Leaves, state: RuleState) -> tuple[list[Tensor], RuleState] | None:
        kernel = self.kernel or (self.in_place and partial(on_clones, self.in_place))
        if kernel is None or not unobserved():
            return None
        names, params, grads = leaves.names, list(leaves.params), leaves.grads
        if self.maximize:
            grads = negative(grads)
        slots = dict(state.leaves)
        for hyper, places in groups(self.hyper_now(state), leaves.names, leaves.params, _given(leaves)):
            values = numbers(hyper)
            if values is None:
                return None
            step = kernel(
                [params[i] for i in places],
                [grads[i] for i in places],
                [slots[names[i]] for i in places],
                *values,
            )
            if step is None:
                return None
            for i, param, new in zip(places, *step, strict=True):
                params[i], slots[names[i]] = param, new
        return params, state.after(slots)


def _given(leaves: Leaves) -> list[int]:
    """Return the places of the leaves that have a gradient."""
    return [i for i, g in enumerate(leaves.grads) if g is not None]


def _check_shapes(rule: LeafwiseRule, leaves: Leaves, state: RuleState) -> None:
    """Raise if what the state remembers has not the shape that the parameter asks for; called where a step failed."""
    for name, p in zip(leaves.names, leaves.params, strict=True):
        fresh = rule.slots(p)
        for slot, value in state.leaves[name].items():
            if value.shape != fresh[slot].shape:
                raise InputError(
                    f"The optimizer state has '{slot}' of another shape than the parameter asks for.",
                    expected=str(tuple(fresh[slot].shape)),
                    got=str(tuple(value.shape)),
                    fix="Set up the state with these parameters.",
                    where=name,
                )


def zeros(p: Tensor, *names: str) -> dict[str, Tensor]:
    """Return slots that hold a zero for each element of a parameter."""
    return {name: torch.zeros_like(p) for name in names}


def counted(p: Tensor, *names: str) -> dict[str, Tensor]:
    """Return slots that hold zeros, and the count of the steps."""
    # The step count is what the fused kernels take: float32, beside the parameter. It is exact up to 2**24 steps.
    step = torch.zeros((), dtype=torch.float32, device=p.device)
    return {"step": step, **zeros(p, *names)}


def decayed(g: Tensor, p: Tensor, h: Mapping[str, Tensor]) -> Tensor:
    """Return the gradient with that of the penalty `weight_decay / 2 * (p * p).sum()`."""
    return g + h["weight_decay"] * p


def shares(h: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return how much of two running averages is kept, and how much comes in."""
    beta1, beta2 = h["betas"]
    return {"beta1": beta1, "beta2": beta2, "1-beta1": 1 - beta1, "1-beta2": 1 - beta2}


def sqrt(x: Tensor) -> Tensor:
    """Return the square root, with derivative zero where x is zero.

    An infinite derivative there would make every gradient through a step NaN as soon as one entry of the
    gradient is zero, as it is for each dead unit.
    """
    zero = x == 0
    return x.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def sign(x: Tensor) -> Tensor:
    """Return the sign, NaN where x is not finite: `torch.sign` would hide there that training has failed."""
    return x.sign() + 0.0 * x


def rms(x: Tensor) -> Tensor:
    """Return the root of the mean square."""
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm / math.sqrt(max(x.numel(), 1))
