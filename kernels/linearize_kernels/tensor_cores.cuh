// Tensor-core products of bfloat16, the matrix loads that feed them, and asynchronous copies into shared memory. On a
// GPU one instruction each (compute capability 8.0); on the CPU the PTX ISA's fragment layouts word for word.
//
// A lane is (g, t): g = lane / 4, t = lane % 4. Two bfloat16 in an unsigned, the lower index in the lower half.
//   a[4] of A [16, 16]:  a0 (g; 2t, 2t+1)  a1 (g+8; 2t, 2t+1)  a2 (g; 2t+8, 2t+9)  a3 (g+8; 2t+8, 2t+9)
//   b0, b1 of B [16, 8]: b0 (2t, 2t+1; g)  b1 (2t+8, 2t+9; g)
//   c[4] of C [16, 8]:   c0, c1 (g; 2t, 2t+1)  c2, c3 (g+8; 2t, 2t+1)
#pragma once

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float low_float(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

// The upper half of `first` and the lower half of `second`.
__device__ __forceinline__ unsigned join_halves(unsigned first, unsigned second) { return first >> 16 | second << 16; }

#ifdef CUDA_ON_CPU

inline unsigned pack_bf16(float low, float high) { return to_bf16(low) | unsigned(to_bf16(high)) << 16; }

inline unsigned multiply_bf16(unsigned x, unsigned y) {
    return pack_bf16(low_float(x) * low_float(y), high_float(x) * high_float(y));
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }
inline float reciprocal(float x) { return 1 / x; }

inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Operands { unsigned a[4], b[2]; } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const Operands* all = emulator::exchange(mine);
    int g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (int i = 0; i < 4; i++) {
        int row_half = i / 2, column = 2 * t + i % 2;
        for (int k = 0; k < 16; k++) {
            unsigned x = all[4 * g + k % 8 / 2].a[row_half + k / 8 * 2], y = all[4 * column + k % 8 / 2].b[k / 8];
            c[i] += k % 2 ? high_float(x) * high_float(y) : low_float(x) * low_float(y);
        }
    }
}

struct MatrixRow { unsigned words[4]; };

inline const MatrixRow* exchange_rows(const unsigned char* row) {
    if (uintptr_t(row) % 16) emulator::fail("a matrix row at %p: not on 16 bytes", row);
    MatrixRow mine;
    memcpy(&mine, row, 16);
    return emulator::exchange(mine);
}

inline void load_matrices(unsigned (&r)[4], const unsigned char* row) {
    const MatrixRow* rows = exchange_rows(row);
    for (int i = 0; i < 4; i++) r[i] = rows[8 * i + emulator::lane() / 4].words[emulator::lane() % 4];
}

inline void load_matrices_transposed(unsigned (&r)[4], const unsigned char* row) {
    const MatrixRow* rows = exchange_rows(row);
    int g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (int i = 0; i < 4; i++) {
        unsigned first = rows[8 * i + 2 * t].words[g / 2] >> 16 * (g % 2);
        unsigned second = rows[8 * i + 2 * t + 1].words[g / 2] >> 16 * (g % 2);
        r[i] = (first & 0xffffu) | second << 16;
    }
}

// A copy lands as late as it may: where its thread waits.
template <int BYTES = 16> void copy_async(unsigned char* to, const void* from, bool real) {
    if (uintptr_t(to) % BYTES || uintptr_t(from) % BYTES) emulator::fail("an asynchronous copy off %d bytes", BYTES);
    emulator::current->copies.push_back({to, real ? from : nullptr, BYTES});
}

inline void land_copies(size_t count) {
    auto& pending = emulator::current->copies;
    for (size_t i = 0; i < count; i++) {
        if (pending[i].from) memcpy(pending[i].to, pending[i].from, pending[i].bytes);
        else memset(pending[i].to, 0, pending[i].bytes);
    }
    pending.erase(pending.begin(), pending.begin() + count);
}

inline void wait_for_copies() {
    land_copies(emulator::current->copies.size());
    emulator::current->commits.clear();
}

inline void commit_copies() {
    emulator::current->commits.push_back(emulator::current->copies.size());
}

template <int LEFT> inline void wait_for_groups() {
    auto& commits = emulator::current->commits;
    if (commits.size() <= LEFT) return;
    size_t groups = commits.size() - LEFT, landed = commits[groups - 1];
    land_copies(landed);
    commits.erase(commits.begin(), commits.begin() + groups);
    for (size_t& count : commits) count -= landed;
}

#else

__device__ __forceinline__ unsigned shared_address(const unsigned char* at) {
    return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// Two floats rounded to bfloat16.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ unsigned multiply_bf16(unsigned x, unsigned y) {
    unsigned product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(x), "r"(y), "r"(0x80008000u));
    return product;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// c += A B in float32.
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of bfloat16 in shared memory. Lane l names row l % 8 of matrix l / 8, 16 bytes; r[i] becomes
// row g, columns 2t and 2t+1 of matrix i.
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const unsigned char* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// The same, but r[i] becomes rows 2t and 2t+1 of column g.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], const unsigned char* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// Sixteen bytes (or eight) from global to shared memory, zeros where not real. They are there after wait_for_copies,
// for this thread; for others after a barrier too.
template <int BYTES = 16> __device__ __forceinline__ void copy_async(unsigned char* to, const void* from, bool real) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(shared_address(to)), "l"(from), "r"(real ? 16 : 0) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :: "r"(shared_address(to)), "l"(from), "n"(BYTES), "r"(real ? BYTES : 0) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// This thread's copies since the last call become a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// As wait_for_copies, but the newest LEFT groups may still be on their way.
template <int LEFT> __device__ __forceinline__ void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
}

#endif
