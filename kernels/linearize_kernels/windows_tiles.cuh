// Shared memory of prefill_windows.cu, copies into it, and the features of a mapped vector.
#pragma once
#include "tiles.cuh"

#ifndef MAP_DIM
#define MAP_DIM 4  // 4, 8 or 16
#endif
#ifndef LAG
#define LAG 5  // chunks that a chunk of queries sees pair by pair
#endif
#ifndef SLOTS
#define SLOTS LAG  // chunks of keys and values in shared memory: LAG, or 2 and all are read again for every chunk
#endif
#ifndef HEADS
#define HEADS 1  // query heads of a block, which share keys
#endif
#ifndef BLOCKS
#define BLOCKS 2  // blocks that share a multiprocessor
#endif

constexpr bool STREAM = SLOTS < LAG;
static_assert(LAG >= 2 && SLOTS >= 2, "a window of at least one token");
constexpr int MAP = MAP_DIM, PAIRS = MAP / 2;
constexpr int FEATURES = MAP * (PAIRS + 2), NUM_FEATURES = 1 + MAP + MAP * (MAP + 1) / 2;  // padded, and in a State
constexpr int WARPS = 4 * HEADS, THREADS = 32 * WARPS;
constexpr int VALUE_TILES = HEAD_DIM / 16, FEATURE_TILES = FEATURES / 8, GRAM_TILES = MAP == 16 ? 4 : 1;
constexpr int SUM_FLOATS = FEATURES * HEAD_DIM, GRAM_FLOATS = GRAM_TILES * 128;  // of one span in global memory

// Rows of mapped vectors, of features, of Σ x xᵀ: in bytes, free of bank conflicts.
constexpr unsigned FAR_ROW = MAP == 16 ? 48 : 2 * MAP, FAR_TILE = CHUNK * FAR_ROW, FEATURE_ROW = 2 * FEATURES + 16;
constexpr unsigned KEYS = HALVES * TILE, SLOT = 2 * KEYS;  // keys, then values of a chunk
constexpr unsigned Q_AT = SLOTS * SLOT;                    // each warp's own rows
constexpr unsigned SINK_K_AT = Q_AT + HEADS * HALVES * TILE;
constexpr unsigned SINK_V_AT = SINK_K_AT + (SINKS ? HALVES * SINK_TILE : 0);
constexpr unsigned SUM_AT = SINK_V_AT + (SINKS ? HALVES * SINK_TILE : 0);  // S in bfloat16, in the order of B fragments
constexpr unsigned FEATURES_AT = SUM_AT + SUM_FLOATS * 2;                  // of the oldest chunk in the ring
constexpr unsigned GRAM_AT = FEATURES_AT + CHUNK * FEATURE_ROW;            // Σ x xᵀ, then Σ x; float32
constexpr unsigned K_FAR_AT = GRAM_AT + (MAP + 1) * MAP * 4;               // a ring of LAG chunks
constexpr unsigned Q_FAR_AT = K_FAR_AT + LAG * FAR_TILE;                   // each warp's own rows
constexpr unsigned PREFILL_BYTES = Q_FAR_AT + HEADS * FAR_TILE;
// Of the kernel that sums spans of chunks: values and mapped keys of two chunks, features of one.
constexpr unsigned SPAN_FAR_AT = 2 * KEYS, SPAN_FEATURES_AT = SPAN_FAR_AT + 2 * FAR_TILE;
constexpr unsigned SPAN_BYTES = SPAN_FEATURES_AT + CHUNK * FEATURE_ROW;

// Keys and values of a text, and the numbers that every role needs.
struct Text {
    Rows k, v, k_far;
    int length, sinks, window;
};

// Columns of 64 of keys and of values of a chunk, shared out among groups of 128 threads; zeros from token `high` on.
__device__ __forceinline__ void load_chunk(unsigned char* slot, const Text& text, int chunk, int high) {
    int group = threadIdx.x / 128, thread = threadIdx.x % 128;
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        if (2 * half % HEADS == group)
            copy_tile(slot + half * TILE, text.k, chunk * CHUNK, CHUNK, 0, high, 64 * half, thread);
        if ((2 * half + 1) % HEADS == group)
            copy_tile(slot + KEYS + half * TILE, text.v, chunk * CHUNK, CHUNK, text.sinks, high, 64 * half, thread);
    }
}

// `count` rows of mapped vectors from token `first`; zeros for those outside low … high.
__device__ __forceinline__ void copy_mapped(unsigned char* tile, Rows from, int count, int first, int low, int high,
                                            int thread, int threads) {
    constexpr int PIECE = MAP == 4 ? 8 : 16, PIECES = 2 * MAP / PIECE;
    for (int n = thread; n < count * PIECES; n += threads) {
        int row = n / PIECES, piece = n % PIECES, token = first + row;
        copy_async<PIECE>(tile + row * FAR_ROW + piece * PIECE,
                          from.at + (long long)token * from.stride + piece * (PIECE / 2), token >= low && token < high);
    }
}

__device__ __forceinline__ unsigned char* far_tile_of(unsigned char* shared, int chunk) {
    return shared + K_FAR_AT + (chunk + LAG) % LAG * FAR_TILE;
}

__device__ __forceinline__ void load_mapped_keys(unsigned char* shared, const Text& text, int chunk, int high) {
    copy_mapped(far_tile_of(shared, chunk), text.k_far, CHUNK, chunk * CHUNK, text.sinks, high, threadIdx.x, THREADS);
}

// Features of x, as a matrix of rows of MAP: row s < MAP / 2 holds x_i x_(i+s), indices mod MAP; row MAP / 2 has every
// product twice, so its upper half holds 1, 0, …, 0 instead; the last row holds x itself. This is one pair of them.
// w: all pairs of x from some pair on, turning around; m: the place in w of the pair; pair: its number.
__device__ __forceinline__ unsigned feature_pair(const unsigned (&w)[PAIRS], int row, int m, int pair) {
    if (row == PAIRS + 1) return w[m];
    int n = (m + row / 2) % PAIRS;
    unsigned right = row % 2 ? join_halves(w[n], w[(n + 1) % PAIRS]) : w[n];
    unsigned product = multiply_bf16(w[m], right);
    return row < PAIRS || pair < PAIRS / 2 ? product : pair == PAIRS / 2 ? 0x3f80u : 0;
}

// Features of a chunk's mapped keys, a thread each: threads 0 … 63.
__device__ __forceinline__ void write_features(unsigned char* features, const unsigned char* far_tile) {
    if (threadIdx.x >= CHUNK) return;
    const unsigned* x = reinterpret_cast<const unsigned*>(far_tile + threadIdx.x * FAR_ROW);
    unsigned* to = reinterpret_cast<unsigned*>(features + threadIdx.x * FEATURE_ROW);
    unsigned w[PAIRS];
#pragma unroll
    for (int m = 0; m < PAIRS; m++) w[m] = x[m];
#pragma unroll
    for (int n = 0; n < FEATURES / 2; n += 4) {
        unsigned f[4];
#pragma unroll
        for (int i = 0; i < 4; i++) f[i] = feature_pair(w, (n + i) / PAIRS, (n + i) % PAIRS, (n + i) % PAIRS);
        *reinterpret_cast<uint4*>(to + n) = make_uint4(f[0], f[1], f[2], f[3]);
    }
}
