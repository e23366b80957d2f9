"""Several inputs, or inputs by keyword, as one."""

from __future__ import annotations

from typing import Any

from luxtorch.core import register_node


class Inputs:
    """Hold the arguments of a `torch.nn.Module` that takes several, or takes them by keyword.

    A layer takes one input `x`, and a tuple is one input too: `Inputs` is how it is told apart from several. It is a
    pytree, so transforms see the tensors in it.

    Args:
        *args: The positional arguments.
        **kwargs: The keyword arguments.

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

    def __repr__(self) -> str:
        shown = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs.items())]
        return f"Inputs({', '.join(shown)})"


def arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that stand for an input."""
    return (x.args, x.kwargs) if isinstance(x, Inputs) else ((x,), {})


def _unflatten(children: Any, static: tuple[int, tuple[str, ...]]) -> Inputs:
    positional, names = static
    values = tuple(children)
    return Inputs(*values[:positional], **dict(zip(names, values[positional:], strict=True)))


register_node(Inputs, lambda x: ([*x.args, *x.kwargs.values()], (len(x.args), tuple(x.kwargs))), _unflatten)
