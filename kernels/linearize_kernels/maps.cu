// The CUDA kernel of `map_heads`: what a decode step maps, one token a row, each head through a matrix of its own.
//
// Defined by map_heads.py: the type ELEMENT (of x), HEAD_DIM, COLUMNS (of a matrix), WARPS.
//
// A block has the matrix of one head in shared memory, where it is read before the launch before this one has ended. A
// warp takes ROWS rows, a lane 4 entries of each and the 4 rows of the matrix that they meet. Lanes add up 32 products at
// a time.
#include "vectors.cuh"

constexpr int ROWS = 4, AT_ONCE = 32 / ROWS;  // columns
constexpr int PIECES = HEAD_DIM * COLUMNS / 4;  // of the matrix

extern "C" __global__ void __launch_bounds__(32 * WARPS) map_kernel(
    const ELEMENT* x, const float* weight, const float* bias, float* out, int x_b, int x_h, int batch) {
    __shared__ float4 matrix[PIECES];
    const int lane = threadIdx.x % 32, head = blockIdx.x, first = (blockIdx.y * WARPS + threadIdx.x / 32) * ROWS;
    const bool works = 4 * lane < HEAD_DIM;
    const float4* from = reinterpret_cast<const float4*>(weight) + head * PIECES;
    for (int i = threadIdx.x; i < PIECES; i += 32 * WARPS) matrix[i] = __ldg(from + i);
    wait_for_launch_before();
    let_next_launch_begin();
    float4 rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const ELEMENT* row = x + size_t(min(first + r, batch - 1)) * x_b + head * x_h;
        rows[r] = widen(*reinterpret_cast<const Raw4<ELEMENT>::type*>(row + (works ? 4 * lane : 0)));
    }
    __syncthreads();
    float4 mine[COLUMNS];  // 4 rows of the matrix, one after the other
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) mine[i] = works ? matrix[lane * COLUMNS + i] : make_float4(0, 0, 0, 0);
    const float* w = reinterpret_cast<const float*>(mine);
#pragma unroll
    for (int start = 0; start < COLUMNS; start += AT_ONCE) {
        float sums[32];
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const float4 y = rows[i / AT_ONCE];
            const int c = start + i % AT_ONCE;
            sums[i] = c < COLUMNS ? y.x * w[c] + y.y * w[COLUMNS + c] + y.z * w[2 * COLUMNS + c] + y.w * w[3 * COLUMNS + c] : 0.f;
        }
        const float sum = sum_over_lanes<32, 32>(sums, lane);  // number `lane`
        const int row = first + lane / AT_ONCE, c = start + lane % AT_ONCE;
        if (row < batch && c < COLUMNS)
            out[(size_t(row) * gridDim.x + head) * COLUMNS + c] = sum + bias[head * COLUMNS + c];
    }
}
