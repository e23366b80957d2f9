"""Digits that were learnt in private
===================================

A trained model can tell what it was trained on: whether a picture was among the data,
or even what it looked like. Differential privacy bounds that. Here a network learns
scikit-learn's digits by gradients that are clipped for each sample and hidden in noise,
and an accountant says how much all steps together can tell of any one digit: epsilon.
The more noise, the less, and the worse the network.

The method is DP-SGD of Abadi et al., "Deep learning with differential privacy", 2016.
The accountant is that of Google's `dp-accounting`.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import luxtorch as lt
from luxtorch import optim, training

NOISES, STEPS = (0.0, 1.0, 2.0, 4.0), 150
RATE, CLIP, DELTA = 0.1, 1.0, 1e-4

# %%
# Data and model
# --------------
#
# Statistics of a batch, as `BatchNorm` has them, would tell of its samples: they are an
# error here. A normalization of each sample alone is none.

digits = load_digits()
images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
train, test = train_test_split(
    np.arange(len(labels)), test_size=0.25, random_state=0, stratify=digits.target
)
x, y, x_test, y_test = images[train], labels[train], images[test], labels[test]

model = lt.Chain(lt.Dense(64, 32, "relu"), lt.LayerNorm((32,)), lt.Dense(32, 10))
rule = optim.Adam(optim.cosine(0.02, 0.0, STEPS))

# %%
# A private step
# --------------
#
# Each digit is in a batch with the same probability, whichever others are. So batches
# differ in size, and one may be empty. `poisson_batch` returns a batch of fixed size
# with a mask, so that the step is compiled once; what is divided by is the expected
# number.


@lt.jit(backend="replay")
def step(key, ts, noise):
    """Return the training state after a step."""
    drawn, for_noise = lt.random.split(lt.random.fold_in(key, ts.step))
    batch, mask = training.poisson_batch(drawn, (x, y), RATE)
    grads, _, _, ts = training.private_gradients(
        lt.CrossEntropyLoss(),
        batch,
        ts,
        clip=CLIP,
        noise=noise,
        key=for_noise,
        batch_size=RATE * len(x),
        mask=mask,
    )
    return training.apply_gradients(ts, grads)


def accuracy(ts):
    """Return the share of the held-out digits that are recognized."""
    with torch.no_grad():
        guess = model(x_test, ts.parameters, ts.states)[0].argmax(1)
    return (guess == y_test).float().mean().item()


# %%
# The noise is a tensor, so one compiled step serves all.

curves = {}
for noise in NOISES:
    ts, key = training.TrainState(model, *lt.setup(0, model), rule), lt.random.key(1)
    curves[noise] = []
    for i in (bar := training.progress(range(STEPS), desc=f"noise {noise}")):
        ts = step(key, ts, torch.tensor(noise))
        if i % 10 == 9:
            curves[noise].append(accuracy(ts))
            bar.show(accuracy=curves[noise][-1])

# %%
# How private is it?
# ------------------
#
# With probability 1 - delta, no outcome of the training is more than exp(epsilon) times
# as likely, or as unlikely, as it would be without one of the digits.


def epsilon(noise):
    """Return how much the whole training can tell; None without an accountant."""
    try:
        import dp_accounting
        from dp_accounting import pld
    except ImportError:
        return None
    if noise == 0:
        return float("inf")
    one = dp_accounting.GaussianDpEvent(noise)
    sampled = dp_accounting.PoissonSampledDpEvent(RATE, one)
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    return accountant.compose(sampled, STEPS).get_epsilon(DELTA)


epsilons = {noise: epsilon(noise) for noise in NOISES}
print(f"{'noise':>5} {'epsilon':>8} {'accuracy':>9}    (delta = {DELTA})")
for noise, told in epsilons.items():
    shown = "unknown" if told is None else f"{told:.2f}"
    print(f"{noise:5} {shown:>8} {curves[noise][-1]:9.1%}")
if None in epsilons.values():
    print("To know epsilon, install an accountant: pip install dp-accounting")
final = [curves[noise][-1] for noise in sorted(NOISES)]
assert final[0] > 0.93, "without noise the digits should be learnt"
assert final[-1] < final[0] + 0.02, "noise should not help"

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

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    steps = range(10, 10 * len(curves[NOISES[0]]) + 1, 10)
    for noise, curve in curves.items():
        left.plot(steps, curve, label=f"noise {noise:g}")
    left.set(xlabel="step", ylabel="accuracy, held out", ylim=(0, 1))
    left.legend(loc="lower right")
    known = {noise: told for noise, told in epsilons.items() if told is not None}
    places = known or {noise: noise for noise in NOISES}
    private = [noise for noise in NOISES if noise > 0]
    right.plot(
        [places[noise] for noise in private],
        [curves[noise][-1] for noise in private],
        "o-",
        color="tab:green",
    )
    right.axhline(curves[min(NOISES)][-1], color="0.7", ls="--", label="without noise")
    name = f"epsilon, for delta = {DELTA}" if known else "noise"
    right.set(xlabel=name, title="What privacy costs", xlim=(0, None), ylim=(0, 1))
    right.legend(loc="lower right")
    path = Path(__file__).resolve().parent / "output" / "private_digits.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
