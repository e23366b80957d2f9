"""Conversion of layers to `torch.nn.Module`: `to_torch`, and `export` to a `torch.export` program."""

from __future__ import annotations

from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from luxtorch.core import TRAINING, InputError, Layer, Parameters, States, map_tensors, out_of_range, tensors, tree_map
from luxtorch.surgery import Frozen, unfreeze

from ._branch import Branch, branches_only
from ._inputs import Inputs, arguments
from ._names import names_in


class LayerModule(Branch):
    """Hold a layer with its parameters and states as a `torch.nn.Module`; `lt.to_torch` makes one.

    Args:
        layer: The layer.
        ps: Its parameters.
        st: Its states.
    """

    def __init__(self, layer: Layer, ps: Parameters, st: States) -> None:
        modes = _modes(st)
        super().__init__(ps, st, any(modes) if modes else True)
        self._layer = layer
        for prefix, names in names_in(st):
            for name in names.transient:
                owner, _, own = (prefix + name).rpartition(".")
                self.get_submodule(owner)._non_persistent_buffers_set.add(own)
            for second, first in names.tied:
                self._tie(prefix + second, prefix + first)

    def _tie(self, second: str, first: str) -> None:
        """Register a tensor, or the submodule that holds it, under a second name."""
        (owner, _, name), (source, _, old) = second.rpartition("."), first.rpartition(".")
        try:
            branch = self.get_submodule(owner)
        except AttributeError:  # the submodule is registered under its first name alone: its parent is what is shared
            if name == old and owner:
                self._tie(owner, source)
            return
        held = self.get_submodule(source)
        both: Any = ((branch._parameters, held._parameters), (branch._buffers, held._buffers))
        for own, others in both:
            if old in others:
                own[name] = others[old]
        if old in held._modules and name not in branch._modules:
            branch._modules[name] = held._modules[old]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's output, and keep its new states.

        Args:
            *args: The input. Several arguments, or keywords, become `lt.Inputs`.
            **kwargs: Likewise.
        """
        x = args[0] if len(args) == 1 and not kwargs else Inputs(*args, **kwargs)
        st = self._read_st()
        y, new = self._layer(x, self._read_ps(), st)
        self._write_st(new, st)
        return y

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self._layer!r}"


def to_torch(layer: Layer, ps: Parameters, st: States) -> LayerModule:
    """Return a `torch.nn.Module` that computes what a layer does, from copies of its parameters and states.

    The parameters are parameters and the states are buffers, under the names that they have in the trees:
    `module.layer_1.weight`. The mode is that of the states; from then on `train()` and `eval()` set it, of the whole
    model or of a part, such as `module.layer_2.eval()`. A call keeps the new states in the buffers, random keys among
    them, which are stored as int64 and are not in the `state_dict`. Frozen parameters do not require a gradient. The
    `state_dict` of what `lt.from_torch` converted has the names of the module's own. `lt.from_torch` returns the layer,
    with the current values of the module.

    Args:
        layer: The layer.
        ps: Its parameters.
        st: Its states.

    Returns:
        The module. Called with one argument it passes that on; several arguments, or keywords, become `lt.Inputs`.

    Raises:
        InputError: If `layer` is not a layer, or if a name cannot be that of a submodule, such as "forward".
        DTypeError: If the trees hold something else than tensors.

    Example:
        >>> import torch, luxtorch as lt
        >>> layer = lt.Chain(lt.Dense(3, 4, torch.relu), lt.BatchNorm(4), lt.Dense(4, 1))
        >>> module = lt.to_torch(layer, *lt.setup(0, layer))
        >>> list(module.state_dict())[:3]
        ['layer_1.weight', 'layer_1.bias', 'layer_2.weight']
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        >>> module(torch.ones(8, 3)).sum().backward()
        >>> optimizer.step()
        >>> bool(module.layer_2.running_mean.any())  # no longer zero: the call has kept its statistics
        True

    A second call in the backward pass, as by `torch.utils.checkpoint`, draws the next random numbers; use
    `lt.Checkpointed` inside the layer. In torch.func.functional_call, pass the buffers too, and find the new states
    there afterwards.

    Source: Lux's `StatefulLuxLayer` is the nearest there.
    """
    if not isinstance(layer, Layer):
        raise out_of_range("layer", layer, "a layer", fix="Call to_torch(layer, ps, st).")
    if not isinstance(layer, Frozen):
        return LayerModule(layer, ps, st)
    plain, all_ps, own_st = unfreeze(layer, ps, st)
    module = LayerModule(plain, all_ps, own_st)
    for name in layer.names:
        module.get_parameter(name).requires_grad_(False)
    return module


def layer_of(module: LayerModule) -> tuple[Layer, dict[str, Any], dict[str, Any]] | None:
    """Return the layer, the parameters and the states of a module; None if the module was altered since."""
    if type(module) is not LayerModule or not branches_only(module):
        return None
    ps, st = (map_tensors(lambda leaf: leaf.detach().clone(), tree) for tree in (module._read_ps(), module._read_st()))
    return module._layer, ps, st


def _modes(st: States) -> list[bool]:
    found = []
    for name, value in st.items():
        if name == TRAINING:
            found.append(bool(value))
        elif isinstance(value, dict):
            found += _modes(value)
    return found


def export(
    layer: Layer, ps: Parameters, st: States, example_inputs: Any, *, dynamic_batch: bool = True
) -> ExportedProgram:
    """Export a model as a program that runs without luxtorch, on batches of any size.

    The program computes what `lt.to_torch` does, in the mode of the states: pass `lt.test_mode(st)` for inference. In
    training mode it also writes its buffers. It is saved by `torch.export.save`, loaded by `torch.export.load`, and
    called as `program.module()(x)`. `torch.onnx.export(program, f="model.onnx")` takes it to ONNX, if the packages onnx
    and onnxscript are installed.

    Args:
        layer: The model.
        ps: Its parameters; they are copied into the program.
        st: Its states; likewise.
        example_inputs: An input of the model, several as `lt.Inputs`. Shapes and dtypes matter; values do only if
            the model reads them.
        dynamic_batch: Whether the size of the batch may vary: the first dimension of the first tensor in the input, and
            of each other one that is as long.

    Returns:
        The program.

    Raises:
        InputError: If the example has no batch of two or more: torch specializes on a batch of one.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Dense(3, 4, torch.relu), lt.BatchNorm(4))
        >>> ps, st = lt.setup(0, model)
        >>> program = lt.export(model, ps, lt.test_mode(st), torch.ones(2, 3))
        >>> program.module()(torch.ones(7, 3)).shape
        torch.Size([7, 4])

    Random numbers of a model in training mode come from operators of luxtorch, which such a program needs. For other
    dynamic dimensions, call `torch.export.export` on the module of `lt.to_torch`.

    `torch.export` also takes modules whose arguments and results are trees of luxtorch, such as parameters, states, a
    ComponentVector or the state of an optimizer, and saves these programs; to load one, luxtorch has to be imported.
    What a tree's structure names, such as an activation, is written by its name, if it is a function of torch or of
    luxtorch or one that `torch.serialization.add_safe_globals` allows. With `strict=True` torch takes no optimizer.
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
    sizes = [len(leaf) for leaf in tensors(inputs) if leaf.ndim]
    if not sizes or sizes[0] < 2:
        got = f"a batch of {sizes[0]}" if sizes else "no tensor with a dimension"
        fix = "Pass an example of two samples, or dynamic_batch=False."
        raise InputError("The example must have a batch of at least two samples.", got=got, fix=fix)
    return sizes[0]


def _dynamic(leaf: Any, size: int) -> Any:
    """Return the dynamic dimensions of an input."""
    if not isinstance(leaf, Tensor):
        return None
    return {0: Dim("batch")} if leaf.ndim and len(leaf) == size else {}
