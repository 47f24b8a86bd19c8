// What kernels share: bfloat16 in unsigned short, dynamic shared memory, launches that overlap. On a GPU, and on the CPU
// (CUDA_ON_CPU) where the tests run the same source.
#pragma once

#ifdef CUDA_ON_CPU
#define DYNAMIC_SHARED(name) unsigned char* name = reinterpret_cast<unsigned char*>(emulator::dynamic_memory)
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

// A launch that may begin early (`Kernel.__call__`) reads nothing that the launch before it writes, and writes nothing
// that it reads, before it has waited. What it may begin after says so; else that is its end. No-ops before Hopper.
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

typedef unsigned short bf16;  // the upper half of a float32

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(unsigned(x) << 16); }

// To the nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ bf16 to_bf16(float x) {
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16(bits >> 16 | 0x40);
    return bf16((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return to_bf16(x); }
