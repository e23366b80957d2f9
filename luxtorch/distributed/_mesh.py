"""Where the parts of tensors live: meshes of ranks, placements by names, and trees that are placed by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed import tensor as placements
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from luxtorch._transforms import transformed, watched
from luxtorch.core import (
    InputError,
    KeyNameError,
    named_leaves,
    out_of_range,
    path_name,
    tree_map_with_path,
    unknown_name,
    wrong_type,
)
from luxtorch.random._key import is_key

from ._world import collective, initialize, initialized, world_size

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Say that a tensor is split along a dimension, in as many parts as an axis of the mesh has ranks.

    Args:
        dim: The dimension of the tensor; negative ones count from the end.
        axis: The name of the axis of the mesh.

    Example:
        >>> from luxtorch import distributed
        >>> distributed.Shard(0, "model")
        Shard(dim=0, axis='model')

    Source: `torch.distributed.tensor.Shard`; `jax.sharding.PartitionSpec`.
    """

    dim: int
    axis: str


@dataclass(frozen=True)
class Replicate:
    """Say that every rank holds the whole tensor.

    Example:
        >>> from luxtorch import distributed
        >>> distributed.Replicate()
        Replicate()

    Source: `torch.distributed.tensor.Replicate`.
    """


Placement: TypeAlias = "Shard | Replicate | tuple[Shard, ...] | None"
"""Where a tensor goes: split, copied, split along several axes of the mesh, or (None) left as it is."""

Rules: TypeAlias = Mapping[str, Placement]
"""Placements by patterns of dotted names."""


def mesh(device: str | None = None, /, **axes: int) -> DeviceMesh:
    """Arrange all ranks in a grid with named axes.

    Ranks that are neighbours on the last axis have neighbouring numbers: give the axis with the most communication,
    usually the one that splits the model, last. A process of its own is a grid of one rank.

    Args:
        device: "cpu", "cuda" or another kind of device; by default CUDA where there is one.
        **axes: The size of each axis. One of them may be -1, for as many ranks as are left.

    Returns:
        A mesh of torch, for `place`.

    Raises:
        InputError: If the sizes do not multiply to the number of ranks.
        DistributedError: If a rank does not take part in time.

    Example:
        >>> from luxtorch import distributed
        >>> distributed.mesh("cpu", data=-1, model=1).shape
        (1, 1)
        >>> distributed.shutdown()

    Source: `torch.distributed.device_mesh.init_device_mesh`; `jax.make_mesh`.
    """
    if not axes:
        raise InputError("A mesh needs an axis.", fix="Name one with its size, as in distributed.mesh(data=-1).")
    initialize()
    if not initialized():  # a process of its own: collectives need a group nevertheless
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with collective("arrangement in a mesh"):
        return init_device_mesh(device, _sizes(axes), mesh_dim_names=tuple(axes))


def _sizes(axes: Mapping[str, int]) -> tuple[int, ...]:
    ranks, known = world_size(), 1
    for name, size in axes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < -1 or size == 0:
            raise out_of_range(f"The size of the axis '{name}'", size, "a positive number of ranks, or -1")
        known *= max(size, 1)
    sizes = tuple(ranks // known if size == -1 else size for size in axes.values())
    if list(axes.values()).count(-1) > 1 or torch.Size(sizes).numel() != ranks:
        got = ", ".join(f"{name}={size}" for name, size in axes.items())
        fix = "Start as many processes, by `torchrun --nproc-per-node`, or let one axis have the size -1."
        headline = "The axes of a mesh must have room for all ranks."
        raise InputError(headline, expected=f"{ranks} ranks", got=got, fix=fix)
    return sizes


def place(tree: T, mesh: DeviceMesh, rules: Rules, *, local: bool = False) -> T:
    """Return a tree whose tensors are spread over a mesh as rules say: parameters, states or a batch.

    Everything that takes tensors takes such trees, and computes what one process would: layers, gradients, the rules
    of `luxtorch.optim`, `TrainState`, `lt.jit`. An optimizer that is set up with placed parameters has its state in
    the same places. Tensors that meet must all be placed, or be numbers.

    Args:
        tree: Any tree. Random keys, integers without dimensions, the hyperparameters of an optimizer, and what is not a
            tensor are kept as they are: every rank has them. Other numbers without dimensions are copied, whatever the
            rule says. What is placed already moves, to another mesh as well.
        mesh: The mesh, from `distributed.mesh`.
        rules: Placements by patterns of whole dotted names. `*` stands for anything, `?` for a character, and `*.` at
            the beginning for nothing as well: "*.bias" is every bias. The first pattern that fits decides.
        local: Whether each rank passes its own part of each tensor instead of the whole, as for a batch of which every
            rank has read its share. Otherwise the values are those of the mesh's first rank.

    Returns:
        A tree of the same structure, of `DTensor`s.

    Raises:
        KeyNameError: If no pattern fits a name, or the mesh has no axis of a name.
        InputError: If a tensor lacks a dimension, or its size is not a multiple of the ranks that share it; if an axis
            splits it twice; if local parts differ in shape; or inside of a transform or a compiled function.
        DTypeError: If a rule is not a placement.
        DistributedError: If a rank has died, or does not take part in time.

    Example:
        >>> import luxtorch as lt
        >>> from luxtorch import distributed
        >>> mesh = distributed.mesh("cpu", model=-1)
        >>> model = lt.Chain(lt.Dense(4, 8, "tanh"), lt.Dense(8, 2))
        >>> rules = {
        ...     "layer_1.*": distributed.Shard(0, "model"),
        ...     "layer_2.weight": distributed.Shard(1, "model"),
        ...     "*.bias": distributed.Replicate(),
        ... }
        >>> ps = distributed.place(lt.setup(0, model)[0], mesh, rules)
        >>> print(distributed.describe(ps))
        layer_1.weight  (8, 4)  Shard(0, 'model')  128 bytes
        layer_1.bias    (8,)    Shard(0, 'model')   32 bytes
        layer_2.weight  (2, 8)  Shard(1, 'model')   64 bytes
        layer_2.bias    (2,)    Replicate()          8 bytes
        232 bytes on this rank
        >>> distributed.shutdown()

    Source: `torch.distributed.tensor.distribute_tensor`; `jax.device_put` with a `NamedSharding`.
    """
    if transformed() or watched():
        raise InputError(
            "place must be called outside of transforms and compiled functions.", fix="Call place before training."
        )
    for rule in rules.values():
        _check_axes(rule, mesh)
    if local:
        _check_equal_parts(tree)

    def placed(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or is_key(leaf) or not (leaf.ndim or leaf.is_floating_point()):
            return leaf
        if any(getattr(key, "name", "") == _HYPERPARAMETERS for key in path):
            return leaf
        name = path_name(path)
        rule = _rule_of(name, rules)
        return leaf if rule is None else _placed(leaf, mesh, _of_torch(rule, name, leaf, mesh, local), local)

    with collective("placement"):
        moved: T = tree_map_with_path(placed, tree)
    return moved


_HYPERPARAMETERS = "hyper"
"""The attribute of an optimizer's state (no key of a dict is a name) that the kernels read on the CPU."""


def _check_equal_parts(tree: Any) -> None:
    """Raise on all ranks unless their parts have the same shapes."""
    own = {name: tuple(leaf.shape) for name, leaf in named_leaves(tree) if isinstance(leaf, Tensor)}
    found: list[Any] = [None] * world_size()
    with collective("comparison of the parts"):
        dist.all_gather_object(found, own)
    other = next((rank for rank, shapes in enumerate(found) if shapes != found[0]), None)
    if other is not None:
        fix = "Give each rank as many samples: drop the last ones, or repeat some."
        got = f"{found[0]} on rank 0 and {found[other]} on rank {other}"
        raise InputError("The parts of all ranks must have the same names and shapes.", got=got, fix=fix)


def _check_axes(rule: Any, mesh: DeviceMesh) -> None:
    parts = rule if isinstance(rule, tuple) else (rule,)
    axes = [part.axis for part in parts if isinstance(part, Shard)]
    if len(set(axes)) < len(axes):
        raise InputError("An axis of a mesh must not split a tensor twice.", got=str(rule))
    for part in parts:
        if isinstance(part, Shard):
            if part.axis not in (mesh.mesh_dim_names or ()):
                raise unknown_name(part.axis, mesh.mesh_dim_names or (), "axis of the mesh")
        elif len(parts) > 1 or not (part is None or isinstance(part, Replicate)):
            raise wrong_type("A rule", rule, 'Shard(dim, "axis"), several of them in a tuple, Replicate(), or None')


def _rule_of(name: str, rules: Rules) -> Placement:
    for pattern, rule in rules.items():
        if fnmatchcase(name, pattern) or fnmatchcase(name, pattern.removeprefix("*.")):
            return rule
    fix = f'Add a rule for it, or for all others at the end: "*": Replicate(), after {", ".join(map(repr, rules))}.'
    raise KeyNameError(f"No rule says where '{name}' goes.", fix=fix)


def _of_torch(rule: Placement, name: str, leaf: Tensor, mesh: DeviceMesh, local: bool) -> list[Any]:
    """Return a placement for each axis of the mesh."""
    axes: tuple[str, ...] = mesh.mesh_dim_names or ()
    found: list[Any] = [placements.Replicate()] * mesh.ndim
    sharing = [1] * leaf.ndim
    for part in rule if isinstance(rule, tuple) else (rule,):
        if not isinstance(part, Shard) or not leaf.ndim:
            continue
        if not -leaf.ndim <= part.dim < leaf.ndim:
            raise out_of_range(f"The dimension that splits '{name}'", part.dim, f"one of its {leaf.ndim} dimensions")
        dim, number = part.dim % leaf.ndim, axes.index(part.axis)
        sharing[dim] *= mesh.size(number)
        if leaf.shape[dim] % sharing[dim] and not local:
            raise InputError(
                f"The size of a dimension must be a multiple of the ranks that share it: dimension {dim} of '{name}'.",
                expected=f"a multiple of {sharing[dim]}, for {rule}",
                got=f"{leaf.shape[dim]}, of the shape {tuple(leaf.shape)}",
                fix="Split another dimension, or let every rank have it by Replicate().",
            )
        found[number] = placements.Shard(dim)
    return found


def _placed(leaf: Tensor, mesh: DeviceMesh, where: Sequence[Any], local: bool) -> Tensor:
    if isinstance(leaf, DTensor):
        if leaf.device_mesh == mesh:
            return leaf.redistribute(placements=where)
        leaf = leaf.full_tensor()
    own = leaf.detach().to(mesh.device_type)
    if local:
        result = DTensor.from_local(own, mesh, where, run_check=True)
    else:
        result = placements.distribute_tensor(own, mesh, where)
    return result.requires_grad_(leaf.requires_grad)


class Places(str):
    """A text that is shown as it is, without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def describe(tree: Any) -> Places:
    """Return a table of what lies where: names, global shapes, placements, and the bytes on this rank.

    Print the result, on one rank, or let a notebook show it.

    Args:
        tree: Any tree.

    Returns:
        A line for each tensor, and the sum of the bytes. A plain tensor, which each rank has alone, is "not placed".

    Example:
        >>> import torch
        >>> from luxtorch import distributed
        >>> mesh = distributed.mesh("cpu", data=-1)
        >>> batch = distributed.place({"x": torch.zeros(4, 2)}, mesh, {"x": distributed.Shard(0, "data")})
        >>> distributed.describe(batch)
        x  (4, 2)  Shard(0, 'data')  32 bytes
        32 bytes on this rank
        >>> distributed.shutdown()

    Source: `jax.debug.visualize_array_sharding`.
    """
    rows, total = [], 0
    for name, leaf in named_leaves(tree):
        if isinstance(leaf, Tensor):
            own = leaf.to_local() if isinstance(leaf, DTensor) else leaf
            total += own.nbytes
            rows.append((name, str(tuple(leaf.shape)), _where(leaf), f"{own.nbytes:,} bytes"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([*(text.ljust(width) for text, width in zip(row[:3], widths, strict=False)), row[3].rjust(widths[3])])
        for row in rows
    ]
    return Places("\n".join([*lines, f"{total:,} bytes on this rank"]))


def _where(leaf: Tensor) -> str:
    if not isinstance(leaf, DTensor):
        return "not placed"
    axes = leaf.device_mesh.mesh_dim_names or tuple(map(str, range(leaf.device_mesh.ndim)))
    pairs = list(zip(leaf.placements, axes, strict=True))
    shards = [f"Shard({place.dim}, {axis!r})" for place, axis in pairs if isinstance(place, placements.Shard)]
    sums = [f"Partial({axis!r})" for place, axis in pairs if place.is_partial()]
    return " ".join([*shards, *sums]) or "Replicate()"


def tensor_parallel(model: Any, axis: str = "model") -> dict[str, Placement]:
    """Return rules that split the parameters of a model within its layers, as Megatron-LM does.

    Two dense layers in a row are split by columns and then by rows, so that the pair needs one all-reduce: the two of
    a transformer's feed-forward network, the projections of an attention (each rank has some of the heads), and pairs
    in a `Chain`. Embeddings are split by features. Everything else is copied.

    Args:
        model: A layer. Attentions and feed-forward networks are known by the names of their layers, `q_proj`, `k_proj`,
            `v_proj` and `out_proj`, and `linear1` and `linear2`, also in layers of your own.
        axis: The axis of the mesh.

    Returns:
        Placements by names, for `place`; they end with a rule for all others. Rules of your own come before: `{**own,
        **tensor_parallel(model)}`.

    Example:
        >>> import luxtorch as lt
        >>> from luxtorch import distributed
        >>> distributed.tensor_parallel(lt.Chain(lt.Dense(4, 8, "tanh"), lt.Dense(8, 2)))
        {'layer_1.weight': Shard(dim=0, axis='model'), 'layer_1.bias': Shard(dim=0, axis='model'), \
'layer_2.weight': Shard(dim=1, axis='model'), '*': Replicate()}

    Source: Shoeybi et al., "Megatron-LM", 2019; `torch.distributed.tensor.parallel`.
    """
    rules: dict[str, Placement] = {}
    _split(model, "", axis, rules)
    return {**rules, "*": Replicate()}


_ATTENTION = ("q_proj", "k_proj", "v_proj"), ("out_proj",)
_FEED_FORWARD = ("linear1",), ("linear2",)


def _split(layer: Any, path: str, axis: str, rules: dict[str, Placement]) -> None:
    children = layer.children()
    if hasattr(layer, "num_embeddings"):
        rules[f"{path}weight"] = Shard(-1, axis)
    for columns, rows in (_ATTENTION, _FEED_FORWARD, *_pairs(layer)):
        if children.keys() >= {*columns, *rows}:
            rules |= {f"{path}{name}.{part}": Shard(0, axis) for name in columns for part in ("weight", "bias")}
            rules |= {f"{path}{name}.weight": Shard(1, axis) for name in rows}
    for name, child in children.items():
        _split(child, f"{path}{name}." if name else path, axis, rules)


def _pairs(layer: Any) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the dense layers that follow each other in a chain, two and two, with others without parts between."""
    found: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    first = ""
    for name, child in layer.children().items() if hasattr(layer, "__iter__") else ():
        dense = {"in_features", "out_features"} <= set(dir(child))
        if dense and first:
            found.append(((first,), (name,)))
        first = name if dense and not first else "" if dense or child.children() else first
    return found
