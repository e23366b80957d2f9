"""Every rule against torch.optim: on every kind of tree, eager, compiled and under vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils._pytree as pytree
from torch import Tensor

from luxtorch import optim

STEPS = 50


def gradient(ps: Any, noise: Any) -> Any:
    """Return gradients that depend on the parameters, so that errors show up again, and on chance."""
    return pytree.tree_map(lambda p, n: torch.sin(3 * p) + n, ps, noise)


def step(opt_state: optim.OptState, ps: Any, noise: Any) -> tuple[optim.OptState, Any]:
    return optim.update(opt_state, ps, gradient(ps, noise))


def run(rule: Any, ps: Any, noises: list[Any], step: Callable[..., Any] = step) -> Any:
    opt_state = optim.setup(rule, ps)
    for noise in noises:
        opt_state, ps = step(opt_state, ps, noise)
    return ps


def torch_run(case: Any, leaves: list[Tensor], noises: list[list[Tensor]]) -> list[Tensor]:
    parameters = [torch.nn.Parameter(leaf.clone()) for leaf in leaves]
    optimizer = case.reference(parameters)
    for noise in noises:
        for p, g in zip(parameters, gradient([p.detach() for p in parameters], noise), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in parameters]


def by_formula(rule: optim.LeafwiseRule) -> optim.LeafwiseRule:
    """Return a rule without its kernel."""
    plain = type(type(rule).__name__, (type(rule),), {"kernel": None, "__annotations__": {}})
    return plain(*(getattr(rule, name) for name in rule.hyperparameters))


def close(actual: list[Tensor], expected: list[Tensor], rtol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


def test_eager(case, kind, draw):
    ps, noises = kind.make(draw()), [kind.make(draw()) for _ in range(STEPS)]
    new = run(case.rule, ps, noises)
    close(kind.leaves(new), torch_run(case, kind.leaves(ps), [kind.leaves(n) for n in noises]))


def test_formula(case, kind, draw):
    ps, noises = kind.make(draw()), [kind.make(draw()) for _ in range(STEPS)]
    new = run(by_formula(case.rule), ps, noises)
    close(kind.leaves(new), torch_run(case, kind.leaves(ps), [kind.leaves(n) for n in noises]))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", ["descent", "momentum", "nesterov", "adam-eps", "adamw-decay"], indirect=True)
@pytest.mark.parametrize("kind", ["dict", "vector", "tensor"], indirect=True)
def test_compiled_once(case, kind, draw):
    torch._dynamo.reset()
    ps, noises = kind.make(draw()), [kind.make(draw()) for _ in range(20)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    new = run(case.rule, ps, noises, torch.compile(step, backend=counter, fullgraph=True))
    close(kind.leaves(new), torch_run(case, kind.leaves(ps), [kind.leaves(n) for n in noises]))
    assert counter.frame_count == 1


def test_vmap_over_models(case, kind, draw):
    models = [kind.make(draw()) for _ in range(3)]
    noises = [[kind.make(draw()) for _ in range(STEPS)] for _ in models]
    stack = lambda *trees: pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)  # noqa: E731
    ps = stack(*models)
    opt_state = torch.vmap(lambda ps: optim.setup(case.rule, ps))(ps)
    for noise in zip(*noises, strict=True):
        opt_state, ps = torch.vmap(step)(opt_state, ps, stack(*noise))
    for i, model in enumerate(models):
        new = pytree.tree_map(lambda leaf, i=i: leaf[i], ps)
        close(kind.leaves(new), torch_run(case, kind.leaves(model), [kind.leaves(n) for n in noises[i]]))


def test_grad_through_update(case, kind, draw):
    """Under torch.func.grad the step is the same, and so is its derivative: by jvp, by vjp, and numerically."""
    ps, noises, direction = kind.make(draw()), [kind.make(draw()) for _ in range(3)], kind.make(draw())

    def loss(ps: Any) -> Tensor:
        return sum((leaf**2).sum() for leaf in kind.leaves(run(case.rule, ps, noises)))

    slope = sum(
        (g * d).sum() for g, d in zip(kind.leaves(torch.func.grad(loss)(ps)), kind.leaves(direction), strict=True)
    )
    value, forward = torch.func.jvp(loss, (ps,), (direction,))
    shifted = [loss(pytree.tree_map(lambda p, d, h=h: p + h * d, ps, direction)) for h in (1e-5, -1e-5)]
    torch.testing.assert_close(value, loss(ps), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(forward, slope, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(slope, (shifted[0] - shifted[1]) / 2e-5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_kernel_and_formula_agree(case, kind, draw, dtype, rtol):
    ps, noises = kind.make(draw(dtype=dtype)), [kind.make(draw(dtype=dtype)) for _ in range(10)]
    close(kind.leaves(run(case.rule, ps, noises)), kind.leaves(run(by_formula(case.rule), ps, noises)), rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept(case, kind, draw, dtype):
    ps, noise = kind.make(draw(dtype=dtype)), kind.make(draw(dtype=dtype))
    for rule in (case.rule, by_formula(case.rule)):
        opt_state, new = optim.update(optim.setup(rule, ps), ps, noise)
        remembered = [slots for slots in opt_state.state.leaves.values()]
        assert {leaf.dtype for leaf in kind.leaves(new)} == {dtype}
        assert {value.dtype for slots in remembered for name, value in slots.items() if name != "step"} <= {dtype}


@pytest.mark.parametrize("batched", [False, True])
def test_zero_dim_parameters_keep_their_dtype(case, batched):
    ps, g = {"scale": torch.tensor(0.5)}, {"scale": torch.tensor(-2.0)}
    expected = torch_run_once(case, ps["scale"], g["scale"])
    if batched:
        ps, g = pytree.tree_map(lambda leaf: leaf.expand(2), (ps, g))
        opt_state = torch.vmap(lambda p: optim.setup(case.rule, p))(ps)
        _, new = torch.vmap(optim.update)(opt_state, ps, g)
        torch.testing.assert_close(new["scale"], expected.expand(2))
    else:
        _, new = optim.update(optim.setup(case.rule, ps), ps, g)
        torch.testing.assert_close(new["scale"], expected)


def torch_run_once(case: Any, p: Tensor, g: Tensor) -> Tensor:
    parameter = torch.nn.Parameter(p.clone())
    parameter.grad = g
    case.reference([parameter]).step()
    return parameter.detach()


def test_rules_are_values(rule):
    twin = type(rule)(lr=0.05)
    other = type(rule)(lr=0.06)
    assert rule == twin
    assert hash(rule) == hash(twin)
    assert rule != other
    assert repr(rule).startswith(f"{type(rule).__name__}(lr=0.05")


def test_rules_are_pairs(rule):
    init, update = rule
    assert (init, update) == (rule.init, rule.update) == (rule[0], rule[1])
    assert len(rule) == 2


def test_maximize_is_written_last():
    assert repr(optim.Descent(0.5)) == "Descent(lr=0.5)"
    assert repr(optim.Descent(0.5, maximize=True)) == "Descent(lr=0.5, maximize=True)"
    assert "Descent(lr=0.5, maximize=True)" in repr(optim.setup(optim.Descent(0.5, maximize=True), torch.ones(2)))
