"""The views that a vector keeps: one split for all, and never one that has gone stale."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from luxtorch.autodiff._gradient import differentiate
from luxtorch.components import ComponentVector
from luxtorch.components._views import split_once


class Count(TorchDispatchMode):
    """Count the operations that run."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def read_all(cv):
    return cv.layer_1.weight.sum() + cv.layer_1.bias.sum() + cv["layer_2.inner.weight"].sum() * cv.scale


@pytest.fixture
def parameter(cv):
    """A vector whose flat tensor is a leaf of autograd."""
    return ComponentVector.from_flat(cv.flat.clone().requires_grad_(), cv.axes)


def test_one_split_for_all(cv):
    with Count() as count:
        for _ in range(3):
            read_all(cv)
    assert count.operations.count("split_with_sizes") == 1


@pytest.mark.parametrize(("prepare", "number"), [(split_once, 1), (lambda parameter: parameter, 4)])
def test_the_backward_is_one_concatenation(parameter, prepare, number):
    """For each group on a tape, as one may differentiate by it; in all, where only the whole is differentiated by."""
    value = read_all(prepare(parameter))
    with Count() as count:
        (g,) = torch.autograd.grad(value, parameter.flat)
    assert count.operations.count("cat") == number
    assert "slice_backward" not in count.operations and g.shape == (13,)


def test_the_backward_of_a_transform_is_one_concatenation(cv):
    with Count() as count:
        grad(read_all)(cv)
    assert count.operations.count("cat") == 1


def test_the_backward_of_a_training_step_is_one_concatenation(cv):
    with Count() as count:
        differentiate(lambda ps: (read_all(ps), None), cv, differentiable=False)
    assert count.operations.count("cat") == 1


def test_reading_without_recording_does_not_hide_the_gradient(parameter):
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not read_all(parameter).requires_grad
        (g,) = torch.autograd.grad(read_all(parameter), parameter.flat)
        assert torch.equal(g[:9], torch.ones(9))


def test_recording_after_reading(cv):
    read_all(cv)
    cv.flat.requires_grad_()
    assert read_all(cv).requires_grad


def test_training_in_place(parameter, cv, tree, x, loss):
    """As torch.optim does it: the views of before a step are not those of after it."""
    reference = {name: leaf.clone().requires_grad_() for name, leaf in flatten(tree).items()}
    for params, ps in (([parameter.flat], parameter), (list(reference.values()), unflatten(reference))):
        optimizer = torch.optim.SGD(params, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss(ps, x).backward()
            optimizer.step()
    expected = torch.cat([leaf.reshape(-1) for leaf in reference.values()])
    torch.testing.assert_close(parameter.flat, expected)


def flatten(tree, prefix=""):
    result = {}
    for name, value in tree.items():
        result |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result


def unflatten(leaves):
    tree = {"relu": {}}
    for name, leaf in leaves.items():
        *groups, last = name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = leaf
    return tree


def test_two_backwards_through_the_same_views(parameter):
    grads = [torch.autograd.grad(read_all(parameter), parameter.flat)[0] for _ in range(2)]
    assert torch.equal(*grads)


def is_wrapped(tensor):
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: grad(f)(x),
        lambda f, x: jvp(f, (x,), (x,)),
        lambda f, x: vmap(f)(x),
        lambda f, x: grad(lambda x: grad(f)(x).sum())(x),
        lambda f, x: grad(lambda x: vmap(f)(x).sum())(x),
    ],
)
def test_no_view_outlives_a_transform(cv, transform):
    def closure(x):
        return (read_all(cv) * x).sum()

    before = read_all(cv + 0)
    transform(closure, torch.ones(3))
    value = read_all(cv)
    assert not is_wrapped(value) and not is_wrapped(cv.layer_1.weight)
    assert torch.equal(value, before)
    transform(closure, torch.ones(3))
    assert torch.equal(read_all(cv), before)


def test_the_object_inside_a_transform_is_another(cv):
    seen = []

    def f(ps):
        seen.append(ps)
        return read_all(ps)

    read_all(cv)
    outside = cv.layer_1.weight
    grad(f)(cv)
    assert seen[0] is not cv and cv.layer_1.weight is outside and not is_wrapped(outside)


def test_views_of_an_inner_transform_carry_the_outer_gradient(cv, tree, x, loss):
    """What is first read two levels deep is right one level up."""

    def nested(ps):
        return grad(loss, argnums=1)(ps, x).sum() + loss(ps, x)

    def closed(ps):
        inner = grad(lambda x: loss(ps, x))(x)
        return inner.sum() + loss(ps, x)

    torch.testing.assert_close(grad(closed)(cv).flat, grad(nested)(cv).flat)
    torch.testing.assert_close(grad(closed)(cv).to_dict(), grad(closed)(tree))


def test_a_vector_in_a_graph_of_make_fx(cv, x, loss):
    graph = make_fx(grad(loss))(cv, x)
    assert sum("split_with_sizes" in str(node.target) for node in graph.graph.nodes) == 1
    make_fx(lambda x: loss(cv, x))(x)
    torch.testing.assert_close(loss(cv, x), loss(cv.to_dict(), x))


def test_views_cost_no_memory_and_no_cycles(cv):
    read_all(cv)
    assert cv.layer_1.weight.untyped_storage().data_ptr() == cv.flat.untyped_storage().data_ptr()
    gc.collect()
    gc.disable()
    try:
        flat = weakref.ref(cv.flat)
        group = weakref.ref(cv.layer_1)
        vector = ComponentVector.from_flat(torch.ones(13), cv.axes)
        read_all(vector)
        alive = weakref.ref(vector.flat)
        del vector
        assert alive() is None and flat() is not None and group() is not None
    finally:
        gc.enable()
