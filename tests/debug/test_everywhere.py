"""What `lt.debug` shows: the same values in the same order, in eager code and compiled, in bodies and transforms."""

from __future__ import annotations

import re

import pytest
import torch

import luxtorch as lt
from luxtorch.jit import _toolchain, jit

X = torch.tensor([1.0, 2.0])


def plain(look):
    def f(x):
        look(x.sum())
        y = 2 * x
        look(y.sum())
        return (y * x).sum()

    return f


def scan(look, **options):
    def step(carry, x):
        look(carry)
        carry = carry + x
        look(10 * carry)
        return carry, carry

    return lambda x: lt.scan(step, torch.zeros(()), x, **options)[0]


def scan_for_nothing(look):
    def f(x):
        lt.scan(lambda carry, x: (look(x), (carry + x, None))[1], torch.zeros(()), x)
        return x.sum()

    return f


def nested_scan(look):
    def inner(carry, x):
        look(carry)
        return carry + x, None

    def step(carry, x):
        carry = lt.scan(inner, carry, x.expand(2))[0]
        look(10 * carry)
        return carry, None

    return lambda x: lt.scan(step, torch.zeros(()), x)[0]


def while_loop(look):
    return lambda x: lt.while_loop(lambda c: c < 20, lambda c: (look(c), 2 * c)[1], x.sum(), max_steps=8)


def open_loop(look):
    return lambda x: lt.while_loop(lambda c: c < 20, lambda c: (look(c), 2 * c)[1], x.sum())


def cond(look):
    def f(x):
        yes, no = (lambda x: (look(x.sum()), x.sum())[1]), (lambda x: (look(-x.sum()), -x.sum())[1])
        return lt.cond(x.sum() > 2, yes, no, x) + lt.cond(x.sum() > 8, yes, no, x)

    return f


def cond_for_nothing(look):
    def f(x):
        lt.cond(x.sum() > 2, lambda x: look(x.sum()), lambda x: None, x)
        return x.sum()

    return f


def nested_jit(look):
    inner = jit(plain(look), backend="replay")
    return lambda x: inner(x) + inner(x)


def checkpointed(look):
    class Look(lt.Layer):
        def __call__(self, x, ps, st):
            look(x.sum())
            return (x * x).sin().sum(), st

    model = lt.Checkpointed(Look())
    ps, st = lt.setup(0, model)
    return lambda x: model(x, ps, st)[0]


# The function, and what it shows for `X` by hand.
FUNCTIONS = {
    "plain": (plain, [3, 6]),
    "scan": (scan, [0, 10, 1, 30]),
    "scan, reversed": (lambda look: scan(look, reverse=True), [0, 20, 2, 30]),
    "scan, checkpointed": (lambda look: scan(look, checkpoint=True), [0, 10, 1, 30]),
    "scan, unrolled": (lambda look: scan(look, unroll=2), [0, 10, 1, 30]),
    "scan for nothing": (scan_for_nothing, [1, 2]),
    "scan in a scan": (nested_scan, [0, 1, 20, 2, 4, 60]),
    "while_loop": (while_loop, [3, 6, 12]),
    "while_loop, open": (open_loop, [3, 6, 12]),
    "cond": (cond, [3, -3]),
    "cond for nothing": (cond_for_nothing, [3]),
    "jit in it": (nested_jit, [3, 6, 3, 6]),
    "Checkpointed": (checkpointed, [3]),
}

TRANSFORMS = {
    "as it is": lambda f: f,
    "grad": torch.func.grad,
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
    "grad of grad": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum()),
    "jvp of grad": lambda f: lambda x: torch.func.jvp(torch.func.grad(f), (x,), (x,))[1],
    "vmap of one": lambda f: lambda x: torch.vmap(f)(x[None]),
    "vmap of grad": lambda f: lambda x: torch.vmap(torch.func.grad(f))(x[None]),
    "grad of vmap": lambda f: torch.func.grad(lambda x: torch.vmap(f)(x[None]).sum()),
}
IN_REVERSE = {name for name in TRANSFORMS if "grad" in name}
VMAPPED = {name for name in TRANSFORMS if "vmap" in name}


def recorded(f):
    """Jit, recorded by autograd, with a backward pass."""
    compiled = jit(f, backend="replay")

    def call(x):
        compiled(x.clone().requires_grad_()).sum().backward()

    return call


MODES = {
    "eager": lambda f: f,
    "replay": lambda f: jit(f, backend="replay"),
    "recorded": recorded,
    "inductor": lambda f: jit(f, backend="inductor"),
}
KINDS = ["print", "callback", "check"]


def look_by(kind, seen, last):
    if kind == "callback":
        return lambda x: lt.debug.callback(lambda value: seen.append(float(value)), x)
    if kind == "print":
        return lambda x: lt.debug.print("{x:.0f}", x=x)
    return lambda x: lt.debug.check(x != last, "not {}", x)


def check_shown(kind, function, transform, mode, capsys):
    make, expected = FUNCTIONS[function]
    if transform in VMAPPED and "cond" in function:
        # A batch of predicates runs both branches.
        expected = {"cond": [-3, 3, -3, 3], "cond for nothing": [3]}[function]
    seen: list[float] = []
    call = mode(TRANSFORMS[transform](make(look_by(kind, seen, expected[-1]))))
    for _ in range(2):
        seen.clear()
        if kind == "check":
            with pytest.raises(lt.errors.CheckError, match=rf"not {expected[-1]}\.0\n") as caught:
                call(X)
            member = ", for member 0 of the vmap" if transform in VMAPPED else ""
            assert re.fullmatch(rf"False at .*test_everywhere.py:\d+{member}", caught.value.got)
            continue
        call(X)
        if kind == "print":
            seen += map(float, capsys.readouterr().out.split())
        assert seen == expected


def has_no_rule(function, transform, mode):
    """Tell whether luxtorch refuses it, with or without something to show."""
    if function == "while_loop, open":
        return mode != "eager" and (transform in IN_REVERSE or mode == "recorded")
    return function == "while_loop" and transform in VMAPPED and mode != "eager"  # runs on to max_steps


def cases(modes, transforms, functions):
    return [
        (function, transform, mode)
        for mode in modes
        for transform in transforms
        for function in functions
        if not has_no_rule(function, transform, mode)
    ]


FAST = ["as it is", "grad", "jvp", "vmap of one"]


@pytest.mark.parametrize("function, transform, mode", cases(["eager", "replay"], FAST, FUNCTIONS))
def test_values_are_shown_in_order(function, transform, mode, capsys):
    check_shown("callback", function, transform, MODES[mode], capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function, transform, mode", cases(["eager", "replay"], sorted(TRANSFORMS.keys() - FAST), FUNCTIONS)
)
def test_values_are_shown_in_order_by_transforms_of_transforms(function, transform, mode, capsys):
    check_shown("callback", function, transform, MODES[mode], capsys)


@pytest.mark.parametrize("kind", ["print", "check"])
@pytest.mark.parametrize(
    "function, transform, mode",
    cases(["eager", "replay"], ["as it is"], FUNCTIONS) + cases(["replay"], ["grad", "vmap of one"], ["plain", "scan"]),
)
def test_all_kinds_show_the_same(kind, function, transform, mode, capsys):
    check_shown(kind, function, transform, MODES[mode], capsys)


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if not has_no_rule(name, "as it is", "recorded")])
def test_recorded_calls_show_values_once(function, capsys):
    check_shown("callback", function, "as it is", recorded, capsys)


@pytest.mark.slow
@pytest.mark.skipif(not _toolchain.has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "function, transform, mode", cases(["inductor"], ["as it is", "grad", "vmap of one"], FUNCTIONS)
)
def test_compiled_programs_show_values_in_order(kind, function, transform, mode, capsys):
    check_shown(kind, function, transform, MODES[mode], capsys)
