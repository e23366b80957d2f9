"""Your first own layer
====================

luxtorch has no layer of radial basis functions. So we write one: with parameters, a
state, and a mode. Then it is put to the test, and into a model that tells two spirals
apart. Because a layer is a function, all transforms come for free: at the end nine such
models are trained as one.
"""

from pathlib import Path

import torch

import luxtorch as lt
from luxtorch import optim, training

STEPS, CENTRES, MODELS = 300, 24, 9

# %%
# The layer
# ---------
#
# A layer is a class derived from `lt.Layer`. Its fields are hyperparameters; it becomes
# a frozen dataclass by itself. No tensor is in it: `initial_parameters` and
# `initial_states` make them from a key, and the call gets them as `ps` and `st`. What
# it returns besides its output are the new states: here a running mean, which says how
# often each center is needed. As in BatchNorm it follows the batches in training mode,
# and stands still in test mode.


class RadialBasis(lt.Layer):
    """Say how near an input is to each of some centers: exp(-|x - c|^2 / (2 w^2))."""

    features: int
    centers: int
    momentum: float = 0.05

    def initial_parameters(self, key):
        return {
            "center": lt.random.normal(key, (self.centers, self.features)),
            "log_width": torch.full((self.centers,), -1.0, device=key.device),
        }

    def initial_states(self, key):
        return {
            "usage": torch.zeros(self.centers, device=key.device),
            "training": lt.Static(True),
        }

    def __call__(self, x, ps, st):
        distance = (x[:, None, :] - ps["center"]).square().sum(-1)
        y = torch.exp(-0.5 * distance * torch.exp(-2 * ps["log_width"]))
        if st["training"]:
            usage = torch.lerp(st["usage"], y.detach().mean(0), self.momentum)
            st = {**st, "usage": usage}
        return y, st


layer = RadialBasis(2, 3)
print(layer)
ps, st = lt.setup(0, layer)
y, st = layer(torch.zeros(4, 2), ps, st)
print(y.shape, st["usage"])

# %%
# Is it right?
# ------------
#
# `check_layer` calls it in both modes, differentiates it in both directions, vmaps it
# over inputs and over models, compiles it, watches whether it changes what it was
# given, and misspells its parameters. It raises where something is wrong, and says
# what.

points = lt.random.normal(lt.random.key(1), (4, 2))
lt.testing.check_layer(layer, points, backend="aot_eager")
print("all laws hold")

# %%
# A mistake that is easily made: to keep the states by changing them.


class Careless(RadialBasis):
    """Change the state that was given instead of returning a new one."""

    def __call__(self, x, ps, st):
        y, new = super().__call__(x, ps, st)
        st["usage"].copy_(new["usage"])
        return y, st


try:
    lt.testing.check_layer(Careless(2, 3), torch.zeros(4, 2), backend="aot_eager")
except lt.testing.LawError as error:
    print(error)
else:
    raise AssertionError("nobody noticed")

# %%
# Two spirals
# -----------
#
# The layer goes where all layers go. A `TrainState` holds model, parameters, states and
# optimizer; a step returns a new one.


def spirals(key, count):
    """Return points on two spirals, (2 * count, 2), and which of them each is on."""
    place, noise = lt.random.split(key)
    radius = lt.random.uniform(place, (count,), low=0.2, high=2.0)
    direction = torch.stack([torch.cos(3 * radius), torch.sin(3 * radius)], -1)
    arm = radius[:, None] * direction
    points = torch.cat([arm, -arm])
    points = points + 0.05 * lt.random.normal(noise, points.shape)
    return points, torch.arange(2).repeat_interleave(count)


x, y = spirals(lt.random.key(2), 200)
model = lt.Chain(RadialBasis(2, CENTRES), lt.Dense(CENTRES, 2))
ts = training.TrainState(model, *lt.setup(0, model), optim.Adam(0.03))
for step in range(STEPS):
    _, loss, _, ts = training.single_train_step(lt.CrossEntropyLoss(), (x, y), ts)
    if step % (STEPS // 4) == 0:
        print(f"step {step:3d}, loss {loss:.3f}")

x_test, y_test = spirals(lt.random.key(3), 500)
logits, _ = model(x_test, ts.parameters, lt.test_mode(ts.states))
accuracy = float((logits.argmax(1) == y_test).float().mean())
print(f"accuracy on new points: {accuracy:.3f}")
assert accuracy > 0.9, "it has not learned the spirals"

# %%
# Nine at once
# ------------
#
# Nobody told the layer about batches of models. `lt.Ensemble` makes one layer of nine,
# each with initial values of its own, by `torch.vmap` over parameters and states: the
# loss is the sum of theirs, so each learns by itself.

ensemble = lt.Ensemble(model, MODELS)


def of_all(ensemble, ps, st, data):
    """Return the sum of the losses of all models."""
    x, y = data
    logits, st = ensemble(x, ps, st)
    return torch.vmap(lt.CrossEntropyLoss(), in_dims=(0, None))(logits, y).sum(), st, {}


many = training.TrainState(ensemble, *lt.setup(1, ensemble), optim.Adam(0.03))
for _ in range(STEPS):
    _, loss, _, many = training.single_train_step(of_all, (x, y), many)
logits, _ = ensemble(x_test, many.parameters, lt.test_mode(many.states))
each = (logits.argmax(-1) == y_test).float().mean(-1)
together = float((logits.softmax(-1).mean(0).argmax(-1) == y_test).float().mean())
print(f"accuracy of each: {', '.join(f'{one:.3f}' for one in each)}; ", end="")
print(f"of all together: {together:.3f}")
assert together >= float(each.median())

# %%
# Picture
# -------
#
# Left the one model: circles are its centers, as wide as they reach, and the darker the
# more they are used. Right the nine: where they disagree, the color is pale.

try:
    import matplotlib
except ImportError:
    print("no picture: matplotlib is not installed")
else:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    line = torch.linspace(-2.6, 2.6, 140)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        one = model(grid, ts.parameters, lt.test_mode(ts.states))[0].softmax(-1)[:, 1]
        nine = ensemble(grid, many.parameters, lt.test_mode(many.states))[0]
        nine = nine.softmax(-1)[..., 1].mean(0)
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
    for axis, p, title in zip(
        axes, (one, nine), ("one model", f"{MODELS} models"), strict=True
    ):
        axis.contourf(
            line,
            line,
            p.reshape(len(line), -1).T,
            levels=20,
            cmap="RdBu",
            vmin=0,
            vmax=1,
            alpha=0.6,
        )
        axis.scatter(*x.T, c=y, cmap="RdBu", edgecolors="black", linewidths=0.4, s=14)
        axis.set(
            title=title,
            aspect="equal",
            xlim=(-2.6, 2.6),
            ylim=(-2.6, 2.6),
            xticks=[],
            yticks=[],
        )
    centers, states = ts.parameters["layer_1"], ts.states["layer_1"]
    usage = states["usage"] / states["usage"].max()
    for center, width, used in zip(
        centers["center"], centers["log_width"].exp(), usage, strict=True
    ):
        axes[0].add_patch(
            plt.Circle(
                center.tolist(),
                float(width),
                fill=False,
                lw=1.2,
                alpha=0.15 + 0.85 * float(used),
            )
        )
    path = Path(__file__).resolve().parent / "output" / "own_layer.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")
