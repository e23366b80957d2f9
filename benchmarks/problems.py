"""The problems: what they are called, and their data and initial values as arrays, the same in every process.

This file needs numpy alone, since both environments read it. Parameters have the names that luxtorch gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]

LR = 1e-5
"""Small, so that rounding decides nothing in four steps, and no loss is at zero after thousands.

A step of Adam goes the further, the more parameters there are: models of millions have a tenth of it.
"""

ODE_STEPS = 200
HEADS = 4
"""The heads of each transformer's attention."""

RESNET = ((64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512))
"""The channels of ResNet-18's blocks, before and after; where they grow, the image becomes smaller by the same."""

INNER_STEPS, INNER_LR = 5, 0.01
"""The gradient descent of W19 on each task."""


class Data(NamedTuple):
    """Hold initial parameters by name, inputs, targets, and what else a problem needs, by name."""

    ps: Arrays
    x: np.ndarray
    y: np.ndarray
    others: Mapping[str, np.ndarray] = MappingProxyType({})


class LeftOut(Exception):
    """Say why a candidate is not timed; a row of the report says it."""


class Problem(NamedTuple):
    """Describe a problem.

    Attributes:
        name: What `ONLY` selects it by.
        title: One line for the report.
        family: Which file of `torch_rows` and `jax_rows` has its candidates.
        model: Which model in `models.py` it takes.
        make: Draws its data from a generator.
        loss: "cross entropy", "mean square" or "sum of squares".
        optimizer: "Adam" or "SGD", with the learning rate `lr`.
        activation: The activation of layers that leave it open.
        main: Whether it runs when nothing was selected.
        lr: The learning rate.
        steps: How many times a loop in it runs its body, or how many equal layers it has.
    """

    name: str
    title: str
    family: str
    model: str
    make: Callable[[np.random.Generator], Data]
    loss: str = "cross entropy"
    optimizer: str = "Adam"
    activation: str = "relu"
    main: bool = True
    lr: float = LR
    steps: int = 1

    def data(self) -> Data:
        """Return the data and initial values, always the same."""
        return self.make(np.random.default_rng(0))


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def _glorot(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    kernel = int(np.prod(shape[2:]))
    bound = (6 / (kernel * (shape[0] + shape[1]))) ** 0.5
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def _weights(rng: np.random.Generator, name: str, *shape: int) -> Arrays:
    return {f"{name}.weight": _glorot(rng, shape), f"{name}.bias": 0.1 * _normal(rng, shape[0])}


def _norm(name: str, size: int) -> Arrays:
    return {f"{name}.weight": np.ones(size, np.float32), f"{name}.bias": np.zeros(size, np.float32)}


def _mlp(rng: np.random.Generator, *widths: int) -> Arrays:
    ps: Arrays = {}
    for number, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False), 1):
        ps |= _weights(rng, f"layer_{number}", outputs, inputs)
    return ps


def _classes(rng: np.random.Generator, batch: int, classes: int = 10) -> np.ndarray:
    return rng.integers(classes, size=batch)


def _tiny(rng: np.random.Generator) -> Data:
    return Data(_weights(rng, "layer_1", 5, 10), _normal(rng, 20, 10), _normal(rng, 20, 5))


def _perceptron(batch: int, *widths: int) -> Callable[[np.random.Generator], Data]:
    return lambda rng: Data(_mlp(rng, *widths), _normal(rng, batch, widths[0]), _classes(rng, batch))


def _deep(rng: np.random.Generator) -> Data:
    return Data(_mlp(rng, *[32] * 51), _normal(rng, 32, 32), _normal(rng, 32, 32))


def _cnn(rng: np.random.Generator) -> Data:
    ps = _weights(rng, "layer_1", 32, 3, 3, 3) | _norm("layer_2", 32)
    ps |= _weights(rng, "layer_4", 64, 32, 3, 3) | _norm("layer_5", 64)
    ps |= _weights(rng, "layer_7", 64, 64, 3, 3) | _norm("layer_8", 64)
    return Data(ps | _weights(rng, "layer_10", 10, 64), _normal(rng, 32, 3, 32, 32), _classes(rng, 32))


def _resnet(rng: np.random.Generator) -> Data:
    """Return W16: ResNet-18 as it is for small images, with 3x3 kernels in the first layer and no maximum after it."""

    def normed(name: str, number: int, *shape: int) -> Arrays:
        weight = {f"{name}layer_{number}.weight": _glorot(rng, shape)}
        return weight | _norm(f"{name}layer_{number + 1}", shape[0])

    ps = normed("", 1, 64, 3, 3, 3)
    for number, (before, after) in enumerate(RESNET, 3):
        for part, shape in ((1, (after, before, 3, 3)), (3, (after, after, 3, 3))):
            ps |= normed(f"layer_{number}.layer_1.", part, *shape)
        ps |= normed(f"layer_{number}.layer_2.", 1, after, before, 1, 1) if before != after else {}
    return Data(ps | _weights(rng, "layer_12", 10, 512), _normal(rng, 8, 3, 32, 32), _classes(rng, 8))


def _lstm(hidden: int, steps: int) -> Callable[[np.random.Generator], Data]:
    def make(rng: np.random.Generator) -> Data:
        ps = {f"layer_1.weight_{to}": _glorot(rng, (4 * hidden, n)) for to, n in (("ih", 32), ("hh", hidden))}
        ps |= {f"layer_1.bias_{to}": 0.1 * _normal(rng, 4 * hidden) for to in ("ih", "hh")}
        return Data(ps | _weights(rng, "layer_2", 10, hidden), _normal(rng, 32, steps, 32), _classes(rng, 32))

    return make


def _transformer(layers: int, width: int, batch: int) -> Callable[[np.random.Generator], Data]:
    def make(rng: np.random.Generator) -> Data:
        ps = _weights(rng, "layer_1", width, 32)
        for layer in (f"layer_{number + 2}" for number in range(layers)):
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                ps |= _weights(rng, f"{layer}.self_attn.{name}", width, width)
            ps |= _weights(rng, f"{layer}.linear1", 4 * width, width) | _weights(
                rng, f"{layer}.linear2", width, 4 * width
            )
            ps |= _norm(f"{layer}.norm1", width) | _norm(f"{layer}.norm2", width)
        ps |= _weights(rng, f"layer_{layers + 3}", 10, width)
        return Data(ps, _normal(rng, batch, 64, 32), _classes(rng, batch))

    return make


def _ensemble(rng: np.random.Generator) -> Data:
    members = [_mlp(rng, 20, 64, 64, 1) for _ in range(32)]
    ps = {name: np.stack([member[name] for member in members]) for name in members[0]}
    return Data(ps, _normal(rng, 64, 20), _normal(rng, 64, 1))


def _many_tensors(rng: np.random.Generator) -> Data:
    ps = {f"tensor_{i}": _normal(rng, 1_000 if i < 300 else 1_000_000) for i in range(304)}
    return Data(ps, np.zeros(0, np.float32), np.zeros(0, np.float32))


def _normed_mlp(rng: np.random.Generator) -> Data:
    ps: Arrays = {}
    for number in range(6):
        ps |= _weights(rng, f"layer_{2 * number + 1}", 256, 256 if number else 32) | _norm(
            f"layer_{2 * number + 2}", 256
        )
    return Data(ps | _weights(rng, "layer_13", 10, 256), _normal(rng, 256, 32), _classes(rng, 256))


def _lenet(batch: int) -> Callable[[np.random.Generator], Data]:
    def make(rng: np.random.Generator) -> Data:
        ps = _weights(rng, "layer_1", 6, 1, 5, 5) | _weights(rng, "layer_3", 16, 6, 5, 5)
        for name, outputs, inputs in (("layer_6", 120, 256), ("layer_7", 84, 120), ("layer_8", 10, 84)):
            ps |= _weights(rng, name, outputs, inputs)
        return Data(ps, _normal(rng, batch, 1, 28, 28), _classes(rng, batch))

    return make


def _gru(steps: int) -> Callable[[np.random.Generator], Data]:
    """Return W11: a GRU cell that was written by hand, 32 inputs, 64 hidden; classes from the mean of its outputs.

    Sequences are (time, batch, features). All outputs count, so that no gradient fades to denormal numbers, which would
    time the processor's microcode.
    """

    def make(rng: np.random.Generator) -> Data:
        ps = _weights(rng, "layer_1.input", 192, 32) | _weights(rng, "layer_1.hidden", 192, 64)
        return Data(ps | _weights(rng, "layer_2", 10, 64), _normal(rng, steps, 32, 32), _classes(rng, 32))

    return make


def _ode(rng: np.random.Generator) -> Data:
    """Return W12: a network that says how fast 64 points in the plane move, and where each is to be in the end.

    It is solved by rk4 in `ODE_STEPS` steps.
    """
    return Data(_mlp(rng, 2, 64, 64, 2), _normal(rng, 64, 2), _normal(rng, 64, 2))


def _grid_world(rng: np.random.Generator) -> Data:
    """Return W13: an update of proximal policy optimization, `ppo.py` in the rows.

    32 worlds of 6 x 6 cells for 128 steps, in which an agent has to find a goal; then 2 epochs of 4 minibatches. Random
    numbers differ between the libraries: what an update draws is data here, the same for each update. `moves` says
    where each of four moves leads from each cell, `places` has the first cells and goals, `noise` chooses the moves,
    `restarts` has cells and goals of new episodes, `orders` the minibatches.
    """
    worlds, steps, side, width = 32, 128, 6, 64
    cells = side * side
    ps = {name: _normal(rng, cells, width) for name in ("layer_1.layer_1.weight", "layer_1.layer_2.weight")}
    ps |= _weights(rng, "layer_3", width, width) | _weights(rng, "layer_4.layer_1", 4, width)
    ps |= _weights(rng, "layer_4.layer_2", 1, width)
    rows, columns = np.divmod(np.arange(cells), side)
    ways = ((-1, 0), (0, 1), (1, 0), (0, -1))
    moves = [(rows + i).clip(0, side - 1) * side + (columns + j).clip(0, side - 1) for i, j in ways]
    return Data(
        ps,
        np.zeros(0, np.float32),
        np.zeros(0, np.float32),
        {
            "moves": np.stack(moves, 1).reshape(-1),
            "places": rng.integers(cells, size=(worlds, 2)),
            "noise": rng.gumbel(size=(steps, worlds, 4)).astype(np.float32),
            "restarts": rng.integers(cells, size=(steps, worlds, 2)),
            "orders": np.concatenate([rng.permutation(worlds * steps).reshape(4, -1) for _ in range(2)]),
        },
    )


def _equal(rng: np.random.Generator) -> Data:
    """Return W14: 100 equal layers, each with a connection around it, and their parameters stacked."""
    layers = [_weights(rng, "layer", 64, 64) for _ in range(100)]
    ps = {name: np.stack([layer[f"layer.{name}"] for layer in layers]) for name in ("weight", "bias")}
    return Data(ps, _normal(rng, 32, 64), _normal(rng, 32, 64))


def _sine_waves(rng: np.random.Generator) -> Data:
    """Return W19: 8 sine waves as Finn et al. (2017) draw them, 10 points to adapt to each and 10 to judge by."""
    amplitude, phase = rng.uniform(0.1, 5, (8, 1, 1, 1)), rng.uniform(0, np.pi, (8, 1, 1, 1))
    x = rng.uniform(-5, 5, (8, 2, 10, 1))
    return Data(_mlp(rng, 1, 40, 40, 1), x.astype(np.float32), (amplitude * np.sin(x - phase)).astype(np.float32))


def _layer(inputs: tuple[int, ...], *weight: int) -> Callable[[np.random.Generator], Data]:
    return lambda rng: Data(_weights(rng, "layer_1", *weight), _normal(rng, *inputs), np.zeros(0, np.float32))


_SMALL = _perceptron(64, 784, 256, 10)
_ACTIVATIONS = ("identity", "relu", "gelu")

_ALL = [
    Problem("W1", "tiny: Dense(10, 5), 20 samples, SGD", "training", "tiny", _tiny, "sum of squares", "SGD"),
    Problem("W2", "MLP 784-512-512-10, batch 128, Adam", "training", "mlp", _perceptron(128, 784, 512, 512, 10)),
    Problem("W3", "deep and narrow: 50 x Dense(32, 32), batch 32, Adam", "training", "deep", _deep, "mean square"),
    Problem("W4", "CNN with BatchNorm, 3x32x32, batch 32, Adam", "training", "cnn", _cnn),
    Problem("W5", "LSTM 64, 100 steps, batch 32, Adam", "training", "lstm", _lstm(64, 100)),
    Problem("W6", "ensemble of 32 MLPs 20-64-64-1, Adam", "ensemble", "member", _ensemble, "mean square"),
    Problem("W7", "per-sample gradients, MLP 784-256-10, batch 64", "per_sample", "small", _SMALL),
    Problem("W8", "Hessian-vector product, MLP 784-256-10, batch 64", "hvp", "smooth", _SMALL),
    Problem("W9", "Adam's update alone: 300 tensors of 1e3, 4 of 1e6", "adam", "", _many_tensors),
    Problem(
        "W10",
        f"transformer: 2 layers, 128 wide, {HEADS} heads, 64 tokens, batch 16",
        "training",
        "transformer",
        _transformer(2, 128, 16),
        steps=2,
    ),
    *(
        Problem(
            f"W11-{steps}",
            f"GRU cell of one's own, 64 hidden, {steps} steps, batch 32, Adam",
            "loops",
            "gru",
            _gru(steps),
            steps=steps,
        )
        for steps in (100, 1_000, 10_000)
    ),
    Problem(
        "W12",
        f"neural ODE 2-64-64-2, rk4, {ODE_STEPS} steps, batch 64, Adam",
        "loops",
        "ode",
        _ode,
        "mean square",
        activation="tanh",
        steps=ODE_STEPS,
    ),
    Problem("W13", "PPO: 32 grid worlds, 128 steps, 8 minibatches, Adam", "ppo", "", _grid_world, steps=128),
    Problem(
        "W14",
        "100 equal layers: x + Dense(64, 64, tanh), batch 32, Adam",
        "loops",
        "equal",
        _equal,
        "mean square",
        activation="tanh",
        steps=100,
    ),
    Problem(
        "W15",
        f"BERT-like encoder: 6 layers, 256 wide, {HEADS} heads, 64 tokens, batch 8, Adam",
        "training",
        "transformer",
        _transformer(6, 256, 8),
        activation="gelu",
        lr=1e-6,
        steps=6,
    ),
    Problem("W16", "ResNet-18, 3x32x32, batch 8, Adam", "training", "resnet", _resnet, lr=1e-6),
    Problem("W17", "per-sample gradients, CNN with GroupNorm, 3x32x32, batch 32", "per_sample", "group_cnn", _cnn),
    Problem("W18", "per-sample gradients, LSTM 32, 50 steps, batch 32", "per_sample", "lstm", _lstm(32, 50)),
    Problem(
        "W19",
        f"MAML: {INNER_STEPS} inner steps on 8 sine waves, MLP 1-40-40-1, Adam",
        "maml",
        "sine",
        _sine_waves,
        "mean square",
        steps=INNER_STEPS,
    ),
    *(
        Problem(
            f"B1-{width}-{activation}-{part}",
            f"Lux's Dense({width}, {width}, {activation}), batch 128, {part}",
            f"layer_{part}",
            "dense",
            _layer((128, width), width, width),
            activation=activation,
            main=activation == "relu",
        )
        for width in (16, 128, 512)
        for activation in _ACTIVATIONS
        for part in ("forward", "gradient")
    ),
    *(
        Problem(
            f"B2-{channels}-{activation}-{part}",
            f"Lux's Conv((3, 3), {channels}, {channels}, {activation}), 64x64, batch 128, {part}",
            f"layer_{part}",
            "conv",
            _layer((128, channels, 64, 64), channels, channels, 3, 3),
            activation=activation,
            main=activation == "relu" and channels in (2, 32),
        )
        for channels in (2, 4, 32, 64)
        for activation in _ACTIVATIONS
        for part in ("forward", "gradient")
    ),
    *(
        Problem(
            f"B4-{activation}",
            f"Lux's MLP of 7 layers with BatchNorm, {activation}, 32x256, Adam",
            "training",
            "normed_mlp",
            _normed_mlp,
            activation=activation,
            main=activation == "relu",
        )
        for activation in ("tanh", "relu", "gelu")
    ),
    *(
        Problem(
            f"B5-{batch}", f"Lux's LeNet, batch {batch}, Adam", "training", "lenet", _lenet(batch), main=batch == 64
        )
        for batch in (32, 64, 128)
    ),
]

PROBLEMS = {problem.name: problem for problem in _ALL}
