"""The gradient Triton programs of `training`: of the query side, and of the key side.

B batch, T time, H query heads, G kv heads, M heads of the far term, D head dim, V value dim, d map dim;
BM queries and BN keys a tile. See training_kernels for tiles and base-2 weights.

No product takes a transposed product as its operand: Triton 3.4 to 3.7.0 compiles that wrongly on Hopper. The
key side computes its scores transposed from the start. All sums run in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from .training_kernels import UNSPECIALISED, load_tile, sees_far, store_tile, tile_ranges, visible_pairs

KEY_UNSPECIALISED = [name for name in UNSPECIALISED if name != "num_tiles"]


@triton.jit(do_not_specialize=UNSPECIALISED)
def query_gradient_kernel(
    q, k, v, q_far, k_far, gate, log_decay, out, rest, grad, lse, delta, weight, dq, dq_far, dgate, ddecay,
    segments, codes, has_far, first, tiles, before,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    qf_b, qf_h, qf_t, kf_b, kf_h, kf_t, g_b, g_h, g_t, o_b, o_h, o_t,
    do_b, do_h, do_t, dq_b, dq_h, dq_t, dqf_b, dqf_h, dqf_t,
    length, num_tiles, window, sinks, heads, group, far_group, scale, scaling,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, FP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PLAIN: tl.constexpr, DECAY: tl.constexpr, REST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head: gradients of q, q_far, gate, part of log_decay's; delta."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    q, q_far = q + b * q_b + h * q_h, q_far + b * qf_b + h * qf_h
    k, v = k + b * k_b + h // group * k_h, v + b * v_b + h // group * v_h
    k_far = k_far + b * kf_b + h // far_group * kf_h
    segments, codes, has_far, first = (
        segments + b * length,
        codes + b * length,
        has_far + b * length,
        first + b * length,
    )
    tiles, before = tiles + b * num_tiles, before + b * (num_tiles + 1)
    dtype = q.dtype.element_ty
    rows = start + tl.arange(0, BM)
    queries = rows[:, None]
    scalars = tl.program_id(1).to(tl.int64) * length + rows  # where this tile's numbers a query lie
    rate = 0.0
    if DECAY:
        rate = tl.load(log_decay + h // far_group) * 1.4426950408889634

    x_q = load_tile(q_far, qf_t, start, length, BM, F, FP)
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
    low, far_end, end, sinks_low, sinks_end, sink_list = tile_ranges(
        start, length, window, sinks, first, before, num_tiles, BM, BN, PLAIN
    )

    for n in range(low - sinks_low, far_end - sinks_end):
        if PLAIN:
            key_start = (n + sink_list) * BN
        else:
            key_start = tl.load(tiles + n) * BN
        x_k = load_tile(k_far, kf_t, key_start, length, BN, F, FP)
        x = tl.dot(x_q, tl.trans(x_k), input_precision=PRECISION)
        dp = tl.dot(
            x_grad, tl.trans(load_tile(v, v_t, key_start, length, BN, V, VP)), input_precision=PRECISION
        )
        dp = dp - x_delta[:, None]
        keys = key_start + tl.arange(0, BN)[None, :]
        factor = tl.full([BM, BN], 1.0, tl.float32)
        if DECAY:
            factor *= tl.exp2(rate * tl.maximum(queries - keys, 0))
        if not PLAIN:
            visible, _ = visible_pairs(queries, keys, length, sinks, segments, codes, PLAIN)
            factor = tl.where(visible, factor, 0.0)
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
    x_exact = load_tile(q, q_t, start, length, BM, D, DP)
    for n in range(0, sinks_end - sinks_low + end - far_end):
        tile = far_end + n - (sinks_end - sinks_low)
        if n < sinks_end - sinks_low:
            if PLAIN:
                tile = n
            else:
                tile = tl.load(tiles + sink_list + sinks_low + n)
        key_start = tile * BN
        keys = key_start + tl.arange(0, BN)[None, :]
        visible, sink = visible_pairs(queries, keys, length, sinks, segments, codes, PLAIN)
        exact = visible & ((queries - keys < window) | sink)
        x_keys = load_tile(k, k_t, key_start, length, BN, D, DP)
        scores = tl.dot(x_exact, tl.trans(x_keys), input_precision=PRECISION)
        weights = tl.exp2(tl.where(exact, scores * scale, float("-inf")) - x_lse[:, None])
        dp = tl.dot(
            x_grad, tl.trans(load_tile(v, v_t, key_start, length, BN, V, VP)), input_precision=PRECISION
        )
        dp = dp - x_delta[:, None]
        slopes = weights * dp
        acc_weight += tl.sum(weights, 1)
        acc_exact += tl.sum(slopes, 1)
        acc_q = tl.dot(slopes.to(dtype), x_keys, acc_q, input_precision=PRECISION)
        x_k = load_tile(k_far, kf_t, key_start, length, BN, F, FP)
        x = tl.dot(x_q, tl.trans(x_k), input_precision=PRECISION)
        factor = tl.where(visible & (exact == 0), 1.0, 0.0)
        if DECAY:
            factor *= tl.exp2(rate * tl.maximum(queries - keys, 0))
        far = (1.0 + x + 0.5 * x * x) * factor
        acc_gate += tl.sum(far * dp, 1)
        if DECAY:
            far *= queries - keys
            acc_decay += tl.sum(far * dp, 1)
            acc_distance += tl.sum(far, 1)
        acc_far = tl.dot(((1.0 + x) * factor * dp).to(dtype), x_k, acc_far, input_precision=PRECISION)

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


@triton.jit(do_not_specialize=KEY_UNSPECIALISED)
def key_gradient_kernel(
    q, k, v, q_far, k_far, log_decay, grad, lse, delta, weight, dk, dv, dk_far,
    segments, codes, last,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, qf_b, qf_h, qf_t, kf_b, kf_h, kf_t,
    do_b, do_h, do_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, dkf_b, dkf_h, dkf_t,
    length, window, sinks, heads, group, far_group, scale, scaling,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, FP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PLAIN: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BN keys of one kv head: gradients of k, v and k_far, summed over the group's query heads.

    Scores are transposed, [BN, BM]. far_group query heads share one k_far: group of them, or 1.
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
        has_sink = start < sinks
    else:
        code = tl.load(codes + rows, mask=rows < length, other=-1)
        has_sink = tl.max(tl.where(code >= 0, code & 1, 0), 0) > 0
        end = tl.cdiv(tl.load(last + tl.minimum(start + BN, length) - 1) + 1, BM)
    mixed_end = tl.minimum(tl.cdiv(start + BN - 1 + window, BM), end)
    if has_sink:
        mixed_end = end

    x_keys = load_tile(k + b * k_b + g * k_h, k_t, start, length, BN, D, DP)
    values = load_tile(v + b * v_b + g * v_h, v_t, start, length, BN, V, VP)
    acc_k = tl.zeros([BN, DP], tl.float32)
    acc_v = tl.zeros([BN, VP], tl.float32)
    acc_far = tl.zeros([BN, FP], tl.float32)
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
        for tile in range(low, mixed_end):
            columns = tile * BM + tl.arange(0, BM)
            queries = columns[None, :]
            inside = columns < length
            visible, sink = visible_pairs(queries, keys, length, sinks, segments, codes, PLAIN)
            exact = visible & ((queries - keys < window) | sink)
            x_lse = tl.load(lse + scalars + columns, mask=inside, other=float("inf"))
            x_delta = tl.load(delta + scalars + columns, mask=inside, other=0.0)
            far_weight = tl.load(weight + scalars + columns, mask=inside, other=0.0)
            x_exact = load_tile(head_q, q_t, tile * BM, length, BM, D, DP)
            scores = tl.dot(x_keys, tl.trans(x_exact), input_precision=PRECISION)
            weights = tl.exp2(tl.where(exact, scores * scale, float("-inf")) - x_lse[None, :])
            x_q = load_tile(head_far, qf_t, tile * BM, length, BM, F, FP)
            x = tl.dot(x_k, tl.trans(x_q), input_precision=PRECISION)
            factor = tl.where(visible & (exact == 0), far_weight[None, :], 0.0)
            if DECAY:
                factor *= tl.exp2(rate * tl.maximum(queries - keys, 0))
            x_grad = load_tile(head_grad, do_t, tile * BM, length, BM, V, VP).to(dtype)
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
            acc_far = load_tile(dk_far + b * dkf_b + far_head * dkf_h, dkf_t, start, length, BN, F, FP)
        rate = 0.0
        if DECAY:
            rate = tl.load(log_decay + far_head) * 1.4426950408889634
        head_far, head_grad = q_far + b * qf_b + h * qf_h, grad + b * do_b + h * do_h
        scalars = (b * heads + h) * length
        for tile in range(mixed_end, end):
            columns = tile * BM + tl.arange(0, BM)
            queries = columns[None, :]
            inside = columns < length
            x_delta = tl.load(delta + scalars + columns, mask=inside, other=0.0)
            far_weight = tl.load(weight + scalars + columns, mask=inside, other=0.0)
            x_q = load_tile(head_far, qf_t, tile * BM, length, BM, F, FP)
            x = tl.dot(x_k, tl.trans(x_q), input_precision=PRECISION)
            x_grad = load_tile(head_grad, do_t, tile * BM, length, BM, V, VP).to(dtype)
            factor = tl.broadcast_to(far_weight[None, :], [BN, BM])
            if not PLAIN:
                visible, _ = visible_pairs(queries, keys, length, sinks, segments, codes, PLAIN)
                factor = tl.where(visible, factor, 0.0)
            if DECAY:
                factor *= tl.exp2(rate * tl.maximum(queries - keys, 0))
            weights = (factor * (1.0 + x + 0.5 * x * x)).to(dtype)
            acc_v = tl.dot(weights, x_grad, acc_v, input_precision=PRECISION)
            dp = tl.dot(values, tl.trans(x_grad), input_precision=PRECISION) - x_delta[None, :]
            acc_far = tl.dot((factor * (1.0 + x) * dp).to(dtype), x_q, acc_far, input_precision=PRECISION)
        if far_group < group:
            store_tile(dk_far + b * dkf_b + far_head * dkf_h, dkf_t, start, length, acc_far, BN, F, FP)

    store_tile(dv + b * dv_b + g * dv_h, dv_t, start, length, acc_v, BN, V, VP)
    if far_group == group:
        store_tile(dk_far + b * dkf_b + g * dkf_h, dkf_t, start, length, acc_far, BN, F, FP)
