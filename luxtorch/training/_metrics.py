"""Metrics of a run: numbers with names, and what all loggers of them have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor
from typing_extensions import Self

from luxtorch.core import InputError, KeyNameError


class Logger(ABC):
    """Keep the metrics of a run, step by step; the base of all loggers.

    A logger of one's own derives from it, and says in `write` where the numbers go. A logger is a context manager that
    closes itself.

    Example:
        >>> import torch
        >>> from luxtorch import training
        >>> class Printer(training.Logger):
        ...     def write(self, step, numbers):
        ...         print(step, numbers)
        >>> with Printer() as logger:
        ...     logger.log(10, {"loss": torch.tensor(0.5), "test": {"accuracy": 1.0}})
        10 {'loss': 0.5, 'test/accuracy': 1.0}
    """

    def log(self, step: int | Tensor, metrics: Mapping[str, Any]) -> None:
        """Keep the metrics of a step.

        Tensors are read, for which a GPU has to finish what it is doing: every tenth step may do.

        Args:
            step: The number of the step. A run that is resumed from a checkpoint, or goes back to one, comes to steps
                that it has logged before: loggers of files then drop what they have of this step and later ones.
            metrics: Numbers and 0-d tensors by their names. They may be NaN or infinite. Nested dicts have their
                names joined by "/".

        Raises:
            InputError: If a metric is no number, or the step is no count.
            KeyNameError: If two metrics have the same joined name.
        """
        count = int(step)
        if count != step or count < 0:
            raise InputError("Steps are counted.", expected="0, 1, 2, ...", got=str(step))
        numbers = {name: read(figure) for name, figure in flatten(metrics).items()}
        if numbers:
            self.write(count, numbers)

    @abstractmethod
    def write(self, step: int, numbers: dict[str, int | float]) -> None:
        """Keep the numbers of a step: what a logger has to implement.

        Args:
            step: The number of the step. It may be that of the call before, or an earlier one.
            numbers: The numbers by their joined names, at least one.
        """

    def close(self) -> None:  # noqa: B027
        """Finish what is not yet written; `log` may begin again afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def flatten(metrics: Mapping[str, Any], inside: str = "") -> dict[str, int | float | Tensor]:
    """Return metrics by their joined names, without reading a tensor.

    Raises:
        InputError: If one is no number.
        KeyNameError: If two have the same name.
    """
    flat: dict[str, int | float | Tensor] = {}
    for key, value in metrics.items():
        name = f"{inside}{key}"
        found = flatten(value, f"{name}/") if isinstance(value, Mapping) else {name: _figure(name, value)}
        for other in flat.keys() & found.keys():
            raise KeyNameError(f"Two metrics have the name '{other}'.", fix="Rename one of them.")
        flat.update(found)
    return flat


def read(figure: int | float | Tensor) -> int | float:
    """Return the number in a 0-d tensor, or the number itself."""
    number: int | float = figure.item() if isinstance(figure, Tensor) else figure
    return int(number) if isinstance(number, bool) else number


def _figure(name: str, value: Any) -> int | float | Tensor:
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        return value.detach()
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    got = f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.80}"
    raise InputError(
        f"The metric '{name}' is no number.",
        expected="a real number, or a 0-d tensor with one",
        got=got,
        fix="Log its mean, for instance, or leave it out.",
    )
