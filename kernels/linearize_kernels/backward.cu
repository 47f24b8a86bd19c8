// Backward of hybrid attention: bfloat16, head and value dim 64, map dim 16, window 64, up to 16 sinks, one text a row
// from its first token. The function is reference.py's; the maths and what the forward leaves (out, what its rounding
// lost, lse) are gradient_kernels.py's; the launcher is cuda_backward.py.
//
// Chunks, far and exact pairs, features and roles are prefill.cu's. With u = weight · [grad, -delta] of a query, weight
// = exp(gate) / its denominator, the far term's slopes are features(q_far) · (S u) by the query and features(k_far) · R
// [v, 1] by the key, where S = Σ features(k_far) ⊗ [v, 1] is over older keys, R = Σ features(q_far) ⊗ u over newer
// queries.
// So there are two passes like prefill.cu's: over queries, forward in time, with S in the registers of four warps, and
// over keys, backward in time, with R there; four others attend. The normaliser's part (1 and -delta) goes by Σ x xᵀ
// and Σ x. In shared memory S and R are tiles [feature, column], read as they are and transposed.
//
// Of the key pass, a query head has its own block and gradients: heads of a group are added afterwards. Weights are
// taken in base 2. All sums run in a fixed order, in float32.
#include "primitives.cuh"
#include "tensor_cores.cuh"

#include "prefill_tiles.cuh"
#include "prefill_sum.cuh"
#include "prefill_attend.cuh"
#include "backward_tiles.cuh"
#include "backward_pairs.cuh"
#include "backward_sum.cuh"
#include "backward_query.cuh"
#include "backward_key.cuh"

#ifndef QUERY_BLOCKS
#define QUERY_BLOCKS 2  // blocks that share a multiprocessor
#endif
#ifndef KEY_BLOCKS
#define KEY_BLOCKS 2
#endif
#ifndef SINK_BLOCKS
#define SINK_BLOCKS 3
#endif

// Grid B · H, 256 threads. Strides in elements: of batch, head, token; rest lies as out. lse, delta, weight, dgate
// [B, H, T] float32: lse as the forward leaves it, delta corrected, weight 0 where nothing is far.
extern "C" __global__ void __launch_bounds__(ATTENDERS + KEEPERS, QUERY_BLOCKS) query_gradient_kernel(
    const bf16* q, const bf16* k, const bf16* v, const bf16* q_far, const bf16* k_far, const float* gate,
    const bf16* out, const bf16* rest, const bf16* grad, const float* lse, float* delta, float* weight, bf16* dq,
    far_t* dq_far, float* dgate, int q_b, int q_h, int q_t, int k_b, int k_h, int k_t, int v_b, int v_h, int v_t,
    int qf_b, int qf_h, int qf_t, int kf_b, int kf_h, int kf_t, int g_b, int g_h, int g_t, int o_b, int o_h, int o_t,
    int do_b, int do_h, int do_t, int dq_b, int dq_h, int dq_t, int dqf_b, int dqf_h, int dqf_t, int length, int heads,
    int group, int sinks, float scale, float scaling) {
    DYNAMIC_SHARED(shared);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, last = (length - 1) / CHUNK;
    long long b = blockIdx.x / heads, h = blockIdx.x % heads, kv = h / group, numbers = (long long)blockIdx.x * length;
    Rows grads = {grad + b * do_b + h * do_h, do_t};
    if (warp < ATTENDERS / 32) {
        int block = (blockIdx.x / 132) & 1 ? 3 - warp : warp;  // as in prefill.cu
        query_pass::attend_queries(shared, {q + b * q_b + h * q_h, q_t}, {q_far + b * qf_b + h * qf_h, qf_t}, grads,
                       {gate + b * g_b + h * g_h, g_t, lse + numbers, delta + numbers, weight + numbers,
                        dgate + numbers},
                       dq + b * dq_b + h * dq_h, dq_t, dq_far + b * dqf_b + h * dqf_h, dqf_t, last, length, sinks,
                       scale, scaling, block, lane);
    } else {
        long long out_at = b * o_b + h * o_h;
        query_pass::keep_keys(shared, {k + b * k_b + kv * k_h, k_t}, {v + b * v_b + kv * v_h, v_t},
                  {k_far + b * kf_b + kv * kf_h, kf_t}, grads, {out + out_at, o_t}, rest + out_at, last, length, sinks,
                  warp - ATTENDERS / 32, lane);
    }
}

// Grid B · H, 256 threads. dk, dv, dk_far: of every query head. Those of sinks are unfinished, but 0 in dk_far.
extern "C" __global__ void __launch_bounds__(ATTENDERS + KEEPERS, KEY_BLOCKS) key_gradient_kernel(
    const bf16* q, const bf16* k, const bf16* v, const bf16* q_far, const bf16* k_far, const bf16* grad,
    const float* lse, const float* delta, const float* weight, bf16* dk, bf16* dv, far_t* dk_far, int q_b, int q_h,
    int q_t, int k_b, int k_h, int k_t, int v_b, int v_h, int v_t, int qf_b, int qf_h, int qf_t, int kf_b, int kf_h,
    int kf_t, int do_b, int do_h, int do_t, int dk_b, int dk_h, int dk_t, int dv_b, int dv_h, int dv_t, int dkf_b,
    int dkf_h, int dkf_t, int length, int heads, int group, int sinks, float scale, float scaling) {
    DYNAMIC_SHARED(shared);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, last = (length - 1) / CHUNK;
    long long b = blockIdx.x / heads, h = blockIdx.x % heads, kv = h / group, numbers = (long long)blockIdx.x * length;
    if (warp < ATTENDERS / 32) {
        int block = (blockIdx.x / 132) & 1 ? 3 - warp : warp;
        key_pass::attend_keys(shared, {k + b * k_b + kv * k_h, k_t}, {v + b * v_b + kv * v_h, v_t},
                    {k_far + b * kf_b + kv * kf_h, kf_t}, dk + b * dk_b + h * dk_h, dk_t, dv + b * dv_b + h * dv_h,
                    dv_t, dk_far + b * dkf_b + h * dkf_h, dkf_t, last, length, sinks, scale, scaling, block, lane);
    } else {
        key_pass::keep_queries(shared, {q + b * q_b + h * q_h, q_t}, {q_far + b * qf_b + h * qf_h, qf_t},
                     {grad + b * do_b + h * do_h, do_t}, lse + numbers, delta + numbers, weight + numbers, last, length,
                     warp - ATTENDERS / 32, lane);
    }
}

// Grid (B · H, parts), 128 threads. dk, dv [parts, B · H, 16, 64] float32, each from `span` queries, a multiple of 64.
extern "C" __global__ void __launch_bounds__(128, SINK_BLOCKS) sink_gradient_kernel(
    const bf16* q, const bf16* k, const bf16* v, const bf16* grad, const float* lse, const float* delta, float* dk,
    float* dv, int q_b, int q_h, int q_t, int k_b, int k_h, int k_t, int v_b, int v_h, int v_t, int do_b, int do_h,
    int do_t, int length, int heads, int group, int sinks, int span, float scale, float scaling) {
    DYNAMIC_SHARED(shared);
    long long b = blockIdx.x / heads, h = blockIdx.x % heads, kv = h / group, numbers = (long long)blockIdx.x * length;
    long long part = ((long long)blockIdx.y * gridDim.x + blockIdx.x) * 1024;
    int first = blockIdx.y * span;
    sink_pass::sink_gradients(
        shared, {q + b * q_b + h * q_h, q_t}, {k + b * k_b + kv * k_h, k_t}, {v + b * v_b + kv * v_h, v_t},
        {grad + b * do_b + h * do_h, do_t}, lse + numbers, delta + numbers, dk + part, dv + part, first,
        min(first + span, length), length, sinks, scale, scaling, threadIdx.x / 32, threadIdx.x % 32);
}
