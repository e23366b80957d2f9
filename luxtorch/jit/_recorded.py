"""Calls that autograd records: forward and backward are compiled together, by AOTAutograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ._inductor import DEFAULTS, compile_graph
from ._purity import tensors_in
from ._replay import Program, replay
from ._sizes import any_symbol
from ._trace import Trace


class _Function(torch.nn.Module):
    """A function in the form that AOTAutograd takes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with _Known():  # type: ignore[no-untyped-call]
            return tuple(self._function(*tensors))


class _Known(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compute what depends on closed-over tensors alone, as in the first trace, so that its value can be read."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = [*args, *kwargs.values()]
        given = tensors_in(values)
        known = all(type(tensor) is Tensor and not tensor.requires_grad for tensor in given) and not any_symbol(values)
        if given and known:
            with _disable_current_modes():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


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
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table

    def forward(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return replay(gm) if backend == "replay" else compile_graph(gm, example_inputs, inference=False)

    def backward(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        if backend == "replay":
            return replay(gm)
        # It is compiled at the first backward pass, long after the settings below have been left.
        with torch.no_grad(), config.patch({**DEFAULTS, **options}):
            return compile_graph(gm, example_inputs, inference=False, backward=True)

    module: Any = _Function(trace.function)
    pairs = zip(trace.fakes, tensors, strict=True)
    compiled = aot_module_simplified(
        module,
        [fake.detach().requires_grad_(tensor.requires_grad) for fake, tensor in pairs],
        fw_compiler=forward,
        bw_compiler=backward,
        partition_fn=min_cut_rematerialization_partition,
        decompositions={} if backend == "replay" else select_decomp_table(),
    )
    return lambda inputs: compiled(*inputs)
