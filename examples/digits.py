"""A classifier of handwritten digits
===================================

A small convolutional network with batch normalization and dropout learns scikit-learn's
1797 digits. The run saves checkpoints; it is stopped in the middle and resumed, and
ends with the very same parameters, bit for bit, as a run that was never stopped.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from sklearn.model_selection import train_test_split

import luxtorch as lt
from luxtorch import optim, training

OUTPUT = Path(__file__).resolve().parent / "output"
EPOCHS, BATCH = 20, 64

# %%
# Data
# ----
#
# Images of 8 by 8 pixels, a quarter of them held out.

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
train, test = train_test_split(
    np.arange(len(labels)), test_size=0.25, random_state=0, stratify=digits.target
)
x, y, x_test, y_test = images[train], labels[train], images[test], labels[test]

# %%
# Model
# -----

model = lt.Chain(
    lt.Conv((3, 3), 1, 32, padding="same"),
    lt.BatchNorm(32, "relu"),
    lt.Conv((3, 3), 32, 32, padding="same"),
    lt.BatchNorm(32, "relu"),
    lt.MaxPool((2, 2)),
    lt.FeatureDropout(0.1),
    lt.Conv((3, 3), 32, 64, padding="same"),
    lt.BatchNorm(64, "relu"),
    lt.MaxPool((2, 2)),
    lt.FlattenLayer(),
    lt.Dropout(0.3),
    lt.Dense(256, 10),
)
print(model)

# %%
# Training
# --------
#
# The learning rate warms up and then falls along a cosine: a schedule is a
# hyperparameter like any other. The order of the data is drawn from a key that is
# folded from the epoch, so that a resumed run sees the same batches.

steps_per_epoch = len(x) // BATCH
rate = optim.warmup_cosine(3e-3, 2 * steps_per_epoch, EPOCHS * steps_per_epoch)
objective = lt.losses.CrossEntropyLoss()


def start():
    """Return the training state before the first step."""
    return training.TrainState(
        model, *lt.setup(0, model), optim.AdamW(rate, weight_decay=0.01)
    )


def accuracy(ts):
    """Return the share of held-out digits recognized, and what each is taken for."""
    with torch.no_grad():
        y_hat, _ = model(x_test, ts.parameters, lt.test_mode(ts.states))
    guess = y_hat.argmax(1)
    return float((guess == y_test).float().mean()), guess


def run(ts, epochs, manager=None, history=None, logger=None):
    """Train for some epochs, from where a training state stands."""
    for epoch in range(int(ts.step) // steps_per_epoch, epochs):
        key = lt.random.fold_in(lt.random.key(1), epoch)
        order = lt.random.permutation(key, len(x))
        losses = []
        batches = order[: steps_per_epoch * BATCH].split(BATCH)
        bar = training.progress(batches, desc=f"epoch {epoch + 1}", leave=False)
        for batch in bar:
            data = x[batch], y[batch]
            _, loss, _, ts = training.single_train_step(objective, data, ts)
            losses.append(loss)
            bar.show(loss=loss)
        mean, share = float(torch.stack(losses).mean()), accuracy(ts)[0]
        if logger is not None:
            logger.log(ts.step, {"loss": mean, "test": {"accuracy": share}})
        if manager is not None:
            manager.save(ts.step, ts, metric=share)
        if history is not None:
            history.append((mean, share))
            print(f"epoch {epoch + 1:2d}  loss {mean:.4f}  accuracy {share:.4f}")
    return ts


folder = OUTPUT / "digits"
shutil.rmtree(folder, ignore_errors=True)
manager = training.CheckpointManager(folder, keep_last=2, mode="max")
history = []
with training.CSVLogger(folder / "metrics.csv") as logger:
    run(start(), EPOCHS // 2, manager, history, logger)

# %%
# The program might end here, on purpose or not. Another one goes on from the last
# checkpoint, given a training state that says what it looks like.

ts = manager.restore(start())
print(f"resumed at step {int(ts.step)}")
with training.CSVLogger(folder / "metrics.csv") as logger:  # goes on in the same file
    ts = run(ts, EPOCHS, manager, history, logger)

# %%
# Result
# ------
#
# The run that was never stopped ends with the same parameters.

whole = run(start(), EPOCHS)
leaves = [lt.core.tree_leaves(each.parameters) for each in (whole, ts)]
equal = all(torch.equal(a, b) for a, b in zip(*leaves, strict=True))
assert equal, "the resumed run differs from the whole one"
share, guess = accuracy(ts)
print(
    "the resumed run equals the whole one; "
    f"{share:.2%} of {len(y_test)} held-out digits are recognized"
)

try:
    import matplotlib
except ImportError:
    print("no pictures: matplotlib is not installed")
else:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    means, shares = zip(*history, strict=True)
    epochs = range(1, EPOCHS + 1)
    left.semilogy(epochs, means, color="tab:blue", label="loss in training")
    left.set(xlabel="epoch", ylabel="cross entropy", xticks=range(0, EPOCHS + 1, 5))
    other = left.twinx()
    other.plot(epochs, shares, color="tab:orange", label="accuracy, held out")
    other.set(ylabel="accuracy", ylim=(0.8, 1.0))
    left.legend(handles=[*left.get_lines(), *other.get_lines()], loc="center right")
    ConfusionMatrixDisplay(confusion_matrix(y_test, guess)).plot(
        ax=right, colorbar=False, cmap="Blues"
    )
    right.set(title=f"{share:.2%} of {len(y_test)} held-out digits")
    figure.savefig(OUTPUT / "digits.png", dpi=120)
    print(f"picture: {OUTPUT / 'digits.png'}")
