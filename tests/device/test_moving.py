"""Moving trees to devices: what moves, what is shared, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import luxtorch.random as lr
from luxtorch.components import ComponentVector
from luxtorch.core import DTypeError, InputError, Layer, Static, tree_leaves
from luxtorch.device import Device, cpu_device, get_device, to_device


class Square(Layer):
    def __call__(self, x, ps, st):
        return x**2, st


def make_tree() -> dict:
    return {
        "dense": {"weight": torch.ones(2, 3), "bias": torch.zeros(2)},
        "key": lr.key(0),
        "count": torch.tensor(3),
        "mask": torch.tensor([True]),
        "training": Static(True),
        "name": "a",
        "nothing": None,
        "empty": {},
    }


# There may be no accelerator here; the meta device is another device everywhere.
@pytest.mark.parametrize("move", [Device("meta"), lambda tree: to_device(tree, "meta")])
def test_all_tensors_move_and_nothing_else_changes(move: Callable) -> None:
    tree = make_tree()
    before = copy.deepcopy(tree)
    moved = move(tree)
    assert torch.utils._pytree.tree_structure(moved) == torch.utils._pytree.tree_structure(tree)
    for old, new in zip(tree_leaves(tree), tree_leaves(moved), strict=True):
        if isinstance(old, Tensor):
            assert (new.device.type, new.dtype, new.shape) == ("meta", old.dtype, old.shape)
        else:
            assert new is old
    assert moved["training"] == Static(True)
    torch.testing.assert_close(tree_leaves(tree)[:5], tree_leaves(before)[:5])


@pytest.mark.parametrize("how", [Device("cpu"), torch.device("cpu"), "cpu"])
def test_tensors_that_are_there_are_not_copied(how: Device | torch.device | str) -> None:
    tree = make_tree()
    assert all(new is old for old, new in zip(tree_leaves(tree), tree_leaves(to_device(tree, how)), strict=True))


def test_shared_tensors_stay_shared() -> None:
    shared, other = torch.ones(2), torch.ones(2)
    moved = Device("meta")({"a": shared, "b": [shared, other]})
    assert moved["a"] is moved["b"][0]
    assert moved["a"] is not moved["b"][1]


def test_a_component_vector_is_kept() -> None:
    ps = ComponentVector({"dense": {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}})
    moved = Device("meta")({"ps": ps})["ps"]
    assert isinstance(moved, ComponentVector)
    assert moved.axes is ps.axes
    assert moved.flat.device.type == "meta"


def test_moving_to_every_device(device: torch.device) -> None:
    moved = to_device(make_tree(), device)
    found = get_device(moved)
    assert found is not None and found.device.type == device.type
    torch.testing.assert_close(cpu_device()(moved)["dense"], make_tree()["dense"])


def test_a_device_with_a_precision_casts_floats_only() -> None:
    moved = Device("meta", torch.bfloat16)(make_tree())
    assert moved["dense"]["weight"].dtype == torch.bfloat16
    assert (moved["key"].dtype, moved["count"].dtype, moved["mask"].dtype) == (torch.uint64, torch.int64, torch.bool)


def test_float64_is_never_cast_silently() -> None:
    assert Device("meta")({"x": torch.ones(1, dtype=torch.float64)})["x"].dtype == torch.float64


def test_moving_is_differentiable() -> None:
    x = torch.ones(3)
    slope = torch.func.grad(lambda x: (Device("cpu", torch.float64)({"x": x})["x"] ** 2).sum())(x)
    torch.testing.assert_close(slope, 2 * x)


def test_devices_are_values() -> None:
    assert Device("cpu") == cpu_device()
    assert hash(Device("cpu", torch.float16)) == hash(cpu_device(dtype=torch.float16))
    assert Device("cpu") != Device("cpu", torch.float32)
    with pytest.raises(AttributeError):
        Device("cpu").dtype = torch.float32  # type: ignore[misc]


def test_a_device_needs_a_floating_point_precision() -> None:
    with pytest.raises(DTypeError, match="dtype must be a floating point dtype") as error:
        Device("cpu", torch.int64)
    assert "torch.int64" in str(error.value)


@pytest.mark.parametrize("where", [lambda layer: layer, lambda layer: {"model": (layer,)}])
def test_layers_are_refused(where: Callable) -> None:
    tree = where(Square())
    with pytest.raises(InputError, match="A layer holds no tensors") as error:
        cpu_device()(tree)
    assert "Square" in str(error.value) and "ps, st" in str(error.value)
    assert ("at 'model.0'" in str(error.value)) == isinstance(tree, dict)


def test_modules_are_refused() -> None:
    with pytest.raises(InputError, match="not a tree of tensors") as error:
        cpu_device()({"net": nn.Linear(2, 2)})
    assert "Linear at 'net'" in str(error.value)


def test_get_device() -> None:
    assert get_device(make_tree()) == cpu_device()
    assert get_device(to_device(make_tree(), "meta")) == Device("meta")
    assert get_device(ComponentVector({"a": torch.ones(2)})) == cpu_device()
    assert get_device({"training": Static(True), "empty": {}, "n": 3}) is None


def test_get_device_names_the_leaves_that_differ() -> None:
    tree = {"a": torch.ones(1), "b": {"c": torch.ones(1, device="meta")}, "d": torch.ones(1)}
    with pytest.raises(InputError, match="on several devices") as error:
        get_device(tree)
    assert "a, d on cpu; b.c on meta" in str(error.value)


@pytest.mark.parametrize("vector", [False, True], ids=["dict", "ComponentVector"])
def test_moving_under_compile_and_vmap(vector: bool) -> None:
    ps = {"weight": torch.ones(4, 2), "bias": torch.zeros(4)}
    tree = {"ps": ComponentVector(ps, batch_dims=1) if vector else ps, "training": Static(True)}
    device = Device("cpu", torch.float64)
    expected = device(tree)
    compiled = torch.compile(device, backend="aot_eager", fullgraph=True)(tree)
    vmapped = torch.func.vmap(device)(tree)
    for result in (compiled, vmapped):
        assert torch.utils._pytree.tree_structure(result) == torch.utils._pytree.tree_structure(expected)
        torch.testing.assert_close(tree_leaves(result), tree_leaves(expected))
