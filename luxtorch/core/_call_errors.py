"""Errors in the call of a layer: they are explained, and name the layer's path.

The call of each layer is in a `try`, and nothing is looked up without an error. The layer that fails turns the error
into one of luxtorch, and each container that it passes prepends the name of the failing layer.
"""

from __future__ import annotations

import dis
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from luxtorch._errors import DTypeError, InputError, KeyNameError, LayerError, LuxtorchError, described, suggest
from luxtorch.random._key import is_key

from ._sharded import is_sharded
from ._tree import META_KEY, named_leaves, subtree, tensors, tree_leaves

if TYPE_CHECKING:
    from ._layer import Layer

Call = TypeVar("Call", bound=Callable[..., Any])

# Only these exact types: a subclass may be caught by code outside.
_BUILTIN = frozenset({RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError})


def locate_errors(call: Call) -> Call:
    """Decorate a layer's `__call__`, so that errors inside of it name the layer."""

    @wraps(call)
    def __call__(self: Layer, x: Any, ps: Any = None, st: Any = None) -> Any:
        # torch.compile traces this code: without the check and the explanation.
        if torch.compiler.is_compiling():
            return call(self, single_input(self, x), ps, st)
        try:
            names = self._names
            if ps.keys() != names[0] or st.keys() != names[1]:
                raise _wrong_names(self, ps, st) or KeyError
            return call(self, x, ps, st)
        except Exception as error:
            # `Inputs` are unwrapped only here, after a layer that takes one input has failed: calls with tensors do not
            # pay for it.
            one = _located_input(self, x, ps, st)
            if one is x:
                if isinstance(error, LuxtorchError):
                    _extend(error, self, ps, st)
                    raise
                unsupported = type(error) is NotImplementedError and _is_about_dtypes(str(error))
                if type(error) not in _BUILTIN and not unsupported:
                    raise
                explained = _explain(error, self, x, ps, st)
                explained.inside = getattr(error, "inside", ())
                raise _extend(explained, self, ps, st) from error
        return __call__(self, one, ps, st)

    return __call__  # type: ignore[return-value]


def single_input(layer: Layer, x: Any) -> Any:
    """Unwrap `Inputs` for a layer that takes one input; return any other input unchanged.

    Args:
        layer: The layer.
        x: Its input.

    Raises:
        InputError: If the layer takes one input, and the arguments are others.
    """
    return x._single(layer) if hasattr(type(x), "_single") else x


def _located_input(layer: Layer, x: Any, ps: Any, st: Any) -> Any:
    try:
        return single_input(layer, x)
    except LuxtorchError as error:
        raise _extend(error, layer, ps, st) from None


def _extend(error: LuxtorchError, layer: Layer, ps: Any, st: Any) -> LuxtorchError:
    """Prepend the name that the failed layer has in `layer` to the error's path."""
    path, failed, origin = error.__dict__.get("_trail", (error.inside, None, layer))
    if failed is not None and failed[0] is not layer:
        path = (*_name_of(failed, layer, ps, st), *path)
    error.__dict__["_trail"] = (path, (layer, ps, st), origin)
    what = f"{type(origin).__name__} {origin.extra_repr()}".strip()
    error.where = f"{'.'.join(('model', *path))} ({what})"
    return error


def _name_of(failed: tuple[Layer, Any, Any], container: Layer, ps: Any, st: Any) -> tuple[str, ...]:
    """Find the path from a container to a layer that it called."""
    children = [(path, *found) for path, *found in _below(container, ps, st)]
    same_layer = [child for child in children if child[1] is failed[0]]
    # Equal layers are often one object: the trees that were passed distinguish them.
    same_trees = [child for child in same_layer or children if child[2] is failed[1] or child[3] is failed[2]]
    return next((path for path, *_ in (same_trees or same_layer)), ())


def _below(container: Layer, ps: Any, st: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield (path, layer, ps, st) for each layer below a container whose trees are present, nearest first."""
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
    """Turn an error of Python or torch into one that explains the cause, if that is certain."""
    misnamed = _wrong_names(layer, ps, st)
    if misnamed is not None:
        return misnamed
    expected, got = layer.expected_input(), _describe_input(x)
    message = str(error).strip() or "(no message)"
    cause, homes = f"{type(error).__name__}: {message.splitlines()[0]}", _homes(error)
    wrong = None
    # An error that user code raises explains itself best.
    if not (_is_raised(error) and _is_foreign(homes[-1])):
        wrong = _half_sharded(x, ps, st) or _badly_split(homes) or _wrong_shapes(layer, ps)
        wrong = wrong or _wrong_dtype(x, ps, message) or _wrong_device(x, ps, message)
        # If the error comes from a function that the layer was given, that may be wrong instead of the input.
        given = any(_is_foreign(home) and home != type(layer).__module__ for home in homes)
        plain = type(error) is not AttributeError and not _is_about_dtypes(message)
        if wrong is None and expected and plain and not given:
            fix = "Change the input, or the layer that makes it."
            wrong = InputError("The input does not fit the layer.", expected=expected, got=got, fix=fix)
    if wrong is None:
        return LayerError(cause.replace(":", " in the layer:", 1), expected=expected, got=f"the input {got}")
    wrong.fix += f" The cause: {cause}"
    return wrong


def _homes(error: Exception) -> list[str]:
    """Return the names of the modules in an error's traceback; the last is where it was raised."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return [frame.f_globals.get("__name__", "") for frame in frames]


def _is_foreign(home: str) -> bool:
    """Return whether a module belongs neither to luxtorch, nor to torch, nor to Python."""
    root = home.partition(".")[0]
    # tensordict replaces functions of torch's vmap by its own.
    return root not in ("luxtorch", "torch", "tensordict") and root not in sys.stdlib_module_names


def _is_raised(error: Exception) -> bool:
    """Return whether an error was raised by a `raise` statement, and not by C code."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _wrong_names(layer: Layer, ps: Any, st: Any) -> LuxtorchError | None:
    """Return the error for trees without the layer's names; None if they have them."""
    for tree, names, what in ((ps, layer._names[0], "parameter"), (st, layer._names[1], "state")):
        if not isinstance(tree, Mapping):
            expected, got = f"a tree with the names {_listed(names)}", "None" if tree is None else described(tree)
            fix = "Make both with ps, st = lt.setup(0, model), then call model(x, ps, st)."
            return InputError(f"The layer must be called with its {what}s.", expected=expected, got=got, fix=fix)
        error = wrong_names(tree, names, what, f"Use the {what}s that lt.setup makes for this very model.")
        if error is not None:
            return error
    return None


def wrong_names(tree: Mapping[str, Any], names: frozenset[str], what: str, fix: str) -> KeyNameError | None:
    """Return the error for a tree without the names that it should have; None if it has them.

    Args:
        tree: The tree.
        names: The names.
        what: The kind of entries, such as "parameter".
        fix: The likely way to mend it.
    """
    missing, extra = names - set(tree), set(tree) - names
    if not (missing or extra):
        return None
    hint = suggest(min(extra), missing) if extra else ""
    headline = (
        f"The layer has no {what} {_listed(extra)}." if extra else f"The tree lacks the {what} {_listed(missing)}."
    )
    return KeyNameError(headline, expected=_listed(names), got=_listed(tree), fix=f"{hint} " * bool(hint) + fix)


def _wrong_shapes(layer: Layer, ps: Any) -> LuxtorchError | None:
    """Return the error for a parameter of a wrong shape, if there is one."""
    if layer.children():
        return None
    wanted = {name: tuple(leaf.shape) for name, leaf in named_leaves(layer.initial_parameters(META_KEY))}
    came = {name: tuple(leaf.shape) for name, leaf in named_leaves(dict(ps)) if isinstance(leaf, Tensor)}
    wrong = [name for name, shape in wanted.items() if came.get(name, shape) != shape]
    if not wrong:
        return None
    headline, expected, got = (
        f"The parameter '{wrong[0]}' must have the layer's shape.",
        wanted[wrong[0]],
        came[wrong[0]],
    )
    fix = "Use the parameters that lt.setup makes for this very model; for a batch of models, call torch.vmap."
    return InputError(headline, expected=str(expected), got=str(got), fix=fix)


def _half_sharded(x: Any, ps: Any, st: Any) -> LuxtorchError | None:
    """Return the error for sharded and plain tensors of a layer; None if all are one of them."""
    named = named_leaves({"input": x, "parameters": dict(ps), "states": dict(st)})
    arrays = {name: leaf for name, leaf in named if isinstance(leaf, Tensor) and leaf.ndim and not is_key(leaf)}
    plain = [name for name, leaf in arrays.items() if not is_sharded(leaf)]
    if len(plain) in (0, len(arrays)):
        return None
    headline = "Sharded tensors must not meet plain ones, of which nobody knows whether all ranks have the same."
    fix = "Place it too: distributed.place(tree, mesh, rules)."
    return InputError(headline, got=f"'{plain[0]}' is not sharded, as others are", fix=fix)


def _badly_split(homes: Iterable[str]) -> LuxtorchError | None:
    """Return the error for tensors that torch cannot compute with as they are split; None if it is another."""
    if not any(home.startswith("torch.distributed.tensor") for home in homes):
        return None
    fix = "Split other dimensions, or let all ranks have the tensors: distributed.Replicate()."
    return InputError("Sharded tensors must be split so that torch can compute with them.", fix=fix)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)) or "(none)"


# Errors of torch about dtypes that differ or are not implemented; most of them name the dtypes.
_DTYPES_DIFFER = re.compile(
    "must have the same (dtype|scalar type)|have (the )?same dtypes?,? but|dtypes must be the same, got"
    "|dtypes match, got|expected scalar type .+ but found|type .+ and (weight|bias) type .+ should be the same"
    "|Found dtype .+ but expected|expected dtype .+ but got dtype|dtype .+ does not match weight dtype"
    "|Type promoting not supported|not implemented for '|floating point or complex (dtype|tensor as input). Got"
)
_UNNAMED = re.compile(
    "^mixed dtype|^both inputs should have same dtype|Expected self.dtype to be equal to src.dtype"
    "|only support floating point"
)
_SPELLED = {
    torch.float64: "Double|double",
    torch.float32: "Float|float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int64: "Long|long int|long",
    torch.int32: "Int|int",
    torch.int16: "Short|short",
    torch.int8: "Char|char",
    torch.uint8: "Byte|unsigned char",
    torch.bool: "Bool|bool",
    torch.complex64: "ComplexFloat|complex<float>",
    torch.complex128: "ComplexDouble|complex<double>",
}
_DEVICES_DIFFER = re.compile(
    "(on|at) the same device|not on the expected device|type .+ and weight type .+ should be the same"
    "|is on .+, (but expected|different from other tensors)"
)


def _is_about_dtypes(message: str) -> bool:
    """Return whether an error message of torch is about dtypes that differ or are not implemented."""
    return bool(_DTYPES_DIFFER.search(message) or _UNNAMED.search(message))


def _wrong_dtype(x: Any, ps: Any, message: str) -> DTypeError | None:
    """Return the error for an input of another dtype than the parameters, if torch's message is about that."""
    wanted = {leaf.dtype for leaf in tensors(ps) if leaf.dtype.is_floating_point}
    others = {leaf.dtype for leaf in tensors(x)} - wanted
    # A layer may take integers, and fail for another reason.
    named = _DTYPES_DIFFER.search(message) and any(_is_named(dtype, message) for dtype in others)
    if len(wanted) != 1 or not others or not (named or _UNNAMED.search(message)):
        return None
    dtype = wanted.pop()
    expected, got = f"{dtype}, as the parameters", ", ".join(sorted(map(str, others)))
    fix = f"Convert the input, x.to({dtype}), or the parameters, lt.f64(ps) and the like."
    return DTypeError("The input must have the dtype of the parameters.", expected=expected, got=got, fix=fix)


def _is_named(dtype: torch.dtype, message: str) -> bool:
    names = f"{dtype}|(CPU|CUDA)?({_SPELLED.get(dtype, dtype)})(Type|Tensor)?"
    return re.search(rf"(?<!\w)({names})(?!\w)", message) is not None


def _wrong_device(x: Any, ps: Any, message: str) -> InputError | None:
    """Return the error for an input on another device than the parameters, if torch's message is about that."""
    came, wanted = ({leaf.device for leaf in tensors(tree)} for tree in (x, ps))
    if len(wanted) != 1 or came <= wanted or not _DEVICES_DIFFER.search(message):
        return None
    expected, got = str(*wanted), ", ".join(sorted(map(str, came - wanted)))
    fix = f"Move the input, x.to('{expected}'), or the parameters and the states."
    return InputError("The input must be on the device of the parameters.", expected=expected, got=got, fix=fix)


def _describe_input(x: Any) -> str:
    leaves = tree_leaves(x)
    if len(leaves) == 1 and leaves[0] is x:
        return described(x)
    return f"a {type(x).__name__} of " + ", ".join(_describe_input(leaf) for leaf in leaves[:4])
