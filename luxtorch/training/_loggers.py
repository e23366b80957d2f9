"""Progress bars, and loggers of metrics to CSV files and TensorBoard."""

from __future__ import annotations

import csv
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor
from typing_extensions import Self

from luxtorch.core import InputError, KeyNameError, LuxtorchError, described, out_of_range

from ._checkpoint import PathLike
from ._checkpoint_format import replacing


class Logger(ABC):
    """Log the metrics of a run; the base class of all loggers.

    A custom logger derives from it and implements `write`. A logger is a context manager that closes itself.

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
        """Log the metrics of a step.

        Tensors are read, which synchronizes with a GPU: logging every tenth step may be enough.

        Args:
            step: The number of the step. A run that is resumed from a checkpoint logs steps again: loggers of files
                then drop this step and later ones.
            metrics: Numbers and 0-d tensors by their names. They may be NaN or infinite. Names of nested
                dicts are joined by "/".

        Raises:
            InputError: If a metric is not a number, or the step is not an integer of at least 0.
            KeyNameError: If two metrics have the same joined name.
        """
        count = int(step)
        if count != step or count < 0:
            raise out_of_range("step", step, "an integer of at least 0")
        numbers = {name: read(figure) for name, figure in flatten(metrics).items()}
        if numbers:
            self.write(count, numbers)

    @abstractmethod
    def write(self, step: int, numbers: dict[str, int | float]) -> None:
        """Write the numbers of a step; a logger has to implement it.

        Args:
            step: The number of the step. It may be that of the previous call, or an earlier one.
            numbers: The numbers by their joined names, at least one.
        """

    def close(self) -> None:  # noqa: B027
        """Flush and close files; `log` may be called again afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def flatten(metrics: Mapping[str, Any], inside: str = "") -> dict[str, int | float | Tensor]:
    """Return metrics by their joined names, without reading a tensor.

    Raises:
        InputError: If one is not a number.
        KeyNameError: If two have the same name.
    """
    flat: dict[str, int | float | Tensor] = {}
    for key, value in metrics.items():
        name = f"{inside}{key}"
        found = flatten(value, f"{name}/") if isinstance(value, Mapping) else {name: _figure(name, value)}
        for other in flat.keys() & found.keys():
            raise KeyNameError(f"Two metrics must not have the name '{other}'.", fix="Rename one of them.")
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
    headline = f"The metric '{name}' must be a real number, or a 0-d tensor with one."
    got = described(value) if isinstance(value, Tensor) else f"{value!r:.80}"
    raise InputError(headline, got=got, fix="Log its mean, for instance, or leave it out.")


T = TypeVar("T")


class Progress(Generic[T]):
    """Iterate with a progress bar; made by `progress`."""

    def __init__(self, iterable: Iterable[T], total: float | None, options: dict[str, Any]) -> None:
        self._iterable = iterable
        self._options = {"total": total, "unit": "step", "mininterval": 0.5, "miniters": 1, **options}
        self._shown = _Shown()

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]  # raises a TypeError without a length

    def __iter__(self) -> Iterator[T]:
        self._shown.figures = {}
        bar = _bar()
        return iter(self._iterable if bar is None else bar(self._iterable, postfix=self._shown, **self._options))

    def show(self, **metrics: Any) -> None:
        """Set the metrics that are shown beside the bar when it is next drawn.

        Args:
            **metrics: Numbers, 0-d tensors, and dicts of these, by their names.

        Raises:
            InputError: If a metric is not a number.
        """
        self._shown.figures = flatten(metrics)


def progress(iterable: Iterable[T], total: float | None = None, **options: Any) -> Progress[T]:
    """Show a progress bar while iterating, with metrics such as the loss, steps per second and remaining time.

    The bar is drawn twice a second, and metrics are read only then: reading a tensor at each step would make the CPU
    wait for the GPU. It needs tqdm, from the extra `progress`; without it, the loop runs without a bar.

    Args:
        iterable: An iterable, such as a data loader. The result can be iterated again, with a new bar.
        total: The number of steps, if the iterable has no length.
        **options: Other options of tqdm, such as `desc="epoch 3"`, `leave=False` or `initial=1000`.

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
    """Hold the metrics that are shown; tqdm formats them when it draws the bar."""

    figures: dict[str, int | float | Tensor]

    def __str__(self) -> str:
        return "".join(f", {name}={_text(read(figure))}" for name, figure in self.figures.items())


def _text(number: int | float) -> str:
    return str(number) if isinstance(number, int) else f"{number:.4g}"


def _bar() -> Any:
    """Return tqdm's class for the terminal or notebook; None if tqdm is not installed."""
    try:
        tqdm = import_module("tqdm.auto").tqdm
    except ModuleNotFoundError:
        return None
    # Without tqdm's monitor, a thread that would draw the bar, and read tensors, in the middle of a step.
    return type("Bar", (tqdm,), {"monitor_interval": 0})


_STEP = "step"


class CSVLogger(Logger):
    """Log metrics to a CSV file: one row for each step, one column for each name.

    Every row is in the file when `log` returns. Rows of later steps are dropped: a run that is killed, and resumed from
    a checkpoint, ends with the same file, byte for byte, as one that was not. To keep the file of an earlier run, use
    another path for the next one.

    Several calls for a step are one row. A new name is a new column at the end, which is empty in earlier rows, as for
    a validation metric that comes after the first loss. Then the file is rewritten under a temporary name and renamed,
    so that it is complete at any time.

    Args:
        path: The file. Its folder is created if it does not exist.

    Attributes:
        path: The file.

    Raises:
        InputError: From `log`, if the file was not written by a CSVLogger.
        KeyNameError: From `log`, if a metric is called "step".

    Example:
        >>> import tempfile, torch
        >>> from luxtorch import training
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     logger = training.CSVLogger(f"{folder}/metrics.csv")
        ...     logger.log(1, {"loss": torch.tensor(0.5)})
        ...     logger.log(2, {"loss": torch.tensor(0.25)})
        ...     logger.log(2, {"test": {"accuracy": 0.9}})
        ...     print(logger.path.read_text())
        step,loss,test/accuracy
        1,0.5,
        2,0.25,0.9
        <BLANKLINE>
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._names: list[str] = []
        # The last row: its step, its numbers, and its start in the file.
        self._step, self._row, self._start = -1, dict[str, Any](), 0

    def write(self, step: int, numbers: dict[str, int | float]) -> None:
        """Write numbers into the row of a step; see `Logger.log`, which calls it."""
        if _STEP in numbers:
            raise KeyNameError("A metric must not be called 'step', as the first column is.", where=str(self.path))
        row = {**self._row, **numbers} if step == self._step else numbers
        if step < self._step or not row.keys() <= set(self._names):
            self._rewrite(step, row)
        else:
            self._append(step, row)
        self._step, self._row = step, row

    def _append(self, step: int, row: dict[str, Any]) -> None:
        """Append a row to the file, or overwrite the last one of the same step."""
        with open(self.path, "r+b") as file:
            end = file.seek(0, os.SEEK_END)
            start = file.seek(self._start) if step == self._step else end
            file.write(_line([step, *(row.get(name, "") for name in self._names)]))
            if start < end:
                file.truncate()
        self._start = start

    def _rewrite(self, step: int, row: dict[str, Any]) -> None:
        """Rewrite the file: the rows before a step, their columns, and the row of the step."""
        old, rows = _read(self.path)
        rows = [cells for cells in rows if int(cells[0]) < step]
        kept = [0, *(i for i in range(1, len(old)) if any(cells[i] for cells in rows))]
        names = [old[i] for i in kept[1:]]
        names += [name for name in row if name not in names]
        lines = [[_STEP, *names]]
        lines += [[cells[i] for i in kept] + [""] * (1 + len(names) - len(kept)) for cells in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            file.writelines(map(_line, lines))
            start = file.tell()
            file.write(_line([step, *(row.get(name, "") for name in names)]))
        self._names, self._start = names, start


def _line(cells: Iterable[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a file, none if there is no file."""
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    try:
        header, *rows = csv.reader(io.StringIO(text, newline="")) if text else [[_STEP]]
    except csv.Error:  # before Python 3.11, for a zero byte
        header, rows = [], []
    if text and not text.endswith("\n"):
        rows = rows[:-1]  # the last row is incomplete
    if header[:1] != [_STEP] or any(len(cells) != len(header) or not cells[0].isdecimal() for cells in rows):
        expected = "a header that begins with 'step', and as many cells in each row"
        fix = "Use another path, or move the file away."
        headline = "The file must be one that a CSVLogger has written."
        raise InputError(headline, expected=expected, got=f"{text:.80}", fix=fix, where=str(path))
    return header, rows


class TensorBoardLogger(Logger):
    """Log metrics for TensorBoard, to a folder that `tensorboard --logdir` shows.

    When a run is resumed, TensorBoard drops the first step that is logged again and later ones. Metrics are in the
    folder within a second, or when the logger is closed, in single precision. It needs the extra `tensorboard`.

    Args:
        folder: The folder, one for each run. It is created by the first `log`.

    Attributes:
        folder: The folder.

    Raises:
        LuxtorchError: If TensorBoard is not installed.

    Example:
        >>> import torch
        >>> from luxtorch import training
        >>> def train(folder):
        ...     with training.TensorBoardLogger(folder) as logger:
        ...         logger.log(1, {"loss": torch.tensor(0.5), "test": {"accuracy": 0.9}})
    """

    def __init__(self, folder: PathLike) -> None:
        try:
            self._open = import_module("torch.utils.tensorboard").SummaryWriter
        except ImportError as error:
            fix = "Run `pip install luxtorch[tensorboard]`, or use a CSVLogger."
            raise LuxtorchError("TensorBoard must be installed.", fix=fix) from error
        self.folder = Path(folder)
        self._writer: Any = None
        self._step = -1

    def write(self, step: int, numbers: dict[str, int | float]) -> None:
        """Write numbers for TensorBoard; see `Logger.log`, which calls it."""
        if step < self._step:
            self.close()
        if self._writer is None:
            self._writer = self._open(str(self.folder), purge_step=step, flush_secs=1)
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        self._step = step

    def close(self) -> None:
        """Close the file; the next `log` opens another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
