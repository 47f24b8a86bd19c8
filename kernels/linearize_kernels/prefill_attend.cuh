// The warps of prefill.cu that attend: 16 rows of a chunk and 64 columns of values each.
#pragma once
#include "weights.cuh"

// Step s of the features of two rows x, as pairs of entries from pair t on, as a fragment of products: a[i] is row
// i % 2, entries from 2t + 8 (i / 2) on, times those s further.
__device__ __forceinline__ void make_features(unsigned (&a)[4], const unsigned (&x)[2][8], int s, int t) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned(&w)[8] = x[i % 2];
        int m = i / 2 * 4, n = (m + s / 2) % 8;
        unsigned right = s % 2 ? join_halves(w[n], w[(n + 1) % 8]) : w[n];
        a[i] = s == 9 ? w[m] : multiply_bf16(w[m], right);
        if (s == 0) a[i] = multiply_bf16(a[i], 0x3f003f00u);  // half
        if (s == 8 && i >= 2) a[i] = t == 0 ? 0x3f80u : 0;
    }
}

// acc [16 rows, 64 values] = features(q_far) · S, and this lane's part of q·Σx + ½ q·(Σ x xᵀ) q for rows g and g + 8.
// q_far: the first row. half_sum: place of S for these values.
__device__ __forceinline__ void read_sum(float (&acc)[8][4], float (&norm)[2], const unsigned char* shared,
                                         const unsigned char* q_far, unsigned half_sum, int lane) {
    int g = lane >> 2, t = lane & 3;
    unsigned x[2][8];  // rows g and g + 8 as pairs of entries, from pair t on, turning around
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const unsigned char* at = q_far + (g + 8 * r) * Q_FAR_ROW + t * 4;
#pragma unroll
        for (int m = 0; m < 8; m++) x[r][m] = *reinterpret_cast<const unsigned*>(at + 4 * m);
    }
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        unsigned a[4];
        make_features(a, x, s, t);
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
            uint4 b = *reinterpret_cast<const uint4*>(shared + half_sum + ((s * 4 + pair) * 32 + lane) * 16);
            multiply_add(acc[2 * pair], a, b.x, b.y);
            multiply_add(acc[2 * pair + 1], a, b.z, b.w);
        }
    }
    const unsigned a[4] = {x[0][0], x[1][0], x[0][4], x[1][4]};
    const float4* gram = reinterpret_cast<const float4*>(shared + GRAM_AT);
    const float* linear = reinterpret_cast<const float*>(shared + GRAM_AT) + MAP * MAP + 2 * t;
    float4 part[2] = {gram[lane], gram[32 + lane]};
#pragma unroll
    // y = 2 Σx + (Σ x xᵀ) q, entries 8n … ; in two parts of bfloat16, to be all but exact
    for (int n = 0; n < 2; n++) {
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

// Where tiles block … block + 4 (of 16 keys) of chunks c - 1 and c lie in a ring of 12 tiles, in bytes. before: place
// of chunk c - 1 in a ring of three chunks.
typedef unsigned Tiles[5];

__device__ __forceinline__ void find_tiles(Tiles& tiles, int before, int block) {
#pragma unroll
    for (int n = 0; n < 5; n++) {
        int tile = 4 * before + block + n;
        tiles[n] = (tile < 12 ? tile : tile - 12) * 2048;
    }
}

// q kᵀ with five tiles of keys and with the sinks.
__device__ __forceinline__ void exact_scores(Scores (&scores)[5], Scores& sink, const unsigned char* shared,
                                             const unsigned char* q_tile, const Tiles& tiles, int block, int lane) {
    int key = (lane & 7) + (lane >> 4) * 8, piece = lane >> 3 & 1;
    unsigned q_place = tile_place(16 * block + (lane & 15), lane >> 4);
    unsigned k_place = tile_place(key, piece), k_turn = block % 2 * 64;  // every other tile is turned by four pieces
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; step++) {
        unsigned a[4], b[4], half = step / 4, turn = step % 4 << 5;
        load_matrices(a, q_tile + half * TILE + (q_place ^ turn));
#pragma unroll
        for (int n = 0; n < 5; n++) {
            load_matrices(b, shared + K_AT + half * RING + tiles[n] + (k_place ^ k_turn ^ (n % 2 * 64) ^ turn));
            multiply_add_pair(scores[n], a, b);
        }
        if (SINKS) {
            load_matrices(b, shared + SINK_K_AT + half * SINK_TILE + (k_place ^ turn));
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

// Weights of 16 mapped keys: T(q_far · k_far) times the gate's weight. Keys before number `first` are sinks, or
// nothing; edge: only keys up to the row's place count.
__device__ __forceinline__ void far_weights(Scores& weights, float (&total)[2], const unsigned (&q_far)[4],
                                            const unsigned char* far_tile, const float (&far_weight)[2], int first,
                                            bool edge, int lane) {
    int g = lane >> 2, t = lane & 3, key = (lane & 7) + (lane >> 4) * 8;
    unsigned b[4];
    load_matrices(b, far_tile + key * FAR_ROW + (lane >> 3 & 1) * 16);
#pragma unroll
    for (int i = 0; i < 8; i++) weights[i] = 0;
    multiply_add_pair(weights, q_far, b);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int r = score_row(i);
        float x = weights[i];
        weights[i] = far_weight[r] * (1 + x * (1 + 0.5f * x));
        if (edge && score_key(i, t) > g + 8 * r) weights[i] = 0;
    }
    if (first > 0) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (score_key(i, t) < first) weights[i] = 0;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) total[score_row(i)] += weights[i];
}

// Rows of out and rest, through shared memory, so that a row is one run of 128 bytes.
__device__ __forceinline__ void store_rows(const Results& to, int column, unsigned char* staged,
                                           const float (&acc)[8][4], const float (&total)[2], int token, int length,
                                           int lane) {
    int g = lane >> 2, t = lane & 3;
    float inverse[2] = {reciprocal(total[0]), reciprocal(total[1])};
#pragma unroll
    for (int lost = 0; lost <= TRAINING; lost++) {
        if (lost) __syncwarp();
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float low = acc[n][2 * r] * inverse[r], high = acc[n][2 * r + 1] * inverse[r];
                unsigned pair = pack_bf16(low, high);
                if (lost) pair = pack_bf16(low - low_float(pair), high - high_float(pair));
                *reinterpret_cast<unsigned*>(staged + (tile_place(g + 8 * r, 0) ^ (n << 4)) + 4 * t) = pair;
            }
        __syncwarp();
        bf16* rows = (lost ? to.rest : to.out) + column;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = 4 * i + lane / 8, piece = lane % 8;
            if (token + row < length)
                *reinterpret_cast<uint4*>(rows + (long long)(token + row) * to.stride + piece * 8) =
                    *reinterpret_cast<const uint4*>(staged + tile_place(row, piece));
        }
    }
}

// All weights of 16 rows but those through S: scales acc by the gate's weight, then adds the rest; total likewise.
// All are times 2^-shift. far_tile: mapped keys of chunk c - 1.
__device__ __forceinline__ void attend_pairs(float (&acc)[8][4], float (&total)[2], float (&shift)[2],
                                             Scores (&scores)[5], Scores& sink, const unsigned (&q_far)[4],
                                             const float (&gate)[2], const unsigned char* shared,
                                             const unsigned char* far_tile, const Tiles& tiles, int before,
                                             int first_key, int block, int half, float scale, int lane) {
    float far_weight[2];
    find_shift(shift, scores, sink, gate, scale);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        far_weight[r] = exp2_fast(gate[r] - shift[r]);
        total[r] *= far_weight[r];
#pragma unroll
        for (int n = 0; n < 8; n++) acc[n][2 * r] *= far_weight[r], acc[n][2 * r + 1] *= far_weight[r];
    }
    const unsigned char* values = shared + V_AT + half * RING;
    unsigned turn = block % 2 * 64, weights[4];
#pragma unroll
    for (int n = 0; n < 5; n++) {
        exponentiate(scores[n], total, shift, scale, 8);
        if (n == 0) {  // its other pairs are far
            Scores far;
            far_weights(far, total, q_far, far_tile + 16 * block * FAR_ROW, far_weight, first_key - 16 * block, true,
                        lane);
#pragma unroll
            for (int i = 0; i < 8; i++) scores[0][i] += far[i];
        }
        pack_weights(weights, scores[n]);
        add_values(acc, weights, values + tiles[n], turn ^ (n % 2 * 64), lane);
    }
    if (SINKS) {
        exponentiate(sink, total, shift, scale, SINKS > 8 ? 8 : 4);
        pack_weights(weights, sink);
        if (SINKS == 8) weights[2] = weights[3] = 0;
        add_values(acc, weights, shared + SINK_V_AT + half * SINK_TILE, 0, lane);
    }
    if (first_key >= CHUNK) return;  // before the first chunk there is nothing
#pragma unroll 1
    for (int tile = 0; tile < block; tile++) {
        Scores far;
        far_weights(far, total, q_far, far_tile + 16 * tile * FAR_ROW, far_weight, first_key - 16 * tile, false, lane);
        pack_weights(weights, far);
        add_values(acc, weights, values + before * TILE + tile * 2048, tile % 2 * 64, lane);
    }
}

// The role of half the warps: rows 16 block … of every chunk, columns 64 half … of the values.
__device__ __forceinline__ void attend(unsigned char* shared, Rows q, Rows q_far, const float* gate, int gate_stride,
                                       const Results& results, int first, int last, int length, int sinks,
                                       float scale, int block, int half, int lane) {
    int row = 16 * block, g = lane >> 2, t = lane & 3;
    unsigned char* far_rows = shared + Q_FAR_AT + (CHUNK * half + row) * Q_FAR_ROW;
    unsigned char* staged = shared + OUT_AT + half * TILE + row * 128;
    auto q_tile = [&](int c) { return shared + Q_AT + (HALVES > 1 ? c % 2 * HALVES : 0) * TILE; };
    auto load_queries = [&](int c) {
        Rows columns = {q.at + 64 * half, q.stride};
        copy_queries(q_tile(c) + half * TILE, columns, row, c * CHUNK + row, length, lane);
    };
    load_queries(first);
    copy_far_queries(far_rows, q_far, 0, first * CHUNK + row, length, lane);
    wait_for_copies();
    meet();
    int before = 0;  // place of chunk c - 1 in the rings
#pragma unroll 1
    for (int c = first; c <= last; c++) {
        int token = c * CHUNK + row;
        float acc[8][4] = {}, total[2] = {}, shift[2], far_gate[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int query = token + g + 8 * r;
            bool sees_far = query < length && query - CHUNK >= sinks;
            far_gate[r] = sees_far ? gate[(long long)query * gate_stride] * 1.4426950408889634f : -INFINITE;
        }
        wait_for_copies();
        meet();  // A
        if (HALVES > 1 && c < last) load_queries(c + 1);
        unsigned x[4];
        load_matrices(x, far_rows + (lane & 15) * Q_FAR_ROW + (lane >> 4) * 16);
        if (c > 1) {
            read_sum(acc, total, shared, far_rows, SUM_AT + half * HALF_SUM, lane);
            if (t == 0) total[0] += (c - 1) * CHUNK - sinks, total[1] += (c - 1) * CHUNK - sinks;
        }
        __syncwarp();
        if (c < last) copy_far_queries(far_rows, q_far, 0, token + CHUNK, length, lane);
        Scores scores[5] = {}, sink = {};
        Tiles tiles;
        find_tiles(tiles, before, block);
        exact_scores(scores, sink, shared, q_tile(c), tiles, block, lane);
        __syncwarp();
        if (HALVES == 1 && c < last) load_queries(c + 1);
        meet();  // B; q kᵀ before it is faster
        mask_scores(scores, sink, c, block, sinks, lane);
        attend_pairs(acc, total, shift, scores, sink, x, far_gate, shared, shared + K_FAR_AT + before * FAR_TILE,
                     tiles, before, sinks - (c - 1) * CHUNK, block, half, scale, lane);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            total[r] += __shfl_xor_sync(ALL_LANES, total[r], 1);
            total[r] += __shfl_xor_sync(ALL_LANES, total[r], 2);
        }
        store_rows(results, 64 * half, staged, acc, total, token, length, lane);
        if (TRAINING && half == 0) store_lse(results.lse, shift, total, token, length, lane);
        before = next_in_ring(before);
    }
}
