"""The Triton programs of `prefill` that sum keys into states; outputs come from
training_kernels.forward_kernel.

B batch, G kv heads, N chunks of C slots, D head dim, V value dim, d map dim, F Taylor features; FB features
and VB value columns of one program
"""

import triton
import triton.language as tl

from .decode_kernels import taylor_features


@triton.jit(do_not_specialize=["length", "end", "num_features"])
def chunk_sums_kernel(
    k_far, v, log_decay, codes, pairs, sums, norms,
    kf_b, kf_h, kf_t, v_b, v_h, v_t, length, end, num_features, groups,
    V: tl.constexpr, DIM: tl.constexpr, FB: tl.constexpr, VB: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """FB features of one chunk: the sum of features(k_far) ⊗ v over its slots before `end`, and of features
    alone.

    Only ordinary tokens count (code 0: neither padding nor sink), decayed as seen from the chunk's end.
    """
    chunk, num_chunks = tl.program_id(0), tl.num_programs(0)
    columns_at = tl.program_id(2) % tl.cdiv(V, VB)
    start_feature = tl.program_id(2) // tl.cdiv(V, VB) * FB
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // groups, bg % groups
    k_far, v, codes = k_far + b * kf_b + g * kf_h, v + b * v_b + g * v_h, codes + b * length
    feature, column = start_feature + tl.arange(0, FB), columns_at * VB + tl.arange(0, VB)
    rate = 0.0
    if DECAY:
        rate = tl.load(log_decay + g) * 1.4426950408889634
    acc = tl.zeros([FB, VB], tl.float32)
    total = tl.zeros([FB], tl.float32)
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, end), BN):
        slot = start + tl.arange(0, BN)
        used = (slot < end) & (tl.load(codes + slot, mask=slot < end, other=-1) == 0)
        x = taylor_features(
            k_far, kf_t, pairs, slot[None, :], used[None, :], feature[:, None], num_features, DIM
        )
        if DECAY:
            x *= tl.exp2(rate * ((chunk + 1) * CHUNK - slot))[None, :]
        at = v + slot[:, None].to(tl.int64) * v_t + column[None, :]
        values = tl.load(at, mask=used[:, None] & (column < V)[None, :], other=0.0)
        acc = tl.dot(x.to(values.dtype), values, acc, input_precision=PRECISION)
        total += tl.sum(x, 1)
    place = (bg * num_chunks + chunk) * num_features + feature
    exists = feature < num_features
    tl.store(sums + place[:, None] * V + column[None, :], acc, mask=exists[:, None] & (column < V)[None, :])
    if columns_at == 0:
        tl.store(norms + place, total, mask=exists)


@triton.jit(do_not_specialize=["num_chunks", "size", "offset", "length"])
def scan_kernel(sums, first, last, log_decay, num_chunks, size, groups, offset, length, CHUNK: tl.constexpr,
                BLOCK: tl.constexpr, DECAY: tl.constexpr):  # fmt: skip
    """Replaces each chunk's sum by the sum of all before it, `first` included; the sum of all goes to `last`.

    sums [B * G, N, size], first and last [B * G, size]. Sums before chunk c are as seen from slot max(c · C,
    offset), `last` as seen from slot `length`.
    """
    bg = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    rate = 0.0
    if DECAY:
        rate = tl.load(log_decay + bg % groups) * 1.4426950408889634
    running = tl.load(first + bg * size + column, mask=mask, other=0.0)
    at = sums + bg * num_chunks * size + column
    for chunk in range(num_chunks):
        new = tl.load(at, mask=mask, other=0.0)
        tl.store(at, running, mask=mask)
        if DECAY:
            seen_from = tl.maximum(chunk * CHUNK, offset)
            next_seen_from = tl.maximum((chunk + 1) * CHUNK, offset)
            if chunk == num_chunks - 1:
                next_seen_from = length
            running *= tl.exp2(rate * (next_seen_from - seen_from))
            new *= tl.exp2(rate * (next_seen_from - (chunk + 1) * CHUNK))
        running += new
        at += size
    tl.store(last + bg * size + column, running, mask=mask)
