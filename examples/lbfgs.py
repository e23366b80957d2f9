"""L-BFGS, SciPy's and ours
=========================

Where the whole data fits into one evaluation, a quasi-Newton method with a line search
needs no learning rate and ends at the minimum itself. A `ComponentVector` is one flat
vector with names: SciPy's L-BFGS-B takes the vector, luxtorch's takes the names, and
both find the same logistic regression of scikit-learn's digits. Adam comes along, to
compare.
"""

import time
from pathlib import Path

import scipy.optimize
import torch
from sklearn.datasets import load_digits

import luxtorch as lt
from luxtorch import optim

# %%
# Model and loss
# --------------
#
# Images of 8 by 8 pixels, a linear layer, cross entropy with a little weight decay: the
# function has one minimum. Its argument is the ComponentVector; in double precision,
# for the sake of the last digits.

digits = load_digits()
x, y = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
model = lt.Dense(64, 10)
ps, st = lt.setup(0, model)
start = lt.ComponentVector(ps, dtype=torch.float64)
cross_entropy = lt.CrossEntropyLoss()


def loss_function(ps):
    """Return the loss of all the data."""
    logits, _ = model(x, ps, st)
    return cross_entropy(logits, y) + 1e-3 * (ps.flat**2).sum()


histories = {"SciPy": [], "luxtorch": [], "Adam": []}


def recorded(name):
    """Return the loss function, with a record of what it has returned."""

    def f(ps):
        loss = loss_function(ps)
        histories[name].append(loss.item())
        return loss

    return f


# %%
# SciPy
# -----
#
# It wants a function from an array to a number and an array. `from_flat` puts the names
# back.


def value_and_slope(flat):
    """Return the loss and its gradient at an array."""
    ps = lt.ComponentVector.from_flat(torch.from_numpy(flat), start.axes)
    value, grads = lt.withgradient(recorded("SciPy"), ps)
    return value.item(), grads.flat.numpy()


# The first call of anything takes longer, and should not count.
lt.withgradient(loss_function, start)
rows, found = [], {}
began = time.perf_counter()
result = scipy.optimize.minimize(
    value_and_slope,
    start.flat.numpy(),
    method="L-BFGS-B",
    jac=True,
    options={"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-6},
)
rows.append(("SciPy", result.fun, result.nit, result.nfev, time.perf_counter() - began))
found["SciPy"] = lt.ComponentVector.from_flat(torch.from_numpy(result.x), start.axes)

# %%
# luxtorch
# --------
#
# `minimize` takes the function as it is, and the parameters with their names.

opt_state = optim.setup(optim.LBFGS(), start)
began = time.perf_counter()
opt_state, found["luxtorch"], result = optim.minimize(
    recorded("luxtorch"),
    opt_state,
    start,
    max_iter=1000,
    tolerance_grad=1e-6,
    tolerance_change=1e-15,
)
took = time.perf_counter() - began
rows.append(("luxtorch", result.loss, result.iterations, result.evaluations, took))
print(f"ended because of: {result.reason}")

# %%
# The state that it returns knows the curvature: whoever wants a better minimum calls
# again and goes on from there.

_, best, better = optim.minimize(
    loss_function,
    opt_state,
    found["luxtorch"],
    max_iter=200,
    tolerance_grad=1e-8,
    tolerance_change=0.0,
)
print(
    f"{better.iterations} more iterations: the gradient falls "
    f"from {result.grad_norm:.0e} to {better.grad_norm:.0e}"
)

# %%
# Adam
# ----
#
# As many evaluations, with a learning rate that was chosen by trying.

adam_state, ps = optim.setup(optim.Adam(0.1), start), start
began = time.perf_counter()
for _ in range(result.evaluations):
    adam_state, ps = optim.update(adam_state, ps, lt.gradient(recorded("Adam"), ps))
took = time.perf_counter() - began
loss = loss_function(ps).item()
rows.append(("Adam", loss, result.evaluations, result.evaluations, took))

# %%
# Result
# ------

print(f"{'':10}{'loss':>16}{'iterations':>12}{'evaluations':>13}{'seconds':>9}")
for name, loss, iterations, evaluations, seconds in rows:
    print(f"{name:10}{loss:16.12f}{iterations:12d}{evaluations:13d}{seconds:9.2f}")
for name, ps in found.items():
    difference = (ps - best).flat.abs().max().item()
    print(f"{name} is within {difference:.0e} of the minimum")
    assert difference < 1e-2

try:
    import matplotlib
except ImportError:
    print("no picture: matplotlib is not installed")
else:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, style in (("Adam", ":"), ("SciPy", "-"), ("luxtorch", "--")):
        above = [loss - better.loss for loss in histories[name]]
        axes.semilogy(range(1, len(above) + 1), above, style, label=name)
    axes.set(
        xlabel="evaluations",
        ylabel="loss above the minimum",
        title="Logistic regression of 1797 digits",
    )
    axes.legend()
    path = Path(__file__).resolve().parent / "output" / "lbfgs.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
