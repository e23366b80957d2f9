"""`chunk_size=` changes no result, whichever function takes it, and wrong ones are errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

import luxtorch as lt
from luxtorch import autodiff
from luxtorch.core import InputError

BATCH = torch.cos(torch.arange(15.0, dtype=torch.float64)).view(5, 3)
KEY = lt.random.key(3)


def _outputs(x) -> dict:
    return {"a": torch.sin(x["w"]) * x["b"], "b": x["w"].sum() * x["b"]}


def _loss(x) -> torch.Tensor:
    return (torch.sin(x["w"]) ** 2 * x["b"]).sum() ** 2


def _of_outputs(y) -> torch.Tensor:
    return (y["a"] ** 2).sum() * y["b"]


# Each takes a tree of four elements, w and b, and a chunk size; with how many products there are in all.
FUNCTIONS: dict[str, tuple[int, Callable[[Any, int | None], Any]]] = {
    "gradient": (4, lambda x, n: autodiff.gradient(_loss, x, mode="forward", chunk_size=n)),
    "withgradient": (4, lambda x, n: autodiff.withgradient(_loss, x, mode="forward", chunk_size=n)),
    "jacobian": (4, lambda x, n: autodiff.jacobian(_outputs, x, chunk_size=n)),
    "jacobian forward": (4, lambda x, n: autodiff.jacobian(_outputs, x, mode="forward", chunk_size=n)),
    "hessian": (4, lambda x, n: autodiff.hessian(_loss, x, chunk_size=n)),
    "hessian forward": (4, lambda x, n: autodiff.hessian(_loss, x, mode="forward", chunk_size=n)),
    "batched_jacobian": (3, lambda x, n: autodiff.batched_jacobian(lambda s: s.sin() * x["w"], BATCH, chunk_size=n)),
    "batched_jacobian forward": (
        3,
        lambda x, n: autodiff.batched_jacobian(lambda s: s.sin() * x["w"], BATCH, mode="forward", chunk_size=n),
    ),
    "per_sample_gradients": (
        5,
        lambda x, n: autodiff.per_sample_gradients(
            lambda ps, st, s: (ps["w"] * s).sin().sum(), x, {}, BATCH, chunk_size=n
        ),
    ),
    "hessian_diagonal": (4, lambda x, n: autodiff.hessian_diagonal(_loss, x, chunk_size=n)),
    "hessian_diagonal sampled": (6, lambda x, n: autodiff.hessian_diagonal(_loss, x, key=KEY, samples=6, chunk_size=n)),
    "diagonal of GGNVec by rows": (4, lambda x, n: autodiff.GGNVec(_outputs, _of_outputs, x).diagonal(chunk_size=n)),
    "diagonal of GGNVec by columns": (
        4,
        lambda x, n: autodiff.GGNVec(lambda x: [_outputs(x)] * 2, lambda y: _of_outputs(y[0]), x).diagonal(
            chunk_size=n
        ),
    ),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def _point() -> dict:
    w = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    return {"w": w, "b": torch.tensor(1.5, dtype=torch.float64)}


@every_function
@pytest.mark.parametrize("of_size", [lambda n: 1, lambda n: 2, lambda n: n - 1, lambda n: n, lambda n: n + 1])
def test_results_do_not_depend_on_it(name, of_size) -> None:
    size, f = FUNCTIONS[name]
    expected, found = f(_point(), None), f(_point(), of_size(size))
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    torch.testing.assert_close(pytree.tree_leaves(found), pytree.tree_leaves(expected))


@every_function
@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, True, "all"])
def test_wrong_ones_are_errors(name, chunk_size) -> None:
    with pytest.raises(InputError, match="chunk_size must be at least 1"):
        FUNCTIONS[name][1](_point(), chunk_size)


@pytest.mark.parametrize("f", [autodiff.gradient, autodiff.withgradient])
def test_wrong_ones_are_errors_even_where_they_are_not_needed(f) -> None:
    with pytest.raises(InputError, match="chunk_size must be at least 1"):
        f(_loss, _point(), chunk_size=0)


def test_every_function_that_takes_it_is_tested_here() -> None:
    takes_it = {
        name
        for name, value in vars(autodiff).items()
        if callable(value) and "chunk_size" in inspect.signature(value).parameters
    }
    assert takes_it == {name.split()[0] for name in FUNCTIONS} - {"diagonal"}


def test_memory_is_that_of_a_chunk() -> None:
    """The rows of a Gauss-Newton diagonal are summed up chunk by chunk: none of all rows is ever there."""
    most = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            found = func(*args, **(kwargs or {}))
            most = max([most, *(leaf.numel() for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor))])
            return found

    operator = autodiff.GGNVec(lambda x: x.view(50, 10).sum(1), lambda y: (y**2).sum() / 2, torch.ones(500))
    with Sizes():
        diagonal = operator.diagonal(chunk_size=4)
    torch.testing.assert_close(diagonal, torch.ones(500))
    assert most == 4 * 500
