"""Reading the components of a flat tensor: as views, which all come from one split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from typing_extensions import Self

from ._axes import Axes, Shape
from ._build import check_flat
from ._elementwise import Named
from ._stamp import Stamp, is_stale, take_stamp
from ._trace import find, leaf_sizes, top, transform_depth

R = TypeVar("R", bound="Reading")


class Reading(Named):
    """A flat tensor, or a part of one, and the views of its components."""

    axes: Axes
    """The names and shapes of the components."""

    # A vector of its own has its tensor here, or whatever a tree library puts in its place.
    _data: Any = None
    # A group has the tensor that it is a part of, with its start in it, and its pieces of that tensor's split.
    _whole: tuple[Tensor, int] | None = None
    _pieces: Sequence[Tensor] | None = None
    # The components once they were read, and what tells whether they may be read again.
    _components: dict[str, Any] | None = None
    _stamp: Stamp | None = None
    # How deep in function transforms torch.compile traced the making of this object, if it did.
    _traced_at: int | None = None

    @property
    def flat(self) -> Tensor:
        """All elements in one tensor of shape `(*batch, size)`; not a copy."""
        if self._whole is None:
            return self._data  # type: ignore[no-any-return]
        whole, start = self._whole
        return whole.narrow(-1, start, self.axes.size)

    def _origin(self) -> tuple[Tensor, int]:
        """Return the tensor that holds the elements, and where they start in it."""
        return self._whole or (self._data, 0)

    def _named(self) -> dict[str, Any]:
        """Return the components of the top level."""
        return self._in_trace() if is_dynamo_compiling() else self._kept()

    def _kept(self) -> dict[str, Any]:
        """Return the components of the top level: made at the first call, and kept."""
        components = self._components
        if components is None or (self._stamp is not None and is_stale(self._stamp)):
            pieces = self._pieces
            if pieces is None:
                pieces = self._split()
                if pieces:
                    self.__dict__["_stamp"] = take_stamp(self._origin()[0], pieces[0])
            self.__dict__["_components"] = components = self._read(pieces)
        return components

    def _in_trace(self, name: str | None = None) -> dict[str, Any]:
        """Return the components of the top level, or a single one, in a trace of torch.compile.

        What is kept on an object from outside of the trace becomes an output of the compiled graph, and a reason to
        compile again. So only objects made in the trace keep their components, and where a backward may follow:
        nowhere else does it matter that all views come from one split.
        """
        whole, offset = self._origin()
        depth = transform_depth()
        recorded = depth > 0 or (whole.requires_grad and torch.is_grad_enabled())
        if recorded and self._traced_at is not None and (depth == 0) == (self._traced_at == 0):
            components = self._components
            if components is None:
                self.__dict__["_components"] = components = self._read(self._pieces or self._split())
            return components
        if name is None:
            return self._read(self._split())
        place = find(self.axes, name)
        if place is None:
            return {}
        start = offset + place.start
        if isinstance(place.child, Axes):
            return {name: self._group(place.child, whole, start, None)}
        return {name: _shaped(whole.narrow(-1, start, place.size), tuple(whole.shape[:-1]), place.child)}

    def _split(self) -> Sequence[Tensor]:
        """Return one piece for each leaf, all from one operation, so that the backward is one concatenation."""
        flat = self.flat
        sizes = leaf_sizes(self.axes)
        try:
            return flat.split_with_sizes(sizes, -1) if sizes else ()
        except (RuntimeError, AttributeError):
            check_flat(flat, self.axes)
            raise

    def _read(self, pieces: Sequence[Tensor]) -> dict[str, Any]:
        """Return the components of the top level, given the pieces of all leaves."""
        whole, offset = self._origin()
        batch = tuple(pieces[0].shape[:-1]) if pieces and pieces[0].dim() > 1 else ()
        components: dict[str, Any] = {}
        for name, (child, start, _, leaf, leaves) in top(self.axes):
            if isinstance(child, Axes):
                components[name] = self._group(child, whole, offset + start, pieces[leaf : leaf + leaves])
            else:
                components[name] = _shaped(pieces[leaf], batch, child)
        return components

    def _group(self, axes: Axes, whole: Tensor, start: int, pieces: Sequence[Tensor] | None) -> Self:
        """Return a group that begins at `start` in the tensor that it is a part of."""
        group = make(type(self), None, axes)
        state = group.__dict__
        state["_whole"] = (whole, start)
        state["_pieces"] = pieces
        return group


def make(cls: type[R], data: Any, axes: Axes) -> R:
    """Return an object with these elements and names, without a look at either."""
    vector = object.__new__(cls)
    # Past `__setattr__`, which may refuse.
    state = vector.__dict__
    state["_data"] = data
    state["axes"] = axes
    if is_dynamo_compiling():
        state["_traced_at"] = transform_depth()
    return vector


def _shaped(piece: Tensor, batch: Shape, shape: Shape) -> Tensor:
    """Return a view of a flat piece in the shape of its leaf."""
    if len(shape) == 1:
        return piece
    return piece.view(*batch, *shape) if batch or shape else piece.squeeze(-1)
