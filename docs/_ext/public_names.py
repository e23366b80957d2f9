"""The public names of luxtorch, found by reading the re-exports, and in which order the reference shows them."""

from __future__ import annotations

import ast
import importlib
import inspect
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import luxtorch

METHODS = (property, cached_property, classmethod, staticmethod)
ROOT = Path(luxtorch.__file__).parent
FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))

# Headings for the longest pages, and the files whose names come under each; other files come last, under "More".
SECTIONS = {
    "core": {
        "Making and calling models": "setup mode stateful layer container stack",
        "Looking at trees": "describe",
        "Errors": "errors",
        "Trees, for those who write layers": "tree plain",
    },
    "layers": {
        "Containers": "containers repeated checkpointed",
        "Models as functions": "compact compact_parts",
        "Linear layers and functions": "linear basic activations",
        "Convolution and pooling": "conv pooling upsample",
        "Normalization": "batchnorm layernorm weight_norms",
        "Dropout": "dropout",
        "Recurrent": "base cells recurrence",
        "Attention and embeddings": "attention transformer embedding",
        "Outputs inside a model": "perturbed",
    },
    "losses": {
        "Classification": "classification binary",
        "Regression": "regression",
        "Margins and embeddings": "margin",
        "Losses of your own": "loss",
    },
    "optim": {
        "One step": "update opt_state",
        "Rules": "rules",
        "Rules made of rules": "modifiers",
        "Schedules": "schedules",
        "Going to the minimum": "solvers",
        "Rules of your own": "rule leafwise rule_state hyperparameters",
    },
}


class Public(NamedTuple):
    """A public name: what users write, where it is defined, and what it stands for."""

    path: str
    home: str
    value: Any


def re_exports(package: str) -> dict[str, str]:
    """Return the names that a folder's `__init__.py` re-exports as `X as X`, with the module each comes from."""
    tree = ast.parse(Path(importlib.import_module(package).__file__ or "").read_text())
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                if alias.asname == alias.name:
                    found[alias.name] = importlib.util.resolve_name(module, package) if node.level else module
    return found


def of_folder(folder: str) -> dict[str, Public]:
    """Return the public names of a folder, each by the shortest path that leads to it."""
    package = f"luxtorch.{folder}"
    top = {*re_exports("luxtorch"), *re_exports("luxtorch._late")}
    found = {}
    for name, home in re_exports(package).items():
        value = getattr(importlib.import_module(package), name)
        at_top = name in top and getattr(luxtorch, name) is value
        found[name] = Public(f"luxtorch.{name}" if at_top else f"{package}.{name}", home, value)
    return found


def everything() -> dict[str, Public]:
    """Return all public names by the path that users write; what two folders share comes once."""
    return {public.path: public for folder in FOLDERS for public in of_folder(folder).values()}


def in_sections(folder: str) -> dict[str, list[Public]]:
    """Return the public names of a folder under the headings of its page; without headings, all under an empty one."""
    names = of_folder(folder).values()
    headings = SECTIONS.get(folder)
    if headings is None:
        return {"": sorted(names, key=lambda public: public.path.lower())}
    order = {file: (heading, place) for heading, files in headings.items() for place, file in enumerate(files.split())}
    found: dict[str, list[tuple[int, Public]]] = {heading: [] for heading in [*headings, "More"]}
    for public in names:
        heading, place = order.get(public.home.rsplit(".", 1)[-1].lstrip("_"), ("More", 0))
        found[heading].append((place, public))
    return {
        heading: [public for _, public in sorted(entries, key=lambda entry: (entry[0], entry[1].path.lower()))]
        for heading, entries in found.items()
        if entries
    }


def is_class(value: Any) -> bool:
    """Tell whether a value is a class, which an alias such as `list[int]` is to `inspect.isclass` of Python 3.10."""
    return inspect.isclass(value) and get_origin(value) is None


def documentation(public: Public) -> list[str]:
    """Return the docstring of a name; of one that is no class or function, the string below its assignment."""
    if is_class(public.value) or inspect.isroutine(public.value):
        lines = inspect.cleandoc(public.value.__doc__ or "").splitlines()
        return lines if public.value.__module__.startswith("luxtorch") else [*lines[:1], "", "A function of torch."]
    name = public.path.rsplit(".", 1)[-1]
    body = ast.parse(Path(importlib.import_module(public.home).__file__ or "").read_text()).body
    for node, below in zip(body, body[1:], strict=False):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        is_name = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if is_name and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            return inspect.cleandoc(str(below.value.value)).splitlines()
    return [""]


def own_members(cls: type) -> list[str]:
    """Return the public methods and properties that a class defines itself, and no base class before it."""
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("luxtorch")]

    def is_method(name: str, value: Any) -> bool:
        # A function of another name is the default of a field.
        return isinstance(value, METHODS) or inspect.isfunction(value) and value.__name__ == name

    return [
        name
        for name, value in vars(cls).items()
        if not name.startswith("_") and is_method(name, value) and not any(name in vars(base) for base in bases)
    ]
