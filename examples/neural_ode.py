"""A neural ODE of hares and lynxes
================================

From 1900 to 1920 the Hudson's Bay Company counted the pelts of hares and of lynxes that
it bought. Two laws are fitted to them: the Lotka-Volterra equations with their four
constants, and a neural ODE, in which a network says how fast the two populations grow.
torchdiffeq integrates both. A right-hand side is a plain function that closes over
parameters: nothing has to be wrapped into a module, and a ComponentVector serves as
well as a dict.
"""

from pathlib import Path

import torch
from torchdiffeq import odeint, odeint_adjoint

import luxtorch as lt
from luxtorch import optim, training

STEPS, WINDOW, DECAY = 800, 5, 1e-3

# %%
# Data
# ----
#
# In thousands of pelts. What counts is by which factor a model is off, so that all is
# done with logarithms.

hares = [30, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22, 25.4]
hares += [27.1, 40.3, 57, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7]
lynxes = [4, 6.1, 9.8, 35.2, 59.4, 41.7, 19, 13, 8.3, 9.1]
lynxes += [7.4, 8, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6]
counted = torch.tensor([hares, lynxes], dtype=torch.float64).T.log()
years = torch.arange(21, dtype=torch.float64)
halves = torch.arange(41, dtype=torch.float64) / 2

# %%
# Two species, four constants
# ---------------------------
#
# Hares grow and are eaten, lynxes eat and starve. The four constants and the two
# numbers to begin with are a least squares problem; `optim.scipy_least_squares`
# differentiates through the solver. That is rk4, which steps from each time that it is
# asked for to the next, and so it is asked for halves of years.


def lotka_volterra(t, y, ps):
    """Return how fast the logarithms of both populations grow."""
    hares, lynxes = y.exp().unbind(-1)
    growth, eaten, starving, eating = ps["law"].exp()
    return torch.stack([growth - eaten * lynxes, eating * hares - starving], -1)


def solve(law, ps, times, **options):
    """Return the logarithms of both populations at some times."""
    return odeint(lambda t, y: law(t, y, ps), ps["start"], times, **options)


first = {
    "law": torch.tensor([0.5, 0.03, 0.5, 0.03], dtype=torch.float64).log(),
    "start": counted[0],
}
classic, _ = optim.scipy_least_squares(
    lambda ps: solve(lotka_volterra, ps, halves, method="rk4")[::2] - counted,
    lt.ComponentVector(first),
)
published = torch.tensor([0.545, 0.028, 0.803, 0.024], dtype=torch.float64)
names = ("growth", "eaten", "starving", "eating")
for name, constant, known in zip(names, classic.law.exp(), published, strict=True):
    print(f"{name:10} {constant:.3f}   published: {known:.3f}")
# Carpenter, "Predator-prey population dynamics: the Lotka-Volterra model in Stan",
# 2018.
error = (classic.law.exp() / published - 1).abs()
assert (error < 0.06).all(), "the constants are not those that are known"

# %%
# A network for a law
# -------------------
#
# Now a network says how fast both populations grow. A long oscillation is hard to fit
# from scratch: a law that is wrong soon gets out of step. So at first it is asked for
# the few years after each year, from where the data are then, all of these at once;
# then for the whole time from one beginning, which is a parameter, too.
#
# The steps of rk4 are known beforehand. So the whole training step is one graph for
# `lt.jit`: the solver, the gradient through it, and the optimizer.

model = lt.Chain(lt.Dense(2, 16, torch.tanh), lt.Dense(16, 2))
ps, st = lt.setup(0, model)
start = lt.ComponentVector({"law": ps, "start": counted[0]}, dtype=torch.float64)


def network(t, y, ps):
    """Return how fast the logarithms of both grow, according to the network."""
    slope, _ = model(y - counted.mean(0), ps["law"], st)
    return slope


windows = counted.unfold(0, WINDOW, 1).movedim(-1, 0)
first_halves = halves[: 2 * WINDOW - 1]


def loss_of_windows(ps):
    """Return the error over the years after each year, and a little weight decay."""

    def law(t, y):
        return network(t, y, ps)

    solution = odeint(law, windows[0], first_halves, method="rk4")[::2]
    return (solution - windows).square().mean() + DECAY * ps.law.flat.square().mean()


def loss_of_all(ps):
    """Return the error over all years, and a little weight decay."""
    solution = solve(network, ps, halves, method="rk4")[::2]
    return (solution - counted).square().mean() + DECAY * ps.law.flat.square().mean()


def fit(loss, ps, rule, name):
    """Return the parameters that an optimizer finds."""

    @lt.jit(backend="replay")
    def step(opt_state, ps):
        value, grads = lt.withgradient(loss, ps)
        return *optim.update(opt_state, ps, grads), value

    opt_state = optim.setup(rule, ps)
    for _ in (bar := training.progress(range(STEPS), desc=name)):
        opt_state, ps, value = step(opt_state, ps)
        bar.show(loss=value)
    return ps


rule = optim.Adam(optim.cosine(0.02, 0.0, STEPS))
neural = fit(loss_of_windows, start, rule, "a few years")
neural = fit(loss_of_all, neural, rule, "all years")


def off(law, ps):
    """Return by which factor a law is off, in the mean over all numbers."""
    with torch.no_grad():
        return (solve(law, ps, years) - counted).square().mean().sqrt().exp().item()


factors = off(lotka_volterra, classic), off(network, neural)
print(
    f"the equations are off by a factor of {factors[0]:.2f}, "
    f"the network by {factors[1]:.2f}"
)
assert factors[1] < factors[0], "the network is no better than four constants"

# %%
# Three ways to one gradient
# --------------------------
#
# Through the steps of rk4, through those that dopri5 chooses, and by the adjoint
# equation, which is solved backwards in time and needs no memory of the steps. The last
# wants to be told of the parameters: they are the leaves of the tree, of a
# ComponentVector its flat tensor.
#
# torchdiffeq's dopri5 and its adjoint are written for autograd's tape alone:
# `training.single_train_step`, `optim.minimize` and `optim.scipy_minimize` take their
# gradients there. `lt.gradient` and `lt.jit` go through the solvers of fixed steps.


def loss_by(solver, ps, **options):
    solution = solver(lambda t, y: network(t, y, ps), ps["start"], years, **options)
    return (solution - counted).square().mean()


leaf = neural.flat.detach().requires_grad_()
named = lt.ComponentVector.from_flat(leaf, neural.axes)
precise = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9}
fixed = lt.gradient(
    lambda ps: loss_by(odeint, ps, method="rk4", options={"step_size": 0.05}), neural
).flat
(adaptive,) = torch.autograd.grad(loss_by(odeint, named, **precise), leaf)
loss = loss_by(odeint_adjoint, named, **precise, adjoint_params=[leaf])
(adjoint,) = torch.autograd.grad(loss, leaf)
for name, gradient in {"rk4": fixed, "adjoint": adjoint}.items():
    difference = ((gradient - adaptive).norm() / adaptive.norm()).item()
    print(f"the gradient by {name} is that of dopri5, but for {difference:.0e}")
    assert difference < 1e-3

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

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, 4.6), layout="constrained", width_ratios=(1.5, 1)
    )
    times = torch.linspace(0, 20, 401, dtype=torch.float64)
    with torch.no_grad():
        curves = {
            ":": solve(lotka_volterra, classic, times).exp(),
            "-": solve(network, neural, times).exp(),
        }
    for i, (species, color) in enumerate(
        (("hares", "tab:brown"), ("lynxes", "tab:blue"))
    ):
        left.plot(1900 + years, counted[:, i].exp(), "o", color=color, label=species)
        for style, curve in curves.items():
            left.plot(1900 + times, curve[:, i], style, color=color)
    left.plot([], [], ":k", label="Lotka and Volterra")
    left.plot([], [], "-k", label="neural ODE")
    left.set(ylabel="thousands of pelts", xticks=range(1900, 1921, 5), ylim=(0, 95))
    left.legend(ncols=2)
    axes = [
        torch.linspace(low, high, 15, dtype=torch.float64)
        for low, high in ((1.8, 4.6), (1.2, 4.4))
    ]
    places = torch.cartesian_prod(*axes)
    with torch.no_grad():
        slopes = network(0.0, places, neural)
    right.quiver(
        *places.exp().T.numpy(),
        *slopes.T.numpy(),
        slopes.norm(dim=-1).numpy(),
        cmap="Greys",
        angles="uv",
        pivot="mid",
        width=0.004,
    )
    right.plot(*counted.exp().T, "o", color="tab:orange", label="counted")
    for style, curve in curves.items():
        right.plot(*curve.T, style, color="k" if style == ":" else "tab:green")
    right.set(
        xlabel="hares",
        ylabel="lynxes",
        xscale="log",
        yscale="log",
        title="The law that the network has learnt",
    )
    ticks = [5, 10, 20, 40, 80]
    right.set_xticks(ticks, ticks)
    right.set_yticks(ticks, ticks)
    right.minorticks_off()
    path = Path(__file__).resolve().parent / "output" / "neural_ode.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
