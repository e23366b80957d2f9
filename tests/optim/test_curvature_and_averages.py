"""Sophia, SOAP, Prodigy, schedule-free AdamW, Polyak steps and ReduceLROnPlateau, against loops from the papers."""

from __future__ import annotations

import pytest
import torch
import torch.utils._pytree as pytree

import luxtorch as lt
from luxtorch import optim
from luxtorch.components import ComponentVector
from luxtorch.core import InputError

STEPS = 25


def loss(ps):
    """Return a function that is not separable, with curvature."""
    w1, w2 = ps["layer_1"]["weight"], ps["layer_2"]["weight"]
    return (
        (torch.sin(w1) ** 2).sum()
        + (w2 @ w1).square().sum() / 4
        + (ps["layer_1"]["bias"] - 1).square().sum()
        + (ps["layer_2"]["bias"] ** 4).sum()
    )


def diagonal(ps):
    """Return the exact diagonal of the Hessian."""
    leaves, spec = pytree.tree_flatten(ps)
    flat = torch.cat([leaf.reshape(-1) for leaf in leaves])

    def of_flat(x):
        parts = torch.split(x, [leaf.numel() for leaf in leaves])
        return loss(pytree.tree_unflatten([p.view_as(q) for p, q in zip(parts, leaves, strict=True)], spec))

    numbers = torch.func.hessian(of_flat)(flat).diagonal()
    parts = torch.split(numbers, [leaf.numel() for leaf in leaves])
    return pytree.tree_unflatten([p.reshape(q.shape) for p, q in zip(parts, leaves, strict=True)], spec)


def schedule_free(leaves, grads_at, lr=0.05, beta1=0.9, beta2=0.99, eps=1e-8, decay=0.1):
    z, x, v, weights = list(leaves), list(leaves), [torch.zeros_like(p) for p in leaves], 0.0
    for t in range(1, STEPS + 1):
        y = [(1 - beta1) * a + beta1 * b for a, b in zip(z, x, strict=True)]
        gs, rate = grads_at(y), lr * (1 - beta2**t) ** 0.5
        weights += rate**2
        for i, g in enumerate(gs):
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            z[i] = z[i] - rate * g / (v[i].sqrt() + eps) - rate * decay * y[i]
            x[i] = (1 - rate**2 / weights) * x[i] + rate**2 / weights * z[i]
    return [(1 - beta1) * a + beta1 * b for a, b in zip(z, x, strict=True)], x


def prodigy(leaves, grads_at, lr=1.0, beta1=0.9, beta2=0.99, eps=1e-8, decay=0.1, d=1e-3):
    x, first, r = list(leaves), list(leaves), 0.0
    m, v, s = ([torch.zeros_like(p) for p in leaves] for _ in range(3))
    for _ in range(STEPS):
        gs, root = grads_at(x), beta2**0.5
        r = root * r + (1 - root) * lr * d**2 * sum((g * (a - b)).sum() for g, a, b in zip(gs, first, x, strict=True))
        for i, g in enumerate(gs):
            m[i] = beta1 * m[i] + (1 - beta1) * d * g
            v[i] = beta2 * v[i] + (1 - beta2) * d**2 * g**2
            s[i] = root * s[i] + (1 - root) * lr * d**2 * g
        new = max(d, (r / sum(part.abs().sum() for part in s)).item())
        x = [p - lr * d * (a / (b.sqrt() + d * eps) + decay * p) for p, a, b in zip(x, m, v, strict=True)]
        d = new
    return x


def sophia(leaves, grads_at, diagonal_at, lr=0.05, beta1=0.9, beta2=0.8, gamma=0.5, eps=1e-12, decay=0.1, k=3):
    x, m, h = list(leaves), [torch.zeros_like(p) for p in leaves], [torch.zeros_like(p) for p in leaves]
    for t in range(STEPS):
        gs = grads_at(x)
        if t % k == 0:
            h = [beta2 * old + (1 - beta2) * new for old, new in zip(h, diagonal_at(x), strict=True)]
        m = [beta1 * old + (1 - beta1) * g for old, g in zip(m, gs, strict=True)]
        x = [p - lr * decay * p for p in x]
        steps = [(a / (gamma * b).clamp(min=eps)).clamp(-1, 1) for a, b in zip(m, h, strict=True)]
        x = [p - lr * u for p, u in zip(x, steps, strict=True)]
    return x


def soap(leaves, grads_at, lr=0.05, beta1=0.9, beta2=0.8, eps=1e-8, decay=0.1, kept=0.7, f=4):
    x, states = list(leaves), [{"m": 0.0, "v": 0.0, "l": 0.0, "r": 0.0} for _ in leaves]
    for t in range(1, STEPS + 1):
        for i, (g, s) in enumerate(zip(grads_at(x), states, strict=True)):
            matrix = g.ndim == 2
            if t == 1 and matrix:
                s["ql"], s["qr"] = (torch.eye(n, dtype=g.dtype) for n in g.shape)
            to = (lambda a, s=s: s["ql"].T @ a @ s["qr"]) if matrix else lambda a: a
            back = (lambda a, s=s: s["ql"] @ a @ s["qr"].T) if matrix else lambda a: a
            s["m"] = beta1 * s["m"] + (1 - beta1) * g
            s["v"] = beta2 * s["v"] + (1 - beta2) * to(g) ** 2
            step = to(s["m"]) / (1 - beta1**t) / ((s["v"] / (1 - beta2**t)).sqrt() + eps)
            x[i] = x[i] - lr * (back(step) + decay * x[i])
            if matrix:
                s["l"] = kept * s["l"] + (1 - kept) * g @ g.T
                s["r"] = kept * s["r"] + (1 - kept) * g.T @ g
                if t % f == 0:
                    s["ql"], s["qr"] = (torch.linalg.qr(s[a] @ s[q])[0] for a, q in (("l", "ql"), ("r", "qr")))
    return x


def polyak(leaves, grads_at, value_at, max_lr=0.3, f_min=-0.5, eps=0.1, scaling=0.7):
    x = list(leaves)
    for _ in range(STEPS):
        gs, value = grads_at(x), value_at(x)
        rate = min((value - f_min) / (sum((g**2).sum() for g in gs) + eps), max_lr)
        x = [p - scaling * rate * g for p, g in zip(x, gs, strict=True)]
    return x


RULES = {
    "schedule-free": optim.ScheduleFreeAdamW(0.05, (0.9, 0.99), weight_decay=0.1),
    "prodigy": optim.Prodigy(1.0, (0.9, 0.99), weight_decay=0.1, d0=1e-3),
    "sophia": optim.Sophia(0.05, (0.9, 0.8), 0.5, weight_decay=0.1, update_period=3),
    "soap": optim.SOAP(0.05, (0.9, 0.8), weight_decay=0.1, shampoo_beta=0.7, precondition_frequency=4),
    "polyak": optim.PolyakSGD(0.3, -0.5, 0.1, 0.7),
    "plateau": optim.OptimiserChain(optim.Adam(0.05), optim.ReduceLROnPlateau(0.5, 1e-2, patience=2, cooldown=1)),
}
everywhere = pytest.mark.parametrize("name", RULES)
both_kinds = pytest.mark.parametrize("kind", [dict, ComponentVector])


def step(opt_state, ps, shift=0.0):
    """Take a step with all that rules ask for."""
    objective = lambda ps: loss(ps) + shift * ps["layer_1"]["bias"].sum()  # noqa: E731
    grads, value = torch.func.grad_and_value(objective)(ps)
    tree = ps.to_dict() if isinstance(ps, ComponentVector) else ps
    hessian = diagonal(tree)
    hessian = ComponentVector(hessian) if isinstance(ps, ComponentVector) else hessian
    return optim.update(opt_state, ps, grads, value=value, hessian=hessian)


def trained(rule, ps, steps=STEPS):
    opt_state = optim.setup(rule, ps)
    for _ in range(steps):
        opt_state, ps = step(opt_state, ps)
    return opt_state, ps


def close(actual, expected, tolerance=1e-9):
    leaves = [pytree.tree_leaves(t.to_dict() if isinstance(t, ComponentVector) else t) for t in (actual, expected)]
    torch.testing.assert_close(*leaves, rtol=tolerance, atol=tolerance)


@both_kinds
@pytest.mark.parametrize("name", ["schedule-free", "prodigy", "sophia", "soap", "polyak"])
def test_equals_the_formulas(name, kind, draw):
    ps = draw()
    leaves, spec = pytree.tree_flatten(ps)
    tree = lambda x: pytree.tree_unflatten(list(x), spec)  # noqa: E731
    grads_at = lambda x: pytree.tree_leaves(torch.func.grad(loss)(tree(x)))  # noqa: E731
    opt_state, new = trained(RULES[name], kind(ps))
    if name == "schedule-free":
        expected, average = schedule_free(leaves, grads_at)
        close(optim.eval_parameters(opt_state, new), tree(average), 1e-6)
        close(new, tree(expected), 1e-6)
        return
    expected = {
        "prodigy": lambda: prodigy(leaves, grads_at),
        "sophia": lambda: sophia(leaves, grads_at, lambda x: pytree.tree_leaves(diagonal(tree(x)))),
        "soap": lambda: soap(leaves, grads_at),
        "polyak": lambda: polyak(leaves, grads_at, lambda x: loss(tree(x))),
    }[name]()
    close(new, tree(expected), 1e-5 if name == "prodigy" else 1e-9)


@pytest.mark.parametrize("options", [{}, {"threshold_mode": "abs"}, {"mode": "max"}, {"min_lr": 0.02}, {"cooldown": 2}])
def test_plateau_is_that_of_torch(options):
    losses = [3.0, 2.0, 2.0, 1.99, 2.5, 1.9999, 1.5, 1.5, 1.4999, 1.6, 1.7, 1.8, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 0.1]
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    watch = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=1e-2, **options)
    ours = {name: value for name, value in options.items() if name != "min_lr"}
    plateau = optim.ReduceLROnPlateau(0.5, 1e-2, options.get("min_lr", 0.0) / 0.1, patience=1, **ours)
    p = torch.zeros(2)
    opt_state = optim.setup(optim.OptimiserChain(optim.Descent(0.1), plateau), p)
    for value in losses:
        parameter.grad = torch.ones(2)
        optimizer.step()
        watch.step(value)
        opt_state, p = optim.update(opt_state, p, torch.ones(2), value=torch.tensor(value))
        torch.testing.assert_close(p, parameter.detach())


@everywhere
def test_a_vector_is_a_dict(name, draw):
    ps = draw()
    (state, new), (vector_state, vector) = trained(RULES[name], ps, 8), trained(RULES[name], ComponentVector(ps), 8)
    close(vector, new, 1e-7)
    close(optim.eval_parameters(vector_state, vector), optim.eval_parameters(state, new), 1e-7)


@everywhere
def test_vmap_over_models(name, draw):
    models = [draw() for _ in range(3)]
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *models)

    def run(ps):
        opt_state, new = trained(RULES[name], ps, 5)
        return new, optim.eval_parameters(opt_state, new)

    many = torch.vmap(run)(stacked)
    for i, ps in enumerate(models):
        close(pytree.tree_map(lambda leaf, i=i: leaf[i], many), run(ps), 1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, where it lowers a diagonal of torch.func.hessian
@everywhere
def test_jit(name, draw):
    ps = draw()
    opt_state, compiled = optim.setup(RULES[name], ps), lt.jit(step)
    new_state, new = opt_state, ps
    for _ in range(5):
        new_state, new = compiled(new_state, new)
        opt_state, ps = step(opt_state, ps)
    close(new, ps, 1e-6)


@everywhere
def test_nothing_is_written_to_and_zeros_stay_finite(name, draw):
    ps = pytree.tree_map(torch.zeros_like, draw())
    opt_state = optim.setup(RULES[name], ps)
    copies = pytree.tree_map(torch.clone, (opt_state, ps))
    new_state, new = optim.update(opt_state, ps, ps, value=torch.tensor(0.0), hessian=ps)
    torch.testing.assert_close(pytree.tree_leaves((opt_state, ps)), pytree.tree_leaves(copies), rtol=0, atol=0)
    assert all(leaf.isfinite().all() for leaf in pytree.tree_leaves(new))


def test_hutchinson_is_right_on_average(draw, make_key):
    ps = draw()
    rule = optim.Sophia(betas=(0.9, 0.0))
    grads = torch.func.grad(loss)(ps)

    def estimate(key):
        opt_state = optim.update(optim.setup(rule, ps), ps, grads, value_fn=loss, key=key)[0]
        return optim.slots(opt_state, "hessian")

    mean = pytree.tree_map(lambda h: h.mean(0), torch.vmap(estimate)(lt.random.split(make_key(), 4000)))
    close(mean, diagonal(ps), 0.3)
    first = optim.update(optim.setup(rule, ps), ps, grads, value_fn=loss, key=make_key())
    assert first[1]["layer_1"]["weight"].isfinite().all()


def test_what_is_missing_is_named(draw):
    ps = draw()
    with pytest.raises(InputError, match=r"PolyakSGD needs value= in each step"):
        optim.update(optim.setup(optim.PolyakSGD(), ps), ps, ps)
    with pytest.raises(InputError, match=r"Sophia needs value_fn="):
        optim.update(optim.setup(optim.Sophia(), ps), ps, ps)
    with pytest.raises(InputError, match=r"update_period must be a positive integer"):
        optim.Sophia(update_period=0)
    with pytest.raises(InputError, match=r"mode must be 'min' or 'max'"):
        optim.ReduceLROnPlateau(mode="least")
