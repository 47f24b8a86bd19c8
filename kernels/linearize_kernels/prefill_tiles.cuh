// Shared memory of the prefill kernels, and copies into it. See prefill.cu.
#pragma once

#ifndef HEAD_DIM
#define HEAD_DIM 64  // of keys and of values: 64 or 128
#endif
#ifndef SINKS
#define SINKS 8  // places for sinks: 0, 8 or 16
#endif
#ifndef TRAINING
#define TRAINING 0  // 1: what the backward needs is written too
#endif
#ifndef DOCUMENTS
#define DOCUMENTS 0  // 1: several texts in a row
#endif
#define BLOCKS (128 / HEAD_DIM)  // blocks that share a multiprocessor

constexpr int CHUNK = 64, HALVES = HEAD_DIM / 64, MAP = 16, STEPS = 10, NUM_FEATURES = 153;
constexpr int KEEPERS = 128 * HALVES, ATTENDERS = 128 * HALVES;  // threads of either role
constexpr int SUM_FLOATS = STEPS * MAP * HEAD_DIM, GRAM_FLOATS = MAP * MAP + MAP;  // of one span in global memory
constexpr unsigned ONES = 0x3f803f80u;                                             // 1, 1 in bfloat16
#define INFINITE __uint_as_float(0x7f800000u)

// Shared memory, in bytes. A tile has 64 rows of 64 numbers, swizzled by tile_place; head dim 128 takes two, one for
// each half of the columns. Rings hold three chunks; a half's ring is in one piece.
constexpr unsigned TILE = CHUNK * 128, RING = 3 * TILE, SINK_TILE = 16 * 128;
constexpr unsigned FAR_ROW = 48, FAR_TILE = CHUNK * FAR_ROW, Q_FAR_ROW = 80, TURNED_ROW = 192;
constexpr unsigned HALF_SUM = STEPS * MAP * 128;
constexpr unsigned K_AT = 0, V_AT = K_AT + HALVES * RING;
constexpr unsigned Q_AT = V_AT + HALVES * RING;                      // one chunk; where warps share rows, two in turn
constexpr unsigned OUT_AT = Q_AT + HALVES * HALVES * TILE;           // each warp's own 16 rows
constexpr unsigned SUM_AT = OUT_AT + HALVES * TILE;                  // S in bfloat16, in the order of B fragments
constexpr unsigned K_FAR_AT = SUM_AT + HALVES * HALF_SUM;            // a ring of three chunks
constexpr unsigned Q_FAR_AT = K_FAR_AT + 3 * FAR_TILE;  // each warp's own rows, twice: a rotated row is one run
// k_far of one chunk [32, 64]: rows are dims, twice
constexpr unsigned TURNED_AT = Q_FAR_AT + HALVES * CHUNK * Q_FAR_ROW;
constexpr unsigned SINK_K_AT = TURNED_AT + 2 * MAP * TURNED_ROW, SINK_V_AT = SINK_K_AT + HALVES * SINK_TILE;
constexpr unsigned GRAM_AT = SINK_V_AT + HALVES * SINK_TILE;         // Σ x xᵀ as C fragments, then Σ x; float32
static_assert(GRAM_AT + GRAM_FLOATS * 4 == (HEAD_DIM == 64 ? 111680 : 223296), "cuda_prefill.py says so");

// A matrix of rows in global memory: one head of one text.
struct Rows {
    const bf16* at;
    int stride;
};

// Where all threads of a block meet, also from different places in the code.
__device__ __forceinline__ void meet() {
#ifdef CUDA_ON_CPU
    __syncthreads();
#else
    asm volatile("bar.sync 0;" ::: "memory");
#endif
}

// Place of 16 bytes in a tile. Free of bank conflicts for eight rows in turn, and for rows 0, 1, 8, 9, 16, 17, 24, 25.
// For an even piece, place ^ (n << 5) is 2n pieces further; 16 rows further is place + 2048 and ^ 64.
__device__ __forceinline__ unsigned tile_place(int row, int piece) {
    return unsigned(row * 128 + ((piece ^ (row + 2 * (row >> 3))) & 7) * 16);
}

// The chunk after one in a ring of three.
__device__ __forceinline__ int next_in_ring(int place) { return place == 2 ? 0 : place + 1; }

// ---- copies --------------------------------------------------------------------------------------------------------

// Rows first … first + count of a tensor into a tile; zeros for those outside low … high. 128 threads;
// column: the first of 64.
__device__ __forceinline__ void copy_tile(unsigned char* tile, Rows from, int first, int count, int low, int high,
                                          int column, int thread) {
    int token = first + thread / 8;
    const bf16* at = from.at + (long long)token * from.stride + column + thread % 8 * 8;
    unsigned place = tile_place(thread / 8, thread % 8);
#pragma unroll
    for (int n = 0; n < count / 16; n++)
        copy_async(tile + (place ^ (n % 2 * 64)) + n * 2048, at + (long long)(16 * n) * from.stride,
                   token + 16 * n >= low && token + 16 * n < high);
}

// The same for 64 rows of mapped keys.
__device__ __forceinline__ void copy_far_tile(unsigned char* tile, Rows from, int first, int low, int high,
                                              int thread) {
    int row = thread / 2, piece = thread % 2, token = first + row;
    copy_async(tile + row * FAR_ROW + piece * 16, from.at + (long long)token * from.stride + piece * 8,
               token >= low && token < high);
}

// Sixteen rows of queries from `token`, 64 columns, into rows from `row` of a tile. One warp.
__device__ __forceinline__ void copy_queries(unsigned char* tile, Rows from, int row, int token, int length, int lane) {
    const bf16* at = from.at + (long long)(token + lane / 8) * from.stride + lane % 8 * 8;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        int i = 4 * n + lane / 8;
        copy_async(tile + tile_place(row + i, lane % 8), at + (long long)(4 * n) * from.stride, token + i < length);
    }
}

// The same of mapped queries, each row twice.
__device__ __forceinline__ void copy_far_queries(unsigned char* tile, Rows from, int row, int token, int length,
                                                 int lane) {
    int i = lane / 2, piece = lane % 2;
    const bf16* at = from.at + (long long)(token + i) * from.stride + piece * 8;
    unsigned char* to = tile + (row + i) * Q_FAR_ROW + piece * 16;
    copy_async(to, at, token + i < length);
    copy_async(to + 32, at, token + i < length);
}
