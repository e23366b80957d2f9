"""What the tests of modules share: values that depend on no other test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _own_initial_values(rng: torch.Generator) -> Iterator[None]:
    """Let modules of torch.nn, which draw from the global generator, draw the test's own numbers."""
    before = torch.get_rng_state()
    torch.set_rng_state(rng.get_state())
    yield
    torch.set_rng_state(before)
