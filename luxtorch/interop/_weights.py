"""Weights of torch state_dicts, safetensors and pickles, loaded into the parameters and states of a layer."""

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
    DTypeError,
    InputError,
    KeyNameError,
    LuxtorchError,
    Parameters,
    States,
    named_leaves,
    nested_dicts,
    path_name,
    suggest,
    tree_map,
    tree_map_with_path,
)
from luxtorch.core._former import names_today, uncounted

from ._names import Names, names_in, public


@dataclass(frozen=True)
class LoadReport:
    """Say which tensors of a model came from a file, and which did not.

    Attributes:
        loaded: The names in the model of those that did.
        missing: The names in the model of those that the file does not have; they are as they were.
        unexpected: The names in the file of what the model has no place for.
        mismatched: By their names in the model, why tensors of another shape or kind were not taken.
        cast: By their names in the model, from which dtype to which tensors were cast.
        tied: The names in the file that are second names of a tensor that was loaded, with its name in the model.
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
        """Return the error that lists all that does not fit.

        Args:
            described: What the model has, by name, in words.
            renamed: What the unexpected names are called after renaming.
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
            "The weights and the model differ.",
            expected="the same names and shapes",
            got="\n            ".join(lines),
            fix=f"Pass {rename}." if rename else f"{other}, or pass strict=False and read the report.",
        )


def _prefix(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """Return the renaming that makes most names match by a prefix more or less; empty if there is none."""
    here, there = set(missing), set(unexpected)
    for longer, shorter, more in ((there, here, False), (here, there, True)):
        for one in sorted(shorter):
            for other in sorted(longer):
                if other.endswith(f".{one}"):
                    prefix = other.removesuffix(one)
                    if 2 * sum(prefix + name in longer for name in shorter) > len(shorter):
                        return f"rename=[(r'^', '{prefix}')]" if more else f"rename=[(r'^{re.escape(prefix)}', '')]"
    return ""


# What a folder may hold, best first.
_PATTERNS = ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pt", "*.pth")


def read_weights(path: Path) -> Mapping[str, Any]:
    """Return what is in a file by name; nothing in a file is run.

    Args:
        path: A safetensors file, a file that `torch.save` has written, the index of a model in several files, or a
            folder with one of these.

    Raises:
        InputError: If there is no such file, or if it cannot be read.
    """
    with _reading(path):
        if path.is_dir():
            return read_weights(_file_of(path))
        if path.suffix == ".json":
            return _read_index(path)
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(contents, Mapping):
        raise InputError(
            "The file holds no tensors by name.",
            expected="a state_dict",
            got=f"a {type(contents).__name__}",
            where=str(path),
        )
    return contents


def _file_of(folder: Path) -> Path:
    for pattern in _PATTERNS:
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(
                "The folder holds several files of weights.",
                expected="one, or an index of them",
                got=", ".join(file.name for file in found),
                fix="Pass the path of one of them.",
            )
    raise InputError("The folder holds no weights.", expected=f"one of {', '.join(_PATTERNS)}")


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
        raise InputError("The file is not an index of weights.", expected='JSON with a "weight_map"')
    shards = {name: read_weights(path.parent / name) for name in sorted(set(files.values()))}
    for name, shard in files.items():
        if name not in shards[shard]:
            raise InputError(f"The tensor '{name}' is not where the index says.", expected=f"in {shard}")
    return {name: shards[shard][name] for name, shard in files.items()}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Let errors say which file it is, and what may be wrong."""
    try:
        yield
    except LuxtorchError as error:
        error.where = error.where or str(path)
        raise
    except Exception as error:  # a damaged pickle may raise whatever there is
        unsafe = isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error)
        message = str(error).strip().splitlines()
        raise InputError(
            "The file holds more than tensors." if unsafe else "The file of weights cannot be read.",
            expected="a safetensors file, a state_dict that torch.save has written, or an index of such files",
            got=f"{type(error).__name__}: {message[0] if message else 'no message'}",
            fix="Save module.state_dict() instead of the module." if unsafe else "Check the path; or fetch it again.",
            where=str(path),
        ) from error


Rename: TypeAlias = Mapping[str, str | None] | Callable[[str], str | None] | Sequence[tuple[str, str]]
"""How names become others: by a dict, by a function, or by pairs of a regular expression and its replacement."""


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
    r"""Return parameters and states with values from a file of weights.

    A tensor goes to the place whose dotted name it has, such as `layer_1.weight`; those of a model from `lt.from_torch`
    are the names of the module's `state_dict`, as are those of a model written by hand, `lt.Chain(conv=..., norm=...)`,
    whose layers are called as the module's parts. A tensor is cast to the dtype and brought to the device of what it
    replaces. Random keys may be missing, as other programs have none, and so may `num_batches_tracked`. The `weight` of
    a normalization may be called `scale`, as luxtorch called it once, and as Lux and Flax do.

    Args:
        source: A safetensors file, a state_dict saved by `torch.save`, the `.index.json` of a model in several files, a
            folder with one of these, as Hugging Face has them, or the tensors themselves by name.
        ps: The parameters, a dict or a ComponentVector. Values are not read, and may be on the meta device: what is
            loaded is then on the CPU.
        st: The states.
        rename: How names in the file become names in the model. A dict of names; a function of the name; or pairs of a
            regular expression and its replacement, all applied in turn. None in the place of a name leaves it out.
        strict: Whether anything missing, unexpected or of another shape is an error. If not, it is in the report.

    Returns:
        `(ps, st, report)`, the trees of the same structure. What was not loaded is the tensor that was passed in.

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
        raise DTypeError(
            "Weights come from a file, or by name.",
            expected="a path, or a mapping from names to tensors",
            got=type(source).__name__,
            fix="Of a module, pass module.state_dict().",
        )
    path = None if isinstance(source, Mapping) else Path(source)
    tensors = dict(named_leaves(_opened(source if path is None else read_weights(path))))
    wanted = dict(named_leaves(_opened((ps, st))))
    wanted = {public(name.partition(".")[2]): leaf for name, leaf in wanted.items()}
    new_names = {name: new for name in tensors if (new := _renamer(rename)(name)) is not None}
    today = names_today(new_names.values(), wanted)
    new_names = {name: today[new] for name, new in new_names.items()}
    values, report = _matched(tensors, new_names, wanted, list(names_in(st)))
    if strict and not report.complete:
        error = report.error({name: _described(leaf) for name, leaf in wanted.items()}, new_names)
        error.where = "" if path is None else str(path)
        raise error
    return Loaded(_filled(ps, values), _filled(st, values), report)


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
            raise InputError(
                f"Two different tensors are called '{new}' after renaming.",
                got=f"'{sources[new]}' and '{name}'",
                fix="Let rename return None for one of them.",
            )
        sources.setdefault(new, name)
    values, mismatched, cast = {}, {}, {}
    for new in wanted.keys() & sources.keys():
        value, like = tensors[sources[new]], wanted[new]
        if not _fits(value, like):
            mismatched[new] = f"{_described(value)} in the file, {_described(like)} in the model"
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
    # A key is not missed, nor what a state_dict leaves out, nor what torch itself does not miss.
    keys = {name for name, like in wanted.items() if like.dtype == torch.uint64}
    spared = transient | keys | uncounted(sources, wanted)
    missing = tuple(name for name in wanted if name not in sources and name not in spared)
    loaded = tuple(name for name in wanted if name in values)
    return values, LoadReport(loaded, missing, tuple(unexpected), mismatched, cast, tied)


def _filled(tree: Any, values: Mapping[str, Tensor]) -> Any:
    """Return a tree with the values put in by name."""

    def new(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        if not _is_vector(leaf):
            return values.get(public(name), leaf)
        names = {f"{name}.{part}" if name else part: part for part, _ in named_leaves(_opened(leaf))}
        return leaf.replace({part: values[public(whole)] for whole, part in names.items() if public(whole) in values})

    return tree_map_with_path(new, tree, is_leaf=_is_vector)


def _opened(tree: Any) -> Any:
    """Return a tree with its vectors as dicts."""
    return tree_map(lambda node: nested_dicts(node) if _is_vector(node) else node, tree, is_leaf=_is_vector)


def _is_vector(node: Any) -> bool:
    """Say whether a node is a ComponentVector: the mapping that is not a dict."""
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
    raise InputError(
        "Names cannot be mapped so.",
        expected="a dict, a function, or pairs of a regular expression and its replacement",
        got=f"{rename!r:.80}",
    )


def _fits(value: Any, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape and torch.can_cast(value.dtype, like.dtype)


def _same(a: Any, b: Any) -> bool:
    """Say whether two tensors have the same elements."""
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)


def _tied(a: Any, b: Any) -> bool:
    """Say whether two tensors are one, or copies: equal vectors and constants may be so by chance."""
    if not _same(a, b):
        return False
    if a.numel() and a.data_ptr() == b.data_ptr():
        return True
    return a.ndim >= 2 and bool((a != a.flatten()[:1]).any())


def _described(value: Any) -> str:
    return f"{_dtype(value)} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
