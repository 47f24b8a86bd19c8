"""The Triton program of `decode`: everything a layer does for one token, in one launch.

B batch, H query heads, G kv heads, D head dim, V value dim, d map dim, F Taylor features, R ring slots, n
sinks; VB value columns of one program, HP heads of a group padded to a power of two, M = 16 the same padded
for matrix products, NP features padded.

A program owns VB columns of one kv head's state, and its own copy of the normaliser and of the token counter,
so that no program waits for another. Scores are recomputed by each of them: keys are few and stay in the L2
cache. What counts is how long one program's chain of dependent steps is. The sum is read by plain
multiply-adds, straight from memory to registers, and so are values; scores are matrix products with slots in rows
and heads in columns, so that warps share the slots, and one softmax takes all.

Features of the sum, by number f (P = d(d + 1) / 2 pairs): f < P the pair (i, (i + s) % d) with i = f % d and
s = f // d, then d entries alone, then the constant. Found by arithmetic, each pair stands once. Queries have
weight 1; keys weight 1/2 for squares.
"""

import triton
import triton.language as tl

FOLD = tl.constexpr(32)  # tokens folded at once
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _entries(x, feature, present, DIM: tl.constexpr):
    """The two entries of x whose product is a feature (1 where there is none), float32; not weighted.

    x: pointers to rows, feature: numbers, present: which rows there are; shaped to broadcast.
    """
    PAIRS: tl.constexpr = DIM * (DIM + 1) // 2
    is_pair = feature < PAIRS
    i = tl.where(is_pair, feature % DIM, feature - PAIRS)
    j = (i + feature // DIM) % DIM
    left = tl.load(x + i, mask=present & (feature < PAIRS + DIM), other=1.0)
    right = tl.load(x + j, mask=present & is_pair, other=1.0)
    return left.to(tl.float32), right.to(tl.float32)


@triton.jit
def _read_sum(
    total, q_far, qf_h, split,
    GROUP: tl.constexpr, V: tl.constexpr, DIM: tl.constexpr, HP: tl.constexpr, VB: tl.constexpr,
    FB: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """features(q) @ the sum, still to be added over its axis 1 [HP, FB, VB]; UNROLL blocks without a loop.

    total, q_far: pointers to those of one kv head.
    """
    NUM_FEATURES: tl.constexpr = 1 + DIM + DIM * (DIM + 1) // 2
    head = tl.arange(0, HP)[:, None, None]
    column = split * VB + tl.arange(0, VB)[None, None, :]
    acc = tl.zeros([HP, FB, VB], tl.float32)
    for base in range(0, NUM_FEATURES, FB * UNROLL):
        for step in tl.static_range(UNROLL):
            feature = base + step * FB + tl.arange(0, FB)[None, :, None]
            exists = feature < NUM_FEATURES
            sums = tl.load(total + feature * V + column, mask=exists & (column < V), other=0.0)
            left, right = _entries(q_far + head * qf_h, feature, head < GROUP, DIM)
            acc += (left * right) * sums.to(tl.float32)
    return acc


@triton.jit
def _few(x, is_head, M: tl.constexpr, HP: tl.constexpr):
    """[M] -> [HP]: the heads there are."""
    return tl.sum(tl.reshape(tl.where(is_head, x, 0.0), [M // HP, HP]), 0)


@triton.jit
def _fold(
    total, norm, ring_v, ring_far, ring_kind, folded, rate, split,
    WINDOW: tl.constexpr, V: tl.constexpr, DIM: tl.constexpr, VB: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Adds FOLD tokens from number `folded` on, which the window has left, to the sum."""
    NUM_FEATURES: tl.constexpr = 1 + DIM + DIM * (DIM + 1) // 2
    RING: tl.constexpr = WINDOW + FOLD - 1
    BLOCK: tl.constexpr = 16
    column = split * VB + tl.arange(0, VB)
    token = folded + tl.arange(0, FOLD)
    slot = token % RING
    usable = tl.load(ring_kind + slot) == 1
    leaving = tl.load(
        ring_v + slot[:, None] * V + column[None, :], mask=usable[:, None] & (column < V)[None, :], other=0.0
    ).to(tl.float32)
    for start in tl.range(0, NUM_FEATURES, BLOCK, num_stages=1):
        feature = start + tl.arange(0, BLOCK)
        exists = feature < NUM_FEATURES
        square = tl.where(feature < DIM, 0.5, 1.0)
        left, right = _entries(ring_far + slot[None, :] * DIM, feature[:, None], usable[None, :], DIM)
        x = tl.where(exists[:, None] & usable[None, :], left * right * square[:, None], 0.0)
        at = total + feature[:, None] * V + column[None, :]
        mask = exists[:, None] & (column < V)[None, :]
        sums = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        norms = tl.load(norm + feature, mask=exists, other=0.0)
        if DECAY:
            x *= tl.exp2(rate * (folded + FOLD + WINDOW - 1 - token))[None, :]
            sums *= tl.exp2(rate * FOLD)
            norms *= tl.exp2(rate * FOLD)
        sums = tl.dot(x, leaving, sums, input_precision="tf32x3")
        tl.store(at, sums.to(total.dtype.element_ty), mask=mask)
        tl.store(norm + feature, norms + tl.sum(x, 1), mask=exists)


@triton.jit
def decode_kernel(
    q, k, v, q_far, k_far, gate, log_decay, out,
    total, norm, keys, values, ring_far, ring_kind, position, offset,
    q_b, q_h, k_b, k_h, v_b, v_h, qf_b, qf_h, kf_b, kf_h, g_b, g_h, o_b, o_h, scale,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, DIM: tl.constexpr, DP: tl.constexpr, FP: tl.constexpr,
    HP: tl.constexpr, NP: tl.constexpr, VB: tl.constexpr, RB: tl.constexpr, FB: tl.constexpr, UNROLL: tl.constexpr,
    EAGER: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """VB value columns of one kv head: out [group, VB] of a new token, and the state moves on by it.

    EAGER: read every slot of the ring, wanted or not, and so without waiting for the token counter.
    """
    M: tl.constexpr = 16
    RING: tl.constexpr = WINDOW + FOLD - 1
    NUM_FEATURES: tl.constexpr = 1 + DIM + DIM * (DIM + 1) // 2
    split, num_splits = tl.program_id(0), tl.num_programs(0)
    g, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    bg = b * tl.num_programs(1) + g
    own = bg * num_splits + split  # this program's counter and normaliser
    total += bg * NUM_FEATURES * V
    norm += own * NUM_FEATURES
    keys += bg * (SINKS + RING) * D
    values += bg * (SINKS + RING) * V
    ring_far += bg * RING * DIM
    ring_kind += bg * RING
    q_far += b * qf_b + g * GROUP * qf_h

    now = tl.load(position + own)  # this token's number; a token lies in ring slot number % RING
    length = now + tl.load(offset + b)  # tokens before this one that are not padding
    head = tl.arange(0, M)
    is_head = head < GROUP
    h = g * GROUP + head
    column = split * VB + tl.arange(0, VB)
    dim, far_dim = tl.arange(0, DP), tl.arange(0, FP)
    is_dim, is_far, is_column = dim < D, far_dim < DIM, column < V
    far_gate = tl.load(gate + b * g_b + h * g_h, mask=is_head, other=0.0).to(tl.float32) * LOG2E
    queries = tl.load(
        q + b * q_b + h[None, :] * q_h + dim[:, None], mask=is_head[None, :] & is_dim[:, None], other=0.0
    )
    x_q = tl.load(
        q_far + head[None, :] * qf_h + far_dim[:, None], mask=is_head[None, :] & is_far[:, None], other=0.0
    )
    new_k = tl.load(k + b * k_b + g * k_h + dim, mask=is_dim, other=0.0)
    new_v = tl.load(v + b * v_b + g * v_h + column, mask=is_column, other=0.0)
    new_far = tl.load(k_far + b * kf_b + g * kf_h + far_dim, mask=is_far, other=0.0)
    count = tl.load(norm + NUM_FEATURES - 1)  # above 0 where anything was folded
    rate = 0.0
    if DECAY:
        rate = tl.load(log_decay + g) * LOG2E

    folded = tl.maximum(now - WINDOW + 1, 0) // FOLD * FOLD  # older tokens are in `total`
    feature = tl.arange(0, NP)[None, :]
    norms = tl.load(norm + feature, mask=feature < NUM_FEATURES, other=0.0)
    few = tl.arange(0, HP)[:, None]
    left, right = _entries(q_far + few * qf_h, feature, few < GROUP, DIM)
    products = left * right * norms
    sums = _read_sum(total, q_far, qf_h, split, GROUP, V, DIM, HP, VB, FB, UNROLL)
    if not EAGER:  # adding up now frees registers; adding up later lets the ring's loads start at once
        sums = tl.sum(sums, 1)[:, None, :]

    # One softmax in base 2 over sinks and ring, this token in its slot: the window by q·k, older tokens that
    # are not folded yet by gate + log T(x).
    shift = tl.full([M], float("-inf"), tl.float32)
    denominator = tl.zeros([M], tl.float32)
    acc = tl.zeros([HP, VB], tl.float32)
    new_slot = now % RING
    for start in range(0, SINKS + RING, RB):
        row = start + tl.arange(0, RB)
        slot = row - SINKS
        age = new_slot - slot
        age = tl.where(age < 0, age + RING, age)
        is_sink = (slot < 0) & (row < length)
        is_new = (slot >= 0) & (slot < RING) & (age == 0)
        is_token = (slot >= 0) & (slot < RING) & (age > 0) & (age <= now - folded)
        if EAGER:
            wanted, wanted_token = slot < RING, (slot >= 0) & (slot < RING)
        else:
            wanted, wanted_token = is_sink | is_token, is_token
        old_k = tl.load(
            keys + row[:, None] * D + dim[None, :], mask=wanted[:, None] & is_dim[None, :], other=0.0
        )
        old_v = tl.load(
            values + row[:, None] * V + column[None, :], mask=wanted[:, None] & is_column[None, :], other=0.0
        )
        x_k = tl.load(
            ring_far + slot[:, None] * DIM + far_dim[None, :],
            mask=wanted_token[:, None] & is_far[None, :],
            other=0.0,
        )
        old_k = tl.where(is_new[:, None], new_k[None, :], old_k)
        old_v = tl.where(is_new[:, None], new_v[None, :], old_v)
        usable = tl.load(ring_kind + slot, mask=wanted_token, other=0) == 1
        scores = tl.dot(old_k, queries, input_precision=PRECISION) * scale  # [RB, M]
        x = tl.dot(x_k.to(tl.float32), x_q.to(tl.float32), input_precision=PRECISION)
        far = far_gate[None, :] + tl.log2(0.5 * (1.0 + x) * (1.0 + x) + 0.5)
        if DECAY:
            far += (rate * age)[:, None]
        scores = tl.where((is_token & (age >= WINDOW))[:, None], far, scores)
        scores = tl.where((is_sink | is_new | (is_token & usable))[:, None], scores, float("-inf"))
        new_shift = tl.maximum(shift, tl.max(scores, 0))
        finite = tl.where(new_shift == float("-inf"), 0.0, new_shift)
        weights = tl.exp2(scores - finite[None, :])
        rescale = tl.exp2(shift - finite)
        denominator = denominator * rescale + tl.sum(weights, 0)
        few_weights = tl.sum(tl.reshape(tl.where(is_head[None, :], weights, 0.0), [RB, M // HP, HP]), 1)
        new = tl.sum(tl.trans(few_weights)[:, :, None] * old_v.to(tl.float32)[None, :, :], 1)  # [HP, VB]
        acc = acc * _few(rescale, is_head, M, HP)[:, None] + new
        shift = new_shift

    # The sum joins it, with the gate for a score.
    sum_score = tl.where(count > 0, far_gate, float("-inf"))
    if DECAY:
        sum_score += rate * (now - folded - WINDOW + 1)
    top = tl.maximum(shift, sum_score)  # this token sees itself, so it is finite
    weight, far_weight = _few(tl.exp2(shift - top), is_head, M, HP), _few(tl.exp2(sum_score - top), is_head, M, HP)
    denominator = weight * _few(denominator, is_head, M, HP) + far_weight * tl.sum(products, 1)
    result = (weight[:, None] * acc + far_weight[:, None] * tl.sum(sums, 1)) / denominator[:, None]
    out_at = out + b * o_b + (g * GROUP + few) * o_h + column[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=(few < GROUP) & is_column[None, :])

    # The token enters the ring, and the sinks where the text is that short.
    tl.store(values + (SINKS + new_slot) * V + column, new_v, mask=is_column)
    if length < SINKS:
        tl.store(values + length * V + column, new_v, mask=is_column)
    if split == 0:
        tl.store(keys + (SINKS + new_slot) * D + dim, new_k, mask=is_dim)
        tl.store(ring_far + new_slot * DIM + far_dim, new_far.to(ring_far.dtype.element_ty), mask=is_far)
        tl.store(ring_kind + new_slot, tl.where(length < SINKS, 2, 1).to(tl.int8))
        if length < SINKS:
            tl.store(keys + length * D + dim, new_k, mask=is_dim)

    tl.debug_barrier()  # all of this program has read the counter, the sums and the normaliser
    tl.store(position + own, now + 1)
    if tl.maximum(now - WINDOW + 2, 0) // FOLD * FOLD > folded:
        ring_v = values + SINKS * V
        _fold(total, norm, ring_v, ring_far, ring_kind, folded, rate, split, WINDOW, V, DIM, VB, DECAY)
