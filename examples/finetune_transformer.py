"""LoRA on a transformer
=====================

A BERT of `transformers`, with `peft`'s LoRA on it, is fine-tuned as a function:
`lt.from_torch` makes a layer of any `nn.Module`, and what `peft` has frozen comes in
frozen. So the parameters `ps` are those of LoRA alone, for the optimizer, for a
compiled step, and for the gradient of each sample. At the end the trained values go
back into the module, where `peft` merges them.

It needs the packages `transformers` and `peft`. Nothing is downloaded: the encoder has
random weights. With `from_pretrained` in the place of a config, the rest is the same.
"""

import ast
import asyncio
import email
import re
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, set_seed

import luxtorch as lt
from luxtorch import optim, training

EPOCHS, BATCH, LENGTH, WORDS = 10, 32, 20, 1000
# Of peft's own affairs.
warnings.filterwarnings(
    "ignore", message=".*activation_checkpointing", category=FutureWarning
)

# %%
# Data
# ----
#
# Python brings texts along: the docstrings of its packages. From which of two is a
# piece of twenty words? Of every fourth docstring all pieces are held out.


documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def docstrings(package):
    """Yield the docstrings of a package, each as a list of words and signs."""
    for path in sorted(Path(package.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, documented):
                text = (ast.get_docstring(node) or "").lower()
                yield re.findall(r"[a-z]+|[^\sa-z]", text)


packages = (asyncio, email)
pieces, held_out = [], []  # pairs of words and a label
for label, package in enumerate(packages):
    for i, words in enumerate(docstrings(package)):
        cut = [
            (words[start : start + LENGTH], label)
            for start in range(0, len(words), LENGTH)
        ]
        (pieces if i % 4 else held_out).extend(cut)

counts = Counter(word for words, _ in pieces for word in words)
# 0 is a gap, 1 any other word.
numbers = {word: 2 + i for i, (word, _) in enumerate(counts.most_common(WORDS - 2))}


def encoded(pieces):
    """Return tokens (pieces, LENGTH) and labels (pieces,)."""
    rows = [
        [numbers.get(word, 1) for word in words] + [0] * (LENGTH - len(words))
        for words, _ in pieces
    ]
    return torch.tensor(rows), torch.tensor([label for _, label in pieces])


x, y = encoded(pieces)
x_test, y_test = encoded(held_out)
print(
    f"{len(x)} pieces, and {len(x_test)} held out, "
    f"of which {float(y_test.float().mean()):.0%} are of email"
)

# %%
# Model
# -----
#
# So far all is as ever, gradient checkpointing included. Then the module becomes a
# layer. Its parameters are those that `peft` trains: the matrices of LoRA and the
# classifier. All others are among the states.

set_seed(0)  # transformers and peft draw initial values from torch's global generator
config = BertConfig(
    vocab_size=WORDS,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=LENGTH,
    num_labels=len(packages),
    use_cache=False,
)
bert = BertForSequenceClassification(config)
getattr(bert, "activation_checkpointing_enable", bert.gradient_checkpointing_enable)(
    {"use_reentrant": False}
)
lora = LoraConfig(
    task_type="SEQ_CLS",
    r=8,
    lora_alpha=16,
    lora_dropout=0.1,
    target_modules=["query", "value", "dense"],
)
module = get_peft_model(bert, lora).train()

layer, ps, st = lt.from_torch(module)
trained = sum(leaf.numel() for leaf in lt.flatten_names(ps).values())
total = sum(value.numel() for value in module.parameters())
print(f"{trained} parameters to train, of {total}")
assert lt.flatten_names(ps).keys() == {
    name for name, value in module.named_parameters() if value.requires_grad
}

# %%
# Training
# --------
#
# Called as it is, the step keeps the inputs of each of BERT's layers and computes the
# rest again in the backward pass, as gradient checkpointing has it. `lt.jit` records
# the same step once, as one graph of operators without Python; there checkpoints have
# no effect. Both give the same numbers, dropout included: its masks come from a key in
# the states.


def inputs(tokens):
    """Return the arguments of BERT.

    The mask has four dimensions: of one in two, BERT asks whether it is all ones.
    """
    return {"input_ids": tokens, "attention_mask": (tokens > 0)[:, None, None]}


def logits_of(model, ps, st, tokens):
    """Return what the model says of a batch of tokens, and the new states."""
    output, st = model(lt.Inputs(**inputs(tokens)), ps, st)
    return output.logits, st


def objective(model, ps, st, data):
    """Return the loss of a batch."""
    tokens, labels = data
    logits, st = logits_of(model, ps, st, tokens)
    return F.cross_entropy(logits, labels), st, {}


def step(ts, data):
    """Return the loss and the next training state."""
    _, loss, _, ts = training.single_train_step(objective, data, ts)
    return loss, ts


def accuracy(ts):
    """Return the share of the held-out pieces that are recognized."""
    with torch.no_grad():
        logits, _ = logits_of(ts.model, ts.parameters, lt.test_mode(ts.states), x_test)
    return float((logits.argmax(1) == y_test).float().mean())


# Without a compiler, which would take longer than all the training here.
fast_step = lt.jit(step, backend="replay")
start = training.TrainState(layer, ps, st, optim.AdamW(3e-3, weight_decay=0.01))
first = x[:BATCH], y[:BATCH]
difference = abs(float(step(start, first)[0] - fast_step(start, first)[0]))
assert difference < 1e-4, "the recorded step differs from the one that recomputes"

ts, history = start, []
for epoch in range(EPOCHS):
    order = lt.random.permutation(lt.random.fold_in(lt.random.key(1), epoch), len(x))
    losses = []
    for batch in order[: len(x) // BATCH * BATCH].split(BATCH):
        loss, ts = fast_step(ts, (x[batch], y[batch]))
        losses.append(loss)
    history.append((float(torch.stack(losses).mean()), accuracy(ts)))
    loss, share = history[-1]
    print(f"epoch {epoch + 1:2d}  loss {loss:.3f}  accuracy, held out {share:.3f}")
chance = float(torch.bincount(y_test).max() / len(y_test))
assert history[-1][0] < history[0][0] and history[-1][1] > chance + 0.05, (
    "nothing was learned"
)

# %%
# The gradient of each piece
# --------------------------
#
# The model is a function, so `vmap` of `grad` gives the gradient of each piece's own
# loss by the parameters of LoRA: as many trees of gradients as there are pieces, in one
# call. Where one is long, the model was surprised. Sums of such gradients, each made
# short, are what training with differential privacy takes.


def loss_of_one(ps, tokens, label):
    """Return the loss of one piece, without dropout."""
    return objective(layer, ps, lt.test_mode(ts.states), (tokens[None], label[None]))[0]


few = torch.arange(0, len(x_test), len(x_test) // 8)[:8]
each = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))(
    ts.parameters, x_test[few], y_test[few]
)
lengths = sum(
    leaf.flatten(1).square().sum(1) for leaf in lt.flatten_names(each).values()
).sqrt()
for i in lengths.argsort(descending=True):
    words, label = held_out[few[i]]
    name, text = packages[label].__name__, " ".join(words)[:60]
    print(f"{float(lengths[i]):6.2f}  {name:8}{text}")

# %%
# And back
# --------
#
# `lt.to_torch` gives a module again. Its `state_dict` has the names of the one that
# came in, so that this takes it, and `peft` can merge LoRA into the weights of BERT.
# What is left is a plain BERT, for whoever knows nothing of all this.

module.load_state_dict(lt.to_torch(ts.model, ts.parameters, ts.states).state_dict())
merged = module.merge_and_unload().eval()
plain = BertForSequenceClassification(config).eval()
plain.load_state_dict(merged.state_dict())

with torch.no_grad():
    logits, _ = logits_of(ts.model, ts.parameters, lt.test_mode(ts.states), x_test)
    error = max(
        float((each(**inputs(x_test)).logits - logits).abs().max())
        for each in (merged, plain)
    )
print(f"merged, the logits differ by at most {error:.0e}")
assert error < 1e-4, "the merged model is another one"

try:
    import matplotlib
except ImportError:
    print("no picture: matplotlib is not installed")
else:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    means, shares = zip(*history, strict=True)
    epochs = range(1, len(history) + 1)
    left.plot(epochs, means, color="tab:blue", label="loss in training")
    left.set(xlabel="epoch", ylabel="cross entropy")
    other = left.twinx()
    other.plot(epochs, shares, color="tab:orange", label="accuracy, held out")
    other.axhline(
        chance, color="tab:orange", lw=0.8, ls="--", label="the larger class always"
    )
    other.set(ylabel="accuracy", ylim=(0.4, 1.0))
    left.legend(handles=[*left.get_lines(), *other.get_lines()], loc="upper right")
    scores = logits.softmax(1)[:, 1]
    for label, package in enumerate(packages):
        right.hist(
            scores[y_test == label],
            25,
            range=(0, 1),
            alpha=0.6,
            label=f"pieces of {package.__name__}",
        )
    right.set(xlabel=f"probability of {packages[1].__name__}", ylabel="held-out pieces")
    right.legend()
    path = Path(__file__).resolve().parent / "output" / "finetune_transformer.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
