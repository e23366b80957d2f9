"""Metrics in a CSV file that is the same whether or not the run was stopped on its way."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from luxtorch.core import InputError, KeyNameError

from ._checkpoint import PathLike
from ._checkpoint_file import replacing
from ._metrics import Logger

_STEP = "step"


class CSVLogger(Logger):
    """Keep metrics in a CSV file: one row for each step, one column for each name.

    Every row is in the file when `log` returns. Rows of later steps are dropped: a run that is killed, and resumed from
    a checkpoint, ends with the same file, byte for byte, as one that was not. To keep the file of an earlier run, give
    the next one another path.

    What a step logs in several calls is one row. A new name is a new column at the end, which is empty in the rows
    before: a validation metric comes later than the first loss, and no reason to stop. For that the file is written
    anew, under another name first, so that it is there as a whole at any time.

    Args:
        path: The file. Its folder is made if need be.

    Attributes:
        path: The file.

    Raises:
        InputError: From `log`, if the file is not one that a CSVLogger has written.
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
        # The last row: its step, its numbers, and where in the file it starts.
        self._step, self._row, self._start = -1, dict[str, Any](), 0

    def write(self, step: int, numbers: dict[str, int | float]) -> None:
        """Write numbers into the row of a step; see `Logger.log`, which calls it."""
        if _STEP in numbers:
            raise KeyNameError("The first column is called 'step', and no metric can be.", where=str(self.path))
        row = {**self._row, **numbers} if step == self._step else numbers
        if step < self._step or not row.keys() <= set(self._names):
            self._rewrite(step, row)
        else:
            self._append(step, row)
        self._step, self._row = step, row

    def _append(self, step: int, row: dict[str, Any]) -> None:
        """Write a row at the end of the file, or over the last one if that is of the same step."""
        with open(self.path, "r+b") as file:
            end = file.seek(0, os.SEEK_END)
            start = file.seek(self._start) if step == self._step else end
            file.write(_line([step, *(row.get(name, "") for name in self._names)]))
            if start < end:
                file.truncate()
        self._start = start

    def _rewrite(self, step: int, row: dict[str, Any]) -> None:
        """Write the file anew: the rows before a step and the columns that these have, then the row of the step."""
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
    header, *rows = csv.reader(io.StringIO(text, newline="")) if text else [[_STEP]]
    if text and not text.endswith("\n"):
        rows = rows[:-1]  # the power went while it was written
    if header[:1] != [_STEP] or any(len(cells) != len(header) or not cells[0].isdecimal() for cells in rows):
        raise InputError(
            "The file is not one that a CSVLogger has written.",
            expected="a header that begins with 'step', and as many cells in each row",
            got=f"{text:.80}",
            fix="Give another path, or move the file away.",
            where=str(path),
        )
    return header, rows
