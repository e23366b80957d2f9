"""Activation checkpointing (rematerialization): `Checkpointed`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luxtorch._torch import forward_level, saved_tensors_hooks_enabled
from luxtorch._transforms import functional, silenced
from luxtorch.core import Layer, Parameters, States, WrapperLayer, tree_flatten, tree_leaves, tree_unflatten
from luxtorch.core._tree import TreeSpec

Tensors: TypeAlias = tuple[Tensor, ...]


class Checkpointed(WrapperLayer):
    """Recompute a layer in the backward pass, instead of keeping its activations in memory.

    The numbers are those of the layer itself. Randomness is the same in both computations, since it comes from the
    keys in the states. In forward mode there is nothing to save, and the layer is called directly; so it is under
    `torch.compile`, which decides by itself what to recompute.

    Under the transforms of torch.func, derivatives are those with respect to input, parameters and states: a layer
    that closes over another tensor which is being differentiated should take it as an input.

    Args:
        layer: The layer.

    Parameters:
        Those of the layer.

    States:
        Those of the layer.

    Shape:
        That of the layer.

    Example:
        >>> import torch, luxtorch as lt
        >>> block = lt.Chain(lt.Dense(8, 64, torch.tanh), lt.Dense(64, 8))
        >>> model = lt.Chain(lt.Checkpointed(block), lt.Checkpointed(block))
        >>> ps, st = lt.setup(0, model)
        >>> grads = torch.func.grad(lambda ps: model(torch.ones(2, 8), ps, st)[0].sum())(ps)
        >>> grads["layer_1"]["layer_2"]["bias"].shape
        torch.Size([8])

    Source: Chen et al., "Training deep nets with sublinear memory cost", 2016; `torch.utils.checkpoint`, which does
    not work under torch.func.
    """

    layer: Layer

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the output and the state of the layer."""
        if torch.compiler.is_compiling() or forward_level() >= 0:
            return self.layer(x, ps, st)
        # torch.func disables these hooks.
        if not functional() and saved_tensors_hooks_enabled():
            # All randomness comes from keys: no generator has to be restored.
            output: tuple[Any, States] = checkpoint(
                _SilentAgain(self.layer), x, ps, st, use_reentrant=False, preserve_rng_state=False
            )
            return output
        arguments = _Packed.of((x, ps, st))
        call = _Call(self.layer, arguments)
        outputs = _Recomputed.apply(call, *arguments.tensors)
        return call.result.rebuild(outputs)  # type: ignore[no-any-return]


class _SilentAgain:
    """Call a layer, which prints at the first call alone."""

    def __init__(self, layer: Layer) -> None:
        self._layer, self._called = layer, False

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        with silenced() if self._called else nullcontext():
            self._called = True
            return self._layer(x, ps, st)


class _Packed(NamedTuple):
    """The tensors of a tree, separated from the rest of it."""

    tensors: Sequence[Tensor]
    others: dict[int, Any]
    spec: TreeSpec

    @staticmethod
    def of(tree: Any) -> _Packed:
        leaves, spec = tree_flatten(tree)
        others = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        return _Packed([leaf for leaf in leaves if isinstance(leaf, Tensor)], others, spec)

    def rebuild(self, tensors: Iterable[Tensor]) -> Any:
        """Return the tree with other tensors in it."""
        given = iter(tensors)
        leaves = [self.others[i] if i in self.others else next(given) for i in range(self.spec.num_leaves)]
        return tree_unflatten(leaves, self.spec)


class _Call:
    """Call a layer on the tensors among its arguments, and remember the structure of what it returns.

    Attributes:
        differentiable: Of how many outputs, the first ones, there are derivatives; states have none.
    """

    def __init__(self, layer: Layer, arguments: _Packed) -> None:
        self.layer = layer
        self.arguments = arguments._replace(tensors=())  # not kept longer than the transforms keep them
        self.result: Any = None
        self.differentiable = 0

    def __call__(self, *tensors: Tensor) -> Tensors:
        y, st = self.layer(*self.arguments.rebuild(tensors))
        result = _Packed.of((y, st))
        self.result = result._replace(tensors=())
        self.differentiable = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(y))
        return tuple(result.tensors)


class _Pullback:
    """Take the inputs of a call, and gradients with respect to its outputs, to gradients with respect to its inputs."""

    def __init__(self, call: _Call | _Pullback, inputs: int) -> None:
        self.call = call
        self.inputs = inputs
        self.differentiable = 0

    def __call__(self, *tensors: Tensor) -> Tensors:
        inputs, grads = tensors[: self.inputs], tensors[self.inputs :]
        places = [i for i, tensor in enumerate(inputs) if _smooth(tensor)]

        def smooth(*chosen: Tensor) -> Tensors:
            traced = dict(zip(places, chosen, strict=True))
            with silenced():
                outputs = self.call(*(traced.get(i, tensor) for i, tensor in enumerate(inputs)))
            return tuple(y for y in outputs[: self.call.differentiable] if _smooth(y))

        self.differentiable = len(places)
        chosen = tuple(inputs[i] for i in places)
        if functional() or torch.is_grad_enabled():
            vjp: Callable[..., Any] = torch.func.vjp
            _, pullback = vjp(smooth, *chosen)
            return pullback(grads)  # type: ignore[no-any-return]
        # Without a transform: with plain autograd the layer uses the same fused kernels as in the forward pass.
        with torch.enable_grad():
            own = tuple(tensor.detach().requires_grad_() for tensor in chosen)
            outputs = smooth(*own)
        used = [i for i, y in enumerate(outputs) if y.requires_grad]
        if not used:
            return tuple(map(torch.zeros_like, own))
        return torch.autograd.grad(
            [outputs[i] for i in used], own, [grads[i] for i in used], allow_unused=True, materialize_grads=True
        )


class _Recomputed(torch.autograd.Function):
    """A call that saves only its inputs.

    Its backward pass is such a call again. So under torch.func, which records every backward pass, the recomputed
    activations are not kept either, and there are derivatives of any order.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call | _Pullback, *inputs: Tensor) -> Tensors:
        outputs = call(*inputs)
        # torch forbids that an output is the same tensor as an input, as states often are.
        return tuple(y.view_as(y) if any(y is x for x in inputs) else y for y in outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(y for i, y in enumerate(output) if not _differentiable(ctx.call, i, y)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, inputs = ctx.call, ctx.saved_tensors
        chosen = [g for i, g in enumerate(grads) if _differentiable(call, i, g)]
        found = iter(_Recomputed.apply(_Pullback(call, len(inputs)), *inputs, *chosen))
        return None, *(next(found) if _smooth(tensor) else None for tensor in inputs)


def _differentiable(call: _Call | _Pullback, i: int, output: Tensor) -> bool:
    return i < call.differentiable and _smooth(output)


def _smooth(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
