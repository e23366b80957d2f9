"""What a forward costs when it is a function: 16 linear layers of width 32, batch 4, against torch's ways to do it.

Prints each candidate's time relative to calling the module, the median of interleaved rounds, with the quartiles.
"""

import copy
import statistics
import sys
import time

import torch
from torch import nn

import luxtorch as lt


class Stack(nn.Module):
    """A module with a forward of its own, which luxtorch runs as it is."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(16)])

    def forward(self, x):
        """Call one layer after another."""
        for layer in self.layers:
            x = layer(x)
        return x


def candidates(module, x):
    """Return functions without arguments, by name, that compute the same; the first is the module's own call."""
    layer, ps, st = lt.from_torch(module)
    ps_module = {name: value.detach() for name, value in module.named_parameters()}
    vector = lt.ComponentVector(ps)
    found = {
        "module(x)": lambda: module(x),
        "from_torch, ps a dict": lambda: layer(x, ps, st)[0],
        "from_torch, ps a ComponentVector": lambda: layer(x, vector, st)[0],
        "torch.func.functional_call": lambda: torch.func.functional_call(module, ps_module, (x,)),
        "to_torch(from_torch(module))(x)": (lambda back: lambda: back(x))(lt.to_torch(layer, ps, st)),
    }
    try:
        from tensordict import TensorDict
    except ImportError:
        return found
    params = TensorDict.from_module(copy.deepcopy(module)).data

    def to_module():
        with params.to_module(module):
            return module(x)

    return {**found, "tensordict to_module": to_module}


def microseconds(function, calls):
    """Return what one call takes."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls * 1e6


def main(rounds=21, calls=200):
    """Print a table for each kind of module."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {rounds} rounds of {calls} calls, no_grad")
    x = torch.linspace(-1, 1, 128).view(4, 32)
    for module in (nn.Sequential(*(nn.Linear(32, 32) for _ in range(16))), Stack()):
        functions = candidates(module, x)
        for name, function in functions.items():
            torch.testing.assert_close(function(), module(x), msg=name)
        times = {name: [] for name in functions}
        for name in [*functions] * (rounds + 1):
            times[name].append(microseconds(functions[name], calls))
        own = statistics.median(times["module(x)"][1:])
        print(f"\n{type(module).__name__}: {own:.0f} us a call")
        for name, each in times.items():
            low, median, high = statistics.quantiles([value / own for value in each[1:]], n=4)
            print(f"  {name:34} {median:5.2f}   ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    with torch.no_grad():
        main(*map(int, sys.argv[1:]))
