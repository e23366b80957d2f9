"""`Inputs`: several arguments, or keyword arguments, as the one input of a layer."""

from __future__ import annotations

from typing import Any

import torch

from luxtorch.core import InputError, Layer, register_node, suggest


class Inputs:
    """Hold the arguments of a `torch.nn.Module` that takes several, or takes them by keyword.

    A layer takes one input `x`, which may be a tuple; `Inputs` stands for several. It is a pytree, so transforms see
    the tensors in it. Layers that replace modules with one input, such as `Dense`, take `Inputs(x)` and
    `Inputs(input=x)` too.

    Args:
        *args: The positional arguments.
        **kwargs: The keyword arguments.

    Raises:
        InputError: In a call of such a layer, if the arguments are others.

    Example:
        >>> import torch, luxtorch as lt
        >>> layer, ps, st = lt.from_torch(torch.nn.Bilinear(2, 3, 4))
        >>> y, st = layer(lt.Inputs(torch.ones(5, 2), torch.ones(5, 3)), ps, st)
        >>> y.shape
        torch.Size([5, 4])
    """

    __slots__ = ("args", "kwargs")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs

    def _single(self, layer: Layer) -> Any:
        """Return the only argument for a layer that takes one; for any other, these inputs.

        Raises:
            InputError: If the layer takes one, and the arguments are others.
        """
        from ._single import single  # which imports layers

        return single(layer, self)

    def __repr__(self) -> str:
        shown = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs.items())]
        return f"Inputs({', '.join(shown)})"


def arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments of an input."""
    return (x.args, x.kwargs) if isinstance(x, Inputs) else ((x,), {})


def bound(given: Inputs, name: str, *optional: str) -> list[Any]:
    """Return arguments in the order of their names, None for those that are not given.

    Raises:
        InputError: If they do not fit the names.
    """
    names = (name, *optional)
    values = {**dict(zip(names, given.args, strict=False)), **given.kwargs}
    unknown = [other for other in given.kwargs if other not in names]
    if name in values and len(values) == len(given.args) + len(given.kwargs) and not unknown:
        return [values.get(each) for each in names]
    wanted = ", ".join((f"{name}=x", *(f"{other}=..." for other in optional)))
    raise InputError(
        "The layer does not take these arguments.",
        expected=f"x, lt.Inputs(x) or lt.Inputs({wanted})",
        got=f"lt.Inputs({', '.join(['x'] * len(given.args) + [f'{other}=...' for other in given.kwargs])})",
        fix=suggest(unknown[0], names) if unknown else "",
    )


def _unflatten(children: Any, static: tuple[int, tuple[str, ...]]) -> Inputs:
    positional, names = static
    values = tuple(children)
    return Inputs(*values[:positional], **dict(zip(names, values[positional:], strict=True)))


register_node(Inputs, lambda x: ([*x.args, *x.kwargs.values()], (len(x.args), tuple(x.kwargs))), _unflatten)
torch.serialization.add_safe_globals([Inputs])  # a saved program holds examples of its inputs
