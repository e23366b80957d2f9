"""Collective functions: averages over all ranks, with derivatives, and the same values on all ranks."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torchopt.base import ChainedGradientTransformation, GradientTransformation
from typing_extensions import Self

from luxtorch._torch import compile_constant, forward_level
from luxtorch._transforms import functional, transformed
from luxtorch.core import (
    InputError,
    named_leaves,
    out_of_range,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
    wrong_type,
)
from luxtorch.core._sharded import is_sharded
from luxtorch.random import fold_in
from luxtorch.random._key import is_key

from ._world import collective, rank, world_size

T = TypeVar("T")


def average_gradients(grads: T) -> T:
    """Return the mean of the gradients of all ranks.

    With the mean of a loss over equal shares of a batch, this is the gradient of the mean over the whole batch. With
    weights or ignored targets the shares are not equal: then average `(sum, weight)` of `loss.sum_and_weight` and the
    gradient of that sum, and divide the averages by the average weight.

    All gradients of one dtype travel in a single all-reduce, and those of a ComponentVector without being copied
    together. It works inside of `torch.func` transforms and of compiled functions, except that `torch.compile` does
    not know how to batch its derivative.

    Args:
        grads: The gradients, a tree of tensors with the same structure on every rank, which is not checked: that
            would take another collective. What is not a tensor is kept, and so are sharded tensors, whose
            gradients `gather_parameters` has averaged. A loss to be reported can be averaged as well.

    Returns:
        A tree of the same structure; on a single process, the one that came.

    Raises:
        DTypeError: If a gradient is neither real nor complex.
        DistributedError: If a rank has died, or does not take part in time.

    Example:
        >>> import torch, luxtorch as lt
        >>> from luxtorch import distributed, optim
        >>> distributed.initialize()
        >>> ps = lt.ComponentVector({"weight": torch.ones(2)})
        >>> opt_state = optim.setup(optim.Descent(0.5), ps)
        >>> x = distributed.shard_data(torch.arange(4.0).reshape(2, 2))
        >>> grads = lt.gradient(lambda ps: (x @ ps.weight).mean(), ps)
        >>> opt_state, ps = optim.update(opt_state, ps, distributed.average_gradients(grads))
        >>> ps.weight
        tensor([0.5000, 0.0000])

    Source: `allreduce!` with `avg`, of Lux's DistributedUtils.
    """
    for leaf in tree_leaves(grads):
        if isinstance(leaf, Tensor) and not _is_number(leaf):
            fix = "Average states by average_states, which keeps counts and keys as they are."
            raise wrong_type("A gradient", leaf, "a floating point or complex tensor", fix=fix)
    return _averaged(grads)


def average_states(st: T) -> T:
    """Return the mean of the states of all ranks, such as the running statistics of a BatchNorm.

    While training, every rank normalizes by its own share of the batch, and its running statistics are of that share.
    They are best averaged before a model is tested or saved, once in an epoch. The variances within the shares are
    averaged: how the shares' means differ does not count.

    Args:
        st: The states, a tree with the same structure on every rank. Floating point tensors are averaged; counts,
            random keys and modes are kept as they are on each rank.

    Returns:
        A tree of the same structure; on a single process, the one that came.

    Raises:
        DistributedError: If a rank has died, or does not take part in time.

    Example:
        >>> import luxtorch as lt
        >>> from luxtorch import distributed
        >>> ps, st = lt.setup(0, lt.BatchNorm(2))
        >>> distributed.average_states(st)["running_mean"]
        tensor([0., 0.])
    """
    return _averaged(st)


class DistributedRule(ChainedGradientTransformation):
    """Average the gradients of all ranks, then apply another rule.

    It is a chain of two gradient transformations, of which the first is `average_gradients`. A rule that collects
    gradients of several calls, such as `AccumGrad`, belongs into an `OptimiserChain` inside of it. Frozen and missing
    gradients are not sent. It is not for sharded parameters: `gather_parameters` averages their gradients.

    Args:
        rule: A rule of `luxtorch.optim`, or a torchopt optimizer.

    Attributes:
        rule: The rule.

    Raises:
        DTypeError: If it is not a gradient transformation.

    Example:
        >>> import torch
        >>> from luxtorch import distributed, optim
        >>> ps = {"weight": torch.ones(2)}
        >>> opt_state = optim.setup(distributed.DistributedRule(optim.Descent(0.5)), ps)
        >>> opt_state, ps = optim.update(opt_state, ps, {"weight": torch.ones(2)})
        >>> ps
        {'weight': tensor([0.5000, 0.5000])}

    Source: `DistributedOptimizer` of Lux's DistributedUtils.
    """

    rule: GradientTransformation

    def __new__(cls, rule: GradientTransformation) -> Self:
        if not isinstance(rule, GradientTransformation):
            fix = "torch.optim optimizers change parameters in place; use the rule of the same name here."
            raise wrong_type("rule", rule, "a rule such as optim.Adam(1e-3), or a torchopt optimizer", fix=fix)
        self = super().__new__(cls, _AVERAGE, rule)
        self.rule = rule
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return DistributedRule, (self.rule,)

    def __repr__(self) -> str:
        return f"DistributedRule({self.rule!r})"


def _init(params: Any) -> tuple[()]:
    return ()


def _update(updates: Any, state: Any, *, params: Any = None, inplace: bool = False) -> tuple[Any, Any]:
    return average_gradients(updates), state


_AVERAGE = GradientTransformation(_init, _update)


def _is_number(leaf: Tensor) -> bool:
    return leaf.is_floating_point() or leaf.is_complex()


def _averaged(tree: T) -> T:
    if world_size() == 1:
        return tree
    leaves, spec = tree_flatten(tree)
    buckets: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and _is_number(leaf) and not is_sharded(leaf):
            buckets.setdefault((leaf.dtype, leaf.device), []).append(i)
    for members in buckets.values():
        for i, averaged in zip(members, _means([leaves[i] for i in members]), strict=True):
            leaves[i] = averaged
    averages: T = tree_unflatten(leaves, spec)
    return averages


def _means(tensors: list[Tensor]) -> list[Tensor]:
    """Return the means of tensors of one dtype, by one all-reduce."""
    if len(tensors) == 1:
        return [mean(tensors[0])]
    flat = mean(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    pieces = flat.split_with_sizes([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def mean(x: Tensor) -> Tensor:
    """Return the mean over all ranks: one all-reduce."""
    result: Tensor = _in_trace(x) if is_compiling() else _Mean.apply(x) if x.requires_grad or functional() else _mean(x)
    return result


def _in_trace(x: Tensor) -> Tensor:
    """Return the same under torch.compile, which does not support an autograd.Function with a vmap or jvp rule."""
    if _in_forward_mode():
        value, tangent = forward_ad.unpack_dual(x, level=0)  # type: ignore[no-untyped-call]
        if tangent is not None:
            return forward_ad.make_dual(mean(value), mean(tangent), level=0)  # type: ignore[no-any-return,no-untyped-call]
    result: Tensor = _Traced.apply(x) if x.requires_grad else _mean(x)
    return result


@compile_constant
def _in_forward_mode() -> bool:
    return forward_level() >= 0


@torch.library.custom_op("luxtorch::distributed_mean", mutates_args=())
def _mean(x: Tensor) -> Tensor:
    # Divided first, as the sum of many gradients may overflow float16.
    total = (x / dist.get_world_size()).contiguous()
    with collective("all-reduce"):
        dist.all_reduce(total)
    return total


@_mean.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_mean.register_vmap
def _(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
    return mean(x), in_dims[0]  # the mean is elementwise


class _Traced(torch.autograd.Function):
    """The mean with its derivative.

    What a rank differentiates is its own share of the mean of all ranks. So the cotangents are averaged, too.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _mean(x)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return mean(grad)


class _Mean(_Traced):
    """The same for all transforms of eager code."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return mean(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
        return mean(x), in_dims[0]


def synchronize(tree: T, root: int = 0) -> T:
    """Return a tree with the values of one rank, on every rank.

    Call it once before training, on parameters, states and optimizer states, or on a whole TrainState. Models that
    are set up from the same seed are equal anyhow. Random keys become equal, too: see `fold_in_rank`.

    Args:
        tree: A tree of tensors of the same names, shapes and dtypes on every rank, and on the same kind of device.
            What is not a tensor is kept, and so are sharded tensors, of which every rank has its own part.
        root: The rank whose values are taken.

    Returns:
        A tree of the same structure, with tensors of its own; on a single process, the one that came.

    Raises:
        InputError: If the trees of the ranks differ in structure, which all ranks report; if there is no such root;
            or inside of a transform or a compiled function.
        DistributedError: If a rank has died, or does not take part in time.

    Example:
        >>> import luxtorch as lt
        >>> from luxtorch import distributed
        >>> ps, st = distributed.synchronize(lt.setup(distributed.rank(), lt.Dense(2, 3)))

    Source: `synchronize!!` of Lux's DistributedUtils.
    """
    if not 0 <= root < world_size():
        raise out_of_range("root", root, f"at least 0 and below the number of ranks, {world_size()}")
    if transformed():
        raise InputError(
            "synchronize must be called outside of transforms and compiled functions.",
            fix="Call synchronize once, before training.",
        )
    if world_size() == 1:
        return tree
    _check_alike(tree, root)
    leaves, spec = tree_flatten(tree)
    by_device: dict[torch.device, list[int]] = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and not is_sharded(leaf):
            by_device.setdefault(leaf.device, []).append(i)
    for members in by_device.values():
        for i, leaf in zip(members, _broadcast([leaves[i] for i in members], root), strict=True):
            leaves[i] = leaf
    alike: T = tree_unflatten(leaves, spec)
    return alike


def fold_in_rank(tree: T) -> T:
    """Return a tree in which this rank's number is folded into every random key.

    Without it all ranks, which start from the same seed, would draw the same dropout masks. Call it once, after the
    setup; the layers then derive their next keys from these.

    Args:
        tree: A key, states, or any other tree. What is not a key is kept: a key is a uint64 tensor of shape (..., 2).

    Returns:
        A tree of the same structure; on a single process, the one that came.

    Example:
        >>> import luxtorch as lt
        >>> from luxtorch import distributed
        >>> ps, st = lt.setup(0, lt.Dropout(0.5))
        >>> st = distributed.fold_in_rank(st)
        >>> st["rng"].shape
        torch.Size([2])
    """
    if world_size() == 1:
        return tree
    folded: T = tree_map(lambda leaf: fold_in(leaf, rank()) if is_key(leaf) else leaf, tree)
    return folded


def _broadcast(tensors: list[Tensor], root: int) -> list[Tensor]:
    """Return the tensors of the root, in one broadcast of their bytes, so that any dtype can be sent, keys included."""
    raw = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    joined = torch.cat(raw)
    with collective("broadcast"):
        dist.broadcast(joined, root)
    # Cloned, because the memory of a tensor must be aligned to the size of its elements.
    pieces = joined.split_with_sizes([piece.numel() for piece in raw])
    return [
        piece.clone().view(tensor.dtype).view(tensor.shape).requires_grad_(tensor.requires_grad)
        for piece, tensor in zip(pieces, tensors, strict=True)
    ]


def _check_alike(tree: Any, root: int) -> None:
    """Raise on all ranks unless their trees have the same structure: otherwise some would wait forever."""
    own = [f"'{name}' {_outline(leaf)}" for name, leaf in named_leaves(tree)]
    outlines: list[list[str]] = [[] for _ in range(world_size())]
    with collective("comparison of the trees"):
        dist.all_gather_object(outlines, own)
    other = next((i for i, outline in enumerate(outlines) if outline != outlines[root]), None)
    if other is None:
        return
    wanted, came = outlines[root], outlines[other]
    place = next((i for i, pair in enumerate(zip(wanted, came, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        place = min(len(wanted), len(came))
    raise InputError(
        f"All ranks must have the same tree, and that of rank {other} differs from that of rank {root}.",
        expected=wanted[place] if place < len(wanted) else "no more leaves",
        got=came[place] if place < len(came) else "no more leaves",
        fix="Build the same model, with the same options, on every rank.",
    )


def _outline(leaf: object) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    return f"{leaf.dtype} of shape {tuple(leaf.shape)} on {leaf.device.type}"
