// The pass over queries of backward_small.cu: a tile of 64 queries of one head, sixteen a warp.
#pragma once

namespace small_query {

// Two stages of keys and values; before the first tile moves on, q and grad lie in the second one.
constexpr unsigned K_AT = 0, V_AT = K_AT + 2 * TILE, Q_AT = K_AT + TILE, GRAD_AT = V_AT + TILE;
constexpr unsigned SUM_AT = V_AT + 2 * TILE, SINK_K_AT = SUM_AT + SINK_TILE, SINK_V_AT = SINK_K_AT + SINK_TILE;
constexpr unsigned K_FAR_AT = SINK_V_AT + SINK_TILE, Q_FAR_AT = K_FAR_AT + 2 * SMALL_FAR;
constexpr unsigned DELTA_AT = Q_FAR_AT + SMALL_FAR, BYTES = DELTA_AT + CHUNK * 4;
static_assert(BYTES == 42240, "cuda_backward_small.py says so");

struct Inputs {
    Rows q, k, v, q_far, k_far, grad, out;
    const bf16* rest;
    const int* firsts;
    const bf16* sums;
    const float* norms;
};

// What a warp knows of its sixteen rows; of a lane's two rows where there are two.
struct Queries {
    KeptRows q;
    unsigned grad[4][4], mapped[4];
    float lse[2], delta[2];
    int first[2];      // of their texts
    int token;         // the first row's slot
    bool any_far;      // whether any row sees a far key

    __device__ int first_of_row(int row) const { return row & 8 ? first[1] : first[0]; }
};

struct Gradients {
    float q[8][4], far[2][4];
    QuerySums sums;
};

// Whether all pairs with `count` keys from slot `key` on are exact.
__device__ __forceinline__ bool all_exact(const Queries& x, int key, int count, int window) {
    if (x.token < key + count - 1 || x.token + 15 - key >= window) return false;
    return !DOCUMENTS || __all_sync(ALL_LANES, key >= x.first[0] && key >= x.first[1]);
}

// 16 · COUNT keys from slot `key` on, at a place in shared memory, all exact for all rows.
template <int COUNT>
__device__ __forceinline__ void attend_all(Gradients& to, const Queries& x, const unsigned char* keys,
                                           const unsigned char* values, unsigned turn, float scale, int lane) {
    if (FROZEN && !x.any_far) return;
#pragma unroll UNROLL
    for (int n = 0; n < COUNT; n++) {
        Scores dp;
        exact_queries<FROZEN>(to.q, to.sums, dp, x.grad, x.q, keys + n * 2048, values + n * 2048, turn ^ n % 2 * 64,
                              x.lse, x.delta, scale, 8, [](int, int) { return true; }, lane);
    }
}

// Sixteen keys from slot `key`, at a place in shared memory.
__device__ __forceinline__ void attend_keys(Gradients& to, const Queries& x, const unsigned char* keys,
                                            const unsigned char* values, const unsigned char* keys_far, unsigned turn,
                                            int key, int window, int sinks, float scale, int lane) {
    int apart = x.token - key;  // of the first query and the first key
    if (apart < -15) return;
    if (all_exact(x, key, 16, window)) return attend_all<1>(to, x, keys, values, turn, scale, lane);
    if (FROZEN && !x.any_far) return;
    bool sink = false;  // some are sinks
#pragma unroll
    for (int r = 0; r < 2; r++) sink = sink || (key < x.first[r] + sinks && key + 15 >= x.first[r]);
    if (DOCUMENTS) sink = __any_sync(ALL_LANES, sink);
    Scores dp;
    auto exact = [&](int row, int n) {
        int first = x.first_of_row(row) - key, distance = apart + row - n;
        return n >= first && distance >= 0 && (distance < window || n < first + sinks);
    };
    auto far = [&](int row, int n) {
        return n >= x.first_of_row(row) - key + sinks && apart + row - n >= window;
    };
    if (sink || apart - 15 < window)
        exact_queries<FROZEN>(to.q, to.sums, dp, x.grad, x.q, keys, values, turn, x.lse, x.delta, scale, 8, exact,
                              lane);
    else
        multiply_grads(dp, x.grad, values, turn, x.delta, lane);
    if (apart + 15 >= window) far_queries(to.far, to.sums, dp, x.mapped, keys_far, far, lane);
}

// Sinks before `boundary` of the text that begins at `first`.
__device__ __forceinline__ void attend_sinks(Gradients& to, const Queries& x, const unsigned char* shared, int first,
                                             int boundary, int sinks, float scale, int lane) {
    if (FROZEN && !x.any_far) return;
    Scores dp;
    auto visible = [&](int row, int n) { return x.first_of_row(row) == first && n < sinks && first + n < boundary; };
    exact_queries<FROZEN>(to.q, to.sums, dp, x.grad, x.q, shared + SINK_K_AT, shared + SINK_V_AT, 0, x.lse, x.delta,
                          scale, SINKS > 8 ? 8 : 4, visible, lane);
}

__device__ __forceinline__ void attend(unsigned char* shared, const Inputs& from, const QueryNumbers& numbers, bf16* dq,
                                       int dq_stride, far_t* dq_far, int dq_far_stride, int tile, int length,
                                       int window, int sinks, float scale, float scaling, int thread) {
    int block = thread / 32, lane = thread % 32, start = tile * CHUNK, row = 16 * block, g = lane >> 2;
    int chunk = start >= window - 1 ? (start - window + 1) / CHUNK : 0;  // keys before it are far, or none, or sinks
    int first = first_of(from.firsts, start), boundary = chunk * CHUNK, low = max(chunk, first / CHUNK);
    bool has_sum = first < boundary;
    auto load = [&](int j) {
        int stage = (j - low) & 1;
        copy_tile(shared + K_AT + stage * TILE, from.k, j * CHUNK, CHUNK, 0, length, 0, thread);
        copy_tile(shared + V_AT + stage * TILE, from.v, j * CHUNK, CHUNK, 0, length, 0, thread);
        copy_mapped(shared + K_FAR_AT + stage * SMALL_FAR, from.k_far, j * CHUNK, length, thread);
    };
    copy_tile(shared + Q_AT, from.q, start, CHUNK, 0, length, 0, thread);
    copy_tile(shared + GRAD_AT, from.grad, start, CHUNK, 0, length, 0, thread);
    copy_mapped(shared + Q_FAR_AT, from.q_far, start, length, thread);
    load(low);
    if (has_sum) {
        copy_tile(shared + SUM_AT, {from.sums + (long long)chunk * SMALL_SUM, 64}, 0, 16, 0, 16, 0, thread);
        if (SINKS) {
            copy_tile(shared + SINK_K_AT, from.k, first, 16, 0, min(first + sinks, length), 0, thread);
            copy_tile(shared + SINK_V_AT, from.v, first, 16, 0, min(first + sinks, length), 0, thread);
        }
    }
    Queries x;
    float far_weight[2], summed[2] = {};
    x.token = start + row;
    int oldest[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        x.first[r] = first_of(from.firsts, min(x.token + g + 8 * r, length - 1));
        oldest[r] = x.first[r] + sinks;
    }
    load_weights(x.lse, far_weight, numbers, x.token, length, window, oldest, lane);
    x.any_far = !FROZEN || __any_sync(ALL_LANES, far_weight[0] != 0 || far_weight[1] != 0);
    find_delta(reinterpret_cast<float*>(shared + DELTA_AT), from.grad, from.out, from.rest, start, length, thread);
    wait_for_copies();
    meet();
    load_rows(x.q.rows, shared + Q_AT, block, lane);
    load_rows(x.grad, shared + GRAD_AT, block, lane);
    load_small_mapped(x.mapped, shared + Q_FAR_AT + row * MAPPED_ROW, lane);
#pragma unroll
    for (int r = 0; r < 2; r++) x.delta[r] = reinterpret_cast<const float*>(shared + DELTA_AT)[row + g + 8 * r];
    meet();
    Gradients to = {};
    if (has_sum) {
        Entries entries;
        load_entries(entries, shared + Q_FAR_AT + row * MAPPED_ROW, lane);
        const float factor[2] = {-x.delta[0], -x.delta[1]};
        const bool seen[2] = {x.first[0] == first, x.first[1] == first};
        sum_gradient(summed, to.sums.far, x.grad, entries, shared + SUM_AT, from.norms + (long long)chunk * FEATURES,
                     factor, seen, lane);
        if (SINKS) attend_sinks(to, x, shared, first, boundary, sinks, scale, lane);
    }
#pragma unroll 1
    for (int j = low; j <= tile; j++) {
        if (j > low) {
            wait_for_copies();
            meet();
        }
        if (j < tile) load(j + 1);
        int stage = (j - low) & 1;
        const unsigned char *keys = shared + K_AT + stage * TILE, *values = shared + V_AT + stage * TILE;
        if (all_exact(x, j * CHUNK, CHUNK, window)) {
            attend_all<4>(to, x, keys, values, 0, scale, lane);
            continue;
        }
#pragma unroll 1
        for (int n = 0; n < 4; n++)
            attend_keys(to, x, keys + n * 2048, values + n * 2048,
                        shared + K_FAR_AT + stage * SMALL_FAR + n * 16 * MAPPED_ROW, n % 2 * 64, j * CHUNK + 16 * n,
                        window, sinks, scale, lane);
    }
    store_numbers(numbers, to.sums, far_weight, x.delta, x.token, length, lane);
    if (!FROZEN) store_gradient(dq, dq_stride, to.q, scaling, x.token, length, lane);
    store_small(dq_far, dq_far_stride, to.far, summed, far_weight, x.token, length, lane);
}

}  // namespace small_query
