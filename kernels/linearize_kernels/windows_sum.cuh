// S of prefill_windows.cu, the sum over all chunks before: kept in registers, sixteen values a warp, as is the
// normaliser's part of it.
#pragma once

// sum[m][n]: C fragment of values 16 (warp + m · number of warps) …, features 8n ….
template <int WARPS> struct Sum {
    static constexpr int TILES = (VALUE_TILES + WARPS - 1) / WARPS;
    float values[TILES][FEATURE_TILES][4];
    float gram[GRAM_TILES][4];  // of one warp only
};

constexpr int GRAM_WARP = 3;

// Sixteen tokens, 16 features from column 8 · piece on: r[0], r[1] are the B fragment [16 tokens, 8 features] of the
// first eight, r[2], r[3] of the others. Turned, an A fragment [16 features, 16 tokens] is r[0], r[2], r[1], r[3].
__device__ __forceinline__ void load_features(unsigned (&r)[4], const unsigned char* features, int step, int piece,
                                              int lane) {
    int token = 16 * step + (lane & 15);
    load_matrices_transposed(r, features + token * FEATURE_ROW + (piece + (lane >> 4)) * 16);
}

// The normaliser's products over a chunk: Σ x xᵀ and Σ x, from the columns of features that are x and 1.
__device__ __forceinline__ void fold_gram(float (&gram)[GRAM_TILES][4], const unsigned char* features, int lane) {
#pragma unroll
    for (int step = 0; step < CHUNK / 16; step++) {
        unsigned x[4];
        load_features(x, features, step, FEATURE_TILES - 2, lane);
        const unsigned turned[4] = {x[0], x[2], x[1], x[3]};
        multiply_add(gram[0], turned, x[2], x[3]);
        if (MAP == 16) {
            unsigned y[4];
            load_features(y, features, step, FEATURE_TILES - 4, lane);
            const unsigned one[4] = {y[0], y[2], y[1], y[3]};
            multiply_add(gram[1 % GRAM_TILES], turned, x[0], x[1]);
            multiply_add(gram[2 % GRAM_TILES], one, x[0], x[1]);
            multiply_add(gram[3 % GRAM_TILES], one, x[2], x[3]);
        }
    }
}

// sum += valuesᵀ · features of a chunk.
template <int WARPS>
__device__ __forceinline__ void fold(Sum<WARPS>& sum, const unsigned char* v_tile, const unsigned char* features,
                                     int warp, int lane) {
#pragma unroll
    for (int m = 0; m < Sum<WARPS>::TILES; m++) {
        int tile = warp + m * WARPS;
        if (tile >= VALUE_TILES) break;
        unsigned place = tile_place((lane & 7) + 8 * (lane >> 4), 2 * (tile & 3) + (lane >> 3 & 1));
#pragma unroll
        for (int step = 0; step < CHUNK / 16; step++) {
            unsigned a[4];
            load_matrices_transposed(a, v_tile + (tile >> 2) * TILE + step * 2048 + (place ^ (step % 2 * 64)));
#pragma unroll
            for (int n = 0; n < FEATURE_TILES; n += 2) {
                unsigned b[4];
                load_features(b, features, step, n, lane);
                multiply_add(sum.values[m][n], a, b[0], b[1]);
                multiply_add(sum.values[m][n + 1], a, b[2], b[3]);
            }
        }
    }
    if (warp == GRAM_WARP) fold_gram(sum.gram, features, lane);
}

// Calls f(dim, place, number) for what this lane of GRAM_WARP has of Σ x xᵀ (dim × place; of Σ x with dim = MAP).
template <class F> __device__ __forceinline__ void for_gram(const float (&gram)[GRAM_TILES][4], int lane, F f) {
    int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int e = 0; e < 2; e++) {
        int j = 2 * t + e;
        if (MAP == 4 && t >= 2 && g >= 4) f(g - 4, j - 4, gram[0][2 + e]);
        if (MAP == 4 && t >= 2 && g == 2) f(MAP, j - 4, gram[0][2 + e]);
        if (MAP == 8) f(g, j, gram[0][2 + e]);
        if (MAP == 8 && g == 4) f(MAP, j, gram[0][e]);
        if (MAP == 16) {
            f(g, j + 8, gram[0][e]), f(g + 8, j + 8, gram[0][2 + e]);
            f(g, j, gram[1 % GRAM_TILES][e]), f(g + 8, j, gram[1 % GRAM_TILES][2 + e]);
            if (g == 0) f(MAP, j, gram[2 % GRAM_TILES][2 + e]), f(MAP, j + 8, gram[3 % GRAM_TILES][2 + e]);
        }
    }
}

// S as B fragments: word [16 features][16 values][lane][8 values][b0, b1].
template <int WARPS>
__device__ __forceinline__ void write_sum(unsigned char* shared, const Sum<WARPS>& sum, int warp, int lane) {
#pragma unroll
    for (int m = 0; m < Sum<WARPS>::TILES; m++) {
        int tile = warp + m * WARPS;
        if (tile >= VALUE_TILES) break;
#pragma unroll
        for (int n = 0; n < FEATURE_TILES; n += 2) {
            const float(&low)[4] = sum.values[m][n], (&high)[4] = sum.values[m][n + 1];
            *reinterpret_cast<uint4*>(shared + SUM_AT + ((n / 2 * VALUE_TILES + tile) * 32 + lane) * 16) =
                make_uint4(pack_bf16(low[0], low[1]), pack_bf16(high[0], high[1]), pack_bf16(low[2], low[3]),
                           pack_bf16(high[2], high[3]));
        }
    }
    float* to = reinterpret_cast<float*>(shared + GRAM_AT);
    if (warp == GRAM_WARP) for_gram(sum.gram, lane, [&](int i, int j, float x) { to[i * MAP + j] = x; });
}

// Calls f(number, place in a span's floats of global memory) for all that this thread has of a sum.
template <int WARPS, class F> __device__ __forceinline__ void for_sum(Sum<WARPS>& sum, int warp, int lane, F f) {
#pragma unroll
    for (int m = 0; m < Sum<WARPS>::TILES; m++)
#pragma unroll
        for (int n = 0; n < FEATURE_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (warp + m * WARPS < VALUE_TILES)
                    f(sum.values[m][n][e], (((warp + m * WARPS) * FEATURE_TILES + n) * 4 + e) * 32 + lane);
#pragma unroll
    for (int n = 0; n < GRAM_TILES; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (warp == GRAM_WARP) f(sum.gram[n][e], SUM_FLOATS + (4 * n + e) * 32 + lane);
}

// The sum of the segments before this one, from global memory.
template <int WARPS>
__device__ __forceinline__ void start_sum(Sum<WARPS>& sum, const float* sums, int num_sums, int warp, int lane) {
    sum = {};
    for (int s = 0; s < num_sums; s++, sums += SUM_FLOATS + GRAM_FLOATS)
        for_sum(sum, warp, lane, [&](float& x, int place) { x += sums[place]; });
}

// Writes State.total [features, V + 1], in the order and with the weights of Taylor.expand.
template <int WARPS>
__device__ __forceinline__ void store_total(float* total, const Sum<WARPS>& sum, int num_keys, int warp, int lane) {
    const float root_half = 0.70710678118654752f;
    int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int m = 0; m < Sum<WARPS>::TILES; m++) {
        int tile = warp + m * WARPS;
        if (tile >= VALUE_TILES) break;
#pragma unroll
        for (int n = 0; n < FEATURE_TILES; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int column = 8 * n + 2 * t + e, s = column / MAP, i = column % MAP;
                int row = s == PAIRS + 1 ? 1 + i : s < PAIRS || i < PAIRS ? pair_row(i, (i + s) % MAP, MAP) : 0;
                if (s == PAIRS && i > PAIRS) continue;
                float* at = total + row * (HEAD_DIM + 1) + 16 * tile + g, weight = s == 0 ? root_half : 1;
                at[0] = sum.values[m][n][e] * weight;
                at[8] = sum.values[m][n][2 + e] * weight;
            }
        }
    }
    if (warp != GRAM_WARP) return;
    for_gram(sum.gram, lane, [&](int i, int j, float x) {
        if (i == MAP) total[(1 + j) * (HEAD_DIM + 1) + HEAD_DIM] = x;
        else if (i <= j) total[pair_row(i, j, MAP) * (HEAD_DIM + 1) + HEAD_DIM] = x * (i == j ? root_half : 1);
    });
    if (lane == 0) total[HEAD_DIM] = float(num_keys);
}
