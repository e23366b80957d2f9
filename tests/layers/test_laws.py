"""Every layer, in every form, keeps every law."""

from __future__ import annotations

import inspect
import runpy
from pathlib import Path

import pytest
import torch

import luxtorch as lt
from luxtorch import (
    BatchNorm,
    Chain,
    Dense,
    Dropout,
    FlattenLayer,
    NoOpLayer,
    Parallel,
    Scale,
    SkipConnection,
    WrappedFunction,
)

FORMS = {
    "Dense": (Dense(3, 2, torch.tanh), [(4, 3), (3,), (2, 4, 3)]),
    "Dense without bias": (Dense(3, 2, bias=False), [(4, 3)]),
    "Scale": (Scale(3, activation=torch.tanh), [(4, 3), (3,)]),
    "Scale of two dimensions, without bias": (Scale(2, 3, bias=False), [(4, 2, 3)]),
    "NoOpLayer": (NoOpLayer(), [(4, 3)]),
    "WrappedFunction": (WrappedFunction(torch.exp), [(4, 3)]),
    "FlattenLayer": (FlattenLayer(), [(4, 3, 2), (4, 3)]),
    "Dropout": (Dropout(0.5), [(4, 3)]),
    "Dropout of nothing": (Dropout(0.0), [(4, 3)]),
    "Dropout of everything": (Dropout(1.0), [(4, 3)]),
    "Dropout of rows": (Dropout(0.5, dims=0), [(8, 3)]),
    "BatchNorm": (BatchNorm(3, torch.sigmoid), [(4, 3), (4, 3, 2), (2, 3, 2, 2)]),
    "BatchNorm, cumulative": (BatchNorm(3, momentum=None), [(4, 3)]),
    "BatchNorm, not affine": (BatchNorm(3, affine=False), [(4, 3)]),
    "BatchNorm without statistics": (BatchNorm(3, track_running_stats=False), [(4, 3)]),
    "Chain": (Chain(Dense(3, 4, torch.tanh), BatchNorm(4), Dropout(0.5), Chain(Dense(4, 2))), [(4, 3)]),
    "empty Chain": (Chain(), [(4, 3)]),
    "named Chain": (Chain(one=Dense(3, 3), two=torch.tanh), [(4, 3)]),
    "Parallel": (Parallel(torch.add, Dense(3, 2), Chain(Dense(3, 2), Dropout(0.5))), [(4, 3)]),
    "Parallel of a tuple": (Parallel(None, Dense(3, 2), Dense(2, 2)), [((4, 3), (4, 2))]),
    "Parallel with a layer": (
        Parallel(Parallel(torch.mul, Dense(2, 2), BatchNorm(2)), Dense(3, 2), Dense(3, 2)),
        [(4, 3)],
    ),
    "SkipConnection": (SkipConnection(Chain(Dense(3, 3), BatchNorm(3)), torch.mul), [(4, 3)]),
    "SkipConnection with a layer": (
        SkipConnection(Dense(3, 3), Parallel(torch.mul, Dense(3, 2), Dense(3, 2))),
        [(4, 3)],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Chain", "BatchNorm, cumulative", "Dropout"])
def test_inductor_keeps_the_laws(make_key, draw, name):
    layer, shapes = FORMS[name]
    lt.testing.check_layer(layer, draw(shapes[0]), rng=make_key(), laws=["compile"], backend="inductor")


FILES = [file for file in Path(__file__).parent.glob("test_*.py") if "\nFORMS = {" in file.read_text()]
OTHERS = [runpy.run_path(str(file))["FORMS"] for file in FILES if file != Path(__file__)]
LISTED = {type(layer).__name__ for forms in (FORMS, *OTHERS) for layer, *_ in forms.values()}
PUBLIC = {
    name: value
    for name, value in vars(lt).items()
    if isinstance(value, type)
    and issubclass(value, lt.Layer)
    and value.__module__.startswith("luxtorch.layers")
    and not inspect.isabstract(value)
}
SIZE = 3
SHAPES = [(4, SIZE), (4, 2, SIZE), (2, SIZE, 4), (2, SIZE, 4, 4), (2, SIZE, 4, 4, 4)]


def form(cls: type[lt.Layer]) -> tuple[lt.Layer, list[tuple[int, ...]]]:
    """Return a layer with `SIZE` for what has no default, and the shapes that it takes."""
    parameters = inspect.signature(cls).parameters.values()
    layer = cls(*[SIZE for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD])
    ps, st = lt.setup(0, layer)

    def taken(shape: tuple[int, ...]) -> bool:
        try:
            layer(torch.zeros(shape), ps, st)
        except (lt.LuxtorchError, RuntimeError, IndexError):
            return False
        return True

    return layer, list(filter(taken, SHAPES))


# A layer that no file lists is swept by being exported.
@pytest.mark.parametrize("name", sorted({"Dense", "LayerNorm", "RMSNorm"} | PUBLIC.keys() - LISTED))
def test_every_law_holds_for_what_is_exported(check_laws, name):
    layer, shapes = form(PUBLIC[name])
    assert shapes, f"{name}() takes none of {SHAPES}: list it in FORMS of the test file of its family"
    check_laws(layer, shapes)
