"""Arguments that are given per spatial dimension: kernel sizes, strides, paddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from luxtorch.core import InputError, suggest

from ._normalise import HALVES

PerDim: TypeAlias = int | Sequence[int]
Pairs: TypeAlias = tuple[tuple[int, int], ...]
Padding: TypeAlias = int | Sequence[int] | Sequence[Sequence[int]] | Literal["same", "valid"]

PADDING_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
"""What is put beside an input, and what torch calls it."""

SPATIAL = {1: "length", 2: "height, width", 3: "depth, height, width"}


def sizes(name: str, value: Any, *, optional: bool = False) -> tuple[int, ...]:
    """Return the sizes whose number says how many spatial dimensions a layer has: one to three."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) not in SPATIAL:
        raise InputError(
            f"The length of {name} says how many spatial dimensions the layer has.",
            expected="a tuple of 1, 2 or 3 sizes",
            got=f"{name}={value!r}",
            fix=f"For images write {name}=({value}, {value})." if isinstance(value, int) else "",
        )
    if not all((optional and size is None) or (isinstance(size, int) and size > 0) for size in value):
        raise InputError("A size is a positive number.", expected="positive integers", got=f"{name}={value!r}")
    return tuple(value)


def per_dim(name: str, value: Any, dims: int, *, least: int) -> tuple[int, ...]:
    """Return one number for each spatial dimension; a single number counts for all of them."""
    values = (value,) * dims if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(values) != dims or not all(isinstance(number, int) and number >= least for number in values):
        raise InputError(
            f"The {name} does not fit the kernel.",
            expected=f"an integer, or a tuple of {dims}, none below {least}",
            got=f"{name}={value!r}",
        )
    return values


def pairs(value: Any, extent: tuple[int, ...]) -> Pairs:
    """Return the padding before and after each spatial dimension.

    Args:
        value: A number, a number or a pair of them for each dimension, "same" or "valid".
        extent: How far the kernel reaches in each dimension, `dilation * (kernel_size - 1)`, which is what "same"
            adds; an odd amount is larger at the end, as in torch.

    Returns:
        A pair for each dimension.

    Raises:
        InputError: If it is none of these.
    """
    if value == "valid":
        return ((0, 0),) * len(extent)
    if value == "same":
        return tuple((reach // 2, reach - reach // 2) for reach in extent)
    found = sides(value, len(extent))
    if found is None or min(map(min, found)) < 0:
        raise InputError(
            "The padding does not fit the kernel.",
            expected=f"a number, a tuple of {len(extent)} numbers or pairs (before, after), 'same' or 'valid'",
            got=f"padding={value!r}",
        )
    return found


def sides(value: Any, dims: int) -> Pairs | None:
    """Return the numbers before and after each spatial dimension, or None if the value does not give them."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * dims
    found = tuple(tuple(entry) if isinstance(entry, Sequence) else (entry, entry) for entry in values)
    fitting = len(found) == dims and all(len(p) == 2 and all(isinstance(n, int) for n in p) for p in found)
    return found if fitting else None


def check_padding_mode(mode: Any, modes: Mapping[str, Any]) -> None:
    """Raise unless a mode of padding is known."""
    if mode not in modes:
        raise InputError(
            f"There is no padding mode '{mode}'.", expected=", ".join(modes), fix=suggest(str(mode), modes)
        )


def symmetric(padding: Pairs) -> tuple[int, ...] | None:
    """Return the padding at either side of each dimension, or None if the two sides differ anywhere."""
    return tuple(low for low, _ in padding) if all(low == high for low, high in padding) else None


def padded(x: Tensor, padding: Pairs, mode: str = "constant", value: float | None = None) -> Tensor:
    """Return the input with its last dimensions padded; negative numbers cut it."""
    return F.pad(x, [number for pair in reversed(padding) for number in pair], mode, value)


def widened(x: Tensor) -> Tensor:
    """Return an input of half precision in single precision on the CPU, for kernels that know no half there."""
    return x.float() if x.dtype in HALVES and x.device.type == "cpu" else x


def shown(name: str, value: Any, default: Any) -> list[str]:
    """Return the text of an option for prints: empty for the default, a single number where one counts for all."""
    short = value
    if isinstance(value, tuple):
        inner = [entry[0] if isinstance(entry, tuple) and len(set(entry)) == 1 else entry for entry in value]
        short = inner[0] if len(set(inner)) == 1 and isinstance(inner[0], int) else tuple(inner)
    return [] if default in (value, short) else [f"{name}={short}"]
