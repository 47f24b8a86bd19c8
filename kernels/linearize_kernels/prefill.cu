// Prefill of hybrid attention, forward: bfloat16, head and value dim 64 or 128, map dim 16, window 64, up to 16 sinks,
// one text a row from its first token. The function is reference.py's; the launcher is cuda_prefill.py.
//
// A block walks one head (or a segment of it, or one text of a row after the other) in chunks of 64 tokens, c = 0, 1, … As a chunk is as long as the window,
// a query at place r of chunk c sees:
//     exactly             chunk c up to place r, chunk c - 1 from place r + 1 on, and the sinks;
//     by T(x), by pairs   chunk c - 1 up to place r;
//     through the sum S   all chunks before: S = Σ features(k_far) ⊗ v, and the same for 1 instead of v.
// Four warps attend, 16 rows each. Four warps keep S in registers, add chunk c - 1 for the next step, and load ahead.
// For 128 values there are twice as many of both, one set for each half of the values.
// Between barriers A and B the attending warps read S(c) in shared memory, and score exact keys, while the others
// multiply; between B and A they do everything else, while the others write S(c + 1). Rows of tensors travel by
// cp.async, a chunk ahead.
//
// Features of x [16]: step s = 0 … 8 holds x_i x_(i+s), i = 0 … 15, indices mod 16; step 8 has every product twice, so
// its upper half holds 1, 0, …, 0 instead; step 9 holds x itself. Squares count half, on the query's side.
// Of the normaliser only Σ x xᵀ (`gram`), Σ x and the number of keys are kept: Σ T(q·x) = n + q·Σx + ½ q·(Σ x xᵀ) q.
//
// Weights are taken in base 2. All sums run in a fixed order, in float32. A lane is (g, t) as in tensor_cores.cuh.
#include "primitives.cuh"
#include "tensor_cores.cuh"

#include "prefill_tiles.cuh"
#include "prefill_sum.cuh"
#include "prefill_attend.cuh"

// Rows of head h of row b, from token `from` on.
__device__ __forceinline__ Rows rows_of(const bf16* x, long long b, int x_b, int h, int x_h, int from, int x_t) {
    return {x + b * x_b + (long long)h * x_h + (long long)from * x_t, x_t};
}

// Grid (B · H, segments), 256 or 512 threads. Strides in elements: of batch, head, token. A segment is `span` chunks of
// 64. total [B, G, 153, V + 1] float32: State.total after all tokens. TRAINING, instead of it: rest, with out's strides,
// is what out lost when it was rounded, lse [B, H, T] float32 the base-2 log of each denominator. sums [B · G, (segments - 1) · parts, SUM_FLOATS +
// GRAM_FLOATS] of prefill_sums_kernel, each of span / parts chunks.
// DOCUMENTS: a row is several texts side by side; ends [B, T] is the last token of each token's text. A block then takes,
// one after the other, those that begin in its segment of the row; span, parts and sums say nothing.
extern "C" __global__ void __launch_bounds__(ATTENDERS + KEEPERS, BLOCKS) prefill_kernel(
    const bf16* q, const bf16* k, const bf16* v, const bf16* q_far, const bf16* k_far, const float* gate, bf16* out,
    bf16* rest, float* lse, float* total, const float* sums, const int* ends, int q_b, int q_h, int q_t, int k_b,
    int k_h, int k_t, int v_b, int v_h, int v_t, int qf_b, int qf_h, int qf_t, int kf_b, int kf_h, int kf_t, int g_b, int g_h, int g_t, int o_b, int o_h, int o_t,
    int length, int heads, int group, int sinks, int span, int parts, float scale) {
    DYNAMIC_SHARED(shared);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, segment = blockIdx.y, segments = gridDim.y;
    long long b = blockIdx.x / heads;
    int h = blockIdx.x % heads, kv = h / group, chunks = (length + CHUNK - 1) / CHUNK;
    int first = segment * span, last = min(first + span, chunks) - 1;
    bool writes = !TRAINING && segment == segments - 1 && h % group == 0;
    int from = 0, limit = 0;  // where this text begins; the last one of this block begins before `limit`
    if (DOCUMENTS) {
        ends += b * length;
        from = (long long)segment * length / segments, limit = (long long)(segment + 1) * length / segments;
        if (from > 0) from = ends[from - 1] + 1;
    }
    do {
        int size = length;
        if (DOCUMENTS) {
            if (from >= limit) return;
            size = ends[from] + 1 - from, first = 0, last = (size - 1) / CHUNK;
        }
        if (warp < ATTENDERS / 32) {
            // The last rows have the most work: not always on one scheduler. Blocks of one multiprocessor are 132 apart.
            int block = (blockIdx.x / 132 + warp / 4) & 1 ? 3 - warp % 4 : warp % 4;
            long long at = b * o_b + (long long)h * o_h + (long long)from * o_t;
            attend(shared, rows_of(q, b, q_b, h, q_h, from, q_t), rows_of(q_far, b, qf_b, h, qf_h, from, qf_t),
                   gate + b * g_b + (long long)h * g_h + (long long)from * g_t, g_t,
                   {out + at, rest + at, lse + (long long)blockIdx.x * length + from, o_t}, first, last, size, sinks,
                   scale, block, warp / 4, lane);
            if (writes)
                for (int i = 0; i < FINAL_MEETINGS; i++) meet();
        } else {
            long long row = b * (heads / group) + kv;
            keep_sum(shared, rows_of(k, b, k_b, kv, k_h, from, k_t), rows_of(v, b, v_b, kv, v_h, from, v_t),
                     rows_of(k_far, b, kf_b, kv, kf_h, from, kf_t),
                     sums + row * (segments - 1) * parts * (SUM_FLOATS + GRAM_FLOATS), DOCUMENTS ? 0 : segment * parts,
                     writes ? total + row * NUM_FEATURES * (HEAD_DIM + 1) : nullptr, first, last, size, sinks,
                     warp - ATTENDERS / 32, lane);
        }
        if (DOCUMENTS) meet();
        from += size;
    } while (DOCUMENTS);
}

// What each `span` chunks add to the sums that segments start with: those one before a segment's, as a segment starts
// with the sum before the chunk before it. Grid (B · G, number of sums), SUM_SPLIT times as many threads as keep a sum in
// the other kernel. Chunks travel SUM_STAGES - 1 ahead, and keys are turned one ahead, so that warps meet once a chunk.
constexpr int SUMMERS = SUM_SPLIT * KEEPERS, OWN_SUMS = 2 / SUM_SPLIT;
constexpr unsigned SUMS_RING = SUM_STAGES * TILE, SUMS_K_FAR_AT = HALVES * SUMS_RING,
                   SUMS_TURNED_AT = SUMS_K_FAR_AT + SUM_STAGES * FAR_TILE,
                   SUMS_GRAM_AT = SUMS_TURNED_AT + 2 * TURNED_KEYS;
static_assert(SUMS_GRAM_AT + GRAM_FLOATS * 4 == SUM_STAGES * (HEAD_DIM == 64 ? 11264 : 19456) + 10688,
              "cuda_builds.py says so");

extern "C" __global__ void __launch_bounds__(SUMMERS, SUM_BLOCKS) prefill_sums_kernel(
    const bf16* v, const bf16* k_far, float* sums, int v_b, int v_h, int v_t, int kf_b, int kf_h, int kf_t, int length,
    int groups, int sinks, unsigned span) {
    DYNAMIC_SHARED(shared);
    unsigned thread = threadIdx.x % KEEPERS, share = threadIdx.x / KEEPERS, warp = thread / 32, lane = thread % 32;
    unsigned side = warp >> 1, column_half = warp / 4;
    long long b = blockIdx.x / groups, kv = blockIdx.x % groups;
    Rows values = {v + b * v_b + kv * v_h, v_t}, keys = {k_far + b * kf_b + kv * kf_h, kf_t};
    unsigned char *gram = shared + SUMS_GRAM_AT, *far_ring = shared + SUMS_K_FAR_AT, *turned = shared + SUMS_TURNED_AT;
    bool has_keys = share == SUM_SPLIT - 1 && warp < 4;  // loads and turns them
    int first = int(blockIdx.y * span) - 1;
    auto load = [&](unsigned n) {
        unsigned at = n % SUM_STAGES;
        int token = (first + int(n)) * CHUNK;
        if (n < span && share == 0)
            copy_tile(shared + column_half * SUMS_RING + at * TILE, values, token, CHUNK, sinks, length,
                      64 * column_half, thread % 128);
        if (n < span && has_keys) copy_far_tile(far_ring + at * FAR_TILE, keys, token, sinks, length, thread);
        commit_copies();
    };
    auto turn = [&](unsigned n) {
        if (n < span && has_keys)
            turn_keys(turned + n % 2 * TURNED_KEYS, far_ring + n % SUM_STAGES * FAR_TILE, warp, lane);
    };
    for (unsigned n = 0; n < SUM_STAGES - 1; n++) load(n);
    for (int i = threadIdx.x; i < GRAM_FLOATS; i += SUMMERS) reinterpret_cast<float*>(gram)[i] = 0;
    EntrySum sum[OWN_SUMS] = {};
    wait_for_groups<SUM_STAGES - 2>();
    meet();
    turn(0);
#pragma unroll 1
    for (unsigned n = 0; n < span; n++) {
        wait_for_groups<SUM_STAGES - 3>();
        meet();
        load(n + SUM_STAGES - 1);
        turn(n + 1);
        const unsigned char* v_tile = shared + (side >> 1) * SUMS_RING + n % SUM_STAGES * TILE;
#pragma unroll
        for (int part = 0; part < 2; part++) {
            unsigned fragments[2][2][4];
            load_values(fragments, v_tile, part, side, lane);
#pragma unroll
            for (int i = 0; i < OWN_SUMS; i++)
                fold_entries(sum[i], fragments, turned + n % 2 * TURNED_KEYS, part, OWN_SUMS * share + i, warp & 1, lane);
        }
        if (threadIdx.x / 32 == n % (SUMMERS / 32)) fold_gram(gram, far_ring + n % SUM_STAGES * FAR_TILE, lane);
    }
    meet();
    float* to = sums + ((long long)blockIdx.x * gridDim.y + blockIdx.y) * (SUM_FLOATS + GRAM_FLOATS);
#pragma unroll
    for (int i = 0; i < 10 * OWN_SUMS; i++) {
        const float(&c)[4] = sum[i / 10][i / 5 % 2][i % 5];
        reinterpret_cast<float4*>(to)[(10 * OWN_SUMS * share + i) * KEEPERS + thread] = make_float4(c[0], c[1], c[2], c[3]);
    }
    for (int i = threadIdx.x; i < GRAM_FLOATS; i += SUMMERS) to[SUM_FLOATS + i] = reinterpret_cast<float*>(gram)[i];
}
