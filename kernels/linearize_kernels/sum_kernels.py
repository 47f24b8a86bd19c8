"""The Triton programs that sum tokens into features ⊗ values, over chunks and over spans of chunks.

B batch, M far heads, T slots, V value dim, d map dim, F Taylor features, N chunks, S spans; FB features of one program.
Squares carry the half that the other side of the product leaves out (picks.py).

Two levels, so that one long row fills the GPU and no sum is read back to be scanned: within a span a program runs
over its slots and leaves, at every chunk's boundary, the sum since the span began; a scan over the few spans gives
what came before each (its base). Forward, chunk c's sum is over keys before slot c · CHUNK. REVERSE (the gradient of
the keys), it is over queries from slot c · CHUNK on. Where rows are packed, a sum keeps to the document that reaches
over the boundary.
"""

import triton
import triton.language as tl

SUMS_UNSPECIALISED = ["length", "end", "span", "sinks", "num_features", "num_chunks"]


@triton.jit(do_not_specialize=SUMS_UNSPECIALISED)
def feature_sums_kernel(
    x, y, weight, extra, log_decay, segments, codes, columns, rows, ones, sums, norms, span_sums, span_norms,
    x_b, x_h, x_t, y_b, y_h, y_t, length, end, span, sinks, num_features, num_chunks, far_heads, x_group, y_group,
    V: tl.constexpr, DIM: tl.constexpr, VP: tl.constexpr, FP: tl.constexpr, FN: tl.constexpr, FB: tl.constexpr,
    BN: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr, PLAIN: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """FB features of one span of one far head: Σ features(x) ⊗ y and Σ features(x).

    Forward: x is k_far, y is v (of head far_head // y_group); ordinary keys before `end` count. REVERSE: x is q_far,
    y the gradient of out, of the x_group query heads of this far head; weighted by `weight` [B, H, T], the normaliser
    also by -extra [B, H, T].
    """
    s, num_spans = tl.program_id(0), tl.num_programs(0)
    bm = tl.program_id(1).to(tl.int64)
    b, m = bm // far_heads, bm % far_heads
    segments, codes = segments + b * length, codes + b * length
    feature, column, entry, slots = (
        tl.program_id(2) * FB + tl.arange(0, FB), tl.arange(0, VP), tl.arange(0, FP), tl.arange(0, BN)
    )  # fmt: skip
    is_sum = (feature < num_features)[:, None] & (column < V)[None, :]
    at = feature[:, None] * V + column[None, :]
    pick_left = tl.load(rows + feature[:, None] * FP + entry[None, :])
    pick_right = tl.load(rows + (2 * FN + feature)[:, None] * FP + entry[None, :])
    left_ones, right_ones = tl.load(ones + feature), tl.load(ones + FN + feature)
    rate = 0.0
    if DECAY:
        rate = tl.load(log_decay + m) * 1.4426950408889634
    acc = tl.zeros([FB, VP], tl.float32)
    total = tl.zeros([FB], tl.float32)
    limit = tl.minimum((s + 1) * span, length)
    num_tiles = tl.cdiv(limit - s * span, BN)
    segment = -3
    for n in range(num_tiles):
        start = s * span + n * BN
        if REVERSE:
            start = s * span + (num_tiles - 1 - n) * BN
        slot = start + slots
        used = slot < tl.minimum(end, limit)
        if not PLAIN:
            previous = segment
            if REVERSE:
                segment = tl.load(segments + start)
                used = used & (tl.load(segments + slot, mask=used, other=-2) == segment)
            else:
                segment = tl.load(segments + tl.minimum(start + BN, length) - 1)
                used = used & (tl.load(codes + slot, mask=used, other=-1) == 2 * segment)
            kept = tl.where(segment == previous, 1.0, 0.0)
            acc *= kept
            total *= kept
        elif not REVERSE:
            used = used & (slot >= sinks)
        if DECAY:
            acc *= tl.exp2(rate * BN)
            total *= tl.exp2(rate * BN)
        for head in range(x_group):
            h = m * x_group + head
            x_at = x + b * x_b + h * x_h + start.to(tl.int64) * x_t
            y_at = y + b * y_b + (m // y_group * x_group + head) * y_h + start.to(tl.int64) * y_t
            x_tile = tl.load(
                x_at + (slots * x_t)[None, :] + entry[:, None], mask=used[None, :] & (entry < DIM)[:, None], other=0.0
            )
            y_tile = tl.load(
                y_at + (slots * y_t)[:, None] + column[None, :], mask=used[:, None] & (column < V)[None, :], other=0.0
            )
            left = tl.dot(pick_left, x_tile, input_precision=PRECISION) + left_ones[:, None]
            right = tl.dot(pick_right, x_tile, input_precision=PRECISION) + right_ones[:, None]
            features = left * right
            if REVERSE:
                scalar = (b * far_heads * x_group + h) * length + slot
                features *= tl.load(weight + scalar, mask=used, other=0.0)[None, :]
                total -= tl.sum(features * tl.load(extra + scalar, mask=used, other=0.0)[None, :], 1)
            else:
                features *= used.to(tl.float32)[None, :]
                if DECAY:
                    features *= tl.exp2(rate * (start + BN - slot))[None, :]
                total += tl.sum(features, 1)
            acc = tl.dot(features.to(x_tile.dtype), y_tile.to(x_tile.dtype), acc, input_precision=PRECISION)
        boundary = start + BN
        if REVERSE:
            boundary = start
        if boundary % CHUNK == 0:
            place = (bm * num_chunks + boundary // CHUNK) * num_features
            tl.store(sums + place * V + at, acc.to(sums.dtype.element_ty), mask=is_sum)
            tl.store(norms + place + feature, total, mask=feature < num_features)
    place = (bm * num_spans + s) * num_features
    tl.store(span_sums + place * V + at, acc, mask=is_sum)
    tl.store(span_norms + place + feature, total, mask=feature < num_features)


@triton.jit(do_not_specialize=["length", "span", "num_spans", "num_features", "offset"])
def scan_kernel(
    span_sums, past, bases, last, weights, log_decay, segments,
    length, span, num_spans, num_features, offset, far_heads,
    COLUMNS: tl.constexpr, FIRST_COLUMN: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr, PLAIN: tl.constexpr, DECAY: tl.constexpr, PAST: tl.constexpr, BASES: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """bases [B * M, S, F, COLUMNS]: the sum of all spans before each (after each: REVERSE), the past included.

    past and last [B * M, F, WIDTH] are in State's form: columns from FIRST_COLUMN on, squares times weights [F].
    Forward: the base of span s is as seen from slot max(s · span, offset), `last` (the sum of all) from slot `length`.
    A span's own sum is as seen from the end of its last tile of TILE slots.
    """
    bm = tl.program_id(1).to(tl.int64)
    element, size = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), num_features * COLUMNS
    mask = element < size
    feature = element // COLUMNS
    outside = (bm * num_features + feature) * WIDTH + FIRST_COLUMN + element % COLUMNS  # place in past and last
    segments += bm // far_heads * length
    rate = 0.0
    if DECAY:
        rate = tl.load(log_decay + bm % far_heads) * 1.4426950408889634
    running = tl.zeros([BLOCK], tl.float32)
    if PAST:
        running = tl.load(past + outside, mask=mask, other=0.0) * tl.load(weights + feature, mask=mask, other=0.0)
    for n in range(num_spans):
        s = n
        if REVERSE:
            s = num_spans - 1 - n
        place = (bm * num_spans + s) * size + element
        if BASES:
            tl.store(bases + place, running.to(bases.dtype.element_ty), mask=mask)
        new = tl.load(span_sums + place, mask=mask, other=0.0)
        if DECAY:
            ends = tl.minimum((s + 1) * span, length)
            seen_from, next_seen_from = tl.maximum(s * span, offset), tl.maximum(ends, offset)
            running *= tl.exp2(rate * (next_seen_from - seen_from))
            new *= tl.exp2(rate * (next_seen_from - tl.cdiv(ends, TILE) * TILE))
        if not PLAIN:
            if REVERSE:
                before = tl.load(segments + tl.minimum((s + 1) * span, length - 1))
                running *= tl.where(tl.load(segments + s * span) == before, 1.0, 0.0)
            else:
                before = tl.load(segments + tl.maximum(s * span - 1, 0))
                newest = tl.load(segments + tl.minimum((s + 1) * span, length) - 1)
                running *= tl.where(newest == before, 1.0, 0.0)
        running += new
    if LAST:
        tl.store(last + outside, running / tl.load(weights + feature, mask=mask, other=1.0), mask=mask)
