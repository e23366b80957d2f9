"""Truncated backpropagation through time
=======================================

A recurrent cell of one's own reads the reference of the Python language, character by
character. Gradients go back through a window of the text; the carry goes on from window
to window, so that the cell may remember more than it is trained on at once. The loop
over a window is `lt.scan`: inside of `lt.jit` it is one operator, however long the
window is, and compiles in the time that one step of the cell takes.
"""

import math
import time
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import torch

import luxtorch as lt
from luxtorch import optim, training

HIDDEN, STEPS, CHARACTERS = 128, 1000, 1024
WINDOWS = (1, 4, 16)

# %%
# Data
# ----
#
# The text is part of every Python. As many readers as one likes begin at as many places
# of it. The last tenth is for validation.

text = "\n".join(topics[name] for name in sorted(topics))
alphabet = sorted(set(text))
tokens = torch.tensor([alphabet.index(character) for character in text])
split = len(tokens) * 9 // 10


def columns(tokens, readers):
    """Return the text in columns, one for each reader, (time, readers)."""
    return tokens[: len(tokens) // readers * readers].view(readers, -1).T.contiguous()


print(f"{len(text):,} characters, {len(alphabet)} different ones")

# %%
# A cell of one's own
# -------------------
#
# The minimal gated unit of Zhou et al. (2016) is a GRU with a single gate. luxtorch
# does not have it, and does not need to: a step is a function of a carry and an input,
# which closes over its parameters. What the input adds is independent of the carry, and
# so is looked up for all steps at once.
#
# The carry is a state of the layer. A training step returns states without their
# gradients: that is the truncation.


class Reader(lt.ContainerLayer):
    embed: lt.Embedding
    gate: lt.Dense
    candidate: lt.Dense
    write: lt.Dense
    readers: int

    def initial_states(self, key):
        carry = torch.zeros(self.readers, self.gate.in_features, device=key.device)
        return {**super().initial_states(key), "carry": carry}

    def __call__(self, x, ps, st):
        """Return scores of the next characters, of those so far, (time, batch)."""

        def step(h, x):
            to_gate, to_candidate = x.chunk(2, -1)
            f = torch.sigmoid(to_gate + self.gate(h, ps["gate"], st["gate"])[0])
            again, _ = self.candidate(f * h, ps["candidate"], st["candidate"])
            c = torch.tanh(to_candidate + again)
            h = h + f * (c - h)
            return h, h

        inputs, _ = self.embed(x, ps["embed"], st["embed"])
        carry, hs = lt.scan(step, st["carry"], inputs)
        scores, _ = self.write(hs, ps["write"], st["write"])
        return scores, {**st, "carry": carry.detach()}


def model_of(readers):
    """Return the layer for some readers."""
    size, dense = len(alphabet), lt.Dense(HIDDEN, HIDDEN)
    return Reader(
        lt.Embedding(size, 2 * HIDDEN), dense, dense, lt.Dense(HIDDEN, size), readers
    )


# %%
# Training
# --------
#
# Whatever the window is, a step reads 1024 characters: 1024 readers one each, or 64
# readers 16 each. So all are trained on the same number of characters in the same
# number of steps, and differ in how far back their gradients go. A step is compiled as
# a whole: the loop, the loop back through it, and the optimizer.

cross_entropy = lt.CrossEntropyLoss()


def objective(model, ps, st, data):
    """Return the loss of a window, in bits for each character."""
    scores, st = model(data[:-1], ps, st)
    return cross_entropy(scores.flatten(0, 1), data[1:].flatten()) / math.log(2), st, {}


validator, unread = model_of(64), columns(tokens[split:], 64)
_, beginning = lt.setup(0, validator)


def bits(ps):
    """Return the bits for each character of the text that is not trained on."""
    with torch.no_grad():
        return objective(validator, ps, beginning, unread)[0].item()


def train(window):
    """Return the parameters, and what validation says on the way."""
    readers = CHARACTERS // window
    model, data = model_of(readers), columns(tokens[:split], readers)
    ps, start = lt.setup(0, model)
    ts = training.TrainState(
        model, ps, start, optim.Adam(optim.cosine(5e-3, 0.0, STEPS))
    )
    step = lt.jit(training.single_train_step, static="objective", backend="replay")
    found, place = [(0, bits(ps))], 0
    for number in range(1, STEPS + 1):
        if place + window >= len(data):
            ts, place = ts.replace(states=start), 0  # the text begins anew
        *_, ts = step(objective, data[place : place + window + 1], ts)
        place += window
        if number % 100 == 0:
            found.append((number, bits(ts.parameters)))
    return ts.parameters, found


results = {}
for window in WINDOWS:
    begun = time.perf_counter()
    results[window] = train(window)
    took, said = time.perf_counter() - begun, results[window][1][-1][1]
    print(
        f"gradients through {window:2} characters: "
        f"{said:.3f} bits a character, after {took:.0f} s"
    )

# %%
# What it has learnt
# ------------------
#
# Text is written by a scan, too: its carry is the last character and the states of the
# layer, and the keys are what it goes along. The layer has a scan of its own, of one
# character.

writer, ps = model_of(1), results[WINDOWS[-1]][0]


def write(carry, key):
    """Draw the next character."""
    last, st = carry
    scores, st = writer(last, ps, st)
    # Gumbel's noise, by which the largest is a draw.
    noise = -(-lt.random.uniform(key, scores.shape).log()).log()
    drawn = (scores / 0.7 + noise).argmax(-1)
    return (drawn, st), drawn


@lt.jit(backend="replay")
def written(key, first, st):
    """Return 400 characters."""
    return lt.scan(write, (first, st), lt.random.split(key, 400))[1].flatten()


_, st = lt.setup(0, writer)
first = torch.tensor([[alphabet.index("\n")]])
print("".join(alphabet[i] for i in written(lt.random.key(3), first, st)))

said = [found[-1][1] for _, found in results.values()]
assert all(a > b for a, b in pairwise(said)), "to look farther back was of no use"

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

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for window, (_, found) in results.items():
        axes.plot(*zip(*found[1:], strict=True), "o-", label=f"{window} characters")
    axes.set(
        xlabel="steps of training",
        ylabel="bits a character, on text that is not trained on",
    )
    axes.legend(title="gradients through")
    path = Path(__file__).resolve().parent / "output" / "tbptt.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
