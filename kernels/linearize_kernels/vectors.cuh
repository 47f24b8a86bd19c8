// Four elements at once, and sums over the lanes of a warp.
#pragma once
#include "primitives.cuh"
#include "tensor_cores.cuh"

template <class T> struct Raw4;  // four elements as they lie in memory
template <> struct Raw4<float> { using type = float4; };
template <> struct Raw4<bf16> { using type = uint2; };

__device__ __forceinline__ float4 widen(float4 x) { return x; }
__device__ __forceinline__ float4 widen(uint2 x) { return make_float4(low_float(x.x), high_float(x.x), low_float(x.y), high_float(x.y)); }
__device__ __forceinline__ float4 narrow(float4 x, float) { return x; }
__device__ __forceinline__ uint2 narrow(float4 x, bf16) {
    return make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
}
__device__ __forceinline__ float4 operator*(float a, float4 x) {
    return make_float4(a * x.x, a * x.y, a * x.z, a * x.w);
}
__device__ __forceinline__ void add(float4& to, float weight, float4 x) {
    to.x += weight * x.x, to.y += weight * x.y, to.z += weight * x.z, to.w += weight * x.w;
}

// 8 or 16 bytes from global to shared memory, as copy_async.
template <class T> __device__ __forceinline__ void copy_piece(T* to, const T* from) {
    if constexpr (sizeof(T) == 16) {
        copy_async(reinterpret_cast<unsigned char*>(to), from, true);
    } else {
#ifdef CUDA_ON_CPU
        *to = *from;
#else
        const unsigned at = shared_address(reinterpret_cast<const unsigned char*>(to));
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(at), "l"(from) : "memory");
#endif
    }
}

// Reads of what is not needed again soon, which leave the L2 cache first.
template <class T> __device__ __forceinline__ T load_once(const T* from) {
#ifdef CUDA_ON_CPU
    return *from;
#else
    return __ldcs(from);
#endif
}
template <class T> __device__ __forceinline__ void copy_piece_once(T* to, const T* from) {
#ifndef CUDA_ON_CPU
    if constexpr (sizeof(T) == 16) {
        const unsigned at = shared_address(reinterpret_cast<const unsigned char*>(to));
        unsigned long long policy;
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "l"(policy) : "memory");
        return;
    }
#endif
    copy_piece(to, from);
}

// N sums over OVER lanes at once; lane l gets number l / (OVER / N).
template <int N, int OVER> __device__ __forceinline__ float sum_over_lanes(const float (&x)[N], int lane) {
    static_assert(N <= OVER);
    if constexpr (N == 1) {
        float sum = x[0];
#pragma unroll
        for (int bit = OVER / 2; bit; bit /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, bit);
        return sum;
    } else {
        const bool upper = lane & OVER / 2;
        float half[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const float send = upper ? x[i] : x[i + N / 2], keep = upper ? x[i + N / 2] : x[i];
            half[i] = keep + __shfl_xor_sync(ALL_LANES, send, OVER / 2);
        }
        return sum_over_lanes<N / 2, OVER / 2>(half, lane);
    }
}
__device__ __forceinline__ float warp_sum(float x) {
    for (int bit = 16; bit; bit /= 2) x += __shfl_xor_sync(ALL_LANES, x, bit);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int bit = 16; bit; bit /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, bit));
    return x;
}
