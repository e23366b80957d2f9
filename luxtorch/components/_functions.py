"""What torch functions do with named values: element by element keeps the names, all else gives plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from luxtorch.core import InputError

from ._elementwise import Named
from ._trace import function_name

Handler = TypeVar("Handler", bound=Callable[..., Any])

# The functions that compute every element by itself, as torch names them to `__torch_function__`.
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
    """Register a function that is called instead of a torch function, and given it, where an argument has names."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def call_with_names(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    """Call a torch function of which at least one argument has names."""
    kwargs = kwargs or {}
    name = function_name(func)
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
            f"torch.{name} would change a {type(changed).__name__}, and nothing changes one.",
            fix="Call the function that returns a new value, as in x = torch.add(x, 1).",
        )
