"""WeightNorm and SpectralNorm: the laws, and torch's numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import parametrizations

import luxtorch as lt
from luxtorch import SpectralNorm, WeightNorm


class Cell(lt.Layer):
    """A layer with several weights, a state and a mode of its own."""

    size: int

    def initial_parameters(self, key):
        def draw(name, *shape):
            return lt.random.normal(lt.random.fold_in(key, name), shape)

        return {
            "weight_ih": draw("ih", 3, self.size),
            "weight_hh": draw("hh", 3, 3),
            "bias": draw("bias", 3),
        }

    def initial_states(self, key):
        return {"calls": torch.zeros((), device=key.device), "training": lt.Static(True)}

    def __call__(self, x, ps, st):
        h = torch.tanh(x @ ps["weight_ih"].T + ps["bias"])
        return h @ ps["weight_hh"].T, {**st, "calls": st["calls"] + 1} if st["training"] else st


class Affine(lt.ContainerLayer):
    """A container with a parameter of its own."""

    inner: lt.Layer

    def initial_parameters(self, key):
        return {**super().initial_parameters(key), "weight": lt.random.normal(key, (3,))}

    def __call__(self, x, ps, st):
        y, inner = self.inner(x * ps["weight"], ps["inner"], st["inner"])
        return y, {"inner": inner}


class Temperature(lt.Layer):
    """A layer whose parameter has no dimensions."""

    def initial_parameters(self, key):
        return {"weight": lt.random.normal(key, ())}

    def __call__(self, x, ps, st):
        return x * ps["weight"], st


BOTH = ("weight_ih", "weight_hh")
CONV = lt.Conv((3,), 2, 4)
INSIDE = {
    "Dense": (lt.Dense(3, 2, torch.tanh), {}, (4, 3)),
    "Dense by columns": (lt.Dense(3, 2, bias=False), {"dim": -1}, (4, 3)),
    "Conv": (CONV, {}, (2, 2, 5)),
    "Conv by inputs": (CONV, {"dim": 1}, (2, 2, 5)),
    "several weights": (Cell(2), {"names": BOTH}, (4, 2)),
    "a vector too": (Cell(2), {"names": (*BOTH, "bias")}, (4, 2)),
    "a container": (Affine(lt.Dense(3, 2)), {}, (4, 3)),
    "a wrapper": (lt.RepeatedLayer(lt.Dense(3, 3, torch.tanh), 2), {}, (4, 3)),
}
MOVING = {"gradient": "In train mode finite differences see the singular vectors move, constants of the derivative."}
HELD = {"names": "A wrong name in a container is located in the container, not in the group that holds its parameters."}
FORMS = {
    **{
        f"WeightNorm, {name}": (WeightNorm(inner, **options), [shape], HELD if name == "a container" else {})
        for name, (inner, options, shape) in INSIDE.items()
    },
    **{
        f"SpectralNorm, {name}": (SpectralNorm(inner, **options), [shape], MOVING)
        for name, (inner, options, shape) in INSIDE.items()
    },
    "WeightNorm of the whole": (WeightNorm(CONV, dim=None), [(2, 2, 5)]),
    "WeightNorm of a number": (WeightNorm(Temperature(), dim=None), [(3,)]),
    "WeightNorm, in a Chain": (lt.Chain(lt.Dense(3, 3), WeightNorm(lt.Dense(3, 2)), lt.Dropout(0.5)), [(4, 3)]),
    "SpectralNorm, in a Chain": (
        lt.Chain(lt.Dense(3, 3), SpectralNorm(lt.Dense(3, 2)), lt.Dropout(0.5)),
        [(4, 3)],
        MOVING,
    ),
    "SpectralNorm, many steps": (SpectralNorm(lt.Dense(3, 2), n_power_iterations=3, eps=1e-6), [(4, 3)], MOVING),
    "WeightNorm of SpectralNorm": (WeightNorm(SpectralNorm(lt.Dense(3, 2))), [(4, 3)], MOVING),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


@pytest.mark.parametrize("name", INSIDE)
def test_with_fixed_or_converged_vectors_the_gradient_is_that_of_finite_differences(make_key, name):
    inner, options, shape = INSIDE[name]
    layer, x = SpectralNorm(inner, **options), lt.random.normal(make_key(), shape, dtype=torch.float64)
    ps, st = (lt.f64(tree) for tree in lt.setup(make_key(), layer))
    # Of the two modes the first holds the vectors fixed; in the other they have converged.
    for state in (lt.test_mode(st), layer.refine(ps, st, 3000)):
        torch.autograd.gradcheck(
            lambda *leaves, state=state: layer(x, restored(ps, leaves), state)[0],
            tuple(leaf.requires_grad_() for leaf in lt.core.tree_leaves(lt.core.tree_map(torch.clone, ps))),
            eps=1e-5,
            atol=1e-6,
        )


def restored(tree, leaves):
    return torch.utils._pytree.tree_unflatten(list(leaves), torch.utils._pytree.tree_structure(tree))


# Against torch


MODULES = {
    "Dense": (lt.Dense(3, 4), lambda: torch.nn.Linear(3, 4), (5, 3), 0),
    "Dense by columns": (lt.Dense(3, 4), lambda: torch.nn.Linear(3, 4), (5, 3), 1),
    "Dense, wide": (lt.Dense(6, 1, bias=False), lambda: torch.nn.Linear(6, 1, bias=False), (2, 6), 0),
    "Dense of an empty batch": (lt.Dense(3, 4), lambda: torch.nn.Linear(3, 4), (0, 3), 0),
    "Conv": (lt.Conv((3,), 2, 4), lambda: torch.nn.Conv1d(2, 4, 3), (2, 2, 5), 0),
    "Conv of images": (lt.Conv((2, 3), 2, 4), lambda: torch.nn.Conv2d(2, 4, (2, 3)), (1, 2, 4, 4), 0),
    "ConvTranspose": (lt.ConvTranspose((3,), 2, 4), lambda: torch.nn.ConvTranspose1d(2, 4, 3), (2, 2, 5), 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_weight_norm_has_the_numbers_and_gradients_of_torch(make_key, name, whole, dtype):
    inner, module, shape, dim = MODULES[name]
    dim = None if whole else dim
    layer, reference = WeightNorm(inner, dim=dim), parametrizations.weight_norm(module().to(dtype), dim=dim)
    ps, st = lt.setup(make_key(), layer)
    ps = lt.core.tree_map(lambda leaf: leaf.to(dtype) * 1.5, ps)  # the length is no longer the norm
    ps["normalized"]["weight_g"] = ps["normalized"]["weight_g"] * 0.3
    originals = reference.parametrizations.weight
    leaves = {"weight_g": originals.original0, "weight_v": originals.original1}
    with torch.no_grad():
        for part, leaf in leaves.items():
            assert leaf.shape == ps["normalized"][part].shape
            leaf.copy_(ps["normalized"][part])
        if "bias" in ps["unnormalized"]:
            reference.bias.copy_(ps["unnormalized"]["bias"])
    x = lt.random.normal(make_key(), shape, dtype=dtype)
    given, wanted = (x.clone().requires_grad_() for _ in range(2))
    y, new = layer(x, ps, st)
    assert new == {}
    torch.testing.assert_close(y, reference(x))
    got_x, got = torch.func.grad(lambda x, ps: layer(x, ps, st)[0].cos().sum(), argnums=(0, 1))(given, ps)
    reference(wanted).cos().sum().backward()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(got_x, wanted.grad, **tolerance)
    for part, leaf in leaves.items():
        torch.testing.assert_close(got["normalized"][part], leaf.grad, **tolerance)
    if "bias" in got["unnormalized"]:
        torch.testing.assert_close(got["unnormalized"]["bias"], reference.bias.grad, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_power_iterations", [1, 3])
@pytest.mark.parametrize("name", MODULES)
def test_spectral_norm_has_the_numbers_gradients_and_states_of_torch(make_key, name, n_power_iterations, dtype):
    inner, module, shape, dim = MODULES[name]
    options = {"n_power_iterations": n_power_iterations, "dim": dim}
    layer, reference = SpectralNorm(inner, **options), parametrizations.spectral_norm(module().to(dtype), **options)
    cast = lt.f64 if dtype == torch.float64 else lt.f32
    ps, st = (cast(tree) for tree in lt.setup(make_key(), layer))
    estimate, original = reference.parametrizations.weight[0], reference.parametrizations.weight.original
    assert {st["weight_u"].shape, st["weight_v"].shape} == {estimate._u.shape, estimate._v.shape}
    estimate._u.copy_(st["weight_u"])
    estimate._v.copy_(st["weight_v"])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    for mode in (lt.train_mode, lt.train_mode, lt.test_mode, lt.train_mode):
        st = mode(st)
        reference.train(bool(st["training"]))
        ps = {name: 1.1 * leaf + 0.1 for name, leaf in ps.items()}
        with torch.no_grad():
            original.copy_(ps["weight"])
            if "bias" in ps:
                reference.bias.copy_(ps["bias"])
        x = lt.random.normal(make_key(), shape, dtype=dtype)
        wanted = x.clone().requires_grad_()
        y, new = layer(x, ps, st)
        got_x, got = torch.func.grad(lambda x, ps, st=st: layer(x, ps, st)[0].cos().sum(), argnums=(0, 1))(x, ps)
        reference.zero_grad()
        expected = reference(wanted)
        expected.cos().sum().backward()
        torch.testing.assert_close(y, expected, **tolerance)
        torch.testing.assert_close(got_x, wanted.grad, **tolerance)
        torch.testing.assert_close(got["weight"], original.grad, **tolerance)
        if "bias" in ps:
            torch.testing.assert_close(got["bias"], reference.bias.grad, **tolerance)
        torch.testing.assert_close(new["weight_u"], estimate._u, **tolerance)
        torch.testing.assert_close(new["weight_v"], estimate._v, **tolerance)
        st = new


def test_spectral_norm_divides_a_vector_as_torch_does(make_key):
    layer = SpectralNorm(lt.Scale(3), ("weight", "bias"))
    ps, st = lt.setup(make_key(), layer)
    assert st == {}
    ps = {"weight": torch.tensor([3.0, 0.0, 4.0]), "bias": torch.zeros(3)}
    y, st = layer(torch.ones(3), ps, st)
    assert st == {} and torch.equal(y, torch.tensor([0.6, 0.0, 0.8]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [WeightNorm, SpectralNorm])
@pytest.mark.parametrize("mode", [lt.train_mode, lt.test_mode])
def test_half_precision_is_rounded_double_precision(make_key, kind, mode, dtype):
    layer = kind(lt.Dense(3, 4))
    ps, st = lt.setup(make_key(), layer)
    st = layer.refine(ps, st) if kind is SpectralNorm else st
    ps, st, x = lt.core.tree_map(lambda leaf: leaf.to(dtype), (ps, mode(st), lt.random.normal(make_key(), (2, 3))))
    wide = lt.core.tree_map(lambda leaf: leaf.double(), (x, ps, st))
    y, new = layer(x, ps, st)
    assert y.dtype == dtype and all(leaf.dtype == dtype for leaf in lt.core.tree_leaves(new))
    torch.testing.assert_close(y.double(), layer(*wide)[0], rtol=3e-2, atol=3e-2)


def test_inputs_need_not_be_contiguous(make_key):
    for kind in (WeightNorm, SpectralNorm):
        ps, st = lt.setup(make_key(), kind(lt.Dense(3, 4)))
        x = lt.random.normal(make_key(), (3, 5)).T
        moved = lt.core.tree_map(lambda leaf: leaf.mT.contiguous().mT if leaf.ndim > 1 else leaf, ps)
        torch.testing.assert_close(
            kind(lt.Dense(3, 4))(x, moved, st)[0], kind(lt.Dense(3, 4))(x.contiguous(), ps, st)[0]
        )


# How they start


@pytest.mark.parametrize("name", INSIDE)
def test_weight_norm_starts_as_the_layer_itself(make_key, name):
    inner, options, shape = INSIDE[name]
    key, x = make_key(), lt.random.normal(make_key(), shape)
    y, st = WeightNorm(inner, **options)(x, *lt.setup(key, WeightNorm(inner, **options)))
    expected, expected_st = inner(x, *lt.setup(key, inner))
    assert torch.equal(y, expected) and st == expected_st


def test_the_parameters_are_named_as_in_lux(make_key):
    ps, st = lt.setup(make_key(), WeightNorm(Cell(2), BOTH))
    assert [name for name, _ in lt.core.named_leaves(ps)] == [
        "normalized.weight_ih_g",
        "normalized.weight_ih_v",
        "normalized.weight_hh_g",
        "normalized.weight_hh_v",
        "unnormalized.bias",
    ]
    assert list(st) == ["calls", "training"]
    assert list(lt.setup(make_key(), WeightNorm(lt.Dense(3, 2, bias=False)))[0]["unnormalized"]) == []


@pytest.mark.parametrize("kind", [WeightNorm, SpectralNorm])
def test_setup_of_many_models_is_that_of_a_loop(make_key, kind):
    keys, layer = lt.random.split(make_key(), 3), kind(lt.Dense(3, 2))
    loop = [lt.setup(key, layer) for key in keys]
    stacked = lt.core.tree_map(lambda *leaves: torch.stack(leaves), *loop)
    many = torch.vmap(lambda key: lt.setup(key, layer))(keys)
    torch.testing.assert_close(lt.core.tree_leaves(many), lt.core.tree_leaves(stacked))


def test_a_direction_of_zero_is_refused():
    for layer in (
        WeightNorm(lt.Dense(3, 2), ("weight", "bias")),
        WeightNorm(lt.Dense(3, 2, init_weight=lt.init.zeros), dim=None),
    ):
        with pytest.raises(lt.InputError, match="must have a direction[\\s\\S]*norms are zero[\\s\\S]*another dim"):
            lt.setup(0, layer)
        # Where numbers cannot be read there is nothing to say.
        assert lt.parameter_length(layer) > 0
        torch.vmap(lambda key, layer=layer: lt.setup(key, layer)[0])(lt.random.split(lt.random.key(0), 2))


def test_the_directions_of_spectral_norm_are_unit_vectors_of_the_key(make_key):
    key, layer = make_key(), SpectralNorm(CONV)
    st = lt.setup(key, layer)[1]
    assert st["weight_u"].shape == (4,) and st["weight_v"].shape == (6,)
    torch.testing.assert_close(torch.stack([st["weight_u"].norm(), st["weight_v"].norm()]), torch.ones(2))
    assert not torch.equal(st["weight_u"], lt.setup(make_key(), layer)[1]["weight_u"])


# What they are for


def test_refined_estimates_divide_by_the_largest_singular_value(make_key):
    layer = SpectralNorm(lt.Dense(5, 4, bias=False))
    ps, st = lt.setup(make_key(), layer)
    st = lt.test_mode(layer.refine(ps, st, 2000))
    weight = torch.func.jacrev(lambda x: layer(x, ps, st)[0])(torch.zeros(5))
    torch.testing.assert_close(torch.linalg.matrix_norm(weight, 2), torch.tensor(1.0))
    torch.testing.assert_close(weight, ps["weight"] / torch.linalg.matrix_norm(ps["weight"], 2))


def test_refining_is_what_calls_in_train_mode_do(make_key):
    layer = SpectralNorm(lt.Dense(5, 4))
    ps, st = lt.setup(make_key(), layer)
    refined, called = layer.refine(ps, st), st
    for _ in range(15):
        _, called = layer(torch.ones(5), ps, called)
    assert torch.equal(refined["weight_u"], called["weight_u"]) and torch.equal(refined["weight_v"], called["weight_v"])
    assert layer(torch.ones(5), ps, lt.test_mode(called))[1]["weight_u"] is called["weight_u"]


def test_the_length_alone_decides_the_norm(make_key):
    ps, st = lt.setup(make_key(), WeightNorm(lt.Dense(3, 2, bias=False)))
    g, v = ps["normalized"].values()
    longer = {"normalized": {"weight_g": g, "weight_v": 7 * v}, "unnormalized": {}}
    x = lt.random.normal(make_key(), (4, 3))
    torch.testing.assert_close(*(WeightNorm(lt.Dense(3, 2, bias=False))(x, tree, st)[0] for tree in (ps, longer)))


# Mistakes


@pytest.mark.parametrize("kind", [WeightNorm, SpectralNorm])
def test_names_are_those_of_parameters(kind):
    with pytest.raises(lt.KeyNameError, match="Dense\\(3 -> 2\\)[\\s\\S]*'weigth'[\\s\\S]*Did you mean 'weight'"):
        kind(lt.Dense(3, 2), "weigth")
    with pytest.raises(lt.KeyNameError, match="no parameter 'weight'[\\s\\S]*layer_1[\\s\\S]*Wrap the layer inside"):
        kind(lt.Chain(lt.Dense(3, 2)))
    with pytest.raises(lt.KeyNameError, match="a layer with parameters"):
        kind(torch.tanh)
    with pytest.raises(lt.InputError, match="'inner' must be a tensor[\\s\\S]*'bias'[\\s\\S]*Wrap the layer inside"):
        kind(Affine(lt.Dense(3, 2)), ("weight", "inner"))
    for names in ((), ("weight", "weight")):
        with pytest.raises(lt.InputError, match="different names"):
            kind(lt.Dense(3, 2), names)
    with pytest.raises(lt.InputError, match="must be a layer"):
        kind(lt.Dense)


@pytest.mark.parametrize("kind", [WeightNorm, SpectralNorm])
@pytest.mark.parametrize("dim", [2, -3, 1.0])
def test_the_dimension_is_one_of_the_parameter(kind, dim):
    with pytest.raises(lt.InputError, match=f"\\(2, 3\\), must be from -2 to 1[\\s\\S]*{dim}"):
        kind(lt.Dense(3, 2), dim=dim)
    with pytest.raises(lt.InputError, match="no dimensions"):
        kind(Temperature())


def test_spectral_norm_checks_its_options():
    for steps in (0, -1, 1.0):
        with pytest.raises(lt.InputError, match="n_power_iterations"):
            SpectralNorm(lt.Dense(3, 2), n_power_iterations=steps)
    with pytest.raises(lt.InputError, match="dim must be an integer"):
        SpectralNorm(lt.Dense(3, 2), dim=None)
    with pytest.raises(lt.InputError, match="must not have a state 'weight_u'[\\s\\S]*only once"):
        SpectralNorm(SpectralNorm(lt.Dense(3, 2)))


@pytest.mark.parametrize("kind", [WeightNorm, SpectralNorm])
def test_a_wrong_input_is_explained_with_its_place(make_key, kind):
    model = lt.Chain(lt.NoOpLayer(), kind(lt.Dense(3, 2)))
    ps, st = lt.setup(make_key(), model)
    with pytest.raises(lt.InputError, match="model.layer_2 [\\s\\S]*\\(..., 3\\)[\\s\\S]*\\(4, 5\\)"):
        model(torch.ones(4, 5), ps, st)
    with pytest.raises(lt.DTypeError, match="model.layer_2 [\\s\\S]*float32, as the parameters"):
        model(torch.ones(4, 3, dtype=torch.float64), ps, st)


def test_a_wrong_name_or_shape_is_explained_with_its_place(make_key):
    model = lt.Chain(one=WeightNorm(lt.Dense(3, 2)))
    ps, st = lt.setup(make_key(), model)
    groups = ps["one"]
    wrong = {"one": {**groups, "unnormalized": {"bais": torch.ones(2)}}}
    with pytest.raises(lt.KeyNameError, match="model.one.unnormalized [\\s\\S]*'bais'[\\s\\S]*Did you mean 'bias'"):
        model(torch.ones(4, 3), wrong, st)
    wrong = {"one": {**groups, "normalized": {"weight_g": torch.ones(2, 1)}}}
    with pytest.raises(lt.KeyNameError, match="model.one.normalized [\\s\\S]*lacks the parameter 'weight_v'"):
        model(torch.ones(4, 3), wrong, st)
    wrong = {"one": {**groups, "normalized": {**groups["normalized"], "weight_g": torch.ones(4, 1)}}}
    with pytest.raises(
        lt.InputError, match="model.one [\\s\\S]*'normalized.weight_g'[\\s\\S]*\\(2, 1\\)[\\s\\S]*\\(4, 1\\)"
    ):
        model(torch.ones(4, 3), wrong, st)


def test_models_print_what_is_inside():
    model = lt.Chain(WeightNorm(lt.Dense(3, 3, torch.tanh), dim=None), SpectralNorm(Cell(3), BOTH, eps=0.1))
    lines = repr(model).splitlines()
    assert lines[1].split("#")[0].strip() == "layer_1 = WeightNorm(Dense(3 -> 3, tanh), dim=None),"
    assert lines[1].endswith(
        "13 parameters: normalized.weight_g (), normalized.weight_v (3, 3), unnormalized.bias (3,)"
    )
    assert (
        lines[2].split("#")[0].strip() == "layer_2 = SpectralNorm(Cell(3), names=('weight_ih', 'weight_hh'), eps=0.1),"
    )
    assert repr(WeightNorm(lt.RepeatedLayer(lt.Dense(3, 3), 2))).startswith(
        "WeightNorm(RepeatedLayer(repeats=2, Dense(3 -> 3)))"
    )


def test_equal_wrappers_are_one_value():
    assert (
        WeightNorm(lt.Dense(3, 2), ["weight"]) == WeightNorm(lt.Dense(3, 2), "weight") != SpectralNorm(lt.Dense(3, 2))
    )
    assert hash(WeightNorm(lt.Dense(3, 2), ["weight"])) == hash(WeightNorm(lt.Dense(3, 2)))
