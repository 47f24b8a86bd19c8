// Tiles of 64 rows in shared memory and copies into them: what all kernels that walk a text in chunks of 64 share.
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

constexpr int CHUNK = 64, HALVES = HEAD_DIM / 64;
constexpr unsigned ONES = 0x3f803f80u;  // 1, 1 in bfloat16
#define INFINITE __uint_as_float(0x7f800000u)

// In bytes. A tile has 64 rows of 64 numbers, swizzled by tile_place; head dim 128 takes two, one for each half of the
// columns.
constexpr unsigned TILE = CHUNK * 128, SINK_TILE = 16 * 128;

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

// Row of State.total for the product of entries i and j of a vector of `size`.
__device__ __forceinline__ int pair_row(int i, int j, int size) {
    int low = min(i, j), high = max(i, j);
    return 1 + size + low * size - low * (low - 1) / 2 + high - low;
}

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

// Sixteen rows of queries from `token`, 64 columns, into rows from `row` of a tile. One warp.
__device__ __forceinline__ void copy_queries(unsigned char* tile, Rows from, int row, int token, int length, int lane) {
    const bf16* at = from.at + (long long)(token + lane / 8) * from.stride + lane % 8 * 8;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        int i = 4 * n + lane / 8;
        copy_async(tile + tile_place(row + i, lane % 8), at + (long long)(4 * n) * from.stride, token + i < length);
    }
}
