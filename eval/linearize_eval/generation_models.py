"""The two sides of `linearize bench generation`: a converted model and its teacher, loaded or of random weights."""

import torch
import transformers

from linearize.modeling_linearized import LinearizedMixin

SHAPES = {  # Llama configs of random weights; based-1.3b: the size of BASED's largest model, 32 heads of 64
    "llama-3.1-8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0,
    ),
    "based-1.3b": dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=50280,
    ),
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    ),
}  # fmt: skip


def load_side(kind: str, *, folder, against, shape, dtype: str, device, window, map_dim):
    """The model of a side ("converted" or "teacher"), in eval mode on the device."""
    from linearize.loading import DTYPES, load, load_any

    if shape:
        torch.manual_seed(0)
        model = random_model(shape, dtype=DTYPES[dtype], device=device)
        if kind == "converted":
            from linearize.architecture import linearize_
            from linearize.recipe import AttentionSettings, FeatureMapSettings

            feature_map = FeatureMapSettings(dim=map_dim)
            linearize_(
                model, AttentionSettings(**({} if window is None else {"window": window}), feature_map=feature_map)
            )
    elif kind == "teacher":
        model = load_any(against, dtype=dtype, device=str(device))[0]
    else:
        model = load(folder, dtype=dtype, device=str(device))[0]
    return model


def random_model(shape: str, *, dtype, device):
    """A Llama of random weights, made on the device in its dtype: no copy of them is anywhere else."""
    config = transformers.LlamaConfig(max_position_embeddings=131072, attn_implementation="sdpa", **SHAPES[shape])
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def is_converted(model) -> bool:
    return isinstance(model, LinearizedMixin)


def weight_bytes(model) -> int:
    """Bytes of weights that a step reads: all but an embedding table that is not also the head."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    unread = 0 if embedding is head else embedding.numel() * embedding.element_size()
    return sum(p.numel() * p.element_size() for p in model.parameters()) - unread
