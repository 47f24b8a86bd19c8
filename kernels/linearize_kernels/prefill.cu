// Prefill of hybrid attention, forward: bfloat16, head and value dim 64, map dim 16, window 64, up to 16 sinks, one text a
// row from its first token. The function is reference.py's; the launcher is cuda_prefill.py.
//
// A block walks one head (or a segment of it) in chunks of 64 tokens, c = 0, 1, … As a chunk is as long as the window,
// a query at place r of chunk c sees:
//     exactly             chunk c up to place r, chunk c - 1 from place r + 1 on, and the sinks;
//     by T(x), by pairs   chunk c - 1 up to place r;
//     through the sum S   all chunks before: S = Σ features(k_far) ⊗ v, and the same for 1 instead of v.
// Four warps attend, 16 rows each. Four warps keep S in registers, add chunk c - 1 for the next step, and load ahead.
// Between barriers A and B the attending warps read S(c) in shared memory while the others multiply; between B and A
// they do everything else, while the others write S(c + 1). Rows of tensors travel by cp.async, a chunk ahead.
//
// Features of x [16]: step s = 0 … 8 holds x_i x_(i+s), i = 0 … 15, indices mod 16; step 8 has every product twice, so its
// upper half holds 1, 0, …, 0 instead; step 9 holds x itself. Squares count half, on the query's side.
// Of the normaliser only Σ x xᵀ (`gram`), Σ x and the number of keys are kept: Σ T(q·x) = n + q·Σx + ½ q·(Σ x xᵀ) q.
//
// Weights are taken in base 2. All sums run in a fixed order, in float32. A lane is (g, t) as in tensor_cores.cuh.
#include "primitives.cuh"
#include "tensor_cores.cuh"

#ifndef SINKS
#define SINKS 8  // places for sinks: 0, 8 or 16
#endif
#ifndef BLOCKS
#define BLOCKS 2  // blocks that share a multiprocessor
#endif

constexpr int CHUNK = 64, DIM = 64, MAP = 16, STEPS = 10, NUM_FEATURES = 153;
constexpr int SUM_FLOATS = STEPS * MAP * DIM, GRAM_FLOATS = MAP * MAP + MAP;  // of one segment in global memory
constexpr unsigned ONES = 0x3f803f80u;                                         // 1, 1 in bfloat16
#define INFINITE __uint_as_float(0x7f800000u)

// Shared memory, in bytes. A tile has 64 rows of 128 bytes, swizzled by tile_place.
constexpr unsigned TILE = CHUNK * 128, FAR_ROW = 48, FAR_TILE = CHUNK * FAR_ROW, Q_FAR_ROW = 80, TURNED_ROW = 192;
constexpr unsigned K_AT = 0, V_AT = K_AT + 3 * TILE;                 // rings of three chunks
constexpr unsigned Q_AT = V_AT + 3 * TILE, OUT_AT = Q_AT + TILE;     // each warp's own 16 rows
constexpr unsigned SUM_AT = OUT_AT + TILE;                           // S in bfloat16, in the order of B fragments
constexpr unsigned K_FAR_AT = SUM_AT + SUM_FLOATS * 2;               // a ring of three chunks
constexpr unsigned Q_FAR_AT = K_FAR_AT + 3 * FAR_TILE;               // each row twice, so that a rotated row is one run
constexpr unsigned TURNED_AT = Q_FAR_AT + CHUNK * Q_FAR_ROW;         // k_far of one chunk [32, 64]: rows are dims, twice
constexpr unsigned SINK_K_AT = TURNED_AT + 2 * MAP * TURNED_ROW, SINK_V_AT = SINK_K_AT + 16 * 128;
constexpr unsigned GRAM_AT = SINK_V_AT + 16 * 128;                   // Σ x xᵀ as C fragments, then Σ x; float32
static_assert(GRAM_AT + GRAM_FLOATS * 4 == 111680, "cuda_prefill.py says so");

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
    asm volatile("barrier.sync 0;" ::: "memory");
#endif
}

// Place of 16 bytes in a tile. Free of bank conflicts for eight rows in turn, and for rows 0, 1, 8, 9, 16, 17, 24, 25.
// place ^ (n << 5) is the place 2n pieces further, for an even piece.
__device__ __forceinline__ unsigned tile_place(int row, int piece) {
    return unsigned(row * 128 + ((piece ^ (row + 2 * (row >> 3))) & 7) * 16);
}

__device__ __forceinline__ int ring_place(int chunk) { return (chunk + 3) % 3; }

// ---- copies --------------------------------------------------------------------------------------------------------

// Rows first … first + count of a tensor into a tile; zeros for those outside low … high.
__device__ __forceinline__ void copy_tile(unsigned char* tile, Rows from, int first, int count, int low, int high,
                                          int thread, int threads) {
    for (int n = thread; n < count * 8; n += threads) {
        int row = n / 8, piece = n % 8, token = first + row;
        bool real = token >= low && token < high;
        copy_async(tile + tile_place(row, piece), from.at + (real ? (long long)token * from.stride + piece * 8 : 0), real);
    }
}

__device__ __forceinline__ void copy_far_tile(unsigned char* tile, Rows from, int first, int low, int high, int thread,
                                              int threads) {
    for (int n = thread; n < CHUNK * 2; n += threads) {
        int row = n / 2, piece = n % 2, token = first + row;
        bool real = token >= low && token < high;
        copy_async(tile + row * FAR_ROW + piece * 16, from.at + (real ? (long long)token * from.stride + piece * 8 : 0), real);
    }
}

// Sixteen rows of queries from `token` into rows from `row` of Q, for the warp itself.
__device__ __forceinline__ void copy_queries(unsigned char* shared, Rows from, int row, int token, int length, int lane) {
    for (int n = lane; n < 128; n += 32) {
        int i = n / 8, piece = n % 8;
        bool real = token + i < length;
        copy_async(shared + Q_AT + tile_place(row + i, piece),
                   from.at + (real ? (long long)(token + i) * from.stride + piece * 8 : 0), real);
    }
}

__device__ __forceinline__ void copy_far_queries(unsigned char* shared, Rows from, int row, int token, int length, int lane) {
    for (int n = lane; n < 64; n += 32) {
        int i = n / 4, piece = n % 2, twice = n / 2 % 2;
        bool real = token + i < length;
        copy_async(shared + Q_FAR_AT + (row + i) * Q_FAR_ROW + twice * 32 + piece * 16,
                   from.at + (real ? (long long)(token + i) * from.stride + piece * 8 : 0), real);
    }
}

// ---- the warps that keep the sum ------------------------------------------------------------------------------------

// S transposed [64 values, 160 features], split over four warps: `half` of the features, `side` of the values.
// sum[m][n]: C fragment of values 32 side + 16 m, features 80 half + 8 n.
typedef float Sum[2][10][4];

// k_far of a chunk turned: dims become rows. A thread then has 8 tokens of one dim in 16 bytes.
__device__ __forceinline__ void turn_keys(unsigned char* turned, const unsigned char* far_tile, int warp, int lane) {
    int part = warp & 1, dims = warp >> 1;
    int token = 32 * part + 8 * ((lane & 7) >> 1) + 2 * (lane >> 3) + (lane & 1);
    unsigned r[4];
    load_matrices_transposed(r, far_tile + token * FAR_ROW + dims * 16);
    unsigned char* to = turned + (8 * dims + (lane >> 2)) * TURNED_ROW + (4 * part + (lane & 3)) * 16;
    uint4 eight = make_uint4(r[0], r[1], r[2], r[3]);
    *reinterpret_cast<uint4*>(to) = eight;
    *reinterpret_cast<uint4*>(to + MAP * TURNED_ROW) = eight;
}

// The chunk's values [32 of a side, 16 tokens] as A fragments, twice; tokens in the order in which turned keys have them.
__device__ __forceinline__ void load_values(unsigned (&a)[2][2][4], const unsigned char* v_tile, int part, int side, int lane) {
#pragma unroll
    for (int step = 0; step < 2; step++) {
        int token = 32 * part + 8 * ((lane & 7) >> 1) + 4 * step + 2 * (lane >> 4) + (lane & 1);
        unsigned place = tile_place(token, 4 * side + (lane >> 3 & 1));
#pragma unroll
        for (int m = 0; m < 2; m++) load_matrices_transposed(a[m][step], v_tile + (place ^ (m << 5)));
    }
}

// sum += valuesᵀ · features of a chunk.
__device__ __forceinline__ void fold(Sum& sum, const unsigned char* v_tile, const unsigned char* turned, int warp, int lane) {
    int half = warp & 1, side = warp >> 1, g = lane >> 2;
#pragma unroll
    for (int part = 0; part < 2; part++) {  // 32 tokens
        unsigned a[2][2][4];
        load_values(a, v_tile, part, side, lane);
        const unsigned char* column = turned + (4 * part + (lane & 3)) * 16;
        uint4 left[2];
        left[0] = *reinterpret_cast<const uint4*>(column + g * TURNED_ROW);
        left[1] = *reinterpret_cast<const uint4*>(column + (8 + g) * TURNED_ROW);
        column += (g + 5 * half) * TURNED_ROW;
#pragma unroll
        for (int n = 0; n < 10; n++) {
            int high = n & 1;
            uint4 x = left[high], y = *reinterpret_cast<const uint4*>(column + (8 * high + n / 2) * TURNED_ROW);
            uint4 f = make_uint4(multiply_bf16(x.x, y.x), multiply_bf16(x.y, y.y), multiply_bf16(x.z, y.z),
                                 multiply_bf16(x.w, y.w));
            if (n >= 8 && half) f = x;  // step 9: x itself
            if (n == 7 && half) f.x = f.y = f.z = f.w = g == 0 ? ONES : 0;  // the upper half of step 8
#pragma unroll
            for (int m = 0; m < 2; m++) multiply_add(sum[m][n], a[m][0], f.x, f.y);
#pragma unroll
            for (int m = 0; m < 2; m++) multiply_add(sum[m][n], a[m][1], f.z, f.w);
        }
    }
}

// gram += Σ x xᵀ and Σ x over a chunk; one warp.
__device__ __forceinline__ void fold_gram(unsigned char* gram, const unsigned char* far_tile, int lane) {
    float4* fragments = reinterpret_cast<float4*>(gram);
    float* linear = reinterpret_cast<float*>(gram) + MAP * MAP + 2 * (lane & 3);
    float product[2][4], total[2][4];
#pragma unroll
    for (int n = 0; n < 2; n++) {
        float4 old = fragments[32 * n + lane];
        product[n][0] = old.x, product[n][1] = old.y, product[n][2] = old.z, product[n][3] = old.w;
        total[n][0] = total[n][2] = linear[8 * n], total[n][1] = total[n][3] = linear[8 * n + 1];
    }
    __syncwarp();
    const unsigned ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
    for (int step = 0; step < 4; step++) {
        unsigned x[4];  // as A: xᵀ [16 dims, 16 tokens]; as B: x [16 tokens, dims 0 … 7] is x0, x2, the others x1, x3
        int token = 16 * step + (lane & 7) + 8 * (lane >> 4);
        load_matrices_transposed(x, far_tile + token * FAR_ROW + (lane >> 3 & 1) * 16);
        multiply_add(product[0], x, x[0], x[2]);
        multiply_add(product[1], x, x[1], x[3]);
        multiply_add(total[0], ones, x[0], x[2]);
        multiply_add(total[1], ones, x[1], x[3]);
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
        fragments[32 * n + lane] = make_float4(product[n][0], product[n][1], product[n][2], product[n][3]);
        if (lane < 4) linear[8 * n] = total[n][0], linear[8 * n + 1] = total[n][1];
    }
}

// S as B fragments: word [step][pair of value tiles][lane][upper half of features, value tile].
__device__ __forceinline__ void write_sum(unsigned char* shared, const Sum& sum, int warp, int lane) {
    int half = warp & 1, side = warp >> 1;
#pragma unroll
    for (int s = 0; s < 5; s++) {
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const float(&low)[4] = sum[m][2 * s], (&high)[4] = sum[m][2 * s + 1];
            unsigned place = SUM_AT + (((5 * half + s) * 4 + 2 * side + m) * 32 + lane) * 16;
            *reinterpret_cast<uint4*>(shared + place) = make_uint4(
                pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3]), pack_bf16(high[0], high[1]), pack_bf16(high[2], high[3]));
        }
    }
}

// The sum of the segments before this one, from global memory; 128 threads.
__device__ __forceinline__ void start_sum(Sum& sum, unsigned char* gram, const float* sums, int num_sums, int thread) {
    float* words = &sum[0][0][0];
#pragma unroll
    for (int i = 0; i < SUM_FLOATS / 128; i++) words[i] = 0;
    float start[3] = {0, 0, 0};
    for (int s = 0; s < num_sums; s++, sums += SUM_FLOATS + GRAM_FLOATS) {
#pragma unroll
        for (int i = 0; i < SUM_FLOATS / 128; i++) words[i] += sums[i * 128 + thread];
#pragma unroll
        for (int i = 0; i < 3; i++)
            if (i * 128 + thread < GRAM_FLOATS) start[i] += sums[SUM_FLOATS + i * 128 + thread];
    }
#pragma unroll
    for (int i = 0; i < 3; i++)
        if (i * 128 + thread < GRAM_FLOATS) reinterpret_cast<float*>(gram)[i * 128 + thread] = start[i];
}

// Row of State.total for the product of entries i and j.
__device__ __forceinline__ int pair_row(int i, int j) {
    int low = min(i, j), high = max(i, j);
    return 1 + MAP + low * MAP - low * (low - 1) / 2 + high - low;
}

// Puts S and the normaliser into `staged` [153, 65], in the order and with the weights of Taylor.expand.
__device__ void stage_total(float* staged, const Sum& sum, const float* gram, int num_keys, int warp, int lane) {
    const float root_half = 0.70710678118654752f;
    int half = warp & 1, side = warp >> 1, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < 10; n++) {
        int step = 5 * half + n / 2;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int i = 8 * (n & 1) + 2 * t + e;
            int row = step == 9 ? 1 + i : step == 8 && i >= 8 ? (i == 8 ? 0 : -1) : pair_row(i, (i + step) % MAP);
            if (row < 0) continue;
            float weight = step == 0 ? root_half : 1;
#pragma unroll
            for (int m = 0; m < 2; m++) {
                float* at = staged + row * (DIM + 1) + 32 * side + 16 * m + g;
                at[0] = sum[m][n][e] * weight;
                at[8] = sum[m][n][2 + e] * weight;
            }
        }
    }
    for (int word = 32 * warp + lane; word < MAP * MAP; word += 128) {
        int of = word / 4 % 32, i = of / 4 + (word & 2) * 4, j = 2 * (of % 4) + (word & 1) + word / 128 * 8;
        if (i <= j) staged[pair_row(i, j) * (DIM + 1) + DIM] = gram[word] * (i == j ? root_half : 1);
    }
    if (warp == 0 && lane < MAP) staged[(1 + lane) * (DIM + 1) + DIM] = gram[MAP * MAP + lane];
    if (warp == 1 && lane == 0) staged[DIM] = float(num_keys);
}

// Zeros for rows of a chunk's values and mapped keys that are not to be folded.
__device__ __forceinline__ void clear_from(unsigned char* v_tile, unsigned char* far_tile, int first_row, int thread) {
    for (int n = thread; n < CHUNK * 8; n += 128)
        if (n / 8 >= first_row) *reinterpret_cast<uint4*>(v_tile + n / 8 * 128 + n % 8 * 16) = make_uint4(0, 0, 0, 0);
    for (int n = thread; n < CHUNK * 2; n += 128)
        if (n / 2 >= first_row)
            *reinterpret_cast<uint4*>(far_tile + n / 2 * FAR_ROW + n % 2 * 16) = make_uint4(0, 0, 0, 0);
}

// After the last chunk: folds what has left the window of the next token, and writes State.total [153, 65].
constexpr int FINAL_MEETINGS = 6;
__device__ void write_total(float* total, Sum& sum, unsigned char* shared, int last, int end, int sinks, int warp, int lane) {
    int thread = 32 * warp + lane;
    unsigned char *v[2], *k_far[2], *gram = shared + GRAM_AT;
    meet();
    for (int i = 0; i < 2; i++) {  // chunks last - 1 and last
        v[i] = shared + V_AT + ring_place(last - 1 + i) * TILE;
        k_far[i] = shared + K_FAR_AT + ring_place(last - 1 + i) * FAR_TILE;
        clear_from(v[i], k_far[i], end - (last - 1 + i) * CHUNK, thread);
    }
    meet();
    if (last > 0) {
        fold(sum, v[0], shared + TURNED_AT, warp, lane);
        if (warp == 0) fold_gram(gram, k_far[0], lane);
    }
    meet();
    if (end > last * CHUNK) turn_keys(shared + TURNED_AT, k_far[1], warp, lane);
    meet();
    if (end > last * CHUNK) {
        fold(sum, v[1], shared + TURNED_AT, warp, lane);
        if (warp == 0) fold_gram(gram, k_far[1], lane);
    }
    meet();
    float* staged = reinterpret_cast<float*>(shared);
    stage_total(staged, sum, reinterpret_cast<float*>(gram), max(end - sinks, 0), warp, lane);
    meet();
    for (int i = thread; i < NUM_FEATURES * (DIM + 1); i += 128) total[i] = staged[i];
}

// The role of four warps: loads ahead, keeps the sum, writes it for the others.
__device__ __forceinline__ void keep_sum(unsigned char* shared, Rows k, Rows v, Rows k_far, const float* sums, int num_sums,
                                         float* total, int first, int last, int length, int sinks, int warp, int lane) {
    int thread = 32 * warp + lane;
    auto load = [&](int chunk) {
        int at = ring_place(chunk), token = chunk * CHUNK;
        copy_tile(shared + K_AT + at * TILE, k, token, CHUNK, 0, length, thread, 128);
        copy_tile(shared + V_AT + at * TILE, v, token, CHUNK, sinks, length, thread, 128);
        copy_far_tile(shared + K_FAR_AT + at * FAR_TILE, k_far, token, sinks, length, thread, 128);
    };
    load(first - 1);
    load(first);
    if (SINKS) {
        copy_tile(shared + SINK_K_AT, k, 0, 16, 0, min(sinks, length), thread, 128);
        copy_tile(shared + SINK_V_AT, v, 0, 16, 0, min(sinks, length), thread, 128);
    }
    Sum sum;
    start_sum(sum, shared + GRAM_AT, sums, num_sums, thread);
    write_sum(shared, sum, warp, lane);
    wait_for_copies();
    meet();
    turn_keys(shared + TURNED_AT, shared + K_FAR_AT + ring_place(first - 1) * FAR_TILE, warp, lane);
    for (int c = first; c <= last; c++) {
        wait_for_copies();
        meet();  // A
        bool more = c < last;
        if (more) {
            load(c + 1);
            fold(sum, shared + V_AT + ring_place(c - 1) * TILE, shared + TURNED_AT, warp, lane);
        }
        meet();  // B
        if (more) {
            write_sum(shared, sum, warp, lane);
            if (warp == 0) fold_gram(shared + GRAM_AT, shared + K_FAR_AT + ring_place(c - 1) * FAR_TILE, lane);
            turn_keys(shared + TURNED_AT, shared + K_FAR_AT + ring_place(c) * FAR_TILE, warp, lane);
        }
    }
    if (total) write_total(total, sum, shared, last, length - CHUNK + 1, sinks, warp, lane);
}

// ---- the warps that attend ------------------------------------------------------------------------------------------

// acc [16 rows, 64] = features(q_far) · S, and this lane's part of q·Σx + ½ q·(Σ x xᵀ) q for rows g and g + 8.
__device__ __forceinline__ void read_sum(float (&acc)[8][4], float (&norm)[2], const unsigned char* shared, int row, int lane) {
    int g = lane >> 2, t = lane & 3;
    unsigned x[2][8];  // rows g and g + 8 as pairs of entries, from pair t on, turning around
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const unsigned char* at = shared + Q_FAR_AT + (row + g + 8 * r) * Q_FAR_ROW + t * 4;
#pragma unroll
        for (int m = 0; m < 8; m++) x[r][m] = *reinterpret_cast<const unsigned*>(at + 4 * m);
    }
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        unsigned a[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {  // fragment a[i]: row i % 2, entries from 2t + 8 (i / 2) on, times those s further
            const unsigned(&w)[8] = x[i % 2];
            int m = i / 2 * 4, n = (m + s / 2) % 8;
            unsigned right = s % 2 ? join_halves(w[n], w[(n + 1) % 8]) : w[n];
            a[i] = s == 9 ? w[m] : multiply_bf16(w[m], right);
            if (s == 0) a[i] = multiply_bf16(a[i], 0x3f003f00u);  // half
            if (s == 8 && i >= 2) a[i] = t == 0 ? 0x3f80u : 0;
        }
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
            uint4 b = *reinterpret_cast<const uint4*>(shared + SUM_AT + ((s * 4 + pair) * 32 + lane) * 16);
            multiply_add(acc[2 * pair], a, b.x, b.z);
            multiply_add(acc[2 * pair + 1], a, b.y, b.w);
        }
    }
    const unsigned a[4] = {x[0][0], x[1][0], x[0][4], x[1][4]};
    const float4* gram = reinterpret_cast<const float4*>(shared + GRAM_AT);
    const float* linear = reinterpret_cast<const float*>(shared + GRAM_AT) + MAP * MAP + 2 * t;
    float4 part[2] = {gram[lane], gram[32 + lane]};
#pragma unroll
    for (int n = 0; n < 2; n++) {  // y = 2 Σx + (Σ x xᵀ) q, entries 8n … ; in two parts of bfloat16, to be all but exact
        float y[4] = {2 * linear[8 * n], 2 * linear[8 * n + 1], 2 * linear[8 * n], 2 * linear[8 * n + 1]};
        float2 b0 = n ? make_float2(part[0].z, part[0].w) : make_float2(part[0].x, part[0].y);
        float2 b1 = n ? make_float2(part[1].z, part[1].w) : make_float2(part[1].x, part[1].y);
        unsigned high0 = pack_bf16(b0.x, b0.y), high1 = pack_bf16(b1.x, b1.y);
        multiply_add(y, a, high0, high1);
        multiply_add(y, a, pack_bf16(b0.x - low_float(high0), b0.y - high_float(high0)),
                     pack_bf16(b1.x - low_float(high1), b1.y - high_float(high1)));
#pragma unroll
        for (int r = 0; r < 2; r++)
            norm[r] += 0.5f * (low_float(x[r][4 * n]) * y[2 * r] + high_float(x[r][4 * n]) * y[2 * r + 1]);
    }
}

// Scores of 16 rows and 16 keys as a C fragment: [0 … 3] keys 0 … 7, [4 … 7] keys 8 … 15.
typedef float Scores[8];

__device__ __forceinline__ int score_row(int i) { return i >> 1 & 1; }  // 0: row g, 1: row g + 8
__device__ __forceinline__ int score_key(int i, int t) { return (i >> 2) * 8 + 2 * t + (i & 1); }

// c[0 … 3] += a · b[0, 1], c[4 … 7] += a · b[2, 3].
__device__ __forceinline__ void multiply_add_pair(Scores& c, const unsigned (&a)[4], const unsigned (&b)[4]) {
    multiply_add(*reinterpret_cast<float(*)[4]>(&c[0]), a, b[0], b[1]);
    multiply_add(*reinterpret_cast<float(*)[4]>(&c[4]), a, b[2], b[3]);
}

// q kᵀ with tiles `block` … `block` + 4 of chunks c - 1 and c (of 16 keys), and with the sinks.
__device__ __forceinline__ void exact_scores(Scores (&scores)[5], Scores& sink, const unsigned char* shared, int c, int block,
                                             int lane) {
    unsigned q_place = Q_AT + tile_place(16 * block + (lane & 15), lane >> 4), k_place[5];
    int key = (lane & 7) + (lane >> 4) * 8, piece = lane >> 3 & 1;
#pragma unroll
    for (int n = 0; n < 5; n++) {
        int tile = block + n;
        k_place[n] = K_AT + ring_place(c - 1 + tile / 4) * TILE + tile_place(16 * (tile & 3) + key, piece);
    }
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        unsigned a[4], b[4];
        load_matrices(a, shared + (q_place ^ (step << 5)));
#pragma unroll
        for (int n = 0; n < 5; n++) {
            load_matrices(b, shared + (k_place[n] ^ (step << 5)));
            multiply_add_pair(scores[n], a, b);
        }
        if (SINKS) {
            load_matrices(b, shared + ((SINK_K_AT + tile_place(key, piece)) ^ (step << 5)));
            if (SINKS > 8) multiply_add_pair(sink, a, b);
            else multiply_add(*reinterpret_cast<float(*)[4]>(&sink[0]), a, b[0], b[1]);
        }
    }
}

// -inf where a pair is not exact: tile 0 crosses the window's edge, tile 4 the present; near the start there are sinks.
__device__ __forceinline__ void mask_scores(Scores (&scores)[5], Scores& sink, int c, int block, int sinks, int lane) {
    int g = lane >> 2, t = lane & 3;
    const float never = -INFINITE;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int row = g + 8 * score_row(i), key = score_key(i, t);
        if (key <= row) scores[0][i] = never;
        if (key > row) scores[4][i] = never;
        if (key >= sinks || key > c * CHUNK + 16 * block + row) sink[i] = never;
    }
    if (c < 2) {
#pragma unroll
        for (int n = 0; n < 5; n++)
#pragma unroll
            for (int i = 0; i < 8; i++)
                if ((c - 1) * CHUNK + 16 * (block + n) + score_key(i, t) < sinks) scores[n][i] = never;
    }
}

// The largest of the exponents of each row: exact scores (times scale) and the far term's gate.
__device__ __forceinline__ void find_shift(float (&shift)[2], const Scores (&scores)[5], const Scores& sink,
                                           const float (&gate)[2], float scale) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float largest = -INFINITE;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (score_row(i) != r) continue;
#pragma unroll
            for (int n = 0; n < 5; n++) largest = fmaxf(largest, scores[n][i]);
            if (SINKS > 8 || (SINKS && i < 4)) largest = fmaxf(largest, sink[i]);
        }
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
        shift[r] = fmaxf(largest * scale, gate[r]);
    }
}

// Scores become weights; adds them to total.
__device__ __forceinline__ void exponentiate(Scores& scores, float (&total)[2], const float (&shift)[2], float scale, int count) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i >= count) continue;
        scores[i] = exp2_fast(scores[i] * scale - shift[score_row(i)]);
        total[score_row(i)] += scores[i];
    }
}

// Weights of 16 mapped keys of chunk c - 1: T(q_far · k_far) times the gate's weight. edge: only keys up to the row's place.
__device__ __forceinline__ void far_weights(Scores& weights, float (&total)[2], const unsigned (&q_far)[4],
                                            const unsigned char* shared, const float (&far_weight)[2], int c, int tile,
                                            bool edge, int sinks, int lane) {
    int g = lane >> 2, t = lane & 3, key = (lane & 7) + (lane >> 4) * 8;
    unsigned b[4];
    load_matrices(b, shared + K_FAR_AT + ring_place(c - 1) * FAR_TILE + (16 * tile + key) * FAR_ROW + (lane >> 3 & 1) * 16);
#pragma unroll
    for (int i = 0; i < 8; i++) weights[i] = 0;
    multiply_add_pair(weights, q_far, b);
    int first = sinks - (c - 1) * CHUNK - 16 * tile;  // keys before it are sinks, or nothing
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int r = score_row(i);
        float x = weights[i], weight = far_weight[r] * (1 + x * (1 + 0.5f * x));
        bool seen = score_key(i, t) >= first && (!edge || score_key(i, t) <= g + 8 * r);
        weights[i] = seen ? weight : 0;
        total[r] += weights[i];
    }
}

__device__ __forceinline__ void pack_weights(unsigned (&a)[4], const Scores& weights) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = pack_bf16(weights[2 * i], weights[2 * i + 1]);
}

// acc += weights [16 rows, 16 keys] · values of a tile of 16 keys, from row `row` of v_tile.
__device__ __forceinline__ void add_values(float (&acc)[8][4], const unsigned (&a)[4], const unsigned char* shared,
                                           unsigned v_tile, int row, int lane) {
    unsigned place = v_tile + tile_place(row + (lane & 15), lane >> 4);
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
        unsigned b[4];
        load_matrices_transposed(b, shared + (place ^ (pair << 5)));
        multiply_add(acc[2 * pair], a, b[0], b[1]);
        multiply_add(acc[2 * pair + 1], a, b[2], b[3]);
    }
}

// Rows of out, through shared memory, so that a row is one run of 128 bytes.
__device__ __forceinline__ void store_rows(bf16* out, int stride, unsigned char* shared, const float (&acc)[8][4],
                                           const float (&total)[2], int block, int token, int length, int lane) {
    int g = lane >> 2, t = lane & 3;
    unsigned char* staged = shared + OUT_AT + block * 2048;
    float inverse[2] = {1 / total[0], 1 / total[1]};
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int r = 0; r < 2; r++)
            *reinterpret_cast<unsigned*>(staged + tile_place(g + 8 * r, n) + 4 * t) =
                pack_bf16(acc[n][2 * r] * inverse[r], acc[n][2 * r + 1] * inverse[r]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = 4 * i + lane / 8, piece = lane % 8;
        if (token + row < length)
            *reinterpret_cast<uint4*>(out + (long long)(token + row) * stride + piece * 8) =
                *reinterpret_cast<const uint4*>(staged + tile_place(row, piece));
    }
}

// All weights of 16 rows but those through S: scales acc by the gate's weight, then adds the rest; total likewise.
__device__ __forceinline__ void attend_pairs(float (&acc)[8][4], float (&total)[2], Scores (&scores)[5], Scores& sink,
                                             const unsigned (&q_far)[4], const float (&gate)[2], const unsigned char* shared,
                                             int c, int block, int sinks, float scale, int lane) {
    float shift[2], far_weight[2];
    find_shift(shift, scores, sink, gate, scale);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        far_weight[r] = exp2_fast(gate[r] - shift[r]);
        total[r] *= far_weight[r];
#pragma unroll
        for (int n = 0; n < 8; n++) acc[n][2 * r] *= far_weight[r], acc[n][2 * r + 1] *= far_weight[r];
    }
    unsigned a[5][4], before = V_AT + ring_place(c - 1) * TILE, now = V_AT + ring_place(c) * TILE;
#pragma unroll
    for (int n = 0; n < 5; n++) {
        exponentiate(scores[n], total, shift, scale, 8);
        if (n == 0) {  // its other pairs are far
            Scores far;
            far_weights(far, total, q_far, shared, far_weight, c, block, true, sinks, lane);
#pragma unroll
            for (int i = 0; i < 8; i++) scores[0][i] += far[i];
        }
        pack_weights(a[n], scores[n]);
    }
    if (SINKS) {
        unsigned weights[4];
        exponentiate(sink, total, shift, scale, SINKS > 8 ? 8 : 4);
        pack_weights(weights, sink);
        if (SINKS == 8) weights[2] = weights[3] = 0;
        add_values(acc, weights, shared, SINK_V_AT, 0, lane);
    }
#pragma unroll
    for (int n = 0; n < 5; n++) {
        int tile = block + n;
        add_values(acc, a[n], shared, tile < 4 ? before : now, 16 * (tile & 3), lane);
    }
    for (int tile = 0; tile < block && c > 0; tile++) {
        Scores far;
        unsigned weights[4];
        far_weights(far, total, q_far, shared, far_weight, c, tile, false, sinks, lane);
        pack_weights(weights, far);
        add_values(acc, weights, shared, before, 16 * tile, lane);
    }
}

// The role of four warps: 16 rows of every chunk. block: which 16.
__device__ __forceinline__ void attend(unsigned char* shared, Rows q, Rows q_far, const float* gate, int gate_stride, bf16* out,
                                       int out_stride, int first, int last, int length, int sinks, float scale, int block,
                                       int lane) {
    int row = 16 * block, g = lane >> 2, t = lane & 3;
    copy_queries(shared, q, row, first * CHUNK + row, length, lane);
    copy_far_queries(shared, q_far, row, first * CHUNK + row, length, lane);
    wait_for_copies();
    meet();
    for (int c = first; c <= last; c++) {
        int token = c * CHUNK + row, next = token + CHUNK;
        float acc[8][4] = {}, total[2] = {}, far_gate[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int query = token + g + 8 * r;
            bool sees_far = query < length && query - CHUNK >= sinks;
            far_gate[r] = sees_far ? gate[(long long)query * gate_stride] * 1.4426950408889634f : -INFINITE;
        }
        wait_for_copies();
        meet();  // A
        unsigned x[4];
        load_matrices(x, shared + Q_FAR_AT + (row + (lane & 15)) * Q_FAR_ROW + (lane >> 4) * 16);
        if (c > 1) {
            read_sum(acc, total, shared, row, lane);
            if (t == 0) total[0] += (c - 1) * CHUNK - sinks, total[1] += (c - 1) * CHUNK - sinks;
        }
        __syncwarp();
        if (c < last) copy_far_queries(shared, q_far, row, next, length, lane);
        meet();  // B
        Scores scores[5] = {}, sink = {};
        exact_scores(scores, sink, shared, c, block, lane);
        __syncwarp();
        if (c < last) copy_queries(shared, q, row, next, length, lane);
        mask_scores(scores, sink, c, block, sinks, lane);
        attend_pairs(acc, total, scores, sink, x, far_gate, shared, c, block, sinks, scale, lane);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            total[r] += __shfl_xor_sync(ALL_LANES, total[r], 1);
            total[r] += __shfl_xor_sync(ALL_LANES, total[r], 2);
        }
        store_rows(out, out_stride, shared, acc, total, block, token, length, lane);
    }
}

// ---- kernels --------------------------------------------------------------------------------------------------------

// Grid (B · H, segments), 256 threads. Strides in elements: of batch, head, token. A segment is `span` chunks of 64.
// total [B, G, 153, 65] float32: State.total after all tokens. sums [B · G, (segments - 1) · parts, 10512] of
// prefill_sums_kernel, each of span / parts chunks.
extern "C" __global__ void __launch_bounds__(256, BLOCKS) prefill_kernel(
    const bf16* q, const bf16* k, const bf16* v, const bf16* q_far, const bf16* k_far, const float* gate, bf16* out,
    float* total, const float* sums, int q_b, int q_h, int q_t, int k_b, int k_h, int k_t, int v_b, int v_h, int v_t,
    int qf_b, int qf_h, int qf_t, int kf_b, int kf_h, int kf_t, int g_b, int g_h, int g_t, int o_b, int o_h, int o_t,
    int length, int heads, int group, int sinks, int span, int parts, float scale) {
    DYNAMIC_SHARED(shared);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, segment = blockIdx.y, segments = gridDim.y;
    long long b = blockIdx.x / heads;
    int h = blockIdx.x % heads, kv = h / group, chunks = (length + CHUNK - 1) / CHUNK;
    int first = segment * span, last = min(first + span, chunks) - 1;
    if (warp < 4) {
        int block = blockIdx.x & 1 ? 3 - warp : warp;  // the last rows have the most work: not always one scheduler's
        attend(shared, {q + b * q_b + (long long)h * q_h, q_t}, {q_far + b * qf_b + (long long)h * qf_h, qf_t},
               gate + b * g_b + (long long)h * g_h, g_t, out + b * o_b + (long long)h * o_h, o_t, first, last, length, sinks,
               scale, block, lane);
        if (segment == segments - 1 && h % group == 0)
            for (int i = 0; i < FINAL_MEETINGS; i++) meet();
    } else {
        long long row = b * (heads / group) + kv;
        bool writes = segment == segments - 1 && h % group == 0;
        keep_sum(shared, {k + b * k_b + (long long)kv * k_h, k_t}, {v + b * v_b + (long long)kv * v_h, v_t},
                 {k_far + b * kf_b + (long long)kv * kf_h, kf_t},
                 sums + row * (segments - 1) * parts * (SUM_FLOATS + GRAM_FLOATS), segment * parts,
                 writes ? total + row * NUM_FEATURES * (DIM + 1) : nullptr, first, last, length, sinks, warp - 4, lane);
    }
}

// What each `span` chunks add to the sums that segments start with: those one before a segment's, as a segment starts with
// the sum before the chunk before it. Grid (B · G, number of sums), 128 threads.
constexpr unsigned SUMS_V_AT = 0, SUMS_K_FAR_AT = 2 * TILE, SUMS_TURNED_AT = SUMS_K_FAR_AT + 2 * FAR_TILE,
                   SUMS_GRAM_AT = SUMS_TURNED_AT + 2 * MAP * TURNED_ROW;
static_assert(SUMS_GRAM_AT + GRAM_FLOATS * 4 == 29760, "cuda_prefill.py says so");

extern "C" __global__ void __launch_bounds__(128, 4) prefill_sums_kernel(
    const bf16* v, const bf16* k_far, float* sums, int v_b, int v_h, int v_t, int kf_b, int kf_h, int kf_t, int length,
    int groups, int sinks, int span) {
    DYNAMIC_SHARED(shared);
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    long long b = blockIdx.x / groups, kv = blockIdx.x % groups;
    Rows values = {v + b * v_b + kv * v_h, v_t}, keys = {k_far + b * kf_b + kv * kf_h, kf_t};
    unsigned char* gram = shared + SUMS_GRAM_AT;
    auto load = [&](int chunk) {
        int at = (chunk + 1) & 1, token = chunk * CHUNK;
        copy_tile(shared + SUMS_V_AT + at * TILE, values, token, CHUNK, sinks, length, thread, 128);
        copy_far_tile(shared + SUMS_K_FAR_AT + at * FAR_TILE, keys, token, sinks, length, thread, 128);
    };
    int first = int(blockIdx.y) * span - 1, end = first + span;
    load(first);
    Sum sum;
    start_sum(sum, gram, sums, 0, thread);
    for (int c = first; c < end; c++) {
        int at = (c + 1) & 1;
        wait_for_copies();
        meet();
        if (c + 1 < end) load(c + 1);
        turn_keys(shared + SUMS_TURNED_AT, shared + SUMS_K_FAR_AT + at * FAR_TILE, warp, lane);
        meet();
        fold(sum, shared + SUMS_V_AT + at * TILE, shared + SUMS_TURNED_AT, warp, lane);
        if (warp == 0) fold_gram(gram, shared + SUMS_K_FAR_AT + at * FAR_TILE, lane);
    }
    meet();
    float* to = sums + ((long long)blockIdx.x * gridDim.y + blockIdx.y) * (SUM_FLOATS + GRAM_FLOATS);
    const float* words = &sum[0][0][0];
#pragma unroll
    for (int i = 0; i < SUM_FLOATS / 128; i++) to[i * 128 + thread] = words[i];
    for (int i = thread; i < GRAM_FLOATS; i += 128) to[SUM_FLOATS + i] = reinterpret_cast<float*>(gram)[i];
}
