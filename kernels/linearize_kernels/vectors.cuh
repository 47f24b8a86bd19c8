// Four elements at once, and sums over the lanes of a warp.
#pragma once
#include "primitives.cuh"

template <class T> struct Raw4;  // four elements as they lie in memory
template <> struct Raw4<float> { using type = float4; };
template <> struct Raw4<bf16> { using type = uint2; };

__device__ __forceinline__ float low(unsigned x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high(unsigned x) { return __uint_as_float(x & 0xffff0000u); }
__device__ __forceinline__ float4 widen(float4 x) { return x; }
__device__ __forceinline__ float4 widen(uint2 x) { return make_float4(low(x.x), high(x.x), low(x.y), high(x.y)); }
__device__ __forceinline__ float4 narrow(float4 x, float) { return x; }
__device__ __forceinline__ uint2 narrow(float4 x, bf16) {
    return make_uint2(to_bf16(x.x) | unsigned(to_bf16(x.y)) << 16, to_bf16(x.z) | unsigned(to_bf16(x.w)) << 16);
}
__device__ __forceinline__ float4 operator*(float a, float4 x) {
    return make_float4(a * x.x, a * x.y, a * x.z, a * x.w);
}
__device__ __forceinline__ void add(float4& to, float weight, float4 x) {
    to.x += weight * x.x, to.y += weight * x.y, to.z += weight * x.z, to.w += weight * x.w;
}

// 16 bytes: 4 floats or 8 bfloat16.
__device__ __forceinline__ void unpack(uint4 x, float (&to)[4]) {
    to[0] = __uint_as_float(x.x), to[1] = __uint_as_float(x.y), to[2] = __uint_as_float(x.z), to[3] = __uint_as_float(x.w);
}
__device__ __forceinline__ void unpack(uint4 x, float (&to)[8]) {
    to[0] = low(x.x), to[1] = high(x.x), to[2] = low(x.y), to[3] = high(x.y);
    to[4] = low(x.z), to[5] = high(x.z), to[6] = low(x.w), to[7] = high(x.w);
}

// The compiler must not keep what it derives from x before this for after it: that would take too many registers.
__device__ __forceinline__ void forget(uint4& x) { asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)); }

// 8 or 16 bytes from global to shared memory, behind the thread's back; `copies_done` waits for them.
template <class T> __device__ __forceinline__ void copy_async(T* to, const T* from) {
#ifdef CUDA_ON_CPU
    *to = *from;
#else
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if constexpr (sizeof(T) == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(at), "l"(from) : "memory");
#endif
}
__device__ __forceinline__ void copies_done() {
#ifndef CUDA_ON_CPU
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// N sums over LANES lanes at once: lane l gets number l / (LANES / N), in x[0].
template <int N, int OVER> __device__ __forceinline__ float sum_over_lanes(float (&x)[N], int lane) {
    static_assert(N <= OVER);
#pragma unroll
    for (int half = N / 2, bit = OVER / 2; half; half /= 2, bit /= 2) {
        const bool upper = lane & bit;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float send = upper ? x[i] : x[i + half], keep = upper ? x[i + half] : x[i];
            x[i] = keep + __shfl_xor_sync(0xffffffffu, send, bit);
        }
    }
#pragma unroll
    for (int bit = OVER / N / 2; bit; bit /= 2) x[0] += __shfl_xor_sync(0xffffffffu, x[0], bit);
    return x[0];
}
__device__ __forceinline__ float warp_sum(float x) {
    for (int bit = 16; bit; bit /= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int bit = 16; bit; bit /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, bit));
    return x;
}
