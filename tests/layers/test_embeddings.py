"""Embedding, sinusoidal and rotary positions: the laws, torch's numbers, and formulas of another kind."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

import luxtorch as lt
from luxtorch import Embedding, SinusoidalPositionalEmbedding
from luxtorch.layers._embedding import (
    RotaryPositionalEmbedding,
    apply_rotary_embedding,
    compute_rotary_embedding_params,
)

TOKENS = torch.tensor([[0, 3, 1], [4, 4, 0]])
PLACES = torch.tensor([[2, 0, 1], [5, 3, 3]])
ROTATED = torch.linspace(-1, 1, 48).reshape(2, 2, 3, 4)

FORMS = {
    "Embedding": (Embedding(5, 2), [TOKENS, TOKENS[0].int(), torch.tensor(3)]),
    "Embedding of two tables": (Embedding((5, 6), 2), [(TOKENS, PLACES), (TOKENS, torch.tensor(5))]),
    "Embedding with padding that is not met": (Embedding(5, 2, padding_idx=2), [TOKENS]),
    "Embedding with padding": (
        Embedding(5, 2, padding_idx=0),
        [TOKENS],
        {"gradient": "The derivative by the padding row is zero by definition; finite differences do not know."},
    ),
    "Sinusoidal": (SinusoidalPositionalEmbedding(4), [torch.rand(2, 3), torch.tensor(1.5), PLACES]),
    "Sinusoidal, all options": (
        SinusoidalPositionalEmbedding(6, min_freq=0.1, max_freq=2.0, scale=3.0, full_turns=True),
        [torch.rand(3)],
    ),
    "Rotary": (RotaryPositionalEmbedding(4, max_sequence_length=8), [ROTATED, ROTATED[0], ROTATED[0, 0]]),
    "Rotary at positions": (
        RotaryPositionalEmbedding(4, max_sequence_length=8, base=10.0),
        [(ROTATED, PLACES), (ROTATED, PLACES[0])],
    ),
    "Rotary, interleaved": (
        RotaryPositionalEmbedding(4, max_sequence_length=8, interleaved=True),
        [ROTATED, (ROTATED, PLACES)],
    ),
    "Positions": (lt.Positions(), [TOKENS, TOKENS[0]]),
    "Positions that count": (lt.Positions(-2, counts=True), [TOKENS]),
}
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


# Embedding


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("padding_idx", [None, 0, 2, -1])
def test_embedding_has_the_numbers_and_gradients_of_torch(make_key, padding_idx, dtype, shape):
    reference = torch.nn.Embedding(5, 3, padding_idx=padding_idx, dtype=dtype)
    layer, ps = Embedding(5, 3, padding_idx=padding_idx), {"weight": reference.weight.detach()}
    x = lt.random.randint(make_key(), shape, 0, 5)
    y, st = layer(x, ps, {})
    assert st == {} and torch.equal(y, reference(x))
    reference(x).cos().sum().backward()
    got = torch.func.grad(lambda ps: layer(x, ps, {})[0].cos().sum())(ps)["weight"]
    torch.testing.assert_close(got, reference.weight.grad)
    leaf = ps["weight"].clone().requires_grad_()
    layer(x, {"weight": leaf}, {})[0].cos().sum().backward()
    torch.testing.assert_close(leaf.grad, reference.weight.grad)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_indices_may_be_integers_of_any_dtype(make_key, dtype):
    for layer, x in ((Embedding(5, 2), TOKENS), (Embedding((5, 6), 2), (TOKENS, PLACES))):
        ps, st = lt.setup(make_key(), layer)
        cast = tuple(t.to(dtype) for t in x) if isinstance(x, tuple) else x.to(dtype)
        assert torch.equal(layer(cast, ps, st)[0], layer(x, ps, st)[0])


def test_indices_need_not_be_contiguous(make_key):
    ps, st = lt.setup(make_key(), Embedding(5, 2))
    assert torch.equal(Embedding(5, 2)(TOKENS.T, ps, st)[0], ps["weight"][TOKENS.T])


def test_a_table_of_two_dimensions_is_looked_up_by_pairs(make_key):
    layer = Embedding((5, 6, 2), 3)
    ps, st = lt.setup(make_key(), layer)
    third = torch.tensor(1)
    y, _ = layer((TOKENS, PLACES, third), ps, st)
    assert torch.equal(y, ps["weight"][TOKENS, PLACES, third])


def test_the_padding_row_starts_at_zero_and_the_others_as_without(make_key):
    key = make_key()
    plain, padded = lt.setup(key, Embedding(5, 3))[0]["weight"], lt.setup(key, Embedding(5, 3, padding_idx=-2))[0]
    expected = plain.clone()
    expected[3] = 0
    assert torch.equal(padded["weight"], expected)
    assert 0.5 < lt.setup(key, Embedding(100, 100))[0]["weight"].std() < 1.5


def derivatives(layer, ps):
    """The derivative by the table, in every mode."""

    def loss(ps, x=TOKENS):
        return layer(x, ps, {})[0].square().sum()

    def vmapped(x):
        return torch.vmap(lambda p: torch.func.grad(loss)({"weight": p}, x)["weight"])(ps["weight"][None])[0]

    forward = torch.func.jacfwd(lambda p: loss({"weight": p}))
    return {
        "reverse": torch.func.grad(loss)(ps)["weight"],
        "forward": forward(ps["weight"]),
        "vmap over models": vmapped(TOKENS),
        "vmap over inputs": torch.vmap(vmapped)(TOKENS).sum(0),
        "compiled": torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(ps)["weight"],
        "second order": torch.func.hessian(lambda p: loss({"weight": p}))(ps["weight"]).sum((0, 1)),
        "reverse over reverse": torch.func.jacrev(torch.func.grad(lambda p: loss({"weight": p})))(ps["weight"]).sum(
            (0, 1)
        ),
    }


def test_the_padding_row_gets_no_gradient_under_any_transform(make_key):
    ps = {"weight": lt.random.normal(make_key(), (5, 2), mean=1.0)}  # also if it is not zero, as in torch
    padded, plain = derivatives(Embedding(5, 2, padding_idx=4), ps), derivatives(Embedding(5, 2), ps)
    for mode, gradient in padded.items():
        expected = plain[mode].clone()
        assert (expected[4] != 0).all(), mode
        expected[4] = 0
        torch.testing.assert_close(gradient, expected)


def test_setup_of_many_models_draws_what_a_loop_draws(make_key):
    keys, layer = lt.random.split(make_key(), 3), Embedding(4, 2, padding_idx=1)
    many = torch.vmap(lambda key: lt.setup(key, layer)[0]["weight"])(keys)
    assert torch.equal(many, torch.stack([lt.setup(key, layer)[0]["weight"] for key in keys]))


@pytest.mark.parametrize("layer", [Embedding(5, 2), Embedding((5, 6), 2)])
@pytest.mark.parametrize("wrong", [5, -1, 100])
def test_an_index_out_of_range_is_explained(layer, wrong):
    model = lt.Chain(lt.NoOpLayer(), layer)
    ps, st = lt.setup(0, model)
    x = torch.tensor([0, wrong])
    x = x if isinstance(layer.num_embeddings, int) else (x, torch.tensor(0))
    low, high = sorted((0, wrong))
    with pytest.raises(
        lt.InputError, match=f"model.layer_2[\\s\\S]*out of range[\\s\\S]*0 to 4[\\s\\S]*{low} to {high}[\\s\\S]*from 0"
    ):
        model(x, ps, st)
    with pytest.raises(lt.InputError, match="out of range"):
        torch.vmap(lambda x: model(x, ps, st)[0], in_dims=0 if isinstance(x, torch.Tensor) else ((0, None),))(x)


@pytest.mark.parametrize(("first", "second"), [(0, 6), (1, -1), (0, 7)])
def test_an_index_never_ends_up_in_the_row_of_another(first, second):
    layer = Embedding((5, 6), 2)
    ps, st = lt.setup(0, layer)
    with pytest.raises(lt.InputError, match="out of range"):
        layer((torch.tensor(first), torch.tensor(second)), ps, st)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool])
@pytest.mark.parametrize("layer", [Embedding(5, 2), Embedding((5, 6), 2)])
def test_indices_are_integers(layer, dtype):
    ps, st = lt.setup(0, layer)
    x = torch.ones(3, dtype=dtype)
    with pytest.raises(lt.DTypeError, match=f"integers[\\s\\S]*{dtype}[\\s\\S]*long"):
        layer(x if isinstance(layer.num_embeddings, int) else (x, x), ps, st)
    with pytest.raises(lt.DTypeError, match="type int[\\s\\S]*torch.tensor"):
        layer(3 if isinstance(layer.num_embeddings, int) else (3, 3), ps, st)


@pytest.mark.parametrize(("layer", "x"), [(Embedding(5, 2), TOKENS), (Embedding((5, 6), 2), (TOKENS, PLACES))])
def test_parameters_of_many_models_are_explained(layer, x):
    ps, st = lt.setup(0, layer)
    with pytest.raises(lt.InputError, match="'weight' must have the layer's shape[\\s\\S]*torch.vmap"):
        layer(x, {"weight": torch.stack([ps["weight"]] * 3)}, st)


@pytest.mark.parametrize(
    ("x", "got"),
    [(TOKENS, "got: +a torch.int64"), ((TOKENS,), "got: +\\(a torch"), ((TOKENS,) * 3, "tensor.*, a torch.*, a torch")],
)
def test_a_table_of_two_dimensions_wants_two_indices(x, got):
    ps, st = lt.setup(0, Embedding((5, 6), 2))
    with pytest.raises(lt.InputError, match=f"a tuple of 2 tensors[\\s\\S]*{got}"):
        Embedding((5, 6), 2)(x, ps, st)


@pytest.mark.parametrize("sizes", [(0, 2), (2, 0), (2.0, 3), ((), 3), ((2, 0), 3), (-1, 3)])
def test_sizes_are_positive_whole_numbers(sizes):
    with pytest.raises(lt.InputError, match="at least 1"):
        Embedding(*sizes)


@pytest.mark.parametrize("padding_idx", [5, -6, 1.0])
def test_the_padding_row_is_in_the_table(padding_idx):
    with pytest.raises(lt.InputError, match="from -5 to 4"):
        Embedding(5, 2, padding_idx=padding_idx)
    with pytest.raises(lt.InputError, match="must be None"):
        Embedding((5, 5), 2, padding_idx=padding_idx)


def test_embedding_is_a_value_and_prints_its_sizes():
    assert Embedding([5, 6], 2) == Embedding((5, 6), 2) and hash(Embedding([5, 6], 2)) == hash(Embedding((5, 6), 2))
    assert repr(Embedding(5, 2, padding_idx=-1)).startswith("Embedding(5 -> 2, padding_idx=4)    # 10 parameters")
    assert repr(Embedding((5, 6), 2)).startswith("Embedding((5, 6) -> 2)    # 60 parameters: weight (5, 6, 2)")


# SinusoidalPositionalEmbedding


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 4)])
@pytest.mark.parametrize("options", [{}, {"min_freq": 0.5, "max_freq": 3.0, "scale": 2.0, "full_turns": True}])
def test_sinusoidal_is_the_formula(make_key, options, shape, dtype):
    layer = SinusoidalPositionalEmbedding(6, **options)
    _, st = lt.setup(0, layer)
    x = lt.random.randint(make_key(), shape, 0, 20).to(dtype)
    y, new = layer(x, {}, st)
    assert new is st and y.dtype == (dtype if dtype.is_floating_point else torch.float32) and y.shape == (*shape, 6)
    logs = torch.linspace(math.log(layer.max_freq), math.log(layer.min_freq), 3, dtype=torch.float64)
    angles = x.double()[..., None] * logs.exp() * (2 * math.pi if layer.full_turns else 1)
    waves = torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([waves.imag, waves.real], -1) * (layer.scale or math.sqrt(2 / 6))
    tolerance = 2e-2 if dtype in HALVES else 1e-4
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_sinusoidal_vectors_have_length_one():
    y, _ = SinusoidalPositionalEmbedding(8)(torch.arange(50), {}, lt.setup(0, SinusoidalPositionalEmbedding(8))[1])
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(50))


def test_one_pair_has_the_highest_frequency():
    assert lt.setup(0, SinusoidalPositionalEmbedding(2, max_freq=0.5))[1]["sigmas"].tolist() == [0.5]


def test_sinusoidal_checks_its_arguments():
    for size in (0, 3, -2, 2.0):
        with pytest.raises(lt.InputError, match="even number"):
            SinusoidalPositionalEmbedding(size)
    for options in ({"min_freq": 0.0}, {"max_freq": -1.0}):
        with pytest.raises(lt.InputError, match="must be above 0"):
            SinusoidalPositionalEmbedding(4, **options)
    _, st = lt.setup(0, SinusoidalPositionalEmbedding(4))
    for x in (torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.complex64), [1, 2]):
        with pytest.raises(lt.DTypeError, match="Positions must be a tensor of real numbers"):
            SinusoidalPositionalEmbedding(4)(x, {}, st)


# Rotary embedding


def rotated_as_complex_numbers(x, positions, base, interleaved):
    """Multiply complex numbers by powers of a unit: the definition in the paper."""
    half = x.shape[-1] // 2
    pairs = x.unflatten(-1, (half, 2)) if interleaved else x.unflatten(-1, (2, half)).mT
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[..., None] * frequencies
    turned = torch.complex(*pairs.double().unbind(-1)) * torch.polar(torch.ones_like(angles), angles)
    parts = torch.view_as_real(turned)
    return parts.flatten(-2) if interleaved else parts.mT.flatten(-2)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 1, 1, 2), (0, 3, 5, 8), (2, 3, 0, 8), (5, 4), (2, 1, 3, 5, 4)])
def test_rotary_is_a_product_of_complex_numbers(make_key, shape, dtype, interleaved):
    layer = RotaryPositionalEmbedding(shape[-1], max_sequence_length=6, base=50.0, interleaved=interleaved)
    _, st = lt.setup(0, layer)
    x = lt.random.normal(make_key(), shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))
    y, new = layer(x, {}, st)
    assert new is st and y.dtype == dtype
    expected = rotated_as_complex_numbers(x, torch.arange(shape[-2]), 50.0, interleaved)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-6)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("positions", [PLACES, PLACES[:1], PLACES[1], PLACES[1].int()])
def test_rotary_takes_positions(make_key, positions, interleaved):
    layer = RotaryPositionalEmbedding(4, max_sequence_length=6, interleaved=interleaved)
    _, st = lt.setup(0, layer)
    x = lt.random.normal(make_key(), (2, 5, 3, 4))
    y, _ = layer((x, positions), {}, st)
    angles = positions[:, None] if positions.ndim == 2 else positions
    torch.testing.assert_close(y.double(), rotated_as_complex_numbers(x, angles, 10_000.0, interleaved))
    moved = apply_rotary_embedding(x.transpose(1, 2), **st, positions=positions, seq_dim=1, interleaved=interleaved)
    assert torch.equal(moved.transpose(1, 2), y)


def test_the_length_may_come_first(make_key):
    x, caches = lt.random.normal(make_key(), (2, 3, 4)), compute_rotary_embedding_params(4, 5)
    y = apply_rotary_embedding(x, **caches, seq_dim=0)
    assert torch.equal(y.transpose(0, 1), apply_rotary_embedding(x.transpose(0, 1), **caches))


@given(
    m=some.integers(0, 90),
    n=some.integers(0, 90),
    shift=some.integers(0, 37),
    dim=some.sampled_from([2, 6, 16]),
    interleaved=some.booleans(),
)
def test_products_depend_on_the_difference_of_positions_alone(m, n, shift, dim, interleaved):
    caches = compute_rotary_embedding_params(dim, 128, base=100.0, dtype=torch.float64)
    query, key = lt.random.normal(lt.random.key(m * 100 + n), (2, 1, dim), dtype=torch.float64)

    def product(m, n):
        turned = (
            apply_rotary_embedding(x, **caches, positions=torch.tensor([i]), interleaved=interleaved)
            for x, i in ((query, m), (key, n))
        )
        return torch.mul(*turned).sum()

    torch.testing.assert_close(product(m, n), product(m + shift, n + shift))
    torch.testing.assert_close(product(m, m), (query * key).sum())


def test_late_positions_are_as_exact_as_early_ones():
    caches = compute_rotary_embedding_params(4, 5000)
    angles = torch.arange(5000, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.01], dtype=torch.float64)
    assert torch.equal(caches["cos_cache"], angles.cos().float()) and torch.equal(
        caches["sin_cache"], angles.sin().float()
    )


def test_caches_come_in_any_dtype_and_place():
    caches = compute_rotary_embedding_params(4, 3, dtype=torch.float64, device="meta")
    assert {(c.dtype, c.device.type, tuple(c.shape)) for c in caches.values()} == {(torch.float64, "meta", (3, 2))}


def test_a_sequence_too_long_is_explained():
    model = lt.Chain(RotaryPositionalEmbedding(4, max_sequence_length=2))
    _, st = lt.setup(0, model)
    x = torch.ones(1, 1, 3, 4)
    with pytest.raises(lt.InputError, match="model.layer_1[\\s\\S]*max_sequence_length=2[\\s\\S]*sequence of 3"):
        model(x, {"layer_1": {}}, st)
    for wrong in (2, -1):
        with pytest.raises(lt.InputError, match="max_sequence_length=2[\\s\\S]*larger max_sequence_length"):
            model((x, torch.tensor([0, 1, wrong])), {"layer_1": {}}, st)


@pytest.mark.parametrize("shape", [(4,), (1, 3, 6), (1, 3, 2)])
def test_the_width_is_that_of_the_head(shape):
    _, st = lt.setup(0, RotaryPositionalEmbedding(4))
    with pytest.raises(lt.InputError, match="length, 4[\\s\\S]*one head"):
        RotaryPositionalEmbedding(4)(torch.ones(shape), {}, st)


@pytest.mark.parametrize("shape", [(), (2,), (3, 3), (4, 3), (2, 2), (2, 1, 3)])
def test_positions_fit_the_input(shape):
    _, st = lt.setup(0, RotaryPositionalEmbedding(4))
    x, positions = torch.ones(2, 1, 3, 4), torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(lt.InputError, match="\\(3,\\) or \\(2, 3\\)"):
        RotaryPositionalEmbedding(4)((x, positions), {}, st)
    with pytest.raises(lt.DTypeError, match="integers"):
        RotaryPositionalEmbedding(4)((x, torch.zeros(3)), {}, st)


@pytest.mark.parametrize("options", [{"dim": 3}, {"dim": 0}, {"max_sequence_length": 0}, {"base": -1.0}])
def test_rotary_checks_its_arguments(options):
    with pytest.raises(lt.InputError, match="even number|at least 1|above 0"):
        RotaryPositionalEmbedding(**{"dim": 4, **options})


def test_position_layers_print_their_arguments():
    assert repr(RotaryPositionalEmbedding(4, base=100.0)).startswith("RotaryPositionalEmbedding(4, base=100.0)")
    assert repr(SinusoidalPositionalEmbedding(4)).startswith("SinusoidalPositionalEmbedding(4)    # 2 states")


# Positions


@pytest.mark.parametrize("counts", [False, True])
def test_positions_begin_at_zero_or_go_on(counts):
    layer = lt.Positions(counts=counts)
    ps, st = lt.setup(0, layer)
    found = []
    for length in (3, 0, 2):
        y, st = layer(torch.zeros(2, length), ps, st)
        found.append(y.tolist())
    assert found == ([[0, 1, 2], [], [3, 4]] if counts else [[0, 1, 2], [], [0, 1]])


def test_positions_need_the_dimension():
    with pytest.raises(lt.InputError, match="the dimension -2"):
        lt.Positions(-2)(torch.zeros(3), {}, {})
