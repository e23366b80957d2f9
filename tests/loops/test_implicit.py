"""Solutions of equations: their derivatives are those of formulas, of unrolled loops, and of finite differences."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import luxtorch as lt
from luxtorch.core import map_tensors, tree_leaves
from luxtorch.errors import ConvergenceError
from luxtorch.testing import check_derivatives
from luxtorch.testing._orders import EVERY, QUICK

F64 = torch.float64
UP_TO_TWO = [word for word in EVERY if len(word) < 3]
SOLVERS = ["anderson", "iteration", "newton"]
LINEAR = ["dense", "gmres"]


def normal(key, *shape, dtype=F64):
    return lt.random.normal(key, shape, dtype=dtype)


def contraction(z, w, x):
    return torch.tanh(w @ z + x) + 0.1 * x * z.flip(0)


def matrix(key, n):
    w = normal(key, n, n)
    return 0.4 * w / torch.linalg.matrix_norm(w, 2)


def equilibrium(w, x, **options):
    return lt.fixed_point(contraction, torch.zeros_like(x), w, x, **{"tol": 1e-13, **options})


def closed(w, x, **options):
    return lt.fixed_point(lambda z: contraction(z, w, x), torch.zeros_like(x), **{"tol": 1e-13, **options})


def unrolled(w, x):
    z = torch.zeros_like(x)
    for _ in range(80):
        z = contraction(z, w, x)
    return z


FORMS = {
    "closed over": closed,
    "operands": equilibrium,
    "operands, by products": lambda w, x, **options: equilibrium(w, x, linear_solver="gmres", **options),
}


def nth(f, word):
    """Return a derivative of a function of one number, by nested transforms."""

    def slope(f):
        return lambda a: torch.func.jvp(f, (a,), (torch.ones_like(a),))[1]

    for letter in reversed(word):
        f = torch.func.grad(f) if letter == "R" else slope(f)
    return f


# Values.


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_point_is_fixed(make_key, solver, n):
    w, x = matrix(make_key(), n), normal(make_key(), n)
    torch.testing.assert_close(closed(w, x, solver=solver), unrolled(w, x), rtol=1e-11, atol=1e-12)


def test_anderson_and_newton_need_fewer_steps(make_key):
    w, x = 2.4 * matrix(make_key(), 20), normal(make_key(), 20)
    counts = {}
    for solver in SOLVERS:
        calls = []

        def f(z, calls=calls):
            calls.append(z)
            return contraction(z, w, x)

        lt.fixed_point(f, torch.zeros_like(x), solver=solver, tol=1e-10, max_steps=1000)
        counts[solver] = len(calls)
    assert counts["newton"] < counts["anderson"] < counts["iteration"]


def test_a_solver_of_ones_own_is_checked():
    found = lt.fixed_point(torch.cos, torch.ones(2), solver=lambda f, z: 0 * z + 0.739085133)
    torch.testing.assert_close(found, torch.full((2,), 0.739085133))
    with pytest.raises(ConvergenceError, match="must converge"):
        lt.fixed_point(torch.cos, torch.ones(2), solver=lambda f, z: z)


@pytest.mark.parametrize("solver", SOLVERS)
def test_under_vmap_each_has_its_own_iteration(make_key, solver):
    w, xs = matrix(make_key(), 4), normal(make_key(), 5, 4) * torch.tensor([0.0, 0.1, 1, 3, 10], dtype=F64)[:, None]
    found = torch.vmap(lambda x: closed(w, x, solver=solver, max_steps=1000))(xs)
    alone = torch.stack([closed(w, x, solver=solver, max_steps=1000) for x in xs])
    torch.testing.assert_close(found, alone, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_value_is_the_same_with_and_without_derivatives(make_key, form):
    w, x = matrix(make_key(), 3), normal(make_key(), 3)
    run = partial(FORMS[form], tol=1e-4)
    value, taped = run(w, x), run(w.clone().requires_grad_(), x)
    dual, _ = torch.func.jvp(lambda x: run(w, x), (x,), (x,))
    assert taped.requires_grad and not value.requires_grad
    assert torch.equal(value, taped) and torch.equal(value, dual)


def test_no_derivative_by_where_it_begins(make_key):
    w, x, z0 = matrix(make_key(), 3), normal(make_key(), 3), normal(make_key(), 3)
    for options in ({"linear_solver": "dense"}, {"linear_solver": "gmres"}):
        slope = torch.func.grad(lambda z0, options=options: lt.fixed_point(contraction, z0, w, x, **options).sum())
        assert torch.equal(slope(z0), torch.zeros(3, dtype=F64))


# Derivatives by formulas.


@pytest.mark.parametrize("word", ["", "R", "F", "RR", "RF", "FR", "FF", "RRR", "FFF", "RFR", "FRF", "RRRR", "FFRR"])
@pytest.mark.parametrize("linear_solver", LINEAR)
def test_the_square_root_has_its_derivatives(word, linear_solver):
    a = torch.tensor(2.5, dtype=F64)

    def babylonian(a):
        start = torch.ones((), dtype=F64)
        return lt.fixed_point(lambda z, a: (z + a / z) / 2, start, a, tol=1e-14, linear_solver=linear_solver)

    n = len(word)
    expected = math.prod(0.5 - k for k in range(n)) * 2.5 ** (0.5 - n)
    assert float(nth(babylonian, word)(a)) == pytest.approx(expected, rel=1e-9)


def bisect(f, z):
    low, high = z - 10, z + 10
    while float((high - low).max()) > 1e-15 * 10:
        middle = (low + high) / 2
        if bool((middle == low).any() | (middle == high).any()):
            break
        below = f(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def newton(f, z):
    for _ in range(30):
        z = z - torch.linalg.solve(lt.jacobian(f, z), f(z))
    return z


@pytest.mark.parametrize("linear_solver", LINEAR)
def test_derivatives_through_bisection(linear_solver):
    a = torch.tensor([1.3, 0.7], dtype=F64)

    def root(a):
        return lt.custom_root(lambda z, a: z.exp() + z - a, torch.zeros_like(a), bisect, a, linear_solver=linear_solver)

    z = root(a)  # z' = 1 / (1 + exp z), z'' = -exp z / (1 + exp z)^3
    first, second = 1 / (1 + z.exp()), -z.exp() / (1 + z.exp()) ** 3
    torch.testing.assert_close(torch.func.jacrev(root)(a), first.diag())
    torch.testing.assert_close(torch.func.jacfwd(root)(a), first.diag())
    hessian = torch.func.hessian(lambda a: root(a).sum())(a)
    torch.testing.assert_close(hessian, second.diag())


@pytest.mark.parametrize("linear_solver", LINEAR)
def test_a_system_by_newton_is_the_inverse_function(make_key, linear_solver):
    def g(z):  # a map R^3 -> R^3, near the identity
        return z + 0.3 * torch.stack([z[1] * z[2], torch.sin(z[0]), z[0] * z[1] ** 2])

    at, direction = 0.5 * normal(make_key(), 3), normal(make_key(), 3)

    def inverse(a):
        return lt.custom_root(lambda z, a: g(z) - a, torch.zeros_like(a), newton, a, linear_solver=linear_solver)

    a = g(at)
    torch.testing.assert_close(inverse(a), at)
    jacobian = torch.linalg.inv(torch.func.jacrev(g)(at))
    torch.testing.assert_close(torch.func.jacrev(inverse)(a), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(inverse)(a), jacobian)
    # D^2 of the inverse along u twice: -J (D^2 g)(J u, J u)
    along = jacobian @ direction
    curvature = torch.stack([along @ torch.func.hessian(lambda z, i=i: g(z)[i])(at) @ along for i in range(3)])
    for outer in (torch.func.jacrev, torch.func.jacfwd):
        for inner in (torch.func.jacrev, torch.func.jacfwd):
            second = outer(inner(inverse))(a)
            torch.testing.assert_close(torch.einsum("kij,i,j->k", second, direction, direction), -jacobian @ curvature)


# Derivatives by every nesting.


@pytest.mark.parametrize("form", FORMS)
def test_every_word_up_to_two_letters(make_key, form):
    w, x = matrix(make_key(), 3), normal(make_key(), 3)
    check_derivatives(FORMS[form], w, x, rng=make_key(), words=UP_TO_TWO)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_word_up_to_three_letters(make_key, form):
    w, x = matrix(make_key(), 3), normal(make_key(), 3)
    check_derivatives(FORMS[form], w, x, rng=make_key(), words=QUICK)


@pytest.mark.parametrize("form", FORMS)
def test_a_custom_root_with_every_word_up_to_two_letters(make_key, form):
    a = torch.tensor([0.4, -0.3], dtype=F64)

    def f(z, a):
        return z + 0.2 * torch.sin(z.flip(0)) * a + a**2 - 1

    def root(a):
        if form == "closed over":
            return lt.custom_root(lambda z: f(z, a), torch.zeros_like(a), newton)
        linear = "gmres" if "products" in form else "dense"
        return lt.custom_root(f, torch.zeros_like(a), newton, a, linear_solver=linear)

    check_derivatives(root, a, rng=make_key(), words=UP_TO_TWO)


def by_tape(f, order, a):
    a = a.clone().requires_grad_()
    value = f(a)
    for _ in range(order):
        (value,) = torch.autograd.grad(value, a, create_graph=True)
    return value.detach()


@pytest.mark.parametrize("linear_solver", LINEAR)
def test_the_tape(linear_solver):
    a = torch.tensor(0.8, dtype=F64)

    def root(a):
        start = torch.ones((), dtype=F64)
        return lt.fixed_point(lambda z, a: torch.cos(a * z), start, a, tol=1e-14, linear_solver=linear_solver)

    for order in (1, 2):
        torch.testing.assert_close(by_tape(root, order, a), nth(root, "R" * order)(a))
        mixed = by_tape(nth(root, "F"), order, a)
        torch.testing.assert_close(mixed, nth(root, "R" * order + "F")(a))
    if linear_solver == "dense":
        with pytest.raises(lt.InputError, match="so often on an autograd tape"):
            by_tape(root, 3, a)
    else:
        torch.testing.assert_close(by_tape(root, 3, a), nth(root, "RRR")(a))


def test_more_samples_than_fit_a_jacobian(make_key):
    w, xs = matrix(make_key(), 16), normal(make_key(), 64, 16)  # 1024 numbers: "auto" is GMRES

    def f(z, w, xs):
        return torch.tanh(z @ w.mT + xs)

    def loss(w):
        return lt.fixed_point(f, torch.zeros_like(xs), w, xs, tol=1e-12).square().sum()

    def loss_of_samples(w):
        zs = torch.vmap(lambda x: lt.fixed_point(lambda z: f(z, w, x), torch.zeros_like(x), tol=1e-12))(xs)
        return zs.square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(w), torch.func.grad(loss_of_samples)(w))
    with pytest.raises(lt.InputError, match="must not close over what is differentiated"):
        torch.func.grad(lambda w: lt.fixed_point(lambda z: f(z, w, xs), torch.zeros_like(xs)).sum())(w)


def test_nothing_of_the_steps_is_kept(make_key):
    w, xs = matrix(make_key(), 16).requires_grad_(), normal(make_key(), 64, 16)
    kept: list[int] = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    def f(z, w, xs):
        return torch.tanh(z @ w.mT + xs)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lt.fixed_point(f, torch.zeros_like(xs), w, xs, tol=1e-12)
    assert sum(kept) == 2 * xs.numel() + w.numel()  # z and the operands


# Layers, trees and dtypes.


def layer_equilibrium(model, st, **options):
    def run(ps, x):
        start = torch.zeros_like(x)
        if options.get("linear_solver") == "gmres":
            return lt.fixed_point(lambda z, ps, x: 0.3 * model(0.2 * z + x, ps, st)[0], start, ps, x, **options)
        return lt.fixed_point(lambda z: 0.3 * model(0.2 * z + x, ps, st)[0], start, **options)

    return run


LAYERS = {
    "norm": lt.Chain(lt.LayerNorm(4), lt.Dense(4, 4, torch.tanh)),
    "vmapped": lt.Chain(lt.Ensemble(lt.Dense(4, 4, torch.tanh), 1), lt.WrappedFunction(lambda y: y[0])),
    "attention": lt.Chain(
        lt.WrappedFunction(lambda x: x[None]), lt.MultiHeadAttention(4, 2), lt.WrappedFunction(lambda y: y[0])
    ),
}


def setup(name, make_key):
    model = LAYERS[name]
    ps, st = lt.setup(make_key(), model)
    return model, lt.f64(ps), st, normal(make_key(), 5, 4)


def loop(model, st):
    def run(ps, x):
        z = torch.zeros_like(x)
        for _ in range(60):
            before, z = z, 0.3 * model(0.2 * z + x, ps, st)[0]
        assert before.allclose(z, rtol=0, atol=1e-12), "no contraction"
        return z

    return run


@pytest.mark.parametrize("linear_solver", LINEAR)
@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_of_a_layer_is_that_of_the_loop(make_key, name, linear_solver):
    model, ps, st, x = setup(name, make_key)
    solved, exact = layer_equilibrium(model, st, tol=1e-12, linear_solver=linear_solver), loop(model, st)

    def slope(run):
        return lt.gradient(lambda ps: run(ps, x).square().sum(), ps)

    torch.testing.assert_close(slope(solved), slope(exact), rtol=1e-8, atol=1e-10)
    leaves = map_tensors(lambda leaf: leaf.clone().requires_grad_(), ps)
    solved(leaves, x).square().sum().backward()
    torch.testing.assert_close(map_tensors(lambda leaf: leaf.grad, leaves), slope(exact), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("linear_solver", LINEAR)
def test_gradients_of_samples(make_key, linear_solver):
    model, ps, st, x = setup("norm", make_key)
    solved, exact = layer_equilibrium(model, st, tol=1e-12, linear_solver=linear_solver), loop(model, st)

    def slopes(run):
        return [lt.gradient(lambda ps, x=x: run(ps, x).square().sum(), ps) for x in x]

    def batched(run):
        return lt.unstack(torch.vmap(lambda x: lt.gradient(lambda ps: run(ps, x).square().sum(), ps))(x))

    torch.testing.assert_close(list(batched(solved)), slopes(exact), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("linear_solver", LINEAR)
def test_a_tree_with_two_dtypes(linear_solver):
    def f(z, a):
        x, y = z["x"], z["y"][0][0]
        return {"x": torch.cos(y.double()) * a, "y": (torch.sin(x.float() + a.float()).reshape(1, 1),)}

    def found(a):
        start = {"x": torch.ones(1, dtype=F64), "y": (torch.ones(1, 1),)}
        return lt.fixed_point(f, start, a, tol=1e-7, linear_solver=linear_solver)["x"].sum()

    def exact(a):
        y = torch.ones(1)
        for _ in range(60):
            x = torch.cos(y.double()) * a
            y = torch.sin(x.float() + a.float())
        return (torch.cos(y.double()) * a).sum()

    a = torch.tensor(0.7, dtype=F64)
    torch.testing.assert_close(torch.func.grad(found)(a), torch.func.grad(exact)(a), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("linear_solver", LINEAR)
@pytest.mark.parametrize("holomorphic", [True, False])
def test_complex(make_key, holomorphic, linear_solver):
    c, w = (torch.complex(*normal(make_key(), 2, *shape).unbind(0)) * 0.2 for shape in ((3,), (3, 3)))

    def f(z, c, w):
        return torch.sin(w @ z) + c if holomorphic else 0.5 * z.conj() * z + c + 0.5 * (w @ z)

    def found(c, w):
        return lt.fixed_point(f, torch.zeros_like(c), c, w, tol=1e-13, linear_solver=linear_solver)

    def exact(c, w):
        z = torch.zeros_like(c)
        for _ in range(100):
            z = f(z, c, w)
        return z

    def slopes(run):
        return torch.func.grad(lambda c, w: run(c, w).abs().square().sum(), (0, 1))(c, w)

    torch.testing.assert_close(slopes(found), slopes(exact))
    products = [torch.func.jvp(run, (c, w), (w[0], w.mT.clone())) for run in (found, exact)]
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("linear_solver", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype, linear_solver):
    def root(a):
        return lt.fixed_point(
            lambda z, a: torch.cos(z) * a, torch.ones_like(a), a, tol=1e-2, linear_solver=linear_solver
        ).sum()

    a = torch.tensor([1.0, 0.5], dtype=dtype)
    z = torch.tensor([0.7390851, 0.4501836])
    slope = torch.func.grad(root)(a)
    assert slope.dtype == dtype
    torch.testing.assert_close(slope.float(), z.cos() / (1 + a.float() * z.sin()), rtol=2e-2, atol=1e-2)


def test_an_empty_z():
    slope = torch.func.grad(lambda a: lt.fixed_point(lambda z: a * torch.cos(z), torch.ones(0)).sum())
    assert float(slope(torch.ones(()))) == 0


def test_shapes_are_found_without_numbers():
    class Equilibrium(lt.WrapperLayer):
        layer: lt.Layer

        def __call__(self, x, ps, st):
            return lt.fixed_point(lambda z: self.layer(z + x, ps, st)[0], x), st

    assert lt.output_shape(Equilibrium(lt.Dense(3, 3, torch.tanh)), (4, 3)) == (4, 3)


# Compilers.


def fixed_steps(linear_solver):
    return lambda w, x: equilibrium(w, x, solver="iteration", tol=None, max_steps=20, linear_solver=linear_solver)


@pytest.mark.parametrize("linear_solver", LINEAR)
def test_jit(make_key, linear_solver):
    w, x = matrix(make_key(), 4) / 2, normal(make_key(), 4) / 2
    run = fixed_steps(linear_solver)

    def loss(w):
        return run(w, x).square().sum()

    exact = torch.func.grad(lambda w: unrolled(w, x).square().sum())(w)
    torch.testing.assert_close(lt.jit(run, backend="replay")(w, x), unrolled(w, x))
    torch.testing.assert_close(lt.jit(lambda w: lt.gradient(loss, w), backend="replay")(w), exact)
    torch.testing.assert_close(lt.gradient(lt.jit(loss, backend="replay"), w), exact)
    leaf = w.clone().requires_grad_()
    lt.jit(loss, backend="replay")(leaf).backward()
    torch.testing.assert_close(leaf.grad, exact)


@pytest.mark.slow
def test_torch_compile(make_key):
    w, x = matrix(make_key(), 4) / 2, normal(make_key(), 4) / 2
    run = fixed_steps("dense")

    def compiled(f):
        return torch.compile(f, fullgraph=True, backend="aot_eager")

    def loss(w):
        return run(w, x).square().sum()

    exact = torch.func.grad(lambda w: unrolled(w, x).square().sum())(w)
    torch.testing.assert_close(compiled(run)(w, x), unrolled(w, x))
    torch.testing.assert_close(compiled(torch.func.grad(loss))(w), exact)
    leaf = w.clone().requires_grad_()
    compiled(loss)(leaf).backward()
    torch.testing.assert_close(leaf.grad, exact)
    with pytest.raises(Exception, match="cannot trace derivatives by GMRES"):
        compiled(torch.func.grad(lambda w: fixed_steps("gmres")(w, x).sum()))(w)


def test_torch_export(make_key):
    w, x = matrix(make_key(), 4) / 2, normal(make_key(), 4) / 2

    class Module(torch.nn.Module):
        def forward(self, w, x):
            return fixed_steps("dense")(w, x)

    torch.testing.assert_close(torch.export.export(Module(), (w, x)).module()(w, x), unrolled(w, x))


def test_where_gmres_is_compiled_too_few_steps_are_nan(make_key):
    w, x = normal(make_key(), 40, 40), normal(make_key(), 40)  # no contraction: 30 dimensions are not enough

    def root(w):
        return lt.custom_root(lambda z, w: w @ z - x, x, lambda f, z: x, w, linear_solver="gmres").sum()

    slope = lt.jit(lambda w: lt.gradient(root, w), backend="replay")(w)
    assert bool(slope.isnan().all())


# Errors.


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("f", [lambda z: 2 * z + z**2 + 1, lambda z: z * torch.nan, lambda z: z + 1])
def test_what_does_not_converge_is_an_error(solver, f):
    with pytest.raises(ConvergenceError, match="must converge within 30 steps"):
        lt.fixed_point(f, torch.ones(3), solver=solver, max_steps=30)


def test_one_of_a_batch_that_does_not_converge_is_an_error():
    def run(a):
        return lt.fixed_point(lambda z: a * z * z + 0.1, torch.ones(1), solver="iteration")

    assert torch.vmap(run)(torch.tensor([0.1, 0.2])).isfinite().all()
    with pytest.raises(ConvergenceError, match="must converge"):
        torch.vmap(run)(torch.tensor([0.1, 5.0]))


def test_a_warning_instead():
    with pytest.warns(UserWarning, match="must converge within 2 steps"):
        z = lt.fixed_point(torch.cos, torch.ones(3), solver="iteration", max_steps=2, unconverged="warn")
    torch.testing.assert_close(z, torch.ones(3).cos().cos())


def test_a_number_of_steps_is_taken_exactly():
    z = lt.fixed_point(torch.cos, torch.ones(3), solver="iteration", max_steps=3, tol=None)
    assert torch.equal(z, torch.ones(3).cos().cos().cos())


def test_a_singular_jacobian_is_an_error():
    with pytest.raises(lt.InputError, match="must be invertible"):
        torch.func.grad(lambda a: lt.fixed_point(lambda z: z + 0 * a, torch.ones(3)).sum())(torch.ones(()))
    with pytest.raises(ConvergenceError, match="that GMRES finds"):
        torch.func.grad(
            lambda a: lt.fixed_point(lambda z, a: z + 0 * a, torch.ones(3), a, linear_solver="gmres").sum()
        )(torch.ones(()))


@pytest.mark.parametrize("what", ["grad", "jvp", "tape", "vmap", "vmap beside an operand", "grad through vmap"])
def test_with_products_alone_nothing_is_lost_in_silence(make_key, what):
    w, x = matrix(make_key(), 3), normal(make_key(), 3)

    def run(w, x):
        return equilibrium(w, x, linear_solver="gmres")

    def half_closed(w, x):
        return lt.fixed_point(lambda z, x: contraction(z, w, x), torch.zeros_like(x), x, linear_solver="gmres")

    def through_vmap(w):
        def f(z, x):
            return torch.vmap(lambda row, x: torch.tanh(row @ z + x))(w, x)

        return lt.fixed_point(f, torch.zeros_like(x), x, linear_solver="gmres").sum()

    tries = {
        "grad": lambda: torch.func.grad(lambda w: half_closed(w, x).sum())(w),
        "jvp": lambda: torch.func.jvp(lambda w: half_closed(w, x), (w,), (w,)),
        "tape": lambda: half_closed(w.clone().requires_grad_(), x),
        "vmap": lambda: torch.vmap(lambda w: half_closed(w, x))(torch.stack([w, w])),
        "vmap beside an operand": lambda: torch.vmap(half_closed)(torch.stack([w, w]), torch.stack([x, x])),
        "grad through vmap": lambda: torch.func.grad(through_vmap)(w),
    }
    with pytest.raises(lt.InputError, match="must not close over what is"):
        tries[what]()
    assert torch.func.grad(lambda w: run(w, x).sum())(w).isfinite().all()


ERRORS = {
    "nothing": (lambda z: z, (), {}, "nothing to solve for"),
    "no tensor": (lambda z: z, {"a": torch.ones(2), "b": 3}, {}, "'z0.b' must be a floating point"),
    "integers": (lambda z: z, torch.ones(2, dtype=torch.int64), {}, "z0 must be a floating point"),
    "structure": (lambda z: (z, z), torch.ones(2), {}, r"f\(z\) must have the structure"),
    "shape": (lambda z: {"a": z["a"][:1]}, {"a": torch.ones(2)}, {}, "at the leaf 'a' must have the shape"),
    "dtype": (lambda z: z.double(), torch.ones(2), {}, "must have the dtype"),
    "result": (lambda z: 3, torch.ones(2), {}, "must be a tensor"),
    "solver": (torch.cos, torch.ones(2), {"solver": "andersen"}, "Did you mean 'anderson'"),
    "tol": (torch.cos, torch.ones(2), {"tol": 0.0}, "tol must be positive"),
    "max_steps": (torch.cos, torch.ones(2), {"max_steps": 0}, "max_steps must be at least 1"),
    "unconverged": (torch.cos, torch.ones(2), {"unconverged": "ignore"}, "unconverged must be"),
    "linear_solver": (torch.cos, torch.ones(2), {"linear_solver": "lu"}, "linear_solver must be"),
    "what a solver returns": (torch.cos, torch.ones(2), {"solver": lambda f, z: (z,)}, "what solver returns must have"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(name):
    f, z0, options, message = ERRORS[name]
    with pytest.raises(lt.LuxtorchError, match=message):
        lt.fixed_point(f, z0, **options)


def test_torch_compile_takes_no_tolerance():
    with pytest.raises(Exception, match="cannot trace an iteration until a tolerance is met"):
        torch.compile(lambda a: lt.fixed_point(lambda z: torch.cos(a * z), a), fullgraph=True)(torch.ones(2))


# Compiled with a tolerance.


def few(w, x, **options):
    """The fixed point, by operands, to a tolerance that leaves no doubt about derivatives."""
    options = {"tol": 1e-13, "max_steps": 500, **options}
    return lt.fixed_point(contraction, torch.zeros_like(x), w, x, **options)


COMPILED = {
    "value": lambda f: lambda w, x: f(w, x),
    "R": lambda f: torch.func.grad(lambda w, x: f(w, x).square().sum()),
    "F": lambda f: lambda w, x: torch.func.jvp(lambda w: f(w, x), (w,), (w,))[1],
    "V": lambda f: lambda w, x: torch.vmap(lambda scale: f(w * scale, x))(torch.tensor([0.1, 0.5, 1.0], dtype=F64)),
    "VR": lambda f: lambda w, x: torch.vmap(torch.func.grad(lambda x: f(w, x).square().sum()))(torch.stack([x, 2 * x])),
    "RV": lambda f: torch.func.grad(lambda w, x: torch.vmap(lambda x: f(w, x))(torch.stack([x, 3 * x])).square().sum()),
    "RR": lambda f: lambda w, x: torch.func.hessian(lambda x: f(w, x).square().sum())(x),
}


@pytest.mark.parametrize("word", COMPILED)
@pytest.mark.parametrize("linear_solver", LINEAR)
@pytest.mark.parametrize(
    "solver", ["iteration", *(pytest.param(name, marks=pytest.mark.slow) for name in SOLVERS[::2])]
)
def test_jitted_it_stops_as_elsewhere(make_key, solver, linear_solver, word):
    w, x = matrix(make_key(), 4), normal(make_key(), 4)
    run = COMPILED[word](partial(few, solver=solver, linear_solver=linear_solver))
    torch.testing.assert_close(lt.jit(run, backend="replay")(w, x), run(w, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_jitted_it_is_one_loop_that_takes_the_steps_it_needs(make_key, solver):
    w, x = matrix(make_key(), 4), normal(make_key(), 4)
    steps = [str(lt.jit(partial(few, solver=solver, max_steps=n), backend="replay").lower(w, x)) for n in (50, 500)]
    assert steps[0].replace("49", "_").count("\n") == steps[1].count("\n")


def test_jitted_what_does_not_converge_is_nan():
    run = partial(lt.fixed_point, torch.cos, torch.ones(3), solver="iteration", max_steps=3)
    assert bool(lt.jit(run, backend="replay")().isnan().all())
    found = lt.jit(partial(run, unconverged="warn"), backend="replay")()
    torch.testing.assert_close(found, torch.ones(3).cos().cos().cos())
    own = partial(lt.fixed_point, torch.cos, torch.ones(3), solver=lambda f, z: f(z))
    assert bool(lt.jit(own, backend="replay")().isnan().all())


def test_jitted_each_of_a_batch_is_nan_for_itself():
    def run(a):
        return lt.fixed_point(lambda z: a * z * z + 0.1, torch.ones(1), solver="iteration")[0]

    found = lt.jit(torch.vmap(run), backend="replay")(torch.tensor([0.1, 5.0, 0.2]))
    assert found.isnan().tolist() == [False, True, False]


def test_leaves_are_left_alone(make_key):
    w, x = matrix(make_key(), 3), normal(make_key(), 3)
    copies = w.clone(), x.clone()
    torch.func.grad(lambda w: equilibrium(w, x).sum())(w)
    assert all(map(torch.equal, tree_leaves((w, x)), copies))
