"""The loss: an immutable description of how far predictions are from targets; and one made of any function."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import dataclass_transform

from luxtorch._transforms import reverse_alone
from luxtorch.core import InputError, Parameters, States, Value, out_of_range, show_value, suggest, wrong_type

Aggregation: TypeAlias = str | Callable[[Tensor], Tensor]
"""How many losses become one: `"mean"`, `"sum"`, `"none"`, or a function of the tensor of losses."""

Model: TypeAlias = Callable[[Any, Any, Any], tuple[Any, States]]

_AGGREGATIONS = ("mean", "sum", "none")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
class Loss(Value, ABC, kw_only=True):
    """Describe a loss by its options; subclasses become frozen, hashable dataclasses.

    A loss has two call forms. `loss(y_hat, y)` is the loss of predictions against targets.
    `loss(model, ps, st, (x, y))` calls the model first and returns `(value, st, {})`: the value, the model's new
    state, and no further statistics. This is the form of a training objective.

    The mean over an empty batch is NaN and its sum is 0, as in torch. What a subclass documents as targets may also
    be booleans or integers: they become numbers of the predictions' dtype.

    A subclass declares its options as annotated fields and defines `each`.

    Args:
        agg: How the losses become one: `"mean"`, `"sum"`, `"none"` to leave them, or a function of their tensor.

    Raises:
        InputError: If the shapes of predictions and targets differ: a loss never broadcasts.
        DTypeError: If the predictions are not floating-point numbers.

    Example:
        >>> import torch, luxtorch as lt
        >>> class FourthPower(lt.Loss):
        ...     def each(self, y_hat, y):
        ...         return (y_hat - y) ** 4
        >>> y_hat, y = torch.tensor([1.0, 2.0]), torch.zeros(2)
        >>> FourthPower()(y_hat, y), FourthPower(agg=torch.amax)(y_hat, y)
        (tensor(8.5000), tensor(16.))
        >>> model = lt.NoOpLayer()
        >>> FourthPower()(model, {}, {}, (y_hat, y))
        (tensor(8.5000), {}, {})

    Source: the loss objects of Lux.
    """

    agg: Aggregation = "mean"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(kw_only=True, **kwargs)

    def __post_init__(self) -> None:
        if not (callable(self.agg) or self.agg in _AGGREGATIONS):
            expected, fix = "'mean', 'sum', 'none' or a function of a tensor", suggest(str(self.agg), _AGGREGATIONS)
            raise out_of_range("agg", self.agg, expected, fix=fix, where=type(self).__name__)

    @abstractmethod
    def each(self, y_hat: Any, y: Any) -> Tensor:
        """Return the losses before they are aggregated.

        Args:
            y_hat: The predictions.
            y: The targets, checked.
        """

    def checked(self, y_hat: Any, y: Any) -> tuple[Any, Any]:
        """Return predictions and targets that `each` may rely on; by default, two tensors of one shape."""
        self.require_floating(y_hat)
        self.require_shape(y, y_hat.shape, y_hat)
        return y_hat, as_numbers(y, y_hat)

    def value(self, y_hat: Any, y: Any) -> Tensor:
        """Return the aggregated loss of predictions against targets."""
        return self.aggregate(self.each(*self.checked(y_hat, y)))

    def aggregate(self, losses: Tensor) -> Tensor:
        """Return what `agg` makes of a tensor of losses."""
        if self.agg == "mean":
            return losses.mean()
        if self.agg == "sum":
            return losses.sum()
        return self.agg(losses) if callable(self.agg) else losses

    def sum_and_weight(self, y_hat: Any, y: Any) -> tuple[Tensor, Tensor | int | None]:
        """Return the sum of the losses and its weight, whose quotient is the mean; no weight for the sum itself.

        By these the losses of the parts of a batch become that of the batch. An objective that uses this loss returns
        the pair in place of a number, to be right for microbatches. Whoever defines `value` anew defines this too.

        Args:
            y_hat: The predictions.
            y: The targets.

        Raises:
            InputError: If the loss of a batch cannot be told from those of its parts.

        Example:
            >>> import torch, luxtorch as lt
            >>> lt.CrossEntropyLoss(ignore_index=0)(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
            tensor(0.6931)
            >>> lt.CrossEntropyLoss(ignore_index=0).sum_and_weight(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
            (tensor(1.3863), tensor(2.))
        """
        defined = [next(c for c in type(self).__mro__ if name in vars(c)) for name in ("value", "aggregate")]
        own = next(c for c in type(self).__mro__ if "sum_and_weight" in vars(c))
        if self.agg not in ("mean", "sum") or not all(issubclass(own, c) for c in defined):
            raise self.error(
                "The loss of a batch cannot be told from those of its parts.",
                expected="agg='mean' or agg='sum', and a method sum_and_weight that goes with the loss's own value",
                got=f"agg={show_value(self.agg)} of {type(self).__name__}",
                fix="Define sum_and_weight(y_hat, y), or compute the loss of the whole batch at once.",
            )
        losses = self.each(*self.checked(y_hat, y))
        return total(losses), losses.numel() if self.agg == "mean" else None

    def of_microbatch(
        self, model: Model, ps: Parameters, st: States, data: tuple[Any, Any]
    ) -> tuple[tuple[Tensor, Tensor | int | None], States, dict[str, Any]]:
        """Return `(sum_and_weight, st, {})`: the objective to take for a part of a batch."""
        x, y = self._pair(data)
        y_hat, st = model(x, ps, st)
        return self.sum_and_weight(y_hat, y), st, {}

    @overload
    def __call__(self, y_hat: Any, y: Any, /) -> Tensor: ...

    @overload
    def __call__(
        self, model: Model, ps: Parameters, st: States, data: tuple[Any, Any], /
    ) -> tuple[Tensor, States, dict[str, Any]]: ...

    def __call__(self, *args: Any) -> Any:
        """Return `value(y_hat, y)`, or `(value, st, {})` of a model's output for `x` against `y`."""
        if len(args) == 2:
            return self.value(*args)
        if len(args) != 4:
            raise self._form_error(f"{len(args)} arguments")
        model, ps, st, data = args
        x, y = self._pair(data)
        y_hat, st = model(x, ps, st)
        return self.value(y_hat, y), st, {}

    def _pair(self, data: Any) -> Any:
        if isinstance(data, tuple | list) and len(data) == 2:
            return data
        raise self._form_error(f"data that is {type(data).__name__}, not (x, y)")

    def _form_error(self, got: str) -> InputError:
        return self.error(
            "The arguments are of neither of the two call forms.",
            expected="loss(y_hat, y) or loss(model, ps, st, (x, y))",
            got=got,
        )

    def require_floating(self, y_hat: Tensor) -> None:
        """Raise a DTypeError unless the predictions are real floating-point numbers."""
        if not y_hat.dtype.is_floating_point:
            fix = "Predictions come first, targets second: loss(y_hat, y)."
            raise wrong_type("y_hat", y_hat, "of a real floating-point dtype", fix=fix, where=repr(self))

    def require_shape(self, y: Tensor, shape: tuple[int, ...], y_hat: Tensor) -> None:
        """Raise an InputError unless the targets have the given shape."""
        if y.shape != shape:
            raise self.error(
                "The targets do not fit the predictions: a loss never broadcasts.",
                expected=f"targets of shape {tuple(shape)} for predictions of shape {tuple(y_hat.shape)}",
                got=f"targets of shape {tuple(y.shape)}",
                fix="Reshape one of them, for instance by unsqueeze, squeeze or expand.",
            )

    def require_number(self, name: str, low: float, high: float = math.inf, *, strict: bool = False) -> None:
        """Raise an InputError unless an option is a number from `low`, itself excluded if `strict`, to `high`."""
        value = getattr(self, name)
        if not isinstance(value, int | float) or not low <= value <= high or (strict and value == low):
            bounds = (f"above {low}" if strict else f"of at least {low}") + (
                f" and at most {high}" if high < math.inf else ""
            )
            raise out_of_range(name, value, f"a number {bounds}", where=type(self).__name__)

    def error(self, problem: str, *, expected: str, got: str, fix: str = "") -> InputError:
        """Return an InputError that names this loss."""
        return InputError(problem, expected=expected, got=got, fix=fix, where=repr(self))

    def __repr__(self) -> str:
        shown: list[str] = []
        for item in fields(self):
            value = getattr(self, item.name)
            if not item.kw_only:
                shown.insert(0, show_value(value))
            elif value != item.default:
                shown.append(f"{item.name}={show_value(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


def total(losses: Tensor) -> Tensor:
    """Return the sum of losses, in a dtype that has room for it."""
    return losses.sum(dtype=torch.float32 if losses.dtype == torch.float16 else None)


def as_numbers(y: Tensor, y_hat: Tensor) -> Tensor:
    """Return targets as numbers: booleans and integers take the predictions' dtype."""
    return y if y.dtype.is_floating_point else y.to(y_hat.dtype)


def machine_epsilon(y_hat: Tensor, epsilon: float | None) -> float:
    """Return the number to add inside a logarithm: the given one, or the machine epsilon of the dtype."""
    return torch.finfo(y_hat.dtype).eps if epsilon is None else epsilon


def log_sigmoid(x: Tensor) -> Tensor:
    """Return `log(sigmoid(x))`."""
    # torch's kernel resizes what it computes where vmap is in vmap.
    return F.logsigmoid(x) if reverse_alone() else -F.softplus(-x, 1.0, 40.0)


def checked_parts(loss: Loss, y_hat: Any, names: tuple[str, ...], shape: str) -> tuple[Tensor, ...]:
    """Return predictions that are a tuple of floating-point tensors, of which the loss takes so many.

    Args:
        loss: The loss.
        y_hat: The predictions.
        names: What each is called.
        shape: What their shapes are, in words.
    """
    if not isinstance(y_hat, tuple | list) or len(y_hat) != len(names):
        got = f"{len(y_hat)} tensors" if isinstance(y_hat, tuple | list) else type(y_hat).__name__
        expected = f"a tuple ({', '.join(names)}) of tensors{shape}"
        raise loss.error("The predictions are not the tensors that the loss compares.", expected=expected, got=got)
    for name, x in zip(names, y_hat, strict=True):
        if not isinstance(x, Tensor):
            raise wrong_type(name, x, "a tensor", where=repr(loss))
        loss.require_floating(x)
    return tuple(y_hat)


def unlike(loss: Loss, y_hat: tuple[Tensor, ...], names: tuple[str, ...], shape: str) -> InputError:
    """Return the error for predictions whose shapes do not fit; see `checked_parts`."""
    return loss.error(
        "The predictions do not fit each other: a loss never broadcasts.",
        expected=f"a tuple ({', '.join(names)}) of tensors{shape}",
        got=", ".join(f"{name} of shape {tuple(x.shape)}" for name, x in zip(names, y_hat, strict=True)),
    )


class GenericLossFunction(Loss):
    """Make a loss of a function of predictions and targets.

    Args:
        function: An elementwise function `function(y_hat, y)` of two tensors of one shape.
        agg: `"mean"`, `"sum"`, `"none"`, or a function of the losses.

    Shape:
        Predictions and targets of one shape, any.

    Example:
        >>> import torch, luxtorch as lt
        >>> loss = lt.GenericLossFunction(lambda y_hat, y: (y_hat - y).cosh().log())
        >>> loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
        tensor(0.)

    Source: Lux's `GenericLossFunction`.
    """

    function: Callable[[Tensor, Tensor], Tensor] = field(kw_only=False)

    def each(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Return `function(y_hat, y)`."""
        return self.function(y_hat, y)
