"""Checkpoints: save and load a tree, and `CheckpointManager`, which keeps the last and the best ones of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import isnan, nan
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import torch
from torch import Tensor

from luxtorch._transforms import transformed
from luxtorch.core import InputError, KeyNameError, LuxtorchError, Static, Value, out_of_range, suggest
from luxtorch.core._renamed import optional_counts

from ._checkpoint_format import (
    TEMPORARY,
    CheckpointError,
    Contents,
    header,
    read_header,
    read_tensor,
    replacing,
    write_tensor,
)
from ._checkpoint_tree import Named, contents_of, describe_contents, describe_tree, name_leaves, with_current_names

PathLike: TypeAlias = "str | os.PathLike[str]"


def save_checkpoint(path: PathLike, tree: Any) -> None:
    """Save a tree to a file, atomically.

    The file is a safetensors file, without code. It is written under a temporary name, flushed to the disk and renamed:
    if the process dies, the file is either the complete old one or the complete new one.

    Args:
        path: The file, in an existing folder. An existing file is replaced.
        tree: A TrainState, parameters and states, an optimizer's state, or any pytree whose leaves are tensors, Python
            numbers, strings or None. A tensor that occurs twice is stored once; tensors that share a part of their
            memory are stored separately.

    Raises:
        DTypeError: If a leaf is of another kind.
        KeyNameError: If two leaves have the same dotted name.
        InputError: Inside a transform of torch.func, or a compiled function.
        CheckpointError: If the file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> from luxtorch import training
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     training.save_checkpoint(f"{folder}/model.safetensors", {"weight": torch.tensor([1.0, 2.0])})
        ...     training.load_checkpoint(f"{folder}/model.safetensors", {"weight": torch.zeros(2)})
        {'weight': tensor([1., 2.])}
    """
    write_checkpoint(Path(path), tree, {})


def load_checkpoint(path: PathLike, like: Any) -> Any:
    """Load a tree that `save_checkpoint` has saved.

    `like` determines the structure and the devices; every value comes from the file. That includes the mode, and all
    other `Static` booleans: a model saved in test mode is loaded in test mode, whatever the mode of `like`. Any other
    `Static` is a part of the structure, and must be the same. Leaves are found by their dotted names, so that the order
    of a dict does not matter, except within a ComponentVector, where it is the order of the numbers.

    A learning rate is a value, so that of the file is used afterwards; a schedule is structure, so that of `like` is
    used. `ts.rule` shows the current one. To continue with another rate or another rule, call `ts.adjust(lr=...)` or
    `ts.with_rule(rule)` after loading.

    Old files, in which the `weight` of a normalization is called `scale`, are loaded too.

    Args:
        path: The file.
        like: A tree of the same structure, such as the TrainState before the first step. Its values are not read and
            not changed. It may be on the meta device, which needs no memory: then tensors are loaded to the CPU.

    Returns:
        A tree of the structure of `like`, with tensors on the same devices, in memory of their own. A tensor that
        occurred twice in the saved tree is one tensor again.

    Raises:
        CheckpointError: If the file cannot be read, is not a checkpoint, is damaged, or has a newer format.
        KeyNameError: If names are missing from the file, or are only in the file. The error lists all differences.
        InputError: If the names are the same, but shapes, dtypes or kinds of leaves differ.

    Example:
        >>> import tempfile, torch, luxtorch as lt
        >>> from luxtorch import training
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     training.save_checkpoint(f"{folder}/model.safetensors", {"weight": torch.zeros(3)})
        ...     try:
        ...         training.load_checkpoint(f"{folder}/model.safetensors", {"weight": torch.zeros(2)})
        ...     except lt.InputError as error:
        ...         print(error.got)
        'weight' is float32 of shape (3,) in the file and float32 of shape (2,) in the tree.
    """
    path = Path(path)
    named = name_leaves(like)
    with _reading(path) as file:
        contents = with_current_names(read_header(file), named)
        counts = optional_counts(contents.tensors, named.leaves)
        _check_fits(contents, named, counts)
        flags = {name: Static(flag) for name, flag in contents.flags.items()}
        tensors = _read_tensors(file, contents, named) | {name: _zeros_like(named.leaves[name]) for name in counts}
        return named.rebuilt({**named.leaves, **contents.values, **flags, **tensors})


def write_checkpoint(path: Path, tree: Any, note: Mapping[str, Any]) -> None:
    """Save a tree with a note in the header; see `save_checkpoint`."""
    if transformed():
        headline = "A checkpoint must not be saved inside a transform of torch.func or a compiled function."
        raise InputError(headline, fix="Save what the transformed function returns.")
    contents, tensors = contents_of(name_leaves(tree), note)
    try:
        with replacing(path) as file:
            file.write(header(contents))
            checksums = [write_tensor(file, tensor) for tensor in tensors]
            file.seek(0)
            file.write(header(contents.with_checksums(checksums)))
    except OSError as error:
        fix = "Make room, or create the folder; an existing checkpoint is unchanged."
        raise _failed("written", error, fix, path) from error


def read_note(path: Path) -> dict[str, Any]:
    """Return the note that was saved with a tree.

    Raises:
        CheckpointError: If the file cannot be read, or its header is damaged.
    """
    with _reading(path) as file:
        return read_header(file).note


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file, and add its name to errors."""
    try:
        with open(path, "rb") as file:
            yield file
    except LuxtorchError as error:
        error.where = str(path)
        raise
    except OSError as error:
        raise _failed("read", error, "Check the path and the permissions.", path) from error


def _failed(what: str, error: OSError, fix: str, path: Path) -> CheckpointError:
    got = f"{type(error).__name__}: {error}"
    return CheckpointError(f"The checkpoint cannot be {what}.", got=got, fix=fix, where=str(path))


def _read_tensors(file: BinaryIO, contents: Contents, named: Named) -> dict[str, Tensor]:
    """Read the tensors of a file to the devices of those in the tree, by their names in the tree."""
    users: dict[str, list[str]] = {name: [name] for name in contents.tensors}
    for name, other in contents.same.items():
        users[other].append(name)
    tensors: dict[str, Tensor] = {}
    for name, stored in contents.tensors.items():
        tensor = read_tensor(file, name, stored)
        moved: dict[Any, Tensor] = {}
        for user in users[name]:
            like = named.leaves[user]
            device = _device_of(like)
            place = (device, like.requires_grad)
            if place not in moved:
                moved[place] = tensor.to(device).detach().requires_grad_(like.requires_grad)
            tensors[user] = moved[place]
    return tensors


def _zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, device=_device_of(tensor))


def _device_of(like: Tensor) -> torch.device:
    return torch.device("cpu") if like.is_meta else like.device


def _check_fits(contents: Contents, named: Named, counts: Collection[str]) -> None:
    """Raise an error that lists all differences between a file and a tree, except for missing counts."""
    file, tree = describe_contents(contents), describe_tree(named)
    tree = {name: text for name, text in tree.items() if name not in counts}
    missing = [name for name in tree if name not in file]
    extra = [name for name in file if name not in tree]
    lines = [
        f"'{name}' is {file[name]} in the file and {text} in the tree."
        for name, text in tree.items()
        if file.get(name, text) != text
    ]
    lines += [f"'{name}' is not in the file; in the tree it is {tree[name]}." for name in missing]
    for name in extra:
        lines.append(f"'{name}' is only in the file, as {file[name]}. {_nearest(name, missing)}".rstrip())
    if lines:
        rules = any("optimizer_state." in line.partition(" is ")[0] for line in lines)
        raise (KeyNameError if missing or extra else InputError)(
            "The checkpoint and the tree must have the same names, shapes, dtypes and structure.",
            got="\n            ".join(lines),
            fix="Make the tree from the same model, in the same precision and with the same optimizer, frozen alike."
            + " To continue with another rule, load with the old one, then call ts.with_rule(rule)." * rules,
        )


def _nearest(name: str, missing: list[str]) -> str:
    """Suggest a name for a misspelt leaf, or for one whose layer has another name."""
    group, _, last = name.rpartition(".")
    split = {other: other.rpartition(".") for other in missing}
    misspelt = [other for other in missing if split[other][0] == group and suggest(last, [split[other][2]])]
    return suggest(name, misspelt or [other for other in missing if split[other][2] == last])


_NAME = re.compile(r"step_(\d{8,})\.safetensors")


class CheckpointManager(Value):
    """Keep the checkpoints of one run in a folder: the last few, and those with the best metric.

    It has no state besides the folder: another manager of the same folder, in this process or a later one, continues
    where this one stopped. One run at a time may save into a folder; any number may restore from it.

    Args:
        folder: The folder; it is created when the first checkpoint is saved.
        keep_last: The number of last checkpoints to keep, at least one; None keeps all.
        keep_best: The number of checkpoints with the best metric to keep.
        mode: Whether the best metric is the smallest, "min", as for a loss, or the largest, "max", as for an accuracy.

    Raises:
        InputError: If a number or the mode has another value.

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
            raise out_of_range("mode", self.mode, '"min" or "max"')
        if (self.keep_last is not None and self.keep_last < 1) or self.keep_best < 0:
            got = f"keep_last={self.keep_last}, keep_best={self.keep_best}"
            raise InputError("keep_last must be at least 1, or None, and keep_best at least 0.", got=got)

    def save(self, step: int | Tensor, tree: Any, metric: float | Tensor | None = None) -> None:
        """Save a tree as the checkpoint of a step, and remove those that are not kept.

        Incomplete files of killed runs are removed too.

        Args:
            step: The number of the step, not before that of the last checkpoint. A checkpoint of the same step is
                replaced.
            tree: The tree; see `save_checkpoint`.
            metric: The metric by which checkpoints are compared. One without a metric, or with NaN, is never the best.

        Raises:
            InputError: If the step is not an integer of at least 0, or before that of the last checkpoint.
            CheckpointError: If the file cannot be written.
        """
        number, last = int(step), self.steps()[-1:]
        if number != step or number < 0:
            raise out_of_range("step", step, "an integer of at least 0")
        if last > [number]:
            expected = f"at least {last[0]}, that of the last checkpoint"
            fix = "To continue from an earlier step, remove the later checkpoints, or save into another folder."
            raise out_of_range("step", number, expected, fix=fix, where=str(self.folder))
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError("The folder cannot be created.", got=str(error), where=str(self.folder)) from error
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
            steps = ", ".join(map(str, self.steps()))
            expected, got = f"one of the steps {steps}" * bool(steps), f"{step!r}" if steps else "no checkpoints at all"
            fix = "Check `steps()` first: it is empty before the first save."
            fix = '"best" needs checkpoints with a metric.' if step == "best" else fix
            where = str(self.folder)
            raise CheckpointError("There is no such checkpoint.", expected=expected, got=got, fix=fix, where=where)
        return load_checkpoint(self.path(found[0]), like)

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, in order."""
        if not self._path.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self._path.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def best_step(self) -> int | None:
        """Return the step of the checkpoint with the best metric, the later one of equal ones; None without metrics."""
        return next(iter(self._ranked()), None)

    def path(self, step: int) -> Path:
        """Return the path of a step's checkpoint."""
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
            metric = None  # it was removed by the run that saves
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
                kept.add(step)  # a damaged file is kept for inspection, and must not end a run
        kept.update(self._sorted(metrics)[: self.keep_best])
        for step in steps:
            if step not in kept:
                self.path(step).unlink(missing_ok=True)
