"""The operators that compute every element by itself, and so keep the names of what they are given."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor


def _unary(op: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def method(self: Named) -> Any:
        return self._rename(op(self._strip()))

    return method


def _binary(op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def method(self: Named, other: Any) -> Any:
        if isinstance(other, Named):
            self._check_names(other)
            other = other._strip()
        return self._rename(op(self._strip(), other))

    return method


def _reflected(op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    # The left operand has no names: Python would have asked it first.
    def method(self: Named, left: Any) -> Any:
        return self._rename(op(left, self._strip()))

    return method


class Named:
    """Operators with numbers, tensors and values of the same names; the result has these names."""

    @abstractmethod
    def _strip(self) -> Tensor:
        """Return the numbers without their names."""

    @abstractmethod
    def _rename(self, result: Any) -> Any:
        """Return the result of an elementwise operation with the names put back, if it is a tensor."""

    @abstractmethod
    def _check_names(self, other: Named) -> None:
        """Raise an InputError unless another value has the same names."""

    __neg__ = _unary(operator.neg)
    __pos__ = _unary(operator.pos)
    __abs__ = _unary(operator.abs)
    __invert__ = _unary(operator.invert)
    __add__ = _binary(operator.add)
    __sub__ = _binary(operator.sub)
    __mul__ = _binary(operator.mul)
    __truediv__ = _binary(operator.truediv)
    __floordiv__ = _binary(operator.floordiv)
    __mod__ = _binary(operator.mod)
    __pow__ = _binary(operator.pow)
    __and__ = _binary(operator.and_)
    __or__ = _binary(operator.or_)
    __xor__ = _binary(operator.xor)
    __lt__ = _binary(operator.lt)
    __le__ = _binary(operator.le)
    __gt__ = _binary(operator.gt)
    __ge__ = _binary(operator.ge)
    __eq__ = _binary(operator.eq)
    __ne__ = _binary(operator.ne)
    __radd__ = _reflected(operator.add)
    __rsub__ = _reflected(operator.sub)
    __rmul__ = _reflected(operator.mul)
    __rtruediv__ = _reflected(operator.truediv)
    __rfloordiv__ = _reflected(operator.floordiv)
    __rmod__ = _reflected(operator.mod)
    __rpow__ = _reflected(operator.pow)
    __rand__ = _reflected(operator.and_)
    __ror__ = _reflected(operator.or_)
    __rxor__ = _reflected(operator.xor)

    # Equality is by element, as it is for tensors, which leaves the identity to be hashed.
    __hash__ = object.__hash__

    # An operator with a NumPy array to the left fails, where NumPy would take the names apart.
    __array_ufunc__ = None
