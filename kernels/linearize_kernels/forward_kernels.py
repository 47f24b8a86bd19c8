"""The forward Triton program of training and prefill.

B batch, L slots, H query heads, G kv heads, M heads of the far term, D head dim, V value dim, d map dim, F Taylor
features, N chunks; BM queries, BN keys and FB features a tile. Weights are taken in base 2 (`exp2`), so scores and
gates carry a factor log2(e).

A tile of queries takes, in this order: the sum over all keys before the last whole chunk that is out of every window
(CHUNK above 0), far tiles since then, where T(x) alone is the weight, the sinks, tiles across the window's edge, and
tiles inside the window. All sums run in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from .tile_kernels import (
    SINK_TILE,
    gather_tile,
    load_norms,
    load_sums,
    load_tile,
    older_sums,
    ordinary_pairs,
    pick,
    query_ranges,
    sees_far,
    sink_pairs,
    sink_range,
    sink_slots,
    store_tile,
)

# Shapes that change from call to call must not compile anew.
UNSPECIALISED = ["length", "window", "sinks", "heads", "group", "far_group"]
FORWARD_UNSPECIALISED = [*UNSPECIALISED, "offset", "past", "span", "num_chunks", "num_spans", "num_features"]


@triton.jit
def _weigh(acc, total, shift, scores, far, far_gate, values, PRECISION: tl.constexpr):
    """One block of an online softmax in base 2: scores (-inf: not exact), far weights (before the gate), values."""
    new_shift = tl.maximum(shift, tl.max(scores, 1))
    finite = tl.where(new_shift == float("-inf"), 0.0, new_shift)
    weights = tl.exp2(scores - finite[:, None])
    if far is not None:
        weights += tl.exp2(far_gate - finite)[:, None] * far
    rescale = tl.exp2(shift - finite)
    total = total * rescale + tl.sum(weights, 1)
    acc = acc * rescale[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, total, new_shift


@triton.jit(do_not_specialize=FORWARD_UNSPECIALISED)
def forward_kernel(
    q, k, v, q_far, k_far, gate, log_decay, out, rest, lse, segments, codes, has_far, first, last, sink_list,
    sinks_before, columns, ones, sums, norms, base_sums, base_norms,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    qf_b, qf_h, qf_t, kf_b, kf_h, kf_t, g_b, g_h, g_t, o_b, o_h, o_t,
    length, window, sinks, heads, group, far_group, offset, past, span, num_chunks, num_spans, num_features, scale,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, FP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, FB: tl.constexpr, FN: tl.constexpr, CHUNK: tl.constexpr,
    SPANS: tl.constexpr, PLAIN: tl.constexpr, DECAY: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head: out [BM, V] and the base-2 log of each denominator.

    Keys lie in slots 0 ... length, queries in slots offset ... length. past: 1 where a sum precedes slot 0.
    """
    start = offset + (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the longest first
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    k, v = k + b * k_b + h // group * k_h, v + b * v_b + h // group * v_h
    k_far = k_far + b * kf_b + h // far_group * kf_h
    segments, codes, has_far = segments + b * length, codes + b * length, has_far + b * length
    first, last = first + b * length, last + b * length
    sink_list, sinks_before = sink_list + b * length, sinks_before + b * (length + 1)
    rows = start + tl.arange(0, BM)
    queries = rows[:, None]
    row, num_rows = start - offset, length - offset  # in the tensors of queries
    rate = 0.0
    if DECAY:
        rate = tl.load(log_decay + h // far_group) * 1.4426950408889634

    x_q = load_tile(q_far + b * qf_b + h * qf_h, qf_t, row, num_rows, BM, F, FP)
    gate_at = gate + b * g_b + h * g_h + (rows - offset).to(tl.int64) * g_t
    far_gate = tl.load(gate_at, mask=rows < length, other=0.0).to(tl.float32) * 1.4426950408889634
    far_gate = tl.where(sees_far(rows, length, window, sinks, has_far, PLAIN), far_gate, float("-inf"))
    acc = tl.zeros([BM, VP], tl.float32)
    total = tl.zeros([BM], tl.float32)
    chunk, low, near, inside, end = query_ranges(start, length, window, sinks, first, BM, BN, CHUNK, PLAIN)

    # The far term first: until exact keys come the shift is the gate itself, so that T(x) is the weight as it stands.
    if CHUNK > 0:
        if (chunk > 0) | (past > 0):
            older, older_norm, base, base_norm, size, base_size, base_factor, seen = older_sums(
                sums, norms, base_sums, base_norms, segments, rows, b * (heads // far_group) + h // far_group, chunk,
                num_chunks, span, num_spans, num_features, offset, rate, length, V, CHUNK, PLAIN, DECAY,
            )  # fmt: skip
            for n in range(0, num_features, FB):
                features = pick(x_q, columns, ones, 0, n, FP, FN, FB, PRECISION)
                features *= pick(x_q, columns, ones, 1, n, FP, FN, FB, PRECISION)
                summed = load_sums(older, base, n, size, base_size, base_factor, V, FB, VP, SPANS)
                norm = load_norms(older_norm, base_norm, n, size, base_size, base_factor, FB, SPANS)
                acc = tl.dot(features.to(x_q.dtype), summed.to(x_q.dtype), acc, input_precision=PRECISION)
                total += tl.sum(features * norm[None, :], 1)
            acc *= seen[:, None]
            total *= seen
    for n in range(low, near):
        key_start = n * BN
        keys = key_start + tl.arange(0, BN)[None, :]
        x_k = load_tile(k_far, kf_t, key_start, length, BN, F, FP)
        values = load_tile(v, v_t, key_start, length, BN, V, VP)
        x = tl.dot(x_q, tl.trans(x_k), input_precision=PRECISION)
        weights = 1.0 + x + 0.5 * x * x
        if DECAY:
            weights *= tl.exp2(rate * tl.maximum(queries - keys, 0))
        weights = tl.where(ordinary_pairs(queries, keys, length, sinks, segments, codes, PLAIN), weights, 0.0)
        total += tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)

    shift = far_gate
    x_exact = load_tile(q + b * q_b + h * q_h, q_t, row, num_rows, BM, D, DP)
    sink_low, sink_end = sink_range(start, length, sinks, first, last, sinks_before, BM, PLAIN)
    for n in range(sink_low, sink_end, SINK_TILE):
        slots, is_slot = sink_slots(n, sink_end, sink_list, PLAIN)
        keys = gather_tile(k, k_t, slots, is_slot, SINK_TILE, D, DP)
        values = gather_tile(v, v_t, slots, is_slot, SINK_TILE, V, VP)
        visible = sink_pairs(queries, slots[None, :], length, sinks, segments, codes, PLAIN) & is_slot[None, :]
        scores = tl.dot(x_exact, tl.trans(keys), input_precision=PRECISION) * scale
        scores = tl.where(visible, scores, float("-inf"))
        acc, total, shift = _weigh(acc, total, shift, scores, None, far_gate, values, PRECISION)
    for n in range(near, inside):
        key_start = n * BN
        keys = key_start + tl.arange(0, BN)[None, :]
        visible = ordinary_pairs(queries, keys, length, sinks, segments, codes, PLAIN)
        exact = visible & (queries - keys < window)
        x_keys = load_tile(k, k_t, key_start, length, BN, D, DP)
        scores = tl.dot(x_exact, tl.trans(x_keys), input_precision=PRECISION) * scale
        scores = tl.where(exact, scores, float("-inf"))
        x_k = load_tile(k_far, kf_t, key_start, length, BN, F, FP)
        x = tl.dot(x_q, tl.trans(x_k), input_precision=PRECISION)
        far = 1.0 + x + 0.5 * x * x
        if DECAY:
            far *= tl.exp2(rate * tl.maximum(queries - keys, 0))
        far = tl.where(visible & (queries - keys >= window), far, 0.0)
        values = load_tile(v, v_t, key_start, length, BN, V, VP)
        acc, total, shift = _weigh(acc, total, shift, scores, far, far_gate, values, PRECISION)
    for n in range(inside, end):
        key_start = n * BN
        keys = key_start + tl.arange(0, BN)[None, :]
        visible = ordinary_pairs(queries, keys, length, sinks, segments, codes, PLAIN)
        x_keys = load_tile(k, k_t, key_start, length, BN, D, DP)
        scores = tl.dot(x_exact, tl.trans(x_keys), input_precision=PRECISION) * scale
        scores = tl.where(visible, scores, float("-inf"))
        values = load_tile(v, v_t, key_start, length, BN, V, VP)
        acc, total, shift = _weigh(acc, total, shift, scores, None, far_gate, values, PRECISION)

    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    store_tile(out + b * o_b + h * o_h, o_t, row, num_rows, acc, BM, V, VP)
    if REST:
        lost = acc - acc.to(out.dtype.element_ty).to(tl.float32)
        store_tile(rest + b * o_b + h * o_h, o_t, row, num_rows, lost, BM, V, VP)
    lse_rows = tl.where(empty, float("inf"), shift + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse + tl.program_id(1).to(tl.int64) * num_rows + row + tl.arange(0, BM), lse_rows, mask=rows < length)
