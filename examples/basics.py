"""PyTorch and luxtorch for the uninitiated
========================================

Lux.jl opens its documentation with a page for newcomers: arrays, randomness,
derivatives, and a linear regression that is trained for a hundred steps. This is that
page, told for somebody who knows PyTorch. Where the original prints a number that does
not depend on Julia's random stream, or where we have the very arrays behind it, the
number is computed again here and compared. Run it from anywhere:
`python examples/basics.py`.
"""

import json
import sys
from pathlib import Path

import torch

import luxtorch as lt

HERE = Path(__file__).resolve().parent
PAGE = json.loads((HERE / "data" / "lux_tutorial.json").read_text())
"""The arrays and losses that the original page prints, to the last bit."""

checks = []


def compare(what, ours, theirs, rtol=1e-5):
    """Print a number of ours beside the page's, and remember whether they agree."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    agrees = torch.allclose(ours, theirs, rtol=rtol, atol=0.0)
    checks.append(agrees)
    shown = [
        " ".join(f"{number:.8g}" for number in value.flatten().tolist())
        for value in (ours, theirs)
    ]
    verdict = "ok" if agrees else "DIFFERS"
    print(f"{what}\n    luxtorch {shown[0]}\n    page     {shown[1]}  {verdict}")


# %%
# Arrays
# ------
#
# A tensor is a block of numbers in a shape. Here are one with three elements, and a
# square one with four.

x = torch.tensor([1, 2, 3])
print(x)
x = torch.tensor([[1, 2], [3, 4]])
print(x)

# %%
# Bigger ones are seldom typed in. In PyTorch `torch.rand` would fill one from a
# generator that the whole program shares; in luxtorch a draw is a function of a *key*,
# and the same key always gives the same numbers.

key = lt.random.key(0)
x = lt.random.uniform(key, (5, 3))
print(x)
print(lt.random.uniform(key, (5, 3), dtype=torch.float64)[0])  # more digits
print(torch.ones(2, 2), torch.zeros(2), lt.random.normal(key, (3,)), sep="\n")

# %%
# How many elements are there, and in which shape? Indices count from zero, where
# Julia's count from one.

print(x.numel(), x.shape)
print(x[1, 2])  # second row, third column
print(x[:, 2])  # the whole third column

# %%
# Arithmetic goes element by element, and a smaller tensor is repeated to fill a larger
# one: broadcasting.

print(x + x)
print(x - x)
print(x + 1)
column = torch.arange(1, 6)[:, None]
print(torch.zeros(5, 5) + column)
print(torch.zeros(5, 5) + column.T)
print(column * column.T)  # a times table

# %%
# And `@` multiplies matrices.

w_key, x_key = lt.random.split(key)
print(lt.random.normal(w_key, (5, 10)) @ lt.random.uniform(x_key, (10,)))

# %%
# CUDA arrays
# ^^^^^^^^^^^
#
# A device is a function that moves trees of tensors. If there is no GPU here,
# `gpu_device` would say so with a warning and give the CPU; what is drawn from a key
# lands where the key is.

if torch.cuda.is_available():
    gpu = lt.gpu_device()
    print(gpu(x))
    print(lt.random.uniform(gpu(key), (5, 3)))
else:
    print("no GPU here:", lt.get_device(lt.cpu_device()(x)))

# %%
# Immutability
# ------------
#
# luxtorch changes nothing that it is given, and neither should code that builds on it:
# to change a tensor, copy it first. PyTorch does not enforce that, but `grad`, `vmap`
# and `compile` all reward it.

x = torch.arange(1, 9).reshape(4, 2).T
x_copy = x.clone()
x_copy[:, 0] = 0
print("original", x.tolist())
print("changed ", x_copy.tolist())

# %%
# Managing randomness
# -------------------
#
# PyTorch's own generators are machines: each draw moves them on. `replicate` copies one
# with its state, so that three draws from three copies are the same ...

generator = torch.Generator().manual_seed(0)
for i in range(1, 4):
    print(i, torch.rand(4, generator=lt.replicate(generator)))

# %%
# ... while three draws from the generator itself are not.

for i in range(1, 4):
    print(i, torch.rand(4, generator=generator))

# %%
# A key never moves. Whoever needs new numbers derives a new key, which works under
# `vmap` and `compile` too.

for i, subkey in enumerate(lt.random.split(lt.random.key(0), 3), 1):
    print(i, lt.random.uniform(subkey, (4,)))

# %%
# Automatic differentiation
# -------------------------
#
# Reverse mode multiplies a vector with a Jacobian from the left, forward mode from the
# right. The first is cheap for functions of many numbers that return few, such as a
# loss; the second is cheap the other way round.
#
# Gradients
# ^^^^^^^^^
#
# The gradient of half the square of a vector is that vector. Both modes say so, at the
# page's own vector.


def half_square(x):
    return x @ x / 2


v = torch.tensor(PAGE["v"])
compare("gradient by reverse mode", lt.gradient(half_square, v), PAGE["v"])
compare(
    "gradient by forward mode", lt.gradient(half_square, v, mode="forward"), PAGE["v"]
)

# %%
# Jacobian-vector product
# ^^^^^^^^^^^^^^^^^^^^^^^
#
# `pushforward` gives a function that carries a direction through: the value, and how it
# changes along that direction. The page prints the value and the first element of the
# product.


def half_squares(x):
    return x * x / 2


x, v = torch.tensor(PAGE["x"]), torch.ones(5)
VALUE = [0.3850005, 0.71437216, 0.0016247969, 0.031389393, 0.0043726736]
value, jvp = lt.pushforward(half_squares, x)(v)
compare("value by pushforward", value, VALUE)
compare("JVP", jvp[0], -0.877497)

# %%
# Vector-Jacobian product
# ^^^^^^^^^^^^^^^^^^^^^^^
#
# `pullback` gives the value at once, and a function that carries a vector back.

value, back = lt.pullback(half_squares, x)
compare("value by pullback", value, VALUE)
compare("VJP", back(v)[0], -0.877497)

# %%
# Linear regression
# -----------------
#
# A model is a description and holds no numbers. `setup` makes its parameters and its
# states from a seed; a `Dense` layer has no states.

model = lt.Dense(10, 5)
ps, st = lt.setup(0, model)
print(model)
print({name: tuple(parameter.shape) for name, parameter in ps.items()}, st)

# %%
# To follow the page figure for figure, the parameters start from the page's. A
# `ComponentVector` is the same tree as one flat vector, whose parts keep their names
# and are views.

ps = {"weight": torch.tensor(PAGE["weight"]), "bias": torch.tensor(PAGE["bias"])}
vector = lt.ComponentVector(ps)
print(vector)
assert torch.equal(vector.weight, ps["weight"])
storages = [part.untyped_storage() for part in (vector.weight, vector.flat)]
assert storages[0].data_ptr() == storages[1].data_ptr()

# %%
# The data: twenty samples of a known linear map with a little noise. Julia puts samples
# in columns, PyTorch in rows.

x_samples = torch.tensor(PAGE["x_samples"]).T
y_samples = torch.tensor(PAGE["y_samples"]).T
truth = {"weight": torch.tensor(PAGE["W"]), "bias": torch.tensor(PAGE["b"])}
print("x shape:", tuple(x_samples.shape), "y shape:", tuple(y_samples.shape))

# %%
# The loss is a plain function of the parameters, and a training step a plain function
# of the optimizer's state, the parameters and the data. Nothing in it is changed, so
# `torch.compile` takes all of it as one graph.


def loss_function(ps, x, y):
    predicted, _ = model(x, ps, st)
    return ((predicted - y) ** 2).sum()


def train_step(opt_state, ps, x, y):
    gradient = lt.gradient(lambda ps: loss_function(ps, x, y), ps)
    return lt.optim.update(opt_state, ps, gradient)


def train(ps, step=train_step):
    """Take 100 steps; return the loss after each."""
    opt_state = lt.optim.setup(lt.optim.Descent(0.01), ps)
    losses = []
    for _ in range(100):
        opt_state, ps = step(opt_state, ps, x_samples, y_samples)
        losses.append(loss_function(ps, x_samples, y_samples).item())
    return losses


losses = train(vector)
table = PAGE["loss_table"]
compare(
    "loss with the true parameters",
    loss_function(truth, x_samples, y_samples),
    table["ground_truth_loss"],
)
for iteration, loss in zip(table["iteration"], table["loss"], strict=True):
    compare(f"loss after {iteration} iterations", losses[iteration - 1], loss)

# %%
# A dict of parameters trains as the vector does, and so do both under `torch.compile`.

forms = {"dict": ps, "ComponentVector": vector}
for name, parameters in forms.items():
    compiled = torch.compile(train_step, fullgraph=True)
    for how, step in (("eager", train_step), ("compiled", compiled)):
        run = train(parameters, step)
        compare(
            f"all losses, {name}, {how}",
            [run[i - 1] for i in table["iteration"]],
            table["loss"],
        )

# %%
# The curve, with the page's losses as dots.

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

figure, ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
ax.semilogy(range(1, 101), losses, label="luxtorch")
ax.semilogy(
    table["iteration"], table["loss"], "o", fillstyle="none", label="the Lux page"
)
ax.axhline(
    table["ground_truth_loss"],
    color="gray",
    linestyle=":",
    label="with the true parameters",
)
ax.set(
    xlabel="iteration",
    ylabel="sum of squared errors",
    title="A linear regression, figure for figure",
)
ax.legend()
output = HERE / "output" / "basics.png"
output.parent.mkdir(exist_ok=True)
figure.savefig(output, dpi=150)
print("loss curve:", output)

# %%
# Every figure of the page has now been computed again.

print(f"{sum(checks)} of {len(checks)} figures agree with the page")
if not all(checks):
    sys.exit("some figures are off")
print("Try next: .venv/bin/python examples/ensemble_digits.py, 32 networks at once")
