"""`decode_mapped` as an operator of torch, so that torch.compile takes a whole decode step as one graph.

The compiler has to know which tensors change: those of a `DecodeState`, in place.
"""

import torch

from .decode import DecodeState, decode_mapped

CHANGED = ("total", "norm", "keys", "values", "ring_far", "ring_kind", "position")


@torch.library.custom_op("linearize::decode", mutates_args=CHANGED)
def _decode(
    tokens: torch.Tensor, v: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    log_decay: torch.Tensor | None, total: torch.Tensor, norm: torch.Tensor, keys: torch.Tensor,
    values: torch.Tensor, ring_far: torch.Tensor, ring_kind: torch.Tensor, position: torch.Tensor,
    offset: torch.Tensor, window: int, scaling: float,
) -> torch.Tensor:  # fmt: skip
    state = DecodeState(total, norm, keys, values, ring_far, ring_kind, position, offset, window)
    return decode_mapped(tokens, v, weight, bias, state, scaling=scaling, log_decay=log_decay)


@_decode.register_fake
def _(tokens, v, *_):
    return v.new_empty(tokens.shape[0], tokens.shape[1] - v.shape[1], 1, v.shape[-1])


def decode_op(tokens, v, weight, bias, state: DecodeState, *, scaling: float, log_decay=None):
    """As `decode_mapped`, which torch.compile cannot read."""
    tensors = (getattr(state, name) for name in (*CHANGED, "offset"))
    return _decode(tokens, v, weight, bias, log_decay, *tensors, state.window, scaling)
