"""From a layer with its parameters and states to a `torch.nn.Module`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from luxtorch.core import TRAINING, InputError, Layer, Parameters, States, tree_map
from luxtorch.surgery import Frozen, unfreeze

from ._branch import Branch, branches_only
from ._inputs import Inputs
from ._names import names_in


class LayerModule(Branch):
    """Be a `torch.nn.Module` that holds a layer's parameters and states; `lt.to_torch` makes one.

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
        """Give a tensor, or the module that it stands in, another name."""
        (owner, _, name), (source, _, old) = second.rpartition("."), first.rpartition(".")
        try:
            branch = self.get_submodule(owner)
        except AttributeError:  # there is only the first of a module's places: climb to the one that is shared
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
    them, which stand as int64 and are not in the `state_dict`. Frozen parameters do not require a gradient. The
    `state_dict` of what `lt.from_torch` converted has the names of the module's own. `lt.from_torch` gives the layer
    back, with the values that the module then has.

    Args:
        layer: The layer.
        ps: Its parameters.
        st: Its states.

    Returns:
        The module. Called with one argument it passes that on; several arguments, or keywords, become `lt.Inputs`.

    Raises:
        InputError: If `layer` is no layer, or if a name cannot be that of a part of a module, such as "forward".
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

    Whoever calls the module anew in the backward pass, as `torch.utils.checkpoint` does, gets the next random numbers;
    use `lt.Checkpointed` inside the layer. In torch.func.functional_call, pass the buffers too, and find the new states
    there afterwards.

    Source: Lux's `StatefulLuxLayer` is the nearest there.
    """
    if not isinstance(layer, Layer):
        raise InputError(
            "to_torch takes a layer.",
            expected="to_torch(layer, ps, st)",
            got=f"{layer!r:.80} of type {type(layer).__name__}",
        )
    if not isinstance(layer, Frozen):
        return LayerModule(layer, ps, st)
    plain, all_ps, own_st = unfreeze(layer, ps, st)
    module = LayerModule(plain, all_ps, own_st)
    for name in layer.names:
        module.get_parameter(name).requires_grad_(False)
    return module


def held(module: LayerModule) -> tuple[Layer, dict[str, Any], dict[str, Any]] | None:
    """Return the layer, the parameters and the states of a module; None if the module was altered meanwhile."""
    if type(module) is not LayerModule or not branches_only(module):
        return None
    ps, st = (
        tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)
        for tree in (module._read_ps(), module._read_st())
    )
    return module._layer, ps, st


def _modes(st: States) -> list[bool]:
    found = []
    for name, value in st.items():
        if name == TRAINING:
            found.append(bool(value))
        elif isinstance(value, dict):
            found += _modes(value)
    return found
