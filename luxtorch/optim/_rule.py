"""The base classes of rules: `Rule` (init and update) and `ListRule`, which works on the list of all leaves."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torchopt.base import GradientTransformation as GradientTransformation
from typing_extensions import Self, dataclass_transform

from luxtorch.core import DTypeError, InputError, KeyNameError, tree_leaves

from ._hyperparameters import NOT_NEGATIVE, Range, check, declared, pack, readable, show, unpack
from ._kernels import unobserved
from ._leaves import Leaves, from_components, pair, rebuild, to_components, with_extra
from ._rule_state import Hyper, RuleState, Slots, map_hyper
from ._schedules import Value, evaluate, rescaled, scale_of, schedule_of


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
class Rule(GradientTransformation):
    """A rule: an immutable description of how gradients become updates.

    A subclass becomes a frozen dataclass: two rules with equal fields are equal. A field whose default is a float
    or a tuple of floats is a hyperparameter: when a state is set up its value moves there as a tensor, where it can
    be adjusted, differentiated and batched. In place of a float it may be a schedule: one of this package, or any
    function of the number of steps taken, such as torchopt's. A field of any other kind, such as a flag or a count,
    is part of the structure: a compiled step is compiled anew for each value. Hyperparameters are not negative; other
    ranges are declared by `Annotated[..., Range("[0, 1)")]`.

    Subclasses define `init(params)` and `update(grads, state, params, **extra)`, as torchopt and optax ask. Most rules
    treat one parameter at a time: write those as a `LeafwiseRule`.
    """

    hyperparameters: ClassVar[dict[str, tuple[int, ...]]] = {}
    """The names of the hyperparameters, and the shapes of their tensors."""

    ranges: ClassVar[dict[str, tuple[Range, ...]]] = {}
    """Where their values lie, see `Range`."""

    takes_extra: ClassVar[bool] = True
    """Whether `update` takes arguments besides those that torchopt passes."""

    # Without fields a rule is no namedtuple to the tree libraries, which would take it apart into two functions.
    _fields = None  # type: ignore[assignment]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclasses.dataclass(frozen=True, repr=False)(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        cls.hyperparameters, cls.ranges = declared(cls, fields)
        parameters = inspect.signature(cls.update).parameters.values()
        cls.takes_extra = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        torch.serialization.add_safe_globals([cls])  # torch.load(weights_only=True) may make one

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return tuple.__new__(cls, ())

    def __post_init__(self) -> None:
        for name, shape in self.hyperparameters.items():
            value = getattr(self, name)
            if all(each is not None for each in (value if isinstance(value, tuple) else (value,))):  # see `bare`
                one_for_all = bool(shape) and callable(value)  # a schedule is that of one number
                check(name, value if one_for_all else scale_of(value), shape, self._ranges_of(name, value))
            if isinstance(value, list):  # a rule is hashable
                object.__setattr__(self, name, tuple(value))

    def _ranges_of(self, name: str, value: Any) -> tuple[Range, ...]:
        """Return where a hyperparameter lies; of one that follows a schedule, where its factor does."""
        schedule = schedule_of(value)
        if not isinstance(schedule, tuple):
            return self.ranges[name] if schedule is None else (NOT_NEGATIVE,)
        ranges = self.ranges[name] * len(schedule)
        return tuple(r if s is None else NOT_NEGATIVE for r, s in zip(ranges, schedule, strict=False))

    def __repr__(self) -> str:
        shown = [field.name for field in written(self) if field.name != "maximize" or getattr(self, field.name)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    def __ne__(self, other: object) -> bool:
        return not self == other  # a tuple would compare its items

    # torchopt unpacks a transformation as the pair (init, update).
    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter((self.init, self.update))

    def __getitem__(self, index: Any) -> Any:
        return (self.init, self.update)[index]

    def __len__(self) -> int:
        return 2

    def bare(self) -> Self:
        """Return the rule without the values of its hyperparameters, which are tensors in its state.

        It is what is static in a state: rules which differ only in these values share one structure, hence one compiled
        graph. A schedule stays.
        """
        bare = copy.copy(self)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.name in self.hyperparameters:
                value = schedule_of(value)
            elif type(value) is tuple:  # a rule is one, too
                value = tuple(map(_bare, value))
            else:
                value = _bare(value)
            object.__setattr__(bare, field.name, value)
        return bare

    def __reduce__(self) -> tuple[Any, ...]:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return _make, (type(self), {field.name: getattr(self, field.name) for field in fields})


Updates: TypeAlias = "list[Tensor | None]"
"""What to add to each parameter, or its new gradient; None where it is left alone."""


ChangeState: TypeAlias = "Callable[[ListRule, RuleState], RuleState]"
"""Changes the state of one rule."""


def needed(rule: object, leaves: Leaves, name: str) -> Any:
    """Return what a step was given besides the gradients, or raise if it was not."""
    value = leaves.extra.get(name)
    if value is None:
        raise InputError(
            f"{type(rule).__name__} needs {name}= in each step.",
            expected=f"optim.update(opt_state, ps, grads, {name}=...)",
            got=", ".join(leaves.extra) or "the gradients alone",
            fix="A training step passes value=, the loss, by itself." if name == "value" else "",
        )
    return value


class ListRule(Rule):
    """A rule that works on the list of all leaves, whatever the tree that they come from.

    A subclass defines `updates`; and `step`, if it can do better than to add the updates to the parameters. That
    is how the last rule of a chain keeps its fused kernel: those before it change the list of gradients, and the
    last one takes a step as if it were alone. All numbers in the list are real: a complex parameter is there as its
    real and imaginary parts, in a last dimension of two.

    Example:
        >>> import torch
        >>> from luxtorch import optim
        >>> class Normalize(optim.ListRule):
        ...     descends = False
        ...
        ...     def updates(self, leaves, state):
        ...         norm = sum(g.square().sum() for g in leaves.grads if g is not None).sqrt()
        ...         return [None if g is None else g / norm for g in leaves.grads], state
        >>> ps = {"a": torch.zeros(1), "b": torch.zeros(1)}
        >>> opt_state = optim.setup(optim.OptimiserChain(Normalize(), optim.Descent(0.5)), ps)
        >>> optim.update(opt_state, ps, {"a": torch.tensor([30.0]), "b": torch.tensor([40.0])})[1]
        {'a': tensor([-0.3000]), 'b': tensor([-0.4000])}
    """

    descends: ClassVar[bool] = True
    """Whether the updates are to be added to the parameters; otherwise they are gradients, changed."""

    needs_params: ClassVar[bool] = False
    """Whether the updates depend on the parameters, and not on the gradients alone."""

    @abstractmethod
    def updates(self, leaves: Leaves, state: Any) -> tuple[Updates, Any]:
        """Return what becomes of the gradients, and the new state."""

    def step(self, leaves: Leaves, state: Any) -> tuple[list[Tensor], Any]:
        """Return the new parameters and the new state."""
        updates, state = self.updates(leaves, state)
        pairs = zip(leaves.params, updates, strict=True)
        if self.descends:
            return [p if u is None else p + u for p, u in pairs], state
        return [p if g is None else p - g for p, g in pairs], state

    def eval_parameters(self, leaves: Leaves, state: Any) -> list[Tensor]:
        """Return the parameters to evaluate with; for most rules those that are trained."""
        return leaves.params

    def splits_vectors(self) -> bool:
        """Say whether the components of a ComponentVector are leaves of their own from the beginning.

        They have to be where the updates depend on the shapes of parameters, or on their names.
        """
        return False

    def takes_complex(self) -> bool:
        """Say whether complex parameters may come as their real and imaginary parts, in a last dimension of two.

        They may where the updates do not depend on the shapes of parameters.
        """
        return not self.splits_vectors()

    def check(self, leaves: Leaves) -> None:
        """Raise unless the rule can step on parameters of these names and kinds."""
        check_names_differ(leaves.names)
        if leaves.in_parts and not self.takes_complex():
            raise DTypeError(
                f"{type(self).__name__} does not take complex parameters.",
                expected="real parameters",
                got="a complex one",
                fix="Give it another rule, such as optim.Groups({path: optim.Adam()}, rest=...); or keep "
                "torch.view_as_real(p) as the parameter, and view it as complex in the model.",
                where=next(name for name in leaves.names if name in leaves.in_parts),
            )

    def check_adjusted(self, values: Mapping[str, Any], state: RuleState) -> None:
        """Raise if hyperparameters cannot get these values in the middle of training."""

    def keeps_copies(self) -> bool:
        """Say whether the state holds copies of the parameters, which nothing else may change."""
        return False

    def by_parameter(self) -> bool:
        """Say whether a hyperparameter may differ between parameters."""
        return True

    def map_states(self, change: ChangeState, state: Any) -> Any:
        """Return the state, with that of this rule, or of each rule that it is made of, changed."""
        return change(self, state)

    def in_force(self, state: Any) -> GradientTransformation:
        """Return the rule with the hyperparameters of a state: a number, or a tensor where it cannot be read.

        Where parameters have different ones, adjusted by path, there is None.
        """
        if not isinstance(state, RuleState):
            return self
        hyper = state.hyper.values() if isinstance(state.hyper, dict) else [state.hyper]
        vectors = list({id(vector): vector for vector in hyper}.values())
        rule = copy.copy(self)
        if vectors:
            rows = [unpack(vector, self.hyperparameters) for vector in vectors]
            for name, shape in self.hyperparameters.items():
                value = _common([readable(row[name], shape) for row in rows])
                object.__setattr__(rule, name, rescaled(schedule_of(getattr(self, name)), value))
        return rule

    def own_numbers(self, state: Any, dtype: torch.dtype) -> list[Tensor]:
        """Return what of a state stays as it is where parameters and states are cast to a dtype."""
        nodes = tree_leaves(state, is_leaf=lambda node: isinstance(node, RuleState))
        return [number for node in nodes if isinstance(node, RuleState) for number in node.own_numbers(dtype)]

    def slots(self, p: Tensor) -> Slots:
        """Return what the rule remembers of a parameter before the first step."""
        return {}

    def leaves_of(self, params: Any) -> Leaves:
        """Return the leaves of parameters as the rule sees them, or raise where it cannot step on them."""
        leaves = pair(to_components(params) if self.splits_vectors() else params, None)
        self.check(leaves)
        return leaves

    def init(self, params: Any) -> Any:
        """Return the state before the first step."""
        leaves = self.leaves_of(params)
        names, tensors = leaves.names, leaves.params
        device = tensors[0].device if tensors else torch.device("cpu")
        hyper = pack({name: scale_of(getattr(self, name)) for name in self.hyperparameters}, beside=device)
        steps = torch.zeros((), dtype=torch.int64, device=hyper.device) if self.counts() else ()
        return RuleState(hyper, {name: self.slots(p) for name, p in zip(names, tensors, strict=True)}, steps)

    def counts(self) -> bool:
        """Say whether the state counts the steps."""
        return bool(self.scheduled())

    def hyper_now(self, state: RuleState) -> Hyper:
        """Return the hyperparameters of the next step: those of the state, times their schedules."""
        if not isinstance(state.steps, Tensor):
            return state.hyper
        steps = state.steps
        step: Value = steps.to(torch.float64)
        if unobserved() and type(steps) is Tensor and steps.is_cpu and steps.ndim == 0:
            step = float(steps)  # a schedule of numbers is ten times as fast
        factors: list[Value] = []
        for name, shape in self.hyperparameters.items():
            schedule = schedule_of(getattr(self, name))
            each = schedule if isinstance(schedule, tuple) else (schedule,) * prod(shape)
            factors += [1.0 if one is None else evaluate(one, step) for one in each]
        if isinstance(step, float):
            factor = torch.tensor(factors, dtype=torch.float64)
        else:
            factor = torch.stack([torch.as_tensor(each, dtype=step.dtype, device=step.device) for each in factors])
        return map_hyper(lambda vector: vector * factor, state.hyper)

    def update(
        self, updates: Any, state: Any, params: Any = None, *, inplace: bool = False, **extra: Any
    ) -> tuple[Any, Any]:
        """Return what to add to the parameters, and the new state: the step as torchopt asks for it.

        Args:
            updates: The gradients, or what the rules before this one in a chain made of them.
            state: The state.
            params: The parameters.
            inplace: torchopt's word, not followed: a rule never writes into its arguments.
            **extra: What some rules ask for besides; see `luxtorch.optim.update`.
        """
        del inplace
        if params is None:
            if self.needs_params:
                raise InputError(
                    f"{type(self).__name__} needs the parameters as well as the gradients.",
                    fix="Call rule.update(grads, state, params=ps).",
                )
            params = updates
        if not self.splits_vectors():
            new, state = self.updates(with_extra(pair(params, updates), params, extra), state)
            return rebuild(params, iter(new)), state
        tree = to_components(params)
        leaves = pair(tree, to_components(updates))
        leaves = with_extra(leaves, tree, extra, lambda new: from_components(params, new))
        some, state = self.updates(leaves, state)
        # The parts of a vector that are left alone have to be there.
        new = [torch.zeros_like(p) if u is None else u for p, u in zip(leaves.params, some, strict=True)]
        return from_components(params, rebuild(tree, iter(new))), state

    def describe(self, state: Any) -> str:
        """Return the rule as it was written, with the hyperparameters that the state holds by now."""
        by_path = isinstance(state.hyper, dict)
        vectors = {} if by_path else self._vectors(state.hyper)
        parts = ["by path"] if by_path else []
        for field in written(self):
            value = getattr(self, field.name)
            if field.name in vectors:
                text = show(vectors[field.name], {field.name: self.hyperparameters[field.name]})
                if isinstance(value, tuple):  # of schedules
                    numbers = readable(vectors[field.name], self.hyperparameters[field.name])
                    each = map(rescaled, value, numbers)
                    text = f"{field.name}=({', '.join(map(repr, each))})"
                elif schedule_of(value) is not None:
                    alone = text == f"{field.name}=1.0"
                    text = f"{field.name}={value!r}" if alone else f"{text} * {value!r}"
                parts.append(text)
            elif field.name not in self.hyperparameters and value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def scheduled(self) -> list[str]:
        """Return the names of the hyperparameters that follow a schedule."""
        return [name for name in self.hyperparameters if schedule_of(getattr(self, name)) is not None]

    def _vectors(self, hyper: Tensor) -> dict[str, Tensor]:
        sizes = [prod(shape) for shape in self.hyperparameters.values()]
        return dict(zip(self.hyperparameters, torch.split(hyper, sizes, -1) if sizes else (), strict=True))


def _common(values: list[Any]) -> Any:
    """Return the value that all are, or None."""
    first = values[0]
    return first if len(values) == 1 or all(type(v) is type(first) and v == first for v in values) else None


def check_names_differ(names: list[str]) -> None:
    """Raise unless parameters have names of their own."""
    if len(set(names)) < len(names):
        raise KeyNameError(
            "Two parameters have the same dotted name.",
            got=next(name for name in names if names.count(name) > 1),
            fix="Name them by strings without dots.",
        )


def negative(updates: Updates) -> Updates:
    """Return what is to be added where the given is to be subtracted, and the other way round."""
    return [None if u is None else -u for u in updates]


def written(rule: Rule) -> list[dataclasses.Field[Any]]:
    """Return the fields of a rule in the order in which one writes them."""
    return sorted(dataclasses.fields(rule), key=lambda field: bool(field.kw_only))  # type: ignore[arg-type]


def _bare(value: Any) -> Any:
    return value.bare() if isinstance(value, Rule) else value


def _make(cls: type[Rule], fields: dict[str, Any]) -> Rule:
    return cls(**fields)


torch.serialization.add_safe_globals([_make])
