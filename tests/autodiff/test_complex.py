"""Complex parameters of real losses, against real and imaginary parts as parameters of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

import luxtorch as lt
from luxtorch import ComponentVector

Loss = Callable[[Any], Tensor]


def _spectral(ps: Any) -> Tensor:
    """A layer of a Fourier neural operator."""
    x = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(2, 8)
    modes = torch.einsum("bk,kl->bl", torch.fft.rfft(x), ps["weight"])
    return (torch.fft.irfft(modes, n=8) + ps["bias"].abs()).tanh().square().sum()


LOSSES: dict[str, Loss] = {
    "spectral": _spectral,
    "magnitudes": lambda ps: (ps["weight"].abs() * 2 + ps["weight"].angle().cos()).sum() + ps["bias"].real.exp(),
    "products": lambda ps: (ps["weight"] @ ps["weight"].mH * ps["bias"]).imag.sin().sum(),
    "not analytic": lambda ps: (ps["weight"].conj() * ps["weight"] ** 2).real.sum() * ps["bias"].imag,
}


@pytest.fixture
def draw(rng: torch.Generator) -> Callable[[], dict[str, Tensor]]:
    def tree() -> dict[str, Tensor]:
        return {
            "weight": torch.randn(5, 5, dtype=torch.complex128, generator=rng),
            "bias": torch.randn((), dtype=torch.complex128, generator=rng),
        }

    return tree


def in_parts(tree: Any) -> Any:
    return pytree.tree_map(lambda z: torch.view_as_real(z.resolve_conj()), tree)


def whole(tree: Any) -> Any:
    return pytree.tree_map(torch.view_as_complex, tree)


def of_parts(f: Loss) -> Loss:
    return lambda parts: f(whole(parts))


def moved(ps: Any, step: float, direction: Any) -> Any:
    return pytree.tree_map(lambda p, d: p + step * d, ps, direction)


def close(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


def named(tree: Any) -> Any:
    return tree.to_dict() if isinstance(tree, ComponentVector) else tree


@pytest.mark.parametrize("kind", [dict, ComponentVector])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients(draw, name, kind):
    """The gradient is the direction of steepest ascent: the derivative by the real part, plus i times the other."""
    f, ps, direction = LOSSES[name], draw(), draw()
    value, slope = lt.withgradient(f, kind(ps))
    slope = named(slope)
    close(value, f(ps))
    close(slope, whole(lt.gradient(of_parts(f), in_parts(ps))))
    differences = (f(moved(ps, 1e-6, direction)) - f(moved(ps, -1e-6, direction))) / 2e-6
    along = sum((g.conj() * direction[name]).real.sum() for name, g in slope.items())
    close(along, differences, 1e-6)


@pytest.mark.parametrize("kind", [dict, ComponentVector])
@pytest.mark.parametrize("name", LOSSES)
def test_products(draw, name, kind):
    f, ps, direction = LOSSES[name], draw(), draw()
    expected = lt.jacobian_vector_product(of_parts(f), in_parts(ps), in_parts(direction))
    close(lt.jacobian_vector_product(f, kind(ps), kind(direction)), expected)
    number = torch.tensor(0.7, dtype=torch.float64)
    back = whole(lt.vector_jacobian_product(of_parts(f), in_parts(ps), number))
    close(named(lt.vector_jacobian_product(f, kind(ps), number)), back)


def test_products_of_complex_functions(draw):
    """A product with the transposed Jacobian is that of the parts: the Jacobian is conjugated."""
    f = lambda ps: {"y": ps["weight"] @ ps["weight"].conj() * ps["bias"]}  # noqa: E731
    ps, direction = draw(), draw()
    u = {"y": draw()["weight"]}
    parts = lambda x: in_parts(f(whole(x)))  # noqa: E731
    got = lt.jacobian_vector_product(f, ps, direction)
    close(got, whole(lt.jacobian_vector_product(parts, in_parts(ps), in_parts(direction))))
    back = lt.vector_jacobian_product(f, ps, u)
    close(back, whole(lt.vector_jacobian_product(parts, in_parts(ps), in_parts(u))))


@pytest.mark.parametrize("kind", [dict, ComponentVector])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("name", LOSSES)
def test_products_with_hessians(draw, name, mode, kind):
    f, ps, direction = LOSSES[name], draw(), draw()
    got = named(lt.hvp(f, kind(ps), kind(direction), mode=mode))
    close(got, whole(lt.hvp(of_parts(f), in_parts(ps), in_parts(direction), mode=mode)))
    slopes = [lt.gradient(f, moved(ps, step, direction)) for step in (1e-5, -1e-5)]
    close(got, pytree.tree_map(lambda a, b: (a - b) / 2e-5, *slopes), 1e-5)
