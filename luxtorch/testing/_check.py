"""Checking a layer against all the laws."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

from luxtorch.core import InputError, Layer, setup, suggest, test_mode, train_mode, tree_leaves, tree_structure
from luxtorch.random import Rng, as_key

from ._compare import LawError
from ._laws import LAWS, OLD_NAMES
from ._orders import QUICK
from ._subject import Subject


def check_layer(
    layer: Layer,
    *inputs: Any,
    rng: Rng = 0,
    laws: Iterable[str] = tuple(LAWS),
    skip: Iterable[str] = (),
    modes: Iterable[Callable[[Any], Any]] = (train_mode, test_mode),
    backend: str | Callable[..., Any] = "aot_eager",
    words: Iterable[str] = QUICK,
) -> None:
    """Check that a layer keeps every law of luxtorch; for the tests of whoever writes one.

    In each mode it is called, differentiated, vmapped and compiled; its arguments are watched, and
    its parameters are misspelt. The laws, by name: `setup`, `purity`, `state`, `gradient`, `forward`,
    `vmap_inputs`, `vmap_models`, `orders`, `component_vector`, `value`, `names`, `jit`, `compile`.

    Args:
        layer: The layer.
        *inputs: Inputs to check it on, each by itself: tensors, or trees of tensors if it takes those.
        rng: A seed, a key or a generator for the layer's initial values.
        laws: The names of the laws to check.
        skip: The names of laws that the layer is documented not to keep.
        modes: The modes to check in: `lt.train_mode`, `lt.test_mode`, or other functions of a state.
        backend: The backend for `torch.compile`.
        words: By what transforms the law `orders` takes derivatives, as in `check_derivatives`.

    Raises:
        LawError: If a law is broken; it names the law, the layer and the mode.
        InputError: If a law is not known by that name, or there are no inputs.

    Example:
        >>> import torch, luxtorch as lt
        >>> lt.testing.check_layer(lt.Dense(3, 2), torch.ones(4, 3))
    """
    modes, words = tuple(modes), tuple(words)
    laws, skip = ([OLD_NAMES.get(law, law) for law in names] for names in (laws, skip))
    chosen = [law for law in laws if law not in skip]
    for law in (*chosen, *skip):
        if law not in LAWS:
            raise InputError(f"No law is called '{law}'.", expected=", ".join(LAWS), fix=suggest(law, LAWS))
    if not inputs:
        raise InputError("A layer is checked on inputs.", expected="check_layer(layer, x)", got="no inputs")
    key = as_key(rng)
    ps, st = setup(key, layer)
    for x in inputs:
        for set_mode in _distinct(modes, st):
            subject = Subject(layer, x, ps, set_mode(st), key, set_mode, backend, "gradient" not in skip, words)
            where = f"{type(layer).__name__}({layer.extra_repr()}) after {set_mode.__name__}"
            for law in chosen:
                try:
                    LAWS[law](subject)
                except LawError as error:
                    error.where = where
                    raise
                except Exception as error:
                    raise LawError(f"{law}: {type(error).__name__}: {error}", where=where) from error


def _distinct(modes: Iterable[Callable[[Any], Any]], st: Any) -> list[Callable[[Any], Any]]:
    """Leave out modes that make of a state what one before them makes: a layer without a mode is checked once."""
    made: list[tuple[Callable[[Any], Any], Any]] = []
    for set_mode in modes:
        state = set_mode(st)
        if not any(_identical(state, other) for _, other in made):
            made.append((set_mode, state))
    return [set_mode for set_mode, _ in made]


def _identical(a: Any, b: Any) -> bool:
    return tree_structure(a) == tree_structure(b) and all(map(is_, tree_leaves(a), tree_leaves(b)))
