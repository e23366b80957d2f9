"""A group of a ComponentVector is as good an argument as a vector built anew, and as a dict of the same."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import optree
import pytest
import torch
import torch.utils._pytree as pytree
import torchopt
from torch import Tensor

import luxtorch as lt
from luxtorch import optim, training

STACKED = {"weight": (3, 2), "inner": {"bias": (3,), "gain": ()}, "none": {}}


def drawn(shapes: Any, rng: torch.Generator) -> Any:
    if isinstance(shapes, dict):
        return {name: drawn(shape, rng) for name, shape in shapes.items()}
    return torch.randn(shapes, generator=rng, dtype=torch.float64)


def wrapped(tree: Any) -> lt.ComponentVector:
    return lt.ComponentVector({"before": torch.ones(2, dtype=torch.float64), "net": tree, "lr": tree["inner"]["gain"]})


def read(ps: Any) -> Any:
    for value in ps.values():
        if not isinstance(value, Tensor):
            read(value)
    return ps


def spread(cv: lt.ComponentVector) -> lt.ComponentVector:
    """Return the same vector on every other element of a tensor."""
    flat = torch.stack([cv.flat, -cv.flat], -1)[..., 0]
    assert not flat.is_contiguous()
    return lt.ComponentVector.from_flat(flat, cv.axes)


# Each makes a group that holds a tree; all of them have the numbers and the names of `ComponentVector(tree)`.
GROUPS = {
    "group": lambda tree: wrapped(tree)["net"],
    "attribute": lambda tree: wrapped(tree).net,
    "only group": lambda tree: lt.ComponentVector({"net": tree})["net"],
    "group of a group": lambda tree: lt.ComponentVector({"a": tree, "b": wrapped(tree)})["b"]["net"],
    "dotted": lambda tree: lt.ComponentVector({"a": tree, "b": wrapped(tree)})["b.net"],
    "read before": lambda tree: read(read(wrapped(tree))["net"]),
    "asked before": lambda tree: (lambda net: (net.flat, net)[1])(read(wrapped(tree)["net"])),
    "listed": lambda tree: dict(wrapped(tree).items())["net"],
    "selected": lambda tree: wrapped(tree)[["lr", "net"]]["net"],
    "computed": lambda tree: (2 * wrapped(tree) - wrapped(tree))["net"],
    "not contiguous": lambda tree: spread(wrapped(tree))["net"],
    "on a tape": lambda tree: lt.ComponentVector.from_flat(wrapped(tree).flat.requires_grad_(), wrapped(tree).axes).net,
    "made without a tape": lambda tree: untaped(tree),
}


def untaped(tree: Any) -> Any:
    cv = wrapped(tree)
    cv.flat.requires_grad_()
    with torch.no_grad():
        return read(cv["net"])


def loss(ps: Any, x: Tensor) -> Tensor:
    return (torch.tanh(ps["weight"] @ x + ps["inner"]["bias"]).sum() * ps["inner"]["gain"]).sin()


def many(ps: Any, x: Tensor) -> Tensor:
    return torch.tanh(ps["weight"] @ x + ps["inner"]["bias"]) * ps["inner"]["gain"]


def autograd(ps: Any, x: Tensor) -> Any:
    ps = pytree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), ps)
    leaves, spec = pytree.tree_flatten(ps)
    return pytree.tree_unflatten(torch.autograd.grad(loss(ps, x), leaves), spec)


def trained(rule: Any) -> Any:
    def train(ps: Any, x: Tensor) -> Any:
        state = optim.setup(rule, ps)
        for _ in range(3):
            state, ps = optim.update(state, ps, lt.gradient(loss, ps, x)[0])
        return ps

    return train


def trained_by_torchopt(ps: Any, x: Tensor) -> Any:
    optimizer = torchopt.adam(0.1)
    state = optimizer.init(ps)
    for _ in range(3):
        updates, state = optimizer.update(torch.func.grad(loss)(ps, x), state, inplace=False)
        ps = torchopt.apply_updates(ps, updates, inplace=False)
    return ps


def accelerated(ps: Any, x: Tensor) -> Any:
    layer = Net()
    ts = training.TrainState(layer, ps, {}, optim.Adam(0.1))
    for _ in range(3):
        _, _, _, ts = training.single_train_step(
            lambda model, ps, st, data: (loss(ps, data) + model(data, ps, st)[0], st, {}), x, ts
        )
    return ts.parameters


class Net(lt.Layer):
    """Take the parameters of this file."""

    def initial_parameters(self, key):
        return {
            "weight": torch.ones(3, 2, device=key.device),
            "inner": {"bias": torch.ones(3, device=key.device), "gain": torch.ones((), device=key.device)},
            "none": {},
        }

    def __call__(self, x, ps, st):
        return loss(ps, x), st


def u(ps: Any) -> Any:
    return pytree.tree_map(torch.cos, ps)


F = torch.func
# What comes back with the structure of the parameters.
TREES = {
    "func.grad": lambda ps, x: F.grad(loss)(ps, x),
    "func.grad_and_value": lambda ps, x: F.grad_and_value(loss)(ps, x)[0],
    "func.vjp": lambda ps, x: F.vjp(lambda ps: many(ps, x), ps)[1](torch.ones(3, dtype=torch.float64))[0],
    "func.jvp of grad": lambda ps, x: F.jvp(lambda ps: F.grad(loss)(ps, x), (ps,), (u(ps),))[1],
    "func.grad of jvp": lambda ps, x: F.grad(lambda ps: F.jvp(lambda ps: loss(ps, x), (ps,), (u(ps),))[1])(ps),
    "func.vjp of grad": lambda ps, x: F.vjp(lambda ps: F.grad(loss)(ps, x), ps)[1](u(ps))[0],
    "func.vmap of grad": lambda ps, x: F.vmap(F.grad(loss), (None, 0))(ps, torch.stack([x, 2 * x])),
    "func.jacrev": lambda ps, x: F.jacrev(lambda ps: many(ps, x))(ps),
    "func.jacfwd": lambda ps, x: F.jacfwd(lambda ps: many(ps, x))(ps),
    "func.hessian": lambda ps, x: rows(F.hessian(loss)(ps, x)),
    "gradient": lambda ps, x: lt.gradient(loss, ps, x)[0],
    "gradient forward": lambda ps, x: lt.gradient(loss, ps, x, mode="forward")[0],
    "withgradient": lambda ps, x: lt.withgradient(loss, ps, x)[1][0],
    "pullback": lambda ps, x: lt.pullback(lambda ps: many(ps, x), ps)[1](torch.ones(3, dtype=torch.float64)),
    "pushforward of gradient": lambda ps, x: lt.pushforward(lambda ps: lt.gradient(lambda ps: loss(ps, x), ps), ps)(
        u(ps)
    )[1],
    "hvp": lambda ps, x: lt.hvp(lambda ps: loss(ps, x), ps, u(ps)),
    "hvp forward": lambda ps, x: lt.hvp(lambda ps: loss(ps, x), ps, u(ps), mode="forward"),
    "vector_jacobian_product": lambda ps, x: lt.vector_jacobian_product(
        lambda ps: many(ps, x), ps, torch.ones(3, dtype=torch.float64)
    ),
    "per_sample_gradients": lambda ps, x: lt.per_sample_gradients(
        lambda ps, st, x: loss(ps, x[0]), ps, {}, torch.stack([x, 2 * x])
    ),
    "HesVec": lambda ps, x: lt.HesVec(lambda ps: loss(ps, x), ps) @ u(ps),
    "JacVec": lambda ps, x: lt.JacVec(lambda ps: many(ps, x), ps).T @ torch.ones(3, dtype=torch.float64),
    "autograd": autograd,
    "jit": lambda ps, x: lt.jit(lambda ps, x: lt.gradient(loss, ps, x)[0], backend="replay")(ps, x),
    "Adam": trained(optim.Adam(0.1)),
    "ClipNorm": trained(optim.OptimiserChain(optim.ClipNorm(0.1), optim.Momentum(0.1))),
    "Lion": trained(optim.Lion(0.1)),
    "torchopt": trained_by_torchopt,
    "minimize": lambda ps, x: optim.minimize(
        lambda ps: loss(ps, x) + square(ps), optim.setup(optim.LBFGS(), ps), ps, max_iter=5
    )[1],
    "training": accelerated,
    "copy": lambda ps, x: copy.copy(ps),
    "deepcopy": lambda ps, x: copy.deepcopy(pytree.tree_map(torch.detach, ps)),
    "pickle": lambda ps, x: pickle.loads(pickle.dumps(pytree.tree_map(torch.detach, ps))),
    "stack": lambda ps, x: lt.unstack(lt.stack([ps, ps]))[1],
    "cast": lambda ps, x: lt.f64(lt.f32(ps)),
    "EMA": lambda ps, x: lt.EMA(0.5).parameters(lt.EMA(0.5).update(lt.EMA(0.5).init(ps), u(ps))),
}
# What has no structure.
TENSORS = {
    "call": lambda ps, x: loss(ps, x),
    "func.jvp": lambda ps, x: F.jvp(lambda ps: many(ps, x), (ps,), (u(ps),))[1],
    "pushforward": lambda ps, x: lt.pushforward(lambda ps: many(ps, x), ps)(u(ps))[1],
    "jacobian_vector_product": lambda ps, x: lt.jacobian_vector_product(lambda ps: many(ps, x), ps, u(ps)),
    "by a closure": lambda ps, x: lt.gradient(lambda x: loss(ps, x), x)[0],
    "by both": lambda ps, x: F.grad(lambda x: lt.gradient(loss, ps, x)[1].sum())(x),
}


def rows(hessian: Any) -> Any:
    return lt.ComponentMatrix.from_jacobian(hessian).data if isinstance(hessian, lt.ComponentVector) else None


def square(ps: Any) -> Tensor:
    return sum(leaf.square().sum() for leaf in pytree.tree_leaves(ps))


def plain(tree: Any) -> Tensor:
    """Return all numbers in the order in which they are in the vector."""
    if isinstance(tree, lt.ComponentVector):
        return tree.flat.detach()
    return torch.cat([leaf.detach().flatten() for leaf in pytree.tree_leaves(tree)])


@pytest.fixture
def tree(rng: torch.Generator) -> Any:
    return drawn(STACKED, rng)


@pytest.fixture
def x(rng: torch.Generator) -> Tensor:
    return torch.randn(2, generator=rng, dtype=torch.float64)


BATCHED = ("func.vmap of grad", "per_sample_gradients", "func.jacrev", "func.jacfwd")


@pytest.mark.parametrize("make", GROUPS.values(), ids=GROUPS)
class TestEqual:
    # torch's fake tensors ask each tensor on a tape for its gradient, and torch warns that one should not.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    @pytest.mark.parametrize("name", TREES)
    def test_trees(self, tree, x, make, name):
        function = TREES[name]
        found = function(make(tree), x)
        anew = function(lt.ComponentVector(tree), x)
        assert type(found) is type(anew)
        if isinstance(anew, lt.ComponentVector):
            assert found.axes is anew.axes
        torch.testing.assert_close(plain(found), plain(anew))
        expected = function(tree, x)
        if name in BATCHED:
            expected = {key: leaf.reshape(anew.flat.shape[0], -1) for key, leaf in lt.flatten_names(expected).items()}
            torch.testing.assert_close(plain(found), torch.cat(list(expected.values()), -1))
        elif expected is not None:
            torch.testing.assert_close(plain(found), plain(expected))

    @pytest.mark.parametrize("name", TENSORS)
    def test_tensors(self, tree, x, make, name):
        function = TENSORS[name]
        found = function(make(tree), x)
        torch.testing.assert_close(found, function(lt.ComponentVector(tree), x), check_stride=False)
        torch.testing.assert_close(found, function(tree, x))

    def test_matrices(self, tree, x, make):
        for matrix in (
            lambda ps: lt.jacobian(lambda ps: many(ps, x), ps),
            lambda ps: lt.hessian(lambda ps: loss(ps, x), ps),
            lambda ps: lt.batched_jacobian(lambda xs: F.vmap(many, (None, 0))(ps, xs), torch.stack([x, 2 * x])),
        ):
            found, expected = matrix(make(tree)), matrix(lt.ComponentVector(tree))
            assert type(found) is type(expected)
            torch.testing.assert_close(pytree.tree_leaves(found), pytree.tree_leaves(expected))

    def test_over_batches(self, tree, x, make):
        trees = [tree, pytree.tree_map(lambda leaf: -leaf, tree)]
        for function in (loss, F.grad(loss), F.hessian(loss)):
            found = F.vmap(function, (0, None))(lt.stack([make(tree) for tree in trees]), x)
            expected = F.vmap(function, (0, None))(lt.stack([lt.ComponentVector(tree) for tree in trees]), x)
            torch.testing.assert_close(pytree.tree_leaves(found), pytree.tree_leaves(expected))

    @pytest.mark.parametrize("leaves", [pytree.tree_leaves, optree.tree_leaves, lt.core.tree_leaves])
    def test_the_leaf_is_what_is_read(self, tree, make, leaves):
        """Whether the leaf is asked for before the group is read or after it, also by a group further inside."""
        group = make(tree)
        (leaf,) = leaves(group)
        assert leaf is group.flat and torch.equal(leaf, lt.ComponentVector(tree).flat)
        parts = lt.flatten_names(group)
        assert all(part.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr() for part in parts.values())
        assert leaves(group["inner"])[0] is group["inner"].flat


def on_tape(tree: Any) -> lt.ComponentVector:
    cv = wrapped(tree)
    return lt.ComponentVector.from_flat(cv.flat.clone().requires_grad_(), cv.axes)


class TestOnATape:
    """What lies on the way from the whole to a component can be differentiated by, as the leaves of a dict can."""

    @pytest.mark.parametrize("order", ["leaf first", "read first", "read and asked for without a tape first"])
    @pytest.mark.parametrize("path", ["net", "net.inner"])
    def test_the_derivative_by_a_group(self, tree, x, order, path):
        cv = on_tape(tree)
        if order == "read and asked for without a tape first":
            with torch.no_grad():
                read(cv)
                cv[path].flat  # noqa: B018
        if order == "leaf first":
            leaves = pytree.tree_leaves(cv[path])
        value = loss(cv["net"], x)
        if order != "leaf first":
            leaves = pytree.tree_leaves(cv[path])
        found = torch.autograd.grad(value, [*leaves, cv.flat], allow_unused=True)
        expected = F.grad(loss)(lt.ComponentVector(tree), x)
        torch.testing.assert_close(found[0], (expected if path == "net" else expected["inner"]).flat)
        torch.testing.assert_close(lt.ComponentVector.from_flat(found[1], cv.axes)["net"].flat, expected.flat)

    def test_an_optimizer_of_torch_that_holds_a_group(self, tree, x):
        """The whole is the leaf that is stepped; the group is held over steps in place."""
        cv, reference = on_tape(tree), pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), tree)
        group = cv["net"]
        for ps, params in ((group, [cv.flat]), (reference, pytree.tree_leaves(reference))):
            optimizer = torch.optim.SGD(params, lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                loss(ps, x).backward()
                optimizer.step()
        torch.testing.assert_close(group.flat, plain(reference))

    def test_an_optimizer_of_torch_on_the_tensor_of_a_group(self, tree, x):
        cv, reference = wrapped(tree), pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), tree)
        group = read(cv["net"])
        for ps, params in ((group, [group.flat.requires_grad_()]), (reference, pytree.tree_leaves(reference))):
            optimizer = torch.optim.SGD(params, lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                loss(ps, x).backward()
                optimizer.step()
        torch.testing.assert_close(group.flat.detach(), plain(reference))
        torch.testing.assert_close(cv["net"].flat.detach(), plain(reference))

    def test_a_group_that_was_made_before_the_tape(self, tree, x):
        cv = wrapped(tree)
        group = read(cv["net"])
        cv.flat.requires_grad_()
        loss(group, x).backward()
        torch.testing.assert_close(
            lt.ComponentVector.from_flat(cv.flat.grad, cv.axes)["net"].flat,
            F.grad(loss)(lt.ComponentVector(tree), x).flat,
        )

    def test_in_a_training_step(self, tree, x):
        """The adjoint of a solver asks for the leaves, then differentiates by them what it calls later."""

        def objective(model, ps, st, data):
            leaves = tuple(pytree.tree_leaves(ps["net"]))
            grads = torch.autograd.grad(loss(ps["net"], data), leaves, create_graph=True, allow_unused=True)
            return sum(g.square().sum() for g in grads), st, {}

        for ps in (wrapped(tree), wrapped(tree).to_dict()):
            ts = training.TrainState(Net(), ps, {}, optim.Adam())
            grads, value, _, _ = training.compute_gradients(objective, x, ts)
            expected = F.grad(lambda ps: square(F.grad(loss)(ps, x)))(lt.ComponentVector(tree))
            torch.testing.assert_close(plain(grads["net"]), expected.flat)


@pytest.mark.parametrize("transform", [F.grad, lambda f: lambda ps: lt.gradient(f, ps)], ids=["func", "lt"])
def test_groups_inside_of_transforms(tree, x, transform):
    """An inner derivative by a group of what an outer one differentiates by, in each order of reading."""

    def leaf_first(cv):
        return square(transform(lambda net: loss(net, x))(cv["net"])) + loss(cv["net"], x)

    def read_first(cv):
        return loss(cv["net"], x) + square(transform(lambda net: loss(net, x))(cv["net"]))

    cv = wrapped(tree)
    expected = transform(leaf_first)(cv.to_dict())
    for function in (leaf_first, read_first):
        for ps in (cv, lt.ComponentVector({"outer": cv})["outer"]):
            found = transform(function)(ps)
            torch.testing.assert_close(found.flat, plain(expected))
    batch = torch.stack([cv, 2 * cv])
    found = F.vmap(transform(read_first))(batch)
    torch.testing.assert_close(found.flat[0], plain(expected))


def test_a_group_closed_over_outlives_a_transform(tree, x):
    group = wrapped(tree)["net"]
    expected = loss(group, x)
    for _ in range(2):
        F.grad(lambda x: loss(group, x) + group.flat.sum() * x.sum())(x)
        assert torch.equal(loss(group, x), expected) and torch.equal(group.flat, lt.ComponentVector(tree).flat)


@pytest.mark.slow
# Not a hessian: of a view that is made in the graph torch.compile makes no dual number, and fails by an assertion.
@pytest.mark.parametrize("function", ["func.grad", "func.vmap of grad", "call"])
def test_compiled(tree, x, function):
    groups = [GROUPS["asked before"](tree), GROUPS["group"](tree)]
    function = {**TREES, **TENSORS}[function]
    for group in groups:
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(group, x)
        torch.testing.assert_close(pytree.tree_leaves(found), pytree.tree_leaves(function(group, x)))
    inside = torch.compile(lambda cv, x: F.grad(lambda cv: loss(cv["net"], x) + square(F.grad(loss)(cv["net"], x)))(cv),
                           fullgraph=True, backend="aot_eager")  # fmt: skip
    cv = wrapped(tree)
    expected = F.grad(lambda cv: loss(cv["net"], x) + square(F.grad(loss)(cv["net"], x)))(cv)
    torch.testing.assert_close(inside(cv, x).flat, expected.flat)
