"""Operators with bodies as differentiable functions: their rules are such operators again, of derived bodies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from luxtorch._torch import TransformType, all_transforms, forward_level
from luxtorch._transforms import is_silenced, silenced, unwrapped
from luxtorch.jit._effects import EFFECTS

from ._closure import Flat, is_in_place


class Operator(ABC):
    """A call of an operator with bodies: which bodies, and everything but the tensors."""

    @abstractmethod
    def run(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """Call it, outside of all transforms."""

    def saved(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return those outputs that the pullback needs."""
        return []

    def constant_outputs(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs that have no derivative."""
        return [output for output in outputs if not is_smooth(output)]

    @abstractmethod
    def pullback(self, inputs: Sequence[Tensor], saved: Sequence[Tensor], slopes: Any) -> Sequence[Tensor | None]:
        """Return the gradients by the inputs."""

    @abstractmethod
    def pushforward(self, inputs: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Return the tangents of the outputs."""

    @abstractmethod
    def batched(self, info: Any, dims: Sequence[int | None], inputs: Sequence[Tensor]) -> tuple[Any, Any]:
        """Return the outputs for a batch, and their batch dimensions."""


def bind(operator: Operator, flat: Sequence[Tensor]) -> list[Tensor]:
    """Call an operator under the transforms that there are."""
    return list(_Rules.apply(operator, *flat))


class _Rules(torch.autograd.Function):
    @staticmethod
    def forward(operator: Operator, *flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(operator.run(flat))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.operator, *flat = inputs
        ctx.inputs = len(flat)
        ctx.save_for_backward(*flat, *ctx.operator.saved(output))
        ctx.save_for_forward(*flat)
        ctx.mark_non_differentiable(*ctx.operator.constant_outputs(output))

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        saved = ctx.saved_tensors
        with silenced():  # what bodies print, they have printed
            return None, *ctx.operator.pullback(saved[: ctx.inputs], saved[ctx.inputs :], slopes)

    @staticmethod
    def jvp(ctx: Any, _: Any, *slopes: Any) -> Any:
        with silenced():
            return tuple(ctx.operator.pushforward(ctx.saved_tensors, slopes))

    @staticmethod
    def vmap(info: Any, in_dims: Any, operator: Operator, *flat: Tensor) -> Any:
        outputs, dims = operator.batched(info, in_dims[1:], flat)
        return tuple(outputs), tuple(dims)


REBUILT: dict[Any, Callable[..., list[Tensor]]] = {}
"""What does the same as the operators in graphs, with rules for transforms."""


def interpreted(graph: fx.GraphModule) -> Callable[..., list[Tensor]]:
    """Return a graph as a function that can be transformed, also where there are loops and branches in it."""
    in_place = is_in_place(graph)

    class Interpreter(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target in EFFECTS and is_silenced() and target not in REBUILT:
                return None
            if target is torch.ops.aten.view.default and not in_place:
                return args[0].reshape(args[1])  # a batch may lie in memory as what was traced did not
            return REBUILT[target](*args) if target in REBUILT else super().call_function(target, args, kwargs)

    return lambda *flat: list(Interpreter(graph).run(*flat))


def is_smooth(tensor: Tensor) -> bool:
    """Tell whether a tensor can have a derivative."""
    return tensor.is_floating_point() or tensor.is_complex()


def smooth(tensors: Iterable[Any]) -> list[Any]:
    """Return those that can have a derivative."""
    return [tensor for tensor in tensors if is_smooth(tensor)]


def zeros_for(tensors: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> list[Tensor]:
    """Return slopes for those tensors that can have a derivative, zeros where there are none."""
    pairs = zip(tensors, slopes, strict=True)
    return [torch.zeros_like(t) if s is None else s for t, s in pairs if is_smooth(t)]


def spread(values: Iterable[Any], like: Sequence[Tensor]) -> list[Any]:
    """Return a value for each tensor that can have a derivative, in its place, and None for the others."""
    it = iter(values)
    return [next(it) if is_smooth(tensor) else None for tensor in like]


def parts(values: Sequence[Any], *sizes: int) -> Iterator[list[Any]]:
    """Yield a sequence in parts of these sizes, and what remains."""
    at = 0
    for size in sizes:
        yield list(values[at : at + size])
        at += size
    yield list(values[at:])


def with_some(tensors: Sequence[Tensor], places: Sequence[int], some: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors with those at some places replaced."""
    new = dict(zip(places, some, strict=True))
    return [new.get(i, tensor) for i, tensor in enumerate(tensors)]


class SmoothPart:
    """A body as a function of those inputs that can have a derivative; the others stay as they are.

    Args:
        step: The body.
        inputs: All inputs.

    Attributes:
        inputs: Those that can have a derivative.
    """

    def __init__(self, step: Flat, inputs: Sequence[Tensor]) -> None:
        self._step, self._all = step, inputs
        self._places = [i for i, tensor in enumerate(inputs) if is_smooth(tensor)]
        self.inputs = smooth(inputs)
        self._kinds: list[bool] = []

    def __call__(self, *some: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the outputs that can have a derivative, and the others."""
        outputs = self._step.call(*with_some(self._all, self._places, some))
        self._kinds = [is_smooth(one) for one in outputs]
        return tuple(smooth(outputs)), tuple(one for one in outputs if not is_smooth(one))

    def joined(self, smooth_ones: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs of the last call in their order."""
        first, second = iter(smooth_ones), iter(others)
        return [next(first) if kind else next(second) for kind in self._kinds]


def pulled(step: Flat, inputs: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of a body by those inputs that can have one, from slopes of its outputs that can."""
    part = SmoothPart(step, inputs)
    if not part.inputs:
        return []
    transform: Any = torch.func.vjp
    outputs, back = transform(lambda *some: part(*some)[0], *part.inputs)
    if not outputs:
        return [torch.zeros_like(one) for one in part.inputs]
    return list(back(tuple(slopes)))


def pushed(step: Flat, inputs: Sequence[Tensor], slopes: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs of a body, and tangents of those outputs that can have one."""
    part = SmoothPart(step, inputs)
    if not part.inputs:
        outputs = list(step.call(*inputs))
        return outputs, [torch.zeros_like(one) for one in smooth(outputs)]
    transform: Any = torch.func.jvp

    def with_one(*some: Tensor) -> Any:  # torch asks for an output
        found, rest = part(*some)
        return (*found, some[0]), rest

    found, tangents, rest = transform(with_one, tuple(part.inputs), tuple(slopes), has_aux=True)
    return part.joined(found[:-1], rest), list(tangents[:-1])


def mapped(step: Flat, dims: Sequence[int | None], info: Any) -> Flat:
    """Return a body for a batch; its outputs have the batch in front."""
    key = "batch", tuple(dims), info.batch_size, info.randomness
    if key not in step.derived:
        if all(dim is None for dim in dims):  # no input has a batch, so it is made for the outputs

            def call(*flat: Tensor) -> list[Tensor]:
                return [one.expand(info.batch_size, *one.shape) for one in step.call(*flat)]

        else:

            def call(*flat: Tensor) -> list[Tensor]:
                batched = torch.vmap(lambda *a: tuple(step.call(*a)), tuple(dims), randomness=info.randomness)
                return list(batched(*flat))

        step.derived[key] = Flat(call)
    return step.derived[key]  # type: ignore[no-any-return]


def with_batch(tensor: Tensor, dim: int | None, size: int, at: int = 0) -> Tensor:
    """Return a tensor with its batch dimension moved, or expanded to a batch."""
    if dim is not None:
        return tensor.movedim(dim, at)
    return tensor.unsqueeze(at).expand(*tensor.shape[:at], size, *tensor.shape[at:])


class Levels:
    """What differentiates at the moment.

    Args:
        flat: What is computed from.

    Attributes:
        reverse: How often in reverse mode.
        forward: How often in forward mode.
        first: The kind of the innermost transform; None if there is none.
    """

    def __init__(self, flat: Sequence[Tensor]) -> None:
        kinds = [level.key() for level in all_transforms() or ()]
        kinds = [kind for kind in kinds if kind != TransformType.Functionalize]
        taped = torch.is_grad_enabled() and any(unwrapped(tensor).requires_grad for tensor in flat)
        self.reverse = kinds.count(TransformType.Grad) + taped
        self.forward = kinds.count(TransformType.Jvp)
        self.forward = max(self.forward, int(forward_level() >= 0))
        self.first = kinds[-1] if kinds else None
