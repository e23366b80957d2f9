"""The Jacobians of the samples of a batch, all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import InputError

from ._checks import Mode, check_inputs, check_mode, check_outputs, describe
from ._rows import one_hot, stack
from ._transforms import jvp, vjp


def batched_jacobian(
    f: Callable[[Tensor], Tensor], x: Tensor, *, mode: Mode = "reverse", chunk_size: int | None = None
) -> Tensor:
    """Compute the Jacobian of each sample's output by the same sample's input.

    The function sees whole batches, and must treat every sample alone. Where it mixes samples, as batch normalisation
    does in training mode, the result is the sum over all outputs (rows) or inputs (columns) of the batch; nothing
    detects this.

    Args:
        f: A function of a batch that returns a batch.
        x: A batch of samples, the batch first.
        mode: `"reverse"` takes one product for each output of a sample, `"forward"` one for each input.
        chunk_size: How many products are computed at once; all by default, and with 1 without `vmap`.

    Shape:
        x `(B, *N)`, `f(x)` of `(B, *M)`; the result is `(B, prod(M), prod(N))`.

    Returns:
        The matrices, in the order of the batch.

    Raises:
        InputError: `x` or `f(x)` has no batch dimension, or the two batches differ.
        DTypeError: `x` or `f(x)` is no real floating point tensor.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.batched_jacobian(lambda x: x**2, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[[2., 0.],
                 [0., 4.]],
        <BLANKLINE>
                [[6., 0.],
                 [0., 8.]]])

    Source:
        `Lux.batched_jacobian`, with the batch first.
    """
    check_mode(mode)
    check_inputs((x,), real=True)

    def outputs(x: Tensor) -> tuple[Tensor, tuple[()]]:
        y = f(x)
        _check_batches(x, y)
        return y, ()

    if mode == "reverse":
        y, back, _ = vjp(outputs, (x,))
        (by_row,) = stack(lambda index: back(_same_for_all(index, y)), y.shape[1:].numel(), (x,), chunk_size)
        by_sample = by_row.movedim(0, 1)
    else:
        y, _ = outputs(x)
        (by_column,) = stack(
            lambda index: (jvp(outputs, (x,), [_same_for_all(index, x)])[1],), x.shape[1:].numel(), (y,), chunk_size
        )
        by_sample = by_column.movedim(0, -1)
    return by_sample.reshape(x.shape[0], y.shape[1:].numel(), x.shape[1:].numel())


def _same_for_all(index: Tensor, batch: Tensor) -> Tensor:
    """Return the basis vector of one sample, repeated for every sample of a batch."""
    sample = torch.empty(batch.shape[1:], dtype=batch.dtype, device=batch.device)
    return one_hot(index, (sample,))[0].expand(batch.shape)


def _check_batches(x: Any, y: Any) -> None:
    check_outputs(y, real=True)
    both = isinstance(x, Tensor) and isinstance(y, Tensor)
    if both and x.dim() and y.dim() and x.shape[0] == y.shape[0]:
        return
    raise InputError(
        "The function does not take a batch to a batch.",
        expected="x and f(x) tensors with the same first dimension, the batch",
        got=f"{describe(x)} as x and {describe(y)} as f(x)",
        fix="Keep the batch dimension in f, or take jacobian(f, x).",
    )
