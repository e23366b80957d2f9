"""A folder of checkpoints: the last ones, the best ones, and none that is not whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isnan, nan
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from luxtorch.core import InputError, Value

from ._checkpoint import PathLike, load_checkpoint, read_note, write_checkpoint
from ._checkpoint_file import TEMPORARY
from ._checkpoint_format import CheckpointError

_NAME = re.compile(r"step_(\d{8,})\.safetensors")


class CheckpointManager(Value):
    """Keep the checkpoints of one run in a folder: the last few, and those with the best metric.

    All that it knows is in the folder: another manager of the same folder, in this process or in the next, goes on
    where this one stopped. One run at a time saves into a folder; any number may restore from it.

    Args:
        folder: The folder; it is made when the first checkpoint is saved.
        keep_last: How many of the last checkpoints to keep, at least one; None keeps all.
        keep_best: How many to keep because of their metric.
        mode: Whether the best metric is the smallest, "min", as of a loss, or the largest, "max", as of an accuracy.

    Raises:
        InputError: If a number or the mode is none of these.

    Example:
        >>> import tempfile, torch
        >>> from luxtorch import training
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manager = training.CheckpointManager(folder, keep_last=2)
        ...     for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0]):
        ...         manager.save(step, {"weight": torch.tensor(10.0 * step)}, metric=loss)
        ...     print(manager.steps(), manager.best_step())
        ...     print(manager.restore({"weight": torch.zeros(())}))
        ...     print(manager.restore({"weight": torch.zeros(())}, "best"))
        [1, 3, 4] 1
        {'weight': tensor(40.)}
        {'weight': tensor(10.)}
    """

    folder: PathLike
    keep_last: int | None = 3
    keep_best: int = 1
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        self._set(folder=Path(self.folder))
        if self.mode not in ("min", "max"):
            raise InputError("The best metric is the smallest or the largest.", expected="min or max", got=self.mode)
        if (self.keep_last is not None and self.keep_last < 1) or self.keep_best < 0:
            raise InputError(
                "A manager keeps at least the last checkpoint.",
                expected="keep_last >= 1 or None, and keep_best >= 0",
                got=f"keep_last={self.keep_last}, keep_best={self.keep_best}",
            )

    def save(self, step: int | Tensor, tree: Any, metric: float | Tensor | None = None) -> None:
        """Save a tree as the checkpoint of a step, and remove those that are no longer to be kept.

        What a killed run has left half written is removed too.

        Args:
            step: The number of the step, not before that of the last checkpoint. The checkpoint of the same step is
                replaced.
            tree: What to save; see `save_checkpoint`.
            metric: What the checkpoint is judged by. One without a metric, or whose metric is NaN, is never the best.

        Raises:
            InputError: If the step is no count, or before that of the last checkpoint.
            CheckpointError: If the file cannot be written.
        """
        number, last = int(step), self.steps()[-1:]
        if number != step or number < 0:
            raise InputError("Steps are counted.", expected="0, 1, 2, ...", got=str(step))
        if last > [number]:
            raise InputError(
                "There is a checkpoint of a later step, which would be taken for the last one.",
                expected=f"a step of at least {last[0]}",
                got=str(number),
                fix="To go on from an earlier step, remove the later checkpoints, or save into another folder.",
                where=str(self.folder),
            )
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError("The folder cannot be made.", got=str(error), where=str(self.folder)) from error
        for left_over in self._path.glob(f"step_*.safetensors.*{TEMPORARY}"):
            left_over.unlink(missing_ok=True)
        write_checkpoint(self.path(number), tree, {"metric": None if metric is None else float(metric)})
        self._prune()

    def restore(self, like: Any, step: int | Literal["latest", "best"] = "latest") -> Any:
        """Load the checkpoint of a step; see `load_checkpoint`.

        Args:
            like: A tree of the same structure.
            step: The number of a step, or "latest", or "best".

        Raises:
            CheckpointError: If there is no such checkpoint, or its file is damaged.
            KeyNameError: If it has other names than `like`.
            InputError: If it has other shapes or dtypes than `like`.
        """
        found = self.steps()[-1:] if step == "latest" else self._ranked()[:1] if step == "best" else [step]
        if not found or found[0] not in self.steps():
            raise CheckpointError(
                "There is no such checkpoint.",
                expected=f"one of the steps {', '.join(map(str, self.steps()))}" if self.steps() else "",
                got=f"{step!r}" if self.steps() else "no checkpoints at all",
                fix='"best" needs checkpoints with a metric.'
                if step == "best"
                else "Ask `steps()` first: it is empty before the first save.",
                where=str(self.folder),
            )
        return load_checkpoint(self.path(found[0]), like)

    def steps(self) -> list[int]:
        """Return the steps that there are checkpoints of, in order."""
        if not self._path.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self._path.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def best_step(self) -> int | None:
        """Return the step of the checkpoint with the best metric, the later one of equals, or None."""
        return next(iter(self._ranked()), None)

    def path(self, step: int) -> Path:
        """Return the file of a step's checkpoint."""
        return self._path / f"step_{step:08d}.safetensors"

    @property
    def _path(self) -> Path:
        return Path(self.folder)

    def _ranked(self) -> list[int]:
        """Return the steps of the checkpoints that have a metric, from the best to the worst."""
        return self._sorted({step: self._metric(step) for step in self.steps()})

    def _sorted(self, metrics: Mapping[int, float]) -> list[int]:
        sign = 1 if self.mode == "min" else -1
        judged = [step for step in metrics if not isnan(metrics[step])]
        return sorted(judged, key=lambda step: (sign * metrics[step], -step))

    def _metric(self, step: int) -> float:
        """Return the metric of a checkpoint, NaN if it has none."""
        try:
            metric = read_note(self.path(step)).get("metric")
        except CheckpointError:
            if self.path(step).exists():
                raise
            metric = None  # the run that saves has just removed it
        return nan if metric is None else float(metric)

    def _prune(self) -> None:
        if self.keep_last is None:
            return
        steps, metrics = self.steps(), {}
        kept = set(steps[-self.keep_last :])
        for step in steps:
            try:
                metrics[step] = self._metric(step)
            except CheckpointError:
                kept.add(step)  # a damaged file is for a person to look at, and no reason to end a run
        kept.update(self._sorted(metrics)[: self.keep_best])
        for step in steps:
            if step not in kept:
                self.path(step).unlink(missing_ok=True)
