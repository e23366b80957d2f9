"""Fixtures that every test draws its randomness and its devices from."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

# The same examples in every run, and no limit on the time of one: compiling takes what it takes.
settings.register_profile("luxtorch", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("luxtorch")


# On a GPU, torch convolves with ten bits of each number unless it is told not to.
torch.backends.cudnn.allow_tf32 = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take only a share of the slow tests where `SHARE` asks for that: `SHARE=2/3` is the second of three.

    `FAST_SHARE` does the same for the others. Of the many cases of a test that is marked `sampled(n)`, one in n is
    fast: all of them are checked in the slow tests, and a change that breaks the kind is seen at once.
    """
    for item in items:
        if (sampled := item.get_closest_marker("sampled")) and _number(item.nodeid) % sampled.args[0]:
            item.add_marker(pytest.mark.slow)
    shares = {slow: os.environ.get(name, "1/1").split("/") for slow, name in ((True, "SHARE"), (False, "FAST_SHARE"))}

    def taken(item: pytest.Item) -> bool:
        which, number = map(int, shares[item.get_closest_marker("slow") is not None])
        return _number(item.nodeid) % number == which % number

    out = {item for item in items if not taken(item)}
    config.hook.pytest_deselected(items=[*out])
    items[:] = [item for item in items if item not in out]


def _number(nodeid: str) -> int:
    return zlib.crc32(nodeid.encode())


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator seeded by the test's own name: the numbers of a test never depend on other tests."""
    return torch.Generator().manual_seed(_number(request.node.nodeid))


@pytest.fixture
def make_key(request: pytest.FixtureRequest) -> Callable[[], Tensor]:
    """Return a function that gives a fresh key at every call, seeded by the test's own name."""
    import luxtorch.random as lr

    root, count = lr.key(_number(request.node.nodeid)), 0

    def fresh() -> Tensor:
        nonlocal count
        count += 1
        return lr.fold_in(root, count)

    return fresh


@pytest.fixture
def in_docs() -> Callable[[str, str], None]:
    """Return a function that fails if a page of docs/ has another table; `make tables` writes it there."""

    def compare(page: str, table: str) -> None:
        path = Path(__file__).parents[1] / "docs" / page
        begin, end = "<!-- table -->\n", "\n<!-- end of table -->"
        before, _, rest = path.read_text().partition(begin)
        found, _, after = rest.partition(end)
        if os.environ.get("TABLES") == "write":
            path.write_text(before + begin + table + end + after)
        elif found != table:
            pytest.fail(f"The table in docs/{page} is not that of the tests: run `make tables`.\n{table}")

    return compare


@pytest.fixture(params=["cpu", *(f"cuda:{i}" for i in range(min(torch.cuda.device_count(), 1)))])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that this machine has."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Let no test's graphs count towards the recompilation limit of another."""
    yield
    torch.compiler.reset()
