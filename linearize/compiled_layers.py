"""Decoder layers through torch.compile while a model trains: norms, rotary, MLPs, LoRA and residuals in few kernels.

Attention stays out, as it has kernels of its own: the compiler stops before it and goes on behind it. Layers that are
alike share what is compiled. Only instances are changed, and only inside.
"""

from contextlib import contextmanager
from functools import partial

import torch

from .instances import swapped
from .modeling_linearized import LinearizedAttentionMixin, attention_modules

RECOMPILE_LIMIT = 64  # sorts of layers, of several shapes, that may share a forward; dynamo gives up at 8
PAYS_FROM = 5_000_000  # tokens of a stage: compiling takes half a minute, whatever the stage


def pays(device: torch.device, tokens: int) -> bool:
    """Whether compiling a stage of so many tokens is likely to take less time than it saves."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0) and tokens >= PAYS_FROM


class CompiledLayers:
    """The decoder layers of a model, to be compiled as they are first called inside `on`.

    Training steps run inside it, evaluations do not: what they take is another shape, which would be compiled again.
    Dropout drops what it would drop uncompiled.
    """

    def __init__(self, model):
        self.layers, attentions = decoder_layers(model), attention_modules(model).values()
        self.attentions = [m for m in attentions if isinstance(m, LinearizedAttentionMixin)]
        self.forwards = [torch.compile(layer.forward, options={"fallback_random": True}) for layer in self.layers]

    @contextmanager
    def on(self):
        """A context; inside, the layers run compiled."""
        changes = [(attention, "call_attention", _call_apart) for attention in self.attentions]
        for layer, forward in zip(self.layers, self.forwards, strict=True):
            if getattr(layer, "gradient_checkpointing", False):
                forward = partial(_checkpointed, layer, forward)
                changes.append((layer, "gradient_checkpointing", False))
            changes.append((layer, "forward", forward))
        with swapped(changes), torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            yield


def _checkpointed(layer, forward, *args, **kwargs):
    """A layer's own checkpointing, around what is compiled: inside, the compiler would give up."""
    if not layer.training:
        return forward(*args, **kwargs)
    return layer._gradient_checkpointing_func(partial(forward, **kwargs), *args)


@torch.compiler.disable
def _call_apart(function, *args, **kwargs):
    return function(*args, **kwargs)


def decoder_layers(model) -> list[torch.nn.Module]:
    """The modules that hold an attention module each: the layers, in order."""
    attentions = attention_modules(model)
    held_by = {id(child): module for module in model.modules() for child in module.children()}
    return [held_by[id(attentions[index])] for index in sorted(attentions)]
