"""Bytes of the KV cache that a softmax model keeps for one sequence, and the tokens of a forward that memory holds.

G kv heads, D head dim.
"""

import torch

from linearize.errors import ArchitectureError
from linearize.modeling_linearized import linear_attentions
from linearize.static_cache import kv_shape

UNBOUNDED = None
MOST_TOKENS = 2**16  # of a forward; more of them gain nothing
# Layers that keep no keys and values. What they keep instead does not grow, and converting leaves it alone.
WITHOUT_KEYS = ("conv", "linear_attention", "moe", "mlp")


def kv_cache_bytes(config, length: int, dtype_bytes: int) -> int:
    """Bytes of keys and values of one sequence of `length` tokens, over all layers of an unconverted model.

    Sliding and chunked layers hold at most their window (an implementation may hold one token less);
    convolutions and recurrent layers count nothing.

    Args:
        config: the model's Hugging Face config; a composite one is asked for its text config.
        length: tokens in the sequence.
        dtype_bytes: bytes of one number of the cache (2 for bfloat16).

    Raises ArchitectureError if a layer is of a kind unknown here.
    """
    config = config.get_text_config(decoder=True)
    shape = kv_shape(config)
    tokens = sum(length if window is UNBOUNDED else min(length, window) for window in _layer_windows(config))
    return tokens * 2 * shape["heads"] * shape["head_dim"] * dtype_bytes


def _layer_windows(config) -> list[int | None]:
    """How many tokens each layer holds at most; None where every token."""
    sliding = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:  # then transformers gives every layer the same kind
        return [sliding or chunk or UNBOUNDED] * config.num_hidden_layers
    windows = {"full_attention": UNBOUNDED, "sliding_attention": sliding, "chunked_attention": chunk}
    windows |= dict.fromkeys(WITHOUT_KEYS, 0)
    unknown = sorted(set(layer_types) - set(windows))
    if unknown:
        raise ArchitectureError(
            f"the KV cache of {config.model_type!r} cannot be counted: it has layers of type "
            f"{', '.join(unknown)}; known types: {', '.join(windows)}"
        )
    return [windows[layer_type] for layer_type in layer_types]


def kv_bytes(model, length: int) -> int:
    """`kv_cache_bytes` of the model that `model` was before it was converted, in its dtype."""
    return kv_cache_bytes(model.config, length, model.dtype.itemsize)


def state_bytes(model, length: int) -> int:
    """Of one sequence: converted layers' states, and the KV cache of the layers that stay as they are."""
    size = model.dtype.itemsize
    layers = linear_attentions(model).values()
    replaced = length * sum(layer.token_bytes(dtype_bytes=size) for layer in layers)
    return sum(layer.state_bytes(dtype_bytes=size) for layer in layers) + kv_bytes(model, length) - replaced


def forward_tokens(model, *, least: int) -> int:
    """Tokens of one forward without gradients and logits that a quarter of free GPU memory holds: `least` or more.

    least: what training took at a time, which fits, as it keeps activations; on a CPU it is the answer, for more gain
    nothing there. A token is estimated at ten vectors of the hidden size, four of the MLP's and eight float32 ones.
    """
    device, config = model.device, model.config.get_text_config()
    if device.type != "cuda":
        return least
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    a_token = model.dtype.itemsize * (10 * config.hidden_size + 4 * inner) + 8 * 4 * config.hidden_size
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return max(least, min(MOST_TOKENS, free // 4 // a_token))
