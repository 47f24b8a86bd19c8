"""What a conversion would do (`--dry-run`): layers, parameters, bytes and an estimate of time, from the config."""

import time

import torch

from .architecture import keep_softmax_, linearize_
from .finetune import LOSS_CHUNK
from .kept_softmax import evenly_spaced, heads_by_layer, units_of, written_down
from .lengths import length_of, rows_a_forward
from .loading import load_teacher_config, pick_device
from .modeling_linearized import linear_attentions
from .recipe import Recipe, to_yaml

CONTEXTS = (1024, 8192, 32768)


def plan(recipe: Recipe) -> str:
    """The resolved recipe and what it comes to, as text. Loads no weights."""
    model = build_on_meta(recipe)
    keep = recipe.attention.keep_softmax
    if keep.count:  # which ones is not known yet unless by: even; the sizes are those of any choice
        chosen = evenly_spaced(units_of(model, keep.unit), keep.count)
        keep_softmax_(model, heads_by_layer(chosen))
        keep = written_down(keep, chosen)
    layers = linear_attentions(model)
    device = pick_device(recipe.run.device)
    lines = [to_yaml(recipe).rstrip(), "", *_replacement_lines(recipe, model, layers)]
    return "\n".join([*lines, *_memory_lines(recipe, keep, model, layers), _time_line(recipe, model, device)])


def build_on_meta(recipe: Recipe):
    """The converted model without weights, on torch's meta device."""
    from transformers import AutoModelForCausalLM

    config = load_teacher_config(recipe.model)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        return linearize_(model, recipe.attention)


def _replacement_lines(recipe, model, layers) -> list[str]:
    first = next(iter(layers.values()))
    new = sum(p.numel() for layer in layers.values() for p in layer.parameters())
    total = sum(p.numel() for p in model.parameters())
    num_layers = model.config.get_text_config().num_hidden_layers
    keep, heads = recipe.attention.keep_softmax, first.heads
    kept = [f"{layer}.{head}" for layer, linear in layers.items() for head in linear.heads.kept]
    lines = [f"kept         single kv heads in softmax: {', '.join(kept)}"] if kept else []
    if keep.count and keep.by != "even":
        chosen = f"{keep.count} {keep.unit.replace('_', ' ')}s, by {keep.by}"
        lines.append(f"chosen       after matching: {chosen}; evenly spaced ones stand in for them here")
    return [
        f"model        {type(model).__name__}: {total / 1e6:,.1f} M parameters, of which {new / 1e6:.2f} M new",
        f"replaced     {len(layers)} of {num_layers} layers: {_ranges(list(layers))}",
        *lines,
        f"each layer   {heads.num_heads} query heads, {heads.num_kv_heads} kv heads, head dim {first.head_dim}, "
        f"window {first.window}, {first.sinks} sinks, {first.feature_map} map of dimension {first.q_map.shape[-1]}",
    ]


def _memory_lines(recipe, keep, model, layers) -> list[str]:
    size = 2
    state = sum(layer.state_bytes(dtype_bytes=size) for layer in layers.values())
    per_token = sum(layer.token_bytes(dtype_bytes=size) for layer in layers.values())
    kept = _kept_heads(keep, layers) * 2 * next(iter(layers.values())).head_dim * size
    caches, kept_caches = (
        ", ".join(f"{bytes_ * n / 2**20:,.1f} at {n}" for n in CONTEXTS) for bytes_ in (per_token, kept)
    )
    need = _training_bytes(recipe, model, layers) / 2**30 + 0.8
    return [
        f"state        {state / 2**20:,.2f} MiB a sequence at any length; KV cache it replaces, MiB: {caches} (bf16)",
        *([f"kept cache   of what stays softmax by this recipe, MiB: {kept_caches}"] if kept else []),
        f"memory       about {need:,.1f} GiB while training (weights, activations and logits; estimate)",
    ]


def _training_bytes(recipe, model, layers) -> float:
    """Weights, and what the larger stage keeps beside them.

    Matching holds one layer's activations at a time, finetuning those of all, or with checkpointing one layer's and
    the inputs of the others; its logits are made LOSS_CHUNK tokens at a time.
    """
    config, width = model.config.get_text_config(), 4 if pick_device(recipe.run.device).type == "cpu" else 2
    weights = sum(p.numel() for p in model.parameters())
    token, tokens, needs = _layer_bytes(config, layers, width), _tokens_a_forward(recipe), [0]
    if "match" in tokens:
        needs.append(tokens["match"] * token)
    if "finetune" in tokens:
        num_layers, stream = config.num_hidden_layers, config.hidden_size * width
        kept = token + num_layers * stream if recipe.run.gradient_checkpointing else num_layers * token
        logits = 6 * min(LOSS_CHUNK, tokens["finetune"]) * config.vocab_size * width
        fixed = {p for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
        trained = 16 * (weights - sum(p.numel() for p in fixed)) if recipe.finetune.train == "layers" else 0
        needs.append(tokens["finetune"] * (kept + 2 * stream) + logits + trained)
    return weights * width + max(needs)


def _tokens_a_forward(recipe) -> dict[str, int]:
    """Stage -> tokens of a forward pass."""
    return {name: rows_a_forward(recipe, stage) * length_of(recipe, stage) for name, stage in recipe.trained.items()}


def _layer_bytes(config, layers, width: int) -> int:
    """What a layer keeps of a token for its backward pass, as Llama's with LoRA on all projections does.

    Four of the hidden state (inputs and outputs of two norms); of queries themselves, twice in float32 for the maps,
    the output and what its rounding lost; of keys and values; of the MLP gate, its activation, up and their product.
    """
    linear = next(iter(layers.values()))
    queries, keys = linear.heads.num_heads * linear.head_dim, linear.heads.num_kv_heads * linear.head_dim
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return width * (4 * config.hidden_size + 3 * queries + 2 * keys + 4 * inner) + 4 * (queries + keys)


def _kept_heads(keep, layers) -> int:
    """How many kv heads the recipe keeps in softmax; layers of one shape."""
    per_layer = next(iter(layers.values())).heads.num_kv_heads
    whole = len({*keep.layers, *(layer for layer, _ in keep.heads)} - set(layers))
    return per_layer * whole + sum(len(linear.heads.kept) for linear in layers.values())


def _time_line(recipe, model, device) -> str:
    """Floating-point operations over this machine's measured matrix product rate."""
    weights = sum(p.numel() for n, p in model.named_parameters() if "linear_attn" not in n)
    match_tokens = recipe.match.tokens if "match" in recipe.trained else 0
    match = match_tokens * 2 * weights * 2.5  # the teacher's forward, and about 1.5 times that in the layers
    passes = 6 + (2 if recipe.finetune.loss.kl else 0)
    finetune = recipe.finetune.tokens * weights * (passes + 3)
    seconds = (match + finetune) / _matmul_rate(device)
    return f"time         about {seconds / 60:,.1f} minutes of training on {device} (estimate; evaluation not counted)"


def _matmul_rate(device, size: int = 1024) -> float:
    """Measured operations a second of a matrix product in the training's dtype; half of it is reached in practice."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a = torch.randn(size, size, device=device, dtype=dtype)
    (a @ a).sum().item()
    start = time.perf_counter()
    for _ in range(4):
        b = a @ a
    b.sum().item()
    return 0.5 * 4 * 2 * size**3 / (time.perf_counter() - start)


def _ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    parts, start = [], indices[0]
    for before, after in zip(indices, [*indices[1:], -2], strict=True):
        if after != before + 1:
            parts.append(f"{start}-{before}" if start != before else str(start))
            start = after
    return ", ".join(parts)
