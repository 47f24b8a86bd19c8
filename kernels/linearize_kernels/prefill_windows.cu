// Prefill of hybrid attention, forward, for any window: bfloat16, head and value dim 64 or 128, map dim 4, 8 or 16, up
// to 16 sinks, one text a row from its first token. The function is reference.py's; the launcher is cuda_prefill.py.
//
// A block walks one head, or HEADS that share keys (or a segment of them, or one text of a row after the other) in
// chunks of 64 tokens, c = 0, 1, … Chunk c of queries sees chunks c - LAG + 1 … c pair by pair: exactly within the
// window and by T(x) beyond it. All chunks before it sees through the sum S = Σ features(k_far) ⊗ v. LAG is
// ceil((window + 63) / 64), so that no key of S is in a window. Sinks are seen exactly.
//
// All warps do the same: 16 rows of queries, chunk by chunk of keys, with a running shift of the exponents; and 16
// values (or more) of S, which is kept in registers. After the oldest chunk of step c is visited, it is added to S, and
// chunk c + 1 is loaded in its place while the others are visited: keys and values travel from global memory once.
// Where so many chunks do not fit into shared memory, there are two, and each is read again, by all steps that see it.
// Phases of a step, between barriers A and B, then B and A: S(c) is read, the oldest chunk visited and folded; S(c + 1)
// and the features of the chunk that will be oldest are written to shared memory, the other chunks visited.
//
// Of the normaliser only Σ x xᵀ, Σ x and the number of keys are kept: Σ T(q·x) = n + q·Σx + ½ q·(Σ x xᵀ) q.
// Weights are taken in base 2. All sums run in a fixed order, in float32. A lane is (g, t) as in tensor_cores.cuh.
#include "primitives.cuh"
#include "tensor_cores.cuh"

#include "windows_tiles.cuh"
#include "windows_sum.cuh"
#include "windows_attend.cuh"

#ifdef PREFILL_SHARED
static_assert(PREFILL_BYTES == PREFILL_SHARED, "cuda_builds.py says so");
#endif
#ifdef SPAN_SHARED
static_assert(SPAN_BYTES == SPAN_SHARED, "cuda_builds.py says so");
#endif

// Rows of head h of row b, from token `from` on.
__device__ __forceinline__ Rows rows_of(const bf16* x, long long b, int x_b, int h, int x_h, int from, int x_t) {
    return {x + b * x_b + (long long)h * x_h + (long long)from * x_t, x_t};
}

// One head's queries and what is written for them. The rows of this warp are 16 block … of every chunk.
struct Queries {
    Rows q, q_far;
    const float* gate;
    int gate_stride;
    Results to;
    int block;
    unsigned char *q_tile, *far_rows;
};

__device__ __forceinline__ void load_queries(const Queries& mine, int c, int length, int lane) {
    int row = 16 * mine.block, token = c * CHUNK + row;
#pragma unroll
    for (int half = 0; half < HALVES; half++)
        copy_queries(mine.q_tile + half * TILE, {mine.q.at + 64 * half, mine.q.stride}, row, token, length, lane);
    copy_mapped(mine.far_rows, mine.q_far, 16, token, 0, length, lane, 32);
}

// The exponents of the far term of rows g and g + 8: the gate, or nothing where no key is far.
__device__ __forceinline__ void load_gate(float (&gate)[2], const Queries& mine, const Text& text, int c, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int query = c * CHUNK + 16 * mine.block + (lane >> 2) + 8 * r;
        bool sees_far = query < text.length && query - text.window >= text.sinks;
        gate[r] = sees_far ? mine.gate[(long long)query * mine.gate_stride] * 1.4426950408889634f : -INFINITE;
    }
}

// Loads all that the first step needs.
__device__ __forceinline__ void load_first(unsigned char* shared, const Text& text, int first) {
#pragma unroll 1
    for (int chunk = first - LAG + 1; chunk <= first; chunk++) {
        if (!STREAM || chunk == first - LAG + 1)
            load_chunk(shared + (STREAM ? 0 : (chunk + LAG) % LAG) * SLOT, text, chunk, text.length);
        load_mapped_keys(shared, text, chunk, text.length);
    }
    int group = threadIdx.x / 128, end = min(text.sinks, text.length);
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        if (!SINKS || group) continue;
        copy_tile(shared + SINK_K_AT + half * SINK_TILE, text.k, 0, 16, 0, end, 64 * half, threadIdx.x);
        copy_tile(shared + SINK_V_AT + half * SINK_TILE, text.v, 0, 16, 0, end, 64 * half, threadIdx.x);
    }
}

// Between the first visit of step c and its others: what the next step finds in shared memory.
__device__ __forceinline__ void prepare_next(unsigned char* shared, const Text& text, const Sum<WARPS>& sum, int c,
                                             int warp, int lane) {
    if (!STREAM) load_chunk(shared + (c + 1) % LAG * SLOT, text, c + 1, text.length);
    load_mapped_keys(shared, text, c + 1, text.length);
    write_sum(shared, sum, warp, lane);
    write_features(shared + FEATURES_AT, far_tile_of(shared, c - LAG + 2));
}

// One step: chunk c of queries. slot: where the first visit's keys are, if they are streamed; returns the next.
__device__ __forceinline__ int step(unsigned char* shared, const Text& text, const Queries& mine, Sum<WARPS>& sum,
                                    Attention& rows, int c, int last, int slot, float scale, int warp, int lane) {
    int row = c * CHUNK + 16 * mine.block;
#pragma unroll 1
    for (int i = 0; i < LAG; i++) {
        int chunk = c - LAG + 1 + i;
        if (i == 0 || STREAM) {
            wait_for_copies();
            meet();  // A
        }
        if (STREAM && (i < LAG - 1 || c < last)) {
            int next = i < LAG - 1 ? chunk + 1 : c - LAG + 2;
            load_chunk(shared + (slot ^ 1) * SLOT, text, next, text.length);
        }
        if (i == 0) {
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 16; n++)
                load_matrices(rows.q[n], mine.q_tile + n / 4 * TILE +
                              (tile_place(16 * mine.block + (lane & 15), lane >> 4) ^ (n % 4 << 5)));
            begin(rows, shared, mine.far_rows, row, (c - LAG + 1) * CHUNK - text.sinks, text.sinks, scale, lane);
            __syncwarp();
            if (c < last) load_queries(mine, c + 1, text.length, lane);
            __syncwarp();
        }
        if (STREAM && i == 1 && c < last) prepare_next(shared, text, sum, c, warp, lane);
        const unsigned char* keys = shared + (STREAM ? slot : (chunk + LAG) % LAG) * SLOT;
        int distance = row - chunk * CHUNK, first = text.sinks - chunk * CHUNK;
        if (chunk >= 0) {
            if (distance >= CHUNK - 1 && distance + 15 < text.window && first <= 0)
                visit<false>(rows, keys, nullptr, distance, text.window, first, scale, lane);
            else
                visit<true>(rows, keys, far_tile_of(shared, chunk), distance, text.window, first, scale, lane);
        }
        if (i == 0 && c < last) {
            if (chunk >= 0) fold(sum, keys + KEYS, shared + FEATURES_AT, warp, lane);
            if (!STREAM) {
                meet();  // B
                prepare_next(shared, text, sum, c, warp, lane);
            }
        }
        slot ^= 1;
    }
    return slot;
}

// Adds what has left the window of the token after the last one, and writes State.total.
__device__ __forceinline__ void finish_total(float* total, unsigned char* shared, const Text& text, Sum<WARPS>& sum,
                                             int last, int warp, int lane) {
    int end = text.length - text.window + 1;
#pragma unroll 1
    for (int chunk = max(last - LAG + 1, 0); chunk * CHUNK < end; chunk++) {
        meet();
        load_chunk(shared, text, chunk, end);
        load_mapped_keys(shared, text, chunk, end);
        wait_for_copies();
        meet();
        write_features(shared + FEATURES_AT, far_tile_of(shared, chunk));
        meet();
        fold(sum, shared + KEYS, shared + FEATURES_AT, warp, lane);
    }
    store_total(total, sum, max(end - text.sinks, 0), warp, lane);
}

// Steps first … last of a text. total: null, or where State.total goes.
__device__ __forceinline__ void walk(unsigned char* shared, const Text& text, const Queries& mine, const float* sums,
                                     int num_sums, float* total, int first, int last, float scale, int warp,
                                     int lane) {
    Sum<WARPS> sum;
    load_first(shared, text, first);
    load_queries(mine, first, text.length, lane);
    start_sum(sum, sums, num_sums, warp, lane);
    write_sum(shared, sum, warp, lane);
    wait_for_copies();
    meet();
    write_features(shared + FEATURES_AT, far_tile_of(shared, first - LAG + 1));
    float gate[2];
    load_gate(gate, mine, text, first, lane);
    int slot = 0;
#pragma unroll 1
    for (int c = first; c <= last; c++) {
        Attention rows = {};
        rows.gate[0] = gate[0], rows.gate[1] = gate[1];
        if (c < last) load_gate(gate, mine, text, c + 1, lane);
        slot = step(shared, text, mine, sum, rows, c, last, slot, scale, warp, lane);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            rows.total[r] += __shfl_xor_sync(ALL_LANES, rows.total[r], 1);
            rows.total[r] += __shfl_xor_sync(ALL_LANES, rows.total[r], 2);
        }
        int token = c * CHUNK + 16 * mine.block;
        store_attention(mine.to, rows, token, text.length, lane);
        if (TRAINING) store_lse(mine.to.lse, rows.shift, rows.total, token, text.length, lane);
    }
    if (total) finish_total(total, shared, text, sum, last, warp, lane);
}

// Grid (B · H / HEADS, segments), 128 · HEADS threads. Arguments as prefill_kernel's, but for the window. sums
// [B · G, (segments - 1) · parts, SUM_FLOATS + GRAM_FLOATS] of window_sums_kernel, each of span / parts chunks.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) window_kernel(
    const bf16* q, const bf16* k, const bf16* v, const bf16* q_far, const bf16* k_far, const float* gate, bf16* out,
    bf16* rest, float* lse, float* total, const float* sums, const int* ends, int q_b, int q_h, int q_t, int k_b,
    int k_h, int k_t, int v_b, int v_h, int v_t, int qf_b, int qf_h, int qf_t, int kf_b, int kf_h, int kf_t, int g_b,
    int g_h, int g_t, int o_b, int o_h, int o_t, int length, int heads, int group, int sinks, int span, int parts,
    float scale, int window) {
    DYNAMIC_SHARED(shared);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, segment = blockIdx.y, segments = gridDim.y;
    int sets = heads / HEADS, leader = blockIdx.x % sets * HEADS, h = leader + warp / 4, kv = h / group;
    long long b = blockIdx.x / sets, row = b * (heads / group) + kv;
    int chunks = (length + CHUNK - 1) / CHUNK, first = segment * span, last = min(first + span, chunks) - 1;
    bool writes = !TRAINING && segment == segments - 1 && leader % group == 0;
    // The last rows have other work than the first: not always on one scheduler. Blocks of one multiprocessor are 132
    // apart.
    unsigned number = blockIdx.x + gridDim.x * blockIdx.y;
    int block = (number / 132 + warp / 4) & 1 ? 3 - warp % 4 : warp % 4;
    unsigned char* q_tile = shared + Q_AT + warp / 4 * HALVES * TILE;
    unsigned char* far_rows = shared + Q_FAR_AT + (CHUNK * (warp / 4) + 16 * block) * FAR_ROW;
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
        Text text = {rows_of(k, b, k_b, kv, k_h, from, k_t), rows_of(v, b, v_b, kv, v_h, from, v_t),
                     rows_of(k_far, b, kf_b, kv, kf_h, from, kf_t), size, sinks, window};
        long long at = b * o_b + (long long)h * o_h + (long long)from * o_t;
        Queries mine = {rows_of(q, b, q_b, h, q_h, from, q_t), rows_of(q_far, b, qf_b, h, qf_h, from, qf_t),
                        gate + b * g_b + (long long)h * g_h + (long long)from * g_t, g_t,
                        {out + at, rest + at, lse + (b * heads + h) * length + from, o_t}, block, q_tile, far_rows};
        walk(shared, text, mine, sums + row * (segments - 1) * parts * (SUM_FLOATS + GRAM_FLOATS),
             DOCUMENTS ? 0 : segment * parts, writes ? total + row * NUM_FEATURES * (HEAD_DIM + 1) : nullptr, first,
             last, scale, warp, lane);
        if (DOCUMENTS) meet();
        from += size;
    } while (DOCUMENTS);
}

// What each `span` chunks add to the sums that segments start with: those LAG - 1 before a segment's. Grid (B · G,
// number of sums), 2 · HEAD_DIM threads: a warp for 16 values.
extern "C" __global__ void __launch_bounds__(2 * HEAD_DIM) window_sums_kernel(
    const bf16* v, const bf16* k_far, float* sums, int v_b, int v_h, int v_t, int kf_b, int kf_h, int kf_t, int length,
    int groups, int sinks, int span) {
    DYNAMIC_SHARED(shared);
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, half = thread / 128;
    long long b = blockIdx.x / groups, kv = blockIdx.x % groups;
    Rows values = {v + b * v_b + kv * v_h, v_t}, keys = {k_far + b * kf_b + kv * kf_h, kf_t};
    auto load = [&](int chunk, int at) {
        int token = chunk * CHUNK;
        copy_tile(shared + at * KEYS + half * TILE, values, token, CHUNK, sinks, length, 64 * half, thread % 128);
        copy_mapped(shared + SPAN_FAR_AT + at * FAR_TILE, keys, CHUNK, token, sinks, length, thread, 2 * HEAD_DIM);
    };
    int first = int(blockIdx.y) * span - (LAG - 1);
    load(first, 0);
    Sum<VALUE_TILES> sum = {};
#pragma unroll 1
    for (int n = 0; n < span; n++) {
        wait_for_copies();
        meet();
        write_features(shared + SPAN_FEATURES_AT, shared + SPAN_FAR_AT + (n & 1) * FAR_TILE);
        if (n + 1 < span) load(first + n + 1, n + 1 & 1);
        meet();
        fold(sum, shared + (n & 1) * KEYS, shared + SPAN_FEATURES_AT, warp, lane);
    }
    float* to = sums + ((long long)blockIdx.x * gridDim.y + blockIdx.y) * (SUM_FLOATS + GRAM_FLOATS);
    for_sum(sum, warp, lane, [&](float& x, int place) { to[place] = x; });
}
