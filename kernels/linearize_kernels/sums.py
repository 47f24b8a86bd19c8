"""Sums of features ⊗ values over chunks and spans: what the forward and gradient kernels take for far tokens.

B batch, H query heads, G kv heads, M far heads (G or H), L slots, V value dim, d map dim, F Taylor features,
N chunks, S spans
"""

from typing import NamedTuple

import torch
import triton

from . import sum_kernels as kernels
from .configs import Config, padded, precision
from .picks import make_picks
from .plan import Plan

TARGET_PROGRAMS = 528  # four for each multiprocessor of a large GPU: rows are cut into spans until there are as many


class Sums(NamedTuple):
    """Sums at each chunk's boundary within its span, and each span's base; in the tokens' dtype, norms in float32.

    What lies before (or after) a boundary is base + sum. Without bases (one span, no past) those are dummies.
    """

    sums: torch.Tensor  # [B, M, N, F, V]
    norms: torch.Tensor  # [B, M, N, F]
    base_sums: torch.Tensor  # [B, M, S, F, V]
    base_norms: torch.Tensor  # [B, M, S, F]
    chunk: int
    span: int
    has_bases: bool

    def arguments(self) -> tuple:
        return self.sums, self.norms, self.base_sums, self.base_norms

    def sizes(self) -> tuple:
        return self.span, self.sums.shape[2], self.base_sums.shape[2]


def no_sums(device) -> Sums:
    """Where all far tokens are taken one by one."""
    dummy = torch.zeros(1, 1, 1, 1, 1, device=device)
    return Sums(dummy, dummy, dummy, dummy, 0, 1, False)


def key_sums(k_far, v, plan: Plan, config: Config, *, sinks: int, end=None, log_decay=None, first=None, offset=0,
             return_last=False):  # fmt: skip
    """Sums of features(k_far) ⊗ v over ordinary keys before each boundary.

    k_far [B, M, L, d], v [B, G, L, V]; only slots before `end`. log_decay [M] float32 or None. first [B, M, F, V + 1]
    float32: a past, as seen from slot `offset`. Returns (Sums, the sum of all [B, M, F, V + 1] float32 as seen from
    slot L, or None).
    """
    y_group = k_far.shape[1] // v.shape[1]
    return _run(k_far, v, plan, config, (k_far.shape[1], 1, y_group), sinks=sinks, end=end, log_decay=log_decay,
                first=first, offset=offset, return_last=return_last)  # fmt: skip


def query_sums(q_far, grad, weight, delta, plan: Plan, config: Config, *, far_heads: int) -> Sums:
    """Sums of weight · features(q_far) ⊗ [grad | -delta] over queries from each boundary on.

    q_far [B, H, L, d], grad [B, H, L, V], weight and delta [B, H, L] float32.
    """
    heads = far_heads, q_far.shape[1] // far_heads, 1
    return _run(q_far, grad, plan, config, heads, sinks=0, weight=weight, extra=delta)[0]


def _run(x, y, plan, config, heads, *, sinks, end=None, weight=None, extra=None, log_decay=None, first=None, offset=0,
         return_last=False):  # fmt: skip
    (batch, _, length, map_dim), value_dim = x.shape, y.shape[-1]
    far_heads, tiles, chunk, reverse = heads[0], config.sums, config.chunk, weight is not None
    assert chunk % tiles.slots == 0, "a chunk's boundary must be a tile's"
    picks = make_picks(map_dim, x.dtype, x.device)
    num_features, rows = picks.num_features, batch * far_heads
    blocks = triton.cdiv(num_features, tiles.features)
    span = choose_span(length, rows * blocks, chunk)
    num_chunks, num_spans = triton.cdiv(length, chunk) + 1, triton.cdiv(length, span)
    shape, float32 = (batch, far_heads), torch.float32
    sums = x.new_empty(*shape, num_chunks, num_features, value_dim)
    norms = x.new_empty(*shape, num_chunks, num_features, dtype=float32)
    span_sums = x.new_empty(*shape, num_spans, num_features, value_dim, dtype=float32)
    span_norms = x.new_empty(*shape, num_spans, num_features, dtype=float32)
    decay, decays = (norms, False) if log_decay is None else (log_decay, True)
    kernels.feature_sums_kernel[(num_spans, rows, blocks)](
        x, y, norms if weight is None else weight, norms if extra is None else extra, decay, plan.segments, plan.codes,
        *picks.arguments(), sums, norms, span_sums, span_norms, *x.stride()[:3], *y.stride()[:3],
        length, length if end is None else end, span, sinks, num_features, num_chunks, *heads,
        V=value_dim, DIM=map_dim, VP=padded(value_dim), FP=padded(map_dim), FN=picks.ones.shape[1],
        FB=tiles.features, BN=tiles.slots, CHUNK=chunk, REVERSE=reverse, PLAIN=plan.plain, DECAY=decays,
        PRECISION=precision(x.dtype),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    has_bases = num_spans > 1 or first is not None
    if not has_bases and not return_last:
        return Sums(sums, norms, sums, norms, chunk, span, False), None
    last = x.new_empty(*shape, num_features, value_dim + 1, dtype=float32)
    past = last if first is None else first.float().contiguous()
    bases = []
    for new, column, dtype in ((span_sums, 0, x.dtype), (span_norms, value_dim, float32)):
        bases.append(torch.empty_like(new, dtype=dtype) if has_bases else new)
        size = new[0, 0, 0].numel()
        kernels.scan_kernel[(triton.cdiv(size, 1024), rows)](
            new, past, bases[-1], last, picks.weights, decay, plan.segments, length, span, num_spans, num_features,
            offset, far_heads, COLUMNS=size // num_features, FIRST_COLUMN=column, WIDTH=value_dim + 1,
            TILE=tiles.slots, BLOCK=1024, REVERSE=reverse, PLAIN=plan.plain, DECAY=decays, PAST=first is not None,
            BASES=has_bases, LAST=return_last, num_warps=4,
        )  # fmt: skip
    return Sums(sums, norms, *bases, chunk, span, has_bases), last if return_last else None


def choose_span(length: int, rows: int, chunk: int) -> int:
    """Slots of one program: a multiple of `chunk`, so that `rows` times the spans fill the GPU."""
    num_spans = min(triton.cdiv(TARGET_PROGRAMS, rows), triton.cdiv(length, 2 * chunk))
    return triton.cdiv(triton.cdiv(length, num_spans), chunk) * chunk
