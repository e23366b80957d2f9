"""Saving a tree to a file, and loading it again."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from luxtorch._transforms import transformed
from luxtorch.core import InputError, KeyNameError, LuxtorchError, Static, suggest
from luxtorch.core._former import uncounted

from ._checkpoint_file import read_tensor, replacing, write_tensor
from ._checkpoint_format import CheckpointError, Contents, header, read_header
from ._checkpoint_tree import Named, contents_of, contents_today, describe_contents, describe_tree, name_leaves

PathLike: TypeAlias = "str | os.PathLike[str]"


def save_checkpoint(path: PathLike, tree: Any) -> None:
    """Save a tree to a file, which is there as a whole or not at all.

    The file is a safetensors file; nothing in it is code. It is written under a temporary name, brought to the disk
    and renamed: whenever the process dies, a file of that name is the old one or the new one, and whole.

    Args:
        path: The file, in a folder that is there. One of that name is replaced.
        tree: A TrainState, parameters and states, an optimizer's state, or any pytree whose leaves are tensors, Python
            numbers, strings or None. A tensor that it holds twice is stored once; tensors that share a part of their
            memory are stored each for itself.

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

    `like` decides the structure and where the tensors go; every value comes from the file. That includes the mode, and
    all that is a `Static` boolean: a model saved in test mode is loaded in test mode, whatever the mode of `like`. Any
    other `Static` is a part of the structure, and must be the same. Leaves are found by their dotted names, so that the
    order of a dict does not matter, except within a ComponentVector, where it is the order of the numbers.

    A learning rate is a value, and so the file's is in force afterwards; a schedule is structure, and that of `like`
    holds. `ts.rule` shows what is in force. To go on with another rate, or by another rule, call `ts.adjust(lr=...)` or
    `ts.with_rule(rule)` after loading.

    Files from when the `weight` of a normalization was called `scale` are loaded too.

    Args:
        path: The file.
        like: A tree of the same structure, such as the TrainState before the first step. Its values are not read and
            not changed. It may be on the meta device, and then costs no memory: what is loaded is on the CPU.

    Returns:
        A tree of the structure of `like`, its tensors on the devices of those of `like`, with memory of their own.
        A tensor that the saved tree held twice is one tensor again.

    Raises:
        CheckpointError: If the file cannot be read, is no checkpoint, is not byte for byte what was written, or is of
            a newer format.
        KeyNameError: If names are missing from the file, or are in the file alone. The error lists all differences.
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
        contents = contents_today(read_header(file), named)
        counts = uncounted(contents.tensors, named.leaves)
        _check_fits(contents, named, counts)
        flags = {name: Static(flag) for name, flag in contents.flags.items()}
        tensors = _read_tensors(file, contents, named) | {name: _zeros_like(named.leaves[name]) for name in counts}
        return named.rebuilt({**named.leaves, **contents.values, **flags, **tensors})


def write_checkpoint(path: Path, tree: Any, note: Mapping[str, Any]) -> None:
    """Save a tree together with a note; see `save_checkpoint`."""
    if transformed():
        raise InputError(
            "A checkpoint cannot be saved inside a transform of torch.func or a compiled function.",
            fix="Save what the transformed function returns.",
        )
    contents, tensors = contents_of(name_leaves(tree), note)
    try:
        with replacing(path) as file:
            file.write(header(contents))
            checksums = [write_tensor(file, tensor) for tensor in tensors]
            file.seek(0)
            file.write(header(contents.with_checksums(checksums)))
    except OSError as error:
        raise CheckpointError(
            "The checkpoint cannot be written.",
            got=f"{type(error).__name__}: {error}",
            fix="Make room, or the folder; a checkpoint that was there before is as it was.",
            where=str(path),
        ) from error


def read_note(path: Path) -> dict[str, Any]:
    """Return the note that was saved together with a tree.

    Raises:
        CheckpointError: If the file cannot be read, or its header is not what was written.
    """
    with _reading(path) as file:
        return read_header(file).note


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file, and let errors say which one it is."""
    try:
        with open(path, "rb") as file:
            yield file
    except LuxtorchError as error:
        error.where = str(path)
        raise
    except OSError as error:
        raise CheckpointError(
            "The checkpoint cannot be read.",
            got=f"{type(error).__name__}: {error}",
            fix="Check the path, and that the file may be read.",
            where=str(path),
        ) from error


def _read_tensors(file: BinaryIO, contents: Contents, named: Named) -> dict[str, Tensor]:
    """Return the tensors of a file, each on the devices where the tree has it, by their names in the tree."""
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
    """Raise an error that lists all differences, unless a file has just what a tree needs, some counts apart."""
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
            "The checkpoint and the tree to load it into differ.",
            expected="the same names, shapes, dtypes and structure",
            got="\n            ".join(lines),
            fix="Make the tree from the same model, in the same precision and with the same optimizer, frozen alike."
            + " To go on by another rule, load with the old one, then call ts.with_rule(rule)." * rules,
        )


def _nearest(name: str, missing: list[str]) -> str:
    """Return a hint for a leaf that is misspelt, or whose layer has another name: not for any two in one layer."""
    group, _, last = name.rpartition(".")
    split = {other: other.rpartition(".") for other in missing}
    misspelt = [other for other in missing if split[other][0] == group and suggest(last, [split[other][2]])]
    return suggest(name, misspelt or [other for other in missing if split[other][2] == last])
