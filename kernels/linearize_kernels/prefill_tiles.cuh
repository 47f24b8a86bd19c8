// Shared memory of the prefill kernels, and copies into it. See prefill.cu.
#pragma once
#include "tiles.cuh"

#define BLOCKS (128 / HEAD_DIM)  // blocks that share a multiprocessor
// Of the kernel that sums ahead of segments: blocks likewise, chunks in shared memory (3 or more), and 2 where each warp
// has half of the entries, 1 where it has all.
#ifndef SUM_BLOCKS
#define SUM_BLOCKS (HEAD_DIM == 64 ? 3 : 1)
#endif
#ifndef SUM_STAGES
#define SUM_STAGES 4
#endif
#ifndef SUM_SPLIT
#define SUM_SPLIT (HEAD_DIM == 64 ? 1 : 2)
#endif

constexpr int MAP = 16, STEPS = 10, NUM_FEATURES = 153;
constexpr int KEEPERS = 128 * HALVES, ATTENDERS = 128 * HALVES;  // threads of either role
constexpr int SUM_FLOATS = STEPS * MAP * HEAD_DIM, GRAM_FLOATS = MAP * MAP + MAP;  // of one span in global memory

// Shared memory, in bytes. Rings hold three chunks; a half's ring is in one piece.
constexpr unsigned RING = 3 * TILE;
constexpr unsigned FAR_ROW = 48, FAR_TILE = CHUNK * FAR_ROW, Q_FAR_ROW = 80;
// k_far of one chunk turned: rows are dims 0 … 15, 0 … 8, as products reach that far
constexpr unsigned TURNED_ROW = 192, TURNED_KEYS = (MAP + 9) * TURNED_ROW;
constexpr unsigned HALF_SUM = STEPS * MAP * 128;
constexpr unsigned K_AT = 0, V_AT = K_AT + HALVES * RING;
constexpr unsigned Q_AT = V_AT + HALVES * RING;                      // one chunk; where warps share rows, two in turn
constexpr unsigned OUT_AT = Q_AT + HALVES * HALVES * TILE;           // each warp's own 16 rows
constexpr unsigned SUM_AT = OUT_AT + HALVES * TILE;                  // S in bfloat16, in the order of B fragments
constexpr unsigned K_FAR_AT = SUM_AT + HALVES * HALF_SUM;            // a ring of three chunks
constexpr unsigned Q_FAR_AT = K_FAR_AT + 3 * FAR_TILE;  // each warp's own rows, twice: a rotated row is one run
constexpr unsigned TURNED_AT = Q_FAR_AT + HALVES * CHUNK * Q_FAR_ROW;
constexpr unsigned SINK_K_AT = TURNED_AT + TURNED_KEYS, SINK_V_AT = SINK_K_AT + HALVES * SINK_TILE;
constexpr unsigned GRAM_AT = SINK_V_AT + HALVES * SINK_TILE;         // Σ x xᵀ as C fragments, then Σ x; float32
static_assert(GRAM_AT + GRAM_FLOATS * 4 == (HEAD_DIM == 64 ? 110336 : 221952), "cuda_builds.py says so");

// The chunk after one in a ring of three.
__device__ __forceinline__ int next_in_ring(int place) { return place == 2 ? 0 : place + 1; }

// Rows first … first + 64 of mapped keys; zeros for those outside low … high. 128 threads.
__device__ __forceinline__ void copy_far_tile(unsigned char* tile, Rows from, int first, int low, int high,
                                              int thread) {
    int row = thread / 2, piece = thread % 2, token = first + row;
    copy_async(tile + row * FAR_ROW + piece * 16, from.at + (long long)token * from.stride + piece * 8,
               token >= low && token < high);
}

// Sixteen rows of mapped queries, each row twice. One warp.
__device__ __forceinline__ void copy_far_queries(unsigned char* tile, Rows from, int row, int token, int length,
                                                 int lane) {
    int i = lane / 2, piece = lane % 2;
    const bf16* at = from.at + (long long)(token + i) * from.stride + piece * 8;
    unsigned char* to = tile + (row + i) * Q_FAR_ROW + piece * 16;
    copy_async(to, at, token + i < length);
    copy_async(to + 32, at, token + i < length);
}
