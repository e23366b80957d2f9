"""A ComponentVector under the transforms of torch.func, against a dict of the same tensors."""

from __future__ import annotations

import optree
import pytest
import torch
import torch.utils._pytree as pytree
import torchopt
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from luxtorch.components import ComponentMatrix, ComponentVector


def ravel(tree):
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def assert_close(result, expected):
    """Compare a vector with a tree, or tensors, or tuples of these."""
    if isinstance(result, tuple):
        for one, other in zip(result, expected, strict=True):
            assert_close(one, other)
    elif isinstance(result, ComponentVector):
        torch.testing.assert_close(result.flat, ravel(expected))
    else:
        torch.testing.assert_close(result, expected)


FUNCTIONS = {
    "grad": lambda f, ps, x: grad(f)(ps, x),
    "grad and value": lambda f, ps, x: grad_and_value(f)(ps, x),
    "grad with aux": lambda f, ps, x: grad(lambda ps: (f(ps, x), ps), has_aux=True)(ps),
    "grad of both": lambda f, ps, x: grad(f, argnums=(0, 1))(ps, x),
    "jvp": lambda f, ps, x: jvp(lambda ps: f(ps, x), (ps,), (ps,)),
    "vjp": lambda f, ps, x: vjp(lambda ps: f(ps, x), ps)[1](torch.tensor(2.0)),
    "linearize": lambda f, ps, x: linearize(lambda ps: f(ps, x), ps)[1](ps),
    "hvp": lambda f, ps, x: jvp(lambda ps: grad(f)(ps, x), (ps,), (ps,)),
    "grad of grad": lambda f, ps, x: grad(lambda ps: sum((p**2).sum() for p in pytree.tree_leaves(grad(f)(ps, x))))(ps),
    "inner derivative": lambda f, ps, x: grad(lambda ps: grad(f, argnums=1)(ps, x).square().sum() + f(ps, x))(ps),
    "inner jvp": lambda f, ps, x: grad(lambda ps: jvp(lambda x: f(ps, x), (x,), (x,))[1] + f(ps, x))(ps),
    "through an update": lambda f, ps, x: grad(
        lambda ps: f(pytree.tree_map(lambda p, g: p - 0.1 * g, ps, grad(f)(ps, x)), x)
    )(ps),
    "closed over": lambda f, ps, x: grad(lambda x: f(ps, x))(x),
    "vmap over data": lambda f, ps, x: vmap(f, (None, 0))(ps, torch.stack([x, 2 * x])),
}


# torch.func.linearize warns about the constants of any function, that of a dict too.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_equal_to_a_dict(cv, tree, x, loss, function):
    assert_close(function(loss, cv, x), function(loss, tree, x))


def test_over_models(cv, x, loss):
    models = torch.stack([cv, 2 * cv, -cv])
    singles = [ComponentVector.from_flat(flat, cv.axes) for flat in models.flat]
    torch.testing.assert_close(vmap(loss, (0, None))(models, x), torch.stack([loss(ps, x) for ps in singles]))
    grads = vmap(grad(loss), (0, None))(models, x)
    assert grads.axes is cv.axes
    torch.testing.assert_close(grads.flat, torch.stack([grad(loss)(ps, x).flat for ps in singles]))
    tree = vmap(grad(loss), (0, None))(models.to_dict(), x)
    torch.testing.assert_close(grads.layer_1.weight, tree["layer_1"]["weight"])


def test_vmap_dims(cv, x, loss):
    models = torch.stack([cv, 2 * cv])
    expected = vmap(loss, (0, None))(models, x)
    sideways = pytree.tree_map(lambda flat: flat.T, models)
    for dims, vectors in ((1, sideways), (pytree.tree_map(lambda flat: 1, models), sideways), (0, models)):
        torch.testing.assert_close(vmap(loss, (dims, None))(vectors, x), expected)
    nested = vmap(vmap(loss, (0, None)), (None, 0))(models, torch.stack([x, 2 * x, x]))
    assert nested.shape == (3, 2)
    assert vmap(lambda ps: 2 * ps)(models).axes is cv.axes


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_jacobians_have_the_names_last(cv, tree, x, jacobian):
    def hidden(ps):
        return ps["layer_1"]["weight"] @ x * ps["scale"]

    result = jacobian(hidden)(cv)
    assert type(result) is ComponentVector and result.shape == (3, 13) and result.axes is cv.axes
    expected = jacobian(hidden)(tree)
    assert_close(result.layer_1.weight, expected["layer_1"]["weight"])
    assert_close(result.scale, expected["scale"])


@pytest.mark.parametrize("second", [hessian, lambda f: jacrev(grad(f)), lambda f: jacrev(jacrev(f))])
def test_hessians_are_vectors_of_vectors(cv, tree, x, loss, second):
    result = second(lambda ps: loss(ps, x))(cv)
    assert type(result) is type(result.flat) is ComponentVector and result.flat.shape == (13, 13)
    expected = second(lambda ps: loss(ps, x))(tree)
    H = ComponentMatrix.from_jacobian(result)
    block = expected["layer_1"]["weight"]["layer_2"]["inner"]["weight"]
    assert_close(H["layer_1.weight", "layer_2.inner.weight"].reshape(3, 2, 3), block)
    with pytest.raises(TypeError, match=r"(.|\n)*ComponentMatrix.from_jacobian"):
        result.layer_1  # noqa: B018


def test_jacobians_of_a_vector_are_read_as_matrices(cv, x):
    result = jacfwd(lambda x: cv * x.sum())(x)
    assert ComponentMatrix.from_jacobian(result).row_axes is cv.axes
    with pytest.raises(ValueError, match=r"(.|\n)*ComponentMatrix.from_jacobian"):
        result.layer_1  # noqa: B018


def test_a_gradient_is_a_vector_of_the_same_axes(cv, x, loss):
    grads, aux = grad(lambda ps: (loss(ps, x), 2 * ps), has_aux=True)(cv)
    for result in (grads, aux):
        assert type(result) is ComponentVector and result.axes is cv.axes
        assert not result.requires_grad and result.layer_1.weight.grad_fn is None


def test_building_one_is_differentiable(tree, cv, x, loss):
    direct = grad(lambda tree: loss(tree, x))(tree)
    through = grad(lambda tree: loss(ComponentVector(tree), x))(tree)
    pytree.tree_map(torch.testing.assert_close, through, direct)
    flat = grad(lambda flat: loss(ComponentVector.from_flat(flat, cv.axes), x))(cv.flat)
    torch.testing.assert_close(flat, ravel(direct))


def test_autograd(cv, tree, x, loss):
    flat = cv.flat.clone().requires_grad_()
    loss(ComponentVector.from_flat(flat, cv.axes), x).backward()
    torch.testing.assert_close(flat.grad, ravel(grad(loss)(tree, x)))


class TestTrees:
    def test_one_leaf(self, cv):
        for leaves in (pytree.tree_leaves(cv), optree.tree_leaves(cv), optree.tree_leaves({"ps": cv})):
            assert len(leaves) == 1 and leaves[0] is cv.flat

    @pytest.mark.parametrize("library", [pytree, optree])
    @pytest.mark.parametrize("child", [None, 3, "x", object(), torch.zeros(2, 2), [1, 2]])
    def test_any_child(self, cv, library, child):
        leaves, spec = library.tree_flatten(cv)
        again = library.tree_unflatten([child], spec) if library is pytree else library.tree_unflatten(spec, [child])
        assert again.flat is child and again.axes is cv.axes
        repr(again)

    def test_equal_structures(self, cv, tree):
        spec = pytree.tree_structure(cv)
        assert spec == pytree.tree_structure(2 * cv) == pytree.tree_structure(ComponentVector(tree))
        assert hash(spec) == hash(pytree.tree_structure(ComponentVector(tree)))
        assert spec != pytree.tree_structure(cv[["scale", "layer_1", "relu", "layer_2"]])
        assert optree.tree_structure(cv) == optree.tree_structure(2 * cv)

    def test_of_a_group(self, cv):
        doubled = pytree.tree_map(lambda flat: 2 * flat, cv["layer_1"])
        assert torch.equal(doubled.weight, 2 * cv.layer_1.weight) and doubled.flat.shape == (9,)


@pytest.mark.parametrize(
    "optimizer",
    [torchopt.sgd(0.1, momentum=0.9), torchopt.adam(0.1), torchopt.rmsprop(0.1)],
    ids=["sgd", "adam", "rms"],
)
def test_torchopt(cv, tree, x, loss, optimizer):
    def train(ps):
        state = optimizer.init(ps)
        for _ in range(4):
            updates, state = optimizer.update(grad(loss)(ps, x), state, params=ps, inplace=False)
            ps = torchopt.apply_updates(ps, updates, inplace=False)
        return ps

    trained = train(cv)
    assert type(trained) is ComponentVector and trained.axes is cv.axes
    assert_close(trained, train(tree))
