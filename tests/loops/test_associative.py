"""`associative_scan` is the plain loop, for functions that commute or not, along any dimension, under any transform."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch.core import tree_leaves, tree_map
from luxtorch.testing import check_derivatives
from luxtorch.testing._orders import EVERY

WORDS = [word for word in EVERY if len(word) < 3 or word in ("RFR", "FrF", "TRF")]
LENGTHS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 31]


def add(a, b):
    return a + b


def matrices(a, b):
    return a @ b


def affine(first, second):
    return first[0] * second[0], second[0] * first[1] + second[1]


def named(first, second):
    return {"log": torch.logaddexp(first["log"], second["log"]), "all": [first["all"][0] * second["all"][0]]}


def normal(key, *shape, dtype=torch.float64):
    if dtype.is_complex:
        return torch.complex(*lt.random.normal(key, (2, *shape), dtype=torch.float64).unbind(0)).to(dtype)
    return lt.random.normal(key, shape, dtype=dtype)


def make(name, key, n, dtype=torch.float64):
    keys = lt.random.split(key, 2)
    if name == "matrices":
        return normal(keys[0], n, 3, 3, dtype=dtype) / 2
    if name == "affine":
        return normal(keys[0], n, 2, dtype=dtype), normal(keys[1], n, 2, dtype=dtype)
    if name == "named":
        return {"log": normal(keys[0], n, dtype=dtype), "all": [normal(keys[1], n, 2, dtype=dtype)]}
    return normal(keys[0], n, 2, dtype=dtype)


KINDS = {"add": add, "maximum": torch.maximum, "matrices": matrices, "affine": affine, "named": named}


def by_loop(combine, xs, reverse=False):
    """Combine one element at a time; the scanned dimension is the first."""
    length = len(tree_leaves(xs)[0])
    order = range(length)[::-1] if reverse else range(length)
    elements = [tree_map(lambda leaf, i=i: leaf[i], xs) for i in order]
    for i in range(1, length):
        elements[i] = combine(elements[i - 1], elements[i])
    if not elements:
        return xs
    return tree_map(lambda *leaves: torch.stack(leaves[::-1] if reverse else leaves), *elements)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_loop(make_key, name, length, reverse):
    xs = make(name, make_key(), length)
    found = lt.associative_scan(KINDS[name], xs, reverse=reverse)
    torch.testing.assert_close(found, by_loop(KINDS[name], xs, reverse), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64, torch.complex128, torch.int64])
@pytest.mark.parametrize("name", ["add", "matrices", "affine"])
def test_every_dtype(make_key, name, dtype):
    if dtype == torch.int64:
        xs = tree_map(lambda leaf: (2 * leaf).round().to(dtype), make(name, make_key(), 9))
    else:
        xs = make(name, make_key(), 9, dtype)
    found, exact = lt.associative_scan(KINDS[name], xs), by_loop(KINDS[name], xs)
    assert [leaf.dtype for leaf in tree_leaves(found)] == [dtype] * len(tree_leaves(xs))
    tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-4, torch.complex64: 1e-4}.get(dtype, 1e-10)
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dim", [1, -1, -2])
def test_other_dimensions_stay_where_they_are(make_key, dim):
    x = normal(make_key(), 3, 6, 5)
    torch.testing.assert_close(lt.associative_scan(add, x, dim=dim), x.cumsum(dim))
    found = lt.associative_scan(torch.maximum, x, dim=dim, reverse=True)
    torch.testing.assert_close(found, x.flip(dim).cummax(dim).values.flip(dim))


def test_the_calls_are_few_and_never_empty(make_key):
    sizes = []

    def watched(a, b):
        assert a.shape == b.shape
        sizes.append(len(a))
        return a + b

    lt.associative_scan(watched, normal(make_key(), 1000))
    assert len(sizes) < 20 and sum(sizes) < 2000 and min(sizes) > 0


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_derivatives_of_every_order(make_key, name, reverse):
    xs = make(name, make_key(), 5)
    check_derivatives(lambda xs: lt.associative_scan(KINDS[name], xs, reverse=reverse), xs, rng=make_key(), words=WORDS)


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_is_its_members(make_key, name):
    members = [make(name, make_key(), 7) for _ in range(3)]
    batch = tree_map(lambda *leaves: torch.stack(leaves), *members)
    found = torch.vmap(lambda xs: lt.associative_scan(KINDS[name], xs))(batch)
    each = [by_loop(KINDS[name], member) for member in members]
    torch.testing.assert_close(found, tree_map(lambda *leaves: torch.stack(leaves), *each), rtol=1e-11, atol=1e-12)


def test_what_combine_closes_over_is_differentiated(make_key):
    w, xs = normal(make_key(), 3, 3) / 3, normal(make_key(), 6, 3)

    def loss(scan, w):
        def softened(a, b):  # associative, as x -> x @ w is linear: (a w^-1) w (b w^-1) w ...
            return a @ w @ b

        return scan(softened, xs[:, :, None] * xs[:, None, :]).sum()

    expected = torch.func.grad(lambda w: loss(by_loop, w))(w)
    torch.testing.assert_close(torch.func.grad(lambda w: loss(lt.associative_scan, w))(w), expected)


def recurrence(xs):
    return lt.associative_scan(affine, xs)[1]


def test_jit(make_key):
    xs = make("affine", make_key(), 11)
    torch.testing.assert_close(lt.jit(recurrence, backend="replay")(xs), by_loop(affine, xs)[1])
    slopes = lt.jit(lambda xs: lt.gradient(lambda xs: recurrence(xs).square().sum(), xs), backend="replay")
    torch.testing.assert_close(slopes(xs), lt.gradient(lambda xs: by_loop(affine, xs)[1].square().sum(), xs))


def test_compile_and_export(make_key):
    xs = make("affine", make_key(), 6)
    exact = by_loop(affine, xs)[1]
    torch.testing.assert_close(torch.compile(recurrence, fullgraph=True, backend="aot_eager")(xs), exact)

    class Module(torch.nn.Module):
        def forward(self, a, b):
            return recurrence((a, b))

    torch.testing.assert_close(torch.export.export(Module(), xs).module()(*xs), exact)


ERRORS = {
    "no leaf": (add, (), "nothing to scan"),
    "no tensor": (add, {"a": torch.ones(2), "b": 3}, "'xs.b' must be a tensor"),
    "no dimension": (add, (torch.ones(2), torch.ones(())), "a dimension of each leaf"),
    "lengths": (add, {"a": torch.ones(2), "b": torch.ones(3)}, "one length along dim 0"),
    "structure": (lambda a, b: (a, b), torch.ones(3), "must keep their structure"),
    "shape": (lambda a, b: (a + b).sum(), torch.ones(3), "must keep their shape"),
    "length": (lambda a, b: {"a": (a["a"] + b["a"])[:1]}, {"a": torch.ones(8)}, "leaf 'a' does not"),
    "dtype": (lambda a, b: (a + b).double(), torch.ones(3), "must keep their dtype"),
    "result": (lambda a, b: 3.0, torch.ones(3), "must be a tensor"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(name):
    combine, xs, message = ERRORS[name]
    with pytest.raises(lt.LuxtorchError, match=message):
        lt.associative_scan(combine, xs)
    assert "got:" in str(pytest.raises(lt.LuxtorchError, lt.associative_scan, combine, xs).value)
