// Shared memory of the backward kernels, and what both passes do with tiles. See backward.cu.
#pragma once

static_assert(HEAD_DIM == 64, "head dim 64 only");

#ifndef SMALL_MAP
#define SMALL_MAP 0  // 1: mapped vectors have up to 4 numbers, and four zeros in shared memory (backward_small.cu)
#endif
constexpr unsigned MAPPED_ROW = SMALL_MAP ? 16 : FAR_ROW;

// Numbers of the mapped vectors' gradients: bfloat16 or float32.
#if FAR_FLOAT
typedef float far_t;
#else
typedef bf16 far_t;
#endif

constexpr unsigned SUM_TILE = STEPS * MAP * 128;  // rows are features
constexpr unsigned GRAM_BYTES = GRAM_FLOATS * 4;
constexpr unsigned TURNED_TILE = MAP * TURNED_ROW;  // mapped vectors of a chunk, dims as rows

namespace query_pass {
constexpr unsigned K_AT = 0, V_AT = K_AT + RING, Q_AT = V_AT + RING, GRAD_AT = Q_AT + TILE, SUM_AT = GRAD_AT + TILE;
constexpr unsigned K_FAR_AT = SUM_AT + SUM_TILE, Q_FAR_AT = K_FAR_AT + 3 * FAR_TILE;
constexpr unsigned TURNED_AT = Q_FAR_AT + CHUNK * Q_FAR_ROW, SINK_K_AT = TURNED_AT + TURNED_TILE;
constexpr unsigned SINK_V_AT = SINK_K_AT + SINK_TILE, GRAM_AT = SINK_V_AT + SINK_TILE;  // two: before and after a chunk
constexpr unsigned DELTA_AT = GRAM_AT + 2 * GRAM_BYTES, BYTES = DELTA_AT + 2 * CHUNK * 4;
static_assert(BYTES == 110208, "cuda_backward.py says so");
}  // namespace query_pass

namespace key_pass {
constexpr unsigned Q_AT = 0, GRAD_AT = Q_AT + RING, K_AT = GRAD_AT + RING, V_AT = K_AT + TILE, SUM_AT = V_AT + TILE;
constexpr unsigned Q_FAR_AT = SUM_AT + SUM_TILE, K_FAR_AT = Q_FAR_AT + 3 * FAR_TILE;
constexpr unsigned TURNED_AT = K_FAR_AT + CHUNK * Q_FAR_ROW, WEIGHED_AT = TURNED_AT + TURNED_TILE;
constexpr unsigned DELTAS_AT = WEIGHED_AT + TURNED_TILE + TURNED_ROW, GRAM_AT = DELTAS_AT + TURNED_TILE;
constexpr unsigned NUMBERS_AT = GRAM_AT + 2 * GRAM_BYTES;  // a ring of three: lse, delta, weight of a chunk's queries
constexpr unsigned NUMBERS = 3 * CHUNK * 4, BYTES = NUMBERS_AT + 3 * NUMBERS;
static_assert(BYTES == 114240, "cuda_backward.py says so");
}  // namespace key_pass

namespace sink_pass {
constexpr unsigned Q_AT = 0, GRAD_AT = Q_AT + 2 * TILE, K_AT = GRAD_AT + 2 * TILE, V_AT = K_AT + SINK_TILE;
constexpr unsigned NUMBERS_AT = V_AT + SINK_TILE, BYTES = NUMBERS_AT + 2 * 2 * CHUNK * 4;
static_assert(BYTES == 37888, "cuda_backward.py says so");
}  // namespace sink_pass

#ifndef TILES_AT_ONCE
#define TILES_AT_ONCE 2  // tiles of 16 whose products may overlap: more take more registers
#endif
constexpr int UNROLL = TILES_AT_ONCE;

// Where a tile of 16 lies in a ring of 12, in bytes: tile `number` from the beginning of the chunk at `place`.
__device__ __forceinline__ unsigned find_tile(int place, int number) {
    int tile = 4 * place + number;
    return (tile < 12 ? tile : tile - 12) * 2048;
}

// Rows 16 block … of a tile as A fragments.
__device__ __forceinline__ void load_rows(unsigned (&a)[4][4], const unsigned char* tile, int block, int lane) {
    unsigned place = tile_place(16 * block + (lane & 15), lane >> 4);
#pragma unroll
    for (int step = 0; step < 4; step++) load_matrices(a[step], tile + (place ^ (step << 5)));
}

// c += a [16, 64] · rowsᵀ, of 16 rows of a tile. turn: 64 for rows that begin at an odd sixteenth.
__device__ __forceinline__ void multiply_rows(Scores& c, const unsigned (&a)[4][4], const unsigned char* rows,
                                              unsigned turn, int lane) {
    unsigned place = tile_place((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1) ^ turn;
#pragma unroll
    for (int step = 0; step < 4; step++) {
        unsigned b[4];
        load_matrices(b, rows + (place ^ (step << 5)));
        multiply_add_pair(c, a[step], b);
    }
}

// c += x [16, 16] · rowsᵀ, of 16 mapped vectors.
__device__ __forceinline__ void multiply_mapped(Scores& c, const unsigned (&x)[4], const unsigned char* rows,
                                                int lane) {
    unsigned b[4];
    if (SMALL_MAP) {
        load_matrices(b, rows + (lane & 15) * MAPPED_ROW);
        b[2] = b[1];
        b[1] = b[3] = 0;
    } else {
        load_matrices(b, rows + ((lane & 7) + (lane >> 4) * 8) * MAPPED_ROW + (lane >> 3 & 1) * 16);
    }
    multiply_add_pair(c, x, b);
}

// acc [16, 16 dims] += a [16, 16] · 16 mapped vectors. Of small ones acc[0] alone.
__device__ __forceinline__ void add_mapped(float (&acc)[2][4], const unsigned (&a)[4], const unsigned char* rows,
                                           int lane) {
    unsigned b[4];
    load_matrices_transposed(b, rows + (lane & 15) * MAPPED_ROW + (SMALL_MAP ? 0 : (lane >> 4) * 16));
    multiply_add(acc[0], a, b[0], b[1]);
    if (!SMALL_MAP) multiply_add(acc[1], a, b[2], b[3]);
}

// Mapped vectors of rows g and g + 8, from rows that stand twice: pairs of entries, from pair t on, turning around.
typedef unsigned Mapped[2][8];

__device__ __forceinline__ void load_mapped(Mapped& x, const unsigned char* rows, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int m = 0; m < 8; m++)
            x[r][m] = *reinterpret_cast<const unsigned*>(rows + ((lane >> 2) + 8 * r) * Q_FAR_ROW +
                                                         ((lane & 3) + m) * 4);
}

// Rows token … of a gradient [T, 64], times `factor`. Lanes of a pair swap words, so that a row's pieces are 32 bytes.
__device__ __forceinline__ void store_gradient(bf16* to, int stride, const float (&acc)[8][4], float factor, int token,
                                               int length, int lane) {
    int g = lane >> 2, t = lane & 3, odd = t & 1;
#pragma unroll
    for (int n = 0; n < 8; n += 2)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            unsigned low = pack_bf16(acc[n][2 * r] * factor, acc[n][2 * r + 1] * factor);
            unsigned high = pack_bf16(acc[n + 1][2 * r] * factor, acc[n + 1][2 * r + 1] * factor);
            unsigned other = __shfl_xor_sync(ALL_LANES, odd ? low : high, 1);
            uint2 words = odd ? make_uint2(other, high) : make_uint2(low, other);
            int row = token + g + 8 * r;
            if (row < length)
                *reinterpret_cast<uint2*>(to + (long long)row * stride + 8 * (n + odd) + 2 * (t - odd)) = words;
        }
}

__device__ __forceinline__ void store_pair(float* to, float x, float y) {
    *reinterpret_cast<float2*>(to) = make_float2(x, y);
}
__device__ __forceinline__ void store_pair(bf16* to, float x, float y) {
    *reinterpret_cast<unsigned*>(to) = pack_bf16(x, y);
}

// Rows token … of a gradient [T, 16], each times its factor.
__device__ __forceinline__ void store_mapped(far_t* to, int stride, const float (&acc)[2][4], const float (&factor)[2],
                                             int token, int length, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = token + (lane >> 2) + 8 * r;
        if (row >= length) continue;
#pragma unroll
        for (int n = 0; n < 2; n++)
            store_pair(to + (long long)row * stride + 8 * n + 2 * (lane & 3), acc[n][2 * r] * factor[r],
                       acc[n][2 * r + 1] * factor[r]);
    }
}
