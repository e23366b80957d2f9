"""`Signature`: guards of a compiled function: structure, shapes, constants and settings, checked at each call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import GlobalStateGuard, TensorGuards

from ._constants import NotComparable, fingerprint
from ._flatten import Spec
from ._sizes import Expression, static


class Signature:
    """Hold the guards of a compiled function.

    These are the structure of the arguments; the values of their leaves that are not tensors; shape, strides, dtype,
    device, class and `requires_grad` of each tensor; and the settings of torch that change what a function computes:
    grad and inference mode, autocast, default dtype and device, number of threads, deterministic algorithms, and the
    precision of matrix products.

    The tensors and the settings are compared by the C++ guards of torch.compile: 0.1 us a tensor, where Python takes a
    microsecond. Structures are compared, not hashed: the hash of a deep model takes longer than all the rest.

    Args:
        leaves: The leaves of the arguments.
        spec: Their structure.
        fakes: The fake tensors of the trace; their symbolic sizes may differ from call to call.
    """

    def __init__(self, leaves: Sequence[Any], spec: Spec, fakes: Sequence[Any]) -> None:
        self.spec = spec
        args, kwargs = spec.children()
        # The structures of arguments by position; none where there are arguments by name.
        self.args: list[Spec] = [] if kwargs.num_children else args.children()
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.statics = {i: fingerprint(leaf) for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        self._layouts = [_layout(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        self._count = len(leaves)
        self.values = {i: leaves[i] for i in self.statics}
        self._device = _default_device()
        self._same_settings = GlobalStateGuard().check
        sizes: Any = [list(map(static, fake.shape)) for fake in fakes]
        strides: Any = [list(map(static, fake.stride())) for fake in fakes]
        guards = TensorGuards(*self.tensors(leaves), dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        self._same_tensors = guards.check
        self._condition: Expression | None = None

    def assume(self, condition: Expression | None) -> None:
        """Set a further guard: the assumptions of the trace about symbolic sizes."""
        self._condition = condition

    def fits(self, leaves: list[Any], spec: Spec) -> bool:
        """Return whether a call with these leaves passes the guards."""
        return self.fits_leaves(leaves) and spec == self.spec

    def fits_leaves(self, leaves: list[Any]) -> bool:
        """Return whether leaves pass the guards, whatever their structure."""
        if len(leaves) != self._count:
            return False
        if self.statics:
            try:
                if any(
                    isinstance(leaves[i], Tensor) or fingerprint(leaves[i]) != one for i, one in self.statics.items()
                ):
                    return False
            except NotComparable:  # the error with its place is raised when compiling
                return False
            leaves = self.tensors(leaves)
        return (
            self._same_tensors(*leaves)
            and self._same_settings()
            and self._device == _default_device()
            and (self._condition is None or bool(self._condition(leaves)))
        )

    def tensors(self, leaves: Sequence[Any]) -> list[Tensor]:
        """Return the leaves that are tensors."""
        return [leaves[i] for i in self.places]

    def leaves(self, tensors: Iterable[Tensor]) -> list[Any]:
        """Return all leaves, with the tensors replaced."""
        values = {**self.values, **dict(zip(self.places, tensors, strict=True))}
        return [values[i] for i in range(len(values))]

    def examples(self) -> list[Tensor]:
        """Return tensors like those of the first call, with any numbers."""
        return [torch.empty_strided(*layout, dtype=dtype, device=device) for dtype, device, *layout in self._layouts]

    def difference(self, other: Signature) -> str:
        """Describe the first difference to another signature."""
        if self.spec != other.spec or self.places != other.places:
            return "the structure of the arguments, or a Static in it"
        for i, one in self.statics.items():
            if one != other.statics[i]:
                return f"an argument that is not a tensor, {one[-1]!r} against {other.statics[i][-1]!r}"
        for (dtype, _, shape, _), (dtype_2, _, shape_2, _) in zip(self._layouts, other._layouts, strict=True):
            if (dtype, shape) != (dtype_2, shape_2):
                return f"a tensor, {dtype} {shape} against {dtype_2} {shape_2}"
        return "strides, requires_grad or class of a tensor, or a setting of torch"


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()


def _default_device() -> torch.device | None:
    # It is set by a function mode; without any, it need not be read.
    return torch.get_default_device() if torch._C._len_torch_function_stack() else None
