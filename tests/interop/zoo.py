"""Architectures of other libraries, small and with random weights: how to build each, and what torch cannot do with it.

Nothing is downloaded. Builders draw from torch's generator, which the tests set.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import luxtorch as lt

BATCH = 2


@dataclass(frozen=True)
class Case:
    """An architecture.

    Attributes:
        package: What to import.
        build: What makes the module.
        inputs: What makes its inputs.
        limits: By law, what torch itself cannot do there.
        batched: Whether the first dimension of each input is that of the samples.
        tolerance: How far numbers may be apart, more where the module itself computes in float32.
    """

    package: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], lt.Inputs]
    limits: dict[str, str] = field(default_factory=dict)
    batched: bool = True
    tolerance: float = 1e-7


ZOO: dict[str, Case] = {}


def add(
    name: str, package: str, build: Any, inputs: Any, /, *, batched: bool = True, tolerance: float = 1e-7, **limits: str
) -> None:
    """Add an architecture, with what torch cannot do by law."""
    ZOO[name] = Case(package, build, inputs, limits, batched, tolerance)


def of(path: str, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """Return what calls something of a package, when it is asked to: `of("package.module.name", ...)`."""

    def build() -> Any:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return build


def reals(*shapes: tuple[int, ...], **options: Any) -> Callable[[], lt.Inputs]:
    """Return what draws normal numbers, the batch before each shape."""
    return lambda: lt.Inputs(*(torch.randn(BATCH, *shape, dtype=torch.float64) for shape in shapes), **options)


def words(*shape: int, high: int = 60) -> Tensor:
    """Draw tokens; none of them is one of the first, which have special meanings."""
    return torch.randint(5, high, shape)


def tokens(length: int = 8, **options: Any) -> Callable[[], lt.Inputs]:
    """Return what draws sentences."""
    return lambda: lt.Inputs(words(BATCH, length), **options)


# transformers


def hf(name: str, config: str, inputs: Any, /, limits: Any = (), tolerance: float = 1e-5, **options: Any) -> None:
    def build() -> nn.Module:
        transformers = importlib.import_module("transformers")
        return getattr(transformers, name)(getattr(transformers, config)(**options))

    add(name, "transformers", build, inputs, tolerance=tolerance, **dict(limits))


OLD_FUNCTION = dict.fromkeys(
    ("grad", "jvp", "models", "samples", "train"),
    "an autograd.Function without setup_context, which no transform takes",
)
SMALL = dict(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    max_position_embeddings=32,
)
GROUPED = {**SMALL, "num_key_value_heads": 1}
PLAIN = tokens()
NO_CACHE = tokens(use_cache=False)


def MASKED() -> lt.Inputs:
    """Draw sentences that end early; without a mask the model would look for padding, and warn."""
    return lt.Inputs(words(BATCH, 8), attention_mask=(torch.arange(8) < torch.tensor([[8], [6]])).long())


SEEN = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
)

hf("BertModel", "BertConfig", PLAIN, **SMALL)
hf("RobertaModel", "RobertaConfig", PLAIN, **SMALL)
hf("ElectraModel", "ElectraConfig", PLAIN, **SMALL, embedding_size=16)
hf("AlbertModel", "AlbertConfig", PLAIN, **SMALL, embedding_size=8)
hf("DistilBertModel", "DistilBertConfig", PLAIN, vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
hf("DebertaV2Model", "DebertaV2Config", MASKED, **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"])
hf("MPNetModel", "MPNetConfig", PLAIN, **SMALL)
hf("FNetModel", "FNetConfig", PLAIN, **SMALL)
hf("ModernBertModel", "ModernBertConfig", PLAIN, **SMALL, cls_token_id=1, sep_token_id=2)
hf(
    "GPT2LMHeadModel",
    "GPT2Config",
    NO_CACHE,
    vocab_size=60,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_positions=32,
    bos_token_id=1,
    eos_token_id=2,
)
hf("GPTNeoXForCausalLM", "GPTNeoXConfig", NO_CACHE, **SMALL)
hf("LlamaForCausalLM", "LlamaConfig", NO_CACHE, **GROUPED)
hf("MistralForCausalLM", "MistralConfig", NO_CACHE, **GROUPED)
hf("Qwen2ForCausalLM", "Qwen2Config", NO_CACHE, **GROUPED)
hf("Qwen3ForCausalLM", "Qwen3Config", NO_CACHE, **GROUPED, head_dim=8)
hf("Gemma2ForCausalLM", "Gemma2Config", NO_CACHE, **GROUPED, head_dim=8)
hf("Phi3ForCausalLM", "Phi3Config", NO_CACHE, **GROUPED)
hf(
    "FalconForCausalLM",
    "FalconConfig",
    NO_CACHE,
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    bos_token_id=1,
    eos_token_id=2,
)
hf("OPTForCausalLM", "OPTConfig", NO_CACHE, **SMALL, ffn_dim=32, word_embed_proj_dim=16)
hf("BloomForCausalLM", "BloomConfig", NO_CACHE, OLD_FUNCTION, vocab_size=60, hidden_size=16, n_layer=2, n_head=2)
hf("MixtralForCausalLM", "MixtralConfig", NO_CACHE, **GROUPED, num_local_experts=4, experts_implementation="batched_mm")
hf("MambaForCausalLM", "MambaConfig", NO_CACHE, vocab_size=60, hidden_size=16, num_hidden_layers=2, state_size=4)
hf(
    "T5Model",
    "T5Config",
    lambda: lt.Inputs(words(BATCH, 8), decoder_input_ids=words(BATCH, 6), use_cache=False),
    vocab_size=60,
    d_model=16,
    d_kv=8,
    num_layers=2,
    num_heads=2,
    d_ff=32,
)
hf(
    "BartModel",
    "BartConfig",
    lambda: lt.Inputs(words(BATCH, 8), decoder_input_ids=words(BATCH, 6), use_cache=False),
    vocab_size=60,
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    max_position_embeddings=32,
)
hf("XLNetModel", "XLNetConfig", PLAIN, vocab_size=60, d_model=16, n_layer=2, n_head=2, d_inner=32)
hf("ViTModel", "ViTConfig", reals((3, 16, 16)), **SEEN)
hf("Dinov2Model", "Dinov2Config", reals((3, 16, 16)), **SEEN)
hf("BeitModel", "BeitConfig", reals((3, 16, 16)), **SEEN, use_relative_position_bias=True)
hf(
    "SwinModel",
    "SwinConfig",
    reals((3, 16, 16)),
    image_size=16,
    patch_size=2,
    embed_dim=8,
    depths=[2, 2],
    num_heads=[1, 2],
    window_size=2,
)
hf("ConvNextModel", "ConvNextConfig", reals((3, 32, 32)), hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1])
hf(
    "SegformerModel",
    "SegformerConfig",
    reals((3, 32, 32)),
    hidden_sizes=[4, 8, 8, 16],
    depths=[1, 1, 1, 1],
    num_attention_heads=[1, 1, 2, 2],
)
hf("ResNetModel", "ResNetConfig", reals((3, 32, 32)), embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
hf(
    "CLIPModel",
    "CLIPConfig",
    lambda: lt.Inputs(words(BATCH, 6), torch.randn(BATCH, 3, 16, 16, dtype=torch.float64)),
    text_config={**SMALL, "eos_token_id": 59, "projection_dim": 8},
    vision_config={**SEEN, "projection_dim": 8},
    projection_dim=8,
)
hf(
    "WhisperModel",
    "WhisperConfig",
    lambda: lt.Inputs(
        torch.randn(BATCH, 8, 40, dtype=torch.float64), decoder_input_ids=words(BATCH, 6), use_cache=False
    ),
    vocab_size=60,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    num_mel_bins=8,
    max_source_positions=20,
    max_target_positions=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)
hf(
    "Wav2Vec2Model",
    "Wav2Vec2Config",
    reals((400,)),
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    conv_dim=[8, 8],
    conv_kernel=[10, 3],
    conv_stride=[5, 2],
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    apply_spec_augment=False,
)


# timm


def vision(name: str, size: int = 32, /, limits: Any = (), **options: Any) -> None:
    def build() -> nn.Module:
        timm = importlib.import_module("timm")
        return timm.create_model(name, pretrained=False, num_classes=5, **options)

    add(f"timm {name}", "timm", build, reals((3, size, size)), **dict(limits))


TINY_VIT = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
vision("resnet10t", channels=(8, 8, 16, 16))
vision("vit_tiny_patch16_224", 16, **TINY_VIT)
vision("deit3_small_patch16_224", 16, **TINY_VIT)
vision("cait_xxs24_224", 16, **TINY_VIT)
vision("xcit_nano_12_p16_224", 32, embed_dim=16, depth=2, num_heads=2)
add(
    "timm MlpMixer",
    "timm",
    of("timm.models.mlp_mixer.MlpMixer", 5, 16, patch_size=4, num_blocks=2, embed_dim=16),
    reals((3, 16, 16)),
)
vision(
    "swin_tiny_patch4_window7_224",
    16,
    img_size=16,
    patch_size=2,
    window_size=4,
    embed_dim=8,
    depths=(2, 2),
    num_heads=(1, 2),
)
vision("mobilenetv3_small_050")
vision("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 8, 16))
vision("densenet121", growth_rate=4, block_config=(1, 1, 1, 1))
vision("ghostnet_050")
vision("mobilevit_xxs")
add("timm NormFreeNet", "timm", lambda: _norm_free(), reals((3, 32, 32)))
add("timm RepVGG", "timm", lambda: _rep_vgg(), reals((3, 32, 32)))


def _norm_free() -> nn.Module:
    nfnet = importlib.import_module("timm.models.nfnet")
    return nfnet.NormFreeNet(nfnet.NfCfg((1, 1), (8, 16), stem_type="3x3", stem_chs=8, num_features=16), num_classes=5)


def _rep_vgg() -> nn.Module:
    byobnet = importlib.import_module("timm.models.byobnet")
    blocks = tuple(byobnet.ByoBlockCfg(type="rep", d=2, c=width, s=2) for width in (8, 16))
    return byobnet.ByobNet(byobnet.ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=8), num_classes=5)


# torchvision


def seen(name: str, size: int = 32, /, limits: Any = (), where: str = "models", **options: Any) -> None:
    build = of(f"torchvision.{where}.{name}", weights=None, **options)
    add(f"torchvision {name}", "torchvision", build, reals((3, size, size)), **dict(limits))


seen("mobilenet_v2", num_classes=5, width_mult=0.25)
seen("shufflenet_v2_x0_5", num_classes=5)
seen("squeezenet1_1", num_classes=5)
add("torchvision VGG", "torchvision", lambda: _vgg(), reals((3, 32, 32)))
add(
    "torchvision DenseNet",
    "torchvision",
    of("torchvision.models.DenseNet", 4, (1, 1, 1), 8, num_classes=5),
    reals((3, 32, 32)),
)
add(
    "torchvision VisionTransformer",
    "torchvision",
    of("torchvision.models.VisionTransformer", 16, 4, 2, 2, 16, 32, num_classes=5),
    reals((3, 16, 16)),
)
add(
    "torchvision SwinTransformer",
    "torchvision",
    of("torchvision.models.SwinTransformer", [2, 2], 8, [1, 1], [1, 2], [2, 2], num_classes=5),
    reals((3, 16, 16)),
)
add(
    "torchvision MaxVit",
    "torchvision",
    of("torchvision.models.MaxVit", (32, 32), 8, 2, [8, 16], [1, 1], 8, 0.1, num_classes=5),
    reals((3, 32, 32)),
)
add("torchvision ConvNeXt", "torchvision", lambda: _convnext(), reals((3, 32, 32)))
add("torchvision RegNet", "torchvision", lambda: _regnet(), reals((3, 32, 32)))
add(
    "torchvision SwinTransformer3d",
    "torchvision",
    of("torchvision.models.video.SwinTransformer3d", [2, 2, 2], 8, [1, 1], [1, 2], [2, 2, 2], num_classes=5),
    reals((3, 4, 16, 16)),
)


def _vgg() -> nn.Module:
    vgg = importlib.import_module("torchvision.models.vgg")
    layers = vgg.make_layers([4, "M", 8, "M"], batch_norm=True)
    module = vgg.VGG(layers, num_classes=5)
    module.avgpool = nn.AdaptiveAvgPool2d(2)
    module.classifier[0], module.classifier[3], module.classifier[6] = (
        nn.Linear(32, 16),
        nn.Linear(16, 16),
        nn.Linear(16, 5),
    )
    return module


def _convnext() -> nn.Module:
    convnext = importlib.import_module("torchvision.models.convnext")
    blocks = [convnext.CNBlockConfig(4, 8, 1), convnext.CNBlockConfig(8, None, 1)]
    return convnext.ConvNeXt(blocks, stochastic_depth_prob=0.1, num_classes=5)


def _regnet() -> nn.Module:
    regnet = importlib.import_module("torchvision.models.regnet")
    blocks = regnet.BlockParams.from_init_params(4, 8, 8.0, 2.0, 4, se_ratio=0.25)
    return regnet.RegNet(blocks, num_classes=5, stem_width=8)


# diffusers


def diffusion(name: str, inputs: Any, /, limits: Any = (), **options: Any) -> None:
    add(f"diffusers {name}", "diffusers", of(f"diffusers.{name}", **options), inputs, **dict(limits))


def at_times(*shapes: tuple[int, ...], **options: Any) -> Callable[[], lt.Inputs]:
    """Return what draws a sample, its times, and further tensors."""

    def draw() -> lt.Inputs:
        first, *rest = (torch.randn(BATCH, *shape, dtype=torch.float64) for shape in shapes)
        return lt.Inputs(first, torch.randint(0, 100, (BATCH,)), *rest, **options)

    return draw


CHANNELS = dict(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
diffusion(
    "UNet2DModel",
    at_times((3, 16, 16)),
    sample_size=16,
    **CHANNELS,
    attention_head_dim=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
diffusion(
    "UNet2DConditionModel",
    at_times((4, 8, 8), (5, 12)),
    sample_size=8,
    **CHANNELS,
    attention_head_dim=4,
    cross_attention_dim=12,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
diffusion(
    "AutoencoderKL",
    reals((3, 16, 16)),
    **CHANNELS,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
diffusion(
    "VQModel",
    reals((3, 16, 16)),
    **CHANNELS,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    num_vq_embeddings=8,
)
diffusion(
    "DiTTransformer2DModel",
    lambda: lt.Inputs(
        torch.randn(BATCH, 4, 8, 8, dtype=torch.float64), torch.randint(0, 100, (BATCH,)), torch.randint(0, 5, (BATCH,))
    ),
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    out_channels=4,
    num_layers=1,
    sample_size=8,
    num_embeds_ada_norm=5,
    norm_num_groups=4,
)
diffusion(
    "SD3Transformer2DModel",
    lambda: lt.Inputs(
        torch.randn(BATCH, 4, 8, 8, dtype=torch.float64),
        torch.randn(BATCH, 5, 12, dtype=torch.float64),
        torch.randn(BATCH, 10, dtype=torch.float64),
        torch.randint(0, 100, (BATCH,)),
    ),
    sample_size=8,
    patch_size=2,
    in_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=10,
    out_channels=4,
    pos_embed_max_size=8,
)


# peft


def tuned(name: str, config: str, /, limits: Any = (), **options: Any) -> None:
    def build() -> nn.Module:
        peft, transformers = map(importlib.import_module, ("peft", "transformers"))
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))
        return peft.get_peft_model(base, getattr(peft, config)(**options))

    add(
        f"peft {name}",
        "peft",
        build,
        lambda: lt.Inputs(input_ids=words(BATCH, 8), use_cache=False),
        tolerance=1e-5,
        **dict(limits),
    )


TARGETS = ["q_proj", "v_proj"]
tuned("LoRA", "LoraConfig", target_modules=TARGETS, r=2, lora_dropout=0.1, init_lora_weights=False)
tuned("DoRA", "LoraConfig", target_modules=TARGETS, r=2, use_dora=True, init_lora_weights=False)
tuned("IA3", "IA3Config", target_modules=[*TARGETS, "down_proj"], feedforward_modules=["down_proj"])
tuned(
    "LoHa",
    "LoHaConfig",
    OLD_FUNCTION,
    target_modules=TARGETS,
    r=2,
    init_weights=False,
)
tuned("OFT", "OFTConfig", target_modules=TARGETS, r=0, oft_block_size=4, init_weights=False)
tuned("prompt tuning", "PromptTuningConfig", num_virtual_tokens=3, task_type="CAUSAL_LM")


# torch_geometric


def graph(*more: tuple[int, ...]) -> Callable[[], lt.Inputs]:
    """Return what draws the features of nodes, and edges between these."""

    def draw() -> lt.Inputs:
        edges = torch.randint(0, 7, (2, 16))
        return lt.Inputs(
            torch.randn(7, 4, dtype=torch.float64), edges, *(torch.randn(shape, dtype=torch.float64) for shape in more)
        )

    return draw


def net(name: str, inputs: Any, *args: Any, limits: Any = (), where: str = "nn.models", **options: Any) -> None:
    add(
        f"torch_geometric {name}",
        "torch_geometric",
        of(f"torch_geometric.{where}.{name}", *args, **options),
        inputs,
        batched=False,
        **dict(limits),
    )


net("GCN", graph(), 4, 8, 2, 3, dropout=0.1)
net("GAT", graph(), 4, 8, 2, 3, dropout=0.1, heads=2)
net("GraphSAGE", graph(), 4, 8, 2, 3, norm="batch")
net("GIN", graph(), 4, 8, 2, 3)
net("EdgeCNN", graph(), 4, 8, 2, 3)
net(
    "PNA",
    graph(),
    4,
    8,
    2,
    3,
    aggregators=["mean", "max", "std"],
    scalers=["identity", "amplification"],
    deg=torch.tensor([0, 1, 3, 2, 1]),
)
net("TransformerConv", graph(), 4, 8, heads=2, where="nn")

# x-transformers


def x_former(name: str, build: Any, inputs: Any, tolerance: float = 1e-5) -> None:
    """Add an architecture; its attention takes the softmax in float32, unless queries and keys are normalized."""
    add(f"x_transformers {name}", "x_transformers", build, inputs, tolerance=tolerance)


def _x(name: str, part: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        x_transformers = importlib.import_module("x_transformers")
        layers = getattr(x_transformers, part)(dim=16, depth=2, heads=2, **options.get("layers", {}))
        return getattr(x_transformers, name)(attn_layers=layers, **options["model"])

    return build


WORDS = dict(num_tokens=60, max_seq_len=16)
x_former("decoder", _x("TransformerWrapper", "Decoder", model=WORDS, layers=dict(attn_dim_head=8)), PLAIN)
x_former(
    "rotary decoder",
    _x(
        "TransformerWrapper",
        "Decoder",
        model=WORDS,
        layers=dict(attn_dim_head=8, rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True, attn_qk_norm=True),
    ),
    PLAIN,
    tolerance=1e-7,
)
x_former(
    "encoder",
    _x(
        "TransformerWrapper",
        "Encoder",
        model={**WORDS, "emb_dropout": 0.1},
        layers=dict(attn_dim_head=8, attn_dropout=0.1, ff_dropout=0.1),
    ),
    PLAIN,
)
x_former(
    "ViTransformerWrapper",
    _x(
        "ViTransformerWrapper",
        "Encoder",
        model=dict(image_size=16, patch_size=4, num_classes=5),
        layers=dict(attn_dim_head=8),
    ),
    reals((3, 16, 16)),
)
x_former(
    "ContinuousTransformerWrapper",
    _x(
        "ContinuousTransformerWrapper",
        "Encoder",
        model=dict(dim_in=3, dim_out=2, max_seq_len=16),
        layers=dict(attn_dim_head=8),
    ),
    reals((8, 3)),
)


# vit-pytorch


def vit(name: str, where: str = "", size: int = 16, /, limits: Any = (), **options: Any) -> None:
    add(
        f"vit_pytorch {name}",
        "vit_pytorch",
        of(f"vit_pytorch{where}.{name}", **options),
        reals((3, size, size)),
        **dict(limits),
    )


VIT = dict(image_size=16, patch_size=4, num_classes=5, dim=16, depth=2, heads=2, mlp_dim=32)
vit("ViT", **VIT, dropout=0.1, emb_dropout=0.1, dim_head=8)
vit("SimpleViT", **VIT, dim_head=8)
vit("CaiT", ".cait", **VIT, cls_depth=1, dim_head=8)
vit("DeepViT", ".deepvit", **VIT, dim_head=8)
vit(
    "CCT",
    ".cct",
    img_size=16,
    embedding_dim=16,
    n_conv_layers=1,
    kernel_size=3,
    stride=2,
    padding=1,
    num_layers=2,
    num_heads=2,
    mlp_ratio=2.0,
    num_classes=5,
)
vit(
    "CvT",
    ".cvt",
    32,
    num_classes=5,
    s1_emb_dim=8,
    s1_depth=1,
    s2_emb_dim=8,
    s2_heads=1,
    s2_depth=1,
    s3_emb_dim=16,
    s3_heads=2,
    s3_depth=1,
)
vit("MaxViT", ".max_vit", 32, num_classes=5, dim_conv_stem=8, dim=8, dim_head=8, depth=(1, 1), window_size=4)
vit(
    "NesT", ".nest", image_size=16, patch_size=4, dim=8, heads=2, num_hierarchies=2, block_repeats=(1, 1), num_classes=5
)
vit(
    "MobileViT",
    ".mobile_vit",
    64,
    image_size=(64, 64),
    dims=[8, 12, 16],
    channels=[4, 4, 4, 4, 8, 8, 8, 8, 16, 16, 16],
    num_classes=5,
)


# monai


def medical(name: str, inputs: Any, /, limits: Any = (), **options: Any) -> None:
    add(f"monai {name}", "monai", of(f"monai.networks.nets.{name}", **options), inputs, **dict(limits))


TWO_D = dict(spatial_dims=2, in_channels=1, out_channels=2)
medical("UNet", reals((1, 16, 16)), **TWO_D, channels=(4, 8, 8), strides=(2, 2), num_res_units=1, dropout=0.1)
medical("BasicUNet", reals((1, 32, 32)), **TWO_D, features=(4, 4, 8, 8, 8, 4))
medical("AttentionUnet", reals((1, 16, 16)), **TWO_D, channels=(4, 8, 8), strides=(2, 2))
medical("SegResNet", reals((1, 16, 16)), **TWO_D, init_filters=8, blocks_down=(1, 1), blocks_up=(1,))
medical(
    "DynUNet",
    reals((1, 16, 16)),
    **TWO_D,
    kernel_size=[3, 3, 3],
    strides=[1, 2, 2],
    upsample_kernel_size=[2, 2],
    filters=[4, 8, 8],
)
medical(
    "UNETR",
    reals((1, 16, 16, 16)),
    in_channels=1,
    out_channels=2,
    img_size=16,
    feature_size=4,
    hidden_size=12,
    mlp_dim=16,
    num_heads=2,
)
medical("VNet", reals((1, 16, 16)), **TWO_D)
medical("AutoEncoder", reals((1, 16, 16)), **TWO_D, channels=(4, 8), strides=(2, 2))
medical(
    "DiffusionModelUNet",
    lambda: lt.Inputs(torch.randn(BATCH, 1, 16, 16, dtype=torch.float64), torch.randint(0, 100, (BATCH,))),
    **TWO_D,
    num_res_blocks=(1, 1),
    channels=(8, 8),
    attention_levels=(False, True),
    norm_num_groups=4,
    num_head_channels=4,
)


# nflows


class LogProb(nn.Module):
    """Call a flow, which has no forward, for the logarithm of its density."""

    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)  # type: ignore[no-any-return]


def _flow(make: Callable[[Any], list[nn.Module]]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transforms = importlib.import_module("nflows.transforms")
        normal = importlib.import_module("nflows.distributions.normal").StandardNormal([4])
        flow = importlib.import_module("nflows.flows.base").Flow(
            transforms.CompositeTransform(make(transforms)), normal
        )
        return LogProb(flow)

    return build


add(
    "nflows MAF",
    "nflows",
    _flow(
        lambda t: [
            t.ReversePermutation(features=4),
            t.MaskedAffineAutoregressiveTransform(features=4, hidden_features=8),
            t.BatchNorm(4),
            t.MaskedAffineAutoregressiveTransform(features=4, hidden_features=8),
        ]
    ),
    reals((4,)),
)
add(
    "nflows spline flow",
    "nflows",
    _flow(
        lambda t: [
            t.LULinear(4),
            t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                features=4, hidden_features=8, num_bins=4, tails="linear", tail_bound=4.0
            ),
        ]
    ),
    reals((4,)),
    **dict.fromkeys(("models", "samples", "jit"), "what is inside of the bounds is picked by a boolean mask"),
)
add("nflows RealNVP", "nflows", lambda: LogProb(of("nflows.flows.realnvp.SimpleRealNVP", 4, 8, 2, 1)()), reals((4,)))


# neuraloperator

add(
    "neuralop FNO",
    "neuralop",
    of("neuralop.models.FNO", n_modes=(4, 4), hidden_channels=8, in_channels=1, out_channels=1, n_layers=2),
    reals((1, 8, 8)),
)
add(
    "neuralop FNO1d",
    "neuralop",
    of("neuralop.models.FNO", n_modes=(4,), hidden_channels=8, in_channels=1, out_channels=1, n_layers=2),
    reals((1, 16)),
)
add(
    "neuralop UNO",
    "neuralop",
    of(
        "neuralop.models.UNO",
        in_channels=1,
        out_channels=1,
        hidden_channels=8,
        n_layers=3,
        uno_out_channels=[8, 8, 8],
        uno_n_modes=[[4, 4]] * 3,
        uno_scalings=[[1, 1]] * 3,
        channel_mlp_skip="linear",
    ),
    reals((1, 8, 8)),
    tolerance=1e-5,
)


# torchdiffeq


class NeuralODE(nn.Module):
    """Follow a field from 0 to 1."""

    def __init__(self, solver: str, **options: Any) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
        self.solver, self.options = solver, options

    def forward(self, x: Tensor) -> Tensor:
        solve = getattr(importlib.import_module("torchdiffeq"), self.solver)
        times = torch.tensor([0.0, 1.0], dtype=x.dtype)
        return solve(lambda t, y: self.field(y), x, times, **self.options)[-1]  # type: ignore[no-any-return]


add(
    "torchdiffeq odeint",
    "torchdiffeq",
    lambda: NeuralODE("odeint", method="rk4", options={"step_size": 0.25}),
    reals((3,)),
)


FAULTS = dict.fromkeys(
    (("BloomForCausalLM", "jit"), ("peft LoHa", "jit")),
    "torch.func.grad inside of lt.jit takes no autograd.Function without setup_context; that in torch.compile does",
)
"""What torch can do and luxtorch cannot, by architecture and law."""
