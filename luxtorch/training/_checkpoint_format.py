"""The format of checkpoint files: safetensors with checksums in the header, written atomically.

A checkpoint is a safetensors file that other programs can read. Its metadata begin with the SHA-256 of the header
(computed with zeros in the place of the checksum), and hold the CRC-32 of each tensor. So the header is verified before
it is parsed, and a damaged tensor is reported by its name. CRC-32 detects any change of up to four consecutive bytes,
and misses others once in four billion; over gigabytes SHA-256 would take longer than the disk.

A file is written under a temporary name in the same folder, and renamed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from luxtorch.core import LuxtorchError

FORMAT = 1

_UNKNOWN = "0" * 64  # placeholder of the SHA-256
_LENGTH = 8  # bytes, little-endian, before the header
_BEGINNING = b'{"__metadata__":{"sha256":"'
_CHECKSUM = slice(_LENGTH + len(_BEGINNING), _LENGTH + len(_BEGINNING) + len(_UNKNOWN))

# torch's names of dtypes with those of safetensors. It has none for complex128, which is stored as pairs.
_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "complex128": "F64",
}


class CheckpointError(LuxtorchError):
    """Report a file that cannot be written, is not a checkpoint, or is damaged."""


class Stored(NamedTuple):
    """Describe a tensor in a file.

    Attributes:
        dtype: Its dtype, by torch's name.
        shape: Its shape.
        order: Its dimensions from the outermost to the innermost in memory; None if they are in order. The file holds
            every tensor row by row, but the last bits of a product may depend on the strides of its factors.
        crc32: The checksum of its bytes, in eight hexadecimal digits.
    """

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None
    crc32: str = "00000000"

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return prod(self.shape) * torch_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Contents:
    """Describe the contents of a file, by dotted names.

    Attributes:
        tensors: The tensors, in the order of their data.
        same: The names of tensors that are the same object as another, with the name of that one.
        values: The leaves that are Python values.
        flags: The `Static` booleans, such as whether a layer is in training mode.
        structure: What else must be equal in the tree that is loaded, such as the names in a ComponentVector.
        note: A note of the program that wrote the file.
    """

    tensors: dict[str, Stored] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    structure: dict[str, str] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)

    def with_checksums(self, checksums: Sequence[str]) -> Contents:
        """Return a copy with the checksums of the tensors, in their order."""
        pairs = zip(self.tensors.items(), checksums, strict=True)
        return replace(self, tensors={name: stored._replace(crc32=crc32) for (name, stored), crc32 in pairs})


def is_storable(dtype: torch.dtype) -> bool:
    """Return whether a file can hold tensors of a dtype."""
    return dtype_name(dtype) in _CODES


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name."""
    if name not in _CODES:
        raise ValueError(f"{name} is not a dtype")
    return getattr(torch, name)  # type: ignore[no-any-return]


def header(contents: Contents) -> bytes:
    """Return the header of a file; its length does not depend on the checksums."""
    described = {
        "format": FORMAT,
        "leaves": _leaves(contents),
        "flags": contents.flags,
        "structure": contents.structure,
        "note": contents.note,
    }
    entries = {"__metadata__": {"sha256": _UNKNOWN, "luxtorch": json.dumps(described)}, **_entries(contents.tensors)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned
    whole = len(text).to_bytes(_LENGTH, "little") + text
    return _with_checksum(whole, hashlib.sha256(whole).hexdigest())


def read_header(file: BinaryIO) -> Contents:
    """Read and verify the header of a file; the file's position is then the start of the data.

    Raises:
        CheckpointError: If the file is not a checkpoint, if its header or its length is damaged, or if its format is
            newer than this one.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(_CHECKSUM.stop)
    if len(start) < _CHECKSUM.stop or start[_LENGTH : _CHECKSUM.start] != _BEGINNING:
        raise _not_a_checkpoint(start, size)
    length = int.from_bytes(start[:_LENGTH], "little") + _LENGTH
    if length > size:
        raise damaged("It ends within its header", f"{length} bytes at least", f"{size} bytes")
    whole = start + file.read(max(0, length - len(start)))
    checksum = whole[_CHECKSUM].decode("latin-1")
    found = hashlib.sha256(_with_checksum(whole, _UNKNOWN)).hexdigest()
    if found != checksum:
        raise damaged("Its header is not what was written", f"checksum {checksum}", found)
    contents = _parsed(whole[_LENGTH:])
    expected = length + sum(stored.nbytes for stored in contents.tensors.values())
    if size != expected:
        raise damaged("Its length is not what was written", f"{expected} bytes", f"{size} bytes")
    return contents


def damaged(problem: str, expected: str = "", got: str = "") -> CheckpointError:
    """Return the error for a damaged file."""
    fix = "Restore the file from a copy, or load an earlier checkpoint."
    return CheckpointError(f"The checkpoint is damaged. {problem}.", expected=expected, got=got, fix=fix)


def _leaves(contents: Contents) -> dict[str, Any]:
    leaves: dict[str, Any] = {name: {"value": _encoded(value)} for name, value in contents.values.items()}
    leaves |= {name: {"same_as": other} for name, other in contents.same.items()}
    for name, stored in contents.tensors.items():
        leaves[name] = {what: value for what, value in stored._asdict().items() if value is not None}
    return leaves


def _entries(tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Return the safetensors entries of consecutive tensors."""
    entries, end = {}, 0
    for name, stored in tensors.items():
        start, end = end, end + stored.nbytes
        shape = [*stored.shape, 2] if stored.dtype == "complex128" else [*stored.shape]
        entries[name] = {"dtype": _CODES[stored.dtype], "shape": shape, "data_offsets": [start, end]}
    return entries


def _with_checksum(whole: bytes, checksum: str) -> bytes:
    return whole[: _CHECKSUM.start] + checksum.encode() + whole[_CHECKSUM.stop :]


def _parsed(text: bytes) -> Contents:
    """Parse a header whose checksum is right."""
    try:
        entries = json.loads(text)
        described = json.loads(entries.pop("__metadata__")["luxtorch"])
        if described["format"] > FORMAT:
            expected, got = f"format {FORMAT}", f"format {described['format']}"
            headline = "The checkpoint must not be of a newer luxtorch."
            raise CheckpointError(headline, expected=expected, got=got, fix="Update luxtorch.")
        contents = Contents(structure=dict(described["structure"]), note=dict(described["note"]))
        contents.flags.update({name: {True: True, False: False}[flag] for name, flag in described["flags"].items()})
        for name, leaf in described["leaves"].items():
            if "value" in leaf:
                contents.values[name] = _decoded(leaf["value"])
            elif "same_as" in leaf:
                contents.same[name] = leaf["same_as"]
            else:
                contents.tensors[name] = _stored(leaf)
        if entries != _entries(contents.tensors) or not contents.tensors.keys() >= set(contents.same.values()):
            raise ValueError("its two descriptions of the tensors differ")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        headline = "The header of the checkpoint has a right checksum, but invalid contents."
        got, fix = f"{type(error).__name__}: {error}", "Load what `save_checkpoint` has written."
        raise CheckpointError(headline, got=got, fix=fix) from error
    return contents


def _encoded(value: Any) -> Any:
    """Encode a Python value for JSON."""
    return {"complex": [value.real, value.imag]} if isinstance(value, complex) else value


def _decoded(value: Any) -> Any:
    return complex(*value["complex"]) if isinstance(value, dict) else value


def _stored(leaf: Mapping[str, Any]) -> Stored:
    shape, order = tuple(leaf["shape"]), leaf.get("order")
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"{shape} is not a shape")
    if order is not None and sorted(order) != list(range(len(shape))):
        raise ValueError(f"{order} is not an order of {len(shape)} dimensions")
    torch_dtype(leaf["dtype"])
    return Stored(leaf["dtype"], shape, None if order is None else tuple(order), leaf["crc32"])


def _not_a_checkpoint(start: bytes, size: int) -> CheckpointError:
    return CheckpointError(
        "The file is not a checkpoint of luxtorch, or its beginning is damaged.",
        expected="a file that `save_checkpoint` has written",
        got=f"{size} bytes that begin with {start[:16]!r}" if size else "an empty file",
        fix="Load another copy or an earlier checkpoint; for files of other programs, use their own loaders.",
    )


TEMPORARY = ".tmp"
"""The ending of temporary files, which are being written."""

_CHUNK = 2**20  # bytes; small enough to be in the cache when they are read again


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces another once it is complete and on the disk."""
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
    # Contiguous tensors on the CPU are written without a copy.
    data = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    for chunk in _chunks(data):
        checksum = zlib.crc32(chunk, checksum)
        file.write(chunk)
    return f"{checksum:08x}"


def read_tensor(file: BinaryIO, name: str, stored: Stored) -> Tensor:
    """Read the next tensor of a file.

    It has memory of its own: a memory map would change with the file after the check, and would not have the alignment
    of torch, on which the last bits of results may depend.

    Raises:
        CheckpointError: If its checksum is wrong.
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
    """Yield the memory of a contiguous tensor in chunks."""
    if tensor.numel() > 0:
        memory = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
        for start in range(0, tensor.nbytes, _CHUNK):
            yield memory[start : start + _CHUNK]


def _sync_folder(folder: Path) -> None:
    """Flush the entry of a new file in its folder to the disk, on POSIX systems."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
