"""One model in memory, seen in several ways: its softmax teacher, and ablations of the converted layers.

Each is a context manager; on leaving, the model is as before.
"""

from contextlib import ExitStack, contextmanager, nullcontext

import torch

from .modeling_linearized import LINEARIZED, TEACHER, attention_modules, linear_attentions


@contextmanager
def softmax_attention(model):
    """Every layer computes the base model's softmax attention; with LoRA adapters off this is the teacher."""
    config = model.config
    assert config._attn_implementation == LINEARIZED, "the teacher is on already"
    config._attn_implementation = TEACHER
    try:
        yield model
    finally:
        config._attn_implementation = LINEARIZED


@contextmanager
def ablated_attention(model, *, far=True, window=None, sinks=None):
    """Converted layers with the far term off (far=False) or another exact part (0 and 0: the far term alone)."""
    layers = linear_attentions(model).values()
    before = [(layer.far_enabled, layer.window, layer.sinks) for layer in layers]
    for layer in layers:
        layer.far_enabled = far
        layer.window = layer.window if window is None else window
        layer.sinks = layer.sinks if sinks is None else sinks
    try:
        yield model
    finally:
        for layer, (far_enabled, old_window, old_sinks) in zip(layers, before, strict=True):
            layer.far_enabled, layer.window, layer.sinks = far_enabled, old_window, old_sinks


@contextmanager
def dropped_window(model, p: float):
    """With probability p, a window of a half, a quarter or an eighth (1 at least) in every converted layer.

    Drawn from torch's default generator, on the CPU. Only these lengths, as each has kernels of its own to compile.
    """
    with ExitStack() as stack:
        if p > 0 and torch.rand(()) < p:
            window = next(iter(linear_attentions(model).values())).window
            shorter = max(1, window >> int(torch.randint(1, 4, ())))
            stack.enter_context(ablated_attention(model, window=shorter))
        yield model


@contextmanager
def restored_softmax(model, heads: dict[int, list[int]]):
    """Converted layers with the softmax of some kv heads back: {layer: kv heads, numbered in the layer}.

    What is measured inside is the model that `architecture.keep_softmax_` would make. No cache goes in or out.
    """
    modules, config = attention_modules(model), model.config
    before = {layer: modules[layer].linear_attn for layer in heads}
    has_softmax, config._has_softmax = config._has_softmax, config._has_softmax or any(heads.values())
    for layer, kept in heads.items():
        modules[layer].linear_attn = before[layer].keeping(kept)
    try:
        yield model
    finally:
        config._has_softmax = has_softmax
        for layer, linear in before.items():
            modules[layer].linear_attn = linear


@contextmanager
def adapters_off(model):
    """The base model's own weights, where `model` carries LoRA adapters or TrainedWeights; else nothing changes."""
    with ExitStack() as stack:
        if hasattr(model, "disable_adapter"):
            stack.enter_context(model.disable_adapter())
        if hasattr(model, "trained_weights"):
            stack.enter_context(model.trained_weights.undone())
        yield model


@contextmanager
def teacher(model):
    """The model that was converted: its own weights and its softmax."""
    with adapters_off(model), softmax_attention(model):
        yield model


def equal_window(layers, *, dtype_bytes: int) -> int:
    """The window at which window + sinks alone takes the bytes of the LinearAttentions' whole state (rounded up)."""
    layers = list(layers)
    per_token = sum(layer.token_bytes(dtype_bytes=dtype_bytes) for layer in layers)
    state = sum(layer.state_bytes(dtype_bytes=dtype_bytes) for layer in layers)
    return -(-state // per_token) - layers[0].sinks + 1


def report_variants(model) -> tuple[dict, dict]:
    """name -> factory of a context, and name -> note: what the report card measures, in its order.

    A model without a far term has nothing to switch off; it is compared with itself untrained.
    """
    layers = list(linear_attentions(model).values())
    has_far, sinks = layers[0].feature_map != "none", layers[0].sinks
    window = equal_window(layers, dtype_bytes=model.dtype.itemsize) if has_far else layers[0].window
    variants = {"teacher": lambda: teacher(model), "converted": nullcontext}
    if has_far:
        variants["far term off"] = lambda: ablated_attention(model, far=False)
        variants["window off"] = lambda: ablated_attention(model, window=0, sinks=0)
    variants["window + sinks"] = lambda: _untrained_window(model, window)
    equal = "equal bytes" if has_far else "the same window"
    return variants, {"window + sinks": f"window {window} + {sinks} sinks, untrained, {equal}"}


@contextmanager
def _untrained_window(model, window):
    with adapters_off(model), ablated_attention(model, far=False, window=window):
        yield
