"""The candidates that need torch: torch's own ways, torchopt, and luxtorch.

A candidate is a function `build(problem, data, device)` that returns `step`, a function without arguments. `step` does
the whole work once and returns the loss, or whatever its problem asks for, as tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..problems import Data, Problem

Step = Callable[[], Any]
Build = Callable[[Problem, Data, str], Step]


def candidates(problem: Problem) -> dict[str, Build]:
    """Return the candidates for a problem by name; the first is what the others are compared with."""
    found: dict[str, Build] = import_module(f"{__name__}.{problem.family}").CANDIDATES
    return found


def finish(result: Any, device: str) -> None:
    """Wait until all that was asked for is computed."""
    if device != "cpu":
        torch.cuda.synchronize()


def arrays(result: Any) -> list[Any]:
    """Return the tensors of a result, where numpy can read them."""
    return [leaf.detach().cpu() for leaf in pytree.tree_leaves(result)]


def versions(device: str) -> str:
    """Return the versions that matter."""
    where = f" on {torch.cuda.get_device_name()}" if device != "cpu" else ""
    return f"luxtorch {version('luxtorch')}, torch {torch.__version__}{where}, torchopt {version('torchopt')}"


def settle(threads: int) -> None:
    """Set up a process before it builds a candidate."""
    # Some candidates import torch's compilers and some do not: neither their memory nor their seconds are to show that.
    import_module("torch._dynamo")
    import_module("torch._inductor.compile_fx")
    torch.set_num_threads(threads)
