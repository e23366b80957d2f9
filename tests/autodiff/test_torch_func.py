"""The fast paths of `grad_and_value`, `vjp` and `jvp` against torch.func, bit for bit, in every context."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from luxtorch.autodiff import _torch_func, gradient, pullback, pushforward, withgradient
from luxtorch.components import ComponentVector
from luxtorch.core import DTypeError


class Pair(NamedTuple):
    """A pytree node that is neither a plain tuple nor a dict."""

    weight: Tensor
    bias: Tensor


class Cube(torch.autograd.Function):
    """A function with rules of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


def _half_recorded(w: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        scale = w.sum()
    return scale * (w.sin().sum() + b.sum())


def _in_place(w: Tensor, b: Tensor) -> Tensor:
    y = w * 2
    y.mul_(b.sum())
    return y.square().sum()


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda w, b: (w @ w.T).sum() * b.sum(),
    "network": lambda w, b: torch.nn.functional.silu(torch.tanh(w) @ b).logsumexp(0),
    "convolution": lambda w, b: torch.nn.functional.conv1d(w[None], b.expand(1, 2, 3)).square().sum(),
    "softmax": lambda w, b: torch.nn.functional.cross_entropy(w + b, w.detach().argmax(1)),
    "one unused": lambda w, b: w.exp().sum(),
    "independent": lambda w, b: torch.ones((), dtype=w.dtype),
    "an argument itself": lambda w, b: b[0],
    "half recorded": _half_recorded,
    "in place": _in_place,
    "own rules": lambda w, b: Cube.apply(w).sum() * b.sum(),
    "nested": lambda w, b: (torch.func.grad(lambda w: (w**4).sum() * b.sum())(w) ** 2).sum(),
    "complex": lambda w, b: (torch.complex(w, w.cos()) * b).abs().sum(),
}

# Each takes a weight and a bias to a tree, and the tree back.
TREES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tensor": (
        lambda w, b: torch.cat([w.reshape(-1), b]),
        lambda x: (x[:6].view(2, 3), x[6:]),
    ),
    "dict": (
        lambda w, b: {"dense": {"weight": w, "bias": b}, "none": {}},
        lambda x: (x["dense"]["weight"], x["dense"]["bias"]),
    ),
    "ComponentVector": (
        lambda w, b: ComponentVector({"dense": {"weight": w, "bias": b}}),
        lambda x: (x["dense"]["weight"], x["dense"]["bias"]),
    ),
    "namedtuple": (Pair, lambda x: (x.weight, x.bias)),
    "list": (lambda w, b: [w, (b,)], lambda x: (x[0], x[1][0])),
}

Ways = dict[str, Callable[[Callable, Any], Any]]


def _ones_like(tree: Any) -> Any:
    return pytree.tree_map(torch.ones_like, tree)


def _their_gradient(f: Callable, x: Any) -> Any:
    slope, value = torch.func.grad_and_value(f)(x)
    return value, slope


def _their_gradient_with_aux(f: Callable, x: Any) -> Any:
    slope, value_and_aux = torch.func.grad_and_value(lambda x: (f(x), {"x": x}), has_aux=True)(x)
    return value_and_aux, slope


def _their_pullback(f: Callable, x: Any) -> Any:
    value, back = torch.func.vjp(lambda x: {"y": f(x), "x": x}, x)
    return value, back(_ones_like(value))[0]


def _our_pullback(f: Callable, x: Any) -> Any:
    value, back = pullback(lambda x: {"y": f(x), "x": x}, x)
    return value, back(_ones_like(value))


OURS: Ways = {
    "gradient": withgradient,
    "gradient with aux": lambda f, x: withgradient(lambda x: (f(x), {"x": x}), x, has_aux=True),
    "pullback": _our_pullback,
    "pushforward": lambda f, x: pushforward(f, x)(_ones_like(x)),
}
THEIRS: Ways = {
    "gradient": _their_gradient,
    "gradient with aux": _their_gradient_with_aux,
    "pullback": _their_pullback,
    "pushforward": lambda f, x: torch.func.jvp(f, (x,), (_ones_like(x),)),
}


def _total(way: Callable, f: Callable) -> Callable[[Any], Tensor]:
    """Return a scalar of all that a way computes."""
    return lambda x: sum((leaf**2).sum() for leaf in pytree.tree_leaves(way(f, x)))  # type: ignore[return-value]


def _batch(x: Any) -> Any:
    return pytree.tree_map(lambda leaf: torch.stack([leaf, leaf + 0.5, leaf * 2]), x)


def _taped(way: Callable, f: Callable, x: Any) -> Any:
    x = pytree.tree_map(lambda leaf: leaf.detach().requires_grad_(), x)
    found = way(f, x)
    total = sum(leaf.sum() for leaf in pytree.tree_leaves(found) if leaf.requires_grad)
    return found, total if isinstance(total, int) else torch.autograd.grad(
        total, pytree.tree_leaves(x), allow_unused=True
    )


def _closed_over(way: Callable, f: Callable, x: Any) -> Any:
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    found = way(lambda x: f(x) * scale, x)
    total = sum(leaf.sum() for leaf in pytree.tree_leaves(found))
    return found, torch.autograd.grad(total, scale)


def _dual(way: Callable, f: Callable, x: Any) -> Any:
    with forward_ad.dual_level():
        found = way(f, pytree.tree_map(lambda leaf: forward_ad.make_dual(leaf, torch.ones_like(leaf)), x))
        unpacked = map(forward_ad.unpack_dual, pytree.tree_leaves(found))
        return [(primal.clone(), tangent if tangent is None else tangent.clone()) for primal, tangent in unpacked]


def _inside(mode: Callable[[], Any]) -> Callable[[Callable, Callable, Any], Any]:
    def run(way: Callable, f: Callable, x: Any) -> Any:
        with mode():
            return way(f, x)

    return run


class _Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _traced(way: Callable, f: Callable, x: Any) -> Any:
    leaves, spec = pytree.tree_flatten(x)
    graph = make_fx(lambda leaves: pytree.tree_leaves(way(f, pytree.tree_unflatten(leaves, spec))))(leaves)
    return graph(leaves), [str(node.target) for node in graph.graph.nodes]


def _compiled(way: Callable, f: Callable, x: Any) -> Any:
    return torch.compile(lambda x: way(f, x), backend="aot_eager", fullgraph=True)(x)


CONTEXTS: dict[str, Callable[[Callable, Callable, Any], Any]] = {
    "alone": lambda way, f, x: way(f, x),
    "grad": lambda way, f, x: torch.func.grad(_total(way, f))(x),
    "grad of grad": lambda way, f, x: torch.func.grad(_total(lambda f, x: torch.func.grad(f)(x), _total(way, f)))(x),
    "vmap": lambda way, f, x: torch.func.vmap(lambda x: way(f, x))(_batch(x)),
    "vmap inside": lambda way, f, x: way(lambda x: torch.func.vmap(f)(_batch(x)).sum(), x),
    "vmap of grad": lambda way, f, x: torch.func.vmap(torch.func.grad(_total(way, f)))(_batch(x)),
    "grad of vmap": lambda way, f, x: torch.func.grad(
        lambda x: sum(leaf.sum() for leaf in pytree.tree_leaves(torch.func.vmap(lambda x: way(f, x))(_batch(x))))
    )(x),
    "jvp": lambda way, f, x: torch.func.jvp(_total(way, f), (x,), (_ones_like(x),)),
    "hessian": lambda way, f, x: torch.func.hessian(_total(way, f))(x),
    "jacrev": lambda way, f, x: torch.func.jacrev(lambda x: pytree.tree_leaves(way(f, x)))(x),
    "tape": _taped,
    "closed over": _closed_over,
    "dual": _dual,
    "no_grad": _inside(torch.no_grad),
    "inference": _inside(torch.inference_mode),
    "function mode": _inside(lambda: torch.device("cpu")),
    "dispatch mode": _inside(_Counting),
    "anomaly": _inside(lambda: torch.autograd.set_detect_anomaly(True)),
    "trace": _traced,
    "compile": _compiled,
}
EAGER = [name for name in CONTEXTS if name != "compile"]

# What torch itself refuses.
REFUSED = {("dual", "pushforward", name) for name in FUNCTIONS} | {("hessian", "pushforward", "in place")}

# A compilation takes seconds: one stands for the rest.
ALWAYS_COMPILED = {("half recorded", "ComponentVector")}


def _same(found: Any, expected: Any, where: str) -> None:
    assert pytree.tree_structure(found) == pytree.tree_structure(expected), where
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert type(a) is type(b), where
        if not isinstance(a, Tensor):
            assert a == b, where
            continue
        kind, expected_kind = ((t.dtype, t.shape, t.requires_grad, t.is_inference()) for t in (a, b))
        assert kind == expected_kind, where
        assert torch.equal(a, b), where


def _case(name: str, tree: str, rng: torch.Generator) -> tuple[Callable, Any]:
    make, read = TREES[tree]
    weight = torch.randn(2, 3, generator=rng, dtype=torch.float64)
    x = make(weight, torch.randn(3, generator=rng, dtype=torch.float64))
    return lambda x: FUNCTIONS[name](*read(x)), x


def _compare(context: str, name: str, tree: str, rng: torch.Generator) -> None:
    f, x = _case(name, tree, rng)
    for way in OURS:
        where = f"{way} of {name} by a {tree}: {context}"
        if (context, way, name) in REFUSED:
            for kind in (OURS, THEIRS):
                with pytest.raises(RuntimeError, match="Nested forward mode|ZeroTensors are immutable"):
                    CONTEXTS[context](kind[way], f, x)
        else:
            _same(CONTEXTS[context](OURS[way], f, x), CONTEXTS[context](THEIRS[way], f, x), where)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("context", "tree"),
    [
        pytest.param(context, tree, marks=pytest.mark.slow if context == "trace" and tree != "ComponentVector" else ())
        for context in EAGER
        for tree in TREES
    ],
)
def test_the_bits_are_those_of_torch_func(context: str, tree: str, rng: torch.Generator) -> None:
    for name in FUNCTIONS:
        _compare(context, name, tree, rng)


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        pytest.param(name, tree, marks=() if (name, tree) in ALWAYS_COMPILED else pytest.mark.slow)
        # Compiling takes seconds: each function with one kind of tree, and each kind with several functions.
        for name, tree in dict.fromkeys([*zip(FUNCTIONS, cycle(TREES), strict=False), *ALWAYS_COMPILED])
        # Where the argument is a view, torch.compile refuses a jvp of one's own.
        if name != "own rules" or tree not in ("tensor", "ComponentVector")
    ],
)
def test_compiled_too(name: str, tree: str, rng: torch.Generator) -> None:
    _compare("compile", name, tree, rng)


@pytest.mark.parametrize("context", ["alone", "vmap of grad", "hessian", "tape", "closed over", "no_grad"])
def test_another_torch_is_served_by_its_public_names(context: str, rng: torch.Generator, monkeypatch: Any) -> None:
    monkeypatch.setattr(_torch_func, "_AVAILABLE", False)
    for name in FUNCTIONS:
        _compare(context, name, "dict", rng)


@pytest.mark.parametrize("way", OURS)
@pytest.mark.parametrize("context", ["alone", "vmap", "tape", "no_grad", "dispatch mode"])
def test_the_levels_are_used_in_eager_code(context: str, way: str, rng: torch.Generator, monkeypatch: Any) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("by torch.func")

    for name in ("grad_and_value", "vjp", "jvp"):
        monkeypatch.setattr(torch.func, name, refuse)
    f, x = _case("network", "dict", rng)
    assert pytree.tree_leaves(CONTEXTS[context](OURS[way], f, x))


def test_compiled_backwards_are_left_to_torch_func(monkeypatch: Any) -> None:
    from torch._dynamo import compiled_autograd

    assert _torch_func.usable()
    monkeypatch.setattr(compiled_autograd, "compiled_autograd_enabled", True)
    assert not _torch_func.usable()


@pytest.mark.parametrize("way", OURS)
@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_errors_leave_every_level(way: str, outer: Callable) -> None:
    def broken(x: Tensor) -> Tensor:
        assert torch.is_grad_enabled() or way == "pushforward"
        raise ZeroDivisionError("mine")

    def state() -> tuple[Any, ...]:
        return (
            torch.is_grad_enabled(),
            torch._C._is_fwd_grad_enabled(),
            torch._C._functorch.peek_interpreter_stack(),
            torch._C._functorch.get_inplace_requires_grad_allowed(),
            torch._C._autograd._saved_tensors_hooks_get_disabled_error_message(),
            forward_ad._current_level,
        )

    with outer():
        before = state()
        with pytest.raises(ZeroDivisionError, match="mine"):
            OURS[way](broken, torch.ones(2))
        assert state() == before
        with pytest.raises(DTypeError, match="'x' must be a floating point tensor"):
            OURS[way](torch.sum, torch.arange(3))
        assert state() == before


@pytest.mark.parametrize("way", ["gradient", "pullback"])
def test_hooks_on_saved_tensors_are_refused_like_by_torch_func(way: str) -> None:
    def square(x: Tensor) -> Tensor:
        return x.square().sum()

    for kind in (THEIRS, OURS):
        with torch.autograd.graph.save_on_cpu(), pytest.raises(RuntimeError, match="hooks"):
            kind[way](square, torch.ones(2))
    _same(OURS[way](square, torch.ones(2)), THEIRS[way](square, torch.ones(2)), way)
    with torch.autograd.graph.disable_saved_tensors_hooks("outer"):
        OURS[way](square, torch.ones(2))
        assert torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() == "outer"


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("made_in", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_pullback_outlives_its_level(made_in: Callable, mode: Callable, rng: torch.Generator) -> None:
    x, us = torch.randn(3, generator=rng), torch.randn(4, 3, generator=rng)
    with made_in():
        ours = pullback(lambda x: x.sin() * x.sum(), x)[1]
        theirs = torch.func.vjp(lambda x: x.sin() * x.sum(), x)[1]
    with mode():
        for u in us:
            _same(ours(u), theirs(u)[0], "one after another")
        _same(torch.func.vmap(ours)(us), torch.func.vmap(theirs)(us)[0], "vmap")
    u = us[0].clone().requires_grad_()
    assert ours(u).requires_grad == theirs(u)[0].requires_grad


@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda x: x.as_subclass(Own)])
def test_subclasses_of_tensors(kind: Callable, rng: torch.Generator) -> None:
    x = kind(torch.randn(3, generator=rng))
    for way in OURS:
        found, expected = (ways[way](lambda ps: ps["x"].square().sum(), {"x": x}) for ways in (OURS, THEIRS))
        _same(found, expected, way)


class Own(Tensor):
    """A subclass with torch's usual handling of functions."""


def test_several_arguments_and_dtypes(rng: torch.Generator) -> None:
    def f(a: Tensor, b: dict[str, Tensor]) -> Tensor:
        return (a.sum() * b["b"].double().sum() * b["z"].abs().sum()).float()

    a, b = torch.randn(2, generator=rng).double(), {"b": torch.ones(2).bfloat16(), "z": torch.tensor([1 + 2j])}
    slopes, value = torch.func.grad_and_value(f, (0, 1))(a, b)
    _same(withgradient(f, a, b), (value, slopes), "gradient")
    value, back = torch.func.vjp(f, a, b)
    _same(pullback(f, a, b)[1](value), back(value), "pullback")
    _same(pushforward(f, a, b)(a, b), torch.func.jvp(f, (a, b), (a, b)), "pushforward")


def test_values_that_are_no_tensors() -> None:
    for way in (lambda f, x: pushforward(f, x)(x), pullback):
        with pytest.raises(DTypeError, match="'f\\(x\\).n' must be a.*tensor(.|\n)*int(.|\n)*has_aux=True"):
            way(lambda x: {"y": x, "n": 3}, torch.ones(2))


def test_gradients_of_gradients_of_gradients(rng: torch.Generator) -> None:
    x = torch.randn((), generator=rng, dtype=torch.float64)
    ours, theirs = torch.exp, torch.exp
    for _ in range(4):
        ours = (lambda f: lambda x: gradient(lambda x: f(x) * x.sin(), x))(ours)
        theirs = (lambda f: torch.func.grad(lambda x: f(x) * x.sin()))(theirs)
    _same(ours(x), theirs(x), "four levels")
