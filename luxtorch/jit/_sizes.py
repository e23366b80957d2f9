"""Sizes that differ from call to call: symbols while a function is traced, and what its graph assumes of them."""

from __future__ import annotations

import contextlib
import gc
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._where import user_line

OfArguments: TypeAlias = "Callable[[Sequence[Tensor]], Any]"

# Each kind of number that may be a symbol, and what it is otherwise.
_KINDS: dict[type, type] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
_SYMBOLS = tuple(_KINDS)

# Who may see a symbol's name instead of its number.
_NAMED = frozenset(("torch", "sympy", "functorch", "logging", "traceback"))


class Sizes:
    """Hold the symbols of one trace: sizes and strides of arguments that may be others at the next call.

    No two sizes share a symbol, so that none is taken to equal another because both were the same at the first call.
    What the function asks of them while it is traced is collected here, and must hold where its graph is used again.
    """

    def __init__(self) -> None:
        # This takes seconds to import, and only who compiles needs it.
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

    def fake(self, tensor: Tensor, place: int, dims: Collection[int]) -> Any:
        """Return what stands for an argument: a tensor of its shape, without numbers, some of its sizes symbols.

        Args:
            tensor: The argument.
            place: Its place among the arguments that are tensors.
            dims: Which of its dimensions may have another size later. Sizes 0 and 1 are never symbols, since these
                broadcast.
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
            # A batch is often a slice of the data. Torch would look at the whole, and where the slice is in it.
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
        return fake

    def condition(self, fakes: Sequence[Any]) -> OfArguments | None:
        """Return the test whether a graph may be used for other arguments; None if it may for any."""
        places = [n for n, symbols in self._symbolic.items() if symbols]
        sources: Any = [_source(n) for n in places]
        guards = self._environment.produce_guards([fakes[n] for n in places], sources, ignore_static=True)
        # Of what has become a constant since, as when a compiler asks for the number, torch says nothing.
        for place in places:
            for what, dim in self._symbolic[place]:
                value = getattr(fakes[place], what)(dim)
                if not _is_symbol(value):
                    guards.append(f"inputs[{place}].{what}({dim}) == {int(value)}")
        return _of_arguments(" and ".join(f"({guard})" for guard in guards)) if guards else None

    def numbers(self, values: Sequence[Any]) -> OfArguments:
        """Return the function of the arguments that computes sizes, and numbers made of them."""
        return _of_arguments(f"[{', '.join(map(self._text, values))}]")

    def fixed(self) -> dict[tuple[int, int], tuple[str, str]]:
        """Return which dimensions of which tensors are needed as numbers, each with the user's line and the reason.

        A size that is only compared with a number is not among them: other sizes then share the other graph.
        """
        found = self._environment.fixed
        here = {self._origins[symbol]: (line, "") for symbol, line in found.items() if symbol in self._origins}
        return here | self._fixed

    def fixed_by(self, line: str, reason: str, others: Sizes) -> None:
        """Note a line and a reason that make numbers of all that have been symbols in another trace."""
        self._fixed = dict.fromkeys(others._origins.values(), (line, reason))

    @contextlib.contextmanager
    def spelt_out(self) -> Iterator[None]:
        """Within, the text of a symbol is that of its number, as soon as others than torch ask for it."""
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
    """Tell whether a value is made of sizes that are symbols: a number, or a whole shape."""
    return isinstance(value, _SYMBOLS) or (
        isinstance(value, torch.Size) and any(isinstance(n, _SYMBOLS) for n in value)
    )


def any_symbol(values: Iterable[Any]) -> bool:
    """Tell whether any of the arguments of an operator is a symbol, or a list with one."""
    flat = (item for value in values for item in (value if isinstance(value, (list, tuple)) else (value,)))
    return any(isinstance(item, _SYMBOLS) for item in flat)


def static(value: Any) -> int | None:
    """Return a size or a stride that is the same in all calls, or None for a symbol."""
    return None if _is_symbol(value) else int(value)


def hides_symbols(values: Iterable[Any]) -> bool:
    """Tell whether values hold symbols deep inside, where no function of the arguments can replace them."""
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


def _of_arguments(text: str) -> OfArguments:
    """Return the function of a list of tensors that a text stands for, in which they are `inputs`."""
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

    return eval(f"lambda inputs: {text}", dict(SYMPY_INTERP))  # type: ignore[no-any-return]


@cache
def _environment() -> Any:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    class Environment(ShapeEnv):
        """Remember in which lines symbols became numbers."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.fixed: dict[Any, str] = {}

        def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
            known = len(self.guards)
            value = super().evaluate_expr(orig_expr, *args, **kwargs)
            if len(self.guards) > known:
                asked = orig_expr.is_Boolean or orig_expr.is_Relational
                for symbol in orig_expr.free_symbols:
                    if not asked or self._counted(orig_expr, symbol):
                        self.fixed.setdefault(symbol, user_line())
            return value

        def _counted(self, comparison: Any, symbol: Any) -> bool:
            """Tell whether a size was found by comparing again and again, as `while i < n` does."""
            # A size that is not above 2 is 2: no more than an `if` has asked for that.
            became = self.replacements.get(symbol)
            inequality = comparison.is_Relational and comparison.rel_op not in ("==", "!=")
            return bool(inequality and became is not None and became.is_Integer and became > 2)

    # An inductor that keeps what it compiled on disk has to find the class by its name.
    Environment.__qualname__ = Environment.__name__
    globals()[Environment.__name__] = Environment
    return Environment
