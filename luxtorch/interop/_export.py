"""From a layer with its parameters and states to a `torch.export.ExportedProgram`."""

from __future__ import annotations

from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from luxtorch.core import InputError, Layer, Parameters, States, tree_leaves, tree_map

from ._inputs import arguments
from ._to_torch import LayerModule, to_torch


def export(
    layer: Layer, ps: Parameters, st: States, example_inputs: Any, *, dynamic_batch: bool = True
) -> ExportedProgram:
    """Return a model as a program that runs without luxtorch, on batches of any size.

    The program computes what `lt.to_torch` does, in the mode of the states: pass `lt.test_mode(st)` for inference. In
    training mode it also writes its buffers. It is saved by `torch.export.save`, loaded by `torch.export.load`, and
    called as `program.module()(x)`. `torch.onnx.export(program, f="model.onnx")` takes it to ONNX, if the packages onnx
    and onnxscript are installed.

    Args:
        layer: The model.
        ps: Its parameters; they are copied into the program.
        st: Its states; likewise.
        example_inputs: An input of the model, several as `lt.Inputs`. Shapes and dtypes matter, and values only if the
            model asks for them.
        dynamic_batch: Whether the size of the batch may vary: the first dimension of the first tensor in the input, and
            of each other one that is as long.

    Returns:
        The program.

    Raises:
        InputError: If the example has no batch of two or more: torch takes any other size for a constant.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Dense(3, 4, torch.relu), lt.BatchNorm(4))
        >>> ps, st = lt.setup(0, model)
        >>> program = lt.export(model, ps, lt.test_mode(st), torch.ones(2, 3))
        >>> program.module()(torch.ones(7, 3)).shape
        torch.Size([7, 4])

    Random numbers of a model in training mode come from operators of luxtorch: such a program does need it. For other
    dimensions that vary, call `torch.export.export` on the module of `lt.to_torch`.
    """
    args, kwargs = arguments(example_inputs)
    size = _batch_size(example_inputs) if dynamic_batch else -1
    module = to_torch(layer, ps, st).requires_grad_(False)
    names = _name_inputs(module, args, kwargs)
    shapes = tree_map(lambda leaf: _dynamic(leaf, size), {**dict(zip(names, args, strict=True)), **kwargs})
    with torch.no_grad():
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes)


def _name_inputs(module: LayerModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Give a module a forward with a name for each input, and return those of the positional ones.

    The program has them for its inputs, and torch 2.13 confuses the shapes of inputs that a `**kwargs` takes.
    """
    prefix = "x"
    while any(name.startswith(prefix) for name in kwargs):
        prefix += "_"
    names = [prefix] if len(args) == 1 else [f"{prefix}{i}" for i in range(1, len(args) + 1)]
    forward = module.forward
    named: Any = lambda *args, **kwargs: forward(*args, **kwargs)  # noqa: E731
    named.__signature__ = Signature(
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        + [Parameter(name, Parameter.KEYWORD_ONLY) for name in kwargs]
    )
    module.forward = named  # type: ignore[method-assign]
    return names


def _batch_size(inputs: Any) -> int:
    sizes = [len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    if not sizes or sizes[0] < 2:
        raise InputError(
            "The example has no batch whose size could vary.",
            expected="a tensor with a first dimension of two or more",
            got=f"a batch of {sizes[0]}" if sizes else "no tensor with a dimension",
            fix="Pass an example of two samples, or dynamic_batch=False.",
        )
    return sizes[0]


def _dynamic(leaf: Any, size: int) -> Any:
    """Return which dimensions of an input vary."""
    if not isinstance(leaf, Tensor):
        return None
    return {0: Dim("batch")} if leaf.ndim and len(leaf) == size else {}
