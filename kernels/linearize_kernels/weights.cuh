// Scores of 16 rows become weights, and weights times values are added up: one warp, fragments as in tensor_cores.cuh.
#pragma once

// Scores of 16 rows and 16 keys as a C fragment: [0 … 3] keys 0 … 7, [4 … 7] keys 8 … 15.
typedef float Scores[8];

__device__ __forceinline__ int score_row(int i) { return i >> 1 & 1; }  // 0: row g, 1: row g + 8
__device__ __forceinline__ int score_key(int i, int t) { return (i >> 2) * 8 + 2 * t + (i & 1); }

// c[0 … 3] += a · b[0, 1], c[4 … 7] += a · b[2, 3].
__device__ __forceinline__ void multiply_add_pair(Scores& c, const unsigned (&a)[4], const unsigned (&b)[4]) {
    multiply_add(*reinterpret_cast<float(*)[4]>(&c[0]), a, b[0], b[1]);
    multiply_add(*reinterpret_cast<float(*)[4]>(&c[4]), a, b[2], b[3]);
}

// Scores become weights; adds them to total.
__device__ __forceinline__ void exponentiate(Scores& scores, float (&total)[2], const float (&shift)[2], float scale,
                                             int count) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i >= count) continue;
        scores[i] = exp2_fast(scores[i] * scale - shift[score_row(i)]);
        total[score_row(i)] += scores[i];
    }
}

__device__ __forceinline__ void pack_weights(unsigned (&a)[4], const Scores& weights) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = pack_bf16(weights[2 * i], weights[2 * i + 1]);
}

// acc += weights [16 rows, 16 keys] · values of a tile of 16 keys. turn: 64 for a tile that begins at an odd sixteenth
// row.
__device__ __forceinline__ void add_values(float (&acc)[8][4], const unsigned (&a)[4], const unsigned char* v_tile,
                                           unsigned turn, int lane) {
    unsigned place = tile_place(lane & 15, lane >> 4) ^ turn;
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
        unsigned b[4];
        load_matrices_transposed(b, v_tile + (place ^ (pair << 5)));
        multiply_add(acc[2 * pair], a, b[0], b[1]);
        multiply_add(acc[2 * pair + 1], a, b[2], b[3]);
    }
}

// Where one head's results go. rest and lse: see prefill_kernel.
struct Results {
    bf16 *out, *rest;
    float* lse;
    int stride;
};

// Base-2 logs of the denominators of rows g and g + 8; one lane of four.
__device__ __forceinline__ void store_lse(float* lse, const float (&shift)[2], const float (&total)[2], int token,
                                          int length, int lane) {
    if (lane & 3) return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int query = token + (lane >> 2) + 8 * r;
        if (query < length) lse[query] = shift[r] + log2_fast(total[r]);
    }
}
