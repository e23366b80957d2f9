"""What a training step holds at most, with checkpoints and without.

With `torch.utils.checkpoint` around each block, luxtorch and torch; and through `lt.scan`, by its `checkpoint`.

Prints the bytes of all tensors that the third step has allocated, beyond what was there before it, at the moment when
they are most: torch's profiler sees each of them come and go, so that the numbers are exact.
"""

import gc
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import luxtorch as lt
from luxtorch import optim, training


class LlamaBlock(nn.Module):
    """Attention with rotary embeddings and SwiGLU, each after an RMSNorm."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x, cos, sin):
        """Add attention and a feed-forward network to (batch, time, width)."""
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), self.dropout, self.training)
        y = self.norm_2(x)
        return x + F.dropout(self.down(F.silu(self.gate(y)) * self.up(y)), self.dropout, self.training)


class Llama(nn.Module):
    """A language model, with the tables of the rotary embedding in a buffer."""

    def __init__(self, checkpointed, *, vocabulary=64, width=64, heads=4, depth=2, time=64, dropout=0.0):
        super().__init__()
        self.checkpointed = checkpointed
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, dropout) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        size = width // heads
        angles = torch.outer(torch.arange(time), 10000.0 ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)
        self.register_buffer("rotary", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    def forward(self, tokens):
        """Return logits (batch, time, vocabulary)."""
        x = self.embed(tokens)
        for block in self.blocks:
            inputs = (x, *self.rotary)
            x = checkpoint(block, *inputs, use_reentrant=False) if self.checkpointed else block(*inputs)
        return self.head(self.norm(x))


class DenseLayer(nn.Module):
    """Compute new channels from all that came before."""

    def __init__(self, channels, growth, dropout):
        super().__init__()
        self.norm_1, self.conv_1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm_2, self.conv_2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, *features):
        """Return (batch, growth, height, width)."""
        y = self.conv_1(self.norm_1(torch.cat(features, 1)).relu())
        return self.drop(self.conv_2(self.norm_2(y).relu()))


class DenseNet(nn.Module):
    """A dense block, with its checkpoints as torchvision has them: around all of a layer."""

    def __init__(self, checkpointed, *, classes=10, growth=8, depth=2, dropout=0.0):
        super().__init__()
        self.checkpointed = checkpointed
        self.stem = nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(DenseLayer((2 + i) * growth, growth, dropout) for i in range(depth))
        self.norm, self.head = nn.BatchNorm2d((2 + depth) * growth), nn.Linear((2 + depth) * growth, classes)

    def forward(self, x):
        """Return logits (batch, classes)."""
        features = [self.stem(x)]
        for layer in self.layers:
            y = checkpoint(layer, *features, use_reentrant=False) if self.checkpointed else layer(*features)
            features.append(y)
        return self.head(self.norm(torch.cat(features, 1)).relu().mean((2, 3)))


def loss_of(logits, targets):
    """Return the mean cross entropy over all targets."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def torch_step(module, data):
    """Return a training step of torch's own."""
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)

    def step():
        optimizer.zero_grad()
        loss_of(module(data[0]), data[1]).backward()
        optimizer.step()

    return step


def luxtorch_step(module, data, **options):
    """Return the same of luxtorch."""
    ts = training.TrainState(*lt.from_torch(module), optim.AdamW(1e-3))

    def objective(model, ps, st, data):
        logits, st = model(data[0], ps, st)
        return loss_of(logits, data[1]), st, {}

    def step():
        nonlocal ts
        ts = training.single_train_step(objective, data, ts, **options)[3]

    return step


def held(function):
    """Return how many bytes of tensors that a function has allocated are held after it, and at most at one moment."""
    gc.collect()  # so that nothing from before is let go while it is counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    now = most = 0
    events = [each for each in found.profiler.kineto_results.events() if each.name() == "[memory]"]
    for each in sorted(events, key=lambda each: each.start_ns()):
        now += each.nbytes()
        most = max(most, now)
    return now, most


def tokens():
    """Return a text, and the same one token later."""
    text = torch.arange(16 * 65).view(16, 65) * 7 % 64
    return text[:, :-1], text[:, 1:]


def images():
    """Return images, and their classes."""
    return torch.linspace(-1, 1, 16 * 3 * 24 * 24).sin().view(16, 3, 24, 24), torch.arange(16) % 10


PROBLEMS = {
    "Llama-like, 8 blocks": (Llama, {"depth": 8}, tokens),
    "DenseNet, 12 layers": (DenseNet, {"depth": 12}, images),
}


def measured(make, data):
    """Return the peaks of all ways to train, without checkpoints and with them, by the name of the way."""
    ways = {
        "torch": torch_step,
        "luxtorch": luxtorch_step,
        "luxtorch, donated": lambda module, data: luxtorch_step(module, data, donate=True),
    }
    found = {}
    for name, way in ways.items():
        found[name] = []
        for checkpointed in (False, True):
            step = way(make(checkpointed), data)
            step()
            step()
            found[name].append(held(step)[1])
            del step
    return found


class Scanned(lt.WrapperLayer):
    """Call a cell of 256 hidden units along a sequence (time, batch, features), and return the last hidden state."""

    cell: lt.Layer
    checkpoint: bool | int

    def __call__(self, x, ps, st):
        """Return (batch, hidden)."""

        def step(h, x):
            (_, (h,)), _ = self.cell((x, (h,)), ps, st)
            return h, None

        return lt.scan(step, x.new_zeros(x.shape[1], 256), x, checkpoint=self.checkpoint)[0], st


def scan_step(checkpoint, jitted, steps=1000):
    """Return a training step of a GRU of 256 hidden units through a scan."""
    model = lt.Chain(Scanned(lt.GRUCell(64, 256), checkpoint), lt.Dense(256, 10))
    ts = training.TrainState(model, *lt.setup(0, model), optim.Adam(1e-3))
    data = lt.random.normal(lt.random.key(0), (steps, 32, 64)), torch.arange(32) % 10

    def once(ts, data):
        return training.single_train_step(lt.CrossEntropyLoss(), data, ts)[3]

    call = lt.jit(once) if jitted else once

    def step():
        nonlocal ts
        ts = call(ts, data)

    return step


def scans():
    """Print a table of the ways to differentiate a scan."""
    print("\nlt.scan, GRU of 256, 1000 steps, batch 32, MiB at most")
    for name, jitted in (("eager", False), ("lt.jit", True)):
        peaks = []
        for saved in (False, True, 32):
            step = scan_step(saved, jitted)
            step()
            step()
            peaks.append(f"checkpoint={saved}: {held(step)[1] / 2**20:.1f}")
            del step
        print(f"  {name:8}", *peaks, sep="  ")


def main():
    """Print a table for each kind of module, and for scans."""
    print(f"torch {torch.__version__}")
    for name, (make, options, data) in PROBLEMS.items():
        found = measured(partial(make, **options), data())
        print(f"\n{name}, MiB at most            plain     checkpointed")
        for way, peaks in found.items():
            shown = (f"{ours / 2**20:7.1f} ({ours / own:.2f})" for ours, own in zip(peaks, found["torch"], strict=True))
            print(f"  {way:20}", *shown)
    scans()


if __name__ == "__main__":
    main()
