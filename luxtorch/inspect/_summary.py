"""A table of a model's layers with output shapes, parameters, FLOPs and memory: `summary`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luxtorch._torch import storage_id
from luxtorch._transforms import unwrapped
from luxtorch.core import Layer, map_tensors, out_of_range, setup, tensors, unknown_name
from luxtorch.core._table import Line, aligned, html, plain
from luxtorch.core._tree import META_KEY, to_meta

from ._watch import Call, Path, holds_modules, watched, watched_modules

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def summary(layer: Layer, x: Any, *, depth: int | None = None) -> Summary:
    """Tabulate a model's layers: shapes, parameters, floating point operations and memory.

    Nothing is computed, and nothing of the model's size is allocated: the model is called on the meta device.

    Args:
        layer: The model.
        x: An input, of which only shapes and dtypes matter; or the shape of one, batch included.
        depth: How many levels of layers inside to show; all if None.

    Returns:
        A `Summary`, to print, or to read row by row; in a notebook it shows itself as a table.

    Raises:
        InputError: If the first argument is not a layer, or the depth is negative.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Conv((3, 3), 1, 8, torch.relu), lt.FlattenLayer(), lt.Dense(512, 10))
        >>> table = lt.summary(model, (32, 1, 10, 10))
        >>> print(table)
        layer                                   output shape   parameters  FLOPs  weights  outputs
        ------------------------------------------------------------------------------------------
        Chain                                   (32, 10)            5_210  623 k  20.8 kB  66.8 kB
          layer_1 = Conv((3, 3), 1 -> 8, relu)  (32, 8, 8, 8)          80  295 k    320 B  65.5 kB
          layer_2 = FlattenLayer                (32, 512)
          layer_3 = Dense(512 -> 10)            (32, 10)            5_130  328 k  20.5 kB  1.28 kB
        ------------------------------------------------------------------------------------------
        total: 5_210 parameters, 0 states, 623 kFLOPs forward
        memory: weights 20.8 kB, input 12.8 kB, outputs 66.8 kB
        >>> table["layer_3"].flops  # a multiplication and an addition for each weight and sample
        327680

    FLOPs are those that `torch.utils.flop_counter` knows: of matrix products, convolutions and attention, a
    multiplication and an addition each. They are those of one forward pass; a backward pass takes about twice as many.
    Memory is that of parameters and states, and that of what the innermost layers return as new tensors: about what
    training keeps for the backward pass, apart from what a layer keeps inside.

    Modules of torch.nn inside a layer from `lt.from_torch` have rows of their own. As for `lt.output_shape`, the model
    must find its way without reading numbers, as a few modules do that look into their masks.

    Source: `Layer.summary` of Keras, torchinfo.
    """
    if not isinstance(layer, Layer):
        fix = "A torch.nn.Module becomes a layer by lt.from_torch." * isinstance(layer, nn.Module)
        raise out_of_range("layer", layer, "a layer", fix=fix)
    if depth is not None and depth < 0:
        raise out_of_range("depth", depth, "at least 0, or None")
    x = to_meta(x)
    from torch.utils.flop_counter import FlopCounterMode  # which takes a tenth of a second to import

    ps, st = setup(META_KEY, layer)
    meter = _Meter(FlopCounterMode(display=False, custom_mapping=_FORMULAS))
    model = watched(layer, meter)
    with torch.no_grad(), meter.counter:
        model(x, ps, st)
    return Summary(tuple(_rows(layer, ps, st, meter.seen, ())), _bytes(x), depth)


@dataclass
class _Seen:
    """Hold what was seen of the calls of a layer, or of a module.

    Attributes:
        what: The layer, on one line.
        module: Whether it is a module.
        output: The shapes of the last output.
        calls: How often it was called.
        parameters: The number of parameters.
        states: The number of states.
        weights: The bytes of both.
        flops: The floating point operations of all calls.
        returned: The bytes of all that was returned, as far as it was new.
    """

    what: str
    module: bool = False
    output: Any = None
    calls: int = 0
    parameters: int = 0
    states: int = 0
    weights: int = 0
    flops: int = 0
    returned: int = 0

    def take_trees(self, ps: Any, st: Any) -> _Seen:
        """Take down parameters and states."""
        self.parameters, self.states = (sum(unwrapped(leaf).numel() for leaf in tensors(tree)) for tree in (ps, st))
        self.weights = _bytes((ps, st))
        return self


@dataclass(eq=False)
class _Meter:
    """Watch the calls of layers, and take down what they cost."""

    counter: FlopCounterMode
    seen: dict[Path, _Seen] = field(default_factory=dict)
    returned: int = 0

    def __call__(self, call: Call, layer: Layer, path: Path, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        before, seen = self._total(), self.seen.setdefault(path, _Seen(_shown(layer)).take_trees(ps, st))
        if holds_modules(layer):
            with self._modules(path):
                y, st = call(x, ps, st)
        else:
            y, st = call(x, ps, st)
        self._take(seen, before, x, y)
        return y, st

    @contextmanager
    def _modules(self, path: Path) -> Iterator[None]:
        """Watch modules of torch.nn likewise."""
        calls: list[tuple[_Seen, tuple[int, int], Any]] = []

        def before(name: str, module: nn.Module, args: Any) -> None:
            seen = self.seen.setdefault((*path, *name.split(".")), _Seen(_shown(module), module=True))
            seen.take_trees(list(module.parameters()), list(module.buffers()))
            calls.append((seen, self._total(), args))

        def after(name: str, module: nn.Module, y: Any) -> None:
            self._take(*calls.pop(), y)

        with watched_modules(before, after):
            yield

    def _total(self) -> tuple[int, int]:
        return self.counter.get_total_flops(), self.returned

    def _take(self, seen: _Seen, before: tuple[int, int], x: Any, y: Any) -> None:
        if self.returned == before[1]:  # nothing inside has returned anything new
            given = {_storage(leaf) for leaf in tensors(x)}
            self.returned += _bytes([leaf for leaf in tensors(y) if _storage(leaf) not in given])
        seen.output = map_tensors(lambda leaf: tuple(leaf.shape), y)
        seen.calls += 1
        seen.flops += self.counter.get_total_flops() - before[0]
        seen.returned += self.returned - before[1]


def _rows(layer: Layer, ps: Any, st: Any, seen: dict[Path, _Seen], path: Path) -> Iterator[SummaryRow]:
    """Yield the rows of a layer and of those inside."""
    own = seen.get(path)
    yield _row(path, _Seen(_shown(layer)).take_trees(ps, st) if own is None else own)
    for name, child in layer.children().items():
        yield from _rows(child, _part(ps, name), _part(st, name), seen, (*path, name))
    for inside, each in seen.items() if holds_modules(layer) else ():
        if each.module and inside[: len(path)] == path:
            yield _row(inside, each)


def _row(path: Path, seen: _Seen) -> SummaryRow:
    return SummaryRow(
        path=".".join(filter(None, path)),
        depth=len(path),
        name=path[-1] if path else "",
        layer=seen.what,
        output=seen.output,
        calls=seen.calls,
        parameters=seen.parameters,
        states=seen.states,
        flops=seen.flops,
        weight_bytes=seen.weights,
        output_bytes=seen.returned,
    )


def _part(tree: Any, name: str) -> Any:
    """Return a child's part of a tree; nothing where its trees are made of others."""
    return tree if not name else tree.get(name, {})


def _shown(layer: Layer | nn.Module) -> str:
    arguments = layer.extra_repr()
    return type(layer).__name__ + (f"({arguments})" if arguments else "")


def _bytes(tree: Any) -> int:
    return sum(int(unwrapped(leaf).nbytes) for leaf in tensors(tree))


def _storage(tensor: Tensor) -> int:
    return storage_id(unwrapped(tensor))


def _matrix_vector(matrix: Any, vector: Any, *_: Any, **__: Any) -> int:
    rows, columns = matrix
    return 2 * int(rows) * int(columns)


# What a layer computes on a single sample; the counter knows products of matrices only.
_FORMULAS: dict[Any, Any] = {
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.addmv: lambda _, *shapes, **__: _matrix_vector(*shapes[:2]),
    torch.ops.aten.dot: lambda a, *_, **__: 2 * a[0],
}


_HEAD = ("layer", "output shape", "parameters", "FLOPs", "weights", "outputs")


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """Hold what a layer is, returns and costs, with all that is inside.

    Attributes:
        path: The path, such as `"encoder.layer_2"`; empty for the model itself. The layer in a wrapper has the path of
            the wrapper, as their trees are the same.
        depth: The level: 0 for the model itself.
        name: The last name in the path.
        layer: The layer, for instance `"Dense(3 -> 2)"`.
        output: The shape of what it returned last, a tree of shapes if that is a tree; None if it was not called.
        calls: How often it was called.
        parameters: The number of parameters.
        states: The number of states.
        flops: The floating point operations of all its calls.
        weight_bytes: The memory of parameters and states.
        output_bytes: The memory of what the innermost layers return in all calls.
    """

    path: str
    depth: int
    name: str
    layer: str
    output: Any
    calls: int
    parameters: int
    states: int
    flops: int
    weight_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class Summary:
    """Hold the rows of a table of a model's layers; `print` shows them, and so does a notebook.

    Attributes:
        rows: A row for each layer, outer ones before those inside.
        input_bytes: The memory of the input.
        depth: How many levels are shown; all if None.
        total: The row of the model itself.
    """

    rows: tuple[SummaryRow, ...]
    input_bytes: int
    depth: int | None = None

    @property
    def total(self) -> SummaryRow:
        """The row of the model itself."""
        return self.rows[0]

    def __getitem__(self, path: str) -> SummaryRow:
        """Return the row of a path, that of a wrapper before that of the layer inside.

        Raises:
            KeyNameError: If there is none.
        """
        for row in self.rows:
            if row.path == path:
                return row
        raise unknown_name(path, [row.path for row in self.rows if row.path], "layer")

    def __str__(self) -> str:
        cells = [(f"{'  ' * row.depth}{label}", *cells) for row, label, cells in self._lines()]
        head, *lines = aligned([_HEAD, *cells], [True, True, False, False, False, False])
        rule = "-" * len(head)
        return "\n".join([head, rule, *lines, rule, *self._totals()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        waiting: list[tuple[int, Line]] = []
        for row, label, cells in reversed(self._lines()):
            inside = []
            while waiting and waiting[-1][0] > row.depth:
                inside.append(waiting.pop()[1])
            waiting.append((row.depth, Line(label, cells=cells, below=tuple(inside))))
        return html(_HEAD[1:], waiting[0][1]) + plain("\n".join(self._totals()))

    def _lines(self) -> list[tuple[SummaryRow, str, tuple[str, ...]]]:
        """Return the rows that are shown, each with what stands first and what stands in the columns."""
        return [
            (
                row,
                f"{row.name} = " * bool(row.name) + _short(row.layer) + f" x{row.calls}" * (row.calls > 1),
                (
                    "" if row.output is None else _short(str(row.output)),
                    f"{row.parameters:_}" if row.parameters else "",
                    amount(row.flops) if row.flops else "",
                    amount(row.weight_bytes, "B") if row.weight_bytes else "",
                    amount(row.output_bytes, "B") if row.output_bytes else "",
                ),
            )
            for row in self.rows
            if self.depth is None or row.depth <= self.depth
        ]

    def _totals(self) -> list[str]:
        row = self.total
        return [
            f"total: {row.parameters:_} parameters, {row.states:_} states, {amount(row.flops, 'FLOPs')} forward",
            f"memory: weights {amount(row.weight_bytes, 'B')}, input {amount(self.input_bytes, 'B')}, "
            f"outputs {amount(row.output_bytes, 'B')}",
        ]


def amount(number: int, unit: str = "") -> str:
    """Return a number with the prefix that fits.

    Example:
        >>> amount(1_234_567, "B"), amount(12, "B")
        ('1.23 MB', '12 B')
    """
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    value, prefix = float(number), 0
    while value >= 999.5 and prefix < len(prefixes) - 1:
        value, prefix = value / 1000, prefix + 1
    return f"{value:.3g} {prefixes[prefix]}{unit}".strip()


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
