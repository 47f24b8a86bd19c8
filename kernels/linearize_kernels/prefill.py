"""Prefill in Triton: `attention_chunked`'s function in O(T), from a `State` to a `State`. Not differentiable.

B batch, T new tokens, H query heads, G kv heads (and far heads), D head dim, V value dim, d map dim, F Taylor
features, n sinks, P ring slots; L = n + P + T slots of the line

The kernels of training do it. After a past, or with padding, sinks, ring and new tokens stand on one line, and the
past's sum is the base of the first span; a text from its beginning needs no line.
"""

import torch

from .configs import config_for
from .decode import feature_pairs
from .layout import row_major
from .plan import plain_plan, plan_line
from .state import State
from .sums import key_sums
from .training import launch_forward
from .training import why_not as why_training_cannot


def attention_prefill(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, valid=None, log_decay=None, state=None,
                      config=None):  # fmt: skip
    """Hybrid attention with the Taylor map: arguments as `attention_chunked`. Returns (out [B, H, T, V], State).

    q, k, v of one dtype, float32 or bfloat16; k_far with as many heads as k; state: None or of any ring that
    holds the window. Matrix products run in q's dtype, sums in float32, read in q's dtype.
    config: one of configs.CONFIGS' values, for measurements.
    """
    config = config or config_for(q.dtype, max(q.shape[-1], v.shape[-1]))
    decay = None if log_decay is None else log_decay.detach().float().contiguous()
    options = dict(scaling=scaling, window=window, sinks=sinks, config=config)
    if state is None and valid is None:
        return _from_nothing(q, k, v, q_far, k_far, gate, decay, **options)
    if state is None:
        num_features = feature_pairs(k_far.shape[-1], k.device).shape[1]
        state = State.empty(k, v, k_far, num_features=num_features, sinks=sinks, ring=window - 1)
    assert state.num_sinks == sinks and state.ring_k.shape[2] >= window - 1, "a state of another layout"
    if valid is None:
        valid = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    return _after(state, q, k, v, q_far, k_far, gate, decay, valid, **options)


def _from_nothing(q, k, v, q_far, k_far, gate, decay, *, scaling, window, sinks, config):
    """A text from its first token, no padding."""
    length, ring, plan = q.shape[2], window - 1, plain_plan(q.device)
    q, k, v, q_far, mapped = (row_major(x.to(q.dtype)) for x in (q, k, v, q_far, k_far))
    sums, total = key_sums(mapped, v, plan, config, sinks=sinks, end=length - ring, log_decay=decay,
                           return_last=True)  # fmt: skip
    out, _, _ = launch_forward(q, k, v, q_far, mapped, gate, decay, plan, sums, scaling=scaling, window=window,
                               sinks=sinks, tiles=config.forward)  # fmt: skip

    return out, State.after_text(total, k, v, k_far, sinks=sinks, ring=ring)


def _after(state: State, q, k, v, q_far, k_far, gate, decay, valid, *, scaling, window, sinks, config):
    """New tokens after a past, some of them perhaps padding."""
    batch, _, length, _ = q.shape
    ring = state.ring_k.shape[2]
    plan = plan_line(state, valid, window)
    line_k = torch.cat([state.sink_k, state.ring_k, k], 2)
    line_v = torch.cat([state.sink_v, state.ring_v, v], 2)
    past_far = torch.cat([k_far.new_zeros(batch, k.shape[1], sinks, k_far.shape[3]), state.ring_far], 2)
    line_far = torch.cat([past_far, k_far], 2)
    mapped = line_far.to(q.dtype)
    sums, total = key_sums(
        mapped, line_v, plan, config, sinks=sinks, end=sinks + length, log_decay=decay,
        first=state.total, offset=sinks + ring, return_last=True,
    )  # fmt: skip
    out, _, _ = launch_forward(
        row_major(q), line_k, line_v, row_major(q_far.to(q.dtype)), mapped, gate, decay, plan, sums,
        scaling=scaling, window=window, sinks=sinks, tiles=config.forward, offset=sinks + ring, past=True,
    )  # fmt: skip
    sink_k, sink_v = (
        _fill_sinks(old, new, state.length, valid, sinks) for old, new in ((state.sink_k, k), (state.sink_v, v))
    )

    def newest(x):  # a copy: a view would keep all of the line alive
        return x[:, :, x.shape[2] - ring :].clone(memory_format=torch.contiguous_format)

    return out, State(
        total=total, sink_k=sink_k, sink_v=sink_v, ring_k=newest(line_k), ring_v=newest(line_v),
        ring_far=newest(line_far), ring_valid=torch.cat([state.ring_valid, valid], 1)[:, length:].clone(),
        length=state.length + valid.sum(1),
    )  # fmt: skip


def why_not(q, k, v, q_far, k_far, gate, *, segments=None, **options) -> str:
    """Why this operation cannot take these arguments; empty where it can."""
    options = {**options, "state": None}
    if k_far.shape[1] != k.shape[1]:
        return f"{k_far.shape[1]} far heads, {k.shape[1]} kv heads: prefill needs as many"
    if segments is not None:
        return "packed rows have no common state"
    one = (x[:, :, :1] for x in (q, k, v, q_far, k_far, gate))  # any length will do
    return why_training_cannot(*one, **options)


def _fill_sinks(old, new, length, valid, sinks: int):
    """A text's first tokens become sinks. old [B, G, n, size], new [B, G, T, size] -> [B, G, n, size]."""
    rank = length[:, None] + valid.long().cumsum(1) - 1
    chosen = (rank[:, None] == torch.arange(sinks, device=old.device)[:, None]) & valid[:, None]  # [B, n, T]
    index = chosen.int().argmax(-1)[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
    return torch.where(chosen.any(-1)[:, None, :, None], new.gather(2, index), old)
