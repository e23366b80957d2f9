"""Torch's own samples of its operators through `lt.jit`: what the plain call gives, or a clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import optree
import pytest
import torch

import luxtorch as lt

from .harness import Result, check_same, copied, label, operators, outcome, report, samples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of operators that are called as their own samples say
]

UNSET = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
"""Operators whose numbers are whatever was in memory."""


def function(op: Any) -> Callable[..., Any]:
    return lambda x, args, kwargs: op(x, *args, **kwargs)


def method(op: Any) -> Callable[..., Any] | None:
    called = op.method_variant
    return called and (lambda x, args, kwargs: called(x, *args, **kwargs))


def in_place(op: Any) -> Callable[..., Any] | None:
    called = op.inplace_variant

    def on_a_copy(x: Any, args: Any, kwargs: Any) -> Any:
        x = x.clone()
        return called(x, *args, **kwargs), x

    return called and on_a_copy


def into(op: Any) -> Callable[..., Any] | None:
    """The form `out=` with a tensor that is made for it, and with one of zero elements that has to grow."""

    def given(x: Any, args: Any, kwargs: Any) -> Any:
        like = op(x, *args, **kwargs)
        made = optree.tree_map(torch.zeros_like, like)
        grown = optree.tree_map(lambda leaf: leaf.new_zeros(0), like)
        return op(x, *args, **kwargs, out=made), made, op(x, *args, **kwargs, out=grown), grown

    return given if op.supports_out else None


EXCEPTIONS: dict[str, dict[str, str]] = {}
FORMS: dict[str, tuple[Callable[[Any], Any], torch.dtype, int, bool]] = {
    "function": (function, torch.float64, 2, False),
    "method": (method, torch.float64, 1, False),
    "in place": (in_place, torch.float64, 2, False),
    "out=": (into, torch.float64, 1, False),
    "dynamic": (function, torch.float64, 1, True),
    "complex": (function, torch.complex128, 1, False),
    "bfloat16": (function, torch.bfloat16, 1, False),
    "int64": (function, torch.int64, 1, False),
}


def calls(form: str) -> Iterator[Result]:
    of, dtype, limit, dynamic = FORMS[form]
    for op in operators():
        fn = of(op)
        if fn is None:
            continue
        # One function for all samples: a graph that is taken for the wrong one gives the wrong result.
        jitted = lt.jit(fn, dynamic=dynamic, backend="replay", maxsize=1000)
        for place, sample in enumerate(samples(op, dtype, limit)):
            args = sample.input, sample.args, sample.kwargs
            try:
                with torch.random.fork_rng([]):
                    wanted = fn(*copied(args))
            except Exception:
                continue  # there is no such form
            kind, words = outcome(
                lambda jitted=jitted, args=args: jitted(*copied(args)),
                lambda got, wanted=wanted, op=op: check_same(got, wanted, numbers=op.name not in UNSET),
            )
            yield Result(label(op), kind, words, place)


@pytest.mark.parametrize("form", FORMS)
def test_jit(form):
    report(f"`jit`, {form}", list(calls(form)), EXCEPTIONS.get(form, {}))
