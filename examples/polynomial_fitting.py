"""Fitting a polynomial
====================

A small network learns a parabola from noisy points: the shortest whole training run,
with a `TrainState`. It follows the example of the same name in the documentation of
Lux.jl.
"""

from pathlib import Path

import torch

import luxtorch as lt
from luxtorch import optim, training

# %%
# Data
# ----
#
# 128 points of a parabola, with noise. All randomness comes from one key.

noise_key, model_key = lt.random.split(lt.random.key(0))
x = torch.linspace(-2.0, 2.0, 128)[:, None]
y = x**2 - 2 * x + 0.1 * lt.random.normal(noise_key, x.shape)

# %%
# Model and training
# ------------------
#
# The training state holds the model's description, its parameters and states, and the
# optimizer. A step takes one state to the next; the old one stays what it was.

model = lt.Chain(lt.Dense(1, 16, torch.relu), lt.Dense(16, 1))
ts = training.TrainState(model, *lt.setup(model_key, model), optim.Adam(0.03))
objective = lt.losses.MSELoss()

first, losses = ts, []
for epoch in range(1, 251):
    _, loss, _, ts = training.single_train_step(objective, (x, y), ts)
    losses.append(float(loss))
    if epoch % 50 == 0 or epoch == 1:
        print(f"epoch {epoch:3d}  loss {losses[-1]:.4f}")

assert int(first.step) == 0 and int(ts.step) == 250  # nothing was changed in place

# %%
# Result
# ------

y_hat, _ = model(x, ts.parameters, lt.test_mode(ts.states))
error = float((y_hat - (x**2 - 2 * x)).square().mean())
print(f"mean squared error against the parabola itself: {error:.5f}")

try:
    import matplotlib
except ImportError:
    print("no picture: matplotlib is not installed")
else:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.scatter(x, y, s=12, alpha=0.5, label="data")
    axes.plot(x, x**2 - 2 * x, label="parabola")
    axes.plot(x, y_hat.detach(), "--", label="network")
    axes.set(xlabel="x", ylabel="y", title="A parabola from 128 noisy points")
    axes.legend()
    path = Path(__file__).resolve().parent / "output" / "polynomial_fitting.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
