"""Private training: gradients that are clipped for each sample and hidden in noise, and batches drawn by chance."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from luxtorch import random
from luxtorch._transforms import transformed
from luxtorch.autodiff._arguments import check_chunk_size
from luxtorch.autodiff._jacobian import per_sample_gradients, samples
from luxtorch.autodiff._torch_func import pack, unpack
from luxtorch.core import (
    InputError,
    described,
    map_tensors,
    named_leaves,
    out_of_range,
    tree_flatten,
    tree_structure,
    tree_unflatten,
    wrong_shape,
    wrong_type,
)
from luxtorch.core._weighted import watching_means
from luxtorch.loops import scan
from luxtorch.random._key import is_key

from ._gradients import Objective, check_objective, check_result, check_state, in_precision, on_a_tape
from ._train_state import TrainState


def private_gradients(
    objective: Objective,
    data: Any,
    ts: TrainState,
    *,
    clip: float | Tensor,
    noise: float | Tensor,
    key: Tensor,
    batch_size: float | None = None,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Any, Tensor, Any, TrainState]:
    """Compute a gradient that tells little of any one sample, for differentially private SGD.

    The gradient of each sample is scaled down to the norm `clip`, over all parameters together, where it is longer.
    To the sum of these, Gaussian noise of standard deviation `noise * clip` is added, and the whole is divided by
    `batch_size`. It stands in the place of `compute_gradients`: `apply_gradients` takes the step, by any rule.

    The gradients alone are private: the loss, the stats and how often a gradient is clipped are not. How much they
    tell, an accountant says, as that of `dp-accounting`, from `noise`, the number of steps, and the rate of
    `poisson_batch`, which draws the batches that accountants assume. The random numbers are those of keys, which are
    not for cryptography.

    A sample whose gradient is not finite counts as zero, which is private too; the loss is NaN then, so that it is
    seen.

    Args:
        objective: A pure function `objective(model, ps, st, data) -> (loss, st, stats)`, as for `compute_gradients`. It
            is called with one sample, as a batch of one, and returns the loss as a number: what counts is the mean of
            these losses over the samples.
        data: What it takes: a tree of tensors, with the samples along the first dimension. There may be none.
        ts: The training state.
        clip: The largest norm of the gradient of one sample.
        noise: The standard deviation of the noise, in multiples of `clip`.
        key: A key for the noise. The number of the step, `ts.step`, is folded in: one key serves a whole run.
        batch_size: What to divide by. By default the number of samples; where that is drawn by chance, it has to be the
            expected one.
        mask: Which samples are really there, a boolean for each; the others are left out.
        chunk_size: How many gradients of samples are in memory at once; all by default. The results are the same but
            for rounding. With 1 there is no `vmap`.
        dtype: What the model computes in, as for `compute_gradients`.

    Returns:
        `(grads, loss, stats, ts)`: the gradients, a tree like the parameters; the mean loss of the samples, NaN for
        none; the stats of each sample, stacked; and the training state with new keys in the states of the model. Each
        sample has keys of its own, for dropout.

    Raises:
        InputError: If a state other than a key depends on the samples, as the running statistics of `BatchNorm` in
            train mode do; if the objective returns something else, or a mean with weights of classes, which one sample
            cancels; if shapes do not fit, or a number is out of range.
        DTypeError: If a parameter cannot be differentiated, or an argument has the wrong type.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch import optim, training
        >>> model = lt.Dense(2, 1)
        >>> ts = training.TrainState(model, *lt.setup(0, model), optim.Adam(0.05))
        >>> x = lt.random.normal(lt.random.key(1), (1000, 2))
        >>> data, key, rate = (x, x[:, :1] - x[:, 1:]), lt.random.key(2), 0.1
        >>> for i in range(200):
        ...     batch, mask = training.poisson_batch(lt.random.fold_in(key, i), data, rate)
        ...     grads, loss, _, ts = training.private_gradients(
        ...         lt.MSELoss(), batch, ts, clip=1.0, noise=1.0, key=key, batch_size=100, mask=mask
        ...     )
        ...     ts = training.apply_gradients(ts, grads)
        >>> bool(loss < 0.02)
        True

    Source: Abadi et al., "Deep learning with differential privacy", 2016.
    """
    check_state(ts)
    check_objective(objective)
    size = samples(data, none=True)
    clip, noise = _number("clip", clip, above=True), _number("noise", noise)
    batch_size = _batch_size(batch_size, size, mask)
    check_chunk_size(chunk_size)
    if not is_key(key) or key.ndim != 1:
        raise wrong_type("key", key, "a key, a uint64 tensor of shape (2,)", fix="Make one with lt.random.key(0).")
    trees, model = ts._trees, ts._statics.model
    ps, st = trees.parameters, trees.states
    leaves, spec = tree_flatten(ps)
    if not leaves:
        raise InputError("There are no parameters to differentiate by.", got=described(ps))
    key = random.fold_in(key.to(trees.step.device), trees.step)
    if dtype is not None:
        model = in_precision(model, dtype, ps)

    def loss_of_one(ps: Any, st: Any, sample: Any) -> tuple[Tensor, Any]:
        data, number = sample
        st = map_tensors(lambda leaf: random.fold_in(leaf, number) if is_key(leaf) else leaf, st)
        watching: Any = nullcontext([]) if torch.compiler.is_compiling() else watching_means()
        with watching as weighted:
            loss, weight, new, stats = check_result(objective(model, ps, st, data))
        _check_loss(weight, weighted)
        _check_states(st, new)
        return loss, (loss, pack(stats))

    wide = reduce(torch.promote_types, (leaf.real.dtype for leaf in leaves), torch.float32)
    chunk = min(chunk_size or size, size) or 1
    number = -(-size // chunk) or 1

    def add(total: list[Tensor], part: Any) -> tuple[list[Tensor], Any]:
        rows, present = part
        grads, (losses, stats) = per_sample_gradients(
            loss_of_one, ps, st, rows, has_aux=True, randomness="same", chunk_size=1 if chunk == 1 else None
        )
        clipped, finite = _clipped(grads, present, clip, wide)
        return [a + b for a, b in zip(total, clipped, strict=True)], (losses.where(finite, math.nan), stats)

    with torch.set_grad_enabled(torch.is_grad_enabled() and (transformed() or on_a_tape(ps, st))):
        present = leaves[0].new_ones(size, dtype=torch.bool) if mask is None else mask
        parts = ((data, torch.arange(size, device=present.device)), present)
        # Rows of zeros that are not there make chunks of one size, and let an empty batch be none.
        parts = map_tensors(lambda x: _padded(x, number * chunk), parts)
        start = [_real(leaf).new_zeros(_real(leaf).shape, dtype=wide) for leaf in leaves]
        if number == 1:
            total, (losses, stats) = add(start, parts)
        else:
            chunks = map_tensors(lambda x: x.reshape(number, chunk, *x.shape[1:]), parts)
            total, found = scan(add, start, chunks)
            losses, stats = map_tensors(lambda x: x.flatten(0, 1), found)
        losses, stats = map_tensors(lambda x: x[:size], (losses, unpack(stats)))
        loss = losses.where(present, 0.0).sum() / present.sum()
        keys = random.split(key, len(total)).unbind(0)
        noisy = [(t + noise * clip * _normal(k, t)) / batch_size for k, t in zip(keys, total, strict=True)]
        grads = [_like(leaf, g) for leaf, g in zip(leaves, noisy, strict=True)]
        st = map_tensors(lambda leaf: random.fold_in(leaf, "next batch") if is_key(leaf) else leaf, st)
    return tree_unflatten(grads, spec), loss, stats, ts._with(trees._replace(states=st))


def poisson_batch(key: Tensor, data: Any, rate: float, *, max_size: int | None = None) -> tuple[Any, Tensor]:
    """Draw a batch to which each sample belongs with the same probability, whichever others do.

    The batch has a fixed size, so that a step is compiled once, and a mask says which of its samples are really drawn;
    there may be none. They come in random order.

    Args:
        key: A key; each batch needs another one.
        data: A tree of tensors, with the samples along the first dimension.
        rate: The probability; the expected size of a batch is `rate` times the number of samples.
        max_size: The size of the batch. If more are drawn, some of them, chosen by chance, are left out, which
            accountants do not know of. By default that has a probability below 1e-12.

    Returns:
        `(batch, mask)`: a tree like `data` with `max_size` samples, and a boolean for each of them.

    Raises:
        InputError: If the tensors differ in their number of samples or have none, or a number is out of range.
        DTypeError: If a leaf of the data is not a tensor.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch import training
        >>> batch, mask = training.poisson_batch(lt.random.key(0), torch.arange(1000), 0.01)
        >>> batch.shape, mask.shape, bool(mask.sum() < 41)
        (torch.Size([41]), torch.Size([41]), True)

        Those that are drawn, in a batch of another size each time: `batch[mask]`.

    Source: Abadi et al., "Deep learning with differential privacy", 2016, whose "lots" these are.
    """
    n = samples(data)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
        raise out_of_range("rate", rate, "a number above 0 and at most 1")
    if max_size is None:
        max_size = _rarely_exceeded(n, rate)
    elif isinstance(max_size, bool) or not isinstance(max_size, int) or not 1 <= max_size <= n:
        raise out_of_range("max_size", max_size, f"a whole number from 1 to {n}, the number of samples")
    # In double precision, and by the smallest numbers: so a sample is drawn if its own number is below the rate.
    drawn, index = random.uniform(key, (n,), dtype=torch.float64).topk(max_size, largest=False)
    return map_tensors(lambda x: x.index_select(0, index.to(x.device)), data), drawn < rate


def _rarely_exceeded(n: int, rate: float, probability: float = 1e-12) -> int:
    """Return a size that is exceeded with less than some probability, by Chernoff's bound of the binomial tail."""
    return next((k for k in range(math.ceil(n * rate), n) if _log_tail(k + 1, n, rate) < math.log(probability)), n)


def _log_tail(k: int, n: int, rate: float) -> float:
    """Return a bound of the logarithm of the probability that `k` of `n` or more are drawn."""
    share = k / n
    rest = (1 - share) * math.log((1 - share) / (1 - rate)) if k < n else 0.0
    return -n * (share * math.log(share / rate) + rest)


def _clipped(grads: Any, present: Tensor, clip: Any, wide: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return the sums of the clipped gradients of the samples that are there, and which gradients are finite."""
    rows = [_real(g, 1) for g in tree_flatten(grads)[0]]
    norms = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=wide) for g in rows]
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]), dim=0)
    finite = norm.isfinite()
    counted = finite & present.to(norm.device)
    scale = torch.where(counted, clip / norm.clamp(min=clip), 0.0)
    # No matrix product: torch may be told to compute these less precisely, and the norm would not be below `clip`.
    return [(g.where(_along(counted, g), 0.0) * _along(scale, g)).sum(0) for g in rows], finite


def _along(x: Tensor, g: Tensor) -> Tensor:
    return x.to(g.device).reshape(-1, *(1,) * (g.ndim - 1))


def _real(x: Tensor, least: int = 0) -> Tensor:
    """Return a tensor of real numbers, those of complex ones in a last dimension of two."""
    real = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return real if real.ndim > least else real.unsqueeze(-1)


def _like(leaf: Tensor, real: Tensor) -> Tensor:
    return (torch.view_as_complex(real) if leaf.is_complex() else real.reshape(leaf.shape)).to(leaf.dtype)


def _normal(key: Tensor, like: Tensor) -> Tensor:
    return random.normal(key, like.shape, dtype=like.dtype).to(like.device)


def _padded(x: Tensor, size: int) -> Tensor:
    missing = size - x.shape[0]
    return torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) if missing else x


def _number(name: str, value: Any, *, above: bool = False) -> Any:
    """Return a number of at least zero, or above it, or raise; a tensor is taken as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        if value.ndim:
            raise wrong_shape(name, value, "()")
        return value
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (above and value == 0):
        raise out_of_range(name, value, f"a finite number {'above' if above else 'of at least'} 0")
    return value


def _batch_size(batch_size: Any, size: int, mask: Tensor | None) -> Any:
    """Return what to divide by, or raise if it is not known, or the mask does not fit."""
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise wrong_type("mask", mask, "a boolean tensor")
        if mask.ndim != 1 or mask.shape[0] != size:
            raise wrong_shape("mask", mask, f"({size},), one for each sample")
    if batch_size is not None:
        return _number("batch_size", batch_size, above=True)
    if mask is not None or size == 0:
        raise InputError(
            "The number of samples in a batch that is drawn by chance would be told by the gradient.",
            expected="batch_size, the expected number",
            got="a mask alone" if mask is not None else "an empty batch alone",
            fix="Pass batch_size=rate * n, for n samples of which each is drawn with probability rate.",
        )
    return size


def _check_loss(weight: Any, weighted: list[Any]) -> None:
    """Raise if the loss of one sample would be weighted by what belongs to all."""
    if not (weight is None or (isinstance(weight, int) and weight == 1)):
        raise InputError(
            "The loss of one sample must be a number, for it has no weight among others.",
            expected="(loss, st, stats), or ((sum, None), st, stats)",
            got="a pair (sum, weight)",
            fix="Divide the sum by what is the same for all samples, or by what the sample has of its own.",
        )
    for loss in weighted:
        if loss.weight is not None:
            raise InputError(
                "The weight of a class cancels in the weighted mean over one sample.",
                got=repr(loss),
                fix="Take agg='sum': the sum over all samples is divided by batch_size.",
            )


def _check_states(st: Any, new: Any) -> None:
    """Raise if a sample has changed a state other than a key: what is kept of it is not private."""
    if tree_structure(st) != tree_structure(new):
        raise InputError("The objective must keep the structure of the states.", got=described(new))
    for (name, before), (_, after) in zip(named_leaves(st), named_leaves(new), strict=True):
        if after is not before and not is_key(after):
            raise InputError(
                f"The state '{name}' would tell of the samples: it changes with each, and is hidden by no noise.",
                expected="a model that changes no state but its keys, for random numbers",
                fix="Put the layer into test mode, lt.test_mode(st), or take one that keeps no statistics, "
                "such as GroupNorm or LayerNorm in the place of BatchNorm.",
            )
