"""Tiny random models of many architectures, and what tests need to convert and compare them.

B batch, T time, V vocabulary
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from linearize.architecture import linearize_
from linearize.modeling_linearized import linear_attentions
from linearize.recipe import AttentionSettings, FeatureMapSettings, KeepSoftmaxSettings

VOCABULARY = 96
WINDOW, SINKS = 5, 2

_COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
_SLIDING_AND_FULL = dict(num_hidden_layers=4, sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2)

# name -> (model type, what its config has beyond _COMMON); at least two full-attention layers in each
ARCHITECTURES = {
    "llama": ("llama", {}),
    "mistral": ("mistral", dict(sliding_window=None)),
    "mixtral": ("mixtral", dict(sliding_window=None, num_local_experts=4)),
    "qwen2": ("qwen2", dict(use_sliding_window=False)),
    "qwen2_moe": ("qwen2_moe", dict(**_EXPERTS, shared_expert_intermediate_size=32)),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "qwen3_moe": ("qwen3_moe", dict(**_EXPERTS, head_dim=8)),
    "gemma": ("gemma", dict(head_dim=16)),
    "gemma2": (
        "gemma2",
        dict(
            **_SLIDING_AND_FULL,
            head_dim=8,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=2.0,
            attn_implementation="eager",  # sdpa of older transformers leaves softcapping out
        ),
    ),
    "gemma3": ("gemma3_text", dict(**_SLIDING_AND_FULL, head_dim=8, query_pre_attn_scalar=8)),
    "phi": ("phi", dict(num_key_value_heads=4)),
    "phi3": ("phi3", dict(sliding_window=None)),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmoe": ("olmoe", dict(num_experts=4, num_experts_per_tok=2)),
    "granite": ("granite", dict(attention_multiplier=0.4, residual_multiplier=0.5, logits_scaling=2.0)),
    "smollm3": (
        "smollm3",
        dict(num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0], use_sliding_window=False),
    ),
    "cohere": ("cohere", dict(use_qk_norm=True)),
    "cohere2": ("cohere2", _SLIDING_AND_FULL),
    "gpt_oss": (
        "gpt_oss",
        dict(
            **_SLIDING_AND_FULL,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
    ),  # fmt: skip
    "starcoder2": ("starcoder2", dict(sliding_window=None)),
    "glm": ("glm", dict(head_dim=8)),
    "ernie4_5": ("ernie4_5", dict(head_dim=8)),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", dict(ffn_dim=48, word_embed_proj_dim=32)),
    "qwen3_next": (
        "qwen3_next",
        dict(
            **_EXPERTS,
            num_hidden_layers=4,
            layer_types=["linear_attention", "full_attention"] * 2,
            head_dim=8,
            shared_expert_intermediate_size=16,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
    ),  # fmt: skip
}


def make_model(name: str = "llama", *, seed: int = 0, dtype=torch.float32, **settings):
    """A random model in eval mode, float32 unless told, whose logits depend strongly on distant tokens."""
    model_type, extra = ARCHITECTURES.get(name, (name, {}))
    return make_from_config(
        AutoConfig.for_model(model_type, **{**_COMMON, **extra, **settings}), seed=seed, dtype=dtype
    )


def make_from_config(config, *, seed: int = 0, dtype=torch.float32):
    """A random model of this config, with weights larger than transformers' own start values."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.ndim == 1:  # norms, biases, GPT-OSS's sinks
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None  # never stop early
    return model


def attention(*, window=WINDOW, sinks=SINKS, name="taylor", dim=4, per="kv_head", decay=True, keep_softmax=(),
              heads=()):  # fmt: skip
    """The recipe's attention section, small; `keep_softmax` layers, and `heads`, pairs, stay softmax."""
    keep = KeepSoftmaxSettings(layers=list(keep_softmax), heads=[list(pair) for pair in heads])
    feature_map = FeatureMapSettings(name=name, dim=dim, per=per)
    return AttentionSettings(
        window=window, sinks=sinks, feature_map=feature_map, decay=decay, keep_softmax=keep
    )


def convert(model, *, seed: int = 0, **settings):
    """`linearize_` with every learned parameter random, so that no part of the far term is trivially zero."""
    linearize_(model, attention(**settings))
    randomise(model, seed=seed)
    return model


@torch.no_grad()
def randomise(model, *, seed: int = 0) -> None:
    """Maps, centres, gates and decays that all take part visibly."""
    generator = torch.Generator().manual_seed(seed)
    for linear_attn in linear_attentions(model).values():
        for name, parameter in linear_attn.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale, offset = {
                "gate_bias": (0.5, 0.0),
                "decay_logit": (0.5, -2.0),
                "key_center": (1.0, 0.0),
            }.get(name, (0.7 * linear_attn.head_dim**-0.5, 0.0))
            parameter.copy_(offset + scale * noise)


def make_tokens(batch: int = 2, length: int = 24, *, seed: int = 0) -> torch.Tensor:
    """[B, T] random tokens, none of them padding, begin or end."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, tokens, **kwargs) -> torch.Tensor:
    """[B, T, V] logits of the parallel forward, without a cache."""
    return model(input_ids=tokens, use_cache=False, **kwargs).logits


@torch.no_grad()
def logits_in_pieces(model, tokens, sizes, **kwargs) -> torch.Tensor:
    """[B, T, V] logits with the tokens fed through a cache in pieces of these sizes (the last repeats)."""
    cache, pieces, start = model.make_cache(), [], 0
    sizes = list(sizes)
    while start < tokens.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        out = model(input_ids=tokens[:, start : start + size], past_key_values=cache, use_cache=True, **kwargs)
        pieces.append(out.logits)
        start += size
    return torch.cat(pieces, 1)


def relative_error(actual, expected) -> float:
    """Norm of the difference over the norm of what is expected."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()


def pad(rows, *, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens, each [T_i], to input_ids and attention_mask [B, max T]."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        slots = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, slots], mask[i, slots] = row, 1
    return ids, mask


def check_generation(model, rows, generated, *, tolerance: float = 1e-4) -> None:
    """Greedy `generate` of left-padded rows against the parallel forward of each row alone, token by token.

    generated: of generate(..., return_dict_in_generate=True, output_logits=True).
    """
    scores = torch.stack(generated.logits, 1)  # [B, new, V]
    new = generated.sequences[:, -scores.shape[1] :]
    for i, row in enumerate(rows):
        alone = logits_of(model, torch.cat([row, new[i]])[None])[0, len(row) - 1 : -1]
        assert torch.equal(alone.argmax(-1), new[i]), f"row {i}: other tokens than the parallel forward's"
        assert relative_error(scores[i], alone) < tolerance, f"row {i}"
