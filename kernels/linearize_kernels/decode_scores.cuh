// Part of decode.cu: what weighs what. Scores are logarithms of base 2; those of sinks and window are made in
// decode_keys.cuh. Each by all threads of a block, with a barrier after those that are called one after the other.
#pragma once

__device__ __forceinline__ void put_features(const Inputs& in, float (*features)[PAD]) {
    for (int f = threadIdx.x; f < FEATURES; f += THREADS) {
        const Factors at(f);
        float x[PAD];
#pragma unroll
        for (int h = 0; h < PAD; h++) x[h] = h < HEADS ? in.far[h][at.i] * in.far[h][at.j] : 0.f;
        put_row(features[f], x);
    }
}

// T(x) of what the window has left, and is not folded.
__device__ __forceinline__ void score_unfolded(const Inputs& in, const signed char* sort, float (*scores)[PAD], int new_slot,
                                               float rate) {
    for (int i = threadIdx.x; i < (FOLD - 1) * HEADS; i += THREADS) {
        const int age = WINDOW + i / HEADS, h = i % HEADS, slot = new_slot - age + (new_slot < age ? RING : 0);
        if (sort[SINKS + slot] != FAR) continue;
        float x = 0;
#pragma unroll
        for (int c = 0; c < MAP_DIM / 4; c++) {
            const float4 far = in.old_far[i / HEADS][c];
            const float* query = &in.far[h][4 * c];
            x += far.x * query[0] + far.y * query[1] + far.z * query[2] + far.w * query[3];
        }
        scores[SINKS + slot][h] = in.gate[h] + log2_fast(0.5f * (1.f + x) * (1.f + x) + 0.5f) + rate * age;
    }
}

// The new token, which sees itself.
__device__ __forceinline__ void score_new(const Inputs& in, float (*scores)[PAD], float scale) {
    const int lane = threadIdx.x % 32;
    for (int h = threadIdx.x / 32; h < HEADS; h += WARPS) {
        float x = 0;
#pragma unroll
        for (int c = lane; c < HEAD_DIM; c += 32) x += to_float(in.queries[h][c]) * to_float(in.key[c]);
        x = warp_sum(x);
        if (lane == 0) scores[ROWS][h] = x * scale;
    }
}

// One softmax a head, by a warp; the sum joins it with the gate and its own decay for a score. Scores become weights.
// Other warps go on.
__device__ __forceinline__ void softmax(const Inputs& in, const float (*features)[PAD], const float* norms,
                                        float (*scores)[PAD], float* far_factor, float decay) {
    constexpr int EACH = (PADDED + 31) / 32;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int h = WARPS - 1 - threadIdx.x / 32; h < PAD; h += WARPS) {
        float score[EACH], top = norms[FEATURES - 1] > 0 && h < HEADS ? in.gate[h] : NEVER, denominator = 0, far = 0;
        if (DECAY) top += decay;
        const float sum_score = top;
        if (h < HEADS) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                score[i] = lane + 32 * i <= ROWS ? scores[lane + 32 * i][h] : NEVER;
                top = fmaxf(top, score[i]);
            }
            top = warp_max(top);  // the token sees itself, so it is finite
#pragma unroll
            for (int f = lane; f < FEATURES; f += 32) far += features[f][h] * norms[f];
            far *= exp2_fast(sum_score - top);
#pragma unroll
            for (int i = 0; i < EACH; i++) denominator += score[i] = exp2_fast(score[i] - top);
            denominator = __fdividef(1.f, warp_sum(denominator + far));
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (lane + 32 * i < PADDED) scores[lane + 32 * i][h] = h < HEADS ? score[i] * denominator : 0.f;
        if (lane == 0) far_factor[h] = h < HEADS ? exp2_fast(sum_score - top) * denominator : 0.f;
    }
}
