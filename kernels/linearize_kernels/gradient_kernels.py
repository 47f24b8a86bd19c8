"""The gradient Triton programs of training: of the query side, and of the key side.

B batch, T time, H query heads, G kv heads, M heads of the far term, D head dim, V value dim, d map dim, F Taylor
features, N chunks; BM queries, BN keys and FB features a tile. See forward_kernels for tiles and base-2 weights.

No product takes a transposed product as its operand: Triton 3.4 to 3.7.0 compiles that wrongly on Hopper. The
key side computes its scores transposed from the start. All sums run in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from .forward_kernels import UNSPECIALISED
from .tile_kernels import (
    SINK_TILE,
    gather_tile,
    load_norms,
    load_sums,
    load_tile,
    older_sums,
    ordinary_pairs,
    pick,
    put,
    query_ranges,
    sees_far,
    sink_pairs,
    sink_range,
    sink_slots,
    store_tile,
)

GRADIENT_UNSPECIALISED = [*UNSPECIALISED, "span", "num_chunks", "num_spans", "num_features"]


@triton.jit(do_not_specialize=GRADIENT_UNSPECIALISED)
def query_gradient_kernel(
    q, k, v, q_far, k_far, gate, log_decay, out, rest, grad, lse, delta, weight, dq, dq_far, dgate, ddecay,
    segments, codes, has_far, first, last, sink_list, sinks_before, columns, picks, ones,
    sums, norms, base_sums, base_norms,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    qf_b, qf_h, qf_t, kf_b, kf_h, kf_t, g_b, g_h, g_t, o_b, o_h, o_t,
    do_b, do_h, do_t, dq_b, dq_h, dq_t, dqf_b, dqf_h, dqf_t,
    length, window, sinks, heads, group, far_group, span, num_chunks, num_spans, num_features, scale, scaling,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, FP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, FB: tl.constexpr, FN: tl.constexpr, CHUNK: tl.constexpr,
    SPANS: tl.constexpr, PLAIN: tl.constexpr, DECAY: tl.constexpr, REST: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head: gradients of q (EXACT), q_far, gate, part of log_decay's; delta.

    With CHUNK above 0, far keys before the last whole chunk come in through their sums; then without decay. Without
    EXACT, exact pairs are still weighed, where there are far ones too: delta's correction needs them (at the end).
    """
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    k, v = k + b * k_b + h // group * k_h, v + b * v_b + h // group * v_h
    k_far = k_far + b * kf_b + h // far_group * kf_h
    segments, codes, has_far = segments + b * length, codes + b * length, has_far + b * length
    first, last = first + b * length, last + b * length
    sink_list, sinks_before = sink_list + b * length, sinks_before + b * (length + 1)
    dtype = q.dtype.element_ty
    rows = start + tl.arange(0, BM)
    queries = rows[:, None]
    scalars = tl.program_id(1).to(tl.int64) * length + rows  # where this tile's numbers a query lie
    rate = 0.0
    if DECAY:
        rate = tl.load(log_decay + h // far_group) * 1.4426950408889634

    x_q = load_tile(q_far + b * qf_b + h * qf_h, qf_t, start, length, BM, F, FP)
    x_grad = load_tile(grad + b * do_b + h * do_h, do_t, start, length, BM, V, VP).to(dtype)
    x_out = load_tile(out + b * o_b + h * o_h, o_t, start, length, BM, V, VP).to(tl.float32)
    if REST:
        x_out += load_tile(rest + b * o_b + h * o_h, o_t, start, length, BM, V, VP).to(tl.float32)
    x_delta = tl.sum(x_grad.to(tl.float32) * x_out, 1)
    x_lse = tl.load(lse + scalars, mask=rows < length, other=float("inf"))
    far_gate = tl.load(gate + b * g_b + h * g_h + rows.to(tl.int64) * g_t, mask=rows < length, other=0.0)
    far_weight = tl.exp2(far_gate.to(tl.float32) * 1.4426950408889634 - x_lse)
    far_weight = tl.where(sees_far(rows, length, window, sinks, has_far, PLAIN), far_weight, 0.0)
    tl.store(weight + scalars, far_weight, mask=rows < length)
    # Sums over far pairs leave out the factor far_weight until the end.
    acc_far = tl.zeros([BM, FP], tl.float32)
    acc_gate = tl.zeros([BM], tl.float32)
    acc_decay = tl.zeros([BM], tl.float32)
    acc_distance = tl.zeros([BM], tl.float32)
    chunk, low, near, inside, end = query_ranges(start, length, window, sinks, first, BM, BN, CHUNK, PLAIN)

    if CHUNK > 0:
        if chunk > 0:
            older, older_norm, base, base_norm, size, base_size, base_factor, seen = older_sums(
                sums, norms, base_sums, base_norms, segments, rows, b * (heads // far_group) + h // far_group, chunk,
                num_chunks, span, num_spans, num_features, 0, rate, length, V, CHUNK, PLAIN, False,
            )  # fmt: skip
            for n in range(0, num_features, FB):
                left = pick(x_q, columns, ones, 0, n, FP, FN, FB, PRECISION)
                right = pick(x_q, columns, ones, 1, n, FP, FN, FB, PRECISION)
                summed = load_sums(older, base, n, size, base_size, base_factor, V, FB, VP, SPANS)
                norm = load_norms(older_norm, base_norm, n, size, base_size, base_factor, FB, SPANS)
                slopes = tl.dot(x_grad, tl.trans(summed.to(dtype)), input_precision=PRECISION)
                slopes = (slopes - x_delta[:, None] * norm[None, :]) * seen[:, None]
                acc_gate += tl.sum(left * right * slopes, 1)
                acc_far = put((slopes * right).to(dtype), picks, 0, n, acc_far, FP, FN, FB, PRECISION)
                acc_far = put((slopes * left).to(dtype), picks, 1, n, acc_far, FP, FN, FB, PRECISION)
    for n in range(low, near):
        key_start = n * BN
        keys = key_start + tl.arange(0, BN)[None, :]
        x_k = load_tile(k_far, kf_t, key_start, length, BN, F, FP)
        values = load_tile(v, v_t, key_start, length, BN, V, VP)
        x = tl.dot(x_q, tl.trans(x_k), input_precision=PRECISION)
        dp = tl.dot(x_grad, tl.trans(values), input_precision=PRECISION) - x_delta[:, None]
        factor = tl.where(ordinary_pairs(queries, keys, length, sinks, segments, codes, PLAIN), 1.0, 0.0)
        if DECAY:
            factor *= tl.exp2(rate * tl.maximum(queries - keys, 0))
        far = (1.0 + x + 0.5 * x * x) * factor
        acc_gate += tl.sum(far * dp, 1)
        if DECAY:
            far *= queries - keys
            acc_decay += tl.sum(far * dp, 1)
            acc_distance += tl.sum(far, 1)
        acc_far = tl.dot(((1.0 + x) * factor * dp).to(dtype), x_k, acc_far, input_precision=PRECISION)

    acc_q = tl.zeros([BM, DP], tl.float32)
    acc_weight = tl.zeros([BM], tl.float32)
    acc_exact = tl.zeros([BM], tl.float32)
    x_exact = load_tile(q + b * q_b + h * q_h, q_t, start, length, BM, D, DP)
    sink_low, sink_end = sink_range(start, length, sinks, first, last, sinks_before, BM, PLAIN)
    if not EXACT:
        any_far = tl.max(tl.where(far_weight != 0, 1, 0), 0) > 0
        sink_end, end = tl.where(any_far, sink_end, sink_low), tl.where(any_far, end, near)
        inside = tl.minimum(inside, end)
    for n in range(sink_low, sink_end, SINK_TILE):
        slots, is_slot = sink_slots(n, sink_end, sink_list, PLAIN)
        x_keys = gather_tile(k, k_t, slots, is_slot, SINK_TILE, D, DP)
        values = gather_tile(v, v_t, slots, is_slot, SINK_TILE, V, VP)
        visible = sink_pairs(queries, slots[None, :], length, sinks, segments, codes, PLAIN) & is_slot[None, :]
        scores = tl.dot(x_exact, tl.trans(x_keys), input_precision=PRECISION)
        weights = tl.exp2(tl.where(visible, scores * scale, float("-inf")) - x_lse[:, None])
        slopes = weights * (tl.dot(x_grad, tl.trans(values), input_precision=PRECISION) - x_delta[:, None])
        acc_weight += tl.sum(weights, 1)
        acc_exact += tl.sum(slopes, 1)
        if EXACT:
            acc_q = tl.dot(slopes.to(dtype), x_keys, acc_q, input_precision=PRECISION)
    for n in range(near, inside):
        key_start = n * BN
        keys = key_start + tl.arange(0, BN)[None, :]
        visible = ordinary_pairs(queries, keys, length, sinks, segments, codes, PLAIN)
        exact = visible & (queries - keys < window)
        x_keys = load_tile(k, k_t, key_start, length, BN, D, DP)
        values = load_tile(v, v_t, key_start, length, BN, V, VP)
        x_k = load_tile(k_far, kf_t, key_start, length, BN, F, FP)
        scores = tl.dot(x_exact, tl.trans(x_keys), input_precision=PRECISION)
        weights = tl.exp2(tl.where(exact, scores * scale, float("-inf")) - x_lse[:, None])
        dp = tl.dot(x_grad, tl.trans(values), input_precision=PRECISION) - x_delta[:, None]
        slopes = weights * dp
        acc_weight += tl.sum(weights, 1)
        acc_exact += tl.sum(slopes, 1)
        if EXACT:
            acc_q = tl.dot(slopes.to(dtype), x_keys, acc_q, input_precision=PRECISION)
        x = tl.dot(x_q, tl.trans(x_k), input_precision=PRECISION)
        factor = tl.where(visible & (queries - keys >= window), 1.0, 0.0)
        if DECAY:
            factor *= tl.exp2(rate * tl.maximum(queries - keys, 0))
        far = (1.0 + x + 0.5 * x * x) * factor
        acc_gate += tl.sum(far * dp, 1)
        if DECAY:
            far *= queries - keys
            acc_decay += tl.sum(far * dp, 1)
            acc_distance += tl.sum(far, 1)
        acc_far = tl.dot(((1.0 + x) * factor * dp).to(dtype), x_k, acc_far, input_precision=PRECISION)
    for n in range(inside, end):
        key_start = n * BN
        keys = key_start + tl.arange(0, BN)[None, :]
        visible = ordinary_pairs(queries, keys, length, sinks, segments, codes, PLAIN)
        x_keys = load_tile(k, k_t, key_start, length, BN, D, DP)
        values = load_tile(v, v_t, key_start, length, BN, V, VP)
        scores = tl.dot(x_exact, tl.trans(x_keys), input_precision=PRECISION)
        weights = tl.exp2(tl.where(visible, scores * scale, float("-inf")) - x_lse[:, None])
        slopes = weights * (tl.dot(x_grad, tl.trans(values), input_precision=PRECISION) - x_delta[:, None])
        acc_weight += tl.sum(weights, 1)
        acc_exact += tl.sum(slopes, 1)
        if EXACT:
            acc_q = tl.dot(slopes.to(dtype), x_keys, acc_q, input_precision=PRECISION)

    if EXACT:
        store_tile(dq + b * dq_b + h * dq_h, dq_t, start, length, acc_q * scaling, BM, D, DP)
    store_tile(dq_far + b * dqf_b + h * dqf_h, dqf_t, start, length, acc_far * far_weight[:, None], BM, F, FP)
    # Sums of a row's slopes are small differences. `out`, a sum of rounded weights, gives delta too coarsely
    # for them; the slopes' own sum says by how much, as the true ones add up to nothing. (The weights add up
    # to 1.)
    missed = far_weight * acc_gate + acc_exact
    tl.store(delta + scalars, x_delta + missed, mask=rows < length)
    tl.store(dgate + scalars, far_weight * acc_gate - missed * (1.0 - acc_weight), mask=rows < length)
    if DECAY:
        tl.store(ddecay + scalars, far_weight * (acc_decay - missed * acc_distance), mask=rows < length)


@triton.jit(do_not_specialize=GRADIENT_UNSPECIALISED)
def key_gradient_kernel(
    q, k, v, q_far, k_far, log_decay, grad, lse, delta, weight, dk, dv, dk_far,
    segments, codes, last, columns, picks, ones, sums, norms, base_sums, base_norms,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, qf_b, qf_h, qf_t, kf_b, kf_h, kf_t,
    do_b, do_h, do_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, dkf_b, dkf_h, dkf_t,
    length, window, sinks, heads, group, far_group, span, num_chunks, num_spans, num_features, scale, scaling,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, FP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, FB: tl.constexpr, FN: tl.constexpr, CHUNK: tl.constexpr,
    SPANS: tl.constexpr, PLAIN: tl.constexpr, DECAY: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BN keys of one kv head: gradients of k_far and (EXACT) of k and v, over the group's query heads.

    Scores are transposed, [BN, BM]. far_group query heads share one k_far: group of them, or 1. With CHUNK above 0,
    queries from the first whole chunk that all have out of their windows come in through their sums. In a plain batch
    sinks are left out.
    """
    start = tl.program_id(0) * BN  # the longest first
    kv_heads = heads // group
    b, g = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    segments, codes, last = segments + b * length, codes + b * length, last + b * length
    dtype = q.dtype.element_ty
    rows = start + tl.arange(0, BN)
    keys = rows[:, None]
    low, end = start // BM, tl.cdiv(length, BM)
    if PLAIN:
        has_sink = False  # sink_gradient_kernel sees to them
    else:
        code = tl.load(codes + rows, mask=rows < length, other=-1)
        has_sink = tl.max(tl.where(code >= 0, code & 1, 0), 0) > 0
        end = tl.cdiv(tl.load(last + tl.minimum(start + BN, length) - 1) + 1, BM)
    near_end = tl.minimum(tl.cdiv(start + BN - 1 + window, BM), end)
    far_end, chunk = end, 0
    if CHUNK > 0:
        chunk = tl.cdiv(start + BN - 1 + window, CHUNK)
        far_end = tl.minimum(chunk * (CHUNK // BM), end)
        near_end = tl.minimum(near_end, far_end)
    # Tiles of queries that have all these keys in their windows.
    inside_end = tl.minimum(tl.maximum((start + window) // BM, low), near_end)
    first_far = near_end if EXACT else inside_end  # far pairs before it come with the exact pairs of their tiles

    if EXACT:
        x_keys = load_tile(k + b * k_b + g * k_h, k_t, start, length, BN, D, DP)
        acc_k = tl.zeros([BN, DP], tl.float32)
    values = load_tile(v + b * v_b + g * v_h, v_t, start, length, BN, V, VP)
    acc_v = tl.zeros([BN, VP], tl.float32)
    acc_far = tl.zeros([BN, FP], tl.float32)
    if EXACT:
        for head in range(group):
            h = g * group + head
            far_head = h // far_group
            x_k = load_tile(k_far + b * kf_b + far_head * kf_h, kf_t, start, length, BN, F, FP)
            rate = 0.0
            if DECAY:
                rate = tl.load(log_decay + far_head) * 1.4426950408889634
            head_q, head_far, head_grad = (
                q + b * q_b + h * q_h,
                q_far + b * qf_b + h * qf_h,
                grad + b * do_b + h * do_h,
            )
            scalars = (b * heads + h) * length
            exact_end = inside_end
            if has_sink:
                exact_end = end
            for tile in range(low, exact_end):
                spots = tile * BM + tl.arange(0, BM)
                visible = sink_pairs(spots[None, :], keys, length, sinks, segments, codes, PLAIN)
                ordinary = ordinary_pairs(spots[None, :], keys, length, sinks, segments, codes, PLAIN)
                visible |= ordinary & (tile < inside_end)
                x_lse = tl.load(lse + scalars + spots, mask=spots < length, other=float("inf"))
                x_delta = tl.load(delta + scalars + spots, mask=spots < length, other=0.0)
                x_exact = load_tile(head_q, q_t, tile * BM, length, BM, D, DP)
                x_grad = load_tile(head_grad, do_t, tile * BM, length, BM, V, VP).to(dtype)
                scores = tl.dot(x_keys, tl.trans(x_exact), input_precision=PRECISION)
                weights = tl.exp2(tl.where(visible, scores * scale, float("-inf")) - x_lse[None, :])
                acc_v = tl.dot(weights.to(dtype), x_grad, acc_v, input_precision=PRECISION)
                dp = tl.dot(values, tl.trans(x_grad), input_precision=PRECISION) - x_delta[None, :]
                acc_k = tl.dot((weights * dp).to(dtype), x_exact, acc_k, input_precision=PRECISION)
            for tile in range(inside_end, near_end):
                spots = tile * BM + tl.arange(0, BM)
                queries = spots[None, :]
                inside = spots < length
                visible = ordinary_pairs(queries, keys, length, sinks, segments, codes, PLAIN)
                exact = visible & (queries - keys < window)
                x_lse = tl.load(lse + scalars + spots, mask=inside, other=float("inf"))
                x_delta = tl.load(delta + scalars + spots, mask=inside, other=0.0)
                far_weight = tl.load(weight + scalars + spots, mask=inside, other=0.0)
                x_exact = load_tile(head_q, q_t, tile * BM, length, BM, D, DP)
                x_grad = load_tile(head_grad, do_t, tile * BM, length, BM, V, VP).to(dtype)
                scores = tl.dot(x_keys, tl.trans(x_exact), input_precision=PRECISION)
                weights = tl.exp2(tl.where(exact, scores * scale, float("-inf")) - x_lse[None, :])
                x_q = load_tile(head_far, qf_t, tile * BM, length, BM, F, FP)
                x = tl.dot(x_k, tl.trans(x_q), input_precision=PRECISION)
                factor = tl.where(visible & (queries - keys >= window), far_weight[None, :], 0.0)
                if DECAY:
                    factor *= tl.exp2(rate * tl.maximum(queries - keys, 0))
                both = (weights + factor * (1.0 + x + 0.5 * x * x)).to(dtype)
                acc_v = tl.dot(both, x_grad, acc_v, input_precision=PRECISION)
                dp = tl.dot(values, tl.trans(x_grad), input_precision=PRECISION) - x_delta[None, :]
                acc_k = tl.dot((weights * dp).to(dtype), x_exact, acc_k, input_precision=PRECISION)
                acc_far = tl.dot((factor * (1.0 + x) * dp).to(dtype), x_q, acc_far, input_precision=PRECISION)
            if far_group < group:  # each head has a k_far of its own: park its sum
                store_tile(dk_far + b * dkf_b + far_head * dkf_h, dkf_t, start, length, acc_far, BN, F, FP)
                acc_far = tl.zeros([BN, FP], tl.float32)
        store_tile(dk + b * dk_b + g * dk_h, dk_t, start, length, acc_k * scaling, BN, D, DP)

        tl.debug_barrier()  # what was parked is read by other threads
    for head in range(group):
        h = g * group + head
        far_head = h // far_group
        x_k = load_tile(k_far + b * kf_b + far_head * kf_h, kf_t, start, length, BN, F, FP)
        if far_group < group:
            if EXACT:
                parked = dk_far + b * dkf_b + far_head * dkf_h
                acc_far = load_tile(parked, dkf_t, start, length, BN, F, FP).to(tl.float32)
            else:
                acc_far = tl.zeros([BN, FP], tl.float32)
        rate = 0.0
        if DECAY:
            rate = tl.load(log_decay + far_head) * 1.4426950408889634
        head_far, head_grad = q_far + b * qf_b + h * qf_h, grad + b * do_b + h * do_h
        scalars = (b * heads + h) * length
        for tile in range(first_far, far_end):
            spots = tile * BM + tl.arange(0, BM)
            queries = spots[None, :]
            inside = spots < length
            x_delta = tl.load(delta + scalars + spots, mask=inside, other=0.0)
            far_weight = tl.load(weight + scalars + spots, mask=inside, other=0.0)
            x_q = load_tile(head_far, qf_t, tile * BM, length, BM, F, FP)
            x = tl.dot(x_k, tl.trans(x_q), input_precision=PRECISION)
            x_grad = load_tile(head_grad, do_t, tile * BM, length, BM, V, VP).to(dtype)
            visible = ordinary_pairs(queries, keys, length, sinks, segments, codes, PLAIN)
            if not EXACT:
                visible = visible & (queries - keys >= window)
            factor = tl.where(visible, far_weight[None, :], 0.0)
            if DECAY:
                factor *= tl.exp2(rate * tl.maximum(queries - keys, 0))
            if EXACT:
                weights = (factor * (1.0 + x + 0.5 * x * x)).to(dtype)
                acc_v = tl.dot(weights, x_grad, acc_v, input_precision=PRECISION)
            dp = tl.dot(values, tl.trans(x_grad), input_precision=PRECISION) - x_delta[None, :]
            acc_far = tl.dot((factor * (1.0 + x) * dp).to(dtype), x_q, acc_far, input_precision=PRECISION)
        if CHUNK > 0:
            if ((head + 1) % far_group == 0) & (far_end < end):
                boundary = chunk * CHUNK
                s = boundary // span
                place = b * (heads // far_group) + far_head
                row, base = (place * num_chunks + chunk) * num_features, (place * num_spans + s) * num_features
                base_size = tl.where(s + 1 < num_spans, num_features, 0)
                if PLAIN:
                    usable = rows >= sinks
                else:
                    segment = tl.load(segments + boundary)
                    usable = tl.load(codes + rows, mask=rows < length, other=-1) == 2 * segment
                    same = tl.load(segments + tl.minimum((s + 1) * span, length - 1)) == segment
                    base_size = tl.where(same, base_size, 0)
                seen = tl.where(usable, 1.0, 0.0)
                for n in range(0, num_features, FB):
                    left = pick(x_k, columns, ones, 0, n, FP, FN, FB, PRECISION)
                    right = pick(x_k, columns, ones, 1, n, FP, FN, FB, PRECISION)
                    summed = load_sums(sums + row * V, base_sums + base * V, n, num_features, base_size, 1.0, V, FB, VP,
                                       SPANS).to(dtype)  # fmt: skip
                    norm = load_norms(norms + row, base_norms + base, n, num_features, base_size, 1.0, FB, SPANS)
                    if EXACT:
                        features = (left * right * seen[:, None]).to(dtype)
                        acc_v = tl.dot(features, summed, acc_v, input_precision=PRECISION)
                    slopes = tl.dot(values, tl.trans(summed), input_precision=PRECISION) + norm[None, :]
                    slopes *= seen[:, None]
                    acc_far = put((slopes * right).to(dtype), picks, 0, n, acc_far, FP, FN, FB, PRECISION)
                    acc_far = put((slopes * left).to(dtype), picks, 1, n, acc_far, FP, FN, FB, PRECISION)
        if far_group < group:
            store_tile(dk_far + b * dkf_b + far_head * dkf_h, dkf_t, start, length, acc_far, BN, F, FP)

    if EXACT:
        store_tile(dv + b * dv_b + g * dv_h, dv_t, start, length, acc_v, BN, V, VP)
    if far_group == group:
        store_tile(dk_far + b * dkf_b + g * dkf_h, dkf_t, start, length, acc_far, BN, F, FP)
