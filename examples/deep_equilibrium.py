"""A deep equilibrium model that completes digits
==============================================

Half of the pixels of a digit are hidden, and a network says what they were. Its layer
is called again and again, until its output does not change any more: as deep as each
batch needs, with the parameters of one layer. `lt.fixed_point` finds where that ends,
and differentiates the equation that holds there, not the steps: nothing of them is kept
in memory. The idea is that of Bai, Kolter and Koltun, "Deep equilibrium models", 2019.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits

import luxtorch as lt
from luxtorch import optim, training

STEPS, BATCH, WIDTH = 600, 64, 128

# %%
# Data
# ----
#
# A network gets an image in which pixels are zero, and a second one that is one where
# they are hidden.

images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
test, train = images[:297], images[297:]


def hide(key, images):
    """Return images with half of the pixels hidden, and which these are."""
    mask = lt.random.bernoulli(key, 1 / 2, images.shape).to(images.dtype)
    return torch.stack([images * (1 - mask), mask], 1)


# %%
# Model
# -----
#
# The state z begins with zeros, and z = tanh(W z + u) is where it ends, of which u is
# what the first layer makes of the input. What is differentiated, `ps` and `u`, is
# passed on as operands.


class Equilibrium(lt.WrapperLayer):
    """A layer that is called until its output stays what it is."""

    layer: lt.Layer

    def __call__(self, u, ps, st):
        def f(z, ps, u):
            return torch.tanh(0.9 * self.layer(z, ps, st)[0] + u)

        z = lt.fixed_point(f, torch.zeros_like(u), ps, u)
        return z, self.layer(z, ps, st)[1]


again = lt.SpectralNorm(lt.Dense(WIDTH, WIDTH))
model = lt.Chain(
    lt.FlattenLayer(), lt.Dense(128, WIDTH), Equilibrium(again), lt.Dense(WIDTH, 64)
)
print(model)

# %%
# Training
# --------
#
# A batch is one vector of 64 x 128 numbers: too many for a Jacobian, so the equations
# of the derivative are solved by products with it alone.


def loss(model, ps, st, data):
    """Return the mean squared error."""
    x, y = data
    guess, st = model(x, ps, st)
    return (guess.view_as(y) - y).square().mean(), st, {}


rule = optim.Adam(optim.cosine(5e-3, 0.0, STEPS))
ts = training.TrainState(model, *lt.setup(0, model), rule)
for key in (bar := training.progress(lt.random.split(lt.random.key(1), STEPS))):
    which, what = lt.random.split(key)
    y = train[lt.random.randint(which, (BATCH,), 0, len(train))]
    x = hide(what, y)
    _, value, _, ts = training.single_train_step(loss, (x, y), ts)
    bar.show(loss=value)
ps, st = ts.parameters, lt.test_mode(ts.states)

# %%
# What it has learnt, on digits that it has not seen, and what one learns who always
# guesses the mean.

x_test = hide(lt.random.key(2), test)
hidden = x_test[:, 1] > 0
with torch.no_grad():
    guess = model(x_test, ps, st)[0].view_as(test)


def off(guess):
    """Return the error in what is hidden."""
    return (guess - test)[hidden].square().mean().sqrt().item()


errors = off(guess), off(train.mean(0).expand_as(test))
print(f"it is off by {errors[0]:.3f}, the mean digit by {errors[1]:.3f}")
assert errors[0] < 0.85 * errors[1], "the network is hardly better than the mean digit"

# %%
# The derivative of an equation
# -----------------------------
#
# A loop of so many steps that nothing changes any more has the same gradient, and keeps
# all its steps in memory.


def states(ps, x, number):
    """Return the first states z of a loop, which ends near the equilibrium."""
    u, _ = model.layer_2(x.flatten(1), ps["layer_2"], st["layer_2"])
    zs = [torch.zeros_like(u)]
    for _ in range(number):
        zs.append(torch.tanh(0.9 * again(zs[-1], ps["layer_3"], st["layer_3"])[0] + u))
    return zs


def decoded(z, ps):
    """Return the images of states."""
    return model.layer_4(z, ps["layer_4"], st["layer_4"])[0].view(-1, 8, 8)


def of_loop(ps, number):
    """Return the loss after some steps of a loop."""
    return (decoded(states(ps, x_test, number)[-1], ps) - test).square().mean()


def flat_gradient(f):
    return lt.ComponentVector(lt.gradient(f, ps)).flat


exact = flat_gradient(lambda ps: loss(model, ps, st, (x_test, test))[0])
numbers = range(1, 17)
gradients = torch.stack(
    [flat_gradient(lambda ps, number=number: of_loop(ps, number)) for number in numbers]
)
distances = (gradients - exact).norm(dim=1) / exact.norm()
for number in (1, 4, 16):
    print(
        f"the gradient through {number:2} steps differs "
        f"by {distances[number - 1]:.0e} from that of the equation"
    )
assert distances[-1] < 1e-3, "the gradient is not that of the loop"

# %%
# Picture
# -------

try:
    import matplotlib
except ImportError:
    print("no picture: matplotlib is not installed")
else:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12.5, 4.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.2, 1))
    shown = torch.arange(10, 20)
    with torch.no_grad():
        zs = states(ps, x_test[shown], 2)
        rows = {
            "what it sees": x_test[shown, 0].where(x_test[shown, 1] == 0, torch.nan),
            "one step": decoded(zs[1], ps),
            "two steps": decoded(zs[2], ps),
            "equilibrium": guess[shown],
            "what it was": test[shown],
        }
    colors = matplotlib.colormaps["gray_r"].with_extremes(bad="lightsteelblue")
    for axes, (name, row) in zip(
        left.subplots(len(rows), len(shown)), rows.items(), strict=True
    ):
        for axis, image in zip(axes, row, strict=True):
            axis.imshow(image.numpy(), cmap=colors, vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
    with torch.no_grad():
        *zs, end = states(ps, x_test, 60)
    axis = right.subplots()
    axis.semilogy(
        numbers, [(z - end).norm() / end.norm() for z in zs[1:17]], "o-", label="state"
    )
    axis.semilogy(numbers, distances, "o-", label="gradient")
    axis.set(
        xlabel="steps of a loop",
        xticks=range(0, 17, 4),
        title="Distance from those of the equation",
    )
    axis.legend()
    path = Path(__file__).resolve().parent / "output" / "deep_equilibrium.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
