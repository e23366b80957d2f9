"""A progress bar that does not make a GPU wait for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any, Generic, TypeVar

from torch import Tensor

from ._metrics import flatten, read

T = TypeVar("T")


class Progress(Generic[T]):
    """Go through an iterable behind a progress bar; made by `progress`."""

    def __init__(self, iterable: Iterable[T], total: float | None, options: dict[str, Any]) -> None:
        self._iterable = iterable
        self._options = {"total": total, "unit": "step", "mininterval": 0.5, "miniters": 1, **options}
        self._shown = _Shown()

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]  # its own TypeError, if it has none

    def __iter__(self) -> Iterator[T]:
        self._shown.figures = {}
        bar = _bar()
        return iter(self._iterable if bar is None else bar(self._iterable, postfix=self._shown, **self._options))

    def show(self, **metrics: Any) -> None:
        """Show metrics beside the bar when it is drawn next, in the place of those before.

        Args:
            **metrics: Numbers, 0-d tensors, and dicts of these, by their names.

        Raises:
            InputError: If a metric is no number.
        """
        self._shown.figures = flatten(metrics)


def progress(iterable: Iterable[T], total: float | None = None, **options: Any) -> Progress[T]:
    """Show a progress bar while something is gone through, with the loss, the steps per second and the time left.

    The bar is drawn twice a second, and then only are the metrics read: reading a tensor at each step would make the
    CPU wait for the GPU. It needs tqdm, from the extra `progress`; without it nothing is shown, and the loop is the
    same.

    Args:
        iterable: What to go through, such as a data loader. It can be gone through again, with a new bar.
        total: How many steps there are, if the iterable has no length.
        **options: What else tqdm takes, such as `desc="epoch 3"`, `leave=False` or `initial=1000`.

    Returns:
        An iterable with a method `show`.

    Example:
        >>> import torch
        >>> from luxtorch import training
        >>> for x in (bar := training.progress([1.0, 2.0, 3.0], disable=True)):
        ...     loss = torch.tensor(x) ** 2
        ...     bar.show(loss=loss, accuracy=0.5)
    """
    return Progress(iterable, total, options)


class _Shown:
    """Be the metrics that are shown; tqdm makes a text of them when it draws the bar."""

    figures: dict[str, int | float | Tensor]

    def __str__(self) -> str:
        return "".join(f", {name}={_text(read(figure))}" for name, figure in self.figures.items())


def _text(number: int | float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.4g}"


def _bar() -> Any:
    """Return tqdm's class for a terminal or a notebook, wherever this is, or None if there is no tqdm."""
    try:
        tqdm = import_module("tqdm.auto").tqdm
    except ModuleNotFoundError:
        return None
    # Without tqdm's monitor: a thread that draws bars, and so would read tensors, in the middle of a step.
    return type("Bar", (tqdm,), {"monitor_interval": 0})
