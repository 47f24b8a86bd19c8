// The pass over queries of backward.cu, forward in time: gradients of q, q_far and the gate, and two numbers a query
// that the other kernels need.
#pragma once

// Numbers of queries, a float each.
struct QueryNumbers {
    const float* gate;
    int gate_stride;
    const float* lse;                // base 2, infinite where nothing is seen
    float *delta, *weight, *dgate;   // of the rest
};

// Sums over keys of a lane's two rows: g and g + 8.
struct QuerySums {
    float far[2], weights[2], slopes[2];  // T(x) · (dp - delta), exact weights, their slopes
};

// dp = grad · valuesᵀ - delta of 16 keys.
__device__ __forceinline__ void multiply_grads(Scores& dp, const unsigned (&rows_grad)[4][4],
                                               const unsigned char* values, unsigned turn, const float (&delta)[2],
                                               int lane) {
#pragma unroll
    for (int i = 0; i < 8; i++) dp[i] = -delta[score_row(i)];
    multiply_rows(dp, rows_grad, values, turn, lane);
}

// One tile of 16 keys, exact: weights where visible(row, key), slopes; dq += slopes · keys. Leaves dp for the far term.
template <class Visible>
__device__ __forceinline__ void exact_queries(float (&dq)[8][4], QuerySums& sums, Scores& dp,
                                              const unsigned (&rows_grad)[4][4], const unsigned char* q_tile, int block,
                                              const unsigned char* keys, const unsigned char* values, unsigned turn,
                                              const float (&lse)[2], const float (&delta)[2], float scale, int count,
                                              Visible visible, int lane) {
    unsigned a[4][4], packed[4];
    Scores scores = {};
    load_rows(a, q_tile, block, lane);
    multiply_rows(scores, a, keys, turn, lane);
    multiply_grads(dp, rows_grad, values, turn, delta, lane);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int r = score_row(i);
        bool sees = i < count && visible((lane >> 2) + 8 * r, score_key(i, lane & 3));
        float weight = sees ? exp2_fast(scores[i] * scale - lse[r]) : 0;
        scores[i] = weight * dp[i];
        sums.weights[r] += weight;
        sums.slopes[r] += scores[i];
    }
    pack_weights(packed, scores);
    add_values(dq, packed, keys, turn, lane);
}

// One tile of 16 far keys where visible(row, key). dp: dp - delta. All but for the factor of the query's weight.
template <class Visible>
__device__ __forceinline__ void far_queries(float (&dq_far)[2][4], QuerySums& sums, const Scores& dp,
                                            const unsigned (&mapped)[4], const unsigned char* keys_far,
                                            Visible visible, int lane) {
    Scores x = {};
    unsigned packed[4];
    multiply_mapped(x, mapped, keys_far, lane);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int r = score_row(i);
        float slope = visible((lane >> 2) + 8 * r, score_key(i, lane & 3)) ? dp[i] : 0;
        sums.far[r] += slope * (1 + x[i] * (1 + 0.5f * x[i]));
        x[i] = slope * (1 + x[i]);
    }
    pack_weights(packed, x);
    add_mapped(dq_far, packed, keys_far, lane);
}

// lse of a lane's rows, infinite where there are none, and the far term's weight.
__device__ __forceinline__ void load_weights(float (&lse)[2], float (&far_weight)[2], const QueryNumbers& from,
                                             int token, int length, int sinks, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int query = token + (lane >> 2) + 8 * r;
        lse[r] = query < length ? from.lse[query] : INFINITE;
        bool sees_far = query < length && query - CHUNK >= sinks;
        float gate = sees_far ? from.gate[(long long)query * from.gate_stride] * 1.4426950408889634f : 0;
        far_weight[r] = sees_far ? exp2_fast(gate - lse[r]) : 0;
    }
}

// Writes what a lane's rows have: lanes of a row together. Returns the far term's weight in far_weight.
__device__ __forceinline__ void store_numbers(const QueryNumbers& to, QuerySums& sums, const float (&far_weight)[2],
                                              const float (&delta)[2], int token, int length, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float *parts[3] = {&sums.far[r], &sums.weights[r], &sums.slopes[r]};
#pragma unroll
        for (int i = 0; i < 3; i++)
#pragma unroll
            for (int bit = 1; bit < 4; bit *= 2) *parts[i] += __shfl_xor_sync(ALL_LANES, *parts[i], bit);
        // `out`, rounded, gives delta too coarsely; the slopes' own sum says by how much (see gradient_kernels.py).
        float through = far_weight[r] * sums.far[r], missed = through + sums.slopes[r];
        int query = token + (lane >> 2) + 8 * r;
        if ((lane & 3) == 0 && query < length) {
            to.delta[query] = delta[r] + missed;
            to.weight[query] = far_weight[r];
            to.dgate[query] = through - missed * (1 - sums.weights[r]);
        }
    }
}

// delta of a chunk's queries: grad · (out + rest). 128 threads.
__device__ __forceinline__ void find_delta(float* delta, Rows grad, Rows out, const bf16* rest, int first, int length,
                                           int thread) {
#pragma unroll 2
    for (int n = 0; n < 4; n++) {
        int row = 16 * n + thread / 8, token = first + row;
        uint4 zero = make_uint4(0, 0, 0, 0), g = zero, o = zero, l = zero;
        if (token < length) {
            long long at = (long long)token * out.stride + thread % 8 * 8;
            g = *reinterpret_cast<const uint4*>(grad.at + (long long)token * grad.stride + thread % 8 * 8);
            o = *reinterpret_cast<const uint4*>(out.at + at);
            l = *reinterpret_cast<const uint4*>(rest + at);
        }
        const unsigned gs[4] = {g.x, g.y, g.z, g.w}, os[4] = {o.x, o.y, o.z, o.w}, ls[4] = {l.x, l.y, l.z, l.w};
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum += low_float(gs[i]) * (low_float(os[i]) + low_float(ls[i]));
            sum += high_float(gs[i]) * (high_float(os[i]) + high_float(ls[i]));
        }
#pragma unroll
        for (int bit = 1; bit < 8; bit *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, bit);
        if (thread % 8 == 0) delta[row] = sum;
    }
}

// What the sum over older chunks gives to dq_far and the gate.
__device__ __forceinline__ void older_keys(float (&dq_far)[2][4], QuerySums& sums, const unsigned (&rows_grad)[4][4],
                                           const Mapped& x, const float (&delta)[2], const unsigned char* sum,
                                           const unsigned char* gram, int num_keys, int lane) {
    float norm[2][4], value[2] = {};
    feature_gradient(dq_far, sums.far, rows_grad, x, sum, lane);
    gram_gradient(norm, value, gram, x, lane);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if ((lane & 3) == 0) value[r] += num_keys;
        sums.far[r] -= delta[r] * value[r];
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) dq_far[n][2 * r + e] -= delta[r] * norm[n][2 * r + e];
    }
}

namespace query_pass {

// Keys that may be exact: five tiles of chunks c - 1 and c, and the sinks. before: place of chunk c - 1 in the rings;
// first: its keys before this place are none.
__device__ __forceinline__ void near_keys(float (&acc)[8][4], float (&acc_far)[2][4], QuerySums& sums,
                                          const unsigned (&rows_grad)[4][4], const unsigned (&mapped)[4],
                                          const unsigned char* shared, int before, int first, int token, int block,
                                          const float (&lse)[2], const float (&delta)[2], int sinks, float scale,
                                          int lane) {
    const unsigned char* keys_far = shared + K_FAR_AT + before * FAR_TILE;
    Scores dp;
#pragma unroll UNROLL
    for (int n = 0; n < 5; n++) {
        unsigned turn = (block + n) % 2 * 64, at = find_tile(before, block + n);
        int low = first - 16 * (block + n);
        auto visible = [&](int i, int key) { return key >= low && (n > 0 || key > i) && (n < 4 || key <= i); };
        exact_queries(acc, sums, dp, rows_grad, shared + Q_AT, block, shared + K_AT + at, shared + V_AT + at, turn,
                      lse, delta, scale, 8, visible, lane);
        if (n == 0) {
            auto far = [&](int i, int key) { return key >= low && key <= i; };
            far_queries(acc_far, sums, dp, mapped, keys_far + 16 * block * FAR_ROW, far, lane);
        }
    }
    if (SINKS) {
        auto visible = [&](int i, int key) { return key < sinks && key <= token + i; };
        exact_queries(acc, sums, dp, rows_grad, shared + Q_AT, block, shared + SINK_K_AT, shared + SINK_V_AT, 0,
                      lse, delta, scale, SINKS > 8 ? 8 : 4, visible, lane);
    }
}

// The tiles of chunk c - 1 that are all far.
__device__ __forceinline__ void far_keys(float (&acc_far)[2][4], QuerySums& sums, const unsigned (&rows_grad)[4][4],
                                         const unsigned (&mapped)[4], const unsigned char* shared, int before,
                                         int first, int block, const float (&delta)[2], int lane) {
    const unsigned char* keys_far = shared + K_FAR_AT + before * FAR_TILE;
#pragma unroll 1
    for (int tile = 0; tile < block; tile++) {
        Scores dp;
        multiply_grads(dp, rows_grad, shared + V_AT + before * TILE + tile * 2048, tile % 2 * 64, delta, lane);
        auto far = [&](int, int key) { return key >= first - 16 * tile; };
        far_queries(acc_far, sums, dp, mapped, keys_far + 16 * tile * FAR_ROW, far, lane);
    }
}

// The role of half the warps: rows 16 block … of every chunk.
__device__ __forceinline__ void attend_queries(unsigned char* shared, Rows q, Rows q_far, Rows grad,
                                               const QueryNumbers& numbers, bf16* dq, int dq_stride, far_t* dq_far,
                                               int dq_far_stride, int last, int length, int sinks, float scale,
                                               float scaling, int block, int lane) {
    int row = 16 * block, g = lane >> 2;
    unsigned char* far_rows = shared + Q_FAR_AT + row * Q_FAR_ROW;
    copy_queries(shared + Q_AT, q, row, row, length, lane);
    copy_queries(shared + GRAD_AT, grad, row, row, length, lane);
    copy_far_queries(far_rows, q_far, 0, row, length, lane);
    wait_for_copies();
    meet();
    int before = 0;
#pragma unroll 1
    for (int c = 0; c <= last; c++) {
        int token = c * CHUNK + row;
        float lse[2], far_weight[2], delta[2], acc[8][4] = {}, acc_far[2][4] = {};
        QuerySums sums = {};
        load_weights(lse, far_weight, numbers, token, length, sinks, lane);
        wait_for_copies();
        meet();  // A
        Mapped x;
        unsigned rows_grad[4][4];
        load_rows(rows_grad, shared + GRAD_AT, block, lane);
        load_mapped(x, far_rows, lane);
#pragma unroll
        for (int r = 0; r < 2; r++)
            delta[r] = reinterpret_cast<float*>(shared + DELTA_AT)[c % 2 * CHUNK + row + g + 8 * r];
        __syncwarp();
        if (c < last) {
            copy_queries(shared + GRAD_AT, grad, row, token + CHUNK, length, lane);
            copy_far_queries(far_rows, q_far, 0, token + CHUNK, length, lane);
        }
        if (c > 1)
            older_keys(acc_far, sums, rows_grad, x, delta, shared + SUM_AT, shared + GRAM_AT + c % 2 * GRAM_BYTES,
                       (c - 1) * CHUNK - sinks, lane);
        meet();  // B
        const unsigned mapped[4] = {x[0][0], x[1][0], x[0][4], x[1][4]};
        int first = sinks - (c - 1) * CHUNK;  // keys of chunk c - 1 before this place are none
        near_keys(acc, acc_far, sums, rows_grad, mapped, shared, before, first, token, block, lse, delta, sinks, scale,
                  lane);
        __syncwarp();
        if (c < last) copy_queries(shared + Q_AT, q, row, token + CHUNK, length, lane);
        far_keys(acc_far, sums, rows_grad, mapped, shared, before, first, block, delta, lane);
        store_numbers(numbers, sums, far_weight, delta, token, length, lane);
        store_gradient(dq, dq_stride, acc, scaling, token, length, lane);
        store_mapped(dq_far, dq_far_stride, acc_far, far_weight, token, length, lane);
        before = next_in_ring(before);
    }
}

// The role of the others: they load keys ahead, find delta, and keep the sum over keys.
__device__ __forceinline__ void keep_keys(unsigned char* shared, Rows k, Rows v, Rows k_far, Rows grad, Rows out,
                                          const bf16* rest, int last, int length, int sinks, int warp, int lane) {
    int thread = 32 * warp + lane;
    auto load = [&](int chunk, int place) {
        int token = chunk * CHUNK;
        copy_tile(shared + K_AT + place * TILE, k, token, CHUNK, 0, length, 0, thread);
        copy_tile(shared + V_AT + place * TILE, v, token, CHUNK, sinks, length, 0, thread);
        copy_far_tile(shared + K_FAR_AT + place * FAR_TILE, k_far, token, sinks, length, thread);
    };
    auto delta = [&](int c) {
        float* to = reinterpret_cast<float*>(shared + DELTA_AT) + c % 2 * CHUNK;
        find_delta(to, grad, out, rest, c * CHUNK, length, thread);
    };
    load(-1, 0);
    load(0, 1);
    if (SINKS) {
        copy_tile(shared + SINK_K_AT, k, 0, 16, 0, min(sinks, length), 0, thread);
        copy_tile(shared + SINK_V_AT, v, 0, 16, 0, min(sinks, length), 0, thread);
    }
    for (int i = thread; i < 2 * GRAM_FLOATS; i += KEEPERS) reinterpret_cast<float*>(shared + GRAM_AT)[i] = 0;
    delta(0);
    FeatureSum sum = {};
    wait_for_copies();
    meet();
    turn_rows(shared + TURNED_AT, shared + K_FAR_AT, warp, lane);
    int before = 0, now = 1;
#pragma unroll 1
    for (int c = 0; c < last; c++) {
        wait_for_copies();
        meet();  // A
        fold_rows<false>(sum, shared + V_AT + before * TILE, shared + TURNED_AT, shared + TURNED_AT, warp, lane);
        if (warp == 0)
            add_gram(shared + GRAM_AT + (c + 1) % 2 * GRAM_BYTES, shared + GRAM_AT + c % 2 * GRAM_BYTES,
                     shared + TURNED_AT, shared + TURNED_AT, lane);
        meet();  // B
        load(c + 1, next_in_ring(now));
        write_rows(shared + SUM_AT, sum, warp, lane);
        turn_rows(shared + TURNED_AT, shared + K_FAR_AT + now * FAR_TILE, warp, lane);
        delta(c + 1);
        before = now, now = next_in_ring(now);
    }
    wait_for_copies();
    meet();  // A
    meet();  // B
}

}  // namespace query_pass
