"""The state of a training run: all that a step needs besides the data, in one immutable value."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from luxtorch import optim
from luxtorch.core import (
    InputError,
    KeyNameError,
    LuxtorchError,
    count,
    out_of_range,
    register_node,
    suggest,
    tree_leaves,
    tree_unflatten,
)
from luxtorch.core._describe import tree_html
from luxtorch.core._paths import Path
from luxtorch.core._plain import write_as
from luxtorch.core._table import plain, section, shown
from luxtorch.core._tree import DEFERRED
from luxtorch.optim.modifiers._chain import as_rule


class Trees(NamedTuple):
    """Hold the parts of a training state that are made of tensors."""

    parameters: Any
    states: Any
    optimizer_state: optim.OptState
    step: Tensor
    skipped: Tensor


class Statics:
    """Hold the parts of a training state that belong to its structure, not to its leaves.

    Equal models make equal structures. The rule does not count here: what is static about it is in the structure of
    the optimizer's state already, so that states which differ in the learning rate alone share a compiled step.
    """

    __slots__ = ("model", "rule")

    def __init__(self, model: Any, rule: GradientTransformation) -> None:
        self.model = model
        self.rule = rule

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Statics) and bool(self.model == other.model)

    def __hash__(self) -> int:
        return hash(self.model)


class TrainState:
    """Hold a model with its parameters, states and optimizer, between one training step and the next.

    It never changes: a step returns a new one. It is a pytree whose leaves are all tensors, with the model and the
    rule in its structure, so it can be compiled over, moved to a device, and batched by `torch.vmap`.

    Args:
        model: What the objective calls; usually a layer. It must be hashable.
        parameters: The parameters: nested dicts of tensors, a ComponentVector, or any pytree of these. Tensors that
            autograd records, such as `torch.nn.Parameter`s, should be detached, unless derivatives of whole steps
            are wanted.
        states: The states of the model.
        rule: A rule of `luxtorch.optim`, or a torchopt optimizer.

    Attributes:
        model: The model.
        parameters: The parameters.
        states: The states.
        rule: The rule that is in force, with the hyperparameters that it has by now.
        optimizer_state: The state of the optimizer.
        step: How many steps were taken: a 0-d int64 tensor, beside the parameters.
        skipped: How many more were skipped by `skip_nonfinite=True`.

    Raises:
        InputError: If the model cannot be called.
        DTypeError: If the rule is none, or a parameter is not a real tensor.
        LuxtorchError: From then on, whatever is asked of a state that was given away by `donate=True`.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch import optim, training
        >>> model = lt.Dense(2, 1)
        >>> ts = training.TrainState(model, *lt.setup(0, model), optim.Adam(0.1))
        >>> x = torch.ones(8, 2)
        >>> for _ in range(100):
        ...     _, loss, _, ts = training.single_train_step(lt.MSELoss(), (x, 3 * x[:, :1]), ts)
        >>> bool(loss < 1e-2)
        True
        >>> ts.adjust(lr=0.01)
        TrainState(
            step 100, 3 parameters
            OptState(Adam(lr=0.01, betas=(0.9, 0.999), eps=1e-08), 2 parameters)
            Dense(2 -> 1)    # 3 parameters: weight (1, 2), bias (1,)
        )

    Source: Lux's `Training.TrainState`.
    """

    __slots__ = ("_deferred", "_fixed", "_held", "_owned")

    _deferred: tuple[Any, ...] | None
    """Leaves and structure of a state that a compiled step has returned, until somebody asks for a part of it."""
    _fixed: Statics
    """The parts that belong to the structure."""
    _held: Trees | None
    """The parts made of tensors; None once they were given away."""
    _owned: tuple[int, ...] | None
    """The storages of the parameters, by torch's handles, if nobody else holds these nor the optimizer's."""

    def __init__(self, model: Any, parameters: Any, states: Any, rule: GradientTransformation) -> None:
        if isinstance(model, type) or not callable(model):
            raise out_of_range("model", model, "a layer or a function, for the objective to call")
        optimizer_state = optim.setup(rule, parameters)
        device = next((leaf.device for leaf in tree_leaves(parameters)), None)
        zero = torch.zeros((), dtype=torch.int64, device=device)
        self._assign(Statics(model, rule), Trees(parameters, states, optimizer_state, zero, zero.clone()))

    @classmethod
    def _of(cls, statics: Statics, trees: Trees, owned: tuple[int, ...] | None = None) -> TrainState:
        """Return a training state of these parts, unchecked."""
        ts = cls.__new__(cls)
        ts._assign(statics, trees, owned)
        return ts

    @classmethod
    def _later(cls, *deferred: Any) -> TrainState:
        """Return a training state of leaves and a structure; it is assembled when somebody asks for a part of it."""
        ts = cls.__new__(cls)
        for name, value in (("_fixed", None), ("_held", None), ("_owned", None), ("_deferred", deferred)):
            object.__setattr__(ts, name, value)
        return ts

    def _whole(self) -> TrainState:
        """Return the training state itself, assembled."""
        deferred = self._deferred  # read once: another thread may assemble it meanwhile
        if deferred is None:
            return self
        leaves, spec, structure = deferred
        if torch.compiler.is_compiling():
            return tree_unflatten(leaves, structure)  # type: ignore[no-any-return]  # what it traces it must not change
        made = spec.unflatten(leaves)
        self._assign(made._fixed, made._held)
        return self

    def _assign(self, statics: Statics, trees: Trees, owned: tuple[int, ...] | None = None) -> None:
        object.__setattr__(self, "_fixed", statics)
        object.__setattr__(self, "_held", trees)
        object.__setattr__(self, "_owned", owned)
        object.__setattr__(self, "_deferred", None)

    def _with(self, trees: Trees, owned: tuple[int, ...] | None = None) -> TrainState:
        """Return a training state of the same model and rule."""
        return TrainState._of(self._statics, trees, owned)

    @property
    def _statics(self) -> Statics:
        """The parts that belong to the structure."""
        return self._whole()._fixed

    @property
    def _trees(self) -> Trees:
        """The parts made of tensors, for a look that does not outlive the state; see `_shared`."""
        held = self._whole()._held
        if held is None:
            raise LuxtorchError(
                "This TrainState was given away: a step with donate=True has reused its memory.",
                expected="the TrainState that the step returned",
                fix="Write `..., ts = single_train_step(objective, data, ts, donate=True)`, or leave donate=True out.",
            )
        return held

    def _shared(self) -> Trees:
        """Return the parts made of tensors, which somebody may hold from now on: no donated step writes into them."""
        trees = self._trees
        if not torch.compiler.is_compiling() and self._owned is not None:
            object.__setattr__(self, "_owned", None)
        return trees

    def _give_away(self) -> None:
        """Make each later use an error: a donated step has reused the memory."""
        object.__setattr__(self, "_held", None)

    @property
    def model(self) -> Any:
        """The model."""
        _ = self._trees  # an error, if they were given away
        return self._statics.model

    @property
    def rule(self) -> GradientTransformation:
        """The rule that is in force: as it was given, with the hyperparameters that it has by now.

        Of a hyperparameter that was adjusted by path it is None. It is what the next step takes: after
        `load_checkpoint`, the numbers of the file.
        """
        opt_state, given = self._trees.optimizer_state, as_rule(self._statics.rule)
        same = given.bare() == opt_state.layout.rule
        return (given if same else opt_state.layout.rule).in_force(opt_state.state)

    @property
    def parameters(self) -> Any:
        """The parameters."""
        return self._shared().parameters

    @property
    def states(self) -> Any:
        """The states of the model."""
        return self._shared().states

    @property
    def optimizer_state(self) -> optim.OptState:
        """The state of the optimizer."""
        return self._shared().optimizer_state

    @property
    def step(self) -> Tensor:
        """How many steps were taken."""
        return self._shared().step

    @property
    def skipped(self) -> Tensor:
        """How many steps were skipped."""
        return self._shared().skipped

    def adjust(
        self,
        lr: float | Tensor | None = None,
        *,
        path: Path = None,
        **hyperparameters: float | tuple[float, ...] | Tensor,
    ) -> TrainState:
        """Return a training state with other values of some hyperparameters; see `luxtorch.optim.adjust`.

        Args:
            lr: The learning rate.
            path: For which parameters; None for all.
            **hyperparameters: Others by their names.

        Raises:
            KeyNameError: If the rule has no such hyperparameter, or the path stands for no parameter.
        """
        return self.replace(optimizer_state=optim.adjust(self.optimizer_state, lr, path=path, **hyperparameters))

    def replace(self, **fields: Any) -> TrainState:
        """Return a training state with some fields replaced.

        Args:
            **fields: New values of `model`, `parameters`, `states`, `optimizer_state`, `step` or `skipped`. For a
                new rule, see `with_rule`.

        Raises:
            KeyNameError: If there is no such field.

        Example:
            >>> import luxtorch as lt
            >>> from luxtorch import optim, training
            >>> model = lt.Dense(2, 1)
            >>> ts = training.TrainState(model, *lt.setup(0, model), optim.Descent(0.1))
            >>> ts = ts.replace(optimizer_state=optim.freeze(ts.optimizer_state, "bias"))
            >>> ts.optimizer_state
            OptState(Descent(lr=0.1), 2 parameters, frozen: bias)
        """
        for name in fields:
            if name != "model" and name not in Trees._fields:
                raise KeyNameError(
                    f"A TrainState has no field '{name}' to replace.",
                    expected=", ".join(("model", *Trees._fields)),
                    got=name,
                    fix="Make a new one: TrainState(ts.model, ts.parameters, ts.states, rule), or with the moments of "
                    "this one: ts.with_rule(rule)."
                    if name == "rule"
                    else suggest(name, ("model", *Trees._fields)),
                )
        trees = self._shared()
        statics = self._statics
        statics = Statics(fields.pop("model"), statics.rule) if "model" in fields else statics
        return TrainState._of(statics, trees._replace(**fields))

    def with_rule(self, rule: GradientTransformation, *, steps: int | None = None) -> TrainState:
        """Return a training state that goes on by another rule, with the moments of this one.

        So a constant becomes a schedule in the middle of a run, a `ClipNorm` is added, and parameters that were
        unfrozen join in: these begin anew, while the others go on.

        Args:
            rule: The new rule; see `luxtorch.optim.transfer` for what is kept.
            steps: The step at which its schedules begin; None to go on where the old ones are.

        Raises:
            InputError: If nothing that the old rule remembers is of use to the new one.

        Example:
            >>> import luxtorch as lt
            >>> from luxtorch import optim, training
            >>> model = lt.Chain(lt.Dense(2, 8, "tanh"), lt.Dense(8, 1))
            >>> ts = training.TrainState(*lt.freeze(model, *lt.setup(0, model), "layer_1"), optim.Adam(0.1))
            >>> model, ps, st = lt.unfreeze(ts.model, ts.parameters, ts.states)
            >>> rule = optim.Adam(optim.cosine(0.1, 0.0, 1000))
            >>> ts.replace(model=model, parameters=ps, states=st).with_rule(rule).optimizer_state
            OptState(Adam(lr=Cosine(start=0.1, end=0.0, steps=1000), betas=(0.9, 0.999), eps=1e-08), 4 parameters)
        """
        trees = self._shared()
        optimizer_state = optim.transfer(trees.optimizer_state, rule, trees.parameters, steps=steps)
        return TrainState._of(Statics(self.model, rule), trees._replace(optimizer_state=optimizer_state))

    def __setattr__(self, name: str, value: Any) -> None:
        raise InputError(
            f"A TrainState does not change, and '{name}' cannot be set.", fix=f"Use ts = ts.replace({name}=...)."
        )

    def __delattr__(self, name: str) -> None:
        raise InputError(f"A TrainState does not change, and '{name}' cannot be deleted.")

    def __reduce__(self) -> tuple[Any, ...]:
        return TrainState._of, (Statics(self.model, self._statics.rule), self._shared())

    def __repr__(self) -> str:
        trees = self._whole()._held
        if trees is None:
            return "TrainState(given away by donate=True)"
        lines = [
            progress(trees),
            repr(trees.optimizer_state),
            *repr(self._statics.model).splitlines(),
        ]
        return "\n".join(("TrainState(", *(f"    {line}" for line in lines), ")"))

    def _repr_html_(self) -> str:
        trees = self._whole()._held
        if trees is None:
            return plain(repr(self))  # it was given away
        parameters, states = tree_html(trees.parameters, "parameters"), tree_html(trees.states, "states")
        parts = [shown(self.model), plain(repr(trees.optimizer_state)), parameters, states]
        return section("TrainState", parts, progress(trees))


def progress(trees: Trees) -> str:
    """Say in words how far a training state has come, and of how many parameters."""
    skipped = "" if _show(trees.skipped) == "0" else f" ({_show(trees.skipped)} skipped)"
    return f"step {_show(trees.step)}{skipped}, {count(trees.parameters):,} parameters"


def _show(number: Any) -> str:
    if isinstance(number, Tensor) and number.ndim == 0:
        try:
            return str(number.item())
        except (RuntimeError, NotImplementedError):  # it is traced, batched by vmap, or on the meta device
            return "<traced>"
    return f"<{'x'.join(map(str, number.shape))}>" if isinstance(number, Tensor) else repr(number)


register_node(
    TrainState,
    lambda ts: (list(ts._shared()), ts._statics),
    lambda children, statics: TrainState._of(statics, Trees(*children)),
    names=Trees._fields,
)
write_as(Statics, lambda statics: (statics.model, statics.rule), lambda parts: Statics(*parts))
DEFERRED[TrainState] = TrainState._later
