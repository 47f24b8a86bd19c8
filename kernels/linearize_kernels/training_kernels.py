"""The forward Triton program of `training` and `prefill`, and what the gradient programs share with it.

B batch, T time, H query heads, G kv heads, M heads of the far term, D head dim, V value dim, d map dim;
BM queries and BN keys a tile. Weights are taken in base 2 (`exp2`), so scores and gates carry a factor
log2(e).

Every program walks tiles of two sorts: far tiles, all of whose pairs are older than the window and hold no
sink, need T(x) only; mixed tiles compute both scores. Where rows have padding or segments (PLAIN is False),
`plan` in training.py lists the tiles that hold a sink. All sums run in a fixed order: no atomics.
"""

import triton
import triton.language as tl

# Shapes that change from call to call must not compile anew.
UNSPECIALISED = ["length", "num_tiles", "window", "sinks", "heads", "group", "far_group"]
FORWARD_UNSPECIALISED = [*UNSPECIALISED, "num_chunks", "offset"]


@triton.jit
def _tile_place(base, stride, start, length, ROWS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr):
    """Pointers and mask of rows start ... start + ROWS of a [length, DIM] matrix, padded to [ROWS, PAD]."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, PAD)
    mask = (rows < length - start)[:, None]
    if DIM != PAD:
        mask = mask & (columns < DIM)[None, :]
    # One 64-bit product a tile; the offsets inside a tile do not change from tile to tile.
    return base + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :]), mask


@triton.jit
def load_tile(base, stride, start, length, ROWS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr):
    pointers, mask = _tile_place(base, stride, start, length, ROWS, DIM, PAD)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(base, stride, start, length, tile, ROWS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr):
    pointers, mask = _tile_place(base, stride, start, length, ROWS, DIM, PAD)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def visible_pairs(queries, keys, length, sinks, segments, codes, PLAIN: tl.constexpr):
    """Which pairs may see each other, and which keys are sinks. queries and keys are shaped to broadcast."""
    if PLAIN:
        visible = (queries >= keys) & (keys < length)
        sink = keys < sinks
    else:
        segment = tl.load(segments + queries, mask=queries < length, other=-2)
        code = tl.load(codes + keys, mask=keys < length, other=-1)
        visible = (queries >= keys) & ((code >> 1) == segment)
        sink = (code & 1) == 1
    return visible, sink


@triton.jit
def sees_far(queries, length, window, sinks, has_far, PLAIN: tl.constexpr):
    if PLAIN:
        return queries - window >= sinks
    else:
        return tl.load(has_far + queries, mask=queries < length, other=0) != 0


@triton.jit
def tile_ranges(start, length, window, sinks, first, before, num_tiles,
                 BM: tl.constexpr, BN: tl.constexpr, PLAIN: tl.constexpr):  # fmt: skip
    """For queries from `start`: oldest tile, first one with window keys, end; sink tiles before both."""
    end = tl.cdiv(tl.minimum(start + BM, length), BN)
    far_end = tl.maximum(start - window + 1, 0) // BN
    if PLAIN:
        low = far_end * 0
        sink_tiles = tl.cdiv(sinks, BN)
        sinks_low, sinks_end = low, tl.minimum(far_end, sink_tiles)
    else:
        low = tl.load(first + start) // BN
        far_end = tl.maximum(far_end, low)
        sink_tiles = num_tiles - tl.load(before + num_tiles)  # where the list of sink tiles starts
        sinks_low, sinks_end = tl.load(before + low), tl.load(before + far_end)
    return low, far_end, end, sinks_low, sinks_end, sink_tiles


@triton.jit
def _older(
    sums, norms, q_far, stride, x_q, acc, total, rows, length,
    V: tl.constexpr, F: tl.constexpr, VP: tl.constexpr, FP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds features(q_far) · [sums | norms] to acc [BM, VP] and total [BM]; sums [NUM_FEATURES, V] in
    Taylor.expand's order: 1, the entries, then for each i the products with entries j >= i.

    Products are made a row of the triangle at a time, out of the tile x_q: gathering them from memory was
    slower.
    """
    column, entry = tl.arange(0, VP), tl.arange(0, FP)
    is_column = (column < V)[None, :]
    acc += tl.load(sums + column, mask=column < V, other=0.0)[None, :]
    total += tl.load(norms)
    mapped = x_q.to(tl.float32)
    older = tl.load(
        sums + (1 + entry)[:, None] * V + column[None, :], mask=(entry < F)[:, None] & is_column, other=0.0
    )
    acc = tl.dot(mapped, older, acc, input_precision=PRECISION)
    total += tl.sum(mapped * tl.load(norms + 1 + entry, mask=entry < F, other=0.0)[None, :], 1)
    for i in range(F):
        x_i = tl.load(q_far + rows.to(tl.int64) * stride + i, mask=rows < length, other=0.0).to(tl.float32)
        weight = tl.where(entry == i, 0.7071067811865476, 1.0)
        products = mapped * (x_i[:, None] * weight[None, :])
        at = 1 + F + i * F - i * (i - 1) // 2 + entry - i
        exists = (entry >= i) & (entry < F)
        older = tl.load(sums + at[:, None] * V + column[None, :], mask=exists[:, None] & is_column, other=0.0)
        acc = tl.dot(products, older, acc, input_precision=PRECISION)
        total += tl.sum(products * tl.load(norms + at, mask=exists, other=0.0)[None, :], 1)
    return acc, total


@triton.jit(do_not_specialize=FORWARD_UNSPECIALISED)
def forward_kernel(
    q, k, v, q_far, k_far, gate, log_decay, out, rest, lse, segments, codes, has_far, first, tiles, before,
    sums, norms,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    qf_b, qf_h, qf_t, kf_b, kf_h, kf_t, g_b, g_h, g_t, o_b, o_h, o_t,
    length, num_tiles, window, sinks, heads, group, far_group, num_chunks, offset, scale,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr, FP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PLAIN: tl.constexpr, DECAY: tl.constexpr, REST: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, NUM_FEATURES: tl.constexpr, SUM_PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head: out [BM, V] and the base-2 log of each denominator.

    With CHUNK above 0 (see prefill.py) far keys before the last whole chunk come out of sums [B * G, N, F, V]
    and norms [B * G, N, F]: sums over all ordinary keys before chunk c, as seen from slot max(c · CHUNK,
    offset).
    """
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # the longest first
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
    rate = 0.0
    if DECAY:
        rate = tl.load(log_decay + h // far_group) * 1.4426950408889634

    x_q = load_tile(q_far, qf_t, start, length, BM, F, FP)
    far_gate = tl.load(gate + b * g_b + h * g_h + rows.to(tl.int64) * g_t, mask=rows < length, other=0.0)
    far_gate = far_gate.to(tl.float32) * 1.4426950408889634
    far_gate = tl.where(sees_far(rows, length, window, sinks, has_far, PLAIN), far_gate, float("-inf"))
    acc = tl.zeros([BM, VP], tl.float32)
    total = tl.zeros([BM], tl.float32)
    low, far_end, end, sinks_low, sinks_end, sink_list = tile_ranges(
        start, length, window, sinks, first, before, num_tiles, BM, BN, PLAIN
    )

    seen_from = 0  # keys before this slot come out of the sums
    if CHUNK > 0:
        chunk = tl.minimum(tl.maximum(start - window + 1, 0) // CHUNK, num_chunks - 1)
        seen_from = chunk * CHUNK
        low, sinks_low = seen_from // BN, 0
        place = (b * (heads // far_group) + h // far_group) * num_chunks + chunk
        acc, total = _older(
            sums + place * NUM_FEATURES * V, norms + place * NUM_FEATURES, q_far, qf_t, x_q, acc, total,
            rows, length, V, F, VP, FP, SUM_PRECISION,
        )  # fmt: skip
        if DECAY:
            fade = tl.exp2(rate * (rows - tl.maximum(seen_from, offset)))
            acc *= fade[:, None]
            total *= fade

    # Far tiles first: until a mixed tile comes the shift is the gate itself, so that T(x) is the weight as it
    # stands.
    far_low = low - sinks_low
    if CHUNK > 0:
        far_low = low - tl.load(before + low)
    for n in range(far_low, far_end - sinks_end):
        if PLAIN:
            key_start = (n + sink_list) * BN
        else:
            key_start = tl.load(tiles + n) * BN
        x = tl.dot(
            x_q, tl.trans(load_tile(k_far, kf_t, key_start, length, BN, F, FP)), input_precision=PRECISION
        )
        weights = 1.0 + x + 0.5 * x * x
        keys = key_start + tl.arange(0, BN)[None, :]
        if DECAY:
            weights *= tl.exp2(rate * tl.maximum(queries - keys, 0))
        if not PLAIN:
            visible, _ = visible_pairs(queries, keys, length, sinks, segments, codes, PLAIN)
            weights = tl.where(visible, weights, 0.0)
        total += tl.sum(weights, 1)
        acc = tl.dot(
            weights.to(dtype), load_tile(v, v_t, key_start, length, BN, V, VP), acc, input_precision=PRECISION
        )

    shift = far_gate
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
        scores = tl.dot(
            x_exact, tl.trans(load_tile(k, k_t, key_start, length, BN, D, DP)), input_precision=PRECISION
        )
        scores = tl.where(exact, scores * scale, float("-inf"))
        new_shift = tl.maximum(shift, tl.max(scores, 1))
        finite = tl.where(new_shift == float("-inf"), 0.0, new_shift)
        x = tl.dot(
            x_q, tl.trans(load_tile(k_far, kf_t, key_start, length, BN, F, FP)), input_precision=PRECISION
        )
        far = 1.0 + x + 0.5 * x * x
        if DECAY:
            far *= tl.exp2(rate * tl.maximum(queries - keys, 0))
        far = tl.where(visible & (exact == 0) & (keys >= seen_from), far, 0.0)
        weights = tl.exp2(scores - finite[:, None]) + tl.exp2(far_gate - finite)[:, None] * far
        rescale = tl.exp2(shift - finite)
        total = total * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        acc = tl.dot(
            weights.to(dtype), load_tile(v, v_t, key_start, length, BN, V, VP), acc, input_precision=PRECISION
        )
        shift = new_shift

    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    store_tile(out + b * o_b + h * o_h, o_t, start, length, acc, BM, V, VP)
    if REST:
        lost = acc - acc.to(dtype).to(tl.float32)
        store_tile(rest + b * o_b + h * o_h, o_t, start, length, lost, BM, V, VP)
    lse_rows = tl.where(empty, float("inf"), shift + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse + tl.program_id(1).to(tl.int64) * length + rows, lse_rows, mask=rows < length)
