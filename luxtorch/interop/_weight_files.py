"""Reading named tensors from the files in which other programs keep them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from luxtorch.core import InputError, LuxtorchError

# What a folder may hold, best first.
_PATTERNS = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pt", "*.pth")


def read_weights(path: Path) -> Mapping[str, Any]:
    """Return what is in a file by name; nothing in a file is run.

    Args:
        path: A safetensors file, a file that `torch.save` has written, the index of a model in several files, or a
            folder with one of these.

    Raises:
        InputError: If there is no such file, or if it cannot be read.
    """
    with _reading(path):
        if path.is_dir():
            return read_weights(_file_of(path))
        if path.suffix == ".json":
            return _read_index(path)
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(contents, Mapping):
        raise InputError(
            "The file holds no tensors by name.",
            expected="a state_dict",
            got=f"a {type(contents).__name__}",
            where=str(path),
        )
    return contents


def _file_of(folder: Path) -> Path:
    for pattern in _PATTERNS:
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(
                "The folder holds several files of weights.",
                expected="one, or an index of them",
                got=", ".join(file.name for file in found),
                fix="Pass the path of one of them.",
            )
    raise InputError("The folder holds no weights.", expected=f"one of {', '.join(_PATTERNS)}")


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # safetensors.torch.save_model stores a tensor of several names under one, and notes the others.
        for name, stored in (file.metadata() or {}).items():
            if stored in tensors:
                tensors.setdefault(name, tensors[stored])
    return tensors


def _read_index(path: Path) -> dict[str, Any]:
    files: Any = json.loads(path.read_text())
    files = files.get("weight_map") if isinstance(files, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise InputError("The file is no index of weights.", expected='JSON with a "weight_map"')
    shards = {name: read_weights(path.parent / name) for name in sorted(set(files.values()))}
    for name, shard in files.items():
        if name not in shards[shard]:
            raise InputError(f"The tensor '{name}' is not where the index says.", expected=f"in {shard}")
    return {name: shards[shard][name] for name, shard in files.items()}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Let errors say which file it is, and what may be wrong."""
    try:
        yield
    except LuxtorchError as error:
        error.where = error.where or str(path)
        raise
    except Exception as error:  # a damaged pickle may raise whatever there is
        unsafe = isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error)
        message = str(error).strip().splitlines()
        raise InputError(
            "The file holds more than tensors." if unsafe else "The file of weights cannot be read.",
            expected="a safetensors file, a state_dict that torch.save has written, or an index of such files",
            got=f"{type(error).__name__}: {message[0] if message else 'no message'}",
            fix="Save module.state_dict() instead of the module." if unsafe else "Check the path; or fetch it again.",
            where=str(path),
        ) from error
