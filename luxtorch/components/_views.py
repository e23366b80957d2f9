"""Components as views of a flat tensor: they come from one split, and are cached until they are stale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from typing_extensions import Self

from luxtorch._torch import (
    compile_constant,
    current_level,
    get_unwrapped,
    is_wrapped,
    level_of,
    unwrap_for_grad,
    version_of,
)

from ._axes import Axes, Shape, find, leaf_sizes, top
from ._functions import Named
from ._ravel import check_flat

R = TypeVar("R", bound="Views")


class Views(Named):
    """A flat tensor, or a part of one, and the views of its components."""

    axes: Axes
    """The names and shapes of the components."""

    # The tensor, or whatever a tree library puts in its place; of a group, made on first use.
    _data: Any = None
    # Of a group: the tensor that it is a part of, its start in it, and the stamp of its own tensor.
    _whole: tuple[Tensor, int] | None = None
    _part_stamp: Stamp | None = None
    # Of a group: its pieces of the split of that tensor, until the tensor of the group is read.
    _pieces: Sequence[Tensor] | None = None
    # The cached components, and the stamp that tells whether they are stale; without one they never are, see `settled`.
    _components: dict[str, Tensor | Self] | None = None
    _stamp: Stamp | None = None
    # Whether derivatives are taken only with respect to the whole, see `split_once`.
    _once: bool = False
    # The number of function transforms around the construction of this object, if torch.compile traced it.
    _traced_at: int | None = None

    @property
    def flat(self) -> Tensor:
        """All elements in one tensor of shape `(*batch, size)`; not a copy."""
        return self._data if self._whole is None else self._part(*self._whole)  # type: ignore[no-any-return]

    def _part(self, whole: Tensor, start: int) -> Any:
        """Return the tensor of a group, which is cached; the components become views of it."""
        data = self._data
        if is_dynamo_compiling():
            return _narrowed_in_trace(whole, start, self.axes.size, _transform_depth()) if data is None else data
        if data is None or (self._part_stamp is not None and _is_stale(self._part_stamp)):
            data = _narrowed(whole, start, self.axes.size)
            self._root(data, whole)
        return data

    def _root(self, data: Tensor, whole: Tensor) -> None:
        """Cache a tensor as that of a group, and drop views of another tensor."""
        stamp = _take_stamp(whole, data, recorded=data.requires_grad or not whole.requires_grad)
        self.__dict__.update(_data=data, _part_stamp=stamp, _pieces=None, _components=None, _stamp=None)

    def _origin(self) -> tuple[Tensor, int]:
        """Return the tensor that the components are views of, and where the elements start in it."""
        return self._whole if self._whole is not None and self._data is None else (self._data, 0)

    def _named(self) -> dict[str, Tensor | Self]:
        """Return the components of the top level."""
        return self._in_trace() if is_dynamo_compiling() else self._kept()

    def _kept(self) -> dict[str, Tensor | Self]:
        """Return the components of the top level, from the cache where it is not stale."""
        components, stamp = self._components, self._stamp
        stale = stamp is not None and _is_stale(stamp)
        if components is None or stale:
            state = self.__dict__
            if self._pieces is not None and not stale:
                components = self._read(self._pieces)
            else:
                state["_pieces"] = None
                components = self._read_anew()
            state["_components"] = components
        return components

    def _read_anew(self) -> dict[str, Tensor | Self]:
        """Return the components of the top level from a new split.

        A group and its leaves may both be differentiated by, as they lie in a tree, where a tape runs: there a group is
        a piece of the tensor, and its leaves are pieces of it. Everywhere else one split for all leaves costs less, and
        so does its backward.
        """
        flat = self.flat
        nested = flat.requires_grad and torch.is_grad_enabled() and not self._once and not is_wrapped(flat)
        pieces = self._split([place.size for _, place in top(self.axes)] if nested else leaf_sizes(self.axes))
        if pieces:
            self.__dict__["_stamp"] = _take_stamp(flat, pieces[0])
        return self._read(pieces, nested)

    def _in_trace(self, name: str | None = None) -> dict[str, Tensor | Self]:
        """Return the components of the top level, or a single one, under torch.compile.

        What is kept on an object from outside of the trace becomes an output of the compiled graph, and a reason to
        compile again. So only objects made in the trace keep their components, and where a backward may follow:
        nowhere else does it matter that all views come from one split.
        """
        whole, offset = self._origin()
        depth = _transform_depth()
        recorded = depth > 0 or (whole.requires_grad and torch.is_grad_enabled())
        if recorded and self._traced_at is not None and (depth == 0) == (self._traced_at == 0):
            components = self._components
            if components is None:
                self.__dict__["_components"] = components = self._read(
                    self._pieces or self._split(leaf_sizes(self.axes))
                )
            return components
        if name is None:
            return self._read(self._split(leaf_sizes(self.axes)))
        place = find(self.axes, name)
        if place is None:
            return {}
        start = offset + place.start
        if isinstance(place.child, Axes):
            return {name: self._group(place.child, whole, start)}
        return {name: _shaped(whole.narrow(-1, start, place.size), tuple(whole.shape[:-1]), place.child)}

    def _split(self, sizes: Sequence[int]) -> Sequence[Tensor]:
        """Return pieces of some sizes, all from one operation, so that the backward is one concatenation."""
        flat = self.flat
        try:
            return flat.split_with_sizes(sizes, -1) if sizes else ()
        except (RuntimeError, AttributeError):
            check_flat(flat, self.axes)
            raise

    def _read(self, pieces: Sequence[Tensor], nested: bool = False) -> dict[str, Tensor | Self]:
        """Return the components of the top level, given the pieces of all leaves, or if nested, of the top level."""
        whole, offset = self._origin()
        batch = tuple(pieces[0].shape[:-1]) if pieces and pieces[0].dim() > 1 else ()
        components: dict[str, Tensor | Self] = {}
        for number, (name, (child, start, _, leaf, leaves)) in enumerate(top(self.axes)):
            if not isinstance(child, Axes):
                components[name] = _shaped(pieces[number if nested else leaf], batch, child)
                continue
            components[name] = group = self._group(child, whole, offset + start)
            if nested:
                group._root(pieces[number], whole)
            else:
                group.__dict__["_pieces"] = pieces[leaf : leaf + leaves]
                if not is_dynamo_compiling():  # or the graph would depend on what was read before
                    group.__dict__.update(_stamp=self._stamp, _once=self._once)
        return components

    def _group(self, axes: Axes, whole: Tensor, start: int) -> Self:
        """Return a group that begins at `start` in the tensor that it is a part of."""
        # A trace that enters a transform before it asks for the tensor could not leave it again, see `_narrowed`.
        group = make(type(self), whole.narrow(-1, start, axes.size) if is_dynamo_compiling() else None, axes)
        group.__dict__["_whole"] = (whole, start)
        return group


def make(cls: type[R], data: Any, axes: Axes) -> R:
    """Return an object with these elements and names, without checks."""
    vector = object.__new__(cls)
    # Not through `__setattr__`, which raises.
    state = vector.__dict__
    state["_data"] = data
    state["axes"] = axes
    if is_dynamo_compiling():
        state["_traced_at"] = _transform_depth()
    return vector


def split_once(vector: R) -> R:
    """Return a vector for a function that is differentiated only with respect to the whole vector.

    All leaves then come from one split also where a tape runs: they are not computed from the groups that they are in.
    """
    once = make(type(vector), vector.flat, vector.axes)
    once.__dict__["_once"] = True
    return once


def settled(vector: R) -> R:
    """Return a vector whose components, at every depth, are computed now and kept for good.

    A function that closes over it closes over its components, each by itself. That is for bodies of loops: a component
    has a small gradient, which each step adds to, where a vector would have a large one.
    """
    if vector._components is not None and vector._stamp is None:
        return vector
    kept = make(type(vector), vector.flat, vector.axes)
    _settle(kept)
    return kept


def _settle(vector: Views) -> None:
    for component in vector._kept().values():
        if isinstance(component, Views):
            _settle(component)
    vector.__dict__["_stamp"] = None


def _shaped(piece: Tensor, batch: Shape, shape: Shape) -> Tensor:
    """Return a view of a flat piece in the shape of its leaf."""
    if len(shape) == 1:
        return piece
    return piece.view(*batch, *shape) if batch or shape else piece.squeeze(-1)


# Whether cached views are stale.

# The level that torch reports for a tensor whose transform has ended.
_ENDED = -2

# The tensor, one of its views, the tensor's version, whether autograd recorded, and whether a transform owns the view.
Stamp: TypeAlias = "tuple[Tensor, Tensor, int, bool, bool]"


def _take_stamp(tensor: Tensor, view: Tensor, recorded: bool | None = None) -> Stamp:
    """Return what `_is_stale` needs to know about new views; `recorded` is whether autograd recorded them."""
    # Only where autograd records does a later change of the tensor matter; an inference tensor has no version at all.
    version = version_of(tensor) if tensor.requires_grad else -1
    return (
        tensor,
        view,
        version,
        torch.is_grad_enabled() if recorded is None else recorded,
        is_wrapped(view),
    )


def _is_stale(stamp: Stamp) -> bool:
    """Tell whether views have to be made again.

    They have to if autograd records now and did not then, if the tensor was changed in place (autograd refuses the
    views of one split after that), or if they were made in a transform of torch.func that has ended.
    """
    tensor, view, version, recorded, in_transform = stamp
    if tensor.requires_grad and (version_of(tensor) != version or (torch.is_grad_enabled() and not recorded)):
        return True
    return in_transform and level_of(view) == _ENDED


def _narrowed(whole: Tensor, start: int, size: int) -> Tensor:
    """Return a part of the last dimension, wrapped by just the transforms that wrap the whole.

    A running transform wraps every new tensor, also a part of a tensor that it does not wrap. But a transform that is
    to differentiate by the part takes it as a value from outside.
    """
    part, level = whole.narrow(-1, start, size), level_of(whole)
    while level_of(part) > level:
        part = get_unwrapped(part)
    return part


def _narrowed_in_trace(whole: Tensor, start: int, size: int, depth: int) -> Tensor:
    """Return the same under torch.compile, inside of `depth` transforms, for a whole from outside of them."""
    part = whole.narrow(-1, start, size)
    for level in range(depth, 0, -1):
        part = unwrap_for_grad(part, level)
    return part


@compile_constant
def _transform_depth() -> int:
    """Return how many transforms of torch.func are running."""
    return current_level() or 0
