"""A small GPT, and writing with a cache
=====================================

A transformer learns the reference of the Python language, character by character. Then
it writes: each new character attends to all before it, whose keys and values need not
be computed again. `lt.with_cache` makes them states of the model, so that writing is an
`lt.scan` over a model whose states go along: one program, however long the text is.
"""

import math
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch

import luxtorch as lt
from luxtorch import optim, training

WIDTH, HEADS, LAYERS, BATCH = 64, 4, 2, 32
CONTEXT, STEPS = 128, 350
PROMPT, LENGTHS = 28, (64, 128, 256)

# %%
# Data
# ----
#
# The text is part of every Python. The last tenth is for validation.

text = "\n".join(topics[name] for name in sorted(topics))
alphabet = sorted(set(text))
tokens = torch.tensor([alphabet.index(character) for character in text])
split = len(tokens) * 9 // 10


def windows(starts):
    """Return pieces of the text, (batch, CONTEXT + 1), that begin at some places."""
    return tokens[starts[:, None] + torch.arange(CONTEXT + 1)]


unread = windows(torch.arange(split, len(tokens) - CONTEXT - 1, 8 * CONTEXT))
print(f"{len(text):,} characters, {len(alphabet)} different ones")

# %%
# Model
# -----
#
# Attention rotates queries and keys by their places. So it knows, when the model goes
# on with a text, how much of it there is already. (Places that are looked up in a
# table, as in GPT-2, are numbered by `lt.Positions`, which knows it too.)

block = lt.TransformerEncoderLayer(
    WIDTH,
    HEADS,
    4 * WIDTH,
    dropout=0.0,
    activation="gelu",
    norm_first=True,
    is_causal=True,
    rotary=lt.RotaryPositionalEmbedding(WIDTH // HEADS),
)
model = lt.Chain(
    embed=lt.Embedding(len(alphabet), WIDTH, init_weight=lt.init.normal(std=0.02)),
    blocks=lt.TransformerEncoder(block, LAYERS, norm=lt.LayerNorm(WIDTH)),
    head=lt.Dense(WIDTH, len(alphabet)),
)

# %%
# Training
# --------

cross_entropy = lt.CrossEntropyLoss()


def objective(model, ps, st, data):
    """Return the loss of some pieces, in bits for each character."""
    scores, st = model(data[:, :-1], ps, st)
    loss = cross_entropy(scores.flatten(0, 1), data[:, 1:].flatten())
    return loss / math.log(2), st, {}


def bits(ps, st):
    """Return the bits for each character of the text that is not trained on."""
    with torch.no_grad():
        return objective(model, ps, st, unread)[0].item()


begun = time.perf_counter()
ps, st = lt.setup(0, model)
rule = optim.AdamW(optim.cosine(6e-3, 0.0, STEPS))
ts = training.TrainState(model, ps, st, rule)
step = lt.jit(training.single_train_step, static="objective", backend="replay")
before = bits(ps, st)
for key in lt.random.split(lt.random.key(1), STEPS):
    starts = lt.random.randint(key, (BATCH,), 0, split - CONTEXT - 1)
    *_, ts = step(objective, windows(starts), ts)
ps, st = ts.parameters, lt.test_mode(ts.states)
after = bits(ps, st)
took = time.perf_counter() - begun
print(f"{before:.2f} bits a character, and {after:.2f} after {took:.0f} s")

# %%
# Writing
# -------
#
# The states of the writer hold keys and values of up to 128 characters. Its call on the
# prompt fills in the first of them; each step of the scan adds those of one character.
# They are a carry, as that of a recurrent network.

writer, ps, empty = lt.with_cache(model, ps, st, batch_size=1, max_length=CONTEXT)


def write(writer, pick, prompt, keys, ps, st):
    """Return the characters after a prompt, (1, time), one for each key."""

    def step(carry, key):
        character, st = carry
        scores, st = writer(character, ps, st)
        return (pick(key, scores), st), character[:, 0]

    scores, st = writer(prompt, ps, st)
    first = pick(keys[0], scores[:, -1:])
    return lt.scan(step, (first, st), keys)[1].T


def likeliest(key, scores):
    """Return the likeliest character."""
    return scores.argmax(-1)


def drawn(key, scores):
    """Return a character that is drawn, unlikely ones less often than they would be."""
    return lt.random.categorical(key, scores / 0.7)


# %%
# Without a cache, a text of fixed length is filled in, and the model called on all of
# it for each character.


def write_slowly(prompt, keys, ps, st):
    """Return the likeliest characters after a prompt."""
    length = prompt.shape[1]
    places = torch.arange(length + len(keys))

    def step(written, place):
        scores, _ = model(written, ps, st)
        found = scores.argmax(-1).index_select(1, (place - 1)[None])
        return torch.where(places == place, found, written), found[:, 0]

    rest = prompt.new_zeros(1, len(keys))
    return lt.scan(step, torch.cat([prompt, rest], 1), places[length:])[1].T


def spelled(numbers):
    return "".join(alphabet[number] for number in numbers.flatten())


jitted = lt.jit(write, backend="replay")
jitted_slowly = lt.jit(write_slowly, backend="replay")
prompt = unread[:1, :PROMPT]
keys = lt.random.split(lt.random.key(2), CONTEXT - PROMPT)
greedy = jitted(writer, likeliest, prompt, keys, ps, empty)
assert torch.equal(greedy, jitted_slowly(prompt, keys, ps, st)), "the cache is wrong"
sample = jitted(writer, drawn, prompt, keys, ps, empty)
print(f"{spelled(prompt)}|{spelled(greedy)}")
print(f"{spelled(prompt)}|{spelled(sample)}")

# %%
# What the cache is worth
# -----------------------
#
# With it, a character costs the same wherever it stands, as the cache has one size.


def seconds(f, *args):
    """Return the time of a call, after one that compiles."""
    f(*args)
    begun = time.perf_counter()
    f(*args)
    return time.perf_counter() - begun


times = {"with a cache": [], "without": []}
for length in LENGTHS:
    first, keys = unread[:1, :1], lt.random.split(lt.random.key(3), length - 1)
    writer, ps, empty = lt.with_cache(model, ps, st, batch_size=1, max_length=length)
    took = seconds(jitted, writer, likeliest, first, keys, ps, empty)
    times["with a cache"].append(took)
    times["without"].append(seconds(jitted_slowly, first, keys, ps, st))
    cached, slow = (each[-1] for each in times.values())
    print(f"{length:4} characters: {cached:.2f} s with a cache, {slow:.2f} s without")

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
    for name, found in times.items():
        axes.plot(LENGTHS, found, "o-", label=name)
    axes.set(xlabel="characters", ylabel="seconds to write them", ylim=(0, None))
    axes.legend()
    path = Path(__file__).resolve().parent / "output" / "gpt_generate.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
