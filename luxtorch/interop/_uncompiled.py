"""Modules without what `torch.compile` has put around them."""

from __future__ import annotations

import sys
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from luxtorch.core import InputError


def uncompiled(module: Any) -> Any:
    """Return a module without what `torch.compile` has put around it, around modules inside, or around their methods.

    A module that has nothing of the kind inside is returned itself. Others are new, and share what they hold.
    """
    # Whoever has compiled something has loaded the compiler, and nobody else should have to.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None or not isinstance(module, nn.Module):
        return module
    return _opened(module, compiler.OptimizedModule, {})


def _opened(module: nn.Module, wrapper: type[nn.Module], done: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in done:
        if isinstance(module, wrapper):
            if module._forward_hooks or module._forward_pre_hooks:
                raise InputError(
                    "A hook of what torch.compile returned is no part of the module.",
                    fix="Register the hooks with the module itself, before it is compiled.",
                    where=type(module._orig_mod).__name__,
                )
            opened = _opened(module._orig_mod, wrapper, done)  # type: ignore[arg-type]
        else:
            done[id(module)] = module  # for modules that hold themselves
            children = {
                name: child if child is None else _opened(child, wrapper, done)
                for name, child in module._modules.items()
            }
            methods = {name: value for name, value in vars(module).items() if _compiled(value)}
            opened = module
            if methods or any(new is not module._modules[name] for name, new in children.items()):
                opened = type(module).__new__(type(module))
                originals = {
                    name: _rebound(getattr(value, _ORIGINAL), module, opened) for name, value in methods.items()
                }
                vars(opened).update({**vars(module), **originals, "_modules": children})
        done[id(module)] = opened
    return done[id(module)]


def _compiled(value: Any) -> bool:
    return isinstance(value, FunctionType) and hasattr(value, _ORIGINAL)


_ORIGINAL = "_torchdynamo_orig_callable"
"""Where torch.compile keeps what it compiled."""


def _rebound(function: Any, module: nn.Module, other: nn.Module) -> Any:
    """Return a method of a module as one of another."""
    return MethodType(function.__func__, other) if getattr(function, "__self__", None) is module else function
