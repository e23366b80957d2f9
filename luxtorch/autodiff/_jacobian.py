"""Jacobians and Hessians as matrices, between any trees; gradients and Jacobians of each sample of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from luxtorch.components import ComponentMatrix, ComponentVector
from luxtorch.core import (
    InputError,
    described,
    named_leaves,
    out_of_range,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
    wrong_type,
)
from luxtorch.random import fold_in
from luxtorch.random._key import is_key

from ._arguments import Mode, check_chunk_size, check_inputs, check_mode, check_outputs, join, split
from ._gradient import gradient, withgradient
from ._torch_func import Tree, jvp, pack, unpack, vjp
from ._vmap import batched, columns, one_hot, rows, stack


def jacobian(
    f: Callable[..., Tree], *xs: Tree, mode: Mode = "reverse", has_aux: bool = False, chunk_size: int | None = None
) -> Tree:
    """Compute the Jacobian of a function.

    Args:
        f: A function of as many trees as `xs` has, that returns a tree of tensors, or `(tree, aux)`.
        xs: Trees of real floating point tensors.
        mode: `"reverse"` works row by row and suits many inputs; `"forward"` works column by column and suits many
            outputs. Forward mode ignores `torch.no_grad()` in `f`: only `detach()` makes constants.
        has_aux: Whether `f` returns a pair. `aux` may be any tree, and its leaves need not be tensors.
        chunk_size: How many rows or columns are computed at once; all by default. With 1 there is no `vmap`, for
            functions that it does not support.

    Shape:
        The block of an output of shape `(*M)` by an input of shape `(*N)` has the shape `(*M, *N)`.

    Returns:
        The tree of the outputs, with a tree like `x` at each leaf (for several arguments, a tuple of trees). A
        `ComponentVector` among the outputs or inputs makes its blocks one `ComponentMatrix`.
        With `has_aux` it is `(jacobian, aux)`.

    Raises:
        DTypeError: A leaf of `xs` or of the value is not a real floating point tensor.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.jacobian(lambda p: p["a"] * p["b"], {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)})
        {'a': tensor([[3., 0.],
                [0., 3.]]), 'b': tensor([1., 2.])}

    Source:
        `torch.func.jacrev` and `torch.func.jacfwd`, whose numbers these are.
    """
    check_mode(mode)
    check_chunk_size(chunk_size)
    check_inputs(xs, real=True)
    leaves, spec = tree_flatten(xs)

    def outputs(*args: Tensor) -> tuple[Tree, Tree]:
        value, aux = split(f(*tree_unflatten(args, spec)), has_aux)
        check_outputs(value, real=True)
        return value, aux

    if mode == "reverse":
        y, back, aux = vjp(outputs, tuple(leaves))
        y_leaves, y_spec = tree_flatten(y)
        blocks = rows(lambda us: back(tree_unflatten(us, y_spec)), y_leaves, leaves, chunk_size)
    else:
        y, aux = outputs(*leaves)
        y_leaves = tree_leaves(y)
        blocks = columns(outputs, y_leaves, leaves, chunk_size)
    return join(_arrange(blocks, y, xs[0] if len(xs) == 1 else xs), aux, has_aux)


def hessian(
    f: Callable[..., Tree], *xs: Tree, mode: Mode = "reverse", has_aux: bool = False, chunk_size: int | None = None
) -> Tree:
    """Compute the Hessian of a scalar function.

    Args:
        f: A function of as many trees as `xs` has, that returns a scalar, or `(scalar, aux)`.
        xs: Trees of real floating point tensors.
        mode: How the gradient is differentiated. `"reverse"` (reverse over reverse) is faster and needs no forward
            rules; `"forward"` (forward over reverse) needs less memory, and ignores `torch.no_grad()` in `f`.
        has_aux: Whether `f` returns a pair.
        chunk_size: How many rows or columns are computed at once; all by default, and with 1 without `vmap`.

    Returns:
        The tree of the gradient with a tree like `x` at each leaf: `H["a"]["b"]` is the derivative of the gradient
        by `a` with respect to `b`. The Hessian by a `ComponentVector` is a `ComponentMatrix`, with the blocks
        `H["a", "b"]`. With `has_aux` it is `(hessian, aux)`.

    Raises:
        InputError: The function does not return a scalar.
        DTypeError: A leaf of `xs` is not a real floating point tensor.

    Example:
        >>> import torch
        >>> import luxtorch as lt
        >>> lt.hessian(lambda x: x[0] ** 2 * x[1], torch.tensor([1.0, 2.0]))
        tensor([[4., 2.],
                [2., 0.]])

    Source:
        `Zygote.hessian`; `torch.func.hessian`, whose numbers these are.
    """

    def slope(*args: Tree) -> Tree:
        return gradient(f, *args, has_aux=has_aux)

    return jacobian(slope, *xs, mode=mode, has_aux=has_aux, chunk_size=chunk_size)


def _arrange(blocks: Sequence[Sequence[Tensor]], y: Tree, x: Tree) -> Tree:
    """Return the blocks as the tree of the outputs, with a tree of the inputs at each leaf.

    Args:
        blocks: The derivative of each output by each input, of shape `(*output, *input)`.
        y: The outputs.
        x: The inputs.
    """
    outputs, y_spec = tree_flatten(y, is_leaf=_is_vector)
    inputs, x_spec = tree_flatten(x, is_leaf=_is_vector)
    by_output = []
    for row, output in zip(blocks, outputs, strict=True):
        named = [_named(block, output, input_) for block, input_ in zip(row, inputs, strict=True)]
        by_output.append(tree_unflatten(named, x_spec))
    return tree_unflatten(by_output, y_spec)


def _is_vector(node: object) -> bool:
    return isinstance(node, ComponentVector)


def _named(
    block: Tensor, output: Tensor | ComponentVector, input_: Tensor | ComponentVector
) -> Tensor | ComponentVector | ComponentMatrix:
    row_axes = output.axes if isinstance(output, ComponentVector) else None
    col_axes = input_.axes if isinstance(input_, ComponentVector) else None
    inner_dims = len(input_.shape)
    if row_axes is not None and inner_dims == 0:
        return ComponentVector.from_flat(block, row_axes)
    if col_axes is not None and block.dim() == 1:
        return ComponentVector.from_flat(block, col_axes)
    # The names of the outputs lie on the rows only where the input takes up one dimension, the columns.
    if inner_dims != 1:
        row_axes = None
    if row_axes is None and col_axes is None:
        return block
    return ComponentMatrix(block, row_axes, col_axes)


def batched_jacobian(
    f: Callable[[Tensor], Tensor], x: Tensor, *, mode: Mode = "reverse", chunk_size: int | None = None
) -> Tensor:
    """Compute the Jacobian of each sample's output by the same sample's input.

    The function sees whole batches, and must treat every sample alone. Where it mixes samples, as batch normalization
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
        DTypeError: `x` or `f(x)` is not a real floating point tensor.

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
    check_chunk_size(chunk_size)
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


def _check_batches(x: object, y: object) -> None:
    check_outputs(y, real=True)
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() and y.dim() and x.shape[0] == y.shape[0]:
        return
    raise InputError(
        "The function must take a batch to a batch.",
        expected="x and f(x) tensors with the same first dimension, the batch",
        got=f"{described(x)} as x and {described(y)} as f(x)",
        fix="Keep the batch dimension in f, or take jacobian(f, x).",
    )


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
