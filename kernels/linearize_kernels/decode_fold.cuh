// Part of decode.cu: tokens that the window has left go into the sum.
#pragma once

// The folding of FOLD tokens, number `folded` and on, into the sum; by all threads, once nothing else is in `memory`.
__device__ __forceinline__ void fold(unsigned char* memory, SUM* total, float* norm, const ELEMENT* values,
                                     const RING_FAR* ring_far, const signed char* sort, int folded, float rate,
                                     int part, int split, bool works) {
    constexpr int EACH = PARTS <= 16 ? 8 : 4;  // features a thread at once
    constexpr int AT_ONCE = least(PARTS * EACH, (FEATURES + EACH - 1) / EACH * EACH);
    auto features = reinterpret_cast<float(*)[AT_ONCE]>(memory);
    auto leaving = reinterpret_cast<float(*)[COLUMNS]>(features + FOLD);
    auto x = reinterpret_cast<float(*)[MAP_DIM]>(leaving + FOLD);
    const int t = threadIdx.x, column = t % LANES * 4;
    total += split * COLUMNS + column;
#pragma unroll
    for (int i = t; i < FOLD * LANES; i += THREADS) {
        const int slot = (folded + i / LANES) % RING, c = split * COLUMNS + i % LANES * 4;
        float4 value = make_float4(0, 0, 0, 0);
        if (sort[slot] != UNSEEN && c < VALUE_DIM)
            value = widen(__ldcg(reinterpret_cast<const RawValue*>(values + slot * VALUE_DIM + c)));
        *reinterpret_cast<float4*>(&leaving[0][0] + 4 * i) = value;
    }
    for (int i = t; i < FOLD * (MAP_DIM / 4); i += THREADS) {
        const int slot = (folded + i / (MAP_DIM / 4)) % RING;
        float4 far = make_float4(0, 0, 0, 0);
        if (sort[slot] != UNSEEN)
            far = widen(__ldcg(reinterpret_cast<const RawFar*>(ring_far + slot * MAP_DIM) + i % (MAP_DIM / 4)));
        *reinterpret_cast<float4*>(&x[0][0] + 4 * i) = far;
    }
    for (int base = 0; base < FEATURES; base += PARTS * EACH) {
        float4 sums[EACH];
        const int first = base + part * EACH;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (works && first + i < FEATURES)
                sums[i] = widen(__ldcg(reinterpret_cast<const RawSum*>(total + (first + i) * VALUE_DIM)));
        __syncthreads();
        for (int i = t; i < FOLD * AT_ONCE; i += THREADS) {
            const int f = base + i % AT_ONCE, token = i / AT_ONCE;
            float weight = f < FEATURES && sort[(folded + token) % RING] != UNSEEN ? 1.f : 0.f;
            if (f < MAP_DIM) weight *= 0.5f;
            if (DECAY) weight *= exp2f(rate * (FOLD + WINDOW - 1 - token));
            const Factors at(min(f, FEATURES - 1));
            const float left = at.i < MAP_DIM ? x[token][at.i] : 1.f, right = at.j < MAP_DIM ? x[token][at.j] : 1.f;
            (&features[0][0])[i] = weight * (left * right);
        }
        __syncthreads();
        const float kept = DECAY ? exp2f(rate * FOLD) : 1.f;
        for (int i = t; i < AT_ONCE && base + i < FEATURES; i += THREADS) {
            float sum = norm[base + i] * kept;
#pragma unroll 8
            for (int token = 0; token < FOLD; token++) sum += features[token][i];
            norm[base + i] = sum;
        }
        if (!works || first >= FEATURES) continue;  // the barriers of the next round are the same for all
#pragma unroll
        for (int i = 0; i < EACH && DECAY; i++) sums[i] = kept * sums[i];
#pragma unroll 1
        for (int token = 0; token < FOLD; token++) {
            const float4 v = *reinterpret_cast<const float4*>(&leaving[token][column]);
            float w[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i += 4)
                *reinterpret_cast<float4*>(w + i) = *reinterpret_cast<const float4*>(&features[token][first - base + i]);
#pragma unroll
            for (int i = 0; i < EACH; i++) add(sums[i], w[i], v);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (first + i < FEATURES)
                __stcg(reinterpret_cast<RawSum*>(total + (first + i) * VALUE_DIM), narrow(sums[i], SUM()));
    }
}
