"""A file that is not what was written is a clear error, whatever has happened to it."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import luxtorch as lt
from luxtorch import optim
from luxtorch.training import CheckpointError, _checkpoint_format, load_checkpoint, save_checkpoint

COPIES = int(os.environ.get("COPIES", "200"))


@pytest.fixture
def tree(make_key: Callable[[], Tensor]) -> dict[str, Any]:
    ps, st = lt.setup(make_key(), lt.Chain(lt.Dense(6, 8), lt.BatchNorm(8), lt.Dropout(0.5), lt.Dense(8, 3)))
    big = torch.arange(1000.0) * (torch.arange(1000) > 500)  # zeros too, so that some damage changes nothing
    return {"ps": ps, "st": st, "opt": optim.setup(optim.Adam(), ps), "big": big, "half": big.bfloat16(), "epoch": 3}


@pytest.fixture
def file(tmp_path: Path, tree: dict[str, Any]) -> Path:
    save_checkpoint(tmp_path / "model.safetensors", tree)
    return tmp_path / "model.safetensors"


def _place(data: bytes, draw: random.Random) -> tuple[int, int]:
    """Return a range within the file: in the header as often as in the data."""
    header = 8 + int.from_bytes(data[:8], "little")
    low, high = draw.choice([(0, 16), (0, header), (header, len(data))])
    start = draw.randrange(low, high)
    return start, min(len(data), start + draw.choice([1, 4, 64, 1024]))


def flip_bits(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 16])):
        changed[_place(data, draw)[0]] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.choice([_place(data, draw)[0], len(data) - draw.randrange(1, 9)])]


def zero_a_range(data: bytes, draw: random.Random) -> bytes:
    start, stop = _place(data, draw)
    return data[:start] + bytes(stop - start) + data[stop:]


def scramble_a_range(data: bytes, draw: random.Random) -> bytes:
    start, stop = _place(data, draw)
    return data[:start] + draw.randbytes(stop - start) + data[stop:]


def cut_a_range_out(data: bytes, draw: random.Random) -> bytes:
    start, stop = _place(data, draw)
    return data[:start] + data[stop:]


def insert_bytes(data: bytes, draw: random.Random) -> bytes:
    start, stop = _place(data, draw)
    return data[:start] + draw.randbytes(stop - start) + data[start:]


def append_bytes(data: bytes, draw: random.Random) -> bytes:
    return data + draw.choice([b"\0", b" ", draw.randbytes(100), data])


def swap_ranges(data: bytes, draw: random.Random) -> bytes:
    (a, b), (c, d) = sorted([_place(data, draw), _place(data, draw)])
    return data if c < b else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def random_bytes(data: bytes, draw: random.Random) -> bytes:
    return draw.choice([b"", draw.randbytes(draw.randrange(1, 2 * len(data))), bytes(len(data))])


def other_length(data: bytes, draw: random.Random) -> bytes:
    return draw.choice([0, 1, 2**31, 2**63, 2**64 - 1, draw.randrange(2 * len(data))]).to_bytes(8, "little") + data[8:]


DAMAGES = [
    *(flip_bits, truncate, zero_a_range, scramble_a_range, cut_a_range_out, insert_bytes, append_bytes, swap_ranges),
    *(random_bytes, other_length),
]


def outcome(path: Path, tree: dict[str, Any]) -> str:
    """Return whether loading was an exact recovery or a clear error; anything else fails the test."""
    original = path.with_name("original").read_bytes()
    try:
        loaded = load_checkpoint(path, tree)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert error.fix
        return "error"
    save_checkpoint(path.with_name("again"), loaded)
    assert path.with_name("again").read_bytes() == original, "a silent wrong load"
    return "recovered"


def test_damaged_copies(file: Path, tree: dict[str, Any]) -> None:
    data = file.read_bytes()
    file.with_name("original").write_bytes(data)
    # Another state of the same run: its header over our data, and our header over its data.
    ps = lt.core.tree_map(lambda p: p + 1, tree["ps"])
    save_checkpoint(file.with_name("other"), {**tree, "ps": ps})
    other, length = file.with_name("other").read_bytes(), 8 + int.from_bytes(data[:8], "little")
    copies = [other[:length] + data[length:], data[:length] + other[length:]]
    for i in range(COPIES - len(copies)):
        copies.append(DAMAGES[i % len(DAMAGES)](data, random.Random(i)))
    counts = {"error": 0, "recovered": 0}
    for copy in copies:
        file.write_bytes(copy)
        found = outcome(file, tree)
        assert (found == "recovered") == (copy == data)
        counts[found] += 1
    print(counts)
    assert sum(counts.values()) == COPIES
    assert counts["error"] > 0.9 * COPIES


def test_every_byte_is_checked(file: Path, tree: dict[str, Any]) -> None:
    """One flipped bit at every 13th place of the whole file."""
    data = file.read_bytes()
    file.with_name("original").write_bytes(data)
    for place in range(0, len(data), 13):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        assert outcome(file, tree) == "error", place


# Headers with the right checksum, which somebody has written by hand.


def forged(data: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """Return a file whose header is changed, with a checksum that fits."""
    length = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:length])
    described = json.loads(entries["__metadata__"]["luxtorch"])
    change(entries, described)
    if isinstance(entries.get("__metadata__"), dict) and "luxtorch" in entries["__metadata__"]:
        entries["__metadata__"] = {"sha256": "0" * 64, "luxtorch": json.dumps(described)}
    return signed(json.dumps(entries, separators=(",", ":")).encode()) + data[length:]


def signed(text: bytes) -> bytes:
    whole = len(text).to_bytes(8, "little") + text
    return _checkpoint_format._with_checksum(whole, hashlib.sha256(whole).hexdigest())


def _leaf(described: dict[str, Any]) -> dict[str, Any]:
    return described["leaves"]["ps.layer_1.weight"]


def _describe_as(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda entries, described: described.update({name: value})


def _leaf_with(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda entries, described: _leaf(described).update({name: value})


FORGERIES = {
    "format-missing": lambda entries, described: described.pop("format"),
    "format-text": _describe_as("format", "one"),
    "leaves-list": _describe_as("leaves", []),
    "leaves-number": _describe_as("leaves", {"a": 1}),
    "flags-list": _describe_as("flags", [1]),
    "flags-text": _describe_as("flags", {"st.layer_2.training": "yes"}),
    "note-number": _describe_as("note", 1),
    "structure-none": _describe_as("structure", None),
    "dtype-unknown": _leaf_with("dtype", "load"),
    "dtype-list": _leaf_with("dtype", ["float32"]),
    "dtype-other": _leaf_with("dtype", "int32"),
    "shape-negative": _leaf_with("shape", [-8, -6]),
    "shape-text": _leaf_with("shape", "86"),
    "shape-float": _leaf_with("shape", [8.0, 6.0]),
    "shape-huge": _leaf_with("shape", [2**62, 2**62]),
    "order-twice": _leaf_with("order", [0, 0]),
    "order-text": _leaf_with("order", "ab"),
    "crc-number": _leaf_with("crc32", 7),
    "crc-missing": lambda entries, described: _leaf(described).pop("crc32"),
    "same-as-none": lambda entries, described: described["leaves"].update({"big": {"same_as": "nothing"}}),
    "same-as-list": lambda entries, described: described["leaves"].update({"big": {"same_as": []}}),
    "entry-offset": lambda entries, described: entries["big"].update(data_offsets=[0, 4000]),
    "entry-missing": lambda entries, described: entries.pop("big"),
    "value-nonsense": lambda entries, described: described["leaves"].update({"epoch": {"value": {"complex": 1}}}),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_nonsense_with_a_right_checksum(file: Path, tree: dict[str, Any], name: str) -> None:
    file.write_bytes(forged(file.read_bytes(), FORGERIES[name]))
    with pytest.raises(CheckpointError):
        load_checkpoint(file, tree)


@pytest.mark.parametrize("text", [b'"}}', b'"},"a":1}', b'","luxtorch":"{"}}', b'","luxtorch":1}}', b"\xff", b""])
def test_headers_that_are_no_json(file: Path, tree: dict[str, Any], text: bytes) -> None:
    file.write_bytes(signed(b'{"__metadata__":{"sha256":"' + b"0" * 64 + text))
    with pytest.raises(CheckpointError, match="right checksum, but invalid contents"):
        load_checkpoint(file, tree)


def test_forging_nothing_changes_nothing(file: Path, tree: dict[str, Any]) -> None:
    file.with_name("original").write_bytes(file.read_bytes())
    file.write_bytes(forged(file.read_bytes(), lambda entries, described: None))
    assert outcome(file, tree) == "recovered"


# What else may lie where a checkpoint should.


def test_newer_formats_are_named(file: Path, tree: dict[str, Any]) -> None:
    file.write_bytes(forged(file.read_bytes(), _describe_as("format", 2)))
    with pytest.raises(CheckpointError, match="newer luxtorch(.|\n)*format 1(.|\n)*format 2(.|\n)*Update luxtorch"):
        load_checkpoint(file, tree)


def test_files_of_others_are_no_checkpoints(file: Path, tree: dict[str, Any]) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match=r"not a checkpoint of luxtorch(.|\n)*begin with"):
        load_checkpoint(file, tree)
    torch.save({"a": torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match=r"not a checkpoint of luxtorch(.|\n)*begin with b'PK"):
        load_checkpoint(file, tree)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"not a checkpoint of luxtorch(.|\n)*an empty file"):
        load_checkpoint(file, tree)


def test_damage_is_named(file: Path, tree: dict[str, Any]) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"Its length is not(.|\n)*bytes(.|\n)*earlier checkpoint"):
        load_checkpoint(file, tree)
    file.write_bytes(data[:500])
    with pytest.raises(CheckpointError, match="It ends within its header"):
        load_checkpoint(file, tree)
    changed = bytearray(data)
    changed[-1] ^= 1  # the last and narrowest tensor
    file.write_bytes(changed)
    with pytest.raises(CheckpointError, match="The tensor 'half' is not what was written"):
        load_checkpoint(file, tree)
