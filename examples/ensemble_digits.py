"""An ensemble that knows what it does not know
============================================

Thirty-two networks learn scikit-learn's digits at once: `lt.Ensemble` makes one layer
of them, whose parameters are stacked, and whose call is a `vmap`. Each has initial
values, batches and dropout masks of its own. Where they agree, the digit is clear;
where they do not, nobody should be sure. The idea is that of Lakshminarayanan, Pritzel
and Blundell, "Simple and scalable predictive uncertainty estimation using deep
ensembles", 2017.
"""

from pathlib import Path

import numpy as np
import scipy.ndimage
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

import luxtorch as lt
from luxtorch import optim, training

MEMBERS, EPOCHS, BATCH = 32, 30, 32

# %%
# Data
# ----
#
# The networks see zeros to sevens, of which a quarter is held out. Nobody shows them an
# eight or a nine.

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
strange = images[labels > 7]
images, labels = images[labels <= 7], labels[labels <= 7]
train, test = train_test_split(
    np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels
)
x, y, x_test, y_test = images[train], labels[train], images[test], labels[test]

# %%
# Model and training
# ------------------
#
# With `same_input=False` each member gets a batch of its own. The loss is the sum of
# the members' losses, so that each member's gradient is that of its own loss alone, and
# an optimizer that works element by element trains each as if it were the only one.

member = lt.Chain(
    lt.FlattenLayer(), lt.Dense(64, 64, "relu"), lt.Dropout(0.1), lt.Dense(64, 8)
)
ensemble = lt.Ensemble(member, MEMBERS, same_input=False)
print(ensemble)
cross_entropy = lt.CrossEntropyLoss()


def of_member(model, ps, st, data):
    """Return the loss of one network."""
    x, y = data
    logits, st = model(x, ps, st)
    return cross_entropy(logits, y), st, {}


def of_all(model, ps, st, data):
    """Return the sum of the losses of all members."""
    x, y = data
    logits, st = model(x, ps, st)
    return torch.vmap(cross_entropy)(logits, y).sum(), st, {}


def order(number, epoch):
    """Return the order in which a member sees the data in an epoch."""
    key = lt.random.fold_in(lt.random.fold_in(lt.random.key(1), number), epoch)
    return lt.random.permutation(key, len(x))[: len(x) // BATCH * BATCH]


def run(ts, objective, batches):
    """Train on batches of numbers of digits."""
    for batch in (bar := training.progress(batches)):
        _, loss, _, ts = training.single_train_step(objective, (x[batch], y[batch]), ts)
        bar.show(loss=loss)
    return ts


# (members, steps, BATCH)
orders = torch.stack(
    [
        torch.cat([order(number, epoch) for epoch in range(EPOCHS)]).view(-1, BATCH)
        for number in range(MEMBERS)
    ]
)
rule = optim.Adam(2e-3)
ts = run(
    training.TrainState(ensemble, *lt.setup(0, ensemble), rule),
    of_all,
    orders.unbind(1),
)

# %%
# One of them alone
# -----------------
#
# An ensemble's members are what one gets by training each alone: the same start,
# batches and masks end at the same parameters, but for rounding.

ps, st = lt.setup(0, ensemble)
alone = training.TrainState(member, lt.unstack(ps)[0], lt.unstack(st)[0], rule)
alone = run(alone, of_member, orders[0])
leaves = [lt.core.tree_leaves(each.parameters) for each in (alone, ts)]
pairs = zip(*leaves, strict=True)
difference = max(float((one - many[0]).abs().max()) for one, many in pairs)
print(f"the first member, trained alone, differs by at most {difference:.0e}")
assert difference < 1e-3, (
    "a member of the ensemble is not what it is when trained alone"
)

# %%
# What the ensemble knows
# -----------------------
#
# In test mode, and all on the same images: another `Ensemble` of the same members, and
# the same parameters. Its probabilities are the mean of theirs. By Jensen's inequality
# its cross entropy is below the mean of theirs, always.

together = lt.Ensemble(member, MEMBERS)
st = lt.test_mode(ts.states)


def probabilities(x):
    """Return the probabilities that the members give: (members, images, classes)."""
    with torch.no_grad():
        return together(x, ts.parameters, st)[0].softmax(-1)


def entropy(p):
    """Return the entropy of distributions, in bits."""
    return torch.special.entr(p).sum(-1) / np.log(2)


p = probabilities(x_test)
mean = p.mean(0)
single = -p[:, torch.arange(len(y_test)), y_test].log().mean(1)
joint = -mean[torch.arange(len(y_test)), y_test].log().mean()
guess, wrong = mean.argmax(1), mean.argmax(1) != y_test
print(
    f"cross entropy: {joint:.4f}, "
    f"of one member {single.mean():.4f} (best {single.min():.4f})"
)
print(
    f"accuracy: {1 - wrong.float().mean():.4f}, "
    f"of one member {(p.argmax(2) == y_test).float().mean():.4f}"
)
assert joint < single.mean()

# %%
# The entropy of the mean is the uncertainty. It tells mistakes from what is right, and
# eights and nines from the digits that the networks were trained for: an AUC is the
# share of pairs, one of either kind, in which it is greater where it should be.

p_strange = probabilities(strange).mean(0)
unsure, unsure_strange = entropy(mean), entropy(p_strange)
finds_mistakes = roc_auc_score(wrong, unsure)
finds_strange = roc_auc_score(
    np.repeat([0, 1], [len(unsure), len(strange)]), torch.cat([unsure, unsure_strange])
)
print(
    f"uncertainty finds mistakes with an AUC of {finds_mistakes:.3f}, "
    f"eights and nines with {finds_strange:.3f}"
)
assert min(finds_mistakes, finds_strange) > 0.85, (
    "the ensemble is sure of what it does not know"
)

# %%
# Picture
# -------
#
# A three is turned by half a circle. At first all members know it; where it stops being
# one and where it begins to resemble something else, they disagree. In between all of
# them are sure of a four, and wrong: what all members have in common, their
# disagreement cannot tell of.

try:
    import matplotlib
except ImportError:
    print("no picture: matplotlib is not installed")
else:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 6.2), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    axis, right = upper.subplots(1, 2, width_ratios=(1.9, 1))
    angles = np.arange(0, 181, 5)
    three = x_test[(y_test == 3) & ~wrong][0].numpy()
    turning = np.stack(
        [scipy.ndimage.rotate(three, angle, reshape=False, order=1) for angle in angles]
    )
    p_turning = probabilities(torch.tensor(turning))
    shown = p_turning.mean(0).amax(0).topk(5).indices.sort().values
    for number in shown:
        axis.plot(
            angles, p_turning[:, :, number].T, color=f"C{number}", alpha=0.12, lw=0.8
        )
        axis.plot(
            angles,
            p_turning[:, :, number].mean(0),
            color=f"C{number}",
            lw=2.5,
            label=f"is a {number}",
        )
    for i in range(0, len(angles), 4):
        inset = axis.inset_axes((angles[i] / 200 + 0.01, 1.03, 0.08, 0.16))
        inset.imshow(turning[i], cmap="gray_r")
        inset.set(xticks=[], yticks=[])
    axis.set(
        xlabel="turned by (degrees)",
        ylabel="probability",
        xlim=(-10, 190),
        ylim=(0, 1.02),
    )
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for values, label in (
        (unsure[~wrong], "known and right"),
        (unsure[wrong], "known, but wrong"),
        (unsure_strange, "eights and nines"),
    ):
        right.hist(values, np.linspace(0, 3, 25), density=True, alpha=0.6, label=label)
    right.set(
        xlabel="uncertainty (bits)",
        yticks=[],
        yscale="symlog",
        title="Digits that were held out",
    )
    right.legend()
    lower.suptitle(
        "The least certain digits, and what the members take them for: "
        "known ones, and eights and nines"
    )
    every = torch.cat([p, probabilities(strange)], 1)
    named = [*y_test, *digits.target[digits.target > 7]]
    pictures, least = (
        torch.cat([x_test, strange]),
        [*unsure.topk(5).indices, *(unsure_strange.topk(5).indices + len(p[0]))],
    )
    for axis, i in zip(lower.subplots(1, 10), least, strict=True):
        votes = np.bincount(every[:, i].argmax(1), minlength=8)
        axis.imshow(pictures[i].numpy(), cmap="gray_r")
        axis.set(xticks=[], yticks=[], title=f"a {named[i]}")
        most = [k for k in votes.argsort()[::-1][:3] if votes[k]]
        axis.set_xlabel("\n".join(f"{votes[k]} say {k}" for k in most))
    path = Path(__file__).resolve().parent / "output" / "ensemble_digits.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
