"""Turns a loaded model of transformers into its linearized class, in place, and refuses what does not fit.

No weight is copied. Nothing is known of any architecture beforehand: a few tokens are run through the model
with an observer in its attention, which tells the shapes and the sliding windows; afterwards the converted
model must give the same logits on a text that fits into the window, and the same through a cache as without.
"""

import copy
from dataclasses import dataclass, replace

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from . import modeling_linearized as modeling
from .errors import ArchitectureError, ModelError, RecipeError
from .variants import equal_window

EQUAL_WINDOW = "equal_window"  # the feature map's name in a recipe that stands for none and a wider window
NUM_PROBE_TOKENS = 12
PROBE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class AttentionShape:
    """What one attention layer of the base model looks like."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    sliding_window: int | None


def linearize_(model, attention):
    """Replaces the softmax attention of `model`, a causal LM of transformers, in place; returns `model`.

    attention: the recipe's `attention` section. New parameters are random until calibrated.
    Raises ArchitectureError where the model's attention cannot be replaced, ModelError for a model in the
    wrong state, RecipeError for layers that do not exist. The last checks run on the converted model: one
    that they refuse is left converted and should be dropped.
    """
    shapes, logits = probe(model)
    kept_heads = choose_kept(shapes, attention.keep_softmax)
    layers = list(kept_heads)
    spec = {
        "layers": layers,
        "shapes": [[shapes[i].num_heads, shapes[i].num_kv_heads, shapes[i].head_dim] for i in layers],
        "kept_heads": [kept_heads[i] for i in layers],
        "window": attention.window,
        "sinks": attention.sinks,
        "feature_map": attention.feature_map.name,
        "map_dim": attention.feature_map.width(min(shapes[i].head_dim for i in layers)),
        "per": attention.feature_map.per,
        "decay": attention.decay,
    }
    if attention.feature_map.name == EQUAL_WINDOW:
        spec = _window_alone(spec, dtype_bytes=model.dtype.itemsize)
    _become_linearized(model, spec)
    if logits.device.type != "meta":
        _verify(model, logits)
    return model


def _window_alone(spec: dict, *, dtype_bytes: int) -> dict:
    """The spec without a far term, its window as wide as takes the bytes of the Taylor state it would have had."""
    with torch.device("meta"):
        taylor, shapes = {**spec, "feature_map": "taylor"}, zip(spec["shapes"], spec["kept_heads"], strict=True)
        layers = [modeling.LinearAttention.by_spec(taylor, shape, kept) for shape, kept in shapes]
    return {**spec, "feature_map": "none", "window": equal_window(layers, dtype_bytes=dtype_bytes)}


def probe(model) -> tuple[dict[int, AttentionShape], torch.Tensor]:
    """Runs a few tokens through the base model: attention shapes by layer, and logits [1, T, vocabulary]."""
    name = type(model).__name__
    _require_causal_lm(model)
    modules = modeling.attention_modules(model)
    if not modules:
        raise ArchitectureError(_no_interface(name, "it declares no attention layers that go through it"))
    shapes = {}

    def observer(module, q, k, v, out, *, sliding_window, **_):
        if q.shape[-1] != k.shape[-1] or v.shape[-1] != q.shape[-1]:
            raise ArchitectureError(
                f"{name}: keys are {k.shape[-1]} wide and values {v.shape[-1]} (multi-head latent "
                "attention?). Only attention whose queries, keys and values have one width can be replaced."
            )
        index = module.layer_idx
        if index in shapes or modules.get(index) is not module:
            raise ArchitectureError(
                f"{name}: layer {index} has more than one attention, or runs it more than once (cross, "
                "shared or differential attention). Only one self-attention a layer can be replaced."
            )
        shapes[index] = AttentionShape(q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], sliding_window)

    try:
        logits = _run_as_teacher(model, observer)
    except TypeError as error:
        if "observer" not in str(error):
            raise
        raise ArchitectureError(_no_interface(name, "it takes no extra keyword arguments")) from error
    if not shapes:
        raise ArchitectureError(_no_interface(name, "it drops the keyword arguments on the way to its attention"))
    return _with_cache_windows(model, shapes), logits


def _require_causal_lm(model) -> None:
    name = type(model).__name__
    if isinstance(model, modeling.LinearizedMixin):
        raise ModelError(f"{name} is converted already; convert its base model instead")
    if getattr(modeling.transformers, name, None) is not type(model) or not name.endswith(modeling.CAUSAL_LM):
        raise ArchitectureError(
            f"{name} is not a decoder with a language modelling head of transformers itself; only those can "
            "be converted. Load the model with AutoModelForCausalLM."
        )
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ModelError(
            f"{name} was spread over devices by device_map; load it without, onto one device, to convert it"
        )


def _with_cache_windows(model, shapes):
    """The shapes, with the sliding windows that only the model's cache knows of; refuses other caches."""
    name = type(model).__name__
    own = DynamicCache(config=model.config).layers if model._supports_default_dynamic_cache() else []
    plain = {i for i in shapes if i < len(own) and type(own[i]) in (DynamicLayer, DynamicSlidingWindowLayer)}
    odd = sorted(set(shapes) - plain)
    if odd:
        raise ArchitectureError(
            f"{name}: layers {odd} do not each have a cache of their own with keys and values alone "
            "(they share keys and values, or run attention beside a recurrence), so their memory cannot be "
            "replaced."
        )
    windows = {i: shapes[i].sliding_window or getattr(own[i], "sliding_window", None) for i in shapes}
    return {i: replace(shapes[i], sliding_window=windows[i]) for i in shapes}


def choose_kept(shapes: dict[int, AttentionShape], keep) -> dict[int, list[int]]:
    """layer to convert -> kv heads of it that stay softmax, by the recipe's `attention.keep_softmax`.

    A layer that is kept whole, or head by head, is left out; layers that already slide stay as they are.
    """
    sliding = sorted(i for i, s in shapes.items() if s.sliding_window is not None)
    full = sorted(set(shapes) - set(sliding))
    for name, layers in (("layers", keep.layers), ("heads", [layer for layer, _ in keep.heads])):
        wrong = sorted(set(layers) - set(full))
        if wrong:
            others = f"; layers {sliding} already use a sliding window and stay as they are." if sliding else "."
            raise RecipeError(
                f"attention.keep_softmax.{name}: layers {wrong} are not full-attention layers of this model. Those are "
                f"{full}{others}"
            )
    kept = {i: sorted(head for layer, head in keep.heads if layer == i) for i in full if i not in keep.layers}
    for layer, heads in kept.items():
        if heads and heads[-1] >= shapes[layer].num_kv_heads:
            last = shapes[layer].num_kv_heads - 1
            raise RecipeError(f"attention.keep_softmax.heads: layer {layer} has kv heads 0 to {last}, not {heads[-1]}")
    kept = {i: heads for i, heads in kept.items() if len(heads) < shapes[i].num_kv_heads}
    if not kept:
        raise ArchitectureError(
            f"no layer is left to convert: of {len(shapes)} attention layers, attention.keep_softmax keeps "
            f"{len(full)}, and {len(sliding)} use a sliding window already, so that their memory does not grow"
        )
    free = len(kept) if keep.unit == "layer" else sum(shapes[i].num_kv_heads - len(h) for i, h in kept.items())
    if keep.count >= free:
        raise RecipeError(
            f"attention.keep_softmax.count: {keep.count} would leave nothing to convert; of {free} at most {free - 1}"
        )
    return kept


def keep_softmax_(model, heads: dict[int, list[int]]) -> None:
    """Gives kv heads of a converted model their softmax back for good, in place; the parameters of others stay.

    heads: {layer: kv heads that are linear now, numbered in the layer}. A layer that is left without a linear head
    becomes the base model's own. At least one head must stay linear.
    """
    spec, learned = model.config.linear_attention, modeling.linear_attentions(model)
    after = {i: learned[i].keeping(heads[i]) if heads.get(i) else learned[i] for i in spec["layers"]}
    left = [(i, s) for i, s in zip(spec["layers"], spec["shapes"], strict=True) if after[i].num_heads]
    assert left, "nothing would be linear any more"
    modules = modeling.attention_modules(model)
    for index in learned:
        del modules[index].linear_attn
        modules[index].__class__ = modules[index].__class__.__mro__[2]  # the base model's own
    model.config.linear_attention = {
        **spec,
        "layers": [i for i, _ in left],
        "shapes": [shape for _, shape in left],
        "kept_heads": [list(after[i].heads.kept) for i, _ in left],
    }
    modeling.attach(model)
    for index, _ in left:
        modules[index].linear_attn = after[index]


def _no_interface(name, reason):
    return (
        f"{name} cannot be converted: conversion replaces the function that transformers' attention "
        f"interface calls, and {reason}. Models such as Llama, Mistral, Qwen2/3, Gemma, Phi-3, OLMo-2, "
        "Granite or SmolLM3 can be."
    )


def _probe_tokens(model) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.arange(NUM_PROBE_TOKENS, device=next(model.parameters()).device)[None] * 7 % vocabulary


def _run_as_teacher(model, observer):
    """Logits of the base model on the probe's tokens, with `observer` in its attention."""
    config = model.config
    own = config._attn_implementation
    config._softmax_implementation, config._attn_implementation = own, modeling.TEACHER
    training = model.training
    try:
        with torch.no_grad():
            # with a cache transformers does not look for packed documents, which fails on the meta device
            return model.eval()(input_ids=_probe_tokens(model), use_cache=True, observer=observer).logits
    finally:
        model.train(training)
        config._attn_implementation = own
        del config._softmax_implementation


def _become_linearized(model, spec) -> None:
    base = type(model)
    cls = modeling.linearized_class(base)
    implementation = model.config._attn_implementation
    config = cls.config_class.from_dict(
        {
            **model.config.to_dict(),
            "model_type": modeling.LINEARIZED,
            "base_model_type": base.config_class.model_type,
            "linear_attention": spec,
        }
    )
    if getattr(model, "hf_quantizer", None) is not None:  # a dequantised GGUF is an ordinary model now
        model.hf_quantizer.remove_quantization_config(model)
    for name in ("quantization_config", "_name_or_path"):
        config.__dict__.pop(name, None)
    config._attn_implementation = implementation
    config._experts_implementation = model.config._experts_implementation
    for module in model.modules():
        if getattr(module, "config", None) is not None:
            module.config = config
    model.__class__ = cls
    generation_config = copy.deepcopy(model.generation_config)
    modeling.attach(model)
    model.generation_config = generation_config


@torch.no_grad()
def _verify(model, expected) -> None:
    """A text that fits into the window gives the base model's logits, and a cache gives those of one pass."""
    tokens, training, layers = (
        _probe_tokens(model),
        model.training,
        modeling.linear_attentions(model).values(),
    )
    window = model.config.linear_attention["window"]
    model.eval()
    for layer in layers:
        layer.window = max(window, NUM_PROBE_TOKENS)
    short = model(input_ids=tokens, use_cache=False).logits
    for layer in layers:
        layer.window = window
    parallel = model(input_ids=tokens, use_cache=False).logits
    cache, pieces = model.make_cache(), []
    for piece in tokens.split([NUM_PROBE_TOKENS - 2, 1, 1], 1):
        pieces.append(model(input_ids=piece, use_cache=True, **{modeling.CACHE: cache}).logits)
    model.train(training)
    _require_close(model, short, expected, "on a text shorter than the window the logits differ from the base model's")
    _require_close(model, torch.cat(pieces, 1), parallel, "through a cache the logits differ from those without one")


def _require_close(model, actual, expected, what) -> None:
    error = ((actual - expected).float().norm() / expected.float().norm()).item()
    if not error <= PROBE_TOLERANCE[expected.dtype]:
        raise ArchitectureError(
            f"{type(model).__name__}: {what} by {error:.2g} (relative). Its attention does something that "
            "replacing it would lose, so it is refused."
        )
