"""A transformer on a mesh of processes
====================================

A model that is too large for one machine is spread over several: every process holds a
part of each large weight, and of what the optimizer remembers of it. The program does
not change, only the places of its tensors do. Start it by
`torchrun --nproc-per-node 4 examples/tensor_parallel.py`; started by `python`, it
starts two processes of itself.
"""

import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch

import luxtorch as lt
from luxtorch import distributed, optim, training
from luxtorch.jit import jit

SCRIPT = Path(__file__).resolve()
PICTURE = SCRIPT.parent / "output/tensor_parallel.png"
STEPS, BATCH, LENGTH, WIDTH = 60, 16, 32, 64

# %%
# Model and data
# --------------
#
# The reference of the Python language, character by character, and two layers of a
# transformer with dropout.

text = "\n".join(topics[name] for name in sorted(topics))
alphabet = sorted(set(text))
tokens = torch.tensor([alphabet.index(character) for character in text])

block = lt.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, norm_first=True, is_causal=True)
model = lt.Chain(
    lt.Embedding(len(alphabet), WIDTH),
    lt.TransformerEncoder(block, 2),
    lt.LayerNorm(WIDTH),
    lt.Dense(WIDTH, len(alphabet)),
)


def windows(step):
    """Return windows of the text, the same in every process, and what comes next."""
    key = lt.random.fold_in(lt.random.key(1), step)
    starts = lt.random.randint(key, (BATCH, 1), 0, len(tokens) - LENGTH)
    rows = tokens[starts + torch.arange(LENGTH + 1)]
    return rows[:, :-1], rows[:, 1:]


def objective(model, ps, st, data):
    """Return the cross entropy of the next character."""
    x, y = data
    scores, st = model(x, ps, st)
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), y.flatten())
    return loss, st, {}


def step(data, ts):
    """Take a training step."""
    _, loss, _, ts = training.single_train_step(objective, data, ts)
    return loss, ts


# %%
# Places
# ------
#
# `tensor_parallel` says which weights are split, by names: the first of two dense
# layers by rows of its matrix, the second by columns, so that one sum over all
# processes is enough for both. `place` does it. The batch is split over the other axis
# of the mesh. Everything else is as in a script for one process, the dropout masks
# included.


def train(ps, place):
    """Train, and return the losses and the state in the end."""
    st = lt.setup(0, model)[1]
    ts = training.TrainState(model, ps, st, optim.AdamW(3e-3))
    fast, losses = jit(step, backend="replay", donate="ts"), []
    for i in range(STEPS):
        loss, ts = fast(place(windows(i)), ts)
        losses.append(loss.full_tensor() if hasattr(loss, "full_tensor") else loss)
    return torch.stack(losses), ts


def main():
    torch.set_num_threads(1)
    distributed.initialize(timeout=300)
    ranks = distributed.world_size()
    mesh = distributed.mesh(data=2 if ranks == 4 else 1, model=-1)
    ps = lt.f64(lt.setup(0, model)[0])  # for the sake of the comparison

    def spread(batch):
        return distributed.place(batch, mesh, {"*": distributed.Shard(0, "data")})

    losses, ts = train(
        distributed.place(ps, mesh, distributed.tensor_parallel(model)), spread
    )
    held = sum(leaf.to_local().nbytes for leaf in lt.core.tree_leaves(ts.parameters))
    if distributed.rank() == 0:
        shape = dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))
        print(f"{ranks} processes, {shape}")
        print("\n".join(distributed.describe(ts.parameters).splitlines()[:6]), "\n...")
        whole = sum(leaf.nbytes for leaf in lt.core.tree_leaves(ps))
        print(f"each holds {held / whole:.0%} of the {whole:,} bytes of the parameters")
        alone, _ = train(ps, lambda batch: batch)
        difference = float((losses - alone).abs().max())
        print(
            f"the losses are within {difference:.0e} of those of a single process: "
            f"{losses[-1]:.4f} in the end"
        )
        assert difference < 1e-9, "the losses are not those of a single process"
        draw(losses, alone, ts.parameters)
    distributed.shutdown()


# %%
# A picture
# ---------


def draw(losses, alone, sharded):
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    left.plot(alone, color="0.75", linewidth=5, label="one process")
    left.plot(losses, color="tab:blue", linewidth=1.2, label="a mesh of processes")
    left.set(xlabel="step", ylabel="cross entropy of the next character")
    left.legend()
    # Each weight as a bar, in the colors of the processes that hold it.
    colors = plt.get_cmap("tab10").colors
    named = [
        (name, leaf)
        for name, leaf in lt.flatten_names(sharded).items()
        if leaf.ndim == 2
    ]
    for row, (_, leaf) in enumerate(named):
        parts = leaf.device_mesh.size(1)
        split = any(place.is_shard() for place in leaf.placements)
        size = leaf.numel() / 1024
        for part in range(parts):
            width, height = size / parts, 0.8 / parts
            across = dict(left=part * width, width=width, height=0.8, y=row)
            y = row - 0.4 + (part + 0.5) * height
            along = dict(left=0, width=size, height=height, y=y)
            place, color = across if split else along, colors[part]
            right.barh(**place, color=color, edgecolor="white", linewidth=0.5)
    right.set_yticks(
        range(len(named)),
        [name.removesuffix(".weight") for name, _ in named],
        fontsize=6,
    )
    right.invert_yaxis()
    right.set(
        xlabel="thousands of numbers",
        title="who holds what: split, or a copy each",
        axisbelow=True,
    )
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    print(f"picture: {PICTURE}")


# %%
# Processes
# ---------
#
# `torchrun` tells each process its rank.

if "RANK" in os.environ:
    main()
else:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    if done.returncode:
        raise RuntimeError(done.stderr)
    if PICTURE.exists():
        from matplotlib import pyplot as plt

        figure = plt.figure(figsize=(11, 4.2), frameon=False)
        figure.add_axes((0, 0, 1, 1)).imshow(plt.imread(PICTURE))
        figure.gca().axis("off")
