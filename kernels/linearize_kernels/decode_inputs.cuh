// Part of decode.cu: how a block brings things to shared memory. `Fetch` brings what the state holds, `Token` what the new
// token gives, a piece a thread: 16 bytes of a query or the key, 4 elements of the value, one number of the mapped ones
// and of the gates. Of both, what is asked for stays in registers until it is put, so that all is asked for at first. And
// how the token enters the state.
#pragma once

constexpr int DIM = ELEMENT_BYTES == 2 ? (HEAD_DIM + 31) / 32 * 32 : 4 * power(HEAD_DIM / 4);  // padded for `Keys`

struct __align__(16) Inputs {  // in shared memory
    ELEMENT queries[HEADS][DIM], key[HEAD_DIM], value[COLUMNS];
    __align__(16) float far[HEADS][MAP_DIM + 4];  // with a 1 at MAP_DIM
    float new_far[MAP_DIM];
    __align__(16) float4 old_far[FOLD - 1][MAP_DIM / 4];  // of what the window has left, newest first
    float gate[HEADS];
};

__device__ __forceinline__ void copy4(ELEMENT* to, const ELEMENT* from) {
    *reinterpret_cast<RawValue*>(to) = *reinterpret_cast<const RawValue*>(from);
}

// A number of each head into shared memory.
__device__ __forceinline__ void put_row(float* to, const float (&x)[PAD]) {
    if constexpr (PAD >= 4) {
#pragma unroll
        for (int h = 0; h < PAD; h += 4) *reinterpret_cast<float4*>(to + h) = make_float4(x[h], x[h + 1], x[h + 2], x[h + 3]);
    } else {
#pragma unroll
        for (int h = 0; h < PAD; h++) to[h] = x[h];
    }
}

// What a thread brings of SIZE elements.
template <int SIZE, class T = float> struct Fetch {
    static constexpr int EACH = (SIZE + THREADS - 1) / THREADS;
    T x[EACH];

    template <class Get> __device__ __forceinline__ explicit Fetch(Get get) {
#pragma unroll
        for (int i = 0; i < EACH; i++) x[i] = get(min(int(threadIdx.x) + i * THREADS, SIZE - 1));
    }
    __device__ __forceinline__ void put(T* to) const {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (int(threadIdx.x) + i * THREADS < SIZE) to[threadIdx.x + i * THREADS] = x[i];
    }
};

__device__ __forceinline__ uint4 bits(uint2 x) { return make_uint4(x.x, x.y, 0, 0); }
__device__ __forceinline__ uint4 bits(float4 x) {
    return make_uint4(__float_as_uint(x.x), __float_as_uint(x.y), __float_as_uint(x.z), __float_as_uint(x.w));
}
__device__ __forceinline__ uint4 bits(float x) { return make_uint4(__float_as_uint(x), 0, 0, 0); }
__device__ __forceinline__ void put_bits(uint2* to, uint4 x) { *to = make_uint2(x.x, x.y); }
__device__ __forceinline__ void put_bits(float4* to, uint4 x) { *reinterpret_cast<uint4*>(to) = x; }

struct Token {  // at the first query head of a kv head; the value at the block's first column
    const ELEMENT *q, *k, *v;
    const Q_FAR* q_far;
    const K_FAR* k_far;
    const GATE* gate;
    int q_h, qf_h, g_h, columns;  // from a query head to the next; columns of the value from v on (0 or less: none)

    static constexpr int EACH = 16 / ELEMENT_BYTES, QUERY = DIM / EACH;  // elements of a piece; pieces of a query
    static constexpr int KEY = HEADS * QUERY, VALUE = KEY + HEAD_DIM / EACH, FAR_OF_Q = VALUE + LANES;
    static constexpr int FAR_OF_K = FAR_OF_Q + HEADS * MAP_DIM, GATES = FAR_OF_K + MAP_DIM, END = GATES + HEADS;

    __device__ __forceinline__ uint4 get(int i) const {
        if (i < KEY) {
            const int h = i / QUERY, c = i % QUERY * EACH;
            return c < HEAD_DIM ? *reinterpret_cast<const uint4*>(q + h * q_h + c) : make_uint4(0, 0, 0, 0);
        }
        if (i < VALUE) return *reinterpret_cast<const uint4*>(k + (i - KEY) * EACH);
        if (i < FAR_OF_Q) {
            const int c = 4 * (i - VALUE);
            return ALL_COLUMNS || c < columns ? bits(*reinterpret_cast<const RawValue*>(v + c)) : make_uint4(0, 0, 0, 0);
        }
        if (i < FAR_OF_K) return bits(to_float(q_far[(i - FAR_OF_Q) / MAP_DIM * qf_h + (i - FAR_OF_Q) % MAP_DIM]));
        if (i < GATES) return bits(to_float(k_far[i - FAR_OF_K]));
        return i < END ? bits(to_float(gate[(i - GATES) * g_h]) * LOG2E) : make_uint4(0, 0, 0, 0);
    }
    __device__ __forceinline__ void put(Inputs& in, int i, uint4 x) const {
        if (i < KEY) *reinterpret_cast<uint4*>(&in.queries[0][0] + i * EACH) = x;
        else if (i < VALUE) *reinterpret_cast<uint4*>(in.key + (i - KEY) * EACH) = x;
        else if (i < FAR_OF_Q) put_bits(reinterpret_cast<RawValue*>(in.value + 4 * (i - VALUE)), x);
        else if (i < FAR_OF_K) in.far[(i - FAR_OF_Q) / MAP_DIM][(i - FAR_OF_Q) % MAP_DIM] = __uint_as_float(x.x);
        else if (i < GATES) in.new_far[i - FAR_OF_K] = __uint_as_float(x.x);
        else if (i < END) in.gate[i - GATES] = __uint_as_float(x.x), in.far[i - GATES][MAP_DIM] = 1;
    }
};

// The token enters the ring, and the sinks where the text is that short: value, key and the rest by a warp each.
__device__ __forceinline__ void enter(const Inputs& in, int length, int new_slot, int split, ELEMENT* keys, ELEMENT* values,
                                      RING_FAR* ring_far, signed char* ring_kind) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < (length < SINKS ? 2 : 1); i++) {
        const int row = i ? length : SINKS + new_slot;
        if (warp == 0)
            for (int c = 4 * lane; c < COLUMNS && split * COLUMNS + c < VALUE_DIM; c += 128)
                copy4(values + row * VALUE_DIM + split * COLUMNS + c, in.value + c);
        if (warp == 1 && split == 0)
            for (int c = 4 * lane; c < HEAD_DIM; c += 128) copy4(keys + row * HEAD_DIM + c, in.key + c);
    }
    if (warp == 2 && split == 0) {
        for (int i = lane; i < MAP_DIM; i += 32) ring_far[new_slot * MAP_DIM + i] = from_float<RING_FAR>(in.new_far[i]);
        if (lane == 0) ring_kind[new_slot] = length < SINKS ? 2 : 1;
    }
}
