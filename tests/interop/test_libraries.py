"""Architectures of timm and transformers, with random weights; where these are installed (the extra `interop-test`)."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, jvp, vmap

import luxtorch as lt
from luxtorch.core import named_leaves

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TIMM = {
    "resnet10t": 64,
    "vit_tiny_patch16_224": 224,
    "efficientnet_b0": 64,
    "mobilenetv3_small_050": 64,
    "convnext_atto": 64,
    "regnetx_002": 64,
    "densenet121": 64,
    "swin_tiny_patch4_window7_224": 224,
    "mixer_s32_224": 224,
    "ghostnet_050": 64,
}

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 1}
TRANSFORMERS = {
    "BertModel": ("BertConfig", SMALL),
    "RobertaModel": ("RobertaConfig", SMALL),
    "ElectraModel": ("ElectraConfig", {**SMALL, "embedding_size": 16}),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "MistralForCausalLM": ("MistralConfig", GROUPED),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "DistilBertModel": (
        "DistilBertConfig",
        {"vocab_size": 60, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    ),
    "OPTForCausalLM": ("OPTConfig", {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "T5Model": ("T5Config", {"vocab_size": 60, "d_model": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2, "d_ff": 32}),
}


def number(y):
    for name in ("logits", "last_hidden_state"):
        y = getattr(y, name, y)
    return y.square().mean()


def check(module, x):
    """Compare output and gradients in test mode; in train mode see that it runs, from the key, under transforms."""
    module.eval()
    layer, ps, st = lt.from_torch(module)
    assert list(dict(named_leaves(ps))) == [name for name, _ in module.named_parameters()]
    args, kwargs = (x.args, x.kwargs) if isinstance(x, lt.Inputs) else ((x,), {})

    def loss(ps, st):
        y, st = layer(x, ps, st)
        return number(y), st

    theirs = number(module(*args, **kwargs))
    theirs.backward()
    grads, _ = grad(loss, has_aux=True)(ps, st)
    torch.testing.assert_close(loss(ps, st)[0], theirs)
    for name, ours in named_leaves(grads):
        wanted = module.get_parameter(name).grad
        torch.testing.assert_close(ours, torch.zeros_like(ours) if wanted is None else wanted, rtol=1e-4, atol=1e-6)
    before, training = torch.get_rng_state(), lt.train_mode(st)
    many = lt.stack([(ps, training), (ps, lt.update_state(training, "rng", lt.random.key(1)))])
    values, _ = vmap(loss)(*many)
    torch.testing.assert_close(values[0], loss(ps, training)[0], rtol=1e-4, atol=1e-6)
    _, along = jvp(lambda ps: loss(ps, st)[0], (ps,), (grads,))
    squares = sum(leaf.square().sum() for leaf in torch.utils._pytree.tree_leaves(grads))
    torch.testing.assert_close(along, squares, rtol=1e-3, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name, make_key):
    timm = pytest.importorskip("timm", exc_type=ImportError)
    module = timm.create_model(name, pretrained=False, num_classes=5)
    check(module, lt.random.normal(make_key(), (2, 3, TIMM[name], TIMM[name])))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name, make_key):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config, options = TRANSFORMERS[name]
    module = getattr(transformers, name)(getattr(transformers, config)(**options))
    tokens = lt.random.randint(make_key(), (2, 8), 3, 60)
    more = {"decoder_input_ids": tokens} if name == "T5Model" else {}
    check(module, lt.Inputs(input_ids=tokens, use_cache=False, **more) if "LM" in name else lt.Inputs(tokens, **more))
