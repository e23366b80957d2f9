"""Derivatives of torch's own samples by `lt.autodiff`, jitted and not, against finite differences in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import luxtorch as lt

from .harness import ALL, Difference, Result, label, operators, outcome, report, samples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of operators that are called as their own samples say
]

STEP = 1e-6
SMALL = 20
"""Hessians are taken by at most so many numbers."""


class Subject:
    """Hold a scalar function of the differentiable tensors of a sample, and their values."""

    def __init__(self, op: Any, sample: Any) -> None:
        leaves, spec = optree.tree_flatten((sample.input, sample.args, sample.kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        places = [i for i in places if leaves[i].is_floating_point() and leaves[i].layout is torch.strided]
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        call = functools.partial(op.gradcheck_wrapper, op.op) if op.gradcheck_wrapper else op.op

        def function(xs: list[Tensor]) -> Any:
            full = list(leaves)
            for i, x in zip(places, xs, strict=True):
                full[i] = x
            x, args, kwargs = optree.tree_unflatten(spec, full)
            return self.weighted(sample.output_process_fn_grad(call(x, *args, **kwargs)))

        self.exact = True
        self.function = function
        self.xs = [leaves[i] for i in places]

    def weighted(self, out: Any) -> Any:
        """Return a number in which every real output has a weight."""
        total: Any = 0.0
        for n, leaf in enumerate(optree.tree_leaves(out)):
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                self.exact = self.exact and leaf.dtype in (torch.float64, torch.complex128)
                leaf = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
                leaf = leaf if leaf.layout is torch.strided else leaf.to_dense()
                weight = torch.cos(torch.arange(leaf.numel(), dtype=torch.float64) + n).reshape(leaf.shape)
                total = total + (weight.to(leaf.dtype) * leaf).sum()
        return total


def dot(one: Any, two: Any) -> float:
    return float(sum((a.double() * b.double()).sum() for a, b in zip(one, two, strict=True)))


def close(wanted: float, scale: float, tolerance: float) -> Callable[[float], None]:
    def check(got: float) -> None:
        if not abs(got - wanted) <= tolerance * scale:
            raise Difference(f"{got} against {wanted}")

    return check


def along(xs: list[Tensor], v: list[Tensor], step: float) -> list[Tensor]:
    return [x + step * d for x, d in zip(xs, v, strict=True)]


def derivatives(op: Any, sample: Any, generator: torch.Generator, compiled: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield how each kind of derivative along a random direction went."""
    subject = Subject(op, sample)
    f, xs = subject.function, subject.xs
    leaves = [x.clone().requires_grad_() for x in xs]
    try:
        value = f(leaves)
        by_torch = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        v = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in xs]
        wanted = dot(by_torch, v)
        if subject.exact:  # numbers of less precision have no differences
            wanted = float(f(along(xs, v, STEP)) - f(along(xs, v, -STEP))) / (2 * STEP)
    except Exception:
        return  # not differentiable by torch, or not everywhere
    if not math.isfinite(wanted):
        return
    scale = 1 + sum(float(g.abs().sum()) for g in by_torch)
    check = close(wanted, scale, 1e-5 if subject.exact else 0.01)

    yield "gradient", outcome(lambda: dot(lt.gradient(f, xs), v), check)
    forward = outcome(lambda: float(lt.pushforward(f, xs)(v)[1]), check)
    yield "pushforward", forward

    @lt.jit(backend="replay")
    def both(xs: list[Tensor], v: list[Tensor]) -> Any:
        return lt.gradient(f, xs), lt.pushforward(f, xs)(v)[1] if forward[0] == "equal" else None

    def check_both(got: Any) -> None:
        check(dot(got[0], v))
        if got[1] is not None:
            check(float(got[1]))

    if "jit" in compiled:
        yield "jit", outcome(lambda: both(xs, v), check_both)

    def recorded() -> float:
        leaves = [x.clone().requires_grad_() for x in xs]
        value = lt.jit(f, backend="replay")(leaves)
        return dot(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True), v)

    if "recorded" in compiled:
        yield "recorded", outcome(recorded, check)

    if not (subject.exact and op.supports_gradgrad and sum(x.numel() for x in xs) <= SMALL):
        return
    try:
        up, down = (lt.gradient(f, along(xs, v, step)) for step in (STEP, -STEP))
    except Exception:
        return  # said already
    second = dot([(a - b) / (2 * STEP) for a, b in zip(up, down, strict=True)], v)

    def quadratic(h: Any) -> float:
        pairs = [(i, j) for i in range(len(v)) for j in range(len(v))]
        return sum(
            float(v[i].flatten() @ h[i][j].reshape(v[i].numel(), v[j].numel()) @ v[j].flatten()) for i, j in pairs
        )

    for mode in ("reverse", "forward"):
        near = close(second, 1 + abs(second), 1e-4)
        yield f"hessian, {mode}", outcome(lambda mode=mode: quadratic(lt.hessian(f, xs, mode=mode)), near)


@functools.cache
def results() -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {form: [] for form in EXCEPTIONS}
    generator = torch.Generator().manual_seed(0)
    for i, op in enumerate(operators()):
        if not op.supports_autograd:
            continue
        # Tracing takes longest: it is one way or the other.
        compiled = {"jit", "recorded"} if ALL else {("jit", "recorded")[i % 2]}
        for place, sample in enumerate(samples(op, torch.float64, 3 if ALL else 1, requires_grad=True)):
            if Subject(op, sample).xs:
                with torch.random.fork_rng([]):
                    for form, (kind, words) in derivatives(op, sample, generator, compiled):
                        found[form].append(Result(label(op), kind, words, place))
    return found


REASONS = {
    "as_strided_scatter": "Torch's reverse mode is wrong where the memory overlaps.",
    "nn.functional.max_unpool3d": "Torch's reverse mode is wrong where two places are the same.",
    "sparse.sampled_addmm": "Torch.func takes no sparse tensors in rows.",
    "sparse.mm[reduce]": "Torch.func takes no sparse tensors in rows.",
    "native_layer_norm": "Its statistics are not differentiable to torch.",
    "native_batch_norm": "Its statistics are not differentiable to torch.",
    "_native_batch_norm_legit": "Its statistics are not differentiable to torch.",
    "_batch_norm_with_update": "Its statistics are not differentiable to torch.",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "Its statistics are not differentiable to torch.",
    "tensor_split": "It reads its indices in C++, past torch.func.",
    "normal": "It draws other numbers at each call.",
    "nn.functional.cosine_embedding_loss": "It asks whether a target is 1, by which the sample differentiates as well.",
    "nn.functional.hinge_embedding_loss": "It asks whether a target is 1, by which the sample differentiates as well.",
    "nn.functional.linear_cross_entropy[chunked]": "Torch's custom operators drop tangents without a word.",
    "nn.functional.linear_cross_entropy[chunked_none]": "Torch's custom operators drop tangents without a word.",
    "linalg.norm[subgradients_at_zero]": "It has a kink there.",
    "scatter_reduce[prod]": "Torch's forward mode gives zero.",
}

_EVERYWHERE = """
    sparse.sampled_addmm sparse.mm[reduce] native_layer_norm native_batch_norm _native_batch_norm_legit
    _batch_norm_with_update tensor_split normal nn.functional.cosine_embedding_loss nn.functional.hinge_embedding_loss
"""
_FLASH = "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu"
_NAMES = {
    "gradient": f"{_EVERYWHERE} as_strided_scatter nn.functional.max_unpool3d {_FLASH}",
    "pushforward": f"""
        {_EVERYWHERE} nn.functional.linear_cross_entropy[chunked] nn.functional.linear_cross_entropy[chunked_none]
        scatter_reduce[prod]
    """,
    "jit": f"as_strided_scatter native_layer_norm {_FLASH} nn.functional.hinge_embedding_loss",
    "recorded": "nn.functional.max_unpool3d nn.functional.cosine_embedding_loss",
    "hessian, reverse": "linalg.norm[subgradients_at_zero]",
    "hessian, forward": "linalg.norm[subgradients_at_zero]",
}
EXCEPTIONS = {form: {name: REASONS[name] for name in names.split()} for form, names in _NAMES.items()}


@pytest.mark.parametrize("form", EXCEPTIONS)
def test_derivatives(form):
    report(f"derivatives, {form}", results()[form], EXCEPTIONS[form])
