"""Generation with a cache of keys and values: it gives what the model gives on the whole sequence."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch.core import tree_map

WORDS, WIDTH, LENGTH = 11, 8, 7
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.1}


def block(**options):
    options = {"is_causal": True, "norm_first": True, **options}
    return lt.TransformerEncoderLayer(WIDTH, 2, 12, **options)


def rotary(heads=2):
    return lt.RotaryPositionalEmbedding(WIDTH // heads, max_sequence_length=16)


def learned():
    places = lt.Chain(lt.Positions(), lt.Embedding(16, WIDTH))
    return lt.Parallel(torch.add, lt.Embedding(WORDS, WIDTH), places)


def sines():
    places = lt.Chain(lt.Positions(-2), lt.SinusoidalPositionalEmbedding(WIDTH))
    return lt.Chain(lt.Embedding(WORDS, WIDTH), lt.Parallel(torch.add, lt.NoOpLayer(), places))


def words(inner, first=None):
    first = lt.Embedding(WORDS, WIDTH) if first is None else first
    return lt.Chain(first, inner, lt.Dense(WIDTH, WORDS))


def attention(heads=2, **options):
    return words(lt.MultiHeadAttention(WIDTH, heads, is_causal=True, **options))


@lt.compact(
    embed=lt.Embedding(WORDS, WIDTH),
    attention=lt.MultiHeadAttention(WIDTH, 2, is_causal=True),
    head=lt.Dense(WIDTH, WORDS),
)
def compact(m, x):
    x = m.embed(x)
    return m.head(x + m.attention(x))


MODELS = {
    "one head": attention(1),
    "no bias": attention(bias=False),
    "grouped": attention(4, num_kv_heads=2),
    "one head of keys, rotary": attention(4, num_kv_heads=1, rotary=rotary(4)),
    "widths": words(
        lt.MultiHeadAttention(WIDTH, 2, is_causal=True, qk_features=6, v_features=10, out_features=WIDTH, dropout=0.3)
    ),
    "interleaved": attention(rotary=lt.RotaryPositionalEmbedding(4, interleaved=True)),
    "GPT": words(lt.TransformerEncoder(block(), 2, lt.LayerNorm(WIDTH)), learned()),
    "small GPT": words(block(dropout=0.0), learned()),
    "norm last, rotary": words(lt.TransformerEncoder(block(norm_first=False, rotary=rotary()), 3)),
    "sines": words(block(), sines()),
    "compact": compact,
    "scanned": words(lt.ScannedChain(block(dropout=0.0, rotary=rotary()), 3)),
    "checkpointed": words(lt.Checkpointed(block(rotary=rotary()))),
    "repeated once": words(lt.RepeatedLayer(block(), 1)),
}
SPLITS = {"prompt, tokens": [4, 1, 1, 1], "tokens": [1] * LENGTH, "chunks": [3, 0, 1, 1, 2], "at once": [LENGTH]}
SMALL = ["small GPT", "one head of keys, rotary"]


def in_dtype(dtype):
    return lambda tree: tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, tree)


def tokens(key, *batch, length=LENGTH):
    return lt.random.randint(key, (*batch, length), 0, WORDS)


def by_parts(writer, x, ps, st, split):
    """Return the outputs of calls on parts of a sequence, in a loop of Python, and the last states."""
    ys = []
    for part in x.split(split, -1):
        y, st = writer(part, ps, st)
        ys.append(y)
    return torch.cat(ys, -2), st


@pytest.fixture
def made(make_key):
    """Return a function that sets up a model and the one with a cache, in test mode."""

    def made(model, batch_size=2, max_length=LENGTH + 2, dtype=torch.float64):
        ps, st = in_dtype(dtype)(lt.setup(make_key(), model))
        ps = tree_map(lambda leaf: leaf + 0.1 * lt.random.normal(make_key(), leaf.shape, dtype=dtype), ps)
        st = lt.test_mode(st)
        writer, same, cached = lt.with_cache(model, ps, st, batch_size=batch_size, max_length=max_length)
        assert same is ps
        return ps, st, writer, cached

    return made


@pytest.mark.parametrize(
    ("name", "split"), [*((name, "chunks") for name in MODELS), *((SMALL[0], split) for split in SPLITS)]
)
def test_parts_of_a_sequence_give_what_all_of_it_gives(make_key, made, name, split):
    ps, st, writer, cached = made(MODELS[name])
    x = tokens(make_key(), 2)
    expected, _ = MODELS[name](x, ps, st)
    got, new = by_parts(writer, x, ps, cached, SPLITS[split])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert lt.core.tree_structure(new) == lt.core.tree_structure(cached)
    before, after = (
        [(leaf.shape, leaf.stride(), leaf.dtype) for leaf in lt.core.tree_leaves(tree)] for tree in (cached, new)
    )
    assert before == after


@pytest.mark.parametrize("batch", [None, 0, 1])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_any_batch_in_any_dtype(make_key, made, dtype, batch):
    ps, st, writer, cached = made(MODELS["GPT"], batch, dtype=dtype)
    x = tokens(make_key(), *(() if batch is None else (batch,)))
    expected, _ = MODELS["GPT"](x, ps, st)
    got, _ = by_parts(writer, x, ps, cached, SPLITS["chunks"])
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[dtype])


def test_a_mask_covers_the_cache(make_key, made):
    model = lt.TransformerEncoder(block(rotary=rotary()), 2)
    ps, st, writer, cached = made(model, max_length=LENGTH)
    x = lt.random.normal(make_key(), (2, LENGTH, WIDTH), dtype=torch.float64)
    for mask in (torch.arange(LENGTH) != 1, torch.linspace(-1, 1, LENGTH, dtype=torch.float64)):
        expected, _ = model((x, mask), ps, st)
        ys, new = [], cached
        for part in x.split(SPLITS["chunks"], 1):
            y, new = writer((part, mask), ps, new)
            ys.append(y)
        torch.testing.assert_close(torch.cat(ys, 1), expected, rtol=1e-10, atol=1e-10)


def test_a_decoder_caches_its_own_sequence_alone(make_key, made):
    model = lt.TransformerDecoder(lt.TransformerDecoderLayer(WIDTH, 2, 12, is_causal=True, rotary=rotary()), 2)
    ps, st, writer, cached = made(model)
    assert [name for name in lt.flatten_names(cached) if "position" in name] == [
        f"layer_{i}.self_attn.cache.position" for i in (1, 2)
    ]
    x, memory = (lt.random.normal(make_key(), (2, n, WIDTH), dtype=torch.float64) for n in (LENGTH, 3))
    expected, _ = model((x, memory), ps, st)
    ys, new = [], cached
    for part in x.split(SPLITS["chunks"], 1):
        y, new = writer((part, memory), ps, new)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), expected, rtol=1e-10, atol=1e-10)


def test_weights_are_those_of_the_slots(make_key, made):
    model = lt.MultiHeadAttention(WIDTH, 2, is_causal=True, return_weights=True)
    ps, st, writer, cached = made(model)
    x = lt.random.normal(make_key(), (2, LENGTH, WIDTH), dtype=torch.float64)
    (y, weights), _ = model(x, ps, st)
    (_, _), new = writer(x[:, :5], ps, cached)
    (last, found), _ = writer(x[:, 5:], ps, new)
    torch.testing.assert_close(last, y[:, 5:])
    torch.testing.assert_close(found[..., :LENGTH], weights[..., 5:, :])
    assert not found[..., LENGTH:].any()


def whole(model, x, ps, st):
    return model(x, ps, st)[0].sin().sum()


def scanned(writer, x, ps, st):
    """Return the same of a prompt and a scan over the tokens after it."""
    y, st = writer(x[..., :3], ps, st)

    def step(st, token):
        y, st = writer(token[..., None], ps, st)
        return st, y[..., 0, :]

    _, ys = lt.scan(step, st, x[..., 3:].movedim(-1, 0))
    return y.sin().sum() + ys.sin().sum()


@pytest.mark.parametrize("name", SMALL)
def test_derivatives_are_those_of_the_whole_sequence(make_key, made, name):
    ps, st, writer, cached = made(MODELS[name])
    x = tokens(make_key(), 2, length=5)
    along = tree_map(lambda leaf: lt.random.normal(make_key(), leaf.shape, dtype=leaf.dtype), ps)

    def values(objective):
        gradient = torch.func.grad(objective)
        yield objective(ps)
        yield gradient(ps)
        yield torch.func.jvp(objective, (ps,), (along,))[1]
        yield torch.func.jvp(gradient, (ps,), (along,))[1]
        yield lt.jit(gradient, backend="replay")(ps)
        taped = tree_map(lambda leaf: leaf.clone().requires_grad_(), ps)
        leaves = lt.core.tree_leaves(taped)
        yield torch.autograd.grad(objective(taped), leaves)

    expected = values(lambda ps: whole(MODELS[name], x, ps, st))
    got = values(lambda ps: scanned(writer, x, ps, cached))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_models_and_sequences_are_mapped_over(make_key, made, name):
    model = MODELS[name]
    ps, st, writer, cached = made(model, None)
    many = tree_map(lambda leaf: torch.stack([leaf, 1.1 * leaf, 0.9 * leaf]), ps)
    stacked = tree_map(lambda leaf: torch.stack([leaf] * 3), cached)
    x = tokens(make_key(), 3, length=5)
    expected = torch.vmap(lambda ps, x: whole(model, x, ps, st))(many, x)
    got = torch.vmap(lambda ps, x, st: scanned(writer, x, ps, st))(many, x, stacked)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.vmap(lambda ps, x: scanned(writer, x, ps, cached))(many, x), expected)
    jitted = lt.jit(torch.vmap(torch.func.grad(lambda ps, x: scanned(writer, x, ps, cached))), backend="replay")
    torch.testing.assert_close(
        jitted(many, x), torch.vmap(torch.func.grad(lambda ps, x: whole(model, x, ps, st)))(many, x)
    )


def test_models_at_different_places(make_key, made):
    # As many caches as sequences, each with as many elements as it likes.
    ps, st, writer, cached = made(MODELS["GPT"], None)
    x = tokens(make_key(), 3)
    lengths = (2, 4, 3)
    before = [writer(row[:n], ps, cached)[1] for row, n in zip(x, lengths, strict=True)]
    new = torch.stack([row[n] for row, n in zip(x, lengths, strict=True)])[:, None]
    got, _ = torch.vmap(lambda x, st: writer(x, ps, st))(new, lt.stack(before))
    expected = [MODELS["GPT"](row[: n + 1], ps, st)[0][-1:] for row, n in zip(x, lengths, strict=True)]
    torch.testing.assert_close(got, torch.stack(expected))


@pytest.mark.parametrize("wrap", ["Ensemble", "Frozen", "shared", "ComponentVector"])
def test_wrapped_models(make_key, made, wrap):
    model, x = MODELS["GPT"], tokens(make_key(), 2)
    if wrap == "Ensemble":
        model = lt.Ensemble(model, 3)
    ps, st = in_dtype(torch.float64)(lt.setup(make_key(), model))
    st = lt.test_mode(st)
    if wrap == "Frozen":
        model, ps, st = lt.freeze(model, ps, st, "layer_2")
    if wrap == "shared":
        model, ps, st = lt.share_parameters(model, ps, st, ("layer_2.layer_1", "layer_2.layer_2"))
    if wrap == "ComponentVector":
        ps = lt.ComponentVector(ps)
    writer, same, cached = lt.with_cache(model, ps, st, batch_size=2, max_length=LENGTH)
    assert same is ps and torch.float32 not in {leaf.dtype for leaf in lt.core.tensors(cached)}
    got, _ = by_parts(writer, x, ps, cached, SPLITS["chunks"])
    torch.testing.assert_close(got, model(x, ps, st)[0])


class Halved(lt.ContainerLayer):
    """Attention of one's own in half precision, beside numbers in single precision."""

    attention: lt.MultiHeadAttention
    scale: lt.Scale

    def __call__(self, x, ps, st):
        y, st_attention = self.attention(x.bfloat16(), ps["attention"], st["attention"])
        y, st_scale = self.scale(y.float(), ps["scale"], st["scale"])
        return y, {"attention": st_attention, "scale": st_scale}


def test_each_cache_has_the_dtype_of_its_layer(make_key):
    model = Halved(lt.MultiHeadAttention(WIDTH, 2, is_causal=True), lt.Scale(WIDTH))
    ps, st = lt.setup(make_key(), model)
    ps = {**ps, "attention": lt.bf16(ps["attention"])}
    writer, ps, cached = lt.with_cache(model, ps, st, max_length=LENGTH)
    x = lt.random.normal(make_key(), (LENGTH, WIDTH))
    torch.testing.assert_close(
        torch.cat([writer(x[:3], ps, cached)[0], writer(x[3:], ps, writer(x[:3], ps, cached)[1])[0]]),
        model(x, ps, st)[0],
        rtol=0.05,
        atol=0.05,
    )


class Sum(lt.Layer):
    """A layer of one's own that looks along the sequence: sums of all so far."""

    counts: tuple[int, ...] | None = None

    def cached(self, shape):
        return Sum(shape)

    def initial_states(self, key):
        return {} if self.counts is None else {"sum": torch.zeros(*self.counts[:-1], 1, WIDTH, device=key.device)}

    def __call__(self, x, ps, st):
        y = x.cumsum(-2)
        if self.counts is None:
            return y, st
        y = y + st["sum"]
        return y, {"sum": y[..., -1:, :]}


def test_a_layer_of_ones_own_takes_part(make_key, made):
    model = words(Sum())
    ps, st, writer, cached = made(model)
    x = tokens(make_key(), 2)
    got, _ = by_parts(writer, x, ps, cached, [3, 1, 3])
    torch.testing.assert_close(got, model(x, ps, st)[0])


def test_a_model_without_parameters_has_a_cache_of_numbers(make_key):
    model = lt.Chain(lt.Dropout(0.5), Sum())  # a key is all that it has
    ps, st = lt.setup(make_key(), model)
    _, _, cached = lt.with_cache(model, ps, st, max_length=3)
    assert cached["layer_2"]["sum"].dtype == torch.float32


def greedy(writer):
    """Return a jitted function that writes tokens after a prompt."""

    @lt.jit(donate="st", backend="replay")
    def written(prompt, ps, st):
        scores, st = writer(prompt, ps, st)

        def write(carry, _):
            token, st = carry
            scores, st = writer(token, ps, st)
            return (scores.argmax(-1), st), token[..., 0]

        first = scores[..., -1:, :].argmax(-1)
        (_, st), found = lt.scan(write, (first, st), length=4)
        return found.movedim(0, -1), st

    return written


def test_generation_is_one_program_that_writes_into_its_own_memory(make_key, made):
    model = MODELS["GPT"]
    ps, st, writer, cached = made(model)
    prompt = x = tokens(make_key(), 2, length=3)
    for _ in range(4):
        x = torch.cat([x, model(x, ps, st)[0][:, -1:].argmax(-1)], -1)
    written = greedy(writer)
    for _ in range(2):
        got, new = written(prompt, ps, tree_map(torch.clone, cached))
        assert torch.equal(got, x[:, 3:])
    assert written.cache_info().misses == 1
    assert int(new["layer_2"]["layer_1"]["self_attn"]["cache"]["position"]) == LENGTH


@pytest.mark.slow
def test_inductor_writes_the_same(make_key, made):
    ps, _, writer, cached = made(MODELS["one head of keys, rotary"], dtype=torch.float32)
    x = tokens(make_key(), 2)
    jitted = lt.jit(lambda x, ps, st: scanned(writer, x, ps, st))
    torch.testing.assert_close(jitted(x, ps, cached), scanned(writer, x, ps, cached))


@pytest.mark.parametrize("name", SMALL)
def test_beyond_the_cache_is_an_error_or_nan_never_an_output(make_key, made, name):
    ps, _, writer, cached = made(MODELS[name], max_length=3)
    x = tokens(make_key(), 2, length=5)
    with pytest.raises(lt.InputError, match="room for all elements[\\s\\S]*at most 3[\\s\\S]*5 after 0"):
        writer(x, ps, cached)
    _, st = writer(x[:, :2], ps, cached)
    with pytest.raises(lt.InputError, match="at most 3[\\s\\S]*2 after 2[\\s\\S]*larger max_length"):
        writer(x[:, 2:4], ps, st)
    with pytest.raises(lt.InputError, match="2 after 2"):
        torch.func.grad(lambda ps: writer(x[:, 2:4], ps, st)[0].sum())(ps)
    with pytest.raises(lt.InputError, match="2 after 2"):
        torch.vmap(lambda st: writer(x[:, 2:4], ps, st)[0])(tree_map(lambda leaf: leaf[None], st))

    def step(st, token):
        y, st = writer(token, ps, st)
        return st, y

    tokens_of = x.T[..., None]
    with pytest.raises(lt.InputError, match="1 after 3"):
        lt.scan(step, cached, tokens_of)
    _, ys = lt.jit(lambda st: lt.scan(step, st, tokens_of), backend="replay")(cached)
    assert ys[:3].isfinite().all() and ys[3:].isnan().all()


def test_weights_beyond_the_cache_are_nan(make_key, made):
    ps, _, writer, cached = made(lt.MultiHeadAttention(WIDTH, 2, is_causal=True, return_weights=True), max_length=2)
    x = lt.random.normal(make_key(), (2, 1, WIDTH), dtype=torch.float64)
    call = lt.jit(lambda st: writer(x, ps, st), backend="replay")
    for _ in range(3):
        (y, weights), cached = call(cached)
    assert y.isnan().all() and weights.isnan().all()


def never():
    return lt.TransformerEncoder(block(is_causal=False), 2)


@lt.compact(table=torch.eye(WIDTH), attention=lt.MultiHeadAttention(WIDTH, 2, is_causal=True))
def scaled(m, x):
    return m.attention(x @ m.table)


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (MODELS["GPT"], {"max_length": 0}, "max_length must be at least 1"),
        (MODELS["GPT"], {"max_length": 2.5}, "max_length must be an integer"),
        (MODELS["GPT"], {"max_length": 3, "batch_size": -1}, "batch_size must be at least 1"),
        (lt.Dense(2, 2), {"max_length": 3}, "must take a cache[\\s\\S]*is_causal=True"),
        (words(never(), learned()), {"max_length": 3}, "must take a cache[\\s\\S]*is_causal=True"),
        (attention(rotary=rotary()), {"max_length": 17}, "max_length must be at most max_sequence_length=16"),
        (words(lt.RepeatedLayer(block(), 2)), {"max_length": 3}, "called once[\\s\\S]*repeats=2"),
        (lt.WeightNorm(scaled, ("table",)), {"max_length": 3}, "made by a wrapper[\\s\\S]*MultiHeadAttention"),
        (
            words(lt.Chain(block(), rotary(1))),
            {"max_length": 3},
            "must belong to the attention[\\s\\S]*cached\\(shape\\)",
        ),
    ],
)
def test_what_cannot_have_a_cache_is_refused(make_key, model, options, text):
    ps, st = lt.setup(make_key(), model)
    with pytest.raises(lt.InputError, match=text):
        lt.with_cache(model, ps, st, **options)


def test_a_model_has_one_cache(make_key, made):
    ps, _, writer, cached = made(MODELS["GPT"])
    with pytest.raises(lt.InputError, match="must take a cache[\\s\\S]*begin with the model that it was made of"):
        lt.with_cache(writer, ps, cached, max_length=3)
    model, st = MODELS["GPT"], lt.initial_states(0, MODELS["GPT"])
    adapted, few, st = lt.lora(model, in_dtype(torch.float32)(ps), st, rng=1)
    with pytest.raises(lt.InputError, match="merge_lora"):
        lt.with_cache(adapted, few, st, max_length=3)


X = torch.ones(2, 3, WIDTH)


@pytest.mark.parametrize(
    ("x", "options", "text"),
    [
        (torch.ones(3, 3, WIDTH), {}, "batch of the cache's size[\\s\\S]*\\(2, 3\\)[\\s\\S]*\\(3, 3\\)"),
        (torch.ones(3, WIDTH), {}, "batch of the cache's size"),
        ((X, X[:, :2]), {}, "attends to itself[\\s\\S]*\\(2, 3\\), \\(2, 2\\), \\(2, 2\\)"),
        ((X, X, X[:, :2]), {}, "attends to itself[\\s\\S]*\\(2, 3\\), \\(2, 3\\), \\(2, 2\\)"),
        ((X, X[:1]), {}, "batch of the cache's size[\\s\\S]*\\(1, 3\\)"),
        ((X, X, X, torch.ones(3, 3).bool()), {}, "mask has the wrong shape[\\s\\S]*\\(2, 2, 3, 6\\)"),
        ((X, X, X, torch.ones(3, 6).long()), {}, "mask must be a tensor of booleans"),
        (X.double(), {}, "dtype"),
        (X, {"dropout": 0.5}, "must be in test mode"),
    ],
)
def test_a_wrong_input_is_explained(make_key, x, options, text):
    layer = lt.MultiHeadAttention(WIDTH, 2, is_causal=True, cache=(2, 6), **options)
    ps, st = lt.setup(make_key(), layer)
    with pytest.raises(lt.LuxtorchError, match=text):
        layer(x, ps, st)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda st: lt.f64(st), "cache must have the dtype of keys[\\s\\S]*float32[\\s\\S]*float64"),
        (lambda st: {**st, "cache": {}}, "lacks the state[\\s\\S]*with_cache"),
        (lambda st: lt.update_state(st, "values", torch.ones(2, 2, 5, 4)), "cache of values has the wrong shape"),
        (lambda st: {name: st[name] for name in st if name != "cache"}, "lacks the state 'cache'"),
    ],
)
def test_a_wrong_state_is_explained(make_key, change, text):
    layer = lt.MultiHeadAttention(WIDTH, 2, is_causal=True, cache=(2, 6))
    ps, st = lt.setup(make_key(), layer)
    with pytest.raises(lt.LuxtorchError, match=text):
        layer(X, ps, change(st))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cache": (2, 6)}, "is_causal must be True with a cache"),
        ({"cache": 6, "is_causal": True}, "cache must be \\(batch_size, max_length\\)"),
        ({"cache": (2, 0), "is_causal": True}, "cache must be \\(batch_size, max_length\\)"),
        ({"cache": (), "is_causal": True}, "cache must be \\(batch_size, max_length\\)"),
        ({"rotary": lt.RotaryPositionalEmbedding(8)}, "must be 4, that of one head"),
        ({"rotary": 10_000.0}, "rotary must be a RotaryPositionalEmbedding"),
    ],
)
def test_a_wrong_construction_is_explained(options, text):
    with pytest.raises(lt.InputError, match=text):
        lt.MultiHeadAttention(WIDTH, 2, **options)
