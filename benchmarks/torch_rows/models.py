"""The models, as modules of torch.nn and as layers of luxtorch, side by side, and their losses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import luxtorch as lt

from ..problems import Data, Problem
from .loop_models import GRU, Equal, LuxGRU, LuxSolved, Solved, lux_equal

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, tuple[Loss, lt.Loss]] = {
    "cross entropy": (F.cross_entropy, lt.CrossEntropyLoss()),
    "mean square": (F.mse_loss, lt.MSELoss()),
    "sum of squares": (lambda y_hat, y: F.mse_loss(y_hat, y, reduction="sum"), lt.MSELoss(agg="sum")),
}
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "identity": nn.Identity}


class LastOutput(nn.LSTM):
    """Return the last output alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the last step's output."""
        return super().forward(x)[0][:, -1]


class MeanOver(nn.Module):
    """Take means over dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """Return the means."""
        return x.mean(self.dims)


def mean_over_tokens(x: Tensor) -> Tensor:
    """Return the mean over the second dimension."""
    return x.mean(1)


def mean_over_pixels(x: Tensor) -> Tensor:
    """Return the mean over the last two dimensions."""
    return x.mean((2, 3))


def models(problem: Problem, data: Data) -> tuple[nn.Module, lt.Layer]:
    """Return the model of a problem, written for torch.nn and for luxtorch."""
    act, name = ACTIVATIONS[problem.activation], problem.activation
    width = data.x.shape[1]
    match problem.model:
        case "tiny":
            return sequential(nn.Linear(10, 5)), lt.Chain(lt.Dense(10, 5))
        case "mlp":
            return (
                sequential(nn.Linear(784, 512), act(), nn.Linear(512, 512), act(), nn.Linear(512, 10)),
                lt.Chain(lt.Dense(784, 512, name), lt.Dense(512, 512, name), lt.Dense(512, 10)),
            )
        case "deep":
            return (
                sequential(*(part for _ in range(50) for part in (nn.Linear(32, 32), nn.Tanh()))),
                lt.Chain(*(lt.Dense(32, 32, "tanh") for _ in range(50))),
            )
        case "cnn":
            return (
                sequential(
                    *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), act(), nn.MaxPool2d(2)),
                    *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), act(), nn.MaxPool2d(2)),
                    *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), act(), MeanOver(2, 3)),
                    nn.Linear(64, 10),
                ),
                lt.Chain(
                    *(lt.Conv((3, 3), 3, 32, padding=1), lt.BatchNorm(32, name), lt.MaxPool((2, 2))),
                    *(lt.Conv((3, 3), 32, 64, padding=1), lt.BatchNorm(64, name), lt.MaxPool((2, 2))),
                    *(lt.Conv((3, 3), 64, 64, padding=1), lt.BatchNorm(64, name), mean_over_pixels),
                    lt.Dense(64, 10),
                ),
            )
        case "lstm":
            return (
                sequential(LastOutput(32, 64, batch_first=True), nn.Linear(64, 10)),
                lt.Chain(lt.Recurrence(lt.LSTMCell(32, 64)), lt.Dense(64, 10)),
            )
        case "transformer":
            block = {"dim_feedforward": 512, "dropout": 0.0}
            encoders = (nn.TransformerEncoderLayer(128, 4, batch_first=True, **block) for _ in range(2))
            layers = (lt.TransformerEncoderLayer(128, 4, **block) for _ in range(2))
            return (
                sequential(nn.Linear(32, 128), *encoders, MeanOver(1), nn.Linear(128, 10)),
                lt.Chain(lt.Dense(32, 128), *layers, mean_over_tokens, lt.Dense(128, 10)),
            )
        case "member":
            return (
                sequential(nn.Linear(20, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 1)),
                lt.Chain(lt.Dense(20, 64, name), lt.Dense(64, 64, name), lt.Dense(64, 1)),
            )
        case "small":
            return (
                sequential(nn.Linear(784, 256), act(), nn.Linear(256, 10)),
                lt.Chain(lt.Dense(784, 256, name), lt.Dense(256, 10)),
            )
        case "smooth":
            return (
                sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10)),
                lt.Chain(lt.Dense(784, 256, "tanh"), lt.Dense(256, 10)),
            )
        case "normed_mlp":
            widths = [32, *[256] * 5]
            return (
                sequential(
                    *(part for n in widths for part in (nn.Linear(n, 256), act(), nn.BatchNorm1d(256))),
                    nn.Linear(256, 10),
                ),
                lt.Chain(
                    *(part for n in widths for part in (lt.Dense(n, 256, name), lt.BatchNorm(256))),
                    lt.Dense(256, 10),
                ),
            )
        case "lenet":
            return (
                sequential(
                    *(nn.Conv2d(1, 6, 5), act(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), act(), nn.MaxPool2d(2)),
                    *(nn.Flatten(), nn.Linear(256, 120), act(), nn.Linear(120, 84), act(), nn.Linear(84, 10)),
                ),
                lt.Chain(
                    *(
                        lt.Conv((5, 5), 1, 6, name),
                        lt.MaxPool((2, 2)),
                        lt.Conv((5, 5), 6, 16, name),
                        lt.MaxPool((2, 2)),
                    ),
                    *(lt.FlattenLayer(), lt.Dense(256, 120, name), lt.Dense(120, 84, name), lt.Dense(84, 10)),
                ),
            )
        case "gru":
            return (
                sequential(GRU(32, 64), nn.Linear(64, 10)),
                lt.Chain(LuxGRU(lt.Dense(32, 192), lt.Dense(64, 192)), lt.Dense(64, 10)),
            )
        case "ode":
            return (
                Solved(sequential(nn.Linear(2, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 2))),
                LuxSolved(lt.Chain(lt.Dense(2, 64, name), lt.Dense(64, 64, name), lt.Dense(64, 2))),
            )
        case "equal":
            return Equal(64, problem.steps), lux_equal(64, problem.steps)
        case "dense":
            return sequential(nn.Linear(width, width), act()), lt.Chain(lt.Dense(width, width, name))
        case "conv":
            return (
                sequential(nn.Conv2d(width, width, 3, padding=1), act()),
                lt.Chain(lt.Conv((3, 3), width, width, name, padding=1)),
            )
    raise KeyError(problem.model)


def sequential(*modules: nn.Module) -> nn.Sequential:
    """Return modules in sequence under luxtorch's names, for which an activation belongs to the layer before it."""
    named: OrderedDict[str, nn.Module] = OrderedDict()
    number = 0
    for module in modules:
        if isinstance(module, tuple(ACTIVATIONS.values())):
            named[f"activation_{number}"] = module
        else:
            number += 1
            named[f"layer_{number}"] = module
    return nn.Sequential(named)


def torch_model(problem: Problem, data: Data, device: str) -> nn.Module:
    """Return the module with the problem's initial values."""
    module = models(problem, data)[0]
    values: dict[str, Any] = {}
    for name, value in tensors(data.ps, device).items():
        if "q_proj" in name:  # torch has queries, keys and values in one
            parts = [torch.as_tensor(data.ps[name.replace("q_proj", part)]) for part in ("q_proj", "k_proj", "v_proj")]
            values[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif isinstance(module, Equal):
            values |= {f"layers.{i}.{name}": part for i, part in enumerate(value)}
        elif isinstance(module, Solved):
            values[f"field.{name}"] = value
        elif "k_proj" not in name and "v_proj" not in name:
            last = name.rpartition(".")[2]
            recurrent = last.endswith(("_ih", "_hh"))
            values[f"{name}_l0" if recurrent else name] = value
    missing, unexpected = module.load_state_dict(values, strict=False)
    if unexpected or any(not name.endswith(("running_mean", "running_var", "tracked")) for name in missing):
        raise KeyError(f"missing {missing}, unexpected {unexpected}")
    return module.to(device)


def lux_model(problem: Problem, data: Data, device: str) -> tuple[lt.Layer, dict[str, Any], dict[str, Any]]:
    """Return the layer, the problem's initial parameters and the states."""
    layer = models(problem, data)[1]
    ps, st = lt.setup(0, layer)
    ps, st, _ = lt.load_weights(tensors(data.ps, "cpu") | lt.flatten_names(st), ps, st)
    return layer, *lt.to_device((ps, st), device)


def inputs(data: Data, device: str) -> tuple[Tensor, Tensor]:
    """Return inputs and targets on a device."""
    return torch.tensor(data.x, device=device), torch.tensor(data.y, device=device)


def tensors(arrays: dict[str, Any], device: str) -> dict[str, Tensor]:
    """Return arrays as tensors of their own on a device."""
    return {name: torch.tensor(array, device=device) for name, array in arrays.items()}
