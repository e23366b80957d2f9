"""Errors that name the layer: what fails inside a layer is explained, and gains the layer's path on its way out.

Nothing is looked up while things go well. Each layer's call is wrapped in a `try`; the layer that fails turns the
failure into an error of luxtorch, and each container that the error passes puts the failing layer's name in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from luxtorch._errors import DTypeError, InputError, KeyNameError, LayerError, LuxtorchError, suggest

from ._nowhere import NOWHERE
from ._tree import named_leaves, subtree, tree_leaves

if TYPE_CHECKING:
    from ._layer import Layer

Call = TypeVar("Call", bound=Callable[..., Any])

# Only these exact types: a subclass may be a signal that somebody outside waits for.
_BUILTIN = frozenset({RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError})


def located(call: Call) -> Call:
    """Wrap a layer's `__call__`, so that an error leaving it names the layer."""

    @wraps(call)
    def __call__(self: Layer, x: Any, ps: Any = None, st: Any = None) -> Any:
        # torch.compile traces through here: the check below is not for it, nor is the explanation.
        if torch.compiler.is_compiling():
            return call(self, x, ps, st)
        try:
            names = self._names
            if ps.keys() != names[0] or st.keys() != names[1]:
                raise _wrong_names(self, ps, st) or KeyError
            return call(self, x, ps, st)
        except Exception as error:
            if isinstance(error, LuxtorchError):
                _extend(error, self, ps, st)
                raise
            if type(error) not in _BUILTIN:
                raise
            explained = _explain(error, self, x, ps, st)
            explained.inside = getattr(error, "inside", ())
            raise _extend(explained, self, ps, st) from error

    return __call__  # type: ignore[return-value]


def _extend(error: LuxtorchError, layer: Layer, ps: Any, st: Any) -> LuxtorchError:
    """Put the name by which `layer` knows the layer that failed in front of the error's path."""
    path, failed, origin = error.__dict__.get("_trail", (error.inside, None, layer))
    if failed is not None and failed[0] is not layer:
        path = (*_name_of(failed, layer, ps, st), *path)
    error.__dict__["_trail"] = (path, (layer, ps, st), origin)
    what = f"{type(origin).__name__} {origin.extra_repr()}".strip()
    error.where = f"{'.'.join(('model', *path))} ({what})"
    return error


def _name_of(failed: tuple[Layer, Any, Any], container: Layer, ps: Any, st: Any) -> tuple[str, ...]:
    """Find by which names a container reaches a layer that it called."""
    children = [(path, *found) for path, *found in _below(container, ps, st)]
    same_layer = [child for child in children if child[1] is failed[0]]
    # Equal layers are often one object: the trees that were passed on tell them apart.
    same_trees = [child for child in same_layer or children if child[2] is failed[1] or child[3] is failed[2]]
    return next((path for path, *_ in (same_trees or same_layer)), ())


def _below(container: Layer, ps: Any, st: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield (path, layer, ps, st) for each layer below a container whose trees are there, nearest first."""
    found = []
    for name, child in container.children().items():
        if not name or (_has(ps, name) and _has(st, name)):
            place = (path + ((name,) if name else ()), child, subtree(ps, name), subtree(st, name))
            yield place
            found.append(place)
    for child_path, child, child_ps, child_st in found:
        yield from _below(child, child_ps, child_st, child_path)


def _has(tree: Any, name: str) -> bool:
    return isinstance(tree, Mapping) and name in tree


def _explain(error: Exception, layer: Layer, x: Any, ps: Any, st: Any) -> LuxtorchError:
    """Turn an error of Python or torch into one that says what was probably done."""
    wrong = _wrong_names(layer, ps, st) or _wrong_shapes(layer, ps) or _wrong_dtype(x, ps, str(error))
    if wrong is not None:
        return wrong
    expected, got = layer.expected_input(), _describe(x)
    message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if expected and type(error) is not AttributeError:
        return InputError(
            "The input does not fit the layer.",
            expected=expected,
            got=got,
            fix=f"Change the input, or the layer that makes it. The cause: {message}",
        )
    return LayerError(f"{type(error).__name__} in the layer: {message}", expected=expected, got=f"the input {got}")


def _wrong_names(layer: Layer, ps: Any, st: Any) -> LuxtorchError | None:
    """Explain trees that do not have the layer's names, if that is what is wrong."""
    for tree, names, what in ((ps, layer._names[0], "parameter"), (st, layer._names[1], "state")):
        if not isinstance(tree, Mapping):
            return InputError(
                f"The layer was called without its {what}s.",
                expected=f"a tree with the names {_listed(names)}",
                got="nothing" if tree is None else f"a {type(tree).__name__}",
                fix="Make both with ps, st = lt.setup(0, model), then call model(x, ps, st).",
            )
        error = wrong_names(tree, names, what, f"Use the {what}s that lt.setup makes for this very model.")
        if error is not None:
            return error
    return None


def wrong_names(tree: Mapping[str, Any], names: frozenset[str], what: str, fix: str) -> KeyNameError | None:
    """Explain a tree that does not have the names that it should have, if that is so.

    Args:
        tree: The tree.
        names: The names.
        what: What they are the names of, such as "parameter".
        fix: What to do about it.
    """
    missing, extra = names - set(tree), set(tree) - names
    if not (missing or extra):
        return None
    problem = f"has no {what} {_listed(extra)}" if extra else f"lacks the {what} {_listed(missing)}"
    hint = suggest(min(extra), missing) if extra else ""
    return KeyNameError(
        f"The layer {problem}." if extra else f"The tree that came {problem}.",
        expected=_listed(names),
        got=_listed(tree),
        fix=f"{hint} " * bool(hint) + fix,
    )


def _wrong_shapes(layer: Layer, ps: Any) -> LuxtorchError | None:
    """Explain parameters of other shapes than the layer's, if that is what is wrong."""
    if layer.children():
        return None
    wanted = {name: tuple(leaf.shape) for name, leaf in named_leaves(layer.initial_parameters(NOWHERE))}
    came = {name: tuple(leaf.shape) for name, leaf in named_leaves(dict(ps)) if isinstance(leaf, Tensor)}
    wrong = [name for name, shape in wanted.items() if came.get(name, shape) != shape]
    if not wrong:
        return None
    return InputError(
        f"The parameter '{wrong[0]}' does not have the layer's shape.",
        expected=f"{wanted[wrong[0]]}",
        got=f"{came[wrong[0]]}",
        fix="Use the parameters that lt.setup makes for this very model; for a batch of models, call torch.vmap.",
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "(none)"


def _wrong_dtype(x: Any, ps: Any, message: str) -> DTypeError | None:
    """Explain an input whose dtype is not that of the parameters, if that is what is wrong."""
    # A layer may well take integers, and fail for another reason.
    if not ("type" in message or "not implemented for" in message):
        return None
    inputs = {leaf.dtype for leaf in tree_leaves(x) if isinstance(leaf, Tensor)}
    wanted = {leaf.dtype for leaf in tree_leaves(ps) if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point}
    if not inputs or len(wanted) != 1 or inputs <= wanted:
        return None
    dtype = wanted.pop()
    got = ", ".join(sorted(str(other) for other in inputs))
    return DTypeError(
        "The input's dtype is not that of the parameters.",
        expected=f"{dtype}, as the parameters",
        got=got,
        fix=f"Convert the input, x.to({dtype}), or the parameters, lt.f64(ps) and the like.",
    )


def _describe(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a {x.dtype} tensor of shape {tuple(x.shape)}"
    leaves = tree_leaves(x)
    if len(leaves) == 1 and leaves[0] is x:
        return f"{x!r:.80} of type {type(x).__name__}"
    return f"a {type(x).__name__} of " + ", ".join(_describe(leaf) for leaf in leaves[:4])
