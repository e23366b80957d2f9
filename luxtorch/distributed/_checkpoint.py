"""Sharded checkpoints: all ranks write them together, and any number of ranks can read them."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from luxtorch.components import ComponentVector
from luxtorch.core import (
    InputError,
    KeyNameError,
    named_leaves,
    path_name,
    suggest,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
    wrong_type,
)
from luxtorch.core._renamed import current_names, optional_counts, same_after_renaming

from ._world import DistributedError, collective, rank, world_size

T = TypeVar("T")
PathLike: TypeAlias = "str | os.PathLike[str]"

_DESCRIPTION = "luxtorch.json"
_FORMAT = 1


def save_checkpoint(path: PathLike, tree: Any) -> None:
    """Save a tree to a folder: every rank writes its parts of sharded tensors, and the rest is written once.

    All ranks call it together. The folder gets its name when it is complete; until then one of that name is as it was.
    It is in the format of `torch.distributed.checkpoint`, with a description in a file besides.

    Args:
        path: The folder, on a file system that all ranks share. A checkpoint of that name is replaced.
        tree: A TrainState, or any pytree whose leaves are tensors, sharded or not. Of a tensor that is not sharded, the
            value of one rank is saved: average the states before, and call `fold_in_rank` on states that were loaded.

    Raises:
        DTypeError: If a leaf is not a tensor.
        KeyNameError: If two leaves have the same dotted name.
        DistributedError: If the folder cannot be written, is there and is not a checkpoint, or if a rank has died.

    Example:
        >>> import tempfile, torch
        >>> from luxtorch import distributed
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     distributed.save_checkpoint(f"{folder}/step_10", {"weight": torch.tensor([1.0, 2.0])})
        ...     distributed.load_checkpoint(f"{folder}/step_10", {"weight": torch.zeros(2)})
        {'weight': tensor([1., 2.])}

    Source: `torch.distributed.checkpoint.save`.
    """
    path = Path(path)
    tensors = {name: leaf.detach() for name, leaf in _named(tree).items()}
    description = json.dumps(_describe(tree))
    unfinished = path.with_name(f".{path.name}.unfinished")
    _on_first_rank(lambda: _clear(path, unfinished), path)
    with _storage("written", path):
        save(tensors, storage_writer=FileSystemWriter(unfinished), no_dist=world_size() == 1)
    _on_first_rank(lambda: _finish(path, unfinished, description), path)


def load_checkpoint(path: PathLike, like: T) -> T:
    """Load a tree that `save_checkpoint` has saved, on as many ranks as there are now.

    All ranks call it together. `like` decides the structure, where the tensors go, and how they are sharded; that may
    differ from what was saved. The values come from the folder. The modes of layers are a part of the structure.
    Folders from when the `weight` of a normalization was called `scale` are loaded too.

    Args:
        path: The folder.
        like: A tree of the same names, shapes and dtypes, such as the TrainState before the first step. Its values are
            not read and not changed. Plain tensors on the meta device cost no memory, and are loaded to the CPU.

    Returns:
        A tree of the structure of `like`.

    Raises:
        KeyNameError: If names are missing from the folder, or are in the folder alone.
        InputError: If the names are the same, but shapes, dtypes or the names in a ComponentVector differ.
        DTypeError: If a leaf of `like` is not a tensor.
        DistributedError: If the folder cannot be read, or if a rank has died.

    Example:
        >>> import tempfile, torch, luxtorch as lt
        >>> from luxtorch import distributed
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     distributed.save_checkpoint(f"{folder}/step_10", {"weight": torch.zeros(3)})
        ...     try:
        ...         distributed.load_checkpoint(f"{folder}/step_10", {"weight": torch.zeros(2)})
        ...     except lt.InputError as error:
        ...         print(error.got)
        'weight' is float32 of shape (3,)

    Source: `torch.distributed.checkpoint.load`.
    """
    path = Path(path)
    wanted = _named(like)
    saved = _read_description(path)
    today = current_names(saved["leaves"], wanted)
    saved["leaves"] = {today[name]: text for name, text in saved["leaves"].items()}
    counts = optional_counts(saved["leaves"], wanted)
    _check_fits(saved, _describe(like), counts, path)
    tensors = {name: _empty_like(leaf) for name, leaf in wanted.items()}
    for name in counts:
        tensors[name].zero_()
    with _storage("read", path):
        held = {name: tensors[new] for name, new in today.items()}
        load(held, storage_reader=FileSystemReader(path), no_dist=world_size() == 1)
    _, spec = tree_flatten(like)
    leaves = [tensors[name].requires_grad_(leaf.requires_grad) for name, leaf in wanted.items()]
    loaded: T = tree_unflatten(leaves, spec)
    return loaded


def _named(tree: Any) -> dict[str, Tensor]:
    """Return the leaves by their names."""
    tensors: dict[str, Tensor] = {}
    for name, leaf in named_leaves(tree):
        if not isinstance(leaf, Tensor):
            raise wrong_type(
                f"The leaf '{name}'", leaf, "a tensor", fix="Save torch.tensor(...) of it, or leave it out."
            )
        if name in tensors:
            raise KeyNameError(f"A checkpoint cannot hold two leaves of the name '{name}'.", fix="Rename one of them.")
        tensors[name] = leaf
    return tensors


def _describe(tree: Any) -> dict[str, Any]:
    """Describe a tree by what has to be the same when it is saved and when it is loaded."""
    leaves = {
        name: f"{str(leaf.dtype).removeprefix('torch.')} of shape {tuple(leaf.shape)}"
        for name, leaf in named_leaves(tree)
    }
    nodes, _ = tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, ComponentVector))
    axes = {path_name(path): repr(node.axes) for path, node in nodes if isinstance(node, ComponentVector)}
    return {"format": _FORMAT, "leaves": leaves, "axes": axes}


def _empty_like(leaf: Tensor) -> Tensor:
    return torch.empty_like(leaf, device="cpu" if leaf.is_meta else None, requires_grad=False)


@contextmanager
def _storage(done: str, path: Path) -> Iterator[None]:
    """Let torch read or write a checkpoint, and explain what fails."""
    with collective("checkpoint"), warnings.catch_warnings():
        # A single process is not worth a warning.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            yield
        except (CheckpointException, OSError) as error:
            raise _failed(done, path, error) from error


def _on_first_rank(action: Callable[[], None], path: Path) -> None:
    """Run an action on the first rank, and raise on all ranks if it fails."""
    outcome = [""]
    if rank() == 0:
        try:
            action()
        except OSError as error:
            outcome[0] = f"{type(error).__name__}: {error}"
    if world_size() > 1:
        with collective("checkpoint"):
            dist.broadcast_object_list(outcome, 0)
    if outcome[0]:
        raise _failed("written", path, outcome[0])


def _clear(path: Path, unfinished: Path) -> None:
    if path.exists() and not (path / _DESCRIPTION).exists():
        raise FileExistsError(f"{path} is there, and is not a checkpoint")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()


def _finish(path: Path, unfinished: Path, description: str) -> None:
    (unfinished / _DESCRIPTION).write_text(description)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    unfinished.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description: dict[str, Any] = json.loads((path / _DESCRIPTION).read_text())
        if description["format"] > _FORMAT:
            raise ValueError("it was written by a newer luxtorch")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _failed("read", path, error) from error
    return description


def _check_fits(saved: dict[str, Any], like: dict[str, Any], counts: Collection[str], path: Path) -> None:
    """Raise an error that lists the differences, unless a folder has just the leaves of a tree, except some counts."""
    file, tree = saved["leaves"], {name: text for name, text in like["leaves"].items() if name not in counts}
    like = {**like, "leaves": tree}
    missing, extra = [name for name in tree if name not in file], [name for name in file if name not in tree]
    if missing or extra:
        hint = suggest(extra[0], missing or tree) if extra else suggest(missing[0], file)
        raise KeyNameError(
            "The checkpoint must have the names of the tree to load it into.",
            expected=_listed(f"'{name}'" for name in tree),
            got=_listed([f"without '{name}'" for name in missing] + [f"with '{name}'" for name in extra]),
            fix=f"{hint} Make the tree from the same model, and with the same optimizer.".lstrip(),
            where=str(path),
        )
    for what in ("leaves", "axes"):
        wanted, came = like[what], saved[what]
        differing = [name for name in wanted if not same_after_renaming(came.get(name, ""), wanted[name])]
        if differing:
            raise InputError(
                "The checkpoint must have the shapes and dtypes of the tree to load it into.",
                expected=_listed(f"'{name}' is {wanted[name]}" for name in differing),
                got=_listed(f"'{name}' is {came.get(name, 'not named')}" for name in differing),
                fix="Make the tree from the same model, in the same precision and with the same optimizer.",
                where=str(path),
            )


def _listed(texts: Iterable[str]) -> str:
    texts = list(texts)
    return ", ".join(texts[:8]) + f", and {len(texts) - 8} more" * (len(texts) > 8) or "nothing"


def _failed(done: str, path: Path, error: BaseException | str) -> DistributedError:
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return DistributedError(
        f"The checkpoint cannot be {done}.",
        expected="a folder that all ranks can reach" + ", with a checkpoint of all ranks" * (done == "read"),
        got=f"{text:.500}",
        fix="Check the path, the space and the rights; a checkpoint that was there before is as it was.",
        where=str(path),
    )
