// Attention of prefill_windows.cu: a warp has 16 rows of a chunk of queries of one head, and all values.
#pragma once
#include "weights.cuh"

constexpr float LOWEST = -1e30f;  // of scores in a shift: finite, so that no difference is NaN

// Sixteen rows on their way through the keys. Weights are times 2^-shift; total: this lane's part of their sum.
struct Attention {
    float acc[HALVES][8][4], total[2], shift[2], gate[2];
    unsigned q[HEAD_DIM / 16][4], q_far[4];
};

// Rows of the mapped queries as pairs, from this lane's first pair on, turning around.
typedef unsigned FarRows[2][PAIRS];

__device__ __forceinline__ void load_far_rows(FarRows& x, Attention& rows, const unsigned char* q_far, int lane) {
    int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const unsigned* at = reinterpret_cast<const unsigned*>(q_far + (g + 8 * r) * FAR_ROW);
#pragma unroll
        for (int m = 0; m < PAIRS; m++) x[r][m] = at[(t + m) % PAIRS];
        rows.q_far[r] = MAP == 4 && t >= PAIRS ? 0 : x[r][0];
        rows.q_far[2 + r] = MAP == 16 ? x[r][4 % PAIRS] : 0;
    }
}

// Features 16 step … of the rows as a fragment of products. Squares count half.
__device__ __forceinline__ void make_query_features(unsigned (&a)[4], const FarRows& x, int step, int t) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned(&w)[PAIRS] = x[i % 2];
        int high = i / 2, m = MAP == 16 ? 4 * high : 0, pair = (t + m) % PAIRS;
        int row = MAP == 16 ? step : MAP == 8 ? 2 * step + high : 2 * high;
        a[i] = feature_pair(w, row, m, pair);
        if (row == 0 && (MAP > 4 || t < 2)) a[i] = multiply_bf16(a[i], 0x3f003f00u);
        if (MAP == 4 && t >= 2) a[i] = feature_pair(w, row + 1, m, pair);
    }
}

// acc = features(q_far) · S, total = this lane's part of q·Σx + ½ q·(Σ x xᵀ) q.
__device__ __forceinline__ void read_sum(Attention& rows, const FarRows& x, const unsigned char* shared, int lane) {
    int t = lane & 3;
#pragma unroll
    for (int step = 0; step < FEATURES / 16; step++) {
        unsigned a[4];
        make_query_features(a, x, step, t);
#pragma unroll
        for (int tile = 0; tile < VALUE_TILES; tile++) {
            uint4 b = *reinterpret_cast<const uint4*>(shared + SUM_AT + ((step * VALUE_TILES + tile) * 32 + lane) * 16);
            float(&acc)[8][4] = rows.acc[tile / 4];
            multiply_add(acc[2 * (tile % 4)], a, b.x, b.y);
            multiply_add(acc[2 * (tile % 4) + 1], a, b.z, b.w);
        }
    }
    const float mine = t < PAIRS ? 0.5f : 0;  // with two pairs there is nothing for half the lanes
    const float2* gram = reinterpret_cast<const float2*>(shared + GRAM_AT);
#pragma unroll
    for (int m = 0; m < PAIRS; m += 4) {  // this lane's pairs
        int pair = t % PAIRS + m;
        float2 linear = gram[MAP * PAIRS + pair];
        float y[2][2] = {{2 * linear.x, 2 * linear.y}, {2 * linear.x, 2 * linear.y}};
#pragma unroll
        for (int n = 0; n < PAIRS; n++) {
            const float2* column = gram + 2 * pair * PAIRS + (t + n) % PAIRS;
            float2 low = column[0], high = column[PAIRS];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                y[r][0] += low.x * low_float(x[r][n]) + low.y * high_float(x[r][n]);
                y[r][1] += high.x * low_float(x[r][n]) + high.y * high_float(x[r][n]);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++)
            rows.total[r] += mine * (low_float(x[r][m]) * y[r][0] + high_float(x[r][m]) * y[r][1]);
    }
}

// scores += q kᵀ of 16 keys. k_tile: their first row; turn: 64 for an odd sixteenth.
__device__ __forceinline__ void add_scores(Scores& scores, const Attention& rows, int step,
                                           const unsigned char* k_tile, unsigned tile_bytes, unsigned turn, int lane) {
    unsigned place = tile_place((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1), b[4];
    load_matrices(b, k_tile + step / 4 * tile_bytes + (place ^ turn ^ (step % 4 << 5)));
    multiply_add_pair(scores, rows.q[step], b);
}

// Raises the shift to the largest of `count` tiles of scores, and scales what is there.
template <int COUNT>
__device__ __forceinline__ void raise_shift(Attention& rows, const Scores (&scores)[COUNT], float scale) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float largest = LOWEST;
#pragma unroll
        for (int n = 0; n < COUNT; n++)
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (score_row(i) == r) largest = fmaxf(largest, scores[n][i]);
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
        float shift = fmaxf(rows.shift[r], largest * scale), factor = exp2_fast(rows.shift[r] - shift);
        rows.shift[r] = shift;
        rows.total[r] *= factor;
#pragma unroll
        for (int half = 0; half < HALVES; half++)
#pragma unroll
            for (int n = 0; n < 8; n++) rows.acc[half][n][2 * r] *= factor, rows.acc[half][n][2 * r + 1] *= factor;
    }
}

__device__ __forceinline__ void add_weighted(Attention& rows, const Scores& weights, const unsigned char* v_tile,
                                             unsigned tile_bytes, unsigned turn, int lane) {
    unsigned a[4];
    pack_weights(a, weights);
#pragma unroll
    for (int half = 0; half < HALVES; half++) add_values(rows.acc[half], a, v_tile + half * tile_bytes, turn, lane);
}

// Tiles of 16 keys that a warp's rows see, by the distance of the first row to the first key.
__device__ __forceinline__ bool is_future(int distance) { return distance <= -16; }
__device__ __forceinline__ bool has_exact(int distance, int window) { return distance - 15 < window; }
__device__ __forceinline__ bool has_far(int distance, int window) { return distance + 15 >= window; }

// -inf where a pair is not exact: beyond the window, in the future, or a sink (keys before number `first`).
__device__ __forceinline__ void mask_tile(Scores& scores, int distance, int window, int first, int lane) {
    int from = distance + (lane >> 2), t = lane & 3;
    if (distance < 15 || has_far(distance, window)) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (unsigned(from + 8 * score_row(i) - score_key(i, t)) >= unsigned(window)) scores[i] = -INFINITE;
    }
    if (first > 0) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (score_key(i, t) < first) scores[i] = -INFINITE;
    }
}

// Adds T(q_far · k_far) times the gate's weight to the weights of 16 keys that are out of the window.
__device__ __forceinline__ void add_far_weights(Scores& weights, Attention& rows, const float (&far_weight)[2],
                                                const unsigned char* far_tile, int distance, int window, int first,
                                                int lane) {
    int g = lane >> 2, t = lane & 3;
    Scores x = {};
    unsigned b[4] = {};
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const unsigned* at = reinterpret_cast<const unsigned*>(far_tile + (8 * n + g) * FAR_ROW);
        b[2 * n] = MAP == 4 && t >= PAIRS ? 0 : at[t % PAIRS];
        if (MAP == 16) b[2 * n + 1] = at[(t + 4) % PAIRS];
    }
    multiply_add_pair(x, rows.q_far, b);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = far_weight[score_row(i)] * (1 + x[i] * (1 + 0.5f * x[i]));
    if (has_exact(distance, window) || first > 0) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int key = score_key(i, t);
            if (distance + g + 8 * score_row(i) - key < window || key < first) x[i] = 0;
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) weights[i] += x[i], rows.total[score_row(i)] += x[i];
}

// All of a chunk of keys. distance: of the first row to the first key; first: number of the first key that is no sink.
// EDGES: the present, the window's edge or sinks lie in it; else all keys are in the window of all rows.
template <bool EDGES>
__device__ __forceinline__ void visit(Attention& rows, const unsigned char* slot, const unsigned char* far_tile,
                                      int distance, int window, int first, float scale, int lane) {
    Scores scores[4] = {};
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; step++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int from = distance - 16 * n;
            if (!EDGES || (!is_future(from) && has_exact(from, window)))
                add_scores(scores[n], rows, step, slot + n * 2048, TILE, n % 2 * 64, lane);
        }
    if (EDGES)
#pragma unroll
        for (int n = 0; n < 4; n++) mask_tile(scores[n], distance - 16 * n, window, first - 16 * n, lane);
    raise_shift<4>(rows, scores, scale);
    float far_weight[2];
    if (EDGES)
        for (int r = 0; r < 2; r++) far_weight[r] = exp2_fast(rows.gate[r] - rows.shift[r]);
#pragma unroll
    for (int n = 0; n < 4; n++) {
        int from = distance - 16 * n;
        if (EDGES && is_future(from)) continue;
        if (!EDGES || has_exact(from, window)) exponentiate(scores[n], rows.total, rows.shift, scale, 8);
        else
            for (int i = 0; i < 8; i++) scores[n][i] = 0;
        if (EDGES && has_far(from, window))
            add_far_weights(scores[n], rows, far_weight, far_tile + 16 * n * FAR_ROW, from, window, first - 16 * n,
                            lane);
        add_weighted(rows, scores[n], slot + KEYS + n * 2048, TILE, n % 2 * 64, lane);
    }
}

// The far term through S, and the sinks. query: the first row's token; counted: keys in S.
__device__ __forceinline__ void begin(Attention& rows, const unsigned char* shared, const unsigned char* q_far,
                                      int query, int counted, int sinks, float scale, int lane) {
    FarRows x;
    load_far_rows(x, rows, q_far, lane);
    if (counted > 0) {
        read_sum(rows, x, shared, lane);
        if ((lane & 3) == 0) rows.total[0] += counted, rows.total[1] += counted;
    }
    rows.shift[0] = rows.gate[0], rows.shift[1] = rows.gate[1];
    if (!SINKS) return;
    Scores scores[1] = {};
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; step++)
        add_scores(scores[0], rows, step, shared + SINK_K_AT, SINK_TILE, 0, lane);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int key = score_key(i, lane & 3);
        if (key >= sinks || key > query + (lane >> 2) + 8 * score_row(i)) scores[0][i] = -INFINITE;
    }
    raise_shift<1>(rows, scores, scale);
    exponentiate(scores[0], rows.total, rows.shift, scale, 8);
    add_weighted(rows, scores[0], shared + SINK_V_AT, SINK_TILE, 0, lane);
}

// Words of four lanes, turned: lane t's word i becomes lane i's word t.
__device__ __forceinline__ void turn_words(unsigned (&w)[4], int t) {
#pragma unroll
    for (int k = 1; k < 4; k *= 2) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & k) continue;
            unsigned got = __shfl_xor_sync(ALL_LANES, t & k ? w[i] : w[i | k], k);
            if (t & k) w[i] = got;
            else w[i | k] = got;
        }
    }
}

// Rows of out and rest; a row's 64 bytes at a time.
__device__ __forceinline__ void store_attention(const Results& to, const Attention& rows, int token, int length,
                                                int lane) {
    int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int query = token + g + 8 * r;
        float inverse = reciprocal(rows.total[r]);
#pragma unroll
        for (int group = 0; group < 2 * HALVES; group++) {
            unsigned w[4], lost[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float(&c)[4] = rows.acc[group / 2][group % 2 * 4 + i];
                float low = c[2 * r] * inverse, high = c[2 * r + 1] * inverse;
                w[i] = pack_bf16(low, high);
                lost[i] = TRAINING ? pack_bf16(low - low_float(w[i]), high - high_float(w[i])) : 0;
            }
            long long at = (long long)query * to.stride + 32 * group + 8 * t;
            turn_words(w, t);
            if (query < length) *reinterpret_cast<uint4*>(to.out + at) = make_uint4(w[0], w[1], w[2], w[3]);
            if (!TRAINING) continue;
            turn_words(lost, t);
            if (query < length)
                *reinterpret_cast<uint4*>(to.rest + at) = make_uint4(lost[0], lost[1], lost[2], lost[3]);
        }
    }
}
