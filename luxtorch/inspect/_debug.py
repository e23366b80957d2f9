"""Find the layer where NaN, Inf or an exception first appears: `debug_mode`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY
from functools import cached_property
from typing import Any, Literal, get_args

import torch

from luxtorch.core import Layer, Parameters, States, WrapperLayer, out_of_range, suggest

from ._debug_check import Checker, NonFiniteError, Observation, running
from ._watch import watched

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
