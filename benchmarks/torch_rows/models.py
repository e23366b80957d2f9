"""The models, as modules of torch.nn and as layers of luxtorch, side by side, and their losses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import luxtorch as lt

from ..problems import HEADS, RESNET, Data, LeftOut, Problem
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


class Block(nn.Module):
    """Be a block of a ResNet."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = after // before
        self.layer_1 = sequential(
            *(nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()),
            *(nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)),
        )
        around = (nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)) if stride > 1 else ()
        self.layer_2 = sequential(*around)

    def forward(self, x: Tensor) -> Tensor:
        """Return the image after two convolutions, with a connection around them."""
        return relu_of_sum(self.layer_1(x), self.layer_2(x))


def lux_block(before: int, after: int) -> lt.Layer:
    """Return the same for luxtorch."""
    stride = after // before
    inner = lt.Chain(
        *(lt.Conv((3, 3), before, after, stride=stride, padding=1, bias=False), lt.BatchNorm(after, "relu")),
        *(lt.Conv((3, 3), after, after, padding=1, bias=False), lt.BatchNorm(after)),
    )
    around = lt.Chain(lt.Conv((1, 1), before, after, stride=stride, bias=False), lt.BatchNorm(after))
    return lt.Parallel(relu_of_sum, inner, around if stride > 1 else lt.NoOpLayer())


def relu_of_sum(x: Tensor, y: Tensor) -> Tensor:
    """Return the positive part of a sum."""
    return torch.relu(x + y)


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
        case "cnn" | "group_cnn":
            batch = problem.model == "cnn"
            norm = nn.BatchNorm2d if batch else partial(nn.GroupNorm, 8)
            lux_norm = lt.BatchNorm if batch else partial(lt.GroupNorm, num_groups=8)
            return (
                sequential(
                    *(nn.Conv2d(3, 32, 3, padding=1), norm(32), act(), nn.MaxPool2d(2)),
                    *(nn.Conv2d(32, 64, 3, padding=1), norm(64), act(), nn.MaxPool2d(2)),
                    *(nn.Conv2d(64, 64, 3, padding=1), norm(64), act(), MeanOver(2, 3)),
                    nn.Linear(64, 10),
                ),
                lt.Chain(
                    *(lt.Conv((3, 3), 3, 32, padding=1), lux_norm(32, activation=name), lt.MaxPool((2, 2))),
                    *(lt.Conv((3, 3), 32, 64, padding=1), lux_norm(64, activation=name), lt.MaxPool((2, 2))),
                    *(lt.Conv((3, 3), 64, 64, padding=1), lux_norm(64, activation=name), mean_over_pixels),
                    lt.Dense(64, 10),
                ),
            )
        case "resnet":
            return (
                sequential(
                    *(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
                    *(Block(*channels) for channels in RESNET),
                    *(MeanOver(2, 3), nn.Linear(512, 10)),
                ),
                lt.Chain(
                    *(lt.Conv((3, 3), 3, 64, padding=1, bias=False), lt.BatchNorm(64, "relu")),
                    *(lux_block(*channels) for channels in RESNET),
                    *(mean_over_pixels, lt.Dense(512, 10)),
                ),
            )
        case "lstm":
            hidden = data.ps["layer_1.weight_hh"].shape[1]
            return (
                sequential(LastOutput(32, hidden, batch_first=True), nn.Linear(hidden, 10)),
                lt.Chain(lt.Recurrence(lt.LSTMCell(32, hidden)), lt.Dense(hidden, 10)),
            )
        case "transformer":
            width = len(data.ps["layer_1.weight"])
            block = {"dim_feedforward": 4 * width, "dropout": 0.0, "activation": name}
            encoders = (
                nn.TransformerEncoderLayer(width, HEADS, batch_first=True, **block) for _ in range(problem.steps)
            )
            layers = (lt.TransformerEncoderLayer(width, HEADS, **block) for _ in range(problem.steps))
            return (
                sequential(nn.Linear(32, width), *encoders, MeanOver(1), nn.Linear(width, 10)),
                lt.Chain(lt.Dense(32, width), *layers, mean_over_tokens, lt.Dense(width, 10)),
            )
        case "member":
            return (
                sequential(nn.Linear(20, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 1)),
                lt.Chain(lt.Dense(20, 64, name), lt.Dense(64, 64, name), lt.Dense(64, 1)),
            )
        case "sine":
            return (
                sequential(nn.Linear(1, 40), act(), nn.Linear(40, 40), act(), nn.Linear(40, 1)),
                lt.Chain(lt.Dense(1, 40, name), lt.Dense(40, 40, name), lt.Dense(40, 1)),
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


def require_traceable(problem: Problem) -> None:
    """Leave out a model that torch.compile cannot trace inside of torch.func."""
    if problem.model == "lstm":
        raise LeftOut("torch.compile does not trace nn.LSTM inside of torch.func")


def inputs(data: Data, device: str) -> tuple[Tensor, Tensor]:
    """Return inputs and targets on a device."""
    return torch.tensor(data.x, device=device), torch.tensor(data.y, device=device)


def tensors(arrays: dict[str, Any], device: str) -> dict[str, Tensor]:
    """Return arrays as tensors of their own on a device."""
    return {name: torch.tensor(array, device=device) for name, array in arrays.items()}
