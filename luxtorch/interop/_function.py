"""A torch function with its options, as a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from luxtorch.core import Value, show_value


class Function(Value):
    """Call a function of a tensor with options; two with the same function and options are equal.

    `functools.partial` would do, were its objects equal when their contents are: layers that hold them have to be.

    Args:
        function: The function. It belongs to a module, so that it can be pickled.
        options: The names and values of further arguments.
    """

    function: Callable[..., Tensor]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the function returns."""
        return self.function(x, **dict(self.options))

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options)
        return f"{show_value(self.function)}({options})"


def function(function: Callable[..., Tensor], **options: Any) -> Function:
    """Return a function with options."""
    return Function(function, tuple(options.items()))
