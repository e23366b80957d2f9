"""Calls that autograd records: forward and backward are compiled together, by AOTAutograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ._inductor import compile_graph, settings
from ._purity import Known
from ._replay import Program, replay
from ._trace import Trace


class _Function(torch.nn.Module):
    """A function in the form that AOTAutograd takes."""

    def __init__(self, function: Callable[..., Any], known: Known) -> None:
        super().__init__()
        self._function, self._known = function, known

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._known.outputs(self._function(*tensors)))


def recorded(trace: Trace, tensors: Sequence[Tensor], backend: str, options: Mapping[str, Any]) -> Program:
    """Return a differentiable program: its backward is compiled as well.

    The function itself is traced once more, together with its derivative, since the graph knows nothing of
    `torch.no_grad` and of functions with a backward of their own.

    Args:
        trace: The trace.
        tensors: The arguments.
        backend: `"replay"` or `"inductor"`.
        options: Settings of inductor.
    """
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def forward(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return replay(gm) if backend == "replay" else compile_graph(gm, example_inputs, inference=False)

    def backward(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        if backend == "replay":
            return replay(gm)
        # It is compiled at the first backward pass, long after the settings below have been left. What it reads was
        # saved by another program, so that sizes and strides are checked here.
        with torch.no_grad(), settings(trace, {"size_asserts": True, **options}):
            return compile_graph(gm, example_inputs, inference=False, backward=True)

    # As in the first trace, what is closed over can be read; the backward pass may use it too.
    known = Known()
    module: Any = _Function(trace.function, known)
    pairs = zip(trace.fakes, tensors, strict=True)
    with _as_inductor_takes_it(), known:
        compiled = aot_module_simplified(
            module,
            [fake.detach().requires_grad_(tensor.requires_grad) for fake, tensor in pairs],
            fw_compiler=forward,
            bw_compiler=backward,
            partition_fn=min_cut_rematerialization_partition,
            decompositions={} if backend == "replay" else select_decomp_table(),
        )
    return lambda inputs: compiled(*inputs)


@contextlib.contextmanager
def _as_inductor_takes_it() -> Iterator[None]:
    """Set AOTAutograd up as `torch._inductor.compile_fx` does."""
    from torch._functorch import config

    # The order of effects, as of the check that a matrix was not singular, is kept by tokens. As inputs and outputs of
    # the graph they would shift the strides that inductor reports, and each saved tensor would be read by those of
    # its neighbour.
    tokens = {"unlift_effect_tokens": True}
    # What forward saves is not overwritten by backward, which may run again with `retain_graph=True`.
    with config.patch({**tokens, "donated_buffer": False}):
        yield
