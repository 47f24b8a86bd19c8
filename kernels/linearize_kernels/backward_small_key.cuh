// The pass over keys of backward_small.cu: a tile of 64 keys of one kv head, sixteen a warp, and all of its query heads.
// Scores are transposed: rows are keys, columns queries.
#pragma once

namespace small_key {

// Two stages of queries and gradients; before the first tile moves on, k and v lie in the second one.
constexpr unsigned Q_AT = 0, GRAD_AT = Q_AT + 2 * TILE, K_AT = Q_AT + TILE, V_AT = GRAD_AT + TILE;
constexpr unsigned SUM_AT = GRAD_AT + 2 * TILE, Q_FAR_AT = SUM_AT + SINK_TILE, K_FAR_AT = Q_FAR_AT + 2 * SMALL_FAR;
constexpr unsigned NUMBERS_AT = K_FAR_AT + SMALL_FAR, NUMBERS = 3 * CHUNK * 4, NORM_AT = NUMBERS_AT + 2 * NUMBERS;
constexpr unsigned BYTES = NORM_AT + FEATURES * 4;
static_assert(BYTES == 39488, "cuda_backward_small.py says so");

struct Inputs {
    Rows k, v, k_far, q;
    int q_head;
    Rows q_far;
    int q_far_head;
    Rows grad;
    int grad_head;
    const float *lse, *delta, *weight;
    const int *firsts, *lasts;
    const bf16* sums;
    const float* norms;
};

// What a warp knows of its sixteen rows; of a lane's two rows where there are two.
struct Keys {
    KeptRows k, v;
    unsigned mapped[4];
    int last[2];          // slots of their texts
    bool is_sink[2];
    int token;            // the first row's slot
    int end, shortest;    // the largest last slot of a row, the smallest
    bool any_sink;

    __device__ int last_of_row(int row) const { return row & 8 ? last[1] : last[0]; }
    __device__ bool is_sink_row(int row) const { return row & 8 ? is_sink[1] : is_sink[0]; }
};

// A tile of queries in shared memory, from slot `token`.
struct Tile {
    const unsigned char *queries, *grads, *queries_far;
    const float* numbers;
    int token;
};

// Sixteen queries of a tile, from 16 n on.
template <bool EXACT, bool FAR, class Exact, class Far>
__device__ __forceinline__ void add_tile(KeyGradients& to, const Keys& x, const Tile& from, int n, float scale,
                                         Exact exact, Far far, int lane) {
    add_queries<EXACT, FAR, FROZEN>(to, x.k, x.v, from.queries + n * 2048, from.grads + n * 2048, n % 2 * 64,
                                    from.numbers + 16 * n, x.mapped, from.queries_far + n * 16 * MAPPED_ROW, scale,
                                    exact, far, lane);
}

// Whether all pairs with `count` queries from slot `query` on are exact.
__device__ __forceinline__ bool all_exact(const Keys& x, int query, int count, int window) {
    int apart = query - x.token;
    return !FROZEN && apart >= 15 && apart + count - 1 < window && query + count - 1 <= x.shortest;
}

// The same, where pairs of all sorts may be. by_pairs: far ones count here, not by a sum.
__device__ __forceinline__ void attend_queries(KeyGradients& to, const Keys& x, const Tile& from, int n, bool by_pairs,
                                               int window, float scale, int lane) {
    int query = from.token + 16 * n, apart = query - x.token;  // of the first query and the first key
    bool any_far = by_pairs && apart + 15 >= window, any_exact = apart - 15 < window || x.any_sink;
    if (apart < -15 || query > x.end || (!any_far && (FROZEN || !any_exact))) return;
    auto all = [](int, int) { return true; };
    auto exact = [&](int key, int i) {
        int distance = apart + i - key;
        return distance >= 0 && query + i <= x.last_of_row(key) && (distance < window || x.is_sink_row(key));
    };
    auto far = [&](int key, int i) {
        return apart + i - key >= window && query + i <= x.last_of_row(key) && !x.is_sink_row(key);
    };
    if (FROZEN || !any_exact)
        add_tile<false, true>(to, x, from, n, scale, exact, far, lane);
    else if (any_far)
        add_tile<true, true>(to, x, from, n, scale, exact, far, lane);
    else if (all_exact(x, query, 16, window))
        add_tile<true, false>(to, x, from, n, scale, all, all, lane);
    else
        add_tile<true, false>(to, x, from, n, scale, exact, far, lane);
}

// R of all query heads and its normaliser, added up. sums, norms: of the first head; others are `chunks` sums further.
__device__ __forceinline__ void add_heads(unsigned char* shared, const bf16* sums, const float* norms, int group,
                                          int chunks, int thread) {
    float sum[8] = {}, norm = 0;
#pragma unroll 1
    for (int head = 0; head < group; head++) {
        long long at = (long long)head * chunks;
        uint4 eight = *reinterpret_cast<const uint4*>(sums + at * SMALL_SUM + thread * 8);
        const unsigned words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum[2 * i] += low_float(words[i]);
            sum[2 * i + 1] += high_float(words[i]);
        }
        if (thread < FEATURES) norm += norms[at * FEATURES + thread];
    }
    *reinterpret_cast<uint4*>(shared + SUM_AT + tile_place(thread / 8, thread % 8)) = make_uint4(
        pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]), pack_bf16(sum[6], sum[7]));
    if (thread < FEATURES) reinterpret_cast<float*>(shared + NORM_AT)[thread] = norm;
}

// What the sum over newer queries gives, where seen, to mapped keys and (unless FROZEN) to values.
__device__ __forceinline__ void newer_queries(KeyGradients& to, float (&summed)[2], const Keys& x,
                                              const unsigned char* far_rows, const unsigned char* sum,
                                              const float* norm, const bool (&seen)[2], int lane) {
    Entries entries;
    const float factor[2] = {1, 1};
    float unused[2] = {};
    load_entries(entries, far_rows, lane);
    sum_gradient(summed, unused, x.v.rows, entries, sum, norm, factor, seen, lane);
    if (FROZEN) return;
    unsigned a[4];
    make_small_features(a, entries, lane & 3);
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (!seen[i & 1]) a[i] = 0;
    add_values(to.v, a, sum, 0, lane);
}

__device__ __forceinline__ void attend(unsigned char* shared, const Inputs& from, bf16* dk, int dk_stride, bf16* dv,
                                       int dv_stride, far_t* dk_far, int dk_far_stride, int tile, int length, int group,
                                       int window, int sinks, float scale, float scaling, int thread) {
    int block = thread / 32, lane = thread % 32, start = tile * CHUNK, row = 16 * block, g = lane >> 2;
    int newest = min(start + CHUNK, length) - 1, end = last_of(from.lasts, newest, length);
    int chunk = (start + window + 2 * CHUNK - 2) / CHUNK, boundary = chunk * CHUNK;  // queries from it on are far, or none
    bool has_sum = end >= boundary, has_sinks = !FROZEN && first_of(from.firsts, newest) + sinks > start;
    int low = FROZEN ? (start + window) / CHUNK : tile;
    int count = max((has_sinks ? end : min(end, boundary - 1)) / CHUNK - low + 1, 0), steps = count * group;
    auto load = [&](int step) {
        int head = step / count, j = low + step % count, stage = step & 1;
        long long numbers = (long long)head * length;
        Rows q = {from.q.at + (long long)head * from.q_head, from.q.stride};
        Rows q_far = {from.q_far.at + (long long)head * from.q_far_head, from.q_far.stride};
        Rows grad = {from.grad.at + (long long)head * from.grad_head, from.grad.stride};
        if (!FROZEN) copy_tile(shared + Q_AT + stage * TILE, q, j * CHUNK, CHUNK, 0, length, 0, thread);
        copy_tile(shared + GRAD_AT + stage * TILE, grad, j * CHUNK, CHUNK, 0, length, 0, thread);
        copy_mapped(shared + Q_FAR_AT + stage * SMALL_FAR, q_far, j * CHUNK, length, thread);
        load_numbers(reinterpret_cast<float*>(shared + NUMBERS_AT + stage * NUMBERS), from.lse + numbers,
                     from.delta + numbers, from.weight + numbers, j * CHUNK, length, thread);
    };
    if (!FROZEN) copy_tile(shared + K_AT, from.k, start, CHUNK, 0, length, 0, thread);
    copy_tile(shared + V_AT, from.v, start, CHUNK, 0, length, 0, thread);
    copy_mapped(shared + K_FAR_AT, from.k_far, start, length, thread);
    if (steps) load(0);
    if (has_sum)
        add_heads(shared, from.sums + (long long)chunk * SMALL_SUM, from.norms + (long long)chunk * FEATURES, group,
                  (length + CHUNK - 1) / CHUNK, thread);
    Keys x;
    x.token = start + row;
    bool seen[2];
    float is_far[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int key = x.token + g + 8 * r, slot = min(key, length - 1);
        x.last[r] = last_of(from.lasts, slot, length);
        x.is_sink[r] = key - first_of(from.firsts, slot) < sinks;
        seen[r] = x.last[r] >= boundary && !x.is_sink[r];
        is_far[r] = x.is_sink[r] ? 0.0f : 1.0f;
    }
    x.any_sink = __any_sync(ALL_LANES, x.is_sink[0] || x.is_sink[1]);
    x.end = __shfl_sync(ALL_LANES, x.last[1], 31);
    x.shortest = __shfl_sync(ALL_LANES, x.last[0], 0);
    wait_for_copies();
    meet();
    if (!FROZEN) load_rows(x.k.rows, shared + K_AT, block, lane);
    load_rows(x.v.rows, shared + V_AT, block, lane);
    load_small_mapped(x.mapped, shared + K_FAR_AT + row * MAPPED_ROW, lane);
    meet();
    KeyGradients to = {};
    float summed[2] = {};
    if (has_sum)
        newer_queries(to, summed, x, shared + K_FAR_AT + row * MAPPED_ROW, shared + SUM_AT,
                      reinterpret_cast<const float*>(shared + NORM_AT), seen, lane);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        if (step) {
            wait_for_copies();
            meet();
        }
        if (step + 1 < steps) load(step + 1);
        int stage = step & 1, j = low + step % count;
        Tile from = {shared + Q_AT + stage * TILE, shared + GRAD_AT + stage * TILE,
                     shared + Q_FAR_AT + stage * SMALL_FAR,
                     reinterpret_cast<const float*>(shared + NUMBERS_AT + stage * NUMBERS), j * CHUNK};
        if (all_exact(x, j * CHUNK, CHUNK, window)) {
            auto all = [](int, int) { return true; };
#pragma unroll UNROLL
            for (int n = 0; n < 4; n++) add_tile<true, false>(to, x, from, n, scale, all, all, lane);
            continue;
        }
#pragma unroll 1
        for (int n = 0; n < 4; n++) attend_queries(to, x, from, n, j < chunk, window, scale, lane);
    }
    if (!FROZEN) {
        store_gradient(dk, dk_stride, to.k, scaling, x.token, length, lane);
        store_gradient(dv, dv_stride, to.v, 1, x.token, length, lane);
    }
    store_small(dk_far, dk_far_stride, to.k_far, summed, is_far, x.token, length, lane);
}

}  // namespace small_key
