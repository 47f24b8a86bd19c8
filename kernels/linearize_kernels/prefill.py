"""Prefill in Triton: `attention_chunked`'s function in O(T), from a `State` to a `State`. Not differentiable.

B batch, T new tokens, H query heads, G kv heads (and far heads), D head dim, V value dim, d map dim, F Taylor
features, n sinks, P ring slots, C chunk, N chunks; L = n + P + T slots of the line

Two levels, so that one long row fills the GPU: every chunk's keys are summed into features(k_far) ⊗ [v | 1]
at once, then a scan over chunks makes each sum one over all older chunks. The forward kernel of training does
the rest, all queries at once: it starts from the sum before the last whole chunk, and takes the keys since
then one by one. The past stands before the new tokens on one line: sinks, ring, new tokens.
"""

import torch
import triton
from torch.nn.functional import pad

from . import prefill_kernels as kernels
from .decode import feature_pairs
from .state import State
from .training import Plan, Tiles, launch_forward
from .training import why_not as why_training_cannot

CHUNK = 512
BLOCK = dict(FB=32, VB=128, BN=32)  # features, value columns and slots of one program at once
TILES = {torch.float32: Tiles(32, 32, 4, 1), torch.bfloat16: Tiles(128, 64, 8, 3)}


def attention_prefill(q, k, v, q_far, k_far, gate, *, scaling, window, sinks, valid=None, log_decay=None, state=None):
    """Hybrid attention with the Taylor map: arguments as `attention_chunked`. Returns (out [B, H, T, V],
    State).

    q, k, v of one dtype, float32 or bfloat16; k_far with as many heads as k; state: None or of any ring that
    holds the window. Matrix products over keys run in q's dtype, sums in float32.
    """
    if state is None:
        num_features = feature_pairs(k_far.shape[-1], k.device).shape[1]
        state = State.empty(k, v, k_far, num_features=num_features, sinks=sinks, ring=window - 1)
    assert state.num_sinks == sinks and state.ring_k.shape[2] >= window - 1, "a state of another layout"
    batch, _, length, _ = q.shape
    ring = state.ring_k.shape[2]
    offset = sinks + ring
    if valid is None:
        valid = torch.ones(batch, length, dtype=torch.bool, device=q.device)
    plan = make_plan(state, valid, window)
    line_k = torch.cat([state.sink_k, state.ring_k, k], 2)
    line_v = torch.cat([state.sink_v, state.ring_v, v], 2)
    past_far = torch.cat([k_far.new_zeros(batch, k.shape[1], sinks, k_far.shape[3]), state.ring_far], 2)
    line_far = torch.cat([past_far, k_far], 2)
    mapped = line_far.to(q.dtype)
    sums, norms, total = sum_chunks(mapped, line_v, plan, state, log_decay, end=sinks + length, offset=offset)
    out, _, _ = launch_forward(
        pad(q, [0, 0, offset, 0]), line_k, line_v, pad(q_far.to(q.dtype), [0, 0, offset, 0]), mapped,
        pad(gate, [offset, 0]), log_decay, plan, scaling=scaling, window=window, sinks=sinks,
        tiles=TILES[q.dtype], chunk=CHUNK, sums=sums, norms=norms, offset=offset,
    )  # fmt: skip
    sink_k, sink_v = (
        _fill_sinks(old, new, state.length, valid, sinks) for old, new in ((state.sink_k, k), (state.sink_v, v))
    )

    def newest(x):  # a copy: a view would keep all of the line alive
        return x[:, :, x.shape[2] - ring :].clone(memory_format=torch.contiguous_format)

    after = State(
        total=total,
        sink_k=sink_k,
        sink_v=sink_v,
        ring_k=newest(line_k),
        ring_v=newest(line_v),
        ring_far=newest(line_far),
        ring_valid=torch.cat([state.ring_valid, valid], 1)[:, length:].clone(),
        length=state.length + valid.sum(1),
    )
    return out[:, :, offset:], after


def why_not(q, k, v, q_far, k_far, gate, *, segments=None, **options) -> str:
    """Why this operation cannot take these arguments; empty where it can."""
    options = {**options, "state": None}
    if k_far.shape[1] != k.shape[1]:
        return f"{k_far.shape[1]} far heads, {k.shape[1]} kv heads: prefill needs as many"
    if segments is not None:
        return "packed rows have no common state"
    one = (x[:, :, :1] for x in (q, k, v, q_far, k_far, gate))  # any length will do
    return why_training_cannot(*one, **options)


def make_plan(state: State, valid, window: int) -> Plan:
    """Who sees whom on the line of sinks, ring and new tokens; see `Plan`."""
    sinks = state.num_sinks
    rank = state.length[:, None] + valid.long().cumsum(1) - 1
    is_sink = valid & (rank < sinks)
    ordinary = torch.cat([torch.zeros_like(state.sink_valid), state.ring_usable, valid & ~is_sink], 1)
    as_sink = torch.cat([state.sink_valid, torch.zeros_like(state.ring_valid), is_sink], 1)
    codes = torch.where(ordinary, 0, torch.where(as_sink, 1, -1))
    count = pad(ordinary.long().cumsum(1), [1, 0])  # [B, L + 1] ordinary slots before
    slots = torch.arange(codes.shape[1], device=codes.device)
    has_far = (count[:, (slots - window + 1).clamp_min(0)] > 0) | state.has_folded[:, None]
    zeros = torch.zeros_like(codes)
    return Plan(False, *(x.to(torch.int32).contiguous() for x in (zeros, codes, has_far, zeros, zeros)))


def sum_chunks(k_far, v, plan: Plan, state: State, log_decay, *, end: int, offset: int):
    """Sums over all ordinary keys before each chunk, and over all slots before `end` (what leaves the ring).

    k_far [B, G, L, d], v [B, G, L, V] -> sums [B, G, N, F, V], norms [B, G, N, F], total [B, G, F, V + 1] as
    seen from the next token; all float32.
    """
    batch, groups, length, value_dim = v.shape
    pairs = feature_pairs(k_far.shape[-1], v.device)
    num_features, num_chunks = pairs.shape[1], max(1, triton.cdiv(end, CHUNK))
    sums = v.new_empty(batch, groups, num_chunks, num_features, value_dim, dtype=torch.float32)
    norms = v.new_empty(batch, groups, num_chunks, num_features, dtype=torch.float32)
    decay = norms if log_decay is None else log_decay.float().contiguous()
    decays = log_decay is not None
    blocks = triton.cdiv(num_features, BLOCK["FB"]) * triton.cdiv(value_dim, BLOCK["VB"])
    kernels.chunk_sums_kernel[(num_chunks, batch * groups, blocks)](
        k_far, v, decay, plan.codes, pairs, sums, norms, *k_far.stride()[:3], *v.stride()[:3],
        length, end, num_features, groups, V=value_dim, DIM=k_far.shape[-1], CHUNK=CHUNK, DECAY=decays,
        PRECISION="ieee" if v.dtype == torch.float32 else "tf32", **BLOCK, num_warps=4, num_stages=2,
    )  # fmt: skip
    lasts = []
    for x, first in ((sums, state.total[..., :-1]), (norms, state.total[..., -1])):
        first = first.float().contiguous()
        last, size = torch.empty_like(first), first[0, 0].numel()
        kernels.scan_kernel[(triton.cdiv(size, 1024), batch * groups)](
            x, first, last, decay, num_chunks, size, groups, offset, length,
            CHUNK=CHUNK, BLOCK=1024, DECAY=decays, num_warps=4,
        )  # fmt: skip
        lasts.append(last)
    return sums, norms, torch.cat([lasts[0], lasts[1][..., None]], -1)


def _fill_sinks(old, new, length, valid, sinks: int):
    """A text's first tokens become sinks. old [B, G, n, size], new [B, G, T, size] -> [B, G, n, size]."""
    rank = length[:, None] + valid.long().cumsum(1) - 1
    chosen = (rank[:, None] == torch.arange(sinks, device=old.device)[:, None]) & valid[:, None]  # [B, n, T]
    index = chosen.int().argmax(-1)[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
    return torch.where(chosen.any(-1)[:, None, :, None], new.gather(2, index), old)
