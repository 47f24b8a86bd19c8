"""Turns a loaded model of transformers into its linearized class, in place, and refuses what does not fit.

No weight is copied. Nothing is known of any architecture beforehand: a few tokens are run through the model with an
observer in its attention, which tells the shapes and the sliding windows; afterwards the converted model must give
the same logits on a text that fits into the window.
"""

import copy
from dataclasses import dataclass

import torch

from . import modeling_linearized as modeling
from .errors import ArchitectureError, ModelError, RecipeError

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
    """Replaces the softmax attention of `model` (a causal LM of transformers) in place; returns the same object.

    attention: the recipe's `attention` section. New parameters are random until calibrated.
    Raises ArchitectureError where the model's attention cannot be replaced, RecipeError for layers that do not exist.
    """
    shapes, logits = probe(model)
    layers = choose_layers(shapes, attention.keep_softmax)
    spec = {
        "layers": layers,
        "shapes": [[shapes[i].num_heads, shapes[i].num_kv_heads, shapes[i].head_dim] for i in layers],
        "window": attention.window,
        "sinks": attention.sinks,
        "feature_map": attention.feature_map.name,
        "map_dim": attention.feature_map.dim,
        "per": attention.feature_map.per,
        "decay": attention.decay,
    }
    _become_linearized(model, spec)
    _verify_short_text(model, logits)
    return model


def probe(model) -> tuple[dict[int, AttentionShape], torch.Tensor]:
    """Runs a few tokens through the base model: its attention shapes by layer, and its logits [1, T, vocabulary]."""
    name = type(model).__name__
    if isinstance(model, modeling.LinearizedMixin):
        raise ModelError(f"{name} is converted already; convert its base model instead")
    if getattr(modeling.transformers, name, None) is not type(model) or not name.endswith("ForCausalLM"):
        raise ArchitectureError(f"{name} is not a causal language model of transformers itself; only those can be converted")
    if not modeling.attention_modules(model):
        raise ArchitectureError(_no_interface(name, "declares no attention layers that go through it"))
    shapes = {}

    def observer(module, q, k, v, out, *, sliding_window, **_):
        if q.shape[-1] != k.shape[-1] or v.shape[-1] != q.shape[-1]:
            raise ArchitectureError(
                f"{name}: keys are {k.shape[-1]} wide and values {v.shape[-1]} (multi-head latent attention?). Only "
                "attention whose queries, keys and values have one width can be replaced."
            )
        shapes[module.layer_idx] = AttentionShape(q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], sliding_window)

    try:
        logits = _run_as_teacher(model, observer)
    except TypeError as error:
        if "observer" not in str(error):
            raise
        raise ArchitectureError(_no_interface(name, "takes no extra keyword arguments")) from error
    if not shapes:
        raise ArchitectureError(_no_interface(name, "computes attention without calling it"))
    return shapes, logits


def choose_layers(shapes: dict[int, AttentionShape], keep_softmax) -> list[int]:
    """Every full-attention layer but the kept ones; layers that already slide stay as they are."""
    sliding = sorted(i for i, s in shapes.items() if s.sliding_window is not None)
    full = sorted(set(shapes) - set(sliding))
    wrong = sorted(set(keep_softmax) - set(full))
    if wrong:
        raise RecipeError(
            f"attention.keep_softmax: layers {wrong} are not full-attention layers of this model. Those are {full}"
            + (f"; layers {sliding} already use a sliding window and stay as they are." if sliding else ".")
        )
    layers = [i for i in full if i not in keep_softmax]
    if not layers:
        raise ArchitectureError(
            f"no layer is left to convert: {len(keep_softmax)} kept by attention.keep_softmax, "
            f"{len(sliding)} already use a sliding window, of {len(shapes)} attention layers"
        )
    return layers


def _no_interface(name, reason):
    return (
        f"{name} cannot be converted: its attention does not go through transformers' attention interface, or {reason}. "
        "Models such as Llama, Mistral, Qwen2/3, Gemma, Phi-3, OLMo-2, Granite or SmolLM3 can."
    )


def _run_as_teacher(model, observer):
    """Logits of the base model on the probe's tokens, with `observer` in its attention; leaves the model as it was."""
    config = model.config
    own = config._attn_implementation
    vocabulary = config.get_text_config().vocab_size
    tokens = torch.arange(NUM_PROBE_TOKENS, device=next(model.parameters()).device)[None] * 7 % vocabulary
    config._softmax_implementation, config._attn_implementation = own, modeling.TEACHER
    training = model.training
    try:
        with torch.no_grad():
            return model.eval()(input_ids=tokens, use_cache=False, observer=observer).logits
    finally:
        model.train(training)
        config._attn_implementation = own
        del config._softmax_implementation


def _become_linearized(model, spec) -> None:
    base = type(model)
    cls = getattr(modeling, "Linearized" + base.__name__)
    implementation = model.config._attn_implementation
    config = cls.config_class.from_dict(
        {**model.config.to_dict(), "base_model_type": base.config_class.model_type, "linear_attention": spec}
    )
    if getattr(model, "hf_quantizer", None) is not None:  # a dequantised GGUF is an ordinary model from here on
        model.hf_quantizer.remove_quantization_config(model)
    for name in ("quantization_config", "_name_or_path"):
        config.__dict__.pop(name, None)
    config._attn_implementation = implementation
    for module in model.modules():
        if getattr(module, "config", None) is not None:
            module.config = config
    model.__class__ = cls
    generation_config = copy.deepcopy(model.generation_config)
    modeling.attach(model)
    model.generation_config = generation_config


@torch.no_grad()
def _verify_short_text(model, expected) -> None:
    """A text that fits into the window must give the base model's logits."""
    if expected.device.type == "meta":
        return
    length = min(NUM_PROBE_TOKENS, model.config.linear_attention["window"])
    tokens = torch.arange(length, device=expected.device)[None] * 7 % model.config.get_text_config().vocab_size
    training = model.training
    logits = model.eval()(input_ids=tokens, use_cache=False).logits
    model.train(training)
    error = ((logits - expected[:, :length]).float().norm() / expected[:, :length].float().norm()).item()
    if not error <= PROBE_TOLERANCE[expected.dtype]:
        raise ArchitectureError(
            f"{type(model).__name__}: on a text shorter than the window the logits differ from the base model's by "
            f"{error:.2g} (relative). Its attention does something that replacing it would lose, so it is refused."
        )
