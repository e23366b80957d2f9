"""Checks of a module's code: that it does not reach its tensors through globals, or draw from global generators."""

from __future__ import annotations

import pickle
import random
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from luxtorch.core import InputError
from luxtorch.inspect._global_random import generators, moved, restored

from ._reach import code_of, everything, names_used, package, reaches
from ._submodule import tensors_of

_SEEDS = frozenset(
    ("seed", "manual_seed", "initial_seed", "get_rng_state", "set_rng_state", "default_generator", "fork_rng")
)


def check_code(module: nn.Module, functions: list[types.FunctionType]) -> None:
    """Refuse a module whose code refers to the module itself by a global, which a copy of it would share.

    Args:
        module: The module.
        functions: The functions that a call of it may run.

    Raises:
        InputError: If a global, a closure or a default of a method leads to a part or a tensor of the module.
    """
    wanted = {id(value) for part in module.modules() for value in (part, *(each for _, _, each in tensors_of(part)))}
    way = reaches(functions, wanted, set(map(package, functions)))
    if way is not None:
        raise InputError(
            "The code of a module must reach its parameters, buffers and submodules by attributes alone.",
            got=way.partition("]")[2].strip() or way,
            fix="Make it an attribute: self.name = ...; the call of a layer takes its tensors from ps and st alone.",
        )


def functions_of(module: nn.Module) -> list[types.FunctionType]:
    """Return the methods of a module's classes that a call may run: those reachable by name from a forward."""
    known: dict[str, list[types.FunctionType]] = {}
    for part in module.modules():
        for name, function in code_of(part):
            known.setdefault(name, []).append(function)
    waiting = [name for name in known if name == "forward" or name.startswith("__") and name != "__init__"]
    found: dict[int, types.FunctionType] = {}
    while waiting:
        for function in known.pop(waiting.pop(), ()):
            found[id(function)] = function
            waiting += known.keys() & {*names_used(function.__code__)}
    return [*found.values()]


def sources_of(module: nn.Module, functions: list[types.FunctionType]) -> frozenset[str]:
    """Return the names of the global random number generators that a module and its functions may draw from."""
    found: set[str] = set()
    for _, each in everything([module, *functions], set(map(package, functions))):
        found.update(_sources(each))
    return frozenset(found)


def _sources(x: Any) -> Iterator[str]:
    if (
        x is random
        or isinstance(x, types.BuiltinMethodType | types.MethodType)
        and isinstance(x.__self__, random.Random)
    ):
        yield "Python"
    elif (
        isinstance(x, types.ModuleType)
        and x.__name__ in ("numpy", "numpy.random")
        or isinstance(x, types.BuiltinMethodType)
        and type(x.__self__).__module__.startswith("numpy.random")
    ):
        yield "NumPy"
    elif (
        isinstance(x, torch.jit.ScriptFunction) or isinstance(x, types.FunctionType) and _SEEDS & names_used(x.__code__)
    ):
        yield "torch"


@contextmanager
def check_draws(names: frozenset[str], own: list[Any]) -> Iterator[None]:
    """Raise if random numbers are drawn inside from a generator that no key seeds; restore the global generators.

    Args:
        names: The global generators that may be drawn from.
        own: Other generators.

    Raises:
        InputError: If there was such a draw.
    """
    before, own_before = generators(), [*map(pickle.dumps, own)]
    with restored():
        yield
        found = [f"the global random numbers of {name}" for name in moved(before, generators()) if name in names]
    pairs = zip(own, own_before, strict=True)
    found += [f"a {type(each).__name__} of its own" for each, state in pairs if pickle.dumps(each) != state]
    if found:
        raise InputError(
            "A forward must draw by torch's functions, which take their numbers from the key in the states.",
            got=f"a draw from {found[0]}",
            fix="Draw with torch.rand, torch.randint and their like, and leave the seed alone.",
        )
