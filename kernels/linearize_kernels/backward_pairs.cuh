// What tiles of 16 queries and of 16 keys give to each other, exactly and by T(x), and numbers of queries: for all passes
// of backward.cu and backward_small.cu.
#pragma once

// Sixteen rows as A fragments, read anew from a tile, from 16 block on, or kept in registers.
struct TileRows {
    const unsigned char* tile;
    int block;
};
struct KeptRows {
    unsigned rows[4][4];
};

__device__ __forceinline__ void load_rows(unsigned (&a)[4][4], const TileRows& from, int lane) {
    load_rows(a, from.tile, from.block, lane);
}
__device__ __forceinline__ void load_rows(unsigned (&a)[4][4], const KeptRows& from, int) {
#pragma unroll
    for (int step = 0; step < 4; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) a[step][i] = from.rows[step][i];
}

// ---- to queries ----------------------------------------------------------------------------------------------------

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

// One tile of 16 keys, exact: weights where visible(row, key), slopes; dq += slopes · keys unless FIXED. Leaves dp for
// the far term.
template <bool FIXED, class QueryRows, class Visible>
__device__ __forceinline__ void exact_queries(float (&dq)[8][4], QuerySums& sums, Scores& dp,
                                              const unsigned (&rows_grad)[4][4], const QueryRows& rows_q,
                                              const unsigned char* keys, const unsigned char* values, unsigned turn,
                                              const float (&lse)[2], const float (&delta)[2], float scale, int count,
                                              Visible visible, int lane) {
    unsigned a[4][4], packed[4];
    Scores scores = {};
    load_rows(a, rows_q, lane);
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
    if (FIXED) return;
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

// lse of a lane's rows, infinite where there are none, and the far term's weight. oldest: keys of a lane's rows before
// this one are never far.
__device__ __forceinline__ void load_weights(float (&lse)[2], float (&far_weight)[2], const QueryNumbers& from,
                                             int token, int length, int window, const int (&oldest)[2],
                                             int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int query = token + (lane >> 2) + 8 * r;
        lse[r] = query < length ? from.lse[query] : INFINITE;
        bool sees_far = query < length && query - window >= oldest[r];
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

// ---- to keys -------------------------------------------------------------------------------------------------------

struct KeyGradients {
    float k[8][4], v[8][4], k_far[2][4];
};

// What one tile of 16 queries gives to 16 keys, exactly and by T(x); unless FIXED, k and v too. numbers: lse, delta,
// weight of the queries, CHUNK apart. far(key, query), exact(key, query): which pairs.
template <bool EXACT, bool FAR, bool FIXED, class KeyRows, class Exact, class Far>
__device__ __forceinline__ void add_queries(KeyGradients& to, const KeyRows& keys, const KeyRows& values,
                                            const unsigned char* queries, const unsigned char* grads,
                                            unsigned turn, const float* numbers, const unsigned (&mapped)[4],
                                            const unsigned char* queries_far, float scale, Exact exact, Far far,
                                            int lane) {
    int g = lane >> 2, t = lane & 3;
    unsigned rows[4][4], packed[4];
    Scores weights = {}, dp;
    float2 deltas[2] = {*reinterpret_cast<const float2*>(numbers + CHUNK + 2 * t),
                        *reinterpret_cast<const float2*>(numbers + CHUNK + 8 + 2 * t)};
#pragma unroll
    for (int i = 0; i < 8; i++) dp[i] = i & 1 ? -deltas[i / 4].y : -deltas[i / 4].x;
    load_rows(rows, values, lane);
    multiply_rows(dp, rows, grads, turn, lane);
    if (EXACT) {
        float2 lse[2] = {*reinterpret_cast<const float2*>(numbers + 2 * t),
                         *reinterpret_cast<const float2*>(numbers + 8 + 2 * t)};
        load_rows(rows, keys, lane);
        multiply_rows(weights, rows, queries, turn, lane);
        Scores slopes;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float shift = i & 1 ? lse[i / 4].y : lse[i / 4].x;
            weights[i] = exact(g + 8 * score_row(i), score_key(i, t)) ? exp2_fast(weights[i] * scale - shift) : 0;
            slopes[i] = weights[i] * dp[i];
        }
        pack_weights(packed, slopes);
        add_values(to.k, packed, queries, turn, lane);
    }
    if (FAR) {
        float2 factor[2] = {*reinterpret_cast<const float2*>(numbers + 2 * CHUNK + 2 * t),
                            *reinterpret_cast<const float2*>(numbers + 2 * CHUNK + 8 + 2 * t)};
        Scores x = {};
        multiply_mapped(x, mapped, queries_far, lane);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float weight = i & 1 ? factor[i / 4].y : factor[i / 4].x;
            if (!far(g + 8 * score_row(i), score_key(i, t))) weight = 0;
            weights[i] += weight * (1 + x[i] * (1 + 0.5f * x[i]));
            x[i] = weight * (1 + x[i]) * dp[i];
        }
        pack_weights(packed, x);
        add_mapped(to.k_far, packed, queries_far, lane);
    }
    if (FIXED) return;
    pack_weights(packed, weights);
    add_values(to.v, packed, grads, turn, lane);
}

// lse, delta and weight of a chunk's queries, nothing seen where there are none.
__device__ __forceinline__ void load_numbers(float* to, const float* lse, const float* delta, const float* weight,
                                             int first, int length, int thread) {
    if (thread >= CHUNK) return;
    int query = first + thread;
    to[thread] = query < length ? lse[query] : INFINITE;
    to[CHUNK + thread] = query < length ? delta[query] : 0;
    if (weight) to[2 * CHUNK + thread] = query < length ? weight[query] : 0;
}

