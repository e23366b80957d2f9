"""Whole Jacobians and Hessians, against torch.autograd.functional, finite differences and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd import functional

from luxtorch.autodiff import gradient, hessian, jacobian
from luxtorch.components import ComponentMatrix, ComponentVector
from luxtorch.core import DTypeError, InputError, Static

every_way = pytest.mark.parametrize(
    "way",
    [{"mode": mode, "chunk_size": size} for mode in ("reverse", "forward") for size in (None, 1, 4, 100)],
    ids=str,
)


def one_matrix(blocks: Any, rows: int) -> Tensor:
    """Put the blocks of one output side by side."""
    return torch.cat([block.reshape(rows, -1) for block in pytree.tree_leaves(blocks)], dim=1)


@every_way
def test_jacobians(problem, way) -> None:
    expected = functional.jacobian(problem.flat(problem.net), problem.ravel(problem.ps))
    blocks = jacobian(problem.net, problem.ps, **way)
    torch.testing.assert_close(one_matrix(blocks, 8), expected.view(8, 9))
    for block, leaf in zip(pytree.tree_leaves(blocks), pytree.tree_leaves(problem.ps), strict=True):
        assert block.shape == (4, 2, *leaf.shape)


@every_way
def test_hessians(problem, way) -> None:
    expected = functional.hessian(problem.flat(problem.loss), problem.ravel(problem.ps))
    blocks = hessian(problem.loss, problem.ps, **way)
    if isinstance(problem.ps, dict):
        matrix = torch.cat([one_matrix(blocks["dense"]["weight"], 6), one_matrix(blocks["dense"]["bias"], 2)])
        matrix = torch.cat([matrix, one_matrix(blocks["scale"], 1)])
        assert blocks["dense"]["weight"]["dense"]["bias"].shape == (2, 3, 2)
    else:
        matrix = blocks.data if isinstance(problem.ps, ComponentVector) else blocks
    torch.testing.assert_close(matrix, expected)


@every_way
def test_jacobians_of_gradients_against_finite_differences(problem, way) -> None:
    flat = problem.ravel(problem.ps)
    slope = problem.flat(problem.loss)
    step = 1e-4
    columns = [
        (gradient(slope, flat + step * unit) - gradient(slope, flat - step * unit)) / (2 * step)
        for unit in torch.eye(9, dtype=torch.float64)
    ]
    torch.testing.assert_close(hessian(slope, flat, **way), torch.stack(columns, dim=1), rtol=1e-6, atol=1e-6)


@every_way
def test_the_tree_of_outputs_is_outside(way) -> None:
    x = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    found = jacobian(lambda x: {"product": x["a"] * x["b"], "static": Static(1), "last": (x["b"] ** 2,)}, x, **way)
    expected = {
        "product": {"a": 3 * torch.eye(2), "b": x["a"]},
        "static": Static(1),
        "last": ({"a": torch.zeros(2), "b": torch.tensor(6.0)},),
    }
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    torch.testing.assert_close(pytree.tree_leaves(found), pytree.tree_leaves(expected))


@every_way
def test_several_arguments_give_tuples(way) -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
    torch.testing.assert_close(jacobian(torch.mul, a, b, **way), (3 * torch.eye(2), a))
    found = hessian(lambda a, b: (a**2).sum() * b, a, b, **way)
    torch.testing.assert_close(found, ((6 * torch.eye(2), 2 * a), (2 * a, torch.tensor(0.0))))


@every_way
def test_auxiliary_outputs(way) -> None:
    x = torch.tensor([1.0, 2.0])
    matrix, aux = jacobian(lambda x: (x**2, {"y": 3 * x, "name": "f"}), x, has_aux=True, **way)
    torch.testing.assert_close((matrix, aux.pop("y")), (torch.diag(2 * x), 3 * x))
    assert aux == {"name": "f"}
    matrix, aux = hessian(lambda x: ((x**3).sum(), {"y": 3 * x, "name": "f"}), x, has_aux=True, **way)
    torch.testing.assert_close((matrix, aux.pop("y")), (torch.diag(6 * x), 3 * x))
    assert aux == {"name": "f"}


@every_way
@pytest.mark.parametrize("size", [0, 3])
def test_nothing_to_differentiate(way, size: int) -> None:
    assert jacobian(lambda x: torch.ones(size), {}, **way) == {}
    assert hessian(lambda x: torch.ones(()), {}, **way) == {}
    assert jacobian(lambda x: x.sum() + torch.ones(size), torch.ones(0), **way).shape == (size, 0)
    assert jacobian(lambda x: x[:0], torch.ones(size), **way).shape == (0, size)


# Names.


@every_way
def test_columns_have_the_names_of_the_input(way) -> None:
    x = ComponentVector({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)})
    found = jacobian(lambda x: x.a * x.b, x, **way)
    assert isinstance(found, ComponentMatrix)
    assert (found.row_axes, found.col_axes) == (None, x.axes)
    torch.testing.assert_close(found.data, torch.tensor([[3.0, 0.0, 1.0], [0.0, 3.0, 2.0]]))
    deep = jacobian(lambda x: torch.stack([x.a, x.a * x.b]), x, **way)
    assert isinstance(deep, ComponentMatrix) and deep.shape == (2, 2, 3)
    flat = jacobian(lambda x: x.a.sum(), x, **way)
    assert isinstance(flat, ComponentVector)
    torch.testing.assert_close(flat.flat, torch.tensor([1.0, 1.0, 0.0]))


@every_way
def test_rows_have_the_names_of_the_output(way) -> None:
    def f(x: Any) -> ComponentVector:
        return ComponentVector({"c": x**2, "d": x.sum()})

    x = torch.tensor([1.0, 2.0])
    found = jacobian(f, x, **way)
    assert isinstance(found, ComponentMatrix)
    assert (found.row_axes, found.col_axes) == (f(x).axes, None)
    torch.testing.assert_close(found.data, torch.tensor([[2.0, 0.0], [0.0, 4.0], [1.0, 1.0]]))
    single = jacobian(f, torch.tensor(3.0), **way)
    assert isinstance(single, ComponentVector)
    torch.testing.assert_close(single.c, torch.tensor(6.0))
    matrix = jacobian(f, torch.ones(2, 2), **way)
    assert type(matrix) is Tensor and matrix.shape == (5, 2, 2)


@every_way
def test_blocks_have_names_on_both_sides(way) -> None:
    x = ComponentVector({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)})
    for found in (hessian(lambda x: (x.a**2).sum() * x.b, x, **way), jacobian(lambda x: x * x, x, **way)):
        assert isinstance(found, ComponentMatrix)
        assert (found.row_axes, found.col_axes) == (x.axes, x.axes)
    torch.testing.assert_close(
        hessian(lambda x: (x.a**2).sum() * x.b, x, **way)["a", "b"], torch.tensor([[2.0], [4.0]])
    )


@every_way
def test_vectors_within_trees_are_named_too(way) -> None:
    x = {"v": ComponentVector({"a": torch.tensor([1.0, 2.0])}), "t": torch.tensor([3.0])}
    found = jacobian(lambda x: {"y": x["v"].a * x["t"]}, x, **way)
    assert isinstance(found["y"]["v"], ComponentMatrix)
    torch.testing.assert_close(found["y"]["v"][:, "a"].data, 3 * torch.eye(2))
    torch.testing.assert_close(found["y"]["t"], torch.tensor([[1.0], [2.0]]))


# Errors.


@every_way
def test_errors(way) -> None:
    with pytest.raises(DTypeError, match="'x.labels' must be a.*tensor(.|\n)*int64"):
        jacobian(lambda x: x["a"], {"a": torch.ones(1), "labels": torch.arange(2)}, **way)
    with pytest.raises(DTypeError, match="'x' must be a.*tensor(.|\n)*complex64(.|\n)*view_as_real"):
        jacobian(torch.abs, torch.tensor([1j]), **way)
    with pytest.raises(DTypeError, match="'f\\(x\\).mask' must be a.*tensor(.|\n)*bool(.|\n)*has_aux"):
        jacobian(lambda x: {"mask": x > 0}, torch.ones(2), **way)
    with pytest.raises(DTypeError, match="'f\\(x\\)' must be a.*tensor(.|\n)*complex64"):
        jacobian(lambda x: x * 1j, torch.ones(2), **way)
    with pytest.raises(InputError, match="must return a scalar"):
        hessian(lambda x: x, torch.ones(2), **way)
    with pytest.raises(InputError, match="mode must be 'reverse' or 'forward'(.|\n)*'backward'"):
        jacobian(torch.abs, torch.ones(2), mode="backward")  # type: ignore[arg-type]
