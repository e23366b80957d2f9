"""Operators and `__torch_function__` of named values: elementwise functions keep the names, others return tensors."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from luxtorch._torch import compile_constant
from luxtorch.core import InputError

N = TypeVar("N", bound="Named")
Handler = TypeVar("Handler", bound=Callable[..., Any])


def _unary(op: Callable[[Tensor], Tensor]) -> Callable[[N], N]:
    def method(self: N) -> N:
        return self._rename(op(self._strip()))  # type: ignore[no-any-return]

    return method


def _binary(op: Callable[[Any, Any], Tensor]) -> Callable[[N, Any], N]:
    def method(self: N, other: Any) -> N:
        if isinstance(other, Named):
            self._check_names(other)
            other = other._strip()
        return self._rename(op(self._strip(), other))  # type: ignore[no-any-return]

    return method


def _reflected(op: Callable[[Any, Any], Tensor]) -> Callable[[N, Any], N]:
    # The left operand has no names: Python would have asked it first.
    def method(self: N, left: Any) -> N:
        return self._rename(op(left, self._strip()))  # type: ignore[no-any-return]

    return method


class Named:
    """Elementwise operators with numbers, tensors and values of the same names; the result has these names."""

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
    __eq__ = _binary(operator.eq)  # type: ignore[assignment]
    __ne__ = _binary(operator.ne)  # type: ignore[assignment]
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

    # Equality is elementwise, as for tensors, so that the hash is by identity.
    __hash__ = object.__hash__

    # An operator with a NumPy array on its left fails, instead of a loop of NumPy over the names.
    __array_ufunc__ = None


# The elementwise functions, by the names that `__torch_function__` sees.
ELEMENTWISE = frozenset(
    """
    __and__ __floordiv__ __or__ __xor__ abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh
    arctan arctan2 arctanh asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor ceil celu clamp
    clamp_max clamp_min clip clone conj copysign cos cosh deg2rad detach digamma div divide elu empty_like entr eq erf
    erfc erfcx erfinv exp exp2 expit expm1 fix float_power floor floor_divide fmax fmin fmod frac full_like gammaln ge
    gelu greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 i0e i1 i1e imag isclose
    isfinite isinf isnan ldexp le leaky_relu lerp less less_equal lgamma log log10 log1p log2 log_ndtr logaddexp
    logaddexp2 logical_and logical_not logical_or logical_xor logit logsigmoid lt maximum minimum mish mul multiply
    nan_to_num ndtr ndtri ne neg negative nextafter not_equal ones_like polar positive pow psi rad2deg rand_like
    randn_like real reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh
    softplus softshrink softsign sqrt square sub subtract tan tanh tanhshrink threshold true_divide trunc where xlog1py
    xlogy zeros_like zeta
    """.split()  # noqa: SIM905
)

# The functions that do not pair the elements of their arguments, so that the names may differ.
UNPAIRED = frozenset("block_diag cat column_stack concat concatenate hstack kron".split())  # noqa: SIM905

_HANDLERS: dict[str, Callable[..., Any]] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a function to call in place of a torch function, which it gets first, where an argument has names."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


@compile_constant
def _name(func: Callable[..., Any]) -> str:
    """Return the name of a torch function without that of its module."""
    return func.__name__.removeprefix("special_").removeprefix("linalg_")


def call_with_names(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    """Call a torch function of which at least one argument has names."""
    kwargs = kwargs or {}
    name = _name(func)
    _refuse_in_place(name, args, kwargs)
    if name in _HANDLERS:
        return _HANDLERS[name](func, *args, **kwargs)
    named: list[Named] = []
    args = strip(args, named)
    kwargs = dict(zip(kwargs, strip(kwargs.values(), named), strict=True))
    if name not in UNPAIRED:
        for other in named[1:]:
            named[0]._check_names(other)
    result = func(*args, **kwargs)
    return named[0]._rename(result) if name in ELEMENTWISE else result


def strip(values: Iterable[Any], named: list[Named]) -> list[Any]:
    """Return values without their names, and add those that have names to a list."""
    stripped: list[Any] = []
    for value in values:
        if isinstance(value, Named):
            named.append(value)
            stripped.append(value._strip())
        elif type(value) in (list, tuple):
            stripped.append(strip(value, named))
        else:
            stripped.append(value)
    return stripped


def _refuse_in_place(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    in_place = (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
    changed = args[0] if in_place and args else kwargs.get("out")
    if isinstance(changed, Named):
        raise InputError(
            f"torch.{name} would change a {type(changed).__name__}, which is immutable.",
            fix="Call the function that returns a new value, as in x = torch.add(x, 1).",
        )
