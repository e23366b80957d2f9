"""Writing a file so that it is there as a whole or not at all, and moving tensors into and out of it."""

from __future__ import annotations

import ctypes
import os
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ._checkpoint_format import Stored, damaged, torch_dtype

TEMPORARY = ".tmp"
"""How the names of files end that are being written."""

_CHUNK = 2**20  # bytes; small enough to be still in the cache when they are read for the second time


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of another when all of it is on the disk, and not before."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_tensor(file: BinaryIO, tensor: Tensor) -> str:
    """Append the elements of a tensor, row by row, and return their checksum."""
    checksum = 0
    # What is contiguous on the CPU already is written from where it is.
    data = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    for chunk in _chunks(data):
        checksum = zlib.crc32(chunk, checksum)
        file.write(chunk)
    return f"{checksum:08x}"


def read_tensor(file: BinaryIO, name: str, stored: Stored) -> Tensor:
    """Return the tensor that comes next in a file.

    It has memory of its own: a map of the file would change with the file after it was checked, and would not be
    aligned as torch aligns tensors, on which the last bits of results may depend.

    Raises:
        CheckpointError: If its bytes are not those that were written.
    """
    tensor = torch.empty(stored.shape, dtype=torch_dtype(stored.dtype), device="cpu")
    checksum = 0
    for chunk in _chunks(tensor):
        file.readinto(chunk)  # type: ignore[attr-defined]
        checksum = zlib.crc32(chunk, checksum)
    if f"{checksum:08x}" != stored.crc32:
        raise damaged(f"The tensor '{name}' is not what was written", f"checksum {stored.crc32}", f"{checksum:08x}")
    if stored.order is None:
        return tensor
    return torch.empty_permuted(stored.shape, stored.order, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the memory of a contiguous tensor, piece by piece."""
    if tensor.numel() > 0:
        memory = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
        for start in range(0, tensor.nbytes, _CHUNK):
            yield memory[start : start + _CHUNK]


def _sync_folder(folder: Path) -> None:
    """Make sure that the folder itself remembers its new file; only POSIX systems can be asked to."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
