"""Forms of all modules of torch.nn: constructor options, inputs, and what torch cannot do with them.

A form is written as `Form(nn.Linear(3, 2), N(4, 3))`, where `nn` only writes down what is called: each test makes a
module of its own, with numbers from its own key. Inputs are drawn likewise. Random modules stand here as they are; that
they draw the right numbers is tested elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

import luxtorch as lt


@dataclass(frozen=True)
class Call:
    """What is called, by its name in torch.nn, and with what."""

    name: str
    args: tuple
    kwargs: dict

    def make(self) -> torch.nn.Module:
        """Make the module."""
        args, kwargs = pytree.tree_map_only(Call, lambda call: call.make(), (self.args, self.kwargs))
        return getattr(torch.nn, self.name)(*args, **kwargs)

    def __repr__(self) -> str:
        shown = [*map(_shown, self.args), *(f"{name}={_shown(value)}" for name, value in self.kwargs.items())]
        return f"{self.name}({', '.join(shown)})"


def _shown(value: Any) -> str:
    return getattr(value, "__name__", None) or (
        f"tensor{list(value.shape)}" if isinstance(value, Tensor) else f"{value}"
    )


class _Recorder:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: Call(name, args, kwargs)


nn = _Recorder()


@dataclass(frozen=True)
class Draw:
    """A tensor to be drawn."""

    kind: str
    shape: tuple
    high: int = 0

    def __call__(self, key: Tensor, dtype: torch.dtype) -> Tensor:
        """Draw it."""
        if self.kind == "integers":
            return lt.random.randint(key, self.shape, high=self.high)
        if self.kind == "signs":
            return 2 * lt.random.randint(key, self.shape, high=2) - 1
        if self.kind == "uniform":  # away from the ends, also when a law scales it a little
            return 0.1 + 0.6 * lt.random.uniform(key, self.shape, dtype=dtype)
        if self.kind == "packed":
            size, *lengths = self.shape
            return pack_sequence([lt.random.normal(key, (length, size), dtype=dtype) for length in lengths])
        x = lt.random.normal(key, self.shape, dtype=dtype)
        return x.to(memory_format=torch.channels_last) if self.kind == "channels_last" else x


def N(*shape: int) -> Draw:
    """Normal numbers."""
    return Draw("normal", shape)


def CL(*shape: int) -> Draw:
    """Normal numbers, channels last in memory."""
    return Draw("channels_last", shape)


def U(*shape: int) -> Draw:
    """Numbers between 0 and 1."""
    return Draw("uniform", shape)


def S(*shape: int) -> Draw:
    """Ones and minus ones, integers."""
    return Draw("signs", shape)


def K(high: int, *shape: int) -> Draw:
    """Integers below a number."""
    return Draw("integers", shape, high)


@dataclass(frozen=True)
class Form:
    """A module, its inputs, and the laws that torch cannot keep, each with the reason."""

    call: Call
    inputs: tuple
    options: dict = field(default_factory=dict)  # further arguments of the forward, that are no tensors
    skip: dict = field(default_factory=dict)
    prepare: Any = None  # what is done to a new module
    random: tuple = ()  # the modes in which it draws numbers

    def __init__(self, call, *inputs, options=(), skip=(), prepare=None, random=()):
        for name, value in dict(
            call=call, inputs=inputs, options=dict(options), skip=dict(skip), prepare=prepare, random=random
        ).items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        options = "".join(f", {name}" for name in self.options)
        return f"{getattr(self.prepare, '__name__', '')} {self.call}{options}".strip()

    def module(self, key: Tensor, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """Make a module whose tensors are drawn from a key."""
        module = self.call.make()
        if self.prepare is not None:
            module = self.prepare(module)
        with torch.no_grad():
            tensors = [*module.named_parameters(), *module.named_buffers()]
            for i, (name, value) in enumerate(tensors):
                if value.is_floating_point():
                    drawn = lt.random.uniform(lt.random.fold_in(key, i), tuple(value.shape)) * 0.8
                    value.copy_(drawn + 0.4 if name.endswith("var") else drawn - 0.3)
        return module.to(dtype)

    def draw(self, which: int, key: Tensor, dtype: torch.dtype = torch.float32) -> Any:
        """Draw one of the inputs."""
        leaves, structure = pytree.tree_flatten(self.inputs[which])
        keys = lt.random.split(lt.random.fold_in(key, 1000 + which), max(len(leaves), 1))
        drawn = [leaf(k, dtype) if isinstance(leaf, Draw) else leaf for leaf, k in zip(leaves, keys)]  # noqa: B905
        return pytree.tree_unflatten(drawn, structure)


# Lazy modules, once they have seen an input, and parametrized ones.


def seen(*shape: int) -> Any:
    """Return what shows a lazy module its first input."""

    def materialised(module):
        module(torch.ones(shape))
        return module

    return materialised


def weight_norm(module):
    return parametrizations.weight_norm(module)


def spectral_norm(module):
    return parametrizations.spectral_norm(module)


def orthogonal(module):
    return parametrizations.orthogonal(module)


def orthogonal_householder(module):
    return parametrizations.orthogonal(module, orthogonal_map="householder", use_trivialization=False)


def orthogonal_cayley(module):
    return parametrizations.orthogonal(module, orthogonal_map="cayley")


def packed(size: int, *lengths: int) -> Any:
    """Return sequences of different lengths, packed."""
    return Draw("packed", (size, *lengths))
