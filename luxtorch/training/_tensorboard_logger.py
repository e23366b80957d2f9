"""Metrics for TensorBoard."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from luxtorch.core import LuxtorchError

from ._checkpoint import PathLike
from ._metrics import Logger


class TensorBoardLogger(Logger):
    """Keep metrics for TensorBoard, in a folder that `tensorboard --logdir` shows.

    TensorBoard forgets what it has seen of a step and of later ones when a run is resumed, or goes back, to log that
    step. What is logged is in the folder within a second, and when the logger is closed, in single precision. It needs
    the extra `tensorboard`.

    Args:
        folder: The folder, one for each run. It is made by the first `log`.

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
            raise LuxtorchError(
                "TensorBoard is not installed.", fix="Run `pip install luxtorch[tensorboard]`, or use a CSVLogger."
            ) from error
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
        """Close the file; the next `log` begins another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
