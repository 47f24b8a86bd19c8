"""The softmax of packed rows text by text, by torch's `varlen_attn`, where a mask of all pairs of a row would be made.

It is an attention implementation as transformers knows them, with a mask function that makes none; the models' own is
swapped for it around a micro-batch. Which texts there are rides through the model's forward as `text_bounds`.

B rows, T time, N texts a micro-batch may hold, H query heads, G kv heads, D head dim
"""

import inspect
import math
from contextlib import contextmanager

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # `why_not` says so
    varlen_attn = None

from .modeling_linearized import attention_modules, linear_attentions
from .sequences import text_bounds

BY_TEXT, BOUNDS, REPLACED = "linearized_by_text", "text_bounds", "sdpa"
OPTIONS = tuple(inspect.signature(varlen_attn).parameters) if varlen_attn else ()  # they differ between versions
MOST_TEXTS = 65535  # blocks of a CUDA grid along its second axis, where the kernels have the texts
DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout")  # as configs call it
FOREIGN = ("softcap", "s_aux", "sliding_window", "position_bias")  # arguments that make it more than a softmax


def why_not(device: torch.device, model, sequences) -> str:
    """Why softmax over `sequences` cannot go text by text in this model. Empty: it can."""
    if device.type != "cuda":
        return f"it runs on {device.type}"
    if not {"scale", "window_size"} <= set(OPTIONS):
        return f"torch {torch.__version__} has no varlen_attn with a scale and a window"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash attention needs a GPU of compute capability 8.0"
    if not sequences.packing:
        return "data.packing is false, so that a row holds one text"
    if model.dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention is for bfloat16 and float16, and the model's weights are {model.dtype}"
    config, modules = model.config, attention_modules(model).values()
    if config._softmax_implementation != REPLACED:
        return f"the model's attention implementation is {config._softmax_implementation}, not {REPLACED}"
    if getattr(config, "sliding_window", None) or "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return "some layers see a window of the text"
    if getattr(config, "attn_logit_softcapping", None) or any(hasattr(module, "sinks") for module in modules):
        return "the model caps its logits or has sinks of its own"
    if any(getattr(config, name, None) for name in DROPOUTS):
        return "the model drops attention weights out"
    dim = max(layer.head_dim for layer in linear_attentions(model).values())
    return f"flash attention is for heads of up to 256, in eights, not of {dim}" if dim > 256 or dim % 8 else ""


def by_torch(query, key, value, bounds, *, longest: int, scale):
    """Causal softmax in each text: query [B T, H, D], key, value [B T, G, D], bounds [N + 1] -> [B T, H, D]."""
    options = {"scale": scale, "window_size": (-1, 0)}  # causal, in full
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in OPTIONS:
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)


def register(name: str, attend) -> None:
    """Makes `attend`, with the signature of `by_torch`, transformers' attention implementation `name`."""

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, text_bounds=None, **more):
        foreign = [argument for argument in FOREIGN if more.get(argument) is not None]
        if foreign or dropout or attention_mask is not None or more.get("is_causal") is False or text_bounds is None:
            got = ", ".join(foreign) or "dropout, a mask, another order or no texts"
            raise ValueError(f"softmax by text is causal softmax alone, not {got}. Set run.softmax_by_text to false.")
        tensors, device = (query, key, value), query.device.type
        if torch.is_autocast_enabled(device):  # as autocast does for scaled_dot_product_attention
            tensors = (x.to(torch.get_autocast_dtype(device)) for x in tensors)
        tensors = (x.transpose(1, 2).flatten(0, 1) for x in tensors)
        out = attend(*tensors, text_bounds.to(query.device), longest=query.shape[2], scale=scaling)
        return out.unflatten(0, [query.shape[0], query.shape[2]]), None

    def no_mask(*, attention_mask=None, local_size=None, **_):
        if attention_mask is not None or local_size is not None:
            raise ValueError("softmax by text knows no padding and no window. Set run.softmax_by_text to false.")

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, no_mask)


register(BY_TEXT, by_torch)


class SoftmaxByText:
    """The softmax of a linearized model, of its teacher and its kept heads and layers, text by text in packed rows.

    sequences: what micro-batches are drawn from at random. implementation: a name given to `register`.
    """

    def __init__(self, model, sequences, implementation: str = BY_TEXT):
        configs = [model.config, *(module.config for module in attention_modules(model).values())]
        self.configs, self.implementation = list({id(config): config for config in configs}.values()), implementation
        counts = sequences.texts_of_rows()
        self.mean, self.deviation, self.largest = counts.mean(), counts.std(), int(counts.max())

    def most(self, rows: int) -> int:
        """Texts that bounds of so many rows have place for; a place costs a launch of blocks, filled or not.

        All that rows can hold or, if that is less, their mean and six standard deviations.
        """
        likely = math.ceil(rows * self.mean + 6 * math.sqrt(rows) * self.deviation)
        return min(rows * self.largest, likely, MOST_TEXTS)

    def bounded(self, batch: dict, *, always: bool) -> dict:
        """The batch, on the CPU, with its `text_bounds`; without, to take the mask, if it has more than `most` texts.

        One text a row needs neither and gets none, unless `always`: recorded micro-batches are of one shape.
        """
        positions = batch["position_ids"]
        bounds = text_bounds(positions, self.most(len(positions)))
        if bounds is None or not always and bounds[len(positions)] == bounds[-1]:
            return batch
        return {**batch, BOUNDS: bounds}

    @contextmanager
    def on(self, batch: dict):
        """A context; inside, softmax goes text by text if the batch has bounds."""
        before = [(config, config._softmax_implementation, config._attn_implementation) for config in self.configs]
        for config, _, own in before if BOUNDS in batch else ():
            config._softmax_implementation = self.implementation
            if own == REPLACED:  # that of a layer kept whole
                config._attn_implementation = self.implementation
        try:
            yield
        finally:
            for config, softmax, own in before:
                config._softmax_implementation, config._attn_implementation = softmax, own
