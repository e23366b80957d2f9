"""`per_sample_gradients`: the gradient of a loss for each sample of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from luxtorch.core import InputError, described, named_leaves, out_of_range, tree_leaves, tree_map, wrong_type
from luxtorch.random import fold_in
from luxtorch.random._key import is_key

from ._arguments import check_chunk_size
from ._gradient import withgradient
from ._torch_func import Tree, pack, unpack
from ._vmap import batched

Randomness = Literal["different", "same"]


def per_sample_gradients(
    loss: Callable[[Tree, Tree, Tree], Tree],
    ps: Tree,
    st: Tree,
    batch: Tree,
    *,
    has_aux: bool = False,
    keep_batch_dim: bool = True,
    randomness: Randomness = "different",
    chunk_size: int | None = None,
) -> Tree:
    """Compute the gradient of a loss for each sample of a batch, all at once.

    The loss sees one sample at a time: a batch normalization in training mode would have nothing to normalize by.

    Args:
        loss: A function `loss(ps, st, sample)` that returns a scalar, or `(scalar, aux)`.
        ps: The parameters, by which to differentiate: a tree of floating point tensors, or a `ComponentVector`.
        st: The states: any tree.
        batch: A tensor, or a tree of tensors, with the samples along the first dimension.
        has_aux: Whether the loss returns a pair.
        keep_batch_dim: Whether a sample comes as a batch of one, which is what models and losses take. If False, it has
            no batch dimension.
        randomness: Whether the random numbers of the samples are `"different"` or the `"same"`. For different ones,
            the number of the sample in the batch is folded into each key in `st`.
        chunk_size: How many samples are computed at once, to save memory; all by default, and with 1 without `vmap`.

    Returns:
        A tree like `ps`, each tensor with a first dimension for the samples: `(B, *shape)`. From a `ComponentVector`,
        a batch of vectors, whose `flat` is `(B, size)`. With `has_aux` it is `(gradients, aux)`, and the tensors in
        `aux` are stacked likewise.

    Raises:
        InputError: The batch has no samples, its tensors differ in their number, or the loss does not return a scalar.
        DTypeError: A leaf of `ps` is not a floating point tensor, or a leaf of `batch` is not a tensor.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Dense(3, 8, torch.tanh), lt.Dropout(0.1), lt.Dense(8, 2))
        >>> ps, st = lt.setup(0, model)
        >>> def loss(ps, st, sample):
        ...     x, target = sample
        ...     y, _ = model(x, ps, st)
        ...     return lt.losses.CrossEntropyLoss()(y, target)
        >>> batch = torch.ones(16, 3), torch.arange(16) % 2
        >>> grads = lt.per_sample_gradients(loss, ps, st, batch)
        >>> grads["layer_1"]["weight"].shape
        torch.Size([16, 8, 3])

        `training.private_gradients` clips such gradients, and hides them in noise.

    Source:
        `torch.func.vmap` of `torch.func.grad`.
    """
    size = samples(batch)
    check_chunk_size(chunk_size)
    if randomness not in ("different", "same"):
        raise out_of_range("randomness", randomness, "'different' or 'same'")

    def of_one(number: Tensor, sample: Tree) -> Tree:
        def own(leaf: Tree) -> Tree:
            return fold_in(leaf, number) if is_key(leaf) else leaf

        states = tree_map(own, st) if randomness == "different" else st
        one = tree_map(lambda leaf: leaf[None], sample) if keep_batch_dim else sample
        value, gradients = withgradient(lambda ps: loss(ps, states, one), ps, has_aux=has_aux)
        return (gradients, pack(value[1])) if has_aux else gradients

    numbers = torch.arange(size, device=tree_leaves(batch)[0].device)
    found = batched(of_one, chunk_size, numbers, batch)
    return (found[0], unpack(found[1])) if has_aux else found


def samples(batch: Tree, *, none: bool = False) -> int:
    """Return the number of samples of a batch, or raise if it does not have one number.

    Args:
        batch: The batch.
        none: Whether there may be no samples.
    """
    # Sizes are compared, not hashed, and not read by len(): they may be SymInts while `jit` traces.
    found: list[tuple[int, str]] = []
    for path, leaf in named_leaves(batch):
        where = f"'{path}' of the batch" if path else "The batch"
        if not isinstance(leaf, Tensor):
            raise wrong_type(where, leaf, "a tensor", fix="Close over what is the same for all samples.")
        if leaf.ndim == 0 or (not none and leaf.shape[0] == 0):
            raise InputError(f"{where} must have samples along its first dimension.", got=described(leaf))
        if all(leaf.shape[0] != size for size, _ in found):
            found.append((leaf.shape[0], where))
    if not found:
        raise InputError("The batch must have a tensor.", got="an empty tree")
    if len(found) > 1:
        got = ", ".join(f"{size} in {where}" for size, where in found)
        raise InputError("All tensors of the batch must have the same number of samples.", got=got)
    return found[0][0]
