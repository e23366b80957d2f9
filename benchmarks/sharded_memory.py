"""What a rank holds at most in a step of a fully sharded model: torch's FSDP2, and luxtorch's gathered layers.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.sharded_memory

Prints the bytes of all tensors that the third step has allocated, beyond what was there before it, at the moment when
they are most, and the milliseconds of a step. Adam, and 64 samples on each rank.
"""

import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import luxtorch as lt
from luxtorch import distributed, optim, training

from .checkpoint_memory import held

DEPTH, WIDTH = 16, 1024


def fsdp2(x):
    """Return a step of torch's own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    module = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)))
    for block in module:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)

    def step():
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def luxtorch(x, backend=None, donate=False):
    """Return the same of luxtorch: a ComponentVector for each layer, gathered forward and backward."""
    block = lt.Checkpointed(distributed.Gathered(lt.Dense(WIDTH, WIDTH, "tanh")))
    model = lt.Chain(*[block] * DEPTH)
    ps, st = lt.setup(0, model)
    sharded = distributed.shard_parameters({name: lt.ComponentVector(part) for name, part in ps.items()})
    ts = training.TrainState(model, sharded, st, optim.Adam(1e-3))

    def objective(model, ps, st, x):
        y, st = model(x, ps, st)
        return y.square().mean(), st, {}

    def once(ts, x):
        return training.single_train_step(objective, x, ts, donate=donate and not backend)[3]

    call = lt.jit(once, backend=backend, donate="ts" if donate else ()) if backend else once

    def step():
        nonlocal ts
        ts = call(ts, x)

    return step


WAYS = {
    "FSDP2": fsdp2,
    "luxtorch": luxtorch,
    "luxtorch, donated": lambda x: luxtorch(x, donate=True),
    "lt.jit, replay, donated": lambda x: luxtorch(x, "replay", donate=True),
    "lt.jit, inductor, donated": lambda x: luxtorch(x, "inductor", donate=True),
}


def main():
    """Print a line for each way."""
    distributed.initialize()
    x = lt.random.normal(lt.random.key(distributed.rank()), (64, WIDTH))
    own = DEPTH * (WIDTH + 1) * WIDTH * 4 / distributed.world_size() / 2**20
    if distributed.rank() == 0:
        print(f"torch {torch.__version__}, {distributed.world_size()} ranks, each with {own:.0f} MiB of parameters")
    for name, way in WAYS.items():
        step = way(x)
        step()
        step()
        most = held(step)[1] / 2**20
        start = time.perf_counter()
        for _ in range(5):
            step()
        seconds = (time.perf_counter() - start) / 5
        if distributed.rank() == 0:
            print(f"  {name:26} {most:6.1f} MiB at most   {1e3 * seconds:6.0f} ms", flush=True)
        del step
    distributed.shutdown()


if __name__ == "__main__":
    sys.exit(main())
