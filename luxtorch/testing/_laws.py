"""`check_layer` and the laws, one function each: what every layer must do under every transform.

Inside of transforms and compilers, a jitted function runs without jit. To check this for every layer, the laws of
transforms transform the jitted function, and compare with the plain one.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor

from luxtorch._torch import compiler_backend
from luxtorch._transforms import functional
from luxtorch.components import ComponentVector
from luxtorch.core import (
    InputError,
    KeyNameError,
    Layer,
    States,
    named_leaves,
    out_of_range,
    setup,
    suggest,
    test_mode,
    train_mode,
    tree_leaves,
    tree_map,
    tree_structure,
)
from luxtorch.jit import jit
from luxtorch.random import Rng, as_key, split

from ._orders import QUICK, check_words
from ._subject import LawError, Subject, close, in_parts, is_real, same_structure, same_values

_LOOSE, _TIGHT = 1e-5, 1e-9


def setup_law(s: Subject) -> None:
    """The initial trees hold tensors only and depend on the key alone, also inside transforms."""
    once = setup(s.key, s.layer)
    same_values("setup", setup(s.key, s.layer), once)
    _, inside = torch.func.grad(lambda one: (one, setup(s.key, s.layer)), has_aux=True)(torch.ones(()))
    same_values("setup, inside a gradient", inside, once)
    keys = split(s.key, 3)
    many = torch.vmap(lambda key: setup(key, s.layer))(keys)
    same_values("setup, vmap", many, _stacked([setup(key, s.layer) for key in keys]), tolerance=_LOOSE)


def purity_law(s: Subject) -> None:
    """The same arguments give the same result to the bit; they are not changed, and neither is the global generator."""
    before, generators = copy.deepcopy((s.x, s.ps, s.st)), _generators()
    first = s.call(s.x, s.ps, s.st)
    same_values("purity, arguments", (s.x, s.ps, s.st), before)
    same_values("purity, global random state", _generators(), generators)
    same_values("purity, two calls", s.call(s.x, s.ps, s.st), first)


def state_law(s: Subject) -> None:
    """The returned state has the structure of the one passed in, and is detached."""
    ps = tree_map(lambda leaf: leaf.detach().requires_grad_(is_real(in_parts(leaf))), s.ps)
    _, st = s.call(s.x, ps, s.st)
    same_structure("state", st, s.st)
    for name, leaf in named_leaves(st):
        if leaf.requires_grad:
            raise LawError(f"state: '{name}' is not detached.", fix="Return state.detach().")


def gradient_law(s: Subject) -> None:
    """Gradients agree with finite differences in double precision.

    At a kink, as of a maximum, the differences ahead and behind differ; there a point nearby is checked.
    """
    s = s.in_double()
    if variables := s.variables():
        jitted = jit(s.of_variables)
        check_words(lambda v: (jitted if functional() else s.of_variables)(v)[0], variables, s.key, "R", law="gradient")


def forward_law(s: Subject) -> None:
    """Forward mode agrees with reverse mode."""
    s = s.in_double()
    if variables := s.variables():
        direction = s.direction(variables)
        _, change, *_ = torch.func.jvp(jit(s.of_variables), (variables,), (direction,), has_aux=True)
        _, pullback, *_ = torch.func.vjp(s.of_variables, variables, has_aux=True)
        close("forward", float(change), float(_dot(pullback(torch.ones_like(change))[0], direction)), _TIGHT)


def orders_law(s: Subject) -> None:
    """Derivatives of orders one to three agree for all nestings of transforms, and with finite differences."""
    s = s.in_double().nonlinear()
    if variables := s.variables():
        check_words(lambda v: s.of_variables(v)[0], variables, s.key, s.words or QUICK, differences=s.differences)


def vmap_inputs_law(s: Subject) -> None:
    """Vmap over inputs equals a loop, for the call and for the gradient."""
    xs = s.inputs(3)
    for function in s.calls():
        got = torch.vmap(jit(function), in_dims=(0, None, None))(_stacked(xs), s.ps, s.st)
        same_values("vmap_inputs", got, _stacked([function(x, s.ps, s.st) for x in xs]), tolerance=_LOOSE)


def vmap_models_law(s: Subject) -> None:
    """Vmap over parameters and states equals a loop over models, for the call and for the gradient."""
    many_ps, many_st = s.models(3)
    if not tree_leaves((many_ps, many_st)):
        return
    for function in s.calls():
        got = torch.vmap(jit(function), in_dims=(None, 0, 0))(s.x, _stacked(many_ps), _stacked(many_st))
        expected = [function(s.x, ps, st) for ps, st in zip(many_ps, many_st, strict=True)]
        same_values("vmap_models", got, _stacked(expected), tolerance=_LOOSE)


def jit_law(s: Subject) -> None:
    """The jitted layer, its gradient, and its new states alone are each traced once, and equal to the eager ones.

    The same holds for a function that closes over parameters and states.
    """
    for function in [*s.calls(), *s.states_alone()]:
        jitted = jit(jit(function, backend="replay"), backend="replay")
        st = s.st
        for _ in range(2):
            got, expected = jitted(s.x, s.ps, st), function(s.x, s.ps, st)
            same_values("jit", got, expected, tolerance=_LOOSE)
            st = s.call(s.x, s.ps, st)[1]
        if (misses := jitted.cache_info().misses) > 1:
            raise LawError("jit: the second call is traced anew.", expected="1 graph", got=f"{misses}")
    if tree_leaves((s.x, s.st)):
        closed = jit(lambda x: s.call(x, s.ps, s.st), backend="replay")
        same_values("jit, closed over", closed(s.x), s.call(s.x, s.ps, s.st), tolerance=_LOOSE)


def compile_law(s: Subject) -> None:
    """The compiled layer, and its compiled gradient, are one graph each and equal to the eager ones, jitted or not."""
    for function in s.calls():
        graphs: list[torch.fx.GraphModule] = []
        torch.compiler.reset()  # or the graphs of other layers count towards this one's limit
        compiled = torch.compile(jit(function), fullgraph=True, backend=_counting(s.backend, graphs))
        st = s.st
        for _ in range(2):
            got, expected = compiled(s.x, s.ps, st), function(s.x, s.ps, st)
            same_values("compile", got, expected, tolerance=_LOOSE)
            st = expected[1]
        if len(graphs) > 1:
            raise LawError("compile: the second call makes a second graph.", expected="1 graph", got=f"{len(graphs)}")


def component_vector_law(s: Subject) -> None:
    """A ComponentVector of the parameters gives what the dict of them gives, gradients included.

    Parameters of several dtypes, such as real and complex ones, cannot be in one vector.
    """
    if len({leaf.dtype for leaf in tree_leaves(s.ps)}) == 1:
        vector = ComponentVector(s.ps)
        same_values("component_vector", s.call(s.x, vector, s.st), s.call(s.x, s.ps, s.st), tolerance=_LOOSE)
        got, expected = s.gradient(s.x, vector, s.st)[0], s.gradient(s.x, s.ps, s.st)[0]
        same_values("component_vector, gradient", got.to_dict(), expected, tolerance=_LOOSE)


def value_law(s: Subject) -> None:
    """The layer is a value: hashable, equal to its pickled copy, and it holds no tensor."""
    try:
        copied = pickle.loads(pickle.dumps(s.layer))
    except (pickle.PicklingError, AttributeError) as error:
        raise LawError(
            f"value: the layer cannot be pickled: {error}",
            fix="Define its functions at the top of a module; no lambdas.",
        ) from error
    if copied != s.layer or hash(copied) != hash(s.layer):
        raise LawError("value: the layer's pickled copy is not equal to it.", expected=repr(s.layer), got=repr(copied))
    tensors = [name for name, value in vars(s.layer).items() if isinstance(value, Tensor)]
    if tensors:
        raise LawError(f"value: the layer holds tensors, {tensors}.", fix="Tensors belong in ps or st.")


def names_law(s: Subject) -> None:
    """A missing, misspelt or extra name raises an error with the path of the place."""
    for position, tree in enumerate((s.ps, s.st)):
        for where, broken in _broken(tree):
            trees = [s.ps, s.st]
            trees[position] = broken
            try:
                s.call(s.x, *trees)
            except KeyNameError as error:
                if not error.where.startswith(".".join(("model", *where))):
                    raise LawError(
                        "names: the error names another place.", expected=str(where), got=error.where
                    ) from error
            else:
                raise LawError(
                    f"names: a wrong name at {where} goes unnoticed.", expected="KeyNameError", got="no error"
                )


def _broken(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield copies of a tree with one name missing, one misspelt, or one too many, and the place of it."""
    yield path, {**tree, "extra_name": torch.zeros(())}
    for name, entry in tree.items():
        rest = {other: value for other, value in tree.items() if other != name}
        yield path, rest
        yield path, {**rest, name + "_": entry}
        if isinstance(entry, dict):
            yield from ((where, {**rest, name: broken}) for where, broken in _broken(entry, (*path, name)))


def _generators() -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def _counting(backend: str | Callable[..., Any], graphs: list[torch.fx.GraphModule]) -> Callable[..., Any]:
    compiler = compiler_backend(backend) if isinstance(backend, str) else backend

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return compiler(graph, inputs)

    return count


def _stacked(trees: list[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def _dot(a: Any, b: Any) -> Tensor:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return sum(((left * right).sum() for left, right in pairs), torch.zeros((), dtype=torch.float64))


LAWS: dict[str, Callable[[Subject], None]] = {
    "setup": setup_law,
    "purity": purity_law,
    "state": state_law,
    "gradient": gradient_law,
    "forward": forward_law,
    "vmap_inputs": vmap_inputs_law,
    "vmap_models": vmap_models_law,
    "orders": orders_law,
    "component_vector": component_vector_law,
    "value": value_law,
    "names": names_law,
    "jit": jit_law,
    "compile": compile_law,
}

OLD_NAMES = {"second_order": "orders"}
"""Former names of laws that are now part of others."""


def check_layer(
    layer: Layer,
    *inputs: Any,
    rng: Rng = 0,
    laws: Iterable[str] = tuple(LAWS),
    skip: Iterable[str] = (),
    modes: Iterable[Callable[[States], States]] = (train_mode, test_mode),
    backend: str | Callable[..., Any] = "aot_eager",
    words: Iterable[str] = QUICK,
) -> None:
    """Check that a layer keeps every law of luxtorch; for the tests of its author.

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
            raise out_of_range("A law", law, f"one of {', '.join(LAWS)}", fix=suggest(law, LAWS))
    if not inputs:
        raise InputError("check_layer must be given an input.", fix="Write check_layer(layer, x).")
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


def _distinct(modes: Iterable[Callable[[States], States]], st: States) -> list[Callable[[States], States]]:
    """Leave out modes that give the same state as an earlier one: a layer without modes is checked once."""
    made: list[tuple[Callable[[States], States], States]] = []
    for set_mode in modes:
        state = set_mode(st)
        if not any(_identical(state, other) for _, other in made):
            made.append((set_mode, state))
    return [set_mode for set_mode, _ in made]


def _identical(a: States, b: States) -> bool:
    return tree_structure(a) == tree_structure(b) and all(map(is_, tree_leaves(a), tree_leaves(b)))
