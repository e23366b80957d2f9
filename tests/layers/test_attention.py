"""Attention: the laws, torch's numbers, and queries that may attend to nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import luxtorch as lt
from luxtorch import MultiHeadAttention, scaled_dot_product_attention
from luxtorch.layers._attention import attended, attention_weights

X, KV = (2, 3, 4), (2, 5, 4)
# The first query attends to nothing, neither alone nor together with a causal mask.
KEEP = torch.tensor([[False, False, False], [True, True, False], [True, False, True]])
PADDING = torch.tensor([[True, True, False], [False, False, False]])[:, None, None, :]
ADDED = torch.tensor([[-math.inf] * 3, [0.5, -1.0, -math.inf], [0.0, 0.3, 2.0]])
HALVES = [torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: {"rtol": 1e-3, "atol": 1e-3}, torch.float64: {"rtol": 1e-8, "atol": 1e-9}}
CACHE = {"state": "a cache is not detached, as derivatives of a call include what they owe to the calls before."}

FORMS = {
    "self": (MultiHeadAttention(4, 2), [X, (3, 4)]),
    "one head, no bias": (MultiHeadAttention(4, bias=False), [X]),
    "causal": (MultiHeadAttention(4, 2, is_causal=True), [X]),
    "boolean mask": (MultiHeadAttention(4, 2), [(X, X, X, KEEP)]),
    "padding, causal": (MultiHeadAttention(4, 2, is_causal=True), [(X, X, X, PADDING)]),
    "added mask": (MultiHeadAttention(4, 2), [(X, X, X, ADDED)]),
    "added mask, causal": (MultiHeadAttention(4, 2, is_causal=True), [(X, X, X, ADDED)]),
    "cross": (MultiHeadAttention(4, 2), [(X, KV), (X, KV, KV)]),
    "widths": (
        MultiHeadAttention(4, 2, kdim=3, vdim=5, qk_features=6, v_features=2, out_features=7),
        [(X, (2, 2, 3), (2, 2, 5))],
    ),
    "grouped": (MultiHeadAttention(4, 4, num_kv_heads=2, is_causal=True), [X]),
    "one head of keys, mask": (MultiHeadAttention(4, 4, num_kv_heads=1), [(X, X, X, KEEP)]),
    "dropout": (MultiHeadAttention(4, 2, dropout=0.4), [X]),
    "dropout, mask, weights": (MultiHeadAttention(4, 2, dropout=0.4, return_weights=True), [(X, X, X, KEEP)]),
    "weights, causal, grouped": (
        MultiHeadAttention(4, 2, num_kv_heads=1, is_causal=True, return_weights=True),
        [X],
    ),
    "rotary": (MultiHeadAttention(4, 2, rotary=lt.RotaryPositionalEmbedding(2)), [X]),
    "cache": (MultiHeadAttention(4, 2, is_causal=True, cache=(2, 8)), [X], CACHE),
    "cache, rotary, grouped, weights": (
        MultiHeadAttention(
            8,
            4,
            num_kv_heads=2,
            is_causal=True,
            cache=(8,),
            rotary=lt.RotaryPositionalEmbedding(2),
            return_weights=True,
        ),
        [(3, 8), (1, 8)],
        CACHE,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


def in_double(tree):
    return lt.core.tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


@pytest.mark.parametrize("name", FORMS)
def test_jvp_and_hessian_are_those_of_finite_differences(make_key, draw, name):
    layer, inputs, *_ = FORMS[name]
    ps, st = in_double(lt.setup(make_key(), layer))
    x = draw(inputs[0], torch.float64)

    def f(weight):
        y, _ = layer(x, {**ps, "q_proj": {**ps["q_proj"], "weight": weight}}, st)
        return (y[0] if isinstance(y, tuple) else y).sin().sum()

    weight = ps["q_proj"]["weight"]
    along = lt.random.normal(make_key(), weight.shape, dtype=torch.float64)
    step = 1e-5
    ahead, behind = f(weight + step * along), f(weight - step * along)
    torch.testing.assert_close(
        torch.func.jvp(f, (weight,), (along,))[1], (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7
    )
    gradient = torch.func.grad(f)
    expected = (gradient(weight + step * along) - gradient(weight - step * along)) / (2 * step)
    for hessian in (torch.func.hessian(f), torch.func.jacrev(torch.func.jacrev(f)), tape_hessian(f)):
        got = torch.einsum("ijkl,kl->ij", hessian(weight), along)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def tape_hessian(f):
    return lambda x: torch.autograd.functional.hessian(f, x)


def test_eight_models_are_one_call(make_key, draw):
    layer = MultiHeadAttention(4, 2, dropout=0.3, is_causal=True)
    models = [lt.setup(key, layer) for key in lt.random.split(make_key(), 8)]
    ps, st = lt.core.tree_map(lambda *leaves: torch.stack(leaves), *models)
    x = draw((X, X, X, KEEP))
    got, _ = torch.vmap(layer, in_dims=(None, 0, 0))(x, ps, st)
    torch.testing.assert_close(got, torch.stack([layer(x, *model)[0] for model in models]))


def test_per_sample_gradients_are_those_of_a_loop(make_key):
    layer = MultiHeadAttention(4, 2, is_causal=True)
    ps, st = lt.setup(make_key(), layer)
    x = lt.random.normal(make_key(), (5, 3, 4))
    gradient = torch.func.grad(lambda ps, x: layer(x, ps, st)[0].square().sum())
    got = torch.vmap(gradient, in_dims=(None, 0))(ps, x)
    expected = lt.core.tree_map(lambda *leaves: torch.stack(leaves), *(gradient(ps, sample) for sample in x))
    torch.testing.assert_close(got, expected)


def module_and_parameters(key, layer, dtype):
    """Make torch's module of the same kind, and give both the same random parameters."""
    q, k, v = layer.q_proj, layer.k_proj, layer.v_proj
    module = torch.nn.MultiheadAttention(
        q.in_features,
        layer.num_heads,
        dropout=layer.attention_dropout.p,
        bias=q.bias,
        kdim=k.in_features,
        vdim=v.in_features,
        batch_first=True,
    ).to(dtype)
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    ps, _ = lt.setup(key, layer)
    ps = {
        name: {
            leaf: lt.random.normal(lt.random.fold_in(lt.random.fold_in(key, name), leaf), value.shape, dtype=dtype)
            for leaf, value in group.items()
        }
        for name, group in ps.items()
    }
    projections = names[:3]
    weights = [ps[name]["weight"] for name in projections]
    packed = {"in_proj_weight": torch.cat(weights)} if module.in_proj_weight is not None else {}
    apart = {} if packed else {f"{name}_weight": ps[name]["weight"] for name in projections}
    biases = {"in_proj_bias": torch.cat([ps[name]["bias"] for name in projections])} if q.bias else {}
    out = {f"out_proj.{name}": value for name, value in ps["out_proj"].items()}
    module.load_state_dict({**packed, **apart, **biases, **out})
    return module, ps


def module_gradients(module):
    """Return the module's gradients under the layer's names."""
    found = {"q_proj": {}, "k_proj": {}, "v_proj": {}, "attention_dropout": {}, "out_proj": {}}
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        weight = module.in_proj_weight
        apart = getattr(module, f"{name}_weight")
        found[name]["weight"] = apart.grad if weight is None else weight.grad.chunk(3)[i]
        if module.in_proj_bias is not None:
            found[name]["bias"] = module.in_proj_bias.grad.chunk(3)[i]
    found["out_proj"] = {name: value.grad for name, value in module.out_proj.named_parameters()}
    return found


ATTENDING = torch.tensor([[True, False, False], [True, True, False], [True, False, True]])
PAIRS = {
    "self": ({}, [(2, 3, 4)] * 3, None),
    "unbatched": ({}, [(3, 4)] * 3, None),
    "no bias": ({"bias": False}, [(2, 3, 4)] * 3, None),
    "one": ({}, [(1, 1, 4)] * 3, None),
    "causal": ({"is_causal": True}, [(2, 3, 4)] * 3, None),
    "boolean mask": ({}, [(2, 3, 4)] * 3, ATTENDING),
    "added mask": ({}, [(2, 3, 4)] * 3, torch.tensor([[0.5, -1.0, 2.0]] * 3)),
    "mask and causal": ({"is_causal": True}, [(2, 3, 4)] * 3, ATTENDING),
    "cross": ({"kdim": 3, "vdim": 5}, [(2, 3, 4), (2, 6, 3), (2, 6, 5)], None),
}


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIRS)
def test_numbers_and_gradients_are_those_of_torch(make_key, draw, name, dtype, weights):
    options, shapes, mask = PAIRS[name]
    layer = MultiHeadAttention(4, 2, return_weights=weights, **options)
    module, ps = module_and_parameters(make_key(), layer, dtype)
    x = draw(tuple(shapes), dtype)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    st = lt.setup(0, layer)[1]
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    theirs = mask if not layer.is_causal else causal if mask is None else mask & causal
    theirs = ~theirs if theirs is not None and theirs.dtype == torch.bool else theirs
    taped = [tensor.clone().requires_grad_() for tensor in x]
    expected, expected_weights = module(*taped, attn_mask=theirs, average_attn_weights=False)
    (expected**2).sum().backward()

    def objective(ps, x):
        y, _ = layer(x if mask is None else (*x, mask), ps, st)
        y, found = y if weights else (y, None)
        return (y**2).sum(), ((y, found) if weights else (y,))

    gradients, (y, *found) = torch.func.grad(objective, argnums=(0, 1), has_aux=True)(ps, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients[0], module_gradients(module), **TOLERANCE[dtype])
    torch.testing.assert_close(gradients[1], tuple(tensor.grad for tensor in taped), **TOLERANCE[dtype])
    if weights:
        torch.testing.assert_close(found, [expected_weights])
    # The same on a tape, where torch's kernel is taken.
    ours = lt.core.tree_map(lambda leaf: leaf.clone().requires_grad_(), ps)
    value, (y, *_) = objective(ours, x)
    torch.testing.assert_close(y, expected)
    value.backward()
    torch.testing.assert_close(
        lt.core.tree_map(lambda leaf: leaf.grad, ours), module_gradients(module), **TOLERANCE[dtype]
    )


SHAPES = {
    "four dimensions": [(2, 4, 3, 2), (2, 4, 5, 2), (2, 4, 5, 3)],
    "three dimensions": [(4, 3, 2), (4, 3, 2), (4, 3, 2)],
    "two dimensions": [(3, 2), (4, 2), (4, 1)],
    "five dimensions": [(2, 2, 1, 3, 2), (2, 2, 1, 3, 2), (2, 2, 1, 3, 2)],
    "grouped": [(2, 4, 3, 2), (2, 2, 5, 2), (2, 2, 5, 3)],
    "no sample": [(0, 4, 3, 2), (0, 4, 3, 2), (0, 4, 3, 2)],
    "no query": [(2, 4, 0, 2), (2, 4, 3, 2), (2, 4, 3, 2)],
    "one of each": [(1, 1, 1, 2), (1, 1, 1, 2), (1, 1, 1, 2)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("kind", ["plain", "causal", "boolean", "added"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_the_function_is_that_of_torch_on_all_paths(make_key, shapes, kind, dtype):
    q, k, v = (lt.random.normal(make_key(), shape).to(dtype) for shape in SHAPES[shapes])
    size = (q.shape[-2], k.shape[-2])
    boolean = (torch.arange(size[0])[:, None] + torch.arange(size[1])) % 2 == 0
    mask = {"boolean": boolean, "added": lt.random.normal(make_key(), size).to(dtype)}.get(kind)
    options = {"mask": mask, "is_causal": kind == "causal", "scale": 0.7}
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype in HALVES else {"rtol": 1e-4, "atol": 1e-5}
    wide = [x.double() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(
        *wide,
        attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.double(),
        is_causal=kind == "causal",
        scale=0.7,
        enable_gqa=shapes == "grouped",
    ).to(dtype)
    y = scaled_dot_product_attention(q, k, v, **options)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, **tolerance)
    weights = attention_weights(q, k, **options)
    assert weights.shape == (*q.shape[:-1], k.shape[-2])
    torch.testing.assert_close(attended(weights, v), expected, **tolerance)

    def objective(q, k, v):
        return (scaled_dot_product_attention(q, k, v, **options).float() ** 2).sum()

    taped = [x.clone().requires_grad_() for x in (q, k, v)]
    on_tape = torch.autograd.grad(objective(*taped), taped)
    torch.testing.assert_close(torch.func.grad(objective, argnums=(0, 1, 2))(q, k, v), on_tape, **tolerance)


@pytest.mark.parametrize("kind", ["boolean", "added"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("path", ["tape", "weights", "grad", "jvp", "second", "compiled"])
def test_a_query_without_keys_gives_zeros(make_key, path, is_causal, kind):
    mask = {"boolean": KEEP, "added": ADDED}[kind]
    q, k, v = (lt.random.normal(make_key(), (2, 2, 3, 4)) for _ in range(3))

    def f(q, k, v):
        if path == "weights":
            return attended(attention_weights(q, k, mask=mask, is_causal=is_causal), v)
        return scaled_dot_product_attention(q, k, v, mask=mask, is_causal=is_causal)

    with torch.autograd.set_detect_anomaly(True, check_nan=True) if path != "compiled" else torch.enable_grad():
        if path == "jvp":
            y, found = torch.func.jvp(f, (q, k, v), (k, v, q))
            assert not found[..., 0, :].any() and found.isfinite().all()
        elif path == "second":
            y = torch.func.hessian(lambda q: f(q, k[:1, :1], v[:1, :1]).sin().sum())(q[:1, :1])
        elif path == "grad":
            y, pullback = torch.func.vjp(f, q, k, v)
            found = pullback(torch.ones_like(y))
        else:
            run = torch.compile(f, fullgraph=True, backend="aot_eager") if path == "compiled" else f
            taped = [x.clone().requires_grad_() for x in (q, k, v)]
            y = run(*taped)
            found = torch.autograd.grad(y.sin().sum(), taped)
    assert not y[..., 0, :].any() and y.isfinite().all()
    assert y.any()
    if path in ("grad", "tape", "weights", "compiled"):
        assert not found[0][..., 0, :].any() and all(x.isfinite().all() and x.any() for x in found)


def test_a_query_without_keys_gets_the_last_bias(make_key):
    layer = MultiHeadAttention(4, 2, return_weights=True)
    ps, st = lt.setup(make_key(), layer)
    ps["out_proj"]["bias"] = torch.arange(4.0)
    x = lt.random.normal(make_key(), (2, 3, 4))
    (y, weights), _ = layer((x, x, x, PADDING), ps, st)
    assert torch.equal(y[1], torch.arange(4.0).expand(3, 4)) and not weights[1].any()
    assert not weights[0, ..., 2].any()
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("run", ["tape", "grad"])
def test_nothing_to_attend_to_gives_zeros(run, is_causal):
    layer = MultiHeadAttention(4, 2, bias=False, is_causal=is_causal)
    ps, st = lt.setup(0, layer)
    x, memory = torch.ones(2, 3, 4), torch.ones(2, 0, 4)
    assert torch.equal(layer((x, memory), ps, st)[0], torch.zeros(2, 3, 4))
    gradient = torch.func.grad(lambda ps: layer((x, memory), ps, st)[0].sum())(ps)
    assert torch.equal(gradient["v_proj"]["weight"], torch.zeros(4, 4))
    assert layer(memory, ps, st)[0].shape == (2, 0, 4)


@pytest.mark.parametrize("dtype", HALVES)
def test_scores_beyond_the_range_of_half_precision_are_compared(dtype):
    q = torch.full((1, 1, 2, 4), 200.0, dtype=dtype)
    k = torch.stack([q[..., 0, :], q[..., 1, :] * 2], -2)
    weights = attention_weights(q, k)
    assert torch.equal(weights, torch.tensor([0.0, 1.0], dtype=dtype).expand(1, 1, 2, 2))


@pytest.mark.parametrize("mask", [None, KEEP])
def test_the_kernel_is_taken_where_nothing_looks_on(make_key, monkeypatch, mask):
    taken = []
    kernel = F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        taken.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    q = lt.random.normal(make_key(), (2, 2, 3, 4))

    def f(q):
        return scaled_dot_product_attention(q, q, q, mask=mask).sum()

    for run, times in [(f, 1), (torch.func.grad(f), 0), (torch.vmap(f), 0)]:
        taken.clear()
        run(q)
        assert len(taken) == times
    taken.clear()
    x = q.clone().requires_grad_()
    f(x).backward()
    torch.testing.assert_close(x.grad, torch.func.grad(f)(q))
    assert len(taken) == 1


def test_checkpoints_recompute_it(make_key):
    layer = MultiHeadAttention(4, 2, is_causal=True)
    ps, st = lt.setup(make_key(), layer)
    x = lt.random.normal(make_key(), (2, 3, 4)).requires_grad_()
    y = torch.utils.checkpoint.checkpoint(lambda x: layer(x, ps, st)[0], x, use_reentrant=False)
    (got,) = torch.autograd.grad(y.sin().sum(), x)
    torch.testing.assert_close(got, torch.func.grad(lambda x: layer(x, ps, st)[0].sin().sum())(x.detach()))


def test_one_backward_frees_the_tape_of_the_kernel(make_key):
    q = lt.random.normal(make_key(), (1, 2, 3, 4)).requires_grad_()
    y = scaled_dot_product_attention(q, q, q).sum()
    first, second = (torch.autograd.grad(y, q, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y, q)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_second_derivatives_on_a_tape_by_one_of_the_three(make_key, position):
    inputs = [lt.random.normal(make_key(), (2, 3, 4), dtype=torch.float64) for _ in range(3)]

    def f(x):
        return scaled_dot_product_attention(*inputs[:position], x, *inputs[position + 1 :], mask=KEEP).sin().sum()

    x = inputs[position]
    torch.testing.assert_close(tape_hessian(f)(x), torch.func.hessian(f)(x))


def test_second_derivatives_on_a_tape_by_all_three(make_key):
    x = lt.random.normal(make_key(), (2, 3, 4), dtype=torch.float64)

    def f(x):
        return scaled_dot_product_attention(x, x, x, mask=KEEP).sin().sum()

    torch.testing.assert_close(tape_hessian(f)(x), torch.func.hessian(f)(x))


def test_autocast_is_that_of_torch(make_key):
    layer = MultiHeadAttention(4, 2, is_causal=True)
    ps, st = lt.setup(make_key(), layer)
    x = lt.random.normal(make_key(), (2, 3, 4)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, ps, st)[0]
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    assert y.dtype == torch.bfloat16 and gradient.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x, ps, st)[0], rtol=5e-2, atol=5e-2)


def test_shapes_are_found_without_computing():
    layer = MultiHeadAttention(4, 2, kdim=3, vdim=3, out_features=7, return_weights=True)
    shapes = lt.output_shape(layer, (torch.ones(2, 5, 4), torch.ones(2, 6, 3)))
    assert [tuple(shape) for shape in shapes] == [(2, 5, 7), (2, 2, 5, 6)]


def test_a_learnt_bias_gets_its_gradient(make_key):
    q = lt.random.normal(make_key(), (2, 2, 3, 4))
    bias = lt.random.normal(make_key(), (2, 3, 3))

    def f(bias):
        return scaled_dot_product_attention(q, q, q, mask=bias).sin().sum()

    taped = bias.clone().requires_grad_()
    (got,) = torch.autograd.grad(f(taped), taped)
    torch.testing.assert_close(got, torch.func.grad(f)(bias))
    assert got.any()


def test_dropout_follows_its_key(make_key):
    q = lt.random.normal(make_key(), (2, 2, 8, 4))
    one, other = make_key(), make_key()
    draw = [scaled_dot_product_attention(q, q, q, dropout_p=0.5, key=key) for key in (one, one, other)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert not scaled_dot_product_attention(q, q, q, dropout_p=1.0, key=one).any()
    many = torch.stack([scaled_dot_product_attention(q, q, q, dropout_p=0.5, key=k) for k in lt.random.split(one, 999)])
    torch.testing.assert_close(many.mean(0), scaled_dot_product_attention(q, q, q), rtol=0, atol=0.15)


def test_weights_are_those_after_dropout(make_key):
    layer = MultiHeadAttention(4, 2, dropout=0.5, return_weights=True)
    ps, st = lt.setup(make_key(), layer)
    x = lt.random.normal(make_key(), (3, 8, 4))
    (y, weights), new = layer(x, ps, st)
    kept = attention_weights_of(layer, x, ps, st)
    assert (weights == 0).any()
    torch.testing.assert_close(weights, torch.where(weights == 0, 0.0, 2 * kept))
    silent = MultiHeadAttention(4, 2, dropout=0.5)
    torch.testing.assert_close(silent(x, ps, st)[0], y)
    assert not torch.equal(silent(x, ps, new)[0], y)


def attention_weights_of(layer, x, ps, st):
    (_, weights), _ = layer(x, ps, lt.test_mode(st))
    return weights


def test_more_leading_dimensions_are_samples(make_key):
    layer = MultiHeadAttention(4, 2, num_kv_heads=1, is_causal=True)
    ps, st = lt.setup(make_key(), layer)
    x = lt.random.normal(make_key(), (2, 5, 3, 4))
    torch.testing.assert_close(layer(x, ps, st)[0], layer(x.flatten(0, 1), ps, st)[0].unflatten(0, (2, 5)))


def test_shared_heads_are_repeated_ones(make_key):
    shared = MultiHeadAttention(8, 4, num_kv_heads=2)
    whole = MultiHeadAttention(8, 4)
    ps, st = lt.setup(make_key(), shared)
    assert ps["k_proj"]["weight"].shape == (4, 8)
    repeated = {
        name: lt.core.tree_map(lambda leaf: leaf.unflatten(0, (2, 2)).repeat_interleave(2, 0).flatten(0, 1), ps[name])
        for name in ("k_proj", "v_proj")
    }
    x = lt.random.normal(make_key(), (2, 3, 8))
    torch.testing.assert_close(shared(x, ps, st)[0], whole(x, {**ps, **repeated}, st)[0])


def test_a_pair_is_queries_and_what_they_attend_to(make_key):
    layer = MultiHeadAttention(4, 2)
    ps, st = lt.setup(make_key(), layer)
    q, kv = lt.random.normal(make_key(), (2, 3, 4)), lt.random.normal(make_key(), (2, 5, 4))
    assert torch.equal(layer((q, kv), ps, st)[0], layer((q, kv, kv), ps, st)[0])
    assert torch.equal(layer(q, ps, st)[0], layer((q, q, q, None), ps, st)[0])


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_that_of_double_precision(make_key, dtype):
    layer = MultiHeadAttention(8, 2, is_causal=True)
    ps, st = lt.core.tree_map(lambda leaf: leaf.to(dtype), lt.setup(make_key(), layer)[0]), lt.setup(0, layer)[1]
    x = lt.random.normal(make_key(), (2, 5, 8)).to(dtype)
    expected = layer(x.double(), in_double(ps), st)[0].to(dtype)
    torch.testing.assert_close(layer(x, ps, st)[0], expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(torch.vmap(lambda x: layer(x, ps, st)[0])(x), expected, rtol=2e-2, atol=2e-2)


def test_inputs_need_not_be_contiguous(make_key):
    layer = MultiHeadAttention(4, 2)
    ps, st = lt.setup(make_key(), layer)
    x = lt.random.normal(make_key(), (4, 3, 2)).permute(2, 1, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x, ps, st)[0], layer(x.contiguous(), ps, st)[0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"embed_dim": 4, "num_heads": 3}, "qk_features[\\s\\S]*multiple of num_heads=3"),
        ({"embed_dim": 4, "num_heads": 2, "v_features": 5}, "v_features[\\s\\S]*multiple of num_heads=2"),
        ({"embed_dim": 8, "num_heads": 4, "num_kv_heads": 3}, "multiple of num_kv_heads=3"),
        ({"embed_dim": 0}, "embed_dim must be at least 1"),
        ({"embed_dim": 4, "num_heads": 2, "kdim": 0}, "kdim must be at least 1"),
        ({"embed_dim": 4, "dropout": 1.5}, "between 0 and 1"),
    ],
)
def test_wrong_sizes_are_explained(options, text):
    with pytest.raises(lt.InputError, match=text):
        MultiHeadAttention(**options)


ONES = torch.ones(2, 3, 4)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.ones(2, 3, 5), lt.InputError, "model.q_proj[\\s\\S]*\\(..., 4\\)[\\s\\S]*\\(2, 3, 5\\)"),
        ((ONES, torch.ones(2, 3, 5)), lt.InputError, "model.k_proj[\\s\\S]*\\(2, 3, 5\\)"),
        ((ONES, ONES, torch.ones(2, 3, 5)), lt.InputError, "model.v_proj[\\s\\S]*\\(2, 3, 5\\)"),
        (
            (ONES, ONES, torch.ones(2, 5, 4)),
            lt.InputError,
            "model \\(Multi[\\s\\S]*shapes of queries, keys and values must match",
        ),
        ((ONES, torch.ones(3, 3, 4)), lt.InputError, "shapes of queries, keys and values must match"),
        ((ONES, torch.ones(1, 3, 4)), lt.InputError, "shapes of queries, keys and values must match"),
        ((ONES, torch.ones(3, 4)), lt.InputError, "shapes of queries, keys and values must match"),
        (torch.ones(4), lt.InputError, "must be sequences[\\s\\S]*length, 4"),
        ((ONES,), lt.InputError, "must be sequences[\\s\\S]*x, x, x, mask"),
        ((ONES,) * 5, lt.InputError, "must be sequences"),
        ((ONES, ONES, None), lt.InputError, "must be sequences[\\s\\S]*None"),
        ((ONES, ONES, ONES, torch.ones(2, 4).bool()), lt.InputError, "mask[\\s\\S]*\\(2, 2, 3, 3\\)"),
        ((ONES, ONES, ONES, torch.ones(2, 3).bool()), lt.InputError, "\\[:, None, None, :\\]"),
        ((ONES, ONES, ONES, torch.ones(3, 3).int()), lt.DTypeError, "int32[\\s\\S]*mask.bool\\(\\)"),
        ((ONES, ONES, ONES, [True]), lt.DTypeError, "a tensor of booleans[\\s\\S]*a list"),
        (ONES.double(), lt.DTypeError, "model.q_proj[\\s\\S]*float32, as the parameters"),
    ],
)
def test_a_wrong_input_is_explained(x, error, text, weights):
    layer = MultiHeadAttention(4, 2, return_weights=weights)
    ps, st = lt.setup(0, layer)
    with pytest.raises(error, match=text):
        layer(x, ps, st)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dropout_p": 0.5}, "key=lt.random.key"),
        ({"dropout_p": 1.5, "key": lt.random.key(0)}, "dropout_p must be between 0 and 1"),
        ({"mask": torch.ones(1, 2, 2, 3, 3).bool()}, "mask has the wrong shape"),
    ],
)
def test_wrong_options_of_the_function_are_explained(options, text):
    q = torch.ones(2, 2, 3, 4)
    with pytest.raises(lt.InputError, match=text):
        scaled_dot_product_attention(q, q, q, **options)


def test_keys_have_as_many_heads_or_a_divisor():
    q, k = torch.ones(2, 4, 3, 2), torch.ones(2, 3, 3, 2)
    with pytest.raises(lt.InputError, match="heads a multiple of kv_heads"):
        scaled_dot_product_attention(q, k, k)


def test_it_prints_its_heads():
    layer = MultiHeadAttention(8, 4, num_kv_heads=2, is_causal=True, return_weights=True)
    assert layer.extra_repr() == "num_heads=4, num_kv_heads=2, is_causal=True, return_weights=True"
    assert layer == MultiHeadAttention(8, 4, num_kv_heads=2, is_causal=True, return_weights=True)
    assert list(layer.children()) == ["q_proj", "k_proj", "v_proj", "attention_dropout", "out_proj"]
