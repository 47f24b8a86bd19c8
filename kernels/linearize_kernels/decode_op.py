"""`decode` as an operator of torch, so that torch.compile takes a whole decode step as one graph.

The compiler has to know which tensors change: those of a `DecodeState`, in place.
"""

import torch

from .decode import DecodeState, decode

CHANGED = ("total", "norm", "keys", "values", "ring_far", "ring_kind", "position")


@torch.library.custom_op("linearize::decode", mutates_args=CHANGED)
def _decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_far: torch.Tensor, k_far: torch.Tensor, gate: torch.Tensor,
    log_decay: torch.Tensor | None, total: torch.Tensor, norm: torch.Tensor, keys: torch.Tensor,
    values: torch.Tensor, ring_far: torch.Tensor, ring_kind: torch.Tensor, position: torch.Tensor,
    offset: torch.Tensor, window: int, scaling: float,
) -> torch.Tensor:  # fmt: skip
    state = DecodeState(total, norm, keys, values, ring_far, ring_kind, position, offset, window)
    return decode(q, k, v, q_far, k_far, gate, state, scaling=scaling, log_decay=log_decay)


@_decode.register_fake
def _(q, k, v, *_):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def decode_op(q, k, v, q_far, k_far, gate, state: DecodeState, *, scaling: float, log_decay=None):
    """As `decode`, which torch.compile cannot read."""
    tensors = (getattr(state, name) for name in (*CHANGED, "offset"))
    return _decode(q, k, v, q_far, k_far, gate, log_decay, *tensors, state.window, scaling)
