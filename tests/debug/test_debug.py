"""`lt.debug`: formats, errors, debuggers, and what becomes of the programs that call it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from weakref import ref

import pytest
import torch

import luxtorch as lt
from luxtorch.debug import _callback
from luxtorch.jit import _toolchain, jit

X = torch.tensor([1.0, 2.0])
BACKENDS = [
    "eager",
    "replay",
    pytest.param(
        "inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not _toolchain.has_compiler(), reason="no C++")]
    ),
]
on_all = pytest.mark.parametrize("backend", BACKENDS)
compiled = pytest.mark.skipif(not _toolchain.has_compiler(), reason="no C++ compiler")


def by(backend, f, **options):
    return f if backend == "eager" else jit(f, backend=backend, **options)


# Formats.

VALUES = {
    "number": lambda x: x.sum(),
    "vector": lambda x: x,
    "integer": lambda x: x.sum().long(),
    "boolean": lambda x: x.sum() > 0,
    "complex": lambda x: torch.complex(x.sum(), x.sum()),
    "bfloat16": lambda x: x.bfloat16(),
    "empty": lambda x: x[:0],
    "NaN": lambda x: x * float("nan"),
    "tree": lambda x: {"a": x, "b": (x.sum(), 3, None, "text")},
    "ComponentVector": lambda x: lt.ComponentVector({"a": x, "b": x}),
    "static": lambda x: 3.25,
    "size": lambda x: x.shape[0],
}


FORMAT = "a {0} {{}} {v!s} {0!r}"


@pytest.mark.parametrize("value", VALUES)
@on_all
def test_the_text_is_that_of_str_format(backend, value, capsys):
    make = VALUES[value]
    by(backend, lambda x: lt.debug.print(FORMAT, make(x), v=make(x)) or x + 1)(X)
    v = make(X)
    assert capsys.readouterr().out == FORMAT.format(v, v=v) + "\n"


@pytest.mark.parametrize(
    "fmt, args, kwargs, text",
    [
        ("{}", (), {}, "IndexError"),
        ("{} {}", (X,), {}, "IndexError"),
        ("{x}", (), {}, "KeyError"),
        ("{x}", (), {"y": X}, "KeyError"),
        ("", (X,), {}, "no field for the value 0"),
        ("{}", (X, X), {}, "no field for the value 1"),
        ("{}", (X,), {"z": X, "y": X}, "no field for y, z"),
        ("{", (), {}, "ValueError"),
        ("{} {0}", (X,), {}, "ValueError"),
        ("{:.3f}", (X,), {}, "TypeError"),
        ("{:d}", (X.sum(),), {}, "ValueError"),
        ("{0[5]}", (X,), {}, "IndexError"),
        ("{0.no_such}", (X,), {}, "AttributeError"),
    ],
)
@on_all
def test_a_format_that_does_not_fit_is_an_error_at_the_call(backend, fmt, args, kwargs, text):
    def f(x, args, kwargs):
        lt.debug.print(fmt, *args, **kwargs)
        return x + 1

    f = by(backend, f)
    if backend != "eager":
        f = f.lower  # without running it
    with pytest.raises(lt.InputError, match=text):
        f(X, args, kwargs)


@pytest.mark.parametrize("function", [lt.debug.print, lambda fmt: lt.debug.check(True, fmt)], ids=["print", "check"])
def test_a_format_is_a_string(function):
    with pytest.raises(lt.errors.DTypeError, match="must be a string"):
        function(X)


def test_a_failing_check_has_its_message_even_where_the_condition_holds_now():
    with pytest.raises(lt.InputError, match="no field"):
        lt.debug.check(True, "text", X)


@pytest.mark.parametrize("condition", [X, X > 0, X.sum(), 1, None, "yes"], ids=str)
@on_all
def test_a_condition_is_a_boolean_scalar(backend, condition):
    with pytest.raises(lt.errors.DTypeError, match="The condition of a check must be a boolean scalar"):
        by(backend, lambda x: lt.debug.check(condition, "text") or x + 1)(X)


@pytest.mark.parametrize("f", [None, 3, "print"], ids=str)
def test_a_callback_is_a_function(f):
    with pytest.raises(lt.errors.DTypeError, match="f must be a function"):
        lt.debug.callback(f, X)


# Batches.


def look(x, y, z):
    lt.debug.print("{:.0f} {:.0f}", x, z)
    lt.debug.check(x + y < 23, "{x:.0f}", x=x)
    return x + y


ROWS = torch.arange(4.0)
COLUMNS = torch.tensor([0.0, 10.0, 20.0])


@on_all
def test_batches_in_batches_run_member_by_member(backend, capsys):
    f = torch.vmap(torch.vmap(look, (0, None, None)), (None, 0, None))
    with pytest.raises(lt.errors.CheckError, match="3\n") as error:
        by(backend, f)(ROWS, COLUMNS, torch.tensor(7.0))
    assert error.value.got.endswith(", for member 2, 3 of the vmap")
    # The columns are no part of what is printed, so there is a line for each row.
    assert capsys.readouterr().out == "".join(f"{row} 7\n" for row in range(4))


@on_all
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_members_are_parts_along_the_dimension_of_the_batch(backend, dim):
    seen = []
    x = torch.arange(6.0).reshape(2, 3)
    by(backend, torch.vmap(lambda x: lt.debug.callback(lambda x: seen.append(x), x) or x + 1, dim))(x)
    assert [part.tolist() for part in seen] == [part.tolist() for part in x.unbind(dim)]


@on_all
def test_an_empty_batch_shows_nothing(backend, capsys):
    by(backend, torch.vmap(lambda x: lt.debug.print("{}", x) or x + 1))(torch.zeros(0, 2))
    assert capsys.readouterr().out == ""


# What is kept, and what is not computed.


@on_all
def test_a_callback_may_keep_what_it_gets(backend):
    seen = []
    f = by(backend, lambda x: lt.debug.callback(lambda tree: seen.append(tree), {"x": x}) or x * 2)
    x = torch.ones(300, 300, requires_grad=True)
    with torch.no_grad():
        f(x)
        x.zero_()
    (tree,) = seen
    assert tree["x"].sum() == 90_000 and not tree["x"].requires_grad and type(tree["x"]) is torch.Tensor


@on_all
def test_an_error_of_a_callback_ends_the_program(backend):
    def fail(x):
        raise ZeroDivisionError("of the user")

    with pytest.raises(ZeroDivisionError, match="of the user"):
        by(backend, lambda x: lt.debug.callback(fail, x) or x + 1)(X)


@on_all
def test_without_values_it_runs_too(backend, capsys):
    f = by(backend, lambda x: lt.debug.print("here") or x + 1)
    f(X), f(X)
    assert capsys.readouterr().out == "here\nhere\n"


@on_all
def test_constants_are_shown_at_each_call(backend, capsys):
    table = torch.ones(2)
    f = by(backend, lambda x: lt.debug.print("{}", table) or x + 1)
    f(X), f(X)
    assert capsys.readouterr().out == "tensor([1., 1.])\n" * 2


def test_sizes_may_change(capsys):
    f = jit(lambda x: lt.debug.print("{} {n}", x.sum(), n=x.shape[0]) or x + 1, backend="replay", dynamic="x")
    f(torch.ones(3)), f(torch.ones(5))
    assert capsys.readouterr().out == "3.0 3\n5.0 5\n" and f.cache_info().misses == 1


def test_nothing_is_shown_of_tensors_without_numbers(capsys):
    class Look(lt.Layer):
        def __call__(self, x, ps, st):
            lt.debug.print("{}", x)
            lt.debug.check(x.sum() > 0, "{}", x)
            return x, st

    assert lt.output_shape(Look(), (3, 4)) == (3, 4)
    assert capsys.readouterr().out == ""


def test_a_check_in_a_layer_names_the_layer_and_the_line():
    class Positive(lt.Layer):
        def __call__(self, x, ps, st):
            lt.debug.check((x > 0).all(), "{} is not above zero", x.min())
            return x, st

    model = lt.Chain(lt.NoOpLayer(), Positive())
    with pytest.raises(lt.errors.CheckError, match="model.layer_2 .*: -1.0 is not above zero\n.*test_debug.py"):
        model(-torch.ones(2), *lt.setup(0, model))


@pytest.mark.parametrize("backend", ["replay", pytest.param("inductor", marks=compiled)])
def test_what_was_to_be_donated_stays_where_a_check_fails(backend):
    def double(p):
        lt.debug.check(p.max() < 4, "too large")
        return 2 * p

    f = jit(double, donate="p", backend=backend)
    p = f(f(torch.ones(200, 200)))
    with pytest.raises(lt.errors.CheckError, match="too large"):
        f(p)
    assert p.sum() == 160_000


def test_a_program_with_it_is_not_exported(tmp_path):
    f = jit(lambda x: lt.debug.print("{}", x) or x + 1, backend="replay")
    with pytest.raises(lt.InputError, match="must not call Python"):
        f.export(tmp_path / "f.pt2", X)


def test_threads_show_what_they_computed():
    seen = []
    f = jit(lambda x: lt.debug.callback(lambda x: seen.append(int(x)), x.sum()) or x + 1, backend="replay")
    f(torch.zeros(1))
    threads = [threading.Thread(target=f, args=(torch.tensor([float(i)]),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [0, *range(8)]


# Calls live as long as their programs.


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_functions_are_freed_with_their_programs(backend):
    class Own:
        def __call__(self, x):
            self.seen = float(x)

    gc.collect()
    before = len(_callback._CALLS)
    own = Own()

    def step(carry, x, own=own):
        lt.debug.callback(own, carry)
        lt.debug.print("{}", carry)
        return carry + x, None

    f = jit(lambda xs, step=step: lt.scan(step, torch.zeros(()), xs)[0], backend=backend)
    f(X)
    gc.collect()
    f(X)  # still there
    assert own.seen == 1.0
    alive = ref(own)
    del f, step, own
    gc.collect()
    assert alive() is None and len(_callback._CALLS) == before


def test_equal_prints_are_one(capsys):
    f = jit(lambda x: [lt.debug.print("{}", x) for _ in range(3)] and x + 1, backend="replay")
    gc.collect()
    before = len(_callback._CALLS)
    f(X)
    assert len(_callback._CALLS) == before + 1 and len(capsys.readouterr().out.splitlines()) == 3


class Quiet:
    """An object whose text does not tell it from others."""

    def __init__(self, text):
        self.text = text

    def __repr__(self):
        return "quiet"

    def __str__(self):
        return self.text


def test_values_that_look_alike_are_told_apart(capsys):
    one, other = Quiet("one"), Quiet("other")
    jit(lambda x: lt.debug.print("{}", one) or lt.debug.print("{}", other) or lt.debug.print("{}", 1) or x, backend="replay")(X)  # fmt: skip  # noqa: E501
    assert capsys.readouterr().out.split() == ["one", "other", "1"]


# torch.compile.


@pytest.mark.parametrize("transform", ["as it is", "grad", "vmap", "backward"])
def test_print_and_check_are_in_graphs_of_torch_compile(transform, capsys):
    def f(x):
        lt.debug.print("{x} {n}", x={"x": x}, n=x.sum())
        y = x.square()
        lt.debug.check(y.sum() < 6, "too large: {}", y)
        return y.sum()

    transforms = {"grad": torch.func.grad, "vmap": lambda f: lambda x: torch.vmap(f)(x[None])}
    compiled = torch.compile(transforms.get(transform, lambda f: f)(f), backend="aot_eager", fullgraph=True)
    x = X.clone().requires_grad_(transform == "backward")
    for _ in range(2):
        y = compiled(x)
        if transform == "backward":
            y.backward()
        assert capsys.readouterr().out == "{'x': tensor([1., 2.])} 3.0\n"
    with pytest.raises(lt.errors.CheckError, match=r"too large: tensor\(\[1., 9.\]\)\n.*test_debug.py"):
        compiled(torch.tensor([1.0, 3.0]).requires_grad_(transform == "backward"))


def test_a_callback_breaks_graphs_of_torch_compile():
    seen = []
    f = torch.compile(
        lambda x: lt.debug.callback(lambda x: seen.append(float(x)), x.sum()) or x + 1, backend="aot_eager"
    )
    f(X), f(2 * X)
    assert seen == [3.0, 6.0]


def test_bodies_in_torch_compile_do_not_drop_it():
    def f(x):
        return lt.scan(lambda c, x: (lt.debug.print("{}", c), (c + x, None))[1], torch.zeros(()), x)[0]

    with pytest.raises(Exception, match="must not call lt.debug"):
        torch.compile(f, backend="aot_eager")(X)


# Debuggers.


@pytest.fixture
def stops(monkeypatch):
    """The names that are there where a debugger stops."""
    found = []

    def hook():
        found.append({**sys._getframe(1).f_locals})

    monkeypatch.setattr(sys, "breakpointhook", hook)
    return found


@pytest.mark.parametrize("way", ["jit", "vmap", "grad", "scan"])
def test_a_breakpoint_stops_with_values(way, stops):
    def f(x):
        lt.debug.breakpoint(x=x, tree={"y": 2 * x, "n": 3})
        return x.sum()

    calls = {
        "jit": lambda: jit(f, backend="replay")(X),
        "vmap": lambda: torch.vmap(f)(torch.stack([X, 2 * X])),
        "grad": lambda: torch.func.grad(f)(X),
        "scan": lambda: jit(lambda x: lt.scan(lambda c, x: (c + f(x), None), X.sum(), x), backend="replay")(X),
    }
    calls[way]()
    expected = {"jit": [X], "vmap": [X, 2 * X], "grad": [X], "scan": [X[0], X[1]]}[way]
    assert [one["x"].tolist() for one in stops] == [x.tolist() for x in expected]
    assert [one["tree"]["y"].tolist() for one in stops] == [(2 * x).tolist() for x in expected]
    assert all(one["tree"]["n"] == 3 and one.keys() == {"x", "tree"} for one in stops)


def test_a_breakpoint_without_values_stops_too(stops):
    f = jit(lambda x: lt.debug.breakpoint() or x + 1, backend="replay")
    f(X), f(X)
    assert stops == [{}, {}]


def test_a_breakpoint_in_eager_code_has_the_callers_names(stops):
    mine = 3
    lt.debug.breakpoint(other=4)
    assert stops[0]["mine"] == mine and stops[0]["other"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("way", ["eager", "jit"])
def test_pdb_opens(way, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import torch, luxtorch as lt
def f(x):
    mine = 2 * x
    lt.debug.breakpoint(loss=mine)
    return mine
print({"f" if way == "eager" else "lt.jit(f, backend='replay')"}(torch.tensor(3.0)))
""")
    commands = "p mine\nc\n" if way == "eager" else "p loss\nc\n"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONBREAKPOINT"}
    run = subprocess.run([sys.executable, script], input=commands, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "(Pdb) tensor(6.)" in run.stdout and run.stdout.endswith("tensor(6.)\n")
