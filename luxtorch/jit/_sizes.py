"""Dynamic shapes: symbolic sizes of arguments while tracing, and the guards on them."""

from __future__ import annotations

import contextlib
import gc
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from luxtorch._errors import user_line

_PLAIN = {"torch", "Size", "size", "stride", "int", "float", "bool"}


class Expression:
    """Compute something of the sizes of arguments: a function of a list of tensors.

    Args:
        text: The expression, in which the list is called `inputs`.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        code = compile(f"lambda inputs: {text}", "<luxtorch sizes>", "eval")
        self._function: Callable[[Sequence[Tensor]], Any] = eval(code, {"torch": torch})
        if not _PLAIN.issuperset(self._function.__code__.co_names):
            from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP  # takes seconds

            self._function = eval(code, {"torch": torch, **SYMPY_INTERP})

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        return self._function(inputs)

    def __reduce__(self) -> Any:
        return Expression, (self.text,)


# The symbolic type of each kind of number, with the plain one.
_KINDS: dict[type, type] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
_SYMBOLS = tuple(_KINDS)

# Packages that print a symbol's name instead of its number.
_NAMED = frozenset(("torch", "sympy", "functorch", "logging", "traceback"))


class Sizes:
    """Hold the symbols of one trace: sizes and strides of arguments that may differ from call to call.

    No two sizes share a symbol, so that sizes that were equal at the first call may differ later. Comparisons of the
    function while tracing are collected as guards, which must hold where the graph is used again.
    """

    def __init__(self) -> None:
        # Imported here, since it takes seconds.
        from torch._subclasses.fake_tensor import FakeTensorMode

        # Sizes and numbers that depend on the values of tensors are errors.
        self._environment = _environment()(
            allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False, duck_shape=False
        )
        self._mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=self._environment, static_shapes=True)
        self._mode._allow_unsafe_data_ptr_access = False  # an address would be 0
        self._origins: dict[Any, tuple[int, int]] = {}
        self._symbolic: dict[int, list[tuple[str, int]]] = {}
        self._fixed: dict[tuple[int, int], tuple[str, str]] = {}
        self._symbols: frozenset[Any] = frozenset()

    def fake(self, tensor: Tensor, place: int, dims: Collection[int]) -> Any:
        """Return the fake tensor of an argument: of the same shape, with some symbolic sizes, and without values.

        Args:
            tensor: The argument.
            place: Its place among the arguments that are tensors.
            dims: The dynamic dimensions. Sizes 0 and 1 are never symbols, since these broadcast.
        """
        from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

        fake: Any
        source: Any = _source(place)
        if not dims:
            return self._mode.from_tensor(tensor, source=source)
        kinds = [DimDynamic.DYNAMIC if dim in dims else DimDynamic.STATIC for dim in range(tensor.dim())]
        context: Any = StatelessSymbolicContext(kinds)
        if tensor.is_conj() or tensor.is_neg():
            fake = self._mode.from_tensor(tensor, static_shapes=False, source=source, symbolic_context=context)
        else:
            # A batch is often a slice of the data, of which torch would guard the base and the offset.
            shape, strides, _ = self._environment.create_symbolic_sizes_strides_storage_offset(
                tensor, source, symbolic_context=context
            )
            with self._mode, torch.inference_mode(tensor.is_inference()):
                fake = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
            fake.requires_grad_(tensor.requires_grad)
        for what, values in ("size", fake.shape), ("stride", fake.stride()):
            found = [dim for dim, value in enumerate(values) if isinstance(value, torch.SymInt)]
            self._symbolic.setdefault(place, []).extend((what, dim) for dim in found)
            if what == "size":
                self._origins |= {values[dim].node.expr: (place, dim) for dim in found}
        self._symbols = frozenset(self._environment.var_to_sources)
        return fake

    def condition(self, fakes: Sequence[Any]) -> Expression | None:
        """Return the guard on other arguments of a graph; None if there is none."""
        places = [n for n, symbols in self._symbolic.items() if symbols]
        sources: Any = [_source(n) for n in places]
        # A compiler may guard symbols of its own, as torch 2.13 does the step of a loop, which is no argument.
        own: Any = [guard for guard in self._environment.guards if guard.expr.free_symbols <= self._symbols]
        guards = self._environment.produce_guards([fakes[n] for n in places], sources, guards=own, ignore_static=True)
        # torch has no guard for symbols that became constants later, as when a compiler reads the number.
        for place in places:
            for what, dim in self._symbolic[place]:
                value = getattr(fakes[place], what)(dim)
                if not _is_symbol(value):
                    guards.append(f"inputs[{place}].{what}({dim}) == {int(value)}")
        return Expression(" and ".join(f"({guard})" for guard in guards)) if guards else None

    def numbers(self, values: Sequence[Any]) -> Expression:
        """Return a function of the arguments that computes sizes, and numbers derived from them."""
        return Expression(f"[{', '.join(map(self._text, values))}]")

    def fixed(self) -> dict[tuple[int, int], tuple[str, str]]:
        """Return the dynamic dimensions that are needed as numbers, each with the user's line and the reason.

        A size that is only compared with a number is not among them: other sizes share the other graph.
        """
        found = self._environment.fixed
        here = {self._origins[symbol]: (line, "") for symbol, line in found.items() if symbol in self._origins}
        return here | self._fixed

    def fixed_by(self, line: str, reason: str, others: Sizes) -> None:
        """Record a line and a reason for which all symbols of another trace are numbers here."""
        self._fixed = dict.fromkeys(others._origins.values(), (line, reason))

    @contextlib.contextmanager
    def printed_as_numbers(self) -> Iterator[None]:
        """Print symbols as their numbers inside, except to torch itself."""
        original = {(kind, name): getattr(kind, name) for kind in _SYMBOLS for name in ("__repr__", "__format__")}

        def replacement(kind: type, name: str) -> Callable[..., str]:
            def text(value: Any, *spec: str) -> str:
                asks = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
                if asks in _NAMED or getattr(value.node, "shape_env", None) is not self._environment:
                    return original[kind, name](value, *spec)  # type: ignore[no-any-return]
                return getattr(_KINDS[kind](value), name)(*spec)  # type: ignore[no-any-return]

            return text

        for kind, name in original:
            setattr(kind, name, replacement(kind, name))
        try:
            yield
        finally:
            for (kind, name), method in original.items():
                setattr(kind, name, method)

    def _text(self, value: Any) -> str:
        from torch.fx.experimental.symbolic_shapes import ShapeGuardPythonPrinter

        if isinstance(value, torch.Size):
            return f"torch.Size([{', '.join(map(self._text, value))}])"
        if not isinstance(value, _SYMBOLS):
            return repr(value)
        symbol: Any = value
        sources = self._environment.var_to_sources
        printer = ShapeGuardPythonPrinter(sources, lambda source: source.name, sources)
        return f"{_KINDS[type(value)].__name__}({printer.doprint(symbol.node.expr)})"


def is_number(value: Any) -> bool:
    """Return whether a value is symbolic: a number, or a whole shape."""
    return isinstance(value, _SYMBOLS) or (
        isinstance(value, torch.Size) and any(isinstance(n, _SYMBOLS) for n in value)
    )


def any_symbol(values: Iterable[Any]) -> bool:
    """Return whether any argument of an operator is a symbol, or a list with one."""
    flat = (item for value in values for item in (value if isinstance(value, (list, tuple)) else (value,)))
    return any(isinstance(item, _SYMBOLS) for item in flat)


def static(value: Any) -> int | None:
    """Return a size or a stride, or None for a symbol."""
    return None if _is_symbol(value) else int(value)


def hides_symbols(values: Iterable[Any]) -> bool:
    """Return whether values hold symbols inside of objects, where they cannot be replaced."""
    left, seen = list(values), set()
    while left:
        value = left.pop()
        if isinstance(value, _SYMBOLS):
            return True
        if id(value) in seen or isinstance(value, (type, types.ModuleType, Tensor)):
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            left += [value.__closure__, value.__defaults__, value.__kwdefaults__]
        else:
            left += gc.get_referents(value)
    return False


def _is_symbol(value: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import free_symbols

    return isinstance(value, torch.SymInt) and bool(free_symbols(value))


def _source(place: int) -> Any:
    from torch._dynamo.source import ConstantSource

    return ConstantSource(f"inputs[{place}]")


@cache
def _environment() -> Any:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    class Environment(ShapeEnv):
        """Record the lines in which symbols became numbers."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.fixed: dict[Any, str] = {}

        def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
            known = len(self.guards)
            value = super().evaluate_expr(orig_expr, *args, **kwargs)
            if len(self.guards) > known:
                asked = orig_expr.is_Boolean or orig_expr.is_Relational
                for symbol in orig_expr.free_symbols:
                    if not asked or self._by_counting(orig_expr, symbol):
                        self.fixed.setdefault(symbol, user_line())
            return value

        def _by_counting(self, comparison: Any, symbol: Any) -> bool:
            """Return whether a size was determined by repeated comparisons, as by `while i < n`."""
            # A single `if` is enough to find that a size, not above 2, is 2.
            became = self.replacements.get(symbol)
            inequality = comparison.is_Relational and comparison.rel_op not in ("==", "!=")
            return bool(inequality and became is not None and became.is_Integer and became > 2)

    # Inductor's cache on disk pickles the class by its name.
    Environment.__qualname__ = Environment.__name__
    globals()[Environment.__name__] = Environment
    return Environment
