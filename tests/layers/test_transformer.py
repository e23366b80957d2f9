"""The layers of a transformer: the laws, and torch's numbers."""

from __future__ import annotations

import pytest
import torch

import luxtorch as lt
from luxtorch import TransformerDecoder, TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer

KEEP = torch.tensor([[False, False, False], [True, True, False], [True, False, True]])
PADDING = torch.tensor([[True, False, True, True], [False, False, False, False]])[:, None, None, :]

X, KV = (2, 3, 4), (2, 4, 4)
FORMS = {
    "encoder": (TransformerEncoderLayer(4, 2, 5, dropout=0.3), [X]),
    "encoder, norm first, gelu": (
        TransformerEncoderLayer(4, 2, 5, dropout=0.0, norm_first=True, activation="gelu", is_causal=True),
        [(3, 4)],
    ),
    "encoder, rotary": (TransformerEncoderLayer(4, 2, 3, dropout=0.0, rotary=lt.RotaryPositionalEmbedding(2)), [X]),
    "encoder, mask, no bias": (TransformerEncoderLayer(4, 1, 3, dropout=0.0, bias=False), [(X, KEEP)]),
    "decoder": (TransformerDecoderLayer(4, 2, 3, dropout=0.3, is_causal=True), [(X, KV)]),
    "decoder, norm first, masks": (
        TransformerDecoderLayer(4, 2, 3, dropout=0.0, norm_first=True, activation=torch.tanh),
        [(X, KV, KEEP, PADDING)],
    ),
    "encoder stack, mask": (
        TransformerEncoder(TransformerEncoderLayer(4, 2, 3, dropout=0.3), 2, lt.LayerNorm(4)),
        [(X, KEEP)],
    ),
    "decoder stack, masks": (
        TransformerDecoder(TransformerDecoderLayer(4, 2, 3, dropout=0.0), 2),
        [(X, KV, KEEP, PADDING)],
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * ("stack" in n)) for n in FORMS])
def test_every_law_holds(check_laws, name):
    check_laws(*FORMS[name])


def test_eight_models_are_one_call(make_key, draw):
    layer = TransformerEncoderLayer(4, 2, 5, is_causal=True)
    models = [lt.setup(key, layer) for key in lt.random.split(make_key(), 8)]
    ps, st = lt.core.tree_map(lambda *leaves: torch.stack(leaves), *models)
    x = draw((X, KEEP))
    got, _ = torch.vmap(layer, in_dims=(None, 0, 0))(x, ps, st)
    torch.testing.assert_close(got, torch.stack([layer(x, *model)[0] for model in models]))


def flat_names(name):
    """Return where torch keeps a parameter of ours, and which third of it that is, if it is one."""
    path, last = name.rsplit(".", 1)
    if path.endswith(("q_proj", "k_proj", "v_proj")):
        path, projection = path.rsplit(".", 1)
        return f"{path}.in_proj_{last}", "qkv".index(projection[0])
    return name, None


def parameters_of(key, layer, module, dtype):
    """Draw parameters, and give them to a module of torch."""
    ps, _ = lt.setup(key, layer)
    state = {name: torch.empty_like(value) for name, value in module.state_dict().items()}
    drawn_ps = {}
    for i, (name, leaf) in enumerate(lt.core.named_leaves(ps)):
        value = lt.random.normal(lt.random.fold_in(key, i), leaf.shape, mean=0.2, dtype=dtype)
        place, third = flat_names(name)
        (state[place] if third is None else state[place].chunk(3)[third]).copy_(value)
        drawn_ps[name] = value
    module.load_state_dict(state)
    return ps, drawn_ps


def nested(ps, values, path=""):
    return {
        name: nested(entry, values, f"{path}{name}.") if isinstance(entry, dict) else values[f"{path}{name}"]
        for name, entry in ps.items()
    }


OPTIONS = {
    "plain": {},
    "norm first": {"norm_first": True, "activation": "gelu"},
    "eps": {"eps": 0.1},
    "no bias": {"bias": False},
    "causal": {"is_causal": True},
    "mask": {},
    "mask, norm first": {"norm_first": True},
    "unbatched": {},
}
ATTENDING = torch.tensor([[True, False, False], [True, True, False], [True, False, True]])
MEMORY = torch.tensor([[True, False, True, True], [True, True, False, False]])


@pytest.mark.parametrize("mode", [lt.train_mode, lt.test_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("name", OPTIONS)
def test_numbers_and_gradients_are_those_of_torch(make_key, draw, name, kind, dtype, mode):
    options = {"dropout": 0.0 if mode is lt.train_mode else 0.1, **OPTIONS[name]}
    ours, theirs = {
        "encoder": (TransformerEncoderLayer, torch.nn.TransformerEncoderLayer),
        "decoder": (TransformerDecoderLayer, torch.nn.TransformerDecoderLayer),
    }[kind]
    layer = ours(4, 2, 6, **options)
    is_causal = options.pop("is_causal", False)
    options = {("layer_norm_eps" if option == "eps" else option): value for option, value in options.items()}
    module = theirs(4, 2, 6, batch_first=True, **options).to(dtype).train(mode is lt.train_mode)
    ps, values = parameters_of(make_key(), layer, module, dtype)
    ps, st = nested(ps, values), mode(lt.setup(0, layer)[1])

    mask = ATTENDING if name.startswith("mask") else None
    padding = MEMORY if mask is not None and kind == "decoder" else None
    batch = () if name == "unbatched" else (2,)
    shapes = ((*batch, 3, 4), (*batch, 4, 4))[: 1 if kind == "encoder" else 2]
    xs = draw(shapes, dtype)
    masks = () if mask is None else (mask,) if padding is None else (mask, padding[:, None, None, :])
    x = xs[0] if len(xs) + len(masks) == 1 else (*xs, *masks)

    attending = ATTENDING.new_ones(3, 3).tril() if is_causal else mask
    dropped = None if attending is None else ~attending
    keywords = {"src_mask": dropped} if kind == "encoder" else {"tgt_mask": dropped}
    if padding is not None:
        keywords["memory_key_padding_mask"] = ~padding
    expected = module(*xs, **keywords)
    (expected**2).sum().backward()

    y, new = layer(x, ps, st)
    assert new == st
    torch.testing.assert_close(y, expected)
    gradient = torch.func.grad(lambda ps: (layer(x, ps, st)[0] ** 2).sum())(ps)
    theirs = dict(module.named_parameters())
    # Some gradients are sums of large numbers that cancel: errors are to be compared with the largest of all gradients.
    scale = max(float(parameter.grad.abs().max()) for parameter in theirs.values())
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for path, leaf in lt.core.named_leaves(gradient):
        place, third = flat_names(path)
        found = theirs[place].grad if third is None else theirs[place].grad.chunk(3)[third]
        torch.testing.assert_close(leaf, found, rtol=tolerance, atol=tolerance * scale)


def test_a_sequence_that_is_all_padding_stays_finite(make_key, draw):
    layer = TransformerDecoderLayer(4, 2, 5, dropout=0.2)
    ps, st = lt.setup(make_key(), layer)
    x = draw((X, KV, KEEP, PADDING))
    y, _ = layer(x, ps, st)
    gradient = torch.func.grad(lambda ps: layer(x, ps, st)[0].sum())(ps)
    assert all(leaf.isfinite().all() for leaf in [y, *lt.core.tree_leaves(gradient)])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (1, 1, 4)])
def test_empty_and_single_sequences(make_key, shape):
    encoder, decoder = TransformerEncoderLayer(4, 2, 5), TransformerDecoderLayer(4, 2, 5, is_causal=True)
    x = lt.random.normal(make_key(), shape)
    assert encoder(x, *lt.setup(make_key(), encoder))[0].shape == shape
    assert decoder((x, x), *lt.setup(make_key(), decoder))[0].shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm_first", [False, True])
def test_half_precision_is_that_of_double_precision(make_key, dtype, norm_first):
    layer = TransformerEncoderLayer(8, 2, 16, norm_first=norm_first, is_causal=True)
    ps, st = lt.setup(make_key(), layer)
    ps, st = lt.core.tree_map(lambda leaf: leaf.to(dtype), ps), lt.test_mode(st)
    x = lt.random.normal(make_key(), (2, 5, 8)).to(dtype)
    expected = layer(x.double(), lt.f64(ps), st)[0].to(dtype)
    torch.testing.assert_close(layer(x, ps, st)[0], expected, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(torch.vmap(lambda x: layer(x, ps, st)[0])(x), expected, rtol=5e-2, atol=5e-2)


def test_masks_may_be_left_out_or_none(make_key, draw):
    layer = TransformerDecoderLayer(4, 2, 5, dropout=0.0)
    ps, st = lt.setup(make_key(), layer)
    x, memory = draw((X, KV))
    expected = layer((x, memory), ps, st)[0]
    for masks in [(None,), (None, None)]:
        assert torch.equal(layer((x, memory, *masks), ps, st)[0], expected)
    assert not torch.equal(layer((x, memory, KEEP), ps, st)[0], expected)
    assert not torch.equal(layer((x, memory, None, PADDING), ps, st)[0], expected)


def test_dropouts_draw_apart_and_anew(make_key):
    layer = TransformerEncoderLayer(4, 2, 5, dropout=0.5)
    ps, st = lt.setup(make_key(), layer)
    keys = [leaf for name, leaf in lt.core.named_leaves(st) if name.endswith("rng")]
    assert len(keys) == 4 == len({tuple(key.tolist()) for key in keys})
    x = lt.random.normal(make_key(), (2, 3, 4))
    y, new = layer(x, ps, st)
    assert torch.equal(layer(x, ps, st)[0], y) and not torch.equal(layer(x, ps, new)[0], y)


@pytest.mark.parametrize(
    ("layer", "x", "text"),
    [
        (TransformerEncoderLayer(4, 2, 5), torch.ones(2, 3, 5), "self_attn.q_proj[\\s\\S]*\\(..., 4\\)"),
        (
            TransformerEncoderLayer(4, 2, 5),
            (torch.ones(2, 3, 4),) * 3,
            "must have . to . parts[\\s\\S]*\\(x, mask\\)",
        ),
        (TransformerDecoderLayer(4, 2, 5), torch.ones(2, 3, 4), "must have . to . parts[\\s\\S]*memory_mask\\)"),
        (
            TransformerDecoderLayer(4, 2, 5),
            (torch.ones(2, 3, 4), torch.ones(2, 3, 5)),
            "multihead_attn.k_proj[\\s\\S]*\\(..., 4\\)",
        ),
        (
            TransformerEncoderLayer(4, 2, 5),
            (torch.ones(2, 3, 4), torch.ones(2, 3).bool()),
            "self_attn \\(Multi[\\s\\S]*\\[:, None, None, :\\]",
        ),
    ],
)
def test_a_wrong_input_is_explained(layer, x, text):
    with pytest.raises(lt.InputError, match=text):
        layer(x, *lt.setup(0, layer))


@pytest.mark.parametrize("kind", [TransformerEncoderLayer, TransformerDecoderLayer])
def test_heads_divide_the_width(kind):
    with pytest.raises(lt.InputError, match="multiple of num_heads"):
        kind(4, 3)


def test_children_have_the_names_of_torch():
    for layer, module in [
        (TransformerEncoderLayer(4, 2, 5, norm_first=True), torch.nn.TransformerEncoderLayer(4, 2, 5)),
        (TransformerDecoderLayer(4, 2, 5), torch.nn.TransformerDecoderLayer(4, 2, 5)),
    ]:
        assert list(layer.children()) == [name for name, _ in module.named_children()]
        assert layer.extra_repr() == ("norm_first=True" if layer.norm_first else "")


BLOCK = {"dropout": 0.0, "activation": "gelu"}
STACKS = {
    "encoder": (TransformerEncoder, TransformerEncoderLayer, torch.nn.TransformerEncoder),
    "decoder": (TransformerDecoder, TransformerDecoderLayer, torch.nn.TransformerDecoder),
}


def stack_of(kind, depth, norm_first):
    """Return a stack, and torch's; both end with a norm where the layers normalize first."""
    stack, ours, theirs = STACKS[kind]
    one = {"encoder": torch.nn.TransformerEncoderLayer, "decoder": torch.nn.TransformerDecoderLayer}[kind]
    layer, block = (
        ours(4, 2, 6, norm_first=norm_first, **BLOCK),
        one(4, 2, 6, norm_first=norm_first, batch_first=True, **BLOCK),
    )
    nested = {"enable_nested_tensor": False} if kind == "encoder" else {}
    norms = (lt.LayerNorm(4), torch.nn.LayerNorm(4)) if norm_first else (None, None)
    return stack(layer, depth, norms[0]), theirs(block, depth, norm=norms[1], **nested).double()


def filled(key, stack, module):
    """Draw parameters, and give them to the module of torch."""
    ps, st = lt.setup(key, stack)
    state = module.state_dict()
    for i, (name, leaf) in enumerate(lt.flatten_names(ps).items()):
        first, rest = name.split(".", 1)
        value = lt.random.normal(lt.random.fold_in(key, i), leaf.shape, mean=0.2, dtype=torch.float64)
        ps = lt.unflatten_names({name: value}, like=ps)
        place, third = flat_names(f"layers.{int(first.removeprefix('layer_')) - 1}.{rest}" if first != "norm" else name)
        (state[place] if third is None else state[place].chunk(3)[third]).copy_(value)
    return ps, st


LENGTHS = torch.tensor([[True, True, True], [True, True, False]])
CAUSAL = torch.ones(3, 3).tril().bool()
MASKS = {
    "none": (None, {}),
    "padding": (LENGTHS[:, None, None, :], {"key_padding_mask": ~LENGTHS}),
    "causal": (CAUSAL, {"mask": ~CAUSAL}),
    "both": (LENGTHS[:, None, None, :] & CAUSAL, {"key_padding_mask": ~LENGTHS, "mask": ~CAUSAL}),
}


def of_torch(kind, module, xs, given, memory_padding):
    if kind == "encoder":
        names = {"key_padding_mask": "src_key_padding_mask", "mask": "mask"}
        return module(*xs, **{names[name]: mask for name, mask in given.items()})
    names = {"key_padding_mask": "tgt_key_padding_mask", "mask": "tgt_mask"}
    padding = {} if memory_padding is None else {"memory_key_padding_mask": memory_padding}
    return module(*xs, **{names[name]: mask for name, mask in given.items()}, **padding)


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", MASKS)
class TestStacks:
    """Three layers: a mask reaches every one of them, as in torch."""

    @pytest.fixture
    def case(self, kind, norm_first, mask, make_key, draw):
        stack, module = stack_of(kind, 3, norm_first)
        ps, st = filled(make_key(), stack, module)
        mine, given = MASKS[mask]
        xs = draw((X, KV)[: 1 if kind == "encoder" else 2], torch.float64)
        memory = MEMORY if kind == "decoder" and mask != "none" else None
        x = (*xs, mine) if kind == "encoder" else (*xs, mine, None if memory is None else memory[:, None, None, :])
        expected = of_torch(kind, module, xs, given, None if memory is None else ~memory)
        return stack, module, ps, st, xs, x, expected, (given, memory)

    def test_numbers_are_those_of_torch(self, case, kind, mask):
        stack, module, ps, st, xs, x, expected, _ = case
        y, new = stack(x, ps, st)
        torch.testing.assert_close(y, expected)
        assert lt.core.tree_leaves(new) is not None and new.keys() == st.keys()

    @pytest.mark.slow
    def test_under_transforms(self, case, kind, mask):
        stack, module, ps, st, xs, x, expected, _ = case
        loss = lambda ps: stack(x, ps, st)[0].square().sum()  # noqa: E731
        expected.square().sum().backward()
        grads = lt.gradient(loss, ps)
        wanted = [p.grad for name, p in module.named_parameters() if name.startswith("layers.2.linear1")]
        torch.testing.assert_close(list(grads["layer_3"]["linear1"].values()), wanted)
        jitted = lt.jit(lambda ps: lt.gradient(loss, ps), backend="replay")
        torch.testing.assert_close(jitted(ps), grads)
        many = lt.stack([ps, lt.core.tree_map(torch.neg, ps)])
        found, _ = torch.vmap(lambda ps: stack(x, ps, st))(many)
        torch.testing.assert_close(found[0], expected.detach())

    def test_from_torch(self, case, kind, mask):
        _, module, _, _, xs, _, expected, (given, memory) = case
        layer, ps, st = lt.from_torch(module)

        def call(*args, **kwargs):
            return layer(lt.Inputs(*args, **kwargs), ps, st)[0]

        found = of_torch(kind, call, xs, given, None if memory is None else ~memory)
        torch.testing.assert_close(found, expected)


LAYER = TransformerEncoderLayer(4, 2, 5, dropout=0.0)
ATTENTION = lt.MultiHeadAttention(4, 2)
LOSING = {
    "chain": lt.Chain(LAYER, LAYER),
    "with others between": lt.Chain(LAYER, torch.tanh, lt.Dense(4, 4), LAYER),
    "chain in a chain": lt.Chain(lt.Chain(LAYER), lt.Chain(lt.Dense(4, 4), LAYER)),
    "chain alone in a chain": lt.Chain(lt.Chain(LAYER, LAYER), lt.Dense(4, 4)),
    "stacks": lt.Chain(TransformerEncoder(LAYER, 2), TransformerEncoder(LAYER, 2)),
    "wrapped": lt.Chain(lt.Checkpointed(LAYER), LAYER),
    "in a skip connection": lt.Chain(LAYER, lt.SkipConnection(LAYER, torch.add)),
    "after an embedding": lt.Chain(lt.Parallel(None, lt.Dense(4, 4), lt.NoOpLayer()), LAYER, LAYER),
    "repeated": lt.RepeatedLayer(LAYER, 3),
    "then attention": lt.Chain(LAYER, ATTENTION),
}


@pytest.mark.parametrize("model", LOSING.values(), ids=LOSING)
def test_a_mask_is_not_lost(model, draw):
    """No layer after the first runs without the mask in silence."""
    ps, st = lt.setup(0, model)
    with pytest.raises(lt.InputError, match="passes a mask only"):
        model(draw((X, KEEP)), ps, st)
    if model is not LOSING["after an embedding"]:
        model(draw(X), ps, st)


def test_a_mask_of_attention_is_not_lost(draw):
    model = lt.Chain(ATTENTION, ATTENTION)
    ps, st = lt.setup(0, model)
    x = draw(X)
    with pytest.raises(lt.InputError, match="passes a mask only"):
        model((x, x, x, KEEP), ps, st)
    model((x, x), ps, st)


def test_one_layer_that_takes_a_mask_may_stand_in_a_chain(draw):
    model = lt.Chain(TransformerEncoder(LAYER, 2), lt.Dense(4, 4))
    ps, st = lt.setup(0, model)
    x, mask = draw((X, KEEP))
    expected, _ = model[:1]((x, mask), {"layer_1": ps["layer_1"]}, {"layer_1": st["layer_1"]})
    torch.testing.assert_close(model((x, mask), ps, st)[0], lt.Dense(4, 4)(expected, ps["layer_2"], {})[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: TransformerEncoder(LAYER, 0),
        lambda: TransformerEncoder(LAYER, True),
        lambda: TransformerEncoder(TransformerDecoderLayer(4, 2), 2),
        lambda: TransformerDecoder(LAYER, 2),
        lambda: TransformerEncoder(LAYER, 2, torch.tanh),
    ],
)
def test_stacks_that_are_refused(make):
    with pytest.raises(lt.InputError, match="Transformer(En|De)coder|num_layers must be|norm must be"):
        make()
