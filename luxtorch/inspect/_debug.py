"""Find the layer where NaN, Inf or an exception first appears, forward or backward: `debug_mode`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from luxtorch.core import (
    Layer,
    LuxtorchError,
    Parameters,
    States,
    Value,
    WrapperLayer,
    out_of_range,
    path_name,
    suggest,
    tree_flatten_with_path,
    tree_map_with_path,
)
from luxtorch.core._statistics import Statistics, physical, readable

from ._watch import Call, Path, describe, holds_modules, map_own, watched, watched_modules


@dataclass(frozen=True)
class Place:
    """Hold where in a model something happens: in a layer, or in a module of torch.nn inside one.

    Attributes:
        names: The names that lead there.
        layer: The layer; of a module, the layer that it is in.
        what: The layer, or the module, on one line.
        outer: Whether there are others inside, between which there may be code.
    """

    names: tuple[str, ...]
    layer: Layer
    what: str
    outer: bool

    @staticmethod
    def of(layer: Layer, path: Path) -> Place:
        """Return the place of a layer."""
        return Place(tuple(filter(None, path)), layer, describe(layer), bool(layer.children()))

    def inside(self, name: str, module: nn.Module) -> Place:
        """Return the place of a module inside a layer."""
        what = f"{type(module).__name__} {module.extra_repr()}".strip()
        return Place((*self.names, *name.split(".")), self.layer, what, any(True for _ in module.children()))

    @property
    def name(self) -> str:
        """The last name that leads there."""
        return self.names[-1] if self.names else "model"

    def __str__(self) -> str:
        return f"{'.'.join(('model', *self.names))} ({describe(self.layer)})"


class NonFiniteError(LuxtorchError, FloatingPointError):
    """Report where NaN or Inf first appeared; `lt.debug_mode` raises it.

    Attributes:
        path: The path of the layer, such as `"encoder.layer_2"`; empty for the model itself.
        direction: `"forward"` or `"backward"`.
    """

    path: str = ""
    direction: str = ""

    @staticmethod
    def at(place: Place, direction: str, problem: str, *, got: list[str], fix: str = "") -> NonFiniteError:
        """Return the error for a place."""
        shown = ("\n" + " " * 12).join(got)
        error = NonFiniteError(problem, expected="finite numbers", got=shown, fix=fix, where=str(place))
        error.path, error.direction = ".".join(place.names), direction
        error.__dict__["_place"] = place
        return error


def note(error: Exception, place: Place, inputs: list[tuple[str, Tensor]]) -> None:
    """Add to an exception in which layer it arose, once; it keeps its type, which others may wait for."""
    if isinstance(error, LuxtorchError) or hasattr(error, "_luxtorch_place"):
        return
    error._luxtorch_place = place  # type: ignore[attr-defined]
    notes = [
        *getattr(error, "__notes__", []),
        f"In {place}, called on",
        *(f"  {title}: {leaf.dtype} {tuple(leaf.shape)}" for title, leaf in inputs),
    ]
    error.__notes__ = notes  # type: ignore[attr-defined]  # Python 3.10 has no add_note, and shows none


@dataclass(frozen=True)
class Observation:
    """Hold statistics of what went into a layer, or came out of it; `lt.debug_mode(record=...)` makes them.

    Attributes:
        path: The path of the layer, such as `"encoder.layer_2"`; empty for the model itself.
        layer: The layer on one line.
        what: `"input"`, `"output"`, `"gradient by input"`, `"gradient by output"` or
            `"gradient by parameter 'weight'"`; where there are several inputs or outputs, with the name of the one.
        statistics: The statistics.
    """

    path: str
    layer: str
    what: str
    statistics: Statistics

    def __str__(self) -> str:
        return f"{self.path or 'the model'} ({self.layer}), {self.what}: {self.statistics}"


Titled: TypeAlias = list[tuple[str, Tensor]]
"""Tensors, each with what to call it."""


@dataclass
class Run:
    """Hold what is known while a model runs.

    Attributes:
        infinite: Whether the model's own input or states hold infinities, as masks do: so these may go into any layer.
        callers: The places that are being called, the innermost last.
    """

    infinite: bool = False
    callers: list[Place] = field(default_factory=list)


_RUN: ContextVar[Run | None] = ContextVar("luxtorch_debug_mode", default=None)


@contextmanager
def running(x: Any, ps: Any, st: Any) -> Iterator[None]:
    """Begin a run of a model, whose arguments must have numbers."""
    for _, leaf in _titled("", ps):
        readable(leaf)
    token = _RUN.set(Run(infinite=any(_holds(leaf, torch.isinf) for _, leaf in _titled("", (x, st)))))
    try:
        yield
    finally:
        _RUN.reset(token)


class Checker(Value, kw_only=True):
    """Watch the calls of layers.

    Args:
        forward: Whether to look at what layers take and return.
        backward: Whether to look at gradients.
        infinities: Whether Inf is an error as NaN is.
        errors: Whether to note on any exception in which layer it arose.
        record: Called with statistics.
    """

    forward: bool
    backward: bool
    infinities: bool
    errors: bool
    record: Callable[[Observation], None] | None

    def __call__(self, call: Call, layer: Layer, path: Path, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        """Call a layer, and look at what goes in and comes out."""
        place, run = Place.of(layer, path), _RUN.get() or Run()
        token, depth = _RUN.set(run), len(run.callers)
        try:
            own = [*_own("parameter", layer, ps), *_own("state", layer, st)]
            x = self._enter(run, place, x, own)
            y, new = self._called(call, layer, run, place, x, ps, st)
            if self.forward:
                self._check_made(place, [*_titled("output", y), *_own("new state", layer, new)], x, own)
            return self._leave(run, place, y), new
        except Exception as error:
            if self.errors:
                note(error, place, _titled("input", x))
            raise
        finally:
            del run.callers[depth:]
            _RUN.reset(token)

    def _called(self, call: Call, layer: Layer, run: Run, place: Place, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        """Call a layer on parameters whose gradients are looked at; watch modules of torch.nn inside."""
        if self.backward or self.record:
            seen = _kept("input", x)
            ps = map_own(lambda name, leaf: tap(leaf, self._look(place, f"parameter '{name}'", seen)), layer, ps)
        if not holds_modules(layer):
            return call(x, ps, st)
        inputs: list[Any] = []

        def before(name: str, module: nn.Module, args: Any) -> Any:
            inputs.append(self._enter(run, place.inside(name, module), args, []))
            return inputs[-1]

        def after(name: str, module: nn.Module, y: Any) -> Any:
            inside = place.inside(name, module)
            if self.forward:
                self._check_made(inside, _titled("output", y), inputs.pop(), [])
            y = self._leave(run, inside, y)
            run.callers.pop()
            return y

        with watched_modules(before, after):
            return call(x, ps, st)

    def _enter(self, run: Run, place: Place, x: Any, own: Titled) -> Any:
        """Look at what goes into a layer, and return it."""
        caller = run.callers[-1] if run.callers else None
        for title, leaf in own if self.forward else []:
            if self._wrong(leaf, infinite=not run.infinite or title.startswith("parameter")):
                problem, fix = f"The {title} holds {_words(leaf)}.", "Look at where this value came from."
                raise NonFiniteError.at(place, "forward", problem, got=_lines([(title, leaf)]), fix=fix)
        for title, leaf in _titled("input", x):
            if self.forward and self._wrong(leaf, infinite=not run.infinite):
                problem, fix = f"The model's {title} holds {_words(leaf)}.", "Look at the data."
                if caller:
                    problem = f"The {title} of '{place.name}' holds {_words(leaf)}, and no layer inside returned that."
                    fix = _BETWEEN
                raise NonFiniteError.at(caller or place, "forward", problem, got=_lines([(title, leaf)]), fix=fix)
            self._observe(place, title, leaf)
        run.callers.append(place)
        if not (self.backward or self.record):
            return x
        return _mapped("input", x, lambda title, leaf: tap(leaf, self._look(place, title, [(title, physical(leaf))])))

    def _leave(self, run: Run, place: Place, y: Any) -> Any:
        """Return what comes out of a layer, whose gradient is made by what follows."""
        for title, leaf in _titled("output", y):
            self._observe(place, title, leaf)
        if not (self.backward or self.record):
            return y
        caller = run.callers[-2] if len(run.callers) > 1 else None

        def look(title: str, leaf: Tensor) -> Callable[[Tensor], None]:
            seen = [(title, physical(leaf))]

            def look(grad: Tensor) -> None:
                self._observe(place, f"gradient by {title}", grad)
                if self.backward and self._wrong(grad):
                    problem = f"The gradient by the model's {title} holds {_words(grad)}."
                    fix = "Look at the loss."
                    if caller:
                        problem = f"The gradient by the {title} of '{place.name}' holds {_words(grad)}, and no layer "
                        problem, fix = problem + "inside returned that.", _BETWEEN
                    lines = _lines([("gradient", grad), *seen])
                    raise NonFiniteError.at(caller or place, "backward", problem, got=lines, fix=fix)

            return look

        return _mapped("output", y, lambda title, leaf: tap(leaf, look(title, leaf)))

    def _look(self, place: Place, title: str, seen: Titled) -> Callable[[Tensor], None]:
        """Return what looks at the gradient by something that goes into a layer, which the layer makes."""

        def look(grad: Tensor) -> None:
            self._observe(place, f"gradient by {title}", grad)
            if self.backward and self._wrong(grad):
                problem = f"The gradient by the layer's {title} holds {_words(grad)}; that by its output was finite."
                lines = _lines([("gradient", grad), *seen])
                raise NonFiniteError.at(place, "backward", problem, got=lines, fix=_BETWEEN if place.outer else "")

        return look

    def _check_made(self, place: Place, made: Titled, x: Any, own: Titled) -> None:
        """Raise if a layer has made what is wrong; Inf it may also have been given."""
        for title, leaf in made:
            if not self._wrong(leaf):
                continue
            given = [*_titled("input", x), *own]
            if not _holds(leaf, torch.isnan) and any(_holds(value, torch.isinf) for _, value in given):
                continue
            problem, fix = f"The layer's {title} holds {_words(leaf)}.", ""
            if place.outer:
                problem, fix = f"{problem[:-1]}, and no layer inside returned that.", _BETWEEN
            raise NonFiniteError.at(place, "forward", problem, got=_lines([(title, leaf), *given]), fix=fix)

    def _observe(self, place: Place, title: str, leaf: Tensor) -> None:
        if self.record and readable(leaf) is not None:
            self.record(Observation(".".join(place.names), place.what, title, Statistics.of(leaf)))

    def _wrong(self, leaf: Tensor, *, infinite: bool = True) -> bool:
        """Tell whether a tensor holds NaN or, if that counts here, Inf."""
        if not (self.infinities and infinite):
            return _holds(leaf, torch.isnan)
        plain = readable(leaf)
        return plain is not None and not bool(plain.isfinite().all())


_BETWEEN = "Look at the code between the layers inside."


def _holds(leaf: Tensor, what: Callable[[Tensor], Tensor]) -> bool:
    plain = readable(leaf)
    return plain is not None and bool(what(plain).any())


def _words(leaf: Tensor) -> str:
    found = [word for word, what in (("NaN", torch.isnan), ("Inf", torch.isinf)) if _holds(leaf, what)]
    return " and ".join(found)


def _lines(titled: Titled) -> list[str]:
    return [f"{title}: {Statistics.of(leaf)}" for title, leaf in titled]


def _titled(what: str, tree: Any) -> Titled:
    """List the tensors of a tree, under what they are and their names if there are several."""
    leaves = tree_flatten_with_path(tree)[0]
    return [(_title(what, path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]


def _mapped(what: str, tree: Any, function: Callable[[str, Tensor], Any]) -> Any:
    """Return a tree with a function of title and leaf applied to its tensors."""

    def apply(path: Any, leaf: Any) -> Any:
        return function(_title(what, path), leaf) if isinstance(leaf, Tensor) else leaf

    return tree_map_with_path(apply, tree)


def _title(what: str, path: Any) -> str:
    return f"{what} '{path_name(path)}'" if path else what


def _kept(what: str, tree: Any) -> Titled:
    """List the tensors of a tree so that a backward pass can look at them: the transforms are over by then."""
    return [(title, physical(leaf)) for title, leaf in _titled(what, tree)]


def _own(kind: str, layer: Layer, tree: Any) -> Titled:
    """List the parameters or states of a layer that do not belong to layers inside."""
    found: Titled = []

    def keep(name: str, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append((f"{kind} '{name}'", leaf))
        return leaf

    map_own(keep, layer, tree)
    return found


def tap(tensor: Any, look: Callable[[Tensor], None]) -> Any:
    """Return a tensor as it is; in the backward pass, call a function on its gradient.

    Anything that has no gradient is returned too. It takes part in reverse mode, in forward mode and in vmap; where
    gradients are differentiated again, what flows through the first time is shown.
    """
    if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return _Tap.apply(tensor, look)


class _Tap(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, look: Callable[[Tensor], None]) -> Tensor:
        return tensor.clone()  # a view would forbid a module of torch.nn to write into it

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.look = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.look(grad)
        return grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        # torch switches forward mode off in here: to an outer one the result of an operator would be a constant.
        return _Tap.apply(tangent, _ignore)  # type: ignore[no-any-return]


def _ignore(grad: Tensor) -> None:
    """Look at nothing: tangents are not watched."""


NanCheck = Literal["none", "forward", "backward", "both"]


class DebugModel(WrapperLayer):
    """Call a model and watch every layer inside; `debug_mode` makes one."""

    layer: Layer
    _: KW_ONLY
    nan_check: NanCheck = "both"
    inf_check: bool = True
    error_check: bool = True
    record: Callable[[Observation], None] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layer, Layer):
            raise out_of_range("model", self.layer, "a layer")
        if self.nan_check not in get_args(NanCheck):
            known, fix = ", ".join(map(repr, get_args(NanCheck))), suggest(str(self.nan_check), get_args(NanCheck))
            raise out_of_range("nan_check", self.nan_check, f"one of {known}", fix=fix)
        if not (self.record is None or callable(self.record)):
            fix = "Pass record=seen.append, with seen = []." * isinstance(self.record, list)
            raise out_of_range("record", self.record, "a function of an Observation, or None", fix=fix)

    def __call__(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        """Return what the model returns, or raise where something goes wrong."""
        if torch.compiler.is_compiling():
            uncompiled: Any = torch.compiler.disable(  # type: ignore[no-untyped-call]
                self._call, reason="luxtorch.debug_mode reads numbers."
            )
            return uncompiled(x, ps, st)  # type: ignore[no-any-return]
        return self._call(x, ps, st)

    def _call(self, x: Any, ps: Parameters, st: States) -> tuple[Any, States]:
        try:
            with running(x, ps, st):
                return self._watched(x, ps, st)
        except NonFiniteError as error:
            # As if the model itself had raised it: layers around this one put their names in front.
            place = error.__dict__["_place"]
            error.__dict__["_trail"] = place.names, (self.layer, ps, st), place.layer
            error.where = str(place)
            raise

    @cached_property
    def _watched(self) -> Layer:
        checker = Checker(
            forward=self.nan_check in ("forward", "both"),
            backward=self.nan_check in ("backward", "both"),
            infinities=self.inf_check,
            errors=self.error_check,
            record=self.record,
        )
        return watched(self.layer, checker)


def debug_mode(
    model: Layer,
    *,
    nan_check: NanCheck = "both",
    inf_check: bool = True,
    error_check: bool = True,
    record: Callable[[Observation], None] | None = None,
) -> DebugModel:
    """Return a model that computes the same, with the same parameters and states, and finds out where it goes wrong.

    Every layer inside is watched, and so are the modules of torch.nn inside a layer from `lt.from_torch`. The first
    that makes NaN or Inf raises an error that says its path and statistics of what went in. Where no layer did it, but
    the code between the layers of a container, it is the container that is named; and so are parameters, states, inputs
    and losses that were wrong before. In the backward pass, the layer is named whose gradients are not finite although
    the gradient by its output is.

    Infinities in the model's own input or states, such as masks, may go into any layer; one that returns Inf where none
    went in is named.

    Args:
        model: The model.
        nan_check: In which passes to look for NaN: `"none"`, `"forward"`, `"backward"` or `"both"`.
        inf_check: Whether Inf is an error too. Off for models that compute with infinities on purpose.
        error_check: Whether to add the path of the layer, and statistics of its input, to exceptions of any other kind,
            such as one for memory, as a note (`__notes__`; Python 3.11 and newer print it). Shape errors, and what
            else Python and torch raise in a layer, also in functions of the user's own, name the layer in any case.
        record: A function that is called with an `Observation`, statistics, of each input, output and gradient. The
            `append` of a list keeps them all.

    Returns:
        A layer with the trees of the model.

    Raises:
        NonFiniteError: In a call or in its backward pass, where NaN or Inf first appears.
        InputError: If an option has another value; in a call, if a tracer looks on that has no numbers.

    Example:
        >>> import torch, luxtorch as lt
        >>> model = lt.Chain(lt.Dense(2, 3), torch.sqrt, lt.Dense(3, 1))
        >>> ps, st = lt.setup(0, model)
        >>> ps["layer_1"]["bias"] = torch.tensor([-100.0, 0.0, 0.0])
        >>> lt.debug_mode(model)(torch.ones(1, 2), ps, st)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        luxtorch...NonFiniteError: model.layer_2 (WrappedFunction sqrt): The layer's output holds NaN.
          expected: finite numbers
          got:      output: torch.float32 (1, 3): ... NaN, 0 Inf, the others from ... to ..., mean ..., std ...
                    input: torch.float32 (1, 3): from ... to ..., mean ..., std ...

    Numbers are read, so it is slow, and meant for eager calls. They are read through the transforms of torch.func too:
    under `vmap` for the whole batch; under `jvp` those of the function, not of the derivative. Gradients are watched in
    reverse mode, by `backward()`, `torch.func.grad`, `vjp` and whatever is made of them; where gradients are
    differentiated again, the first are. Inside `torch.compile` the model runs uncompiled, and is checked all the same;
    with `fullgraph=True`, in `lt.jit` and in exports, it is an error. On the meta device, where there are no numbers,
    nothing is checked.

    Source: Lux's `@debug_mode` and `DebugLayer`; `torch.autograd.set_detect_anomaly`, which names no layer.
    """
    return DebugModel(model, nan_check=nan_check, inf_check=inf_check, error_check=error_check, record=record)
