"""`describe`: what is in a tree of tensors, to print or to look at in a notebook."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from luxtorch._errors import InputError


class Description:
    """Hold a tree and show what is in it, as text and in notebooks; made by `describe`.

    The numbers are read each time it is shown, and not before.
    """

    __slots__ = ("_depth", "_tree")

    def __init__(self, tree: Any, depth: int | None) -> None:
        self._tree = tree
        self._depth = depth

    def __repr__(self) -> str:
        from ._outline import tree_text

        return tree_text(self._tree, self._depth)

    def _repr_html_(self) -> str:
        from ._outline import tree_html

        return tree_html(self._tree, depth=self._depth)


def describe(tree: Any, *, depth: int | None = None) -> Description:
    """Tabulate a tree of tensors: shapes, and the least, the largest, the mean and the spread of the numbers.

    Print what it returns, or let a notebook show it, where groups open and close. A group's line is about all numbers
    in it, so that a NaN is seen from the first line on. In a tree of more than 60 tensors, like groups one after the
    other, as the layers of a deep model have, are folded into one line.

    Args:
        tree: Parameters, states, gradients, a training state, or any other pytree.
        depth: How many levels to show; all if None.

    Returns:
        A `Description`, to print.

    Raises:
        InputError: If there is no tree, or the depth is negative.

    Example:
        >>> import torch, luxtorch as lt
        >>> ps = {"dense": {"weight": torch.tensor([[1.0, -2.0], [torch.nan, 4.0]]), "bias": torch.zeros(2)}}
        >>> lt.describe(ps)
                                                 shape   min  max  mean    std
        dict of 6 elements (torch.float32, cpu)           -2    4   0.6   1.96  1 NaN
          dense 6 elements                                -2    4   0.6   1.96  1 NaN
            weight                               (2, 2)   -2    4     1  2.449  1 NaN
            bias                                 (2,)      0    0     0      0

    Statistics leave out what is not finite, and those of complex numbers are of magnitudes. `std` divides by the number
    of elements. A group's leave out integers and booleans. Tensors that are traced, batched by `torch.vmap`, of a
    class of their own or on the meta device have no numbers to read, and random keys none that say anything: these
    show their shapes.

    Source: `pandas.DataFrame.describe`.
    """
    from ._outline import children

    if not isinstance(tree, Tensor) and children(tree) is None:
        raise InputError(
            "There is no tree of tensors to describe.",
            expected="parameters, states, gradients, or any other pytree",
            got=type(tree).__name__,
            fix="A model shows itself, by print(model); describe takes what lt.setup returns for it.",
        )
    if depth is not None and depth < 0:
        raise InputError("The depth is a number of levels.", expected="0 or more, or None", got=f"{depth}")
    return Description(tree, depth)
