"""The candidates in JAX: equinox and flax with optax, under jit. They run in an environment without torch.

A candidate is what it is in `torch_rows`; the device is always the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax

from ..problems import Data, Problem

Step = Callable[[], Any]
Build = Callable[[Problem, Data, str], Step]


def candidates(problem: Problem) -> dict[str, Build]:
    """Return the candidates for a problem by name."""
    found: dict[str, Build] = import_module(f"{__name__}.{problem.family}").CANDIDATES
    return found


def finish(result: Any, device: str) -> None:
    """Wait until all that was asked for is computed."""
    jax.block_until_ready(result)


def arrays(result: Any) -> list[Any]:
    """Return the arrays of a result."""
    return jax.tree.leaves(result)


def versions(device: str) -> str:
    """Return the versions that matter."""
    import equinox
    import flax
    import optax

    return f"jax {jax.__version__}, equinox {equinox.__version__}, flax {flax.__version__}, optax {optax.__version__}"


def settle(threads: int) -> None:
    """Set up a process before it builds a candidate: XLA takes as many threads as the process has cores."""
    jax.config.update("jax_platforms", "cpu")
