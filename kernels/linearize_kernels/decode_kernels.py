"""The Triton program of `decode`: everything a layer does for one token, in one launch.

B batch, H query heads, G kv heads, D head dim, V value dim, d map dim, F Taylor features, R ring slots, n
sinks; VB value columns of one program, HP query heads of a group, padded to 16.

A program owns VB columns of one kv head's state, and its own copy of the normaliser and of the token counter,
so that no program waits for another. Scores are recomputed by each of them: keys are few and stay in the L2
cache.
"""

import triton
import triton.language as tl

FOLD = tl.constexpr(64)  # tokens folded at once


@triton.jit
def taylor_features(x, stride, pairs, rows, is_row, feature, num_features, DIM: tl.constexpr):
    """Taylor features of rows of x [., DIM], float32, zero outside. rows, is_row and feature are shaped to
    broadcast.

    pairs [2, F]: which two entries make a feature; entry DIM stands for 1. A square carries sqrt(1/2).
    """
    exists = feature < num_features
    i = tl.load(pairs + feature, mask=exists, other=DIM)
    j = tl.load(pairs + num_features + feature, mask=exists, other=DIM)
    rows = tl.cast(rows, tl.int64) * stride
    left = tl.load(x + rows + i, mask=is_row & (i < DIM), other=1.0).to(tl.float32)
    right = tl.load(x + rows + j, mask=is_row & (j < DIM), other=1.0).to(tl.float32)
    weight = tl.where((i == j) & (i < DIM), 0.7071067811865476, 1.0)
    return tl.where(is_row & exists, left * right * weight, 0.0)


@triton.jit
def _exact(scores, values, shift, total, acc, PRECISION: tl.constexpr):
    """One block of an online softmax in base 2: scores [HP, N] (-inf: unseen), values [N, VB]."""
    new_shift = tl.maximum(shift, tl.max(scores, 1))
    finite = tl.where(new_shift == float("-inf"), 0.0, new_shift)
    weights = tl.exp2(scores - finite[:, None])
    rescale = tl.exp2(shift - finite)
    acc = acc * rescale[:, None]
    acc += tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return new_shift, total * rescale + tl.sum(weights, 1), acc


@triton.jit(do_not_specialize=["window", "ring", "sinks", "group", "heads", "num_features"])
def decode_kernel(
    q, k, v, q_far, k_far, gate, log_decay, out,
    total, norm, sink_k, sink_v, ring_k, ring_v, ring_far, ring_kind, position, offset, pairs,
    q_b, q_h, k_b, k_h, v_b, v_h, qf_b, qf_h, kf_b, kf_h, g_b, g_h, o_b, o_h,
    window, ring, sinks, group, heads, num_features, scale,
    D: tl.constexpr, V: tl.constexpr, DIM: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr,
    VB: tl.constexpr, RB: tl.constexpr, FB: tl.constexpr, SINKS: tl.constexpr, HP: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr, SUM_PRECISION: tl.constexpr,
):  # fmt: skip
    """VB value columns of one kv head: out [group, VB] of a new token, and the state moves on by it."""
    split, num_splits = tl.program_id(0), tl.num_programs(0)
    groups = heads // group
    b, g = (tl.program_id(1) // groups).to(tl.int64), (tl.program_id(1) % groups).to(tl.int64)
    bg = tl.program_id(1).to(tl.int64)
    own = bg * num_splits + split  # this program's counter and normaliser
    dtype = q.dtype.element_ty
    now = tl.load(position + own)  # this token's number; a token lies in slot number % ring
    length = now + tl.load(offset + b)  # tokens before this one that are not padding
    folded = tl.maximum(now - window + 1, 0) // FOLD * FOLD  # older tokens are in `total`
    next_folded = tl.maximum(now - window + 2, 0) // FOLD * FOLD
    head = tl.arange(0, HP)
    is_head = head < group
    h = g * group + head
    column = split * VB + tl.arange(0, VB)
    dim, far_dim = tl.arange(0, DP), tl.arange(0, FP)
    is_dim, is_far, is_column = dim < D, far_dim < DIM, column < V
    rate = 0.0
    if DECAY:
        rate = tl.load(log_decay + g) * 1.4426950408889634

    # The sum over folded tokens. far_acc and far_total leave out the gate until the end.
    q_far += b * qf_b + g * group * qf_h
    total += bg * num_features * V
    norm += own * num_features
    far_acc = tl.zeros([HP, VB], tl.float32)
    far_total = tl.zeros([HP], tl.float32)
    for start in range(0, num_features, FB):
        feature = start + tl.arange(0, FB)
        exists = feature < num_features
        x = taylor_features(
            q_far, qf_h, pairs, head[:, None], is_head[:, None], feature[None, :], num_features, DIM
        )
        sums = tl.load(
            total + feature[:, None] * V + column[None, :],
            mask=exists[:, None] & is_column[None, :],
            other=0.0,
        )
        far_acc = tl.dot(x, sums.to(tl.float32), far_acc, input_precision=SUM_PRECISION)
        far_total += tl.sum(x * tl.load(norm + feature, mask=exists, other=0.0)[None, :], 1)
    count = tl.load(norm)  # the constant feature's sum: above 0 where anything was folded
    if DECAY:
        fade = tl.exp2(rate * (now - folded - window + 1))
        far_acc *= fade
        far_total *= fade
    sees_far = (count > 0).to(tl.int32)

    # The sinks and this token, exactly.
    queries = tl.load(
        q + b * q_b + h[:, None] * q_h + dim[None, :], mask=is_head[:, None] & is_dim[None, :], other=0.0
    )
    row = tl.arange(0, SINKS)
    is_sink, is_new = (row < sinks) & (row < length), row == sinks
    sink_base = bg * sinks + row[:, None]
    new_k = tl.load(k + b * k_b + g * k_h + dim, mask=is_dim, other=0.0)
    new_v = tl.load(v + b * v_b + g * v_h + column, mask=is_column, other=0.0)
    keys = tl.load(sink_k + sink_base * D + dim[None, :], mask=is_sink[:, None] & is_dim[None, :], other=0.0)
    keys = tl.where(is_new[:, None], new_k[None, :], keys)
    values = tl.load(
        sink_v + sink_base * V + column[None, :], mask=is_sink[:, None] & is_column[None, :], other=0.0
    )
    values = tl.where(is_new[:, None], new_v[None, :], values)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    scores = tl.where((is_sink | is_new)[None, :], scores, float("-inf"))
    shift = tl.full([HP], float("-inf"), tl.float32)
    exact_total = tl.zeros([HP], tl.float32)
    exact_acc = tl.zeros([HP, VB], tl.float32)
    shift, exact_total, exact_acc = _exact(scores, values, shift, exact_total, exact_acc, PRECISION)

    # The ring: the window exactly, older tokens that are not folded yet by T(x).
    x_q = tl.load(
        q_far + head[:, None] * qf_h + far_dim[None, :], mask=is_head[:, None] & is_far[None, :], other=0.0
    )
    ring_k += bg * ring * D
    ring_v += bg * ring * V
    ring_far += bg * ring * DIM
    ring_kind += bg * ring
    for start in range(0, ring, RB):
        slot = start + tl.arange(0, RB)
        age = (now - slot) % ring
        age = tl.where(age < 0, age + ring, age)
        held = (slot < ring) & (age > 0) & (now - age >= folded)
        held = held & (tl.load(ring_kind + slot, mask=held, other=0) == 1)
        old_keys = tl.load(
            ring_k + slot[:, None] * D + dim[None, :], mask=held[:, None] & is_dim[None, :], other=0.0
        )
        old_values = tl.load(
            ring_v + slot[:, None] * V + column[None, :], mask=held[:, None] & is_column[None, :], other=0.0
        )
        x_k = tl.load(
            ring_far + slot[:, None] * DIM + far_dim[None, :], mask=held[:, None] & is_far[None, :], other=0.0
        )
        old_scores = tl.dot(queries, tl.trans(old_keys), input_precision=PRECISION) * scale
        old_scores = tl.where((held & (age < window))[None, :], old_scores, float("-inf"))
        shift, exact_total, exact_acc = _exact(
            old_scores, old_values, shift, exact_total, exact_acc, PRECISION
        )
        x = tl.dot(x_q.to(tl.float32), tl.trans(x_k.to(tl.float32)), input_precision=SUM_PRECISION)
        far = 1.0 + x + 0.5 * x * x
        is_old = held & (age >= window)
        sees_far += tl.sum(is_old.to(tl.int32), 0)
        if DECAY:
            far *= tl.exp2(rate * age)[None, :]
        far = tl.where(is_old[None, :], far, 0.0)
        far_total += tl.sum(far, 1)
        far_acc = tl.dot(far, old_values.to(tl.float32), far_acc, input_precision=SUM_PRECISION)

    far_gate = tl.load(gate + b * g_b + h * g_h, mask=is_head, other=0.0).to(tl.float32) * 1.4426950408889634
    far_gate = tl.where(sees_far > 0, far_gate, float("-inf"))
    top = tl.maximum(shift, far_gate)  # this token sees itself, so it is finite
    exact_weight, far_weight = tl.exp2(shift - top), tl.exp2(far_gate - top)
    denominator = exact_weight * exact_total + far_weight * far_total
    result = (exact_weight[:, None] * exact_acc + far_weight[:, None] * far_acc) / denominator[:, None]
    out_at = out + b * o_b + h[:, None] * o_h + column[None, :]
    tl.store(out_at, result.to(dtype), mask=is_head[:, None] & is_column[None, :])

    # The token enters the ring, and the sinks where the text is that short.
    new_slot = now % ring
    new_far = tl.load(k_far + b * kf_b + g * kf_h + far_dim, mask=is_far, other=0.0)
    tl.store(ring_v + new_slot * V + column, new_v, mask=is_column)
    if length < sinks:
        tl.store(sink_v + (bg * sinks + length) * V + column, new_v, mask=is_column)
    if split == 0:
        tl.store(ring_k + new_slot * D + dim, new_k, mask=is_dim)
        tl.store(ring_far + new_slot * DIM + far_dim, new_far.to(ring_far.dtype.element_ty), mask=is_far)
        tl.store(ring_kind + new_slot, tl.where(length < sinks, 2, 1).to(tl.int8))
        if length < sinks:
            tl.store(sink_k + (bg * sinks + length) * D + dim, new_k, mask=is_dim)

    tl.debug_barrier()  # all of this program has read the counter, the sums and the normaliser
    tl.store(position + own, now + 1)
    if next_folded > folded:
        token = folded + tl.arange(0, FOLD)
        slot = token % ring
        usable = tl.load(ring_kind + slot) == 1
        leaving = tl.load(
            ring_v + slot[:, None] * V + column[None, :], mask=usable[:, None] & is_column[None, :], other=0.0
        )
        leaving = leaving.to(tl.float32)
        for start in range(0, num_features, FB):
            feature = start + tl.arange(0, FB)
            exists = feature < num_features
            x = taylor_features(
                ring_far, DIM, pairs, slot[None, :], usable[None, :], feature[:, None], num_features, DIM
            )
            at = total + feature[:, None] * V + column[None, :]
            mask = exists[:, None] & is_column[None, :]
            sums = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            norms = tl.load(norm + feature, mask=exists, other=0.0)
            if DECAY:
                x *= tl.exp2(rate * (next_folded + window - 1 - token))[None, :]
                sums *= tl.exp2(rate * FOLD)
                norms *= tl.exp2(rate * FOLD)
            sums = tl.dot(x, leaving, sums, input_precision="tf32x3")
            tl.store(at, sums.to(total.dtype.element_ty), mask=mask)
            tl.store(norm + feature, norms + tl.sum(x, 1), mask=exists)
