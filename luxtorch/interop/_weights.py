"""`load_weights`: load a state_dict, safetensors or pickle into the parameters and states of a layer."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from luxtorch.core import (
    InputError,
    KeyNameError,
    LuxtorchError,
    Parameters,
    States,
    described,
    named_leaves,
    nested_dicts,
    out_of_range,
    path_name,
    suggest,
    tree_map,
    tree_map_with_path,
    wrong_type,
)
from luxtorch.core._renamed import current_names, optional_counts

from ._names import Names, names_in, public


@dataclass(frozen=True)
class LoadReport:
    """Report which tensors of a model were loaded from a file, and which were not.

    Attributes:
        loaded: The names in the model of loaded tensors.
        missing: The names in the model that the file does not have; their tensors are unchanged.
        unexpected: The names in the file that the model does not have.
        mismatched: By name in the model, why a tensor of another shape or kind was not loaded.
        cast: By name in the model, from which dtype to which a tensor was cast.
        tied: Second names in the file of a tensor that was loaded, each with its name in the model.
    """

    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, str] = field(default_factory=dict)
    cast: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, unexpected or mismatched."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} loaded"]
        for what in ("missing", "unexpected"):
            lines += [f"{what}: {name}" for name in getattr(self, what)]
        for what in ("mismatched", "cast", "tied"):
            lines += [f"{what}: {name}: {text}" for name, text in getattr(self, what).items()]
        return "\n  ".join(lines)

    def error(self, described: Mapping[str, str], renamed: Mapping[str, str]) -> LuxtorchError:
        """Return the error that lists all missing, unexpected and mismatched names.

        Args:
            described: Descriptions of the model's tensors, by name.
            renamed: The unexpected names after renaming.
        """
        lines = [f"'{name}' is not in the file; in the model it is {described[name]}." for name in self.missing]
        for name in self.unexpected:
            new = renamed[name]
            called = f"'{name}'" if new == name else f"'{name}', here '{new}',"
            lines.append(f"{called} is only in the file. {suggest(new, self.missing)}".rstrip())
        lines += [f"'{name}' does not fit: {text}." for name, text in self.mismatched.items()]
        rename = _prefix(self.missing, [renamed[name] for name in self.unexpected])
        other = "Map the names with rename=" if self.missing and self.unexpected else "Load into this very model"
        return (KeyNameError if self.missing or self.unexpected else InputError)(
            "The weights and the model must have the same names and shapes.",
            got="\n            ".join(lines),
            fix=f"Pass {rename}." if rename else f"{other}, or pass strict=False and read the report.",
        )


def _prefix(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """Return the renaming that makes most names match by adding or removing a prefix; empty if there is none."""
    here, there = set(missing), set(unexpected)
    for longer, shorter, more in ((there, here, False), (here, there, True)):
        for one in sorted(shorter):
            for other in sorted(longer):
                if other.endswith(f".{one}"):
                    prefix = other.removesuffix(one)
                    if 2 * sum(prefix + name in longer for name in shorter) > len(shorter):
                        return f"rename=[(r'^', '{prefix}')]" if more else f"rename=[(r'^{re.escape(prefix)}', '')]"
    return ""


# The files that are looked for in a folder, best first.
_PATTERNS = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pt", "*.pth")


def read_weights(path: Path) -> Mapping[str, Any]:
    """Read the tensors of a file by name; no code in a file is run.

    Args:
        path: A safetensors file, a file that `torch.save` has written, the index of a model in several files, or a
            folder with one of these.

    Raises:
        InputError: If there is no such file, or if it cannot be read.
    """
    with _explaining_errors(path):
        if path.is_dir():
            return read_weights(_file_of(path))
        if path.suffix == ".json":
            return _read_index(path)
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(contents, Mapping):
        raise InputError("The file must hold a state_dict.", got=described(contents), where=str(path))
    return contents


def _file_of(folder: Path) -> Path:
    for pattern in _PATTERNS:
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            got, fix = ", ".join(file.name for file in found), "Pass the path of one of them."
            raise InputError("A folder of several files of weights must hold an index of them.", got=got, fix=fix)
    raise InputError("The folder must hold a file of weights.", expected=f"one of {', '.join(_PATTERNS)}")


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # safetensors.torch.save_model stores a tensor of several names under one, and notes the others.
        for name, stored in (file.metadata() or {}).items():
            if stored in tensors:
                tensors.setdefault(name, tensors[stored])
    return tensors


def _read_index(path: Path) -> dict[str, Any]:
    files: Any = json.loads(path.read_text())
    files = files.get("weight_map") if isinstance(files, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise InputError("The file must be an index of weights.", expected='JSON with a "weight_map"')
    shards = {name: read_weights(path.parent / name) for name in sorted(set(files.values()))}
    for name, shard in files.items():
        if name not in shards[shard]:
            raise InputError(f"The tensor '{name}' must be in the file that the index names.", expected=shard)
    return {name: shards[shard][name] for name, shard in files.items()}


@contextmanager
def _explaining_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading into ones that name the file and a fix."""
    try:
        yield
    except LuxtorchError as error:
        error.where = error.where or str(path)
        raise
    except Exception as error:  # a damaged pickle may raise anything
        unsafe = isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error)
        message = str(error).strip().splitlines()
        raise InputError(
            "The file must hold tensors only." if unsafe else "The file of weights cannot be read.",
            expected="a safetensors file, a state_dict that torch.save has written, or an index of such files",
            got=f"{type(error).__name__}: {message[0] if message else 'no message'}",
            fix="Save module.state_dict() instead of the module." if unsafe else "Check the path; or fetch it again.",
            where=str(path),
        ) from error


Rename: TypeAlias = Mapping[str, str | None] | Callable[[str], str | None] | Sequence[tuple[str, str]]
"""A renaming: a dict, a function, or pairs of a regular expression and its replacement."""


class Loaded(NamedTuple):
    """Hold parameters and states with loaded values, and the report on them."""

    ps: Any
    st: Any
    report: LoadReport


def load_weights(
    source: str | os.PathLike[str] | Mapping[str, Any],
    ps: Parameters,
    st: States,
    *,
    rename: Rename | None = None,
    strict: bool = True,
) -> Loaded:
    r"""Load parameters and states from a file of weights.

    Tensors are matched by dotted names, such as `layer_1.weight`; those of a model from `lt.from_torch` are the names
    of the module's `state_dict`, as are those of a model written by hand, `lt.Chain(conv=..., norm=...)`, whose layers
    have the names of the submodules. A tensor is cast to the dtype and moved to the device of the one that it replaces.
    Random keys may be missing, as other programs have none, and so may `num_batches_tracked`. The `weight` of
    a normalization may be called `scale`, as luxtorch called it once, and as Lux and Flax do.

    Args:
        source: A safetensors file, a state_dict saved by `torch.save`, the `.index.json` of a model in several files, a
            folder with one of these, as Hugging Face has them, or the tensors themselves by name.
        ps: The parameters, a dict or a ComponentVector. Values are not read, and may be on the meta device: then
            they are loaded to the CPU.
        st: The states.
        rename: How names in the file become names in the model. A dict of names; a function of the name; or pairs of a
            regular expression and its replacement, all applied in turn. A name that is mapped to None is left out.
        strict: Whether anything missing, unexpected or of another shape is an error. If not, it is in the report.

    Returns:
        `(ps, st, report)`, the trees of the same structure. Tensors that were not loaded are those that were passed in.

    Raises:
        KeyNameError: If names are missing or unexpected. The error lists all of them.
        InputError: If shapes differ, if two tensors of the file get the same name, or if a file cannot be read.
        DTypeError: If `source` is something else.

    Example:
        >>> import torch, luxtorch as lt
        >>> ps, st = lt.setup(0, lt.Chain(lt.Dense(2, 1)))
        >>> weights = {"model.fc.weight": torch.tensor([[1.0, 2.0]]), "model.fc.bias": torch.tensor([3.0])}
        >>> ps, st, report = lt.load_weights(weights, ps, st, rename=[(r"^model\.fc\.", "layer_1.")])
        >>> ps["layer_1"]["bias"]
        tensor([3.])
        >>> print(report)
        2 loaded
    """
    if not isinstance(source, str | os.PathLike | Mapping):
        fix = "For a module, pass module.state_dict()."
        raise wrong_type("source", source, "a path, or a mapping from names to tensors", fix=fix)
    path = None if isinstance(source, Mapping) else Path(source)
    tensors = dict(named_leaves(_vectors_as_dicts(source if path is None else read_weights(path))))
    wanted = dict(named_leaves(_vectors_as_dicts((ps, st))))
    wanted = {public(name.partition(".")[2]): leaf for name, leaf in wanted.items()}
    new_names = {name: new for name in tensors if (new := _renamer(rename)(name)) is not None}
    today = current_names(new_names.values(), wanted)
    new_names = {name: today[new] for name, new in new_names.items()}
    values, report = _matched(tensors, new_names, wanted, list(names_in(st)))
    if strict and not report.complete:
        error = report.error({name: _kind(leaf) for name, leaf in wanted.items()}, new_names)
        error.where = "" if path is None else str(path)
        raise error
    return Loaded(_with_values(ps, values), _with_values(st, values), report)


def _matched(
    tensors: Mapping[str, Any],
    new_names: Mapping[str, str],
    wanted: Mapping[str, Tensor],
    known: list[tuple[str, Names]],
) -> tuple[dict[str, Tensor], LoadReport]:
    """Return the new values by their names in the model, and the report."""
    firsts = {prefix + second: prefix + first for prefix, names in known for second, first in names.tied}
    transient = {prefix + name for prefix, names in known for name in names.transient}
    tied = {name: firsts[new] for name, new in new_names.items() if new in firsts}
    new_names = {**new_names, **tied}
    sources: dict[str, str] = {}
    for name, new in new_names.items():
        if new in sources and not _same(tensors[name], tensors[sources[new]]):
            got, fix = f"'{sources[new]}' and '{name}'", "Let rename return None for one of them."
            raise InputError(f"Two different tensors must not be called '{new}' after renaming.", got=got, fix=fix)
        sources.setdefault(new, name)
    values, mismatched, cast = {}, {}, {}
    for new in wanted.keys() & sources.keys():
        value, like = tensors[sources[new]], wanted[new]
        if not _fits(value, like):
            mismatched[new] = f"{_kind(value)} in the file, {_kind(like)} in the model"
            continue
        if value.dtype != like.dtype:
            cast[new] = f"{_dtype(value)} to {_dtype(like)}"
        device = torch.device("cpu") if like.is_meta else like.device
        copy = torch.empty_like(like, device=device, requires_grad=False).copy_(value.detach())
        values[new] = copy.requires_grad_(like.requires_grad)
    unexpected = []
    for name, new in new_names.items():
        if new not in wanted:
            twins = (other for other in values if _tied(tensors[name], tensors[sources[other]]))
            if twin := next(twins, None):
                tied[name] = twin
            else:
                unexpected.append(name)
    # Not missing: keys, non-persistent states, and num_batches_tracked, as in torch itself.
    keys = {name for name, like in wanted.items() if like.dtype == torch.uint64}
    spared = transient | keys | optional_counts(sources, wanted)
    missing = tuple(name for name in wanted if name not in sources and name not in spared)
    loaded = tuple(name for name in wanted if name in values)
    return values, LoadReport(loaded, missing, tuple(unexpected), mismatched, cast, tied)


def _with_values(tree: Any, values: Mapping[str, Tensor]) -> Any:
    """Return a tree with values replaced by name."""

    def new(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        if not _is_vector(leaf):
            return values.get(public(name), leaf)
        names = {f"{name}.{part}" if name else part: part for part, _ in named_leaves(_vectors_as_dicts(leaf))}
        return leaf.replace({part: values[public(whole)] for whole, part in names.items() if public(whole) in values})

    return tree_map_with_path(new, tree, is_leaf=_is_vector)


def _vectors_as_dicts(tree: Any) -> Any:
    """Return a tree with ComponentVectors as dicts."""
    return tree_map(lambda node: nested_dicts(node) if _is_vector(node) else node, tree, is_leaf=_is_vector)


def _is_vector(node: Any) -> bool:
    """Return whether a node is a ComponentVector: a mapping that is not a dict."""
    return isinstance(node, Mapping) and not isinstance(node, dict)


def _renamer(rename: Any) -> Callable[[str], str | None]:
    if rename is None:
        return lambda name: name
    if isinstance(rename, Mapping):
        return lambda name: rename.get(name, name)
    if callable(rename):
        function: Callable[[str], str | None] = rename
        return function
    if isinstance(rename, Sequence) and all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in rename):

        def substitute(name: str) -> str:
            for pattern, replacement in rename:
                name = re.sub(pattern, replacement, name)
            return name

        return substitute
    raise out_of_range("rename", rename, "a dict, a function, or pairs of a regular expression and its replacement")


def _fits(value: Any, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape and torch.can_cast(value.dtype, like.dtype)


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are tensors with the same elements."""
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)


def _tied(a: Any, b: Any) -> bool:
    """Return whether two tensors share memory or are copies; equal vectors and constants may be so by chance."""
    if not _same(a, b):
        return False
    if a.numel() and a.data_ptr() == b.data_ptr():
        return True
    return a.ndim >= 2 and bool((a != a.flatten()[:1]).any())


def _kind(value: Any) -> str:
    return f"{_dtype(value)} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
