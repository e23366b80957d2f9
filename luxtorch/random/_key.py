"""Random keys: making, splitting and folding them."""

from __future__ import annotations

import copyreg
from hashlib import blake2b
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor

from luxtorch._errors import InputError, described, out_of_range, wrong_type
from luxtorch._torch import compile_constant

from . import _ops

Rng: TypeAlias = int | Tensor | torch.Generator
"""What a user may seed with: an integer, a key, or a generator (which is advanced)."""

_WORD = 2**64


def key(seed: int, *, device: torch.device | str | None = None) -> Tensor:
    """Make a key from a seed.

    A key is what `torch.func._random` calls one: a uint64 tensor of shape (2,). It is a value without state: drawing
    from it twice gives the same numbers twice. Whoever needs fresh numbers derives a fresh key, by `split` or
    `fold_in`.

    Args:
        seed: Any integer; it is taken modulo 2^64.
        device: Where the key lives, and with it all that is drawn from it.

    Returns:
        A uint64 tensor of shape (2,).

    Raises:
        DTypeError: If the seed is not an integer.

    Example:
        >>> import luxtorch.random as lr
        >>> bool((lr.uniform(lr.key(0), (3,)) == lr.uniform(lr.key(0), (3,))).all())
        True
    """
    if not is_whole(seed):
        raise wrong_type("seed", seed, "an int")
    return torch.tensor([int(seed) % _WORD, 0], dtype=torch.uint64, device=device)


def as_key(rng: Rng) -> Tensor:
    """Return the key that an integer, a key or a generator stands for.

    Args:
        rng: A seed; a key, returned as it is; or a `torch.Generator`, which is advanced by one draw, so that
            two calls with the same generator give two keys, as in Lux.

    Returns:
        A key.

    Raises:
        DTypeError: If `rng` is not one of the three.

    Example:
        >>> import torch, luxtorch.random as lr
        >>> generator = torch.Generator().manual_seed(0)
        >>> bool((lr.as_key(generator) == lr.as_key(generator)).all())
        False
    """
    if isinstance(rng, Tensor):
        return checked(rng)
    if isinstance(rng, torch.Generator):
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=rng, device=rng.device)
        return torch.cat([seed, torch.zeros_like(seed)]).view(torch.uint64)
    return key(rng)


def split(key: Tensor, number: int = 2) -> Tensor:
    """Derive `number` independent keys from a key.

    Args:
        key: A key, or a batch of keys of shape (*batch, 2).
        number: How many keys.

    Returns:
        A uint64 tensor of shape (number, *batch, 2); iterate over it, or unpack it.

    Raises:
        InputError: If `number` is below 1.
        DTypeError: If it is not an integer.

    Example:
        >>> import luxtorch.random as lr
        >>> first, second = lr.split(lr.key(0))
        >>> first.shape
        torch.Size([2])
    """
    if not is_whole(number):
        raise wrong_type("number", number, "an int")
    if number < 1:
        raise out_of_range("number", number, "at least 1")
    return _ops.call(_ops.split, "split", checked(key), number)


def where(condition: Tensor, key: Tensor, other: Tensor) -> Tensor:
    """Choose between two keys by a condition, without a branch.

    `torch.where` does not know the dtype of keys on a GPU.

    Args:
        condition: A boolean tensor.
        key: The key where it is true.
        other: The key where it is false.

    Example:
        >>> import torch, luxtorch.random as lr
        >>> chosen = lr.where(torch.tensor(False), lr.key(0), lr.key(1))
        >>> torch.equal(chosen, lr.key(1))
        True
    """
    bits = torch.where(condition, key.view(torch.int64), other.view(torch.int64))
    return bits.view(torch.uint64)


def fold_in(key: Tensor, data: int | str | Tensor) -> Tensor:
    """Derive one key from a key and a name, a number, or a counter on the device.

    Args:
        key: A key, or a batch of keys of shape (*batch, 2).
        data: An integer of up to 64 bits; a string, for instance the name of a layer; or an integer tensor of one
            element, for instance the step of a training loop, which keeps a compiled graph the same at every step.

    Returns:
        A key of the same shape.

    Raises:
        InputError: If an integer does not fit in 64 bits, or a tensor has more than one element.
        DTypeError: If `data` is something else.

    Example:
        >>> import luxtorch.random as lr
        >>> bool((lr.fold_in(lr.key(0), "layer_1") == lr.fold_in(lr.key(0), "layer_2")).all())
        False
    """
    checked(key)
    if isinstance(data, Tensor):
        if data.numel() != 1 or data.is_floating_point() or data.is_complex():
            raise InputError(
                "data must be an integer tensor of one element.",
                got=described(data),
                fix="For many keys at once, use torch.vmap over the numbers.",
            )
        return _ops.call(_ops.fold_in_tensor, "fold_in_tensor", key, data.reshape(()))
    if isinstance(data, str):
        data = _number_of(data)
    elif not is_whole(data):
        raise wrong_type("data", data, "an integer, a string or an integer tensor")
    if not -(2**63) <= data < _WORD:
        raise out_of_range("data", data, "an integer of at most 64 bits")
    return _ops.call(_ops.fold_in, "fold_in", key, data - _WORD if data >= 2**63 else data)


@compile_constant  # which cannot trace a hash
def _number_of(name: str) -> int:
    """Return a 64-bit hash of a name, the same on every machine."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def replicate(rng: Rng) -> Rng:
    """Copy a source of randomness, so that drawing from the copy does not advance the original.

    Args:
        rng: A `torch.Generator`, which is cloned with its state; a key or a seed, which are values and are returned
            as they are.

    Returns:
        The copy. Source: Lux's `replicate`.

    Example:
        >>> import torch, luxtorch.random as lr
        >>> generator = torch.Generator().manual_seed(0)
        >>> first = torch.rand(2, generator=lr.replicate(generator))
        >>> bool((first == torch.rand(2, generator=lr.replicate(generator))).all())
        True
    """
    return rng.clone_state() if isinstance(rng, torch.Generator) else rng


def checked(key: Tensor) -> Tensor:
    """Return the key, or raise if it is not one."""
    if not is_key(key):
        expected = "a uint64 tensor of shape (2,), or (..., 2) for a batch of keys"
        raise wrong_type("A key", key, expected, fix="Make one with lt.random.key(0).")
    return key


def is_key(value: object) -> bool:
    """Tell whether something is a key, or a batch of keys."""
    return isinstance(value, Tensor) and value.dtype == torch.uint64 and value.ndim > 0 and value.shape[-1] == 2


def is_whole(value: object) -> bool:
    """Tell whether something is an integer; True and False are not."""
    return type(value) is int or (isinstance(value, Integral | torch.SymInt) and not isinstance(value, bool))


def _reduced(tensor: Tensor) -> tuple[Any, ...]:
    """Reduce a tensor for pickle and copy, as torch does, but so that keys can be rebuilt.

    For its newer dtypes, such as that of keys, torch passes a storage that only `torch.load` knows how to read.
    """
    rebuild, arguments, *rest = tensor.__reduce_ex__(2)  # type: ignore[no-untyped-call]
    if arguments and isinstance(arguments[0], torch.UntypedStorage):
        typed = torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
            wrap_storage=arguments[0], dtype=torch.uint8, _internal=True
        )
        arguments = (typed, *arguments[1:])
    return (rebuild, arguments, *rest)


# Keys lie in states, which are plain data for pickle, joblib and others. Tensors of other classes, parameters of
# modules among them, are not asked for here; `torch.save` writes the same bytes as before.
copyreg.pickle(torch.Tensor, _reduced)
