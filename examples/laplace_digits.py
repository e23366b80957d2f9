"""Laplace's approximation, by the whole Hessian
=============================================

Trained parameters are one point of a distribution: given the data, others are nearly as
likely. Laplace's approximation takes the Hessian of the loss at the minimum for the
inverse covariance of a Gaussian. It says how strong the weight decay should be, without
any held-out data, and which of the parameters the data have determined.

A ComponentVector makes the Hessian a matrix with names: `H["layer_1", "layer_2.bias"]`
is a block of it. The method is that of MacKay, "A practical Bayesian framework for
backpropagation networks", 1992.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import luxtorch as lt
from luxtorch import optim, training

TRAIN, DECAYS = 600, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

# %%
# Data and model
# --------------
#
# Few digits to learn from, and a small network: 610 parameters. All is done in double
# precision, for the sake of the Hessian.

digits = load_digits()
images, labels = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
train, test = train_test_split(
    np.arange(len(labels)), train_size=TRAIN, random_state=0, stratify=digits.target
)
x, y, x_test, y_test = images[train], labels[train], images[test], labels[test]

model = lt.Chain(lt.Dense(64, 8, torch.tanh), lt.Dense(8, 10))
ps, st = lt.setup(0, model)
start = lt.ComponentVector(ps, dtype=torch.float64)
cross_entropy = lt.CrossEntropyLoss(agg="sum")


def loss(ps, decay):
    """Return minus the logarithm of the posterior density, but for a constant.

    The decay is that of a Gaussian prior.
    """
    logits, _ = model(x, ps, st)
    return cross_entropy(logits, y) + decay / 2 * (ps @ ps)


# %%
# The minimum and the Hessian there
# ---------------------------------
#
# L-BFGS goes to the minimum itself, where the Hessian is positive definite: its
# Cholesky factor exists. The logarithm of the evidence is that of the density at the
# minimum, and of the volume around it. A strong decay makes the data unlikely, and of
# what a weak one allows, the data leave little.


def laplace(decay, ps):
    """Return the minimum, the Hessian, and the log evidence for a decay."""
    opt_state = optim.setup(optim.LBFGS(history_size=30), ps)
    _, ps, result = optim.minimize(
        lambda ps: loss(ps, decay),
        opt_state,
        ps,
        max_iter=3000,
        tolerance_grad=1e-5,
        tolerance_change=0,
    )
    H = lt.hessian(lambda ps: loss(ps, decay), ps, chunk_size=100)
    log_det = torch.linalg.cholesky(H.data).diagonal().log().sum() * 2
    evidence = -result.loss - log_det / 2 + ps.numel() / 2 * np.log(decay)
    return ps, H, evidence.item()


fits, ps = {}, start
bar = training.progress(sorted(DECAYS, reverse=True), desc="decays", unit="decay")
for decay in bar:
    fits[decay] = ps, H, evidence = laplace(decay, ps)
    bar.show(decay=decay, evidence=evidence)
best = max(fits, key=lambda decay: fits[decay][2])
ps, H, _ = fits[best]
print(f"most evidence is for a weight decay of {best}")
print(H)

# %%
# Is that the Hessian?
# --------------------
#
# Its blocks are those that `torch.func.hessian` returns for the nested dict of the same
# parameters.

as_dict = torch.func.hessian(lambda tree: loss(lt.ComponentVector(tree), best))(
    ps.to_dict()
)
names = list(lt.flatten_names(ps))
for row in names:
    for column in names:
        (a, b), (c, d) = row.split("."), column.split(".")
        torch.testing.assert_close(
            H[row, column], as_dict[a][b][c][d].reshape(H[row, column].shape)
        )
print(f"all {len(names) ** 2} blocks are those of torch.func.hessian")

# %%
# The block of the last layer is known in closed form, from the probabilities p and the
# features that the layer sees: the sum over the data of (diag(p) - p p') times the
# outer product of the features.

with torch.no_grad():
    features, _ = model["layer_1"](x, ps.layer_1, st["layer_1"])
    p = model(x, ps, st)[0].softmax(1)
curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
closed_form = torch.einsum("nij,nk,nl->ikjl", curvature, features, features).reshape(
    80, 80
) + best * torch.eye(80)
torch.testing.assert_close(H["layer_2.weight", "layer_2.weight"], closed_form)
print("the block of the last layer is what the closed form says")

# %%
# How much decay?
# ---------------
#
# The evidence comes from the digits that the network has seen. How well it does on all
# others is the judge.


def held_out(ps):
    """Return the mean cross entropy of the digits that were held out."""
    with torch.no_grad():
        return lt.CrossEntropyLoss()(model(x_test, ps, st)[0], y_test).item()


scores = {decay: held_out(ps) for decay, (ps, _, _) in sorted(fits.items())}
print(f"{'decay':>6} {'log evidence':>13} {'held-out loss':>14}")
for decay, value in scores.items():
    print(f"{decay:6} {fits[decay][2]:13.1f} {value:14.4f}")
assert scores[best] < 1.1 * min(scores.values()), (
    "the decay with the most evidence is not a good one"
)

# %%
# What do the data determine?
# ---------------------------
#
# The inverse of the Hessian is the covariance. Beside the prior's variance, which is
# one over the decay, it tells how much of each parameter is known; summed up, that is
# the effective number of parameters of a layer. Of the weights of pixels that are empty
# in all digits the data know nothing, and their variance is the prior's, exactly.

covariance = torch.linalg.inv(H)
for name in names:
    variances = covariance[name, name].diagonal()
    print(
        f"{name:15} {len(variances):4d} parameters, "
        f"of which {(1 - best * variances).sum():6.1f} are determined"
    )
variances = covariance["layer_1.weight", "layer_1.weight"].diagonal().view(8, 64)
empty = (x == 0).all(0)
assert empty.any()
torch.testing.assert_close(
    variances[:, empty],
    torch.full((8, int(empty.sum())), 1 / best, dtype=torch.float64),
)

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
    from matplotlib.colors import SymLogNorm

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(14.5, 4.2), layout="constrained"
    )
    scale = H.data.diagonal().median().item()
    image = left.imshow(
        H.data.numpy(),
        cmap="RdBu_r",
        norm=SymLogNorm(scale / 30, vmin=-scale * 30, vmax=scale * 30),
    )
    edges = np.cumsum([0, *(len(H[name, name]) for name in names)])
    for edge in edges[1:-1]:
        left.axhline(edge, color="k", lw=0.6)
        left.axvline(edge, color="k", lw=0.6)
    ticks = [(edges[i] + edges[i + 1]) / 2 for i in (0, 2)]
    left.set(
        xticks=ticks,
        xticklabels=[names[0], names[2]],
        yticks=ticks,
        yticklabels=[names[0], names[2]],
    )
    left.set_yticks(ticks, left.get_yticklabels(), rotation=90, va="center")
    left.set(title="The Hessian, block by block")
    figure.colorbar(image, ax=left, ticks=[-10, -1, 0, 1, 10], format="%d")
    middle.semilogx(
        list(scores),
        [fits[decay][2] for decay in scores],
        "o-",
        color="tab:green",
        label="log evidence",
    )
    middle.axvline(best, color="0.8", lw=6, zorder=0)
    middle.set(
        xlabel="weight decay",
        ylabel="log evidence",
        title=f"How much decay? The evidence says {best}",
    )
    other = middle.twinx()
    other.semilogx(
        list(scores),
        list(scores.values()),
        "s--",
        color="tab:orange",
        label="loss of held-out digits",
    )
    other.set(ylabel="cross entropy")
    other.legend(
        handles=[*middle.get_lines()[:1], *other.get_lines()], loc="center left"
    )
    known = 1 - best * variances.mean(0).view(8, 8)
    image = right.imshow(known.numpy(), cmap="magma", vmin=0)
    right.set(
        xticks=[],
        yticks=[],
        title="How far the data determine the weights of each pixel",
    )
    figure.colorbar(image, ax=right)
    path = Path(__file__).resolve().parent / "output" / "laplace_digits.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
