// Runs a CUDA kernel on the CPU: g++ compiles the same source, every CUDA thread is a fiber, blocks run one after
// another. Included before the source by cuda_emulator.py.
//
// What it sees and a GPU may not: threads that do not meet at the same barrier (also within a warp), reads of shared
// memory that nothing wrote (it holds NaN at the start of a block), writes past dynamic shared memory, pages that may not
// be touched (tests/guarded.py), and, as fibers run one at a time in an order that can be reversed, most uses of shared
// memory without a barrier between.
// Warp functions take the full mask only. Blocks cannot wait for each other.
#pragma once
#include <csetjmp>
#include <csignal>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#define CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("shared_memory")))
#define __syncthreads() emulator::block_barrier(__FILE__, __LINE__)

struct uint3 { unsigned x, y, z; };
using dim3 = uint3;
#define EMULATED_VECTOR(type, name) \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; }; \
    struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; }; \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTOR(float, float)
EMULATED_VECTOR(int, int)
EMULATED_VECTOR(unsigned, uint)

inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t STACK = 256 << 10, CANARY = 256, LANE_BYTES = 256;

struct Barrier {
    int expected = 0, arrived = 0, line = 0;
    unsigned long generation = 0;
    const char* file = "";
};

struct PendingCopy { unsigned char* to; const void* from; int bytes; };  // tensor_cores.cuh

struct Fiber {
    ucontext_t context;
    jmp_buf at;
    std::vector<char> stack;
    uint3 index;
    bool started, done;
    Barrier* waits;
    unsigned long since;
    unsigned exchanges;
    std::vector<PendingCopy> copies;  // that have not landed
    std::vector<size_t> commits;      // how many there were when a group was closed
};

struct Warp {
    Barrier barrier;
    alignas(16) char values[2][32][LANE_BYTES];
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block;
inline Fiber* current;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline char message[1024];
inline std::vector<char> dynamic_storage;
inline char* dynamic_memory;
inline bool reversed = false;  // the order in which threads run

[[noreturn]] inline void fail(const char* format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    _longjmp(scheduler, 2);
}

__attribute__((noinline)) inline void yield() {
    if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void wait(Barrier& barrier, const char* file, int line) {
    if (barrier.arrived == 0) {
        barrier.file = file;
        barrier.line = line;
    } else if (barrier.line != line || barrier.file != file) {
        fail("thread %u waits at %s:%d, others at %s:%d", current->index.x, file, line, barrier.file, barrier.line);
    }
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        barrier.generation++;
        return;
    }
    current->since = barrier.generation;
    current->waits = &barrier;
    yield();
    current->waits = nullptr;
}

inline void block_barrier(const char* file, int line) { wait(block, file, line); }

inline int thread() { return int(current - fibers.data()); }
inline int lane() { return thread() % 32; }

// The values that all 32 lanes give, in order of lanes; good until the second exchange after this one.
template <class T>
inline const T* exchange(const T& mine, unsigned mask = 0xffffffffu) {
    static_assert(sizeof(T) <= LANE_BYTES && std::is_trivially_copyable_v<T>);
    if (mask != 0xffffffffu) fail("thread %u: a warp function with the mask %08x", current->index.x, mask);
    Warp& warp = warps[thread() / 32];
    auto& values = warp.values[current->exchanges++ % 2];
    static thread_local T result[2][32];
    memcpy(values[lane()], &mine, sizeof mine);
    wait(warp.barrier, "a warp function", int(sizeof mine));
    T* all = result[current->exchanges % 2];
    for (int i = 0; i < 32; i++) memcpy(&all[i], values[i], sizeof mine);
    return all;
}

inline void start() {
    body();
    current->done = true;
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx = fiber.index;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

// Runs the fibers of one block to their end. A warp runs as far as it can before the next one does: what it reads too
// early or writes too soon, for want of a barrier, shows in one order of warps or in the other.
inline int run_block() {
    volatile size_t next = 0, waiting = 0, left = fibers.size();
    int event = _setjmp(scheduler);
    if (event == 2) return 1;
    if (event == 1) {
        waiting = 0;
        size_t place = current - fibers.data();
        next = (reversed ? fibers.size() - 1 - place : place) / 32 * 32;
        if (current->done) left = left - 1;
    }
    while (left) {
        size_t place = next++ % fibers.size();
        Fiber& fiber = fibers[reversed ? fibers.size() - 1 - place : place];
        bool stuck = fiber.done || (fiber.waits && fiber.waits->generation == fiber.since);
        if (!stuck) resume(fiber);
        if (++waiting > 2 * fibers.size()) {
            for (Fiber& f : fibers) {
                if (f.done) continue;
                snprintf(message, sizeof message, "%d of %d threads wait at %s:%d for others that never come there",
                         f.waits->arrived, f.waits->expected, f.waits->file, f.waits->line);
                return 1;
            }
        }
    }
    return 0;
}

inline void prepare(int threads) {
    fibers.resize(threads);
    warps.resize(threads / 32);
    block = Barrier{threads};
    for (Warp& warp : warps) warp.barrier = Barrier{32};
    for (int i = 0; i < threads; i++) {
        Fiber& f = fibers[i];
        f.stack.resize(STACK);
        f.index = {unsigned(i) % blockDim.x, unsigned(i) / blockDim.x % blockDim.y,
                   unsigned(i) / (blockDim.x * blockDim.y)};
        f.started = f.done = false;
        f.waits = nullptr;
        f.exchanges = 0;
        f.copies.clear();
        f.commits.clear();
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = nullptr;
        makecontext(&f.context, start, 0);
    }
}

// While a kernel runs, a read or write of memory that nobody has is its failure, not the end of the process.
struct CatchFaults {
    struct sigaction before;
    CatchFaults() {
        struct sigaction action = {};
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        action.sa_sigaction = [](int, siginfo_t* info, void*) {
            fail("thread %u of block (%u, %u, %u) reads or writes at %p, where nothing is", current->index.x, blockIdx.x,
                 blockIdx.y, blockIdx.z, info->si_addr);
        };
        sigaction(SIGSEGV, &action, &before);
    }
    ~CatchFaults() { sigaction(SIGSEGV, &before, nullptr); }
};

extern "C" char __start_shared_memory[] __attribute__((weak));
extern "C" char __stop_shared_memory[] __attribute__((weak));

inline void poison(int bytes) {
    dynamic_storage.resize(bytes + CANARY + 1024);
    dynamic_memory = dynamic_storage.data() + (1024 - uintptr_t(dynamic_storage.data()) % 1024) % 1024;
    memset(dynamic_memory, 0xff, bytes);
    memset(dynamic_memory + bytes, 0x5a, CANARY);
    if (__start_shared_memory) memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
}

template <class... A, size_t... I>
int launch(void (*kernel)(A...), std::index_sequence<I...>, const int* size, int shared, void** args) {
    gridDim = {unsigned(size[0]), unsigned(size[1]), unsigned(size[2])};
    blockDim = {unsigned(size[3]), unsigned(size[4]), unsigned(size[5])};
    int threads = size[3] * size[4] * size[5];
    message[0] = 0;
    CatchFaults catch_faults;
    if (threads % 32) return snprintf(message, sizeof message, "%d threads: no whole warps", threads);
    body = [=] { kernel(*static_cast<std::remove_reference_t<A>*>(args[I])...); };
    for (unsigned z = 0; z < gridDim.z; z++)
        for (unsigned y = 0; y < gridDim.y; y++)
            for (unsigned x = 0; x < gridDim.x; x++) {
                blockIdx = {x, y, z};
                prepare(threads);
                poison(shared);
                if (run_block()) return 1;
                for (size_t i = 0; i < CANARY; i++)
                    if (dynamic_memory[shared + i] != 0x5a)
                        return snprintf(message, sizeof message, "a write past %d bytes of shared memory", shared);
            }
    return 0;
}

// size: grid and block, x y z each; args: pointers to the arguments, as cuLaunchKernel takes them.
template <class... A>
int launch(void (*kernel)(A...), const int* size, int shared, bool reverse, void** args) {
    reversed = reverse;
    return launch(kernel, std::index_sequence_for<A...>{}, size, shared, args);
}

}  // namespace emulator

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::exchange(0, mask); }
template <class T> T __shfl_sync(unsigned mask, T x, int lane, int width = 32) {
    int first = emulator::lane() / width * width;
    return emulator::exchange(x, mask)[first + lane % width];
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
    int from = emulator::lane() ^ bits;
    const T* all = emulator::exchange(x, mask);
    return from / width == emulator::lane() / width ? all[from] : x;
}
template <class T> T __shfl_down_sync(unsigned mask, T x, int by, int width = 32) {
    int from = emulator::lane() + by;
    const T* all = emulator::exchange(x, mask);
    return from / width == emulator::lane() / width ? all[from] : x;
}
template <class T> T __shfl_up_sync(unsigned mask, T x, int by, int width = 32) {
    int from = emulator::lane() - by;
    const T* all = emulator::exchange(x, mask);
    return from >= emulator::lane() / width * width ? all[from] : x;
}
inline unsigned __ballot_sync(unsigned mask, int yes) {
    const int* all = emulator::exchange(yes, mask);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++) bits |= unsigned(all[i] != 0) << i;
    return bits;
}
inline int __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
inline int __all_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) == 0xffffffffu; }

inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldcs(const T* at) { return *at; }
template <class T> T __ldcg(const T* at) { return *at; }
template <class T> void __stcs(T* at, T x) { *at = x; }
template <class T> void __stcg(T* at, T x) { *at = x; }
template <class T> T atomicAdd(T* at, T x) { T old = *at; *at = old + x; return old; }
inline void __threadfence() {}
inline void __threadfence_block() {}
