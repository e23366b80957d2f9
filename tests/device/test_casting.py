"""Casts over trees: which leaves change, which stay, and what cannot be cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from luxtorch.components import ComponentVector
from luxtorch.core import DTypeError, Static, tree_leaves
from luxtorch.device import bf16, f16, f32, f64

CASTS = {
    f16: (torch.float16, torch.complex32),
    bf16: (torch.bfloat16, None),
    f32: (torch.float32, torch.complex64),
    f64: (torch.float64, torch.complex128),
}
REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OTHER = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.uint64]

tensors = some.builds(lambda dtype, n: torch.ones(n, dtype=dtype), some.sampled_from(REAL + OTHER), some.integers(0, 2))
leaves = tensors | some.sampled_from([None, 1, 2.5, "text", True, Static(False)])
trees = some.recursive(
    leaves, lambda inner: some.dictionaries(some.text("abc"), inner) | some.lists(inner) | some.tuples(inner, inner)
)


@given(trees, some.sampled_from(list(CASTS)))
def test_only_floating_point_tensors_change(tree: Any, cast: Callable) -> None:
    result = cast(tree)
    assert torch.utils._pytree.tree_structure(result) == torch.utils._pytree.tree_structure(tree)
    for old, new in zip(tree_leaves(tree), tree_leaves(result), strict=True):
        if isinstance(old, Tensor) and old.is_floating_point():
            assert torch.equal(new, old.to(CASTS[cast][0])) and new.dtype == CASTS[cast][0]
        else:
            assert new is old


@pytest.mark.parametrize("cast", [f16, f32, f64])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
# torch warns that its arithmetic of complex32 is incomplete; nothing here computes in it.
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_complex_tensors_take_the_same_precision(cast: Callable, dtype: torch.dtype) -> None:
    assert cast([torch.ones(1, dtype=dtype)])[0].dtype == CASTS[cast][1]


def test_complex_bfloat16_does_not_exist() -> None:
    with pytest.raises(DTypeError, match="no complex dtype of this precision") as error:
        bf16({"z": torch.ones(1, dtype=torch.complex64)})
    assert "bfloat16" in str(error.value) and "view_as_real" in str(error.value)


@pytest.mark.parametrize("cast", CASTS)
def test_shared_tensors_stay_shared(cast: Callable) -> None:
    shared = torch.ones(2, dtype=torch.float8_e4m3fn).float()
    result = cast({"a": shared, "b": (shared,)})
    assert result["a"] is result["b"][0]


def test_nothing_is_copied_without_need() -> None:
    tree = {"weight": torch.ones(2), "count": torch.tensor(1)}
    assert f32(tree)["weight"] is tree["weight"]


@pytest.mark.parametrize("cast", CASTS)
def test_a_component_vector_is_kept(cast: Callable) -> None:
    ps = ComponentVector({"weight": torch.ones(2), "bias": torch.ones(())})
    assert isinstance(cast(ps), ComponentVector)
    assert (cast(ps).axes, cast(ps).dtype) == (ps.axes, CASTS[cast][0])


def test_casts_are_differentiable_and_compile() -> None:
    def loss(x: Tensor) -> Tensor:
        return (f64({"x": x, "n": torch.arange(3)})["x"] ** 3).sum()

    x = torch.tensor([1.0, 2.0])
    slope = torch.func.grad(loss)
    torch.testing.assert_close(slope(x), 3 * x**2)
    torch.testing.assert_close(torch.compile(slope, backend="aot_eager", fullgraph=True)(x), 3 * x**2)
    torch.testing.assert_close(torch.func.vmap(slope)(x[:, None]), 3 * x[:, None] ** 2)
