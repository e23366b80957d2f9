"""`linearize`: products with the Jacobian that do not run the function again, against explicit Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import functional

import luxtorch as lt
from luxtorch.autodiff import gradient, jacobian_vector_product, linearize, pushforward
from luxtorch.core import DTypeError, InputError
from luxtorch.jit import jit


def test_products_against_the_jacobian(problem) -> None:
    matrix = functional.jacobian(problem.flat(problem.net), problem.ravel(problem.ps)).view(8, 9)
    value, product = linearize(problem.net, problem.ps)
    torch.testing.assert_close(value, problem.net(problem.ps), rtol=0, atol=0)
    for scale in (1.0, -2.0, 0.0):
        u = problem.unravel(scale * problem.ravel(problem.direction))
        torch.testing.assert_close(product(u).reshape(-1), matrix @ problem.ravel(u))


def test_the_function_runs_once_and_products_do_not_run_it(problem) -> None:
    calls = 0

    def net(ps):
        nonlocal calls
        calls += 1
        return problem.net(ps)

    product = linearize(net, problem.ps)[1]
    for _ in range(3):
        product(problem.direction)
    torch.func.vmap(lambda scale: product(problem.unravel(scale * problem.ravel(problem.direction))))(torch.arange(3))
    assert calls == 1


def test_several_arguments_trees_and_auxiliary_output(problem) -> None:
    def f(ps, scale):
        y = problem.net(ps) * scale
        return {"y": y, "sum": (y.sum(),)}, {"note": "what else there is", "norm": y.norm()}

    xs = problem.ps, torch.tensor(2.0, dtype=torch.float64)
    us = problem.direction, torch.tensor(-1.0, dtype=torch.float64)
    (value, aux), product = linearize(f, *xs, has_aux=True)
    (expected_value, expected_aux), expected = pushforward(f, *xs, has_aux=True)(*us)
    torch.testing.assert_close(value, expected_value)
    assert aux["note"] == expected_aux["note"]
    torch.testing.assert_close(aux["norm"], expected_aux["norm"])
    torch.testing.assert_close(product(*us), expected)


def test_what_does_not_depend_on_the_input_has_a_derivative_of_zero() -> None:
    constant = torch.ones(3)
    value, product = linearize(lambda x: {"constant": constant, "same": x}, torch.ones(2))
    torch.testing.assert_close(product(torch.ones(2)), {"constant": torch.zeros(3), "same": torch.ones(2)})
    assert value["constant"] is constant or torch.equal(value["constant"], constant)


def test_complex_functions_like_pushforward(rng: torch.Generator) -> None:
    x, u = torch.randn(2, 3, generator=rng, dtype=torch.complex128)
    for f in (torch.sin, torch.abs, lambda x: x.conj() * x[0]):
        torch.testing.assert_close(linearize(f, x)[1](u), pushforward(f, x)(u)[1])


def test_the_derivative_of_a_product_by_the_point(rng: torch.Generator) -> None:
    x, u = torch.randn(2, 3, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(gradient(lambda x: linearize(torch.sin, x)[1](u).sum(), x), -torch.sin(x) * u)


def test_under_jit_whether_made_inside_or_outside(problem) -> None:
    expected = jacobian_vector_product(problem.net, problem.ps, problem.direction)
    inside = jit(lambda ps, u: linearize(problem.net, ps)[1](u), backend="replay")
    outside = jit(linearize(problem.net, problem.ps)[1], backend="replay")
    torch.testing.assert_close(inside(problem.ps, problem.direction), expected)
    torch.testing.assert_close(outside(problem.direction), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.device("cpu")])
def test_in_every_context(problem, context) -> None:
    expected = jacobian_vector_product(problem.net, problem.ps, problem.direction)
    with context():
        value, product = linearize(problem.net, problem.ps)
        torch.testing.assert_close(product(problem.direction), expected)
    torch.testing.assert_close(product(problem.direction), expected)
    torch.testing.assert_close(value, problem.net(problem.ps))


MODELS = {
    "layer norm": lt.Chain(lt.Dense(6, 6), lt.LayerNorm(6), torch.tanh, lt.Dense(6, 2)),
    "attention": lt.Chain(lt.MultiHeadAttention(6, num_heads=2), lt.SelectDim(0, 0)),
    "recurrence": lt.Recurrence(lt.GRUCell(6, 4)),
    "batch norm": lt.Chain(lt.Conv((3,), 5, 4), lt.BatchNorm(4), torch.relu),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_and_the_derivatives_of_their_products(make_key, name) -> None:
    model = MODELS[name]
    ps, st = lt.setup(make_key(), model)
    x = lt.random.normal(make_key(), (4, 5, 6), dtype=torch.float64)
    ps = lt.f64(lt.ComponentVector(ps))
    u = ps * 0 + lt.random.normal(make_key(), ps.shape, dtype=torch.float64)

    def f(ps) -> Tensor:
        y = model(x, ps, st)[0]
        return y[0] if isinstance(y, tuple) else y

    def along(ps, product) -> Tensor:
        return product(f, ps).square().sum()

    torch.testing.assert_close(linearize(f, ps)[1](u), pushforward(f, ps)(u)[1])
    step = 1e-5
    ahead, behind = (linearize(f, ps + sign * step * u)[1](u).square().sum() for sign in (1, -1))
    slope = gradient(lambda ps: linearize(f, ps)[1](u).square().sum(), ps)
    torch.testing.assert_close(slope @ u, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


def test_errors(problem) -> None:
    product = linearize(lambda x: x["a"] * 2, {"a": torch.ones(2)})[1]
    with pytest.raises(InputError, match="must have the structure of x"):
        product(torch.ones(2))
    with pytest.raises(InputError, match=r"leaf 'a' has the wrong shape(.|\n)*\(2,\), that of x"):
        product({"a": torch.ones(3)})
    with pytest.raises(DTypeError, match="of the dtype of x"):
        product({"a": torch.ones(2, dtype=torch.float64)})
    with pytest.raises(DTypeError, match="'x.n' must be a floating point tensor"):
        linearize(lambda x: x["n"] * 1.0, {"n": torch.tensor(1)})
    with pytest.raises(DTypeError, match=r"'f\(x\)' must be a floating point tensor"):
        linearize(lambda x: x > 0, torch.ones(2))
    with pytest.raises(InputError, match="must return a pair"):
        linearize(torch.sin, torch.ones(2), has_aux=True)
    with pytest.raises(InputError, match="nothing to differentiate by"):
        linearize(torch.sin)
