"""Train models of luxtorch under DistributedDataParallel, and save what each process has in the end.

Run as `data_parallel_run.py PROCESSES FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import luxtorch as lt
from luxtorch.interop import to_torch

PLAIN = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.LayerNorm((4,)), lt.Dense(4, 2))
FULL = lt.Chain(lt.Dense(3, 4, torch.tanh), lt.BatchNorm(4), lt.Dropout(0.3), lt.Dense(4, 2))


def train(module, x):
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


def work(rank: int, processes: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    x = lt.random.normal(lt.random.key(1), (8, 3))
    own = x.chunk(processes)[rank]
    result = {}
    for name, layer in (("plain", PLAIN), ("full", FULL)):
        module = to_torch(layer, *lt.setup(rank, layer))  # the others take over what the first has
        train(DistributedDataParallel(module), own)
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)  # as the next call would do
        result[name] = module.state_dict()
    alone = to_torch(PLAIN, *lt.setup(0, PLAIN))
    train(alone, x)
    result["alone"] = alone.state_dict()
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    processes = int(sys.argv[1])
    mp.spawn(work, (processes, sys.argv[2]), processes)
