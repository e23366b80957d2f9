"""Choosing a device, on machines with and without an accelerator."""

from __future__ import annotations

import warnings

import pytest
import torch

from luxtorch.core import LuxtorchError
from luxtorch.device import Device, DeviceError, _device, cpu_device, gpu_device


@pytest.fixture
def accelerators(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    """Let torch report as many CUDA devices as the test asks for, the last of them the current one."""
    count: int = request.param
    current = torch.device("cuda") if count else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: current)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: count - 1)
    _device._warn_once.cache_clear()
    return count


with_accelerators = pytest.mark.parametrize("accelerators", [2], indirect=True)
without_accelerators = pytest.mark.parametrize("accelerators", [0], indirect=True)


@without_accelerators
def test_the_fallback_warns_once(accelerators: int) -> None:
    with pytest.warns(UserWarning, match=r"There is no accelerator: gpu_device\(\) is the CPU") as caught:
        assert gpu_device() == cpu_device()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu_device(3, dtype=torch.float16) == cpu_device(dtype=torch.float16)


@without_accelerators
def test_force_raises(accelerators: int) -> None:
    with pytest.raises(DeviceError, match="There is no accelerator") as error:
        gpu_device(force=True)
    assert isinstance(error.value, LuxtorchError) and "force=True" in str(error.value)


@with_accelerators
@pytest.mark.parametrize(("index", "expected"), [(None, "cuda:1"), (0, "cuda:0"), (1, "cuda:1")])
@pytest.mark.parametrize("force", [False, True])
def test_the_index_counts_from_zero(accelerators: int, index: int | None, expected: str, force: bool) -> None:
    assert gpu_device(index, force=force) == Device(expected)
    assert gpu_device(index, dtype=torch.bfloat16) == Device(expected, torch.bfloat16)


@with_accelerators
@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_that_is_not_there_raises(accelerators: int, index: int) -> None:
    with pytest.raises(DeviceError, match=f"There is no cuda device {index}") as error:
        gpu_device(index)
    assert "from 0 to 1" in str(error.value)
