"""CUDA graphs: all kernels of a program are started by one call."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import torch
from torch import Tensor

from ._replay import Program

_WARM_UP = 3


class CudaGraph:
    """Run a program that is recorded at the first call, and from then on replayed by the GPU.

    A graph works in memory of its own: what comes in is copied there, and what comes out is copied from there, so that
    results stay what they are when the next call comes. That is why it pays for many small kernels, not for few large
    tensors.

    Args:
        program: Runs on one GPU, without waiting for it.

    Source: `torch.cuda.CUDAGraph`; inductor's own graphs, those of `mode="reduce-overhead"`, overwrite earlier results.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._lock = Lock()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def __call__(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        with self._lock:  # one memory, one call at a time
            if self._graph is None:
                self._capture(inputs)
            assert self._graph is not None
            if self._inputs:
                torch._foreach_copy_(self._inputs, inputs)
            inputs.clear()
            self._graph.replay()
            outputs = [torch.empty_like(output) for output in self._outputs]
            if outputs:
                torch._foreach_copy_(outputs, self._outputs)
            return outputs

    def _capture(self, inputs: list[Tensor]) -> None:
        self._inputs = [one.detach().clone(memory_format=torch.preserve_format) for one in inputs]
        # Kernels are chosen and workspaces made at the first calls, which must not be recorded.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._program(list(self._inputs))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._outputs = list(self._program(list(self._inputs)))
        self._graph = graph
