"""Digits on several processes
===========================

Start it by `torchrun --nproc-per-node 2 examples/ddp_digits.py`, or by
`python examples/ddp_digits.py` for a single process. A small convolutional network
learns scikit-learn's digits twice: every process computes the gradient of its share of
each batch, and either the gradients are averaged, or every process also keeps its share
of the parameters and of the optimizer alone. Then one process repeats it all by itself,
on the whole batches: the losses are the same.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import luxtorch as lt
from luxtorch import distributed, optim, training

OUTPUT = Path(__file__).resolve().parent / "output"
EPOCHS, BATCH = 12, 64

# %%
# Processes
# ---------
#
# Without torchrun this is a world of one, in which nothing is averaged, shared out or
# sharded.

distributed.initialize(timeout=120)
rank, ranks = distributed.rank(), distributed.world_size()
torch.set_num_threads(1)  # a process for each core is enough

# %%
# Data
# ----
#
# All processes know all images, in double precision for the sake of the comparison. The
# order comes from a key that is folded from the epoch, so that all see the same
# batches; `shard_data` cuts out each one's share.

digits = load_digits()
images, labels = torch.tensor(digits.images)[:, None] / 16, torch.tensor(digits.target)
train, test = train_test_split(
    np.arange(len(labels)), test_size=0.25, random_state=0, stratify=digits.target
)
x, y, x_test, y_test = images[train], labels[train], images[test], labels[test]
batches = [
    rows
    for epoch in range(EPOCHS)
    for key in [lt.random.fold_in(lt.random.key(1), epoch)]
    for rows in lt.random.permutation(key, len(x)).split(BATCH)
    if len(rows) == BATCH
]

# %%
# Model
# -----
#
# LayerNorm treats every image by itself. (A BatchNorm would normalize by the statistics
# of each process's share.)

model = lt.Chain(
    lt.Conv((3, 3), 1, 16, "gelu", stride=2, padding=1),
    lt.LayerNorm((16, 4, 4)),
    lt.Conv((3, 3), 16, 32, "gelu", stride=2, padding=1),
    lt.FlattenLayer(),
    lt.Dense(128, 10),
)
ps, st = lt.setup(0, model)
ps = distributed.synchronize(lt.ComponentVector(ps, dtype=torch.float64))
rate = optim.warmup_cosine(3e-3, 20, len(batches))
objective = lt.CrossEntropyLoss()


def gathering(model, ps, st, data):
    """Return the objective at sharded parameters; its gradient is sharded too."""
    return objective(model, distributed.gather_parameters(ps), st, data)


# %%
# Training
# --------


def run(name, ps, step, share):
    """Train, and return the loss of each whole batch, and the training state."""
    ts = training.TrainState(model, ps, st, optim.AdamW(rate, weight_decay=0.01))
    losses = []
    bar = training.progress(batches, desc=f"{name:10}", disable=rank != 0)
    for rows in bar:
        loss, ts = step(ts, share((x[rows], y[rows])))
        losses.append(loss)
        bar.show(loss=loss)
    return torch.stack(losses), ts


def averaging(ts, data):
    """Take a step by the mean of the gradients, one vector: one all-reduce."""
    grads, loss, _, ts = training.compute_gradients(objective, data, ts)
    return loss, training.apply_gradients(ts, distributed.average_gradients(grads))


def sharded(ts, data):
    """Take a step of this process's part: an all-gather, then a reduce-scatter."""
    _, loss, _, ts = training.single_train_step(gathering, data, ts)
    return loss, ts


def alone(ts, data):
    """Take a step without the others."""
    _, loss, _, ts = training.single_train_step(objective, data, ts)
    return loss, ts


curves, states = {}, {}
for name, start, step in (
    ("averaged", ps, averaging),
    ("sharded", distributed.shard_parameters(ps), sharded),
):
    losses, states[name] = run(name, start, step, distributed.shard_data)
    curves[name] = distributed.average_gradients(losses)  # each has that of its share
gathered = distributed.gather_parameters(states["sharded"].parameters)

# %%
# Result
# ------
#
# From here on, one process has all that it needs.

if rank == 0:
    curves["alone"], states["alone"] = run("alone", ps, alone, lambda data: data)
    own = sum(
        leaf.to_local().numel()
        for leaf in lt.core.tree_leaves(states["sharded"])
        if hasattr(leaf, "to_local")
    )
    if ranks > 1:
        print(
            f"{ps.numel()} parameters; of these and of AdamW's moments "
            f"each process holds {own} numbers"
        )
    with torch.no_grad():
        guess = model(x_test, gathered, lt.test_mode(st))[0].argmax(1)
    share = float((guess == y_test).double().mean())
    differences = {
        name: (curves[name] - curves["alone"]).abs() / curves["alone"]
        for name in ("averaged", "sharded")
    }
    for name, difference in differences.items():
        print(
            f"{name} on {ranks}: the losses are within {float(difference.max()):.0e} "
            "of those of a single process"
        )
        assert difference.max() < 1e-6, "the losses are not those of a single process"
    print(f"{share:.2%} of {len(y_test)} held-out digits are recognized")

if rank == 0:
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
    else:
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(14, 4.4), layout="constrained"
        )
        styles = {
            "alone": ("0.75", "-", 5.0),
            "averaged": ("tab:blue", "-", 1.2),
            "sharded": ("tab:orange", ":", 1.2),
        }
        for name, (color, style, width) in styles.items():
            left.semilogy(
                curves[name].numpy(), style, color=color, linewidth=width, label=name
            )
        left.set(
            xlabel="step",
            ylabel="cross entropy of the whole batch",
            title=f"{share:.2%} of held-out digits",
        )
        left.legend()
        for name, difference in differences.items():
            color, style, _ = styles[name]
            middle.semilogy(
                difference.clamp(min=1e-17).numpy(), style, color=color, label=name
            )
        middle.axhline(1e-6, color="0.5", linestyle="--", label="allowed")
        middle.set(
            xlabel="step",
            ylabel="relative difference",
            ylim=(1e-18, 1e-5),
            title=f"{ranks} against 1 process",
        )
        middle.legend()
        # The last batch, in the colors of the processes that computed the gradients.
        tiles = x[batches[-1]][:, 0].reshape(8, 8, 8, 8)
        colors = plt.get_cmap("tab10")(np.arange(BATCH) * ranks // BATCH % 10)[:, :3]
        colors = torch.tensor(colors).reshape(8, 8, 3)
        mosaic = 1 - tiles[..., None] * (1 - colors[:, :, None, None])
        # A frame for each image.
        mosaic = torch.nn.functional.pad(mosaic, (0, 0, 1, 1, 1, 1), value=1.0)
        right.imshow(
            mosaic.permute(0, 2, 1, 3, 4).reshape(80, 80, 3).clamp(0, 1).numpy(),
            interpolation="nearest",
        )
        title = "a batch, shared out" if ranks > 1 else "a batch"
        right.set(xticks=[], yticks=[], title=title)
        OUTPUT.mkdir(exist_ok=True)
        figure.savefig(OUTPUT / "ddp_digits.png", dpi=120)
        print(f"picture: {OUTPUT / 'ddp_digits.png'}")

distributed.shutdown()
