// Sums over far tokens of backward_small.cu, their features, and the way back through a sum: from slopes of features to a
// gradient of the mapped vector.
#pragma once

constexpr int FEATURES = 16, SMALL_SUM = FEATURES * 64;
constexpr unsigned SMALL_FAR = CHUNK * MAPPED_ROW;

// Slots at which the text of a slot begins and ends.
__device__ __forceinline__ int first_of(const int* firsts, int slot) { return DOCUMENTS ? firsts[slot] : 0; }
__device__ __forceinline__ int last_of(const int* lasts, int slot, int length) {
    return DOCUMENTS ? lasts[slot] : length - 1;
}

// 64 mapped vectors from `first` into rows of 16 bytes; zeros for those from length on. 128 threads.
__device__ __forceinline__ void copy_mapped(unsigned char* to, Rows from, int first, int length, int thread) {
    if (thread < CHUNK)
        copy_async(to + thread * MAPPED_ROW, from.at + (long long)(first + thread) * from.stride,
                   first + thread < length);
}

// Of mapped vectors in rows g and g + 8: entries t, t + 1, t + 2, turning around.
typedef float Entries[2][3];

__device__ __forceinline__ void load_entries(Entries& x, const unsigned char* rows, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int m = 0; m < 3; m++)
            x[r][m] = to_float(reinterpret_cast<const bf16*>(rows + ((lane >> 2) + 8 * r) * MAPPED_ROW)[(lane + m) & 3]);
}

// The same vectors as A fragment of products with others.
__device__ __forceinline__ void load_small_mapped(unsigned (&a)[4], const unsigned char* rows, int lane) {
    const unsigned char* at = rows + (lane >> 2) * MAPPED_ROW + (lane & 3) * 4;
    a[0] = *reinterpret_cast<const unsigned*>(at);
    a[1] = *reinterpret_cast<const unsigned*>(at + 8 * MAPPED_ROW);
    a[2] = a[3] = 0;
}

// The last of a lane's four features, from its entries.
__device__ __forceinline__ float odd_feature(float x, float x2, int t) { return t < 2 ? x * x2 : t == 2 ? 1.0f : 0.0f; }

// Features as A fragment, squares whole.
__device__ __forceinline__ void make_small_features(unsigned (&a)[4], const Entries& x, int t) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        a[r] = pack_bf16(x[r][0] * x[r][0], x[r][0]);
        a[2 + r] = pack_bf16(x[r][0] * x[r][1], odd_feature(x[r][0], x[r][2], t));
    }
}

// gradient: entry t of rows g and g + 8, of Σ slopes · features(x); through += this lane's part of that sum.
__device__ __forceinline__ void small_gradient(float (&gradient)[2], float (&through)[2], const Scores& slopes,
                                               const Entries& x, int lane) {
    int t = lane & 3, quad = lane & ~3;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float square = slopes[2 * r], linear = slopes[2 * r + 1], next = slopes[4 + 2 * r], odd = slopes[5 + 2 * r];
        float product = t < 2 ? odd : 0;
        float to_next = __shfl_sync(ALL_LANES, x[r][0] * next, quad | ((t + 3) & 3));
        float to_odd = __shfl_sync(ALL_LANES, x[r][0] * product, quad | ((t + 2) & 3));
        gradient[r] = 2 * x[r][0] * square + linear + x[r][1] * next + x[r][2] * product + to_next + to_odd;
        through[r] += x[r][0] * (x[r][0] * square + linear + x[r][1] * next) + odd * odd_feature(x[r][0], x[r][2], t);
    }
}

// What a sum and its normaliser give to mapped vectors of 16 rows, where seen: slopes are rows · sumᵀ + factor · norm.
__device__ __forceinline__ void sum_gradient(float (&gradient)[2], float (&through)[2], const unsigned (&rows)[4][4],
                                             const Entries& x, const unsigned char* sum, const float* norm,
                                             const float (&factor)[2], const bool (&seen)[2], int lane) {
    Scores slopes;
#pragma unroll
    for (int i = 0; i < 8; i++) slopes[i] = factor[score_row(i)] * norm[score_key(i, lane & 3)];
    multiply_rows(slopes, rows, sum, 0, lane);
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (!seen[score_row(i)]) slopes[i] = 0;
    small_gradient(gradient, through, slopes, x, lane);
}

// Rows token … of a gradient [T, 4], each times its factor: by pairs and, of entry t, through a sum.
__device__ __forceinline__ void store_small(far_t* to, int stride, const float (&pairs)[2][4], const float (&summed)[2],
                                            const float (&factor)[2], int token, int length, int lane) {
    int t = lane & 3, from = (lane & ~3) | (2 * t & 3);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float low = __shfl_sync(ALL_LANES, summed[r], from), high = __shfl_sync(ALL_LANES, summed[r], from + 1);
        int row = token + (lane >> 2) + 8 * r;
        if (t < 2 && row < length)
            store_pair(to + (long long)row * stride + 2 * t, (low + pairs[0][2 * r]) * factor[r],
                       (high + pairs[0][2 * r + 1]) * factor[r]);
    }
}

namespace small_sum {

constexpr unsigned ROWS_AT = 0, FAR_AT = ROWS_AT + 2 * TILE, NUMBERS_AT = FAR_AT + 2 * SMALL_FAR;
constexpr unsigned FEATURES_AT = NUMBERS_AT + 2 * 2 * CHUNK * 4, BYTES = FEATURES_AT + CHUNK * FAR_ROW;
static_assert(BYTES == 22528, "cuda_backward_small.py says so");

// What is summed: features of `mapped`, times weight where there is one, ⊗ [rows, -delta], or [rows, 1] where not.
struct Tokens {
    Rows mapped, rows;
    const float *weight, *delta;
};

// Features of one token, times its weight, squares halved: a row.
__device__ __forceinline__ void write_features(unsigned char* row, const unsigned char* mapped, float weight) {
    float x[4];
    unsigned *low = reinterpret_cast<unsigned*>(row), *high = low + 4;
#pragma unroll
    for (int t = 0; t < 4; t++) x[t] = to_float(reinterpret_cast<const bf16*>(mapped)[t]);
#pragma unroll
    for (int t = 0; t < 4; t++) {
        low[t] = pack_bf16(0.5f * weight * x[t] * x[t], weight * x[t]);
        high[t] = pack_bf16(weight * x[t] * x[(t + 1) & 3], weight * odd_feature(x[t], x[(t + 2) & 3], t));
    }
}

// sum += featuresᵀ · rows of a chunk, columns 16 warp …; norm (one warp) += featuresᵀ · extra.
__device__ __forceinline__ void add_chunk(float (&sum)[2][4], float (&norm)[4], const unsigned char* features,
                                          const unsigned char* rows, const float* extra, int warp, int lane) {
    int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int step = 0; step < 4; step++) {
        unsigned a[4], b[4];
        int token = 16 * step + (lane & 7) + (lane >> 4) * 8;
        load_matrices_transposed(a, features + token * FAR_ROW + (lane >> 3 & 1) * 16);
        load_matrices_transposed(b, rows + tile_place(16 * step + (lane & 15), 2 * warp + (lane >> 4)));
        multiply_add(sum[0], a, b[0], b[1]);
        multiply_add(sum[1], a, b[2], b[3]);
        if (warp) continue;
        unsigned parts[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {  // column 0: rounded; 1: what rounding lost
            const float* at = extra + 16 * step + 8 * i + 2 * t;
            unsigned high = pack_bf16(at[0], at[1]);
            parts[i] = g == 0 ? high : g == 1 ? pack_bf16(at[0] - low_float(high), at[1] - high_float(high)) : 0;
        }
        multiply_add(norm, a, parts[0], parts[1]);
    }
}

__device__ __forceinline__ void write_sum(bf16* to, float* to_norm, const float (&sum)[2][4], const float (&norm)[4],
                                          int warp, int lane) {
    int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int n = 0; n < 2; n++)
            *reinterpret_cast<unsigned*>(to + (g + 8 * r) * 64 + 16 * warp + 8 * n + 2 * t) =
                pack_bf16(sum[n][2 * r], sum[n][2 * r + 1]);
        if (warp == 0 && t == 0) to_norm[g + 8 * r] = norm[2 * r] + norm[2 * r + 1];
    }
}

// The sums at all boundaries, one after the other: over keys (not `sinks` of a text) forward, over queries backward.
// edges: first slots of texts, or last ones.
template <bool QUERIES>
__device__ __forceinline__ void sum_tokens(unsigned char* shared, const Tokens& from, const int* edges, bf16* sums,
                                           float* norms, int length, int sinks, int thread) {
    int warp = thread / 32, lane = thread % 32, steps = (length - 1) / CHUNK;
    auto load = [&](int step) {
        int start = (QUERIES ? steps - step : step) * CHUNK, token = start + thread;
        copy_tile(shared + ROWS_AT + step % 2 * TILE, from.rows, start, CHUNK, 0, length, 0, thread);
        copy_mapped(shared + FAR_AT + step % 2 * SMALL_FAR, from.mapped, start, length, thread);
        if (thread >= CHUNK) return;
        float* numbers = reinterpret_cast<float*>(shared + NUMBERS_AT) + step % 2 * 2 * CHUNK + thread;
        numbers[0] = !QUERIES ? 1 : token < length ? from.weight[token] : 0;
        numbers[CHUNK] = !QUERIES ? 1 : token < length ? -from.delta[token] : 0;
    };
    float sum[2][4] = {}, norm[4] = {};
    if (steps) load(0);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        int chunk = QUERIES ? steps - step : step, start = chunk * CHUNK;
        int edge = QUERIES ? last_of(edges, start - 1, length) : first_of(edges, start + CHUNK);
        if (QUERIES ? edge < start + CHUNK - 1 : edge >= start)  // another text than at the boundary before
#pragma unroll
            for (int i = 0; i < 4; i++) sum[0][i] = sum[1][i] = norm[i] = 0;
        wait_for_copies();
        meet();
        const float* numbers = reinterpret_cast<const float*>(shared + NUMBERS_AT) + step % 2 * 2 * CHUNK;
        if (thread < CHUNK) {
            int token = start + thread;
            bool counts = QUERIES ? token <= edge : token >= edge + sinks;
            write_features(shared + FEATURES_AT + thread * FAR_ROW,
                           shared + FAR_AT + step % 2 * SMALL_FAR + thread * MAPPED_ROW, counts ? numbers[thread] : 0);
        }
        if (step + 1 < steps) load(step + 1);
        meet();
        add_chunk(sum, norm, shared + FEATURES_AT, shared + ROWS_AT + step % 2 * TILE, numbers + CHUNK, warp, lane);
        long long boundary = QUERIES ? chunk : chunk + 1;
        write_sum(sums + boundary * SMALL_SUM, norms + boundary * FEATURES, sum, norm, warp, lane);
    }
}

}  // namespace small_sum
