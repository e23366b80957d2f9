"""Learning to learn sine waves
============================

Model-agnostic meta-learning (MAML) looks for parameters from which one gradient step on
five points fits a new task. Its loss is a function of parameters *after* a gradient
step, so its gradient goes through a gradient, for many tasks at once. With a model that
is a function of its parameters this is a gradient inside of a `vmap` inside of a
gradient, and each is written down as it is said.

The tasks are those of Finn, Abbeel and Levine, "Model-agnostic meta-learning for fast
adaptation of deep networks", 2017: sine waves of any amplitude between 0.1 and 5, and
of any phase.
"""

from pathlib import Path

import torch

import luxtorch as lt
from luxtorch import optim, training

STEPS, TASKS, SHOTS, RATE = 6000, 25, 5, 0.01

# %%
# Tasks
# -----
#
# A key stands for a batch of tasks: the same key draws the same waves, here, inside of
# a compiled step, and tomorrow.


def draw(key, tasks, shots):
    """Return points of some waves: x and y, each of shape (tasks, shots, 1)."""
    of_amplitude, of_phase, of_x = lt.random.split(key, 3)
    amplitude = lt.random.uniform(of_amplitude, (tasks, 1, 1)) * 4.9 + 0.1
    phase = lt.random.uniform(of_phase, (tasks, 1, 1)) * torch.pi
    x = lt.random.uniform(of_x, (tasks, shots, 1)) * 10 - 5
    return x, amplitude * torch.sin(x - phase)


# %%
# Two ways to train one model
# ---------------------------
#
# Both start from the same parameters, a ComponentVector: one can write
# `ps - RATE * gradient` then.

model = lt.Chain(lt.Dense(1, 40, "relu"), lt.Dense(40, 40, "relu"), lt.Dense(40, 1))
ps, st = lt.setup(0, model)
start = lt.ComponentVector(ps)


def error(ps, x, y):
    """Return the mean squared error."""
    y_hat, _ = model(x, ps, st)
    return (y_hat - y).square().mean()


def descend(ps, x, y, rate=RATE):
    """Return the parameters after one step of gradient descent."""
    return ps - rate * lt.gradient(lambda ps: error(ps, x, y), ps)


def meta_loss(ps, x, y):
    """Return the error on half of a task's points, after a step on the others."""

    def of_task(x, y):
        return error(descend(ps, x[:SHOTS], y[:SHOTS]), x[SHOTS:], y[SHOTS:])

    return torch.vmap(of_task)(x, y).mean()


# %%
# The other way is the usual one: `error` itself, over the points of all tasks. A
# training step is a pure function of the parameters, the optimizer's state and a key;
# `lt.jit` makes one graph of it, second derivatives included.


def train(loss, name):
    """Return what Adam finds for a loss of tasks that are drawn anew in each step."""

    @lt.jit
    def step(opt_state, ps, key):
        x, y = draw(key, TASKS, 2 * SHOTS)
        value, grads = lt.withgradient(lambda ps: loss(ps, x, y), ps)
        return *optim.update(opt_state, ps, grads), value

    opt_state, ps = optim.setup(optim.Adam(1e-3), start), start
    for i in (bar := training.progress(range(STEPS), desc=name)):
        key = lt.random.fold_in(lt.random.key(1), i)
        opt_state, ps, value = step(opt_state, ps, key)
        bar.show(loss=value)
    return ps


found = {
    "meta-learning": train(meta_loss, "meta-learning"),
    "joint training": train(error, "joint training"),
}

# %%
# New tasks
# ---------
#
# Of 500 waves that nobody has seen, five points are given. Both models go on by plain
# gradient descent on these, and are measured on 200 others. The rate that the one was
# trained for is too high for the other, which was trained for none: it gets the best of
# three, chosen with hindsight.

x, y = draw(lt.random.key(2), 500, SHOTS + 200)
NUMBER = 200


def adapt(ps, rate=RATE):
    """Return the errors of each task after 0, 1, 2, ... steps: (steps, tasks)."""
    many = ps.flat.expand(len(x), -1)

    def named(flat):
        return lt.ComponentVector.from_flat(flat, start.axes)

    @lt.jit(backend="replay")
    def step(many):
        each = torch.vmap(lambda flat, x, y: descend(named(flat), x, y, rate).flat)
        return each(many, x[:, :SHOTS], y[:, :SHOTS])

    measured = torch.vmap(lambda flat, x, y: error(named(flat), x, y))
    errors = [measured(many, x[:, SHOTS:], y[:, SHOTS:])]
    for _ in range(NUMBER):
        many = step(many)
        errors.append(measured(many, x[:, SHOTS:], y[:, SHOTS:]))
    return torch.stack(errors)


by_rate = {
    rate: adapt(found["joint training"], rate) for rate in (RATE, RATE / 3, RATE / 10)
}
best = min(by_rate, key=lambda rate: by_rate[rate][-1].mean().nan_to_num(torch.inf))
errors = {
    "meta-learning": adapt(found["meta-learning"]),
    "joint training": by_rate[best],
}
for name, by_step in errors.items():
    means = "   ".join(
        f"{n}: {by_step[n].mean():.3f}" for n in (0, 1, 5, 10, 50, NUMBER)
    )
    print(f"{name:15} mean squared error after steps   {means}")
after_one = errors["meta-learning"][1].mean()
after_many = errors["joint training"].mean(1).min()
print(
    f"one step after meta-learning: {after_one:.3f}, "
    f"the best of {NUMBER} after joint training: {after_many:.3f}"
)
assert after_one < after_many / 2, "one step is no better than many from the joint ones"

# %%
# Is that the gradient?
# ---------------------
#
# A derivative of a derivative is easily lost. In double precision, along a random
# direction, the gradient of the meta loss is what the differences of its values say.

exact = found["meta-learning"].to(torch.float64)
few = [points[:TASKS, : 2 * SHOTS].double() for points in (x, y)]
flat = lt.random.normal(lt.random.key(3), (exact.numel(),), dtype=torch.float64)
direction = lt.ComponentVector.from_flat(flat, exact.axes)
slope = lt.gradient(lambda ps: meta_loss(ps, *few), exact) @ direction
h = 1e-7
above, below = (meta_loss(exact + sign * h * direction, *few) for sign in (1, -1))
difference = (above - below) / (2 * h)
print(f"slope of the meta loss: {slope:.6f}, by differences: {difference:.6f}")
assert abs(slope - difference) < 1e-4 * abs(slope)

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

    colors = {"meta-learning": "tab:blue", "joint training": "tab:orange"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    grid = torch.linspace(-5, 5, 200)[:, None]
    amplitudes = y.abs().amax((1, 2))
    for axis, task in zip(
        axes, (amplitudes - 4).abs().topk(2, largest=False).indices, strict=False
    ):
        at = x[task, SHOTS:, 0].argsort()
        axis.plot(
            x[task, SHOTS:][at],
            y[task, SHOTS:][at],
            color="0.75",
            lw=5,
            label="the wave",
        )
        for name, steps, rate in (
            ("joint training", NUMBER, best),
            ("meta-learning", 0, 0),
            ("meta-learning", 10, RATE),
        ):
            ps = found[name]
            for _ in range(steps):
                ps = descend(ps, x[task, :SHOTS], y[task, :SHOTS], rate)
            label = f"{name}, {steps} step" + "s" * (steps != 1)
            axis.plot(
                grid,
                model(grid, ps, st)[0],
                "-" if steps else ":",
                color=colors[name],
                label=label,
            )
        axis.plot(
            x[task, :SHOTS], y[task, :SHOTS], "k^", ms=8, label="what is known of it"
        )
        axis.set(xlabel="x", ylim=(-6, 8))
    axes[0].legend(fontsize="small", loc="upper center", ncols=2)
    for name, by_step in errors.items():
        low, middle, high = torch.quantile(
            by_step, torch.tensor([0.25, 0.5, 0.75]), dim=1
        )
        axes[2].plot(middle, color=colors[name], label=f"{name}: median, quartiles")
        axes[2].fill_between(
            range(NUMBER + 1), low, high, color=colors[name], alpha=0.2, lw=0
        )
    axes[2].set(
        xlabel="gradient steps on five points",
        ylabel="mean squared error",
        title="500 new waves",
    )
    axes[2].set(xscale="symlog", yscale="log", xlim=(0, NUMBER))
    axes[2].legend(fontsize="small")
    path = Path(__file__).resolve().parent / "output" / "maml_sinusoid.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
