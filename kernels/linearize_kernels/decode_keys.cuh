// Part of decode.cu: scores of keys. `Keys` holds what a thread has of AT_ONCE rows of sinks and ring: `load` asks for
// them, `score` writes the scores of those that count exactly, base 2, -infinity for those that are not seen; those of
// the far term are left out.
#pragma once

struct Place {  // of the new token
    int length, nearest, slot;  // tokens before it, less padding; of those in the ring that are exact; where it goes

    __device__ __forceinline__ bool wants(int row) const {
        const int age = slot - (row - SINKS);
        return row < SINKS ? row < length : unsigned(age < 0 ? age + RING : age) - 1u < unsigned(nearest);
    }
};

#if ELEMENT_BYTES == 2

// On tensor cores, 16 rows a warp by 8 heads. The order of a product's terms is free, so a lane takes 8 elements of a
// row that lie together, and the same of a query, for two steps of 16.
struct Keys {
    static constexpr int AT_ONCE = 16 * WARPS, PIECES = DIM / 32;
    uint4 raw[2][PIECES];

    static __device__ __forceinline__ int row(int block, int half) {
        return block * AT_ONCE + threadIdx.x / 32 * 16 + half * 8 + threadIdx.x % 32 / 4;
    }

    __device__ __forceinline__ void load(const ELEMENT* keys, int block, Place place) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row(block, half), c = threadIdx.x % 4 * 8;
            const uint4* at = reinterpret_cast<const uint4*>(keys + r * HEAD_DIM + c);
            const bool wanted = (EAGER || place.wants(r)) && r < ROWS;
#pragma unroll
            for (int i = 0; i < PIECES; i++)
                raw[half][i] = wanted && 32 * i + c < HEAD_DIM ? load_once(at + 4 * i) : make_uint4(0, 0, 0, 0);
        }
    }

    __device__ __forceinline__ void score(const Inputs& in, const signed char* sort, float (*scores)[PAD], int block,
                                          float scale) const {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int head = 0; head < HEADS; head += 8) {
            float c[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                uint4 query = make_uint4(0, 0, 0, 0);
                if (head + g < HEADS) query = *reinterpret_cast<const uint4*>(&in.queries[head + g][32 * i + 8 * t]);
                const uint4 x = raw[0][i], y = raw[1][i];
                multiply_add(c, {x.x, y.x, x.y, y.y}, query.x, query.y);
                multiply_add(c, {x.z, y.z, x.w, y.w}, query.z, query.w);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = row(block, i / 2), h = head + 2 * t + i % 2;
                const signed char kind = sort[r];
                if (h < HEADS && r < ROWS && kind != FAR) scores[r][h] = kind == EXACT ? c[i] * scale : NEVER;
            }
        }
    }
};

#else

// By multiply-adds: SHARING lanes share a row, and a lane holds EACH rows.
struct Keys {
    static constexpr int SHARING = DIM / 4, EACH = least(8, SHARING);
    static constexpr int TOGETHER = 32 / SHARING * WARPS, AT_ONCE = TOGETHER * EACH;
    float4 raw[EACH];

    static __device__ __forceinline__ int row(int block, int i) {
        return block * AT_ONCE + i * TOGETHER + threadIdx.x / SHARING;
    }

    __device__ __forceinline__ void load(const ELEMENT* keys, int block, Place place) {
        const int c = threadIdx.x % SHARING * 4;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int r = row(block, i);
            const bool wanted = (EAGER || place.wants(r)) && r < ROWS && c < HEAD_DIM;
            raw[i] = wanted ? load_once(reinterpret_cast<const float4*>(keys + r * HEAD_DIM + c)) : make_float4(0, 0, 0, 0);
        }
    }

    __device__ __forceinline__ void score(const Inputs& in, const signed char* sort, float (*scores)[PAD], int block,
                                          float scale) const {
        const int lane = threadIdx.x % SHARING, r = row(block, lane / (SHARING / EACH));
        for (int h = 0; h < HEADS; h++) {
            const float4 query = *reinterpret_cast<const float4*>(&in.queries[h][4 * lane]);
            float part[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++)
                part[i] = query.x * raw[i].x + query.y * raw[i].y + query.z * raw[i].z + query.w * raw[i].w;
            const float s = sum_over_lanes<EACH, SHARING>(part, lane);
            if (lane % (SHARING / EACH) == 0 && r < ROWS && sort[r] != FAR)
                scores[r][h] = sort[r] == EXACT ? s * scale : NEVER;
        }
    }
};

#endif
