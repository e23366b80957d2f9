"""Layers called many times: `Maxout`, `RepeatedLayer`, `ScannedChain`, `Ensemble`; and in another precision."""

from __future__ import annotations

from dataclasses import KW_ONLY
from functools import reduce
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from luxtorch.core import (
    InputError,
    KeyNameError,
    Layer,
    LuxtorchError,
    Parameters,
    States,
    WrapperLayer,
    named_leaves,
    nested_dicts,
    out_of_range,
    show_value,
    tree_leaves,
    tree_map,
)
from luxtorch.core._tree import META_KEY
from luxtorch.random import split

from ._containers import EXTRA_INPUTS, LayerLike, NamedLayers, as_layer, extra_input, some_layers
from ._shared import over_steps, require_size
from .recurrent import StatefulRecurrentCell


class Maxout(NamedLayers):
    """Maxout: the elementwise maximum of the outputs of several layers on the same input.

    `Maxout(make, n)` calls the function `make`, without arguments, for a layer, and uses it n times, each with its own
    initial values.

    Args:
        *layers: Layers and plain functions; lists and tuples of them are flattened. Or a function that makes a
            layer, and a number.
        **named: Layers with names of your own.

    Parameters:
        Those of each layer, under `layer_1`, `layer_2`, ... or under the given names.

    States:
        Likewise.

    Shape:
        Whatever all layers take to their common output shape.

    Raises:
        InputError: If there are no layers.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Maxout(lambda: lt.Dense(3, 2), 4)
        >>> ps, st = lt.setup(0, model)
        >>> list(ps)
        ['layer_1', 'layer_2', 'layer_3', 'layer_4']
        >>> y, st = model(torch.ones(5, 3), ps, st)
        >>> y.shape
        torch.Size([5, 2])

    Source: Lux's `Maxout`; Goodfellow et al., "Maxout networks", 2013.
    """

    def __init__(self, *layers: LayerLike | list[Any] | tuple[Any, ...] | int, **named: LayerLike) -> None:
        if len(layers) == 2 and isinstance(layers[1], int):
            layers = _copies(layers[0], layers[1])
        found = some_layers(type(self).__name__, layers, named)
        self._set(names=tuple(found), layers=tuple(found.values()))

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Tensor, States]:
        """Return the largest outputs, and the states under their names."""
        ys, new = self.call_each(repeat(x, len(self.layers)), ps, st)
        return reduce(torch.maximum, ys), new


class RepeatedLayer(WrapperLayer):
    """Call one layer repeatedly on its own output, with shared parameters.

    Args:
        layer: A layer or a plain function.
        repeats: The number of calls.
        input_injection: Whether each call is on the tuple `(y, x)` of the output so far, at first x itself, and the
            input x.

    Parameters:
        Those of the layer, not nested; the same in every call.

    States:
        Likewise; each call takes those that the one before returned.

    Shape:
        What the layer takes to the same.

    Raises:
        InputError: If the number of repeats is not at least 1, or if the layer holds a `StatefulRecurrentCell`: as
            states are detached, derivatives would miss what one call tells the next by them.

    Example:
        >>> import torch, luxtorch as lt
        >>> y, st = lt.RepeatedLayer(lambda x: 2 * x, 3)(torch.ones(2), {}, {})
        >>> y
        tensor([8., 8.])

    Source: Lux's `RepeatedLayer`, as it is documented; Bansal et al., "End-to-end algorithm synthesis with recurrent
    networks", 2022, for input injection.
    """

    layer: Layer
    repeats: int = 10
    _: KW_ONLY
    input_injection: bool = False

    def __post_init__(self) -> None:
        require_size("repeats", self.repeats)
        self._set(layer=as_layer(self.layer))
        if self.repeats > 1 and _holds(self.layer, StatefulRecurrentCell):
            raise InputError(
                "A repeated layer must not hold a StatefulRecurrentCell, whose carry passes no derivative on.",
                expected="calls whose outputs depend on the ones before by their inputs alone",
                fix="Repeat the cell, with its carry in the input: lt.RepeatedLayer(cell, n)((x, carry), ps, st).",
            )

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the last output and the last states."""
        several = isinstance(x, tuple) and self.repeats > 1 and not self.input_injection
        if several and (what := extra_input(self.layer, x)):
            raise InputError(
                f"A repeated layer passes {EXTRA_INPUTS[what][0]} only to its first call.",
                expected="an input without it",
                got=f"one with it, and {self.repeats} calls",
                fix="Write a layer that passes it to the one inside each time.",
            )

        def call(before: tuple[Any, States], _: Any) -> tuple[tuple[Any, States], tuple[()]]:
            y, st = before
            return self.layer((y, x) if self.input_injection else y, ps, st), ()

        # The first call may take another dtype or shape than the others, which take what it returns.
        first, _ = call((x, st), None)
        if self.repeats == 1:
            return first
        last: tuple[Any, States]
        last, _ = over_steps(call, first, torch.arange(self.repeats - 1))
        return last

    def extra_repr(self) -> str:
        """Return for instance `repeats=3`."""
        return f"repeats={self.repeats}" + (", input_injection=True" if self.input_injection else "")


def _holds(layer: Layer, kind: type[Layer]) -> bool:
    return isinstance(layer, kind) or any(_holds(child, kind) for child in layer.children().values())


class AlternatePrecision(WrapperLayer):
    """Call a layer in another precision, and return its output in that of the input.

    Parameters and states stay in their own precision, in which gradients and new states arrive too; they are cast for
    the call. Running statistics lose digits in a low precision: keep a `BatchNorm` out of it where that matters.

    Args:
        dtype: The floating point dtype of the call.
        layer: A layer or a plain function.

    Parameters:
        Those of the layer, not nested.

    States:
        Likewise.

    Shape:
        What the layer takes to what it returns. Only floating point tensors are cast.

    Raises:
        InputError: If the dtype is not a floating point one.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.AlternatePrecision(torch.bfloat16, lambda x: x + 0.001)
        >>> y, st = model(torch.ones(2), {}, {})
        >>> y
        tensor([1., 1.])

    Source: Lux's `AlternatePrecision`, which leaves it to Julia's promotion what becomes of the parameters.
    """

    dtype: torch.dtype
    layer: Layer

    def __post_init__(self) -> None:
        if not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise out_of_range("dtype", self.dtype, "a floating point dtype, such as torch.bfloat16")
        self._set(layer=as_layer(self.layer))

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the output in the input's precision, and the states in theirs."""
        own = next((leaf.dtype for leaf in tree_leaves(x) if _is_real(leaf)), None)
        low_x, low_ps, low_st = (_all_cast(tree, self.dtype) for tree in (x, ps, st))
        y, new = self.layer(low_x, low_ps, low_st)
        # Leaves that the layer returned unchanged, such as frozen parameters, keep their precision.
        new = tree_map(lambda leaf, low, old: old if leaf is low else _cast(leaf, old.dtype), new, low_st, st)
        return (y if own is None else _all_cast(y, own)), new

    def extra_repr(self) -> str:
        """Return for instance `torch.bfloat16`."""
        return show_value(self.dtype)


def _copies(make: Any, number: int) -> tuple[Layer, ...]:
    if isinstance(make, Layer) or not callable(make):
        raise InputError(
            "With a number of copies, Maxout needs a function that makes a layer.",
            got=f"Maxout({make!r:.80}, {number})",
            fix="Maxout(lambda: Dense(10, 5), 4)",
        )
    return (as_layer(make()),) * number


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if _is_real(leaf) else leaf


def _all_cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda leaf: _cast(leaf, dtype), tree)


class _Stacked(WrapperLayer):
    """A layer n times, each time with other parameters and states: its trees are those of the layer, stacked."""

    layer: Layer
    n: int

    def initial_parameters(self, key: Tensor) -> dict[str, Any]:
        """Return n initial parameters of the layer, stacked, each drawn from a key of its own."""
        return _members(self.layer.initial_parameters, key, self.n)

    def initial_states(self, key: Tensor) -> dict[str, Any]:
        """Return n initial states of the layer, stacked, each drawn from a key of its own."""
        return _members(self.layer.initial_states, key, self.n)

    def _unstacked(self, ps: Parameters, st: States) -> LuxtorchError | None:
        """Return the error for a tensor in the trees that is not a stack of n; None if there is no such tensor."""
        for kind, tree, initial in (
            ("parameter", nested_dicts(ps), self.initial_parameters),
            ("state", st, self.initial_states),
        ):
            wanted = {name: tuple(leaf.shape) for name, leaf in named_leaves(initial(META_KEY))}
            for path, leaf in named_leaves(tree):
                shape = tuple(getattr(leaf, "shape", ()))
                if shape[:1] == (self.n,):
                    continue
                if path in wanted:
                    return InputError(
                        f"The {kind} '{path}' must be a stack of {self.n}.",
                        expected=f"a tensor of shape {wanted[path]}",
                        got=f"a tensor of shape {shape}",
                        fix=f"Use what lt.setup makes, or stack the trees of {self.n} layers with lt.stack.",
                    )
                *inside, name = path.split(".")
                error = KeyNameError(f"The layer has no {kind} '{name}'.", fix="Use the trees that lt.setup makes.")
                error.inside = tuple(inside)
                return error
        return None


class Ensemble(_Stacked):
    """Call n models of the same architecture at once (vmap), each with its own parameters, states and random numbers.

    The members are what `lt.setup` makes of n keys, and their trees are those of the layer, stacked: `lt.unstack(ps)`
    lists them, and `lt.stack` makes an ensemble's parameters out of those of models trained apart.

    In a training, take the *sum* of the members' losses, so that the gradient of each is its own, and an optimizer that
    looks at more than one number at a time, such as `ClipNorm`, `LAMB`, `Adafactor`, `Muon` or `LBFGS`, as
    `optim.per_member(rule, n)`: by itself it would take the stack for one large model, and couple the members.

    Args:
        layer: A layer or a plain function.
        n: The number of members.
        same_input: Whether all members see the same input. If False, the input is a stack of n, one for each.

    Parameters:
        Those of the layer, not nested, each with a first dimension of n.

    States:
        Likewise.

    Shape:
        What the layer takes to a stack (n, ...) of what it returns; with `same_input=False`, a stack to a stack.

    Raises:
        InputError: If there is not at least one member.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Ensemble(lt.Chain(lt.Dense(2, 8, torch.tanh), lt.Dropout(0.1), lt.Dense(8, 1)), 16)
        >>> ps, st = lt.setup(0, model)
        >>> ps["layer_1"]["weight"].shape
        torch.Size([16, 8, 2])
        >>> y, st = model(torch.ones(4, 2), ps, st)
        >>> y.shape
        torch.Size([16, 4, 1])
        >>> mean, uncertainty = y.mean(0), y.std(0)

    Source: Lakshminarayanan et al., "Simple and scalable predictive uncertainty estimation using deep ensembles", 2017.
    """

    _: KW_ONLY
    same_input: bool = True

    def __post_init__(self) -> None:
        self._set(layer=as_layer(self.layer))
        require_size("n", self.n, fix="The order is lt.Ensemble(layer, 8).")

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the members' outputs and states, stacked."""

        def member(_: Tensor, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
            return self.layer(x, ps, st)

        # A tensor of its own sets the batch size, as the trees may have none; and the single leaf of a ComponentVector
        # has no dimension for the members.
        dims = (0, None if self.same_input else 0, 0, 0)
        many = torch.vmap(member, dims)
        try:
            result: tuple[Any, States] = many(torch.arange(self.n), x, nested_dicts(ps), st)
        except ValueError as error:
            # vmap has found a tensor that is not a stack of n, unless the error is a member's own.
            unstacked = None if isinstance(error, LuxtorchError) else self._unstacked(ps, st)
            if unstacked is None:
                raise
            raise unstacked from error
        return result

    def expected_input(self) -> str:
        """Say that the input is a stack, if it is one."""
        return "" if self.same_input else f"a stack of {self.n} inputs, one for each member: tensors ({self.n}, ...)"

    def extra_repr(self) -> str:
        """Return for instance `n=16`."""
        return f"n={self.n}" + ("" if self.same_input else ", same_input=False")


class ScannedChain(_Stacked):
    """Call n layers of the same architecture one after another, as `Chain` does, with their parameters stacked.

    Inside of `lt.jit` the layer is traced and compiled once for all n, and so are its derivatives; in a `Chain` each
    layer is. The trees are those of the layers of a `Chain`, stacked: `lt.unstack(ps)` lists them, and `lt.stack` makes
    them out of trees of single layers.

    Args:
        layer: A layer or a plain function. Its output has the structure, shapes and dtypes of its input.
        n: The number of layers.

    Parameters:
        Those of the layer, not nested, each with a first dimension of n.

    States:
        Likewise.

    Shape:
        What the layer takes to the same.

    Raises:
        InputError: If there is not at least one layer.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.ScannedChain(lt.SkipConnection(lt.Dense(4, 4, "gelu"), torch.add), 100)
        >>> ps, st = lt.setup(0, model)
        >>> ps["weight"].shape
        torch.Size([100, 4, 4])
        >>> y, st = model(torch.ones(2, 4), ps, st)
        >>> y.shape
        torch.Size([2, 4])

    Source: `jax.lax.scan` over stacked layers, as in `equinox` and MaxText.
    """

    def __post_init__(self) -> None:
        self._set(layer=as_layer(self.layer))
        require_size("n", self.n, fix="The order is lt.ScannedChain(layer, 8).")

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return the last layer's output, and all states, stacked."""

        def call(x: Any, own: tuple[Tensor, Parameters, States]) -> tuple[Any, States]:
            return self.layer(x, own[1], own[2])

        trees = nested_dicts(ps), st
        if any(leaf.shape[:1] != (self.n,) for leaf in tree_leaves(trees)):
            raise self._unstacked(ps, st) or InputError("The trees must be stacks.")
        return over_steps(call, x, (torch.arange(self.n), *trees), unrolled=1)

    def extra_repr(self) -> str:
        """Return for instance `n=16`."""
        return f"n={self.n}"


def _members(initial: Any, key: Tensor, number: int) -> dict[str, Any]:
    """Return the stacked results of `initial` for a number of keys."""
    made = torch.vmap(initial)(split(key, number))
    # vmap returns a value that is equal for all members as an expanded view; each member needs its own.
    return tree_map(lambda leaf: leaf.contiguous(), made)  # type: ignore[no-any-return]
