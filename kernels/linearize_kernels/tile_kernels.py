"""What the Triton programs of attention share: tiles in memory, who sees whom, Taylor features of a tile.

D head dim, V value dim, d map dim, F Taylor features; BM queries, BN keys, FB features a tile;
FP and FN are d and F padded

Pairs are of three sorts. Sinks: each text's first tokens, always exact, taken sixteen at a time wherever they lie.
Near: within reach of the window, exact or far. Far: older than the window. In a plain batch (PLAIN) slots say it
all; else `Plan` (plan.py) gives every slot a segment and a code: 2 · segment + is_sink, or -1 for padding.

Features of a tile are products of entries that one-hot matrices pick (picks.py).
"""

import triton
import triton.language as tl

SINK_TILE = tl.constexpr(16)


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
def gather_tile(base, stride, slots, is_slot, ROWS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr):
    """Rows `slots` [ROWS] of a matrix, zero where not is_slot."""
    columns = tl.arange(0, PAD)
    pointers = base + slots.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=is_slot[:, None] & (columns < DIM)[None, :], other=0.0)


@triton.jit
def ordinary_pairs(queries, keys, length, sinks, segments, codes, PLAIN: tl.constexpr):
    """Which pairs of a query and an ordinary key (no sink, no padding) may see each other; shaped to broadcast."""
    if PLAIN:
        return (queries >= keys) & (keys >= sinks)
    else:
        segment = tl.load(segments + queries, mask=queries < length, other=-2)
        code = tl.load(codes + keys, mask=keys < length, other=-1)
        return (queries >= keys) & (code == 2 * segment)


@triton.jit
def sink_pairs(queries, keys, length, sinks, segments, codes, PLAIN: tl.constexpr):
    """Which pairs of a query and a sink may see each other; shaped to broadcast."""
    if PLAIN:
        return (queries >= keys) & (keys < sinks)
    else:
        segment = tl.load(segments + queries, mask=queries < length, other=-2)
        code = tl.load(codes + keys, mask=keys < length, other=-1)
        return (queries >= keys) & (code == 2 * segment + 1)


@triton.jit
def sees_far(queries, length, window, sinks, has_far, PLAIN: tl.constexpr):
    if PLAIN:
        return queries - window >= sinks
    else:
        return tl.load(has_far + queries, mask=queries < length, other=0) != 0


@triton.jit
def query_ranges(start, length, window, sinks, first, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
                 PLAIN: tl.constexpr):  # fmt: skip
    """For queries from `start`: chunk whose sum they take (0: none), then tiles of keys: oldest, first with window
    keys, first with window keys only, end."""
    oldest = tl.maximum(start - window + 1, 0)
    chunk = oldest * 0
    if CHUNK > 0:
        chunk = oldest // CHUNK
    low = chunk * (CHUNK // BN)
    near = oldest // BN
    if not PLAIN:
        low = tl.maximum(low, tl.load(first + start) // BN)
        near = tl.maximum(near, low)
    end = tl.cdiv(tl.minimum(start + BM, length), BN)
    inside = tl.minimum(tl.maximum(tl.cdiv(start + BM - window, BN), near), end)
    return chunk, low, near, inside, end


@triton.jit
def sink_range(start, length, sinks, first, last, sinks_before, BM: tl.constexpr, PLAIN: tl.constexpr):
    """The part of the list of sinks that queries from `start` may see."""
    if PLAIN:
        return sinks * 0, tl.minimum(sinks, length)
    else:
        newest = tl.minimum(start + BM, length) - 1
        low = tl.load(sinks_before + tl.load(first + start))
        return low, tl.load(sinks_before + tl.load(last + newest) + 1)


@triton.jit
def sink_slots(at, end, sink_list, PLAIN: tl.constexpr):
    """Slots of sixteen sinks from number `at` of the list, and which exist."""
    number = at + tl.arange(0, SINK_TILE)
    if PLAIN:
        return number, number < end
    else:
        return tl.load(sink_list + number, mask=number < end, other=0), number < end


@triton.jit
def pick(x, columns, ones, side, start, FP: tl.constexpr, FN: tl.constexpr, FB: tl.constexpr, PRECISION: tl.constexpr):
    """x [rows, FP] -> [rows, FB] float32: of every row the left (side 0) or right (1) entries of FB features."""
    feature = start + tl.arange(0, FB)
    one_hot = tl.load(columns + (side * FP + tl.arange(0, FP))[:, None] * FN + feature[None, :])
    return tl.dot(x, one_hot, input_precision=PRECISION) + tl.load(ones + side * FN + feature)[None, :]


@triton.jit
def put(slopes, rows, side, start, acc, FP: tl.constexpr, FN: tl.constexpr, FB: tl.constexpr, PRECISION: tl.constexpr):
    """Adds slopes [rows, FB] of the picked entries to acc [rows, FP]: the backward of `pick`."""
    feature = side * FN + start + tl.arange(0, FB)
    one_hot = tl.load(rows + feature[:, None] * FP + tl.arange(0, FP)[None, :])
    return tl.dot(slopes, one_hot, acc, input_precision=PRECISION)


@triton.jit
def older_sums(
    sums, norms, base_sums, base_norms, segments, rows, head, chunk, num_chunks, span, num_spans, num_features, offset,
    rate, length, V: tl.constexpr, CHUNK: tl.constexpr, PLAIN: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Where the sum over keys before a chunk lies, and how queries `rows` see it. head: b * M + m.

    Returns the pointers of the chunk's sums and norms and of its span's bases, how many features of either count (all
    or none), the factor that brings the base to the chunk's boundary, and what rows see of all [rows].
    """
    boundary = chunk * CHUNK
    newest = tl.maximum(boundary - 1, 0)
    s = newest // span
    local_size, base_size, base_factor = tl.where(chunk > 0, num_features, 0), num_features, 1.0
    seen = tl.where(rows >= 0, 1.0, 0.0)
    if not PLAIN:
        segment = tl.load(segments + newest)
        seen = tl.where(tl.load(segments + rows, mask=rows < length, other=-2) == segment, 1.0, 0.0)
        same = tl.load(segments + tl.maximum(s * span - 1, 0)) == segment
        base_size = tl.where(same, num_features, 0)
    if DECAY:
        base_factor = tl.exp2(rate * (boundary - tl.maximum(s * span, offset)))
        seen *= tl.exp2(rate * (rows - boundary))
    local, base = (head * num_chunks + chunk) * num_features, (head * num_spans + s) * num_features
    sums, norms, base_sums, base_norms = sums + local * V, norms + local, base_sums + base * V, base_norms + base
    return sums, norms, base_sums, base_norms, local_size, base_size, base_factor, seen


@triton.jit
def load_sums(sums, bases, start, size, base_size, base_factor, V: tl.constexpr, FB: tl.constexpr, VP: tl.constexpr,
              SPANS: tl.constexpr):  # fmt: skip
    """Rows start ... start + FB of a chunk's sum [size, V] and, with SPANS, its span's base [base_size, V]; float32."""
    feature, column = (start + tl.arange(0, FB))[:, None], tl.arange(0, VP)[None, :]
    total = tl.load(sums + feature * V + column, mask=(feature < size) & (column < V), other=0.0).to(tl.float32)
    if SPANS:
        mask = (feature < base_size) & (column < V)
        total += tl.load(bases + feature * V + column, mask=mask, other=0.0).to(tl.float32) * base_factor
    return total


@triton.jit
def load_norms(norms, bases, start, size, base_size, base_factor, FB: tl.constexpr, SPANS: tl.constexpr):
    """[FB] float32: as load_sums, of the normaliser."""
    feature = start + tl.arange(0, FB)
    total = tl.load(norms + feature, mask=feature < size, other=0.0)
    if SPANS:
        total += tl.load(bases + feature, mask=feature < base_size, other=0.0) * base_factor
    return total
