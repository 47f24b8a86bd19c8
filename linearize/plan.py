"""What a conversion would do (`--dry-run`): layers, parameters, bytes and an estimate of time, from the config."""

import time

import torch

from .architecture import keep_softmax_, linearize_
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
    width = 4 if pick_device(recipe.run.device).type == "cpu" else 2
    weights = sum(p.numel() for p in model.parameters()) * width
    stages = recipe.trained.values()
    forwards = [rows_a_forward(recipe, stage) * length_of(recipe, stage) for stage in stages]
    tokens = max(forwards, default=recipe.run.micro_batch * recipe.data.sequence_length)
    logits = tokens * model.config.get_text_config().vocab_size * width
    need = (weights + 6 * logits) / 2**30 + 0.8
    return [
        f"state        {state / 2**20:,.2f} MiB a sequence at any length; KV cache it replaces, MiB: {caches} (bf16)",
        *([f"kept cache   of what stays softmax by this recipe, MiB: {kept_caches}"] if kept else []),
        f"memory       about {need:,.1f} GiB while training (weights and logits; estimate)",
    ]


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
