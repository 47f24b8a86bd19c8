// Backward of hybrid attention with small maps: bfloat16, head and value dim 64, map dim up to 4, any window, several
// texts a row, up to 16 sinks a text. The function is reference.py's; the maths and what the forward leaves (out, what
// its rounding lost, lse) are gradient_kernels.py's; the launcher is cuda_backward_small.py.
//
// With 16 features a sum over far tokens is small: 16 x 64 numbers a chunk of 64 tokens, where the chunk has 64 x 64 of
// each tensor. So all sums are written to memory first, and passes over tiles of 64 are independent of each other, as
// in flash attention: a tile of queries takes keys by pairs from the boundary of the newest chunk that is far for all of
// it, and older ones by the sum at this boundary; a tile of keys takes queries likewise. Four kernels:
//   key_sum    S at each boundary: Σ features(k_far) ⊗ [v, 1] over the keys before it,
//   query      gradients of q, q_far and gate; delta and weight, a number a query each,
//   query_sum  R at each boundary: Σ weight · features(q_far) ⊗ [grad, -delta] over the queries from it on,
//   key        gradients of k, v and k_far, over all query heads of a group.
// A sum has the tokens of one text: S of that of the boundary's slot, R of that of the slot before. Texts (DOCUMENTS)
// are known by their first and last slots, which do not fall along a row. FROZEN: q, k and v need no gradients; then
// exact pairs matter only for the correction of delta (see gradient_kernels.py), in the query pass.
//
// Features of [x0 … x3], of which lane t of four has 2t, 2t + 1, 2t + 8 and 2t + 9: x_t², x_t, x_t x_(t+1), and one of
// x0 x2, x1 x3, 1, 0. The side that is summed has half the squares.
#include "primitives.cuh"
#include "tensor_cores.cuh"

#include "prefill_tiles.cuh"
#include "prefill_attend.cuh"
#define SMALL_MAP 1
#ifndef FROZEN
#define FROZEN 0
#endif
#ifndef TILES_AT_ONCE
#define TILES_AT_ONCE 1
#endif
#include "backward_tiles.cuh"
#include "backward_pairs.cuh"
#include "backward_small_sum.cuh"
#include "backward_small_query.cuh"
#include "backward_small_key.cuh"

#ifndef QUERY_BLOCKS
#define QUERY_BLOCKS (FROZEN ? 4 : 3)  // blocks that share a multiprocessor
#endif
#ifndef KEY_BLOCKS
#define KEY_BLOCKS (FROZEN ? 5 : 3)
#endif

// All: 128 threads. Strides in elements: of batch, head, token; rest lies as out. Mapped vectors have 8 numbers, of
// which the last four are 0. lse, delta, weight, dgate [B, H, T] float32. firsts, lasts [B, T]: slots of each slot's
// text. S [B · G, chunks, 16, 64] and R [B · H, chunks, 16, 64] bfloat16, their normalisers [… , chunks, 16] float32, at
// the boundaries before each chunk.

// Grid B · G.
extern "C" __global__ void __launch_bounds__(128) key_sum_kernel(
    const bf16* k_far, const bf16* v, const int* firsts, bf16* sums, float* norms, int kf_b, int kf_h, int kf_t,
    int v_b, int v_h, int v_t, int length, int groups, int sinks) {
    DYNAMIC_SHARED(shared);
    long long b = blockIdx.x / groups, h = blockIdx.x % groups, chunks = (length + CHUNK - 1) / CHUNK;
    small_sum::Tokens from = {{k_far + b * kf_b + h * kf_h, kf_t}, {v + b * v_b + h * v_h, v_t}, nullptr, nullptr};
    small_sum::sum_tokens<false>(shared, from, firsts + b * length, sums + blockIdx.x * chunks * SMALL_SUM,
                                 norms + blockIdx.x * chunks * FEATURES, length, sinks, threadIdx.x);
}

// Grid B · H.
extern "C" __global__ void __launch_bounds__(128) query_sum_kernel(
    const bf16* q_far, const bf16* grad, const float* weight, const float* delta, const int* lasts, bf16* sums,
    float* norms, int qf_b, int qf_h, int qf_t, int do_b, int do_h, int do_t, int length, int heads) {
    DYNAMIC_SHARED(shared);
    long long b = blockIdx.x / heads, h = blockIdx.x % heads, chunks = (length + CHUNK - 1) / CHUNK;
    long long numbers = (long long)blockIdx.x * length;
    small_sum::Tokens from = {{q_far + b * qf_b + h * qf_h, qf_t}, {grad + b * do_b + h * do_h, do_t}, weight + numbers,
                              delta + numbers};
    small_sum::sum_tokens<true>(shared, from, lasts + b * length, sums + blockIdx.x * chunks * SMALL_SUM,
                                norms + blockIdx.x * chunks * FEATURES, length, 0, threadIdx.x);
}

// Grid (tiles of 64 queries, B · H). delta corrected, weight 0 where nothing is far. dq only unless FROZEN.
extern "C" __global__ void __launch_bounds__(128, QUERY_BLOCKS) query_kernel(
    const bf16* q, const bf16* k, const bf16* v, const bf16* q_far, const bf16* k_far, const float* gate,
    const bf16* out, const bf16* rest, const bf16* grad, const float* lse, const int* firsts, const bf16* sums,
    const float* norms, float* delta, float* weight, bf16* dq, far_t* dq_far, float* dgate, int q_b, int q_h, int q_t,
    int k_b, int k_h, int k_t, int v_b, int v_h, int v_t, int qf_b, int qf_h, int qf_t, int kf_b, int kf_h, int kf_t,
    int g_b, int g_h, int g_t, int o_b, int o_h, int o_t, int do_b, int do_h, int do_t, int dq_b, int dq_h, int dq_t,
    int dqf_b, int dqf_h, int dqf_t, int length, int heads, int group, int window, int sinks, float scale,
    float scaling) {
    DYNAMIC_SHARED(shared);
    long long b = blockIdx.y / heads, h = blockIdx.y % heads, kv = h / group, numbers = (long long)blockIdx.y * length;
    long long sum = (b * (heads / group) + kv) * gridDim.x, out_at = b * o_b + h * o_h;
    small_query::Inputs from = {{q + b * q_b + h * q_h, q_t}, {k + b * k_b + kv * k_h, k_t},
                                {v + b * v_b + kv * v_h, v_t}, {q_far + b * qf_b + h * qf_h, qf_t},
                                {k_far + b * kf_b + kv * kf_h, kf_t}, {grad + b * do_b + h * do_h, do_t},
                                {out + out_at, o_t}, rest + out_at, firsts + b * length, sums + sum * SMALL_SUM,
                                norms + sum * FEATURES};
    small_query::attend(shared, from,
                        {gate + b * g_b + h * g_h, g_t, lse + numbers, delta + numbers, weight + numbers,
                         dgate + numbers},
                        dq + b * dq_b + h * dq_h, dq_t, dq_far + b * dqf_b + h * dqf_h, dqf_t, blockIdx.x, length,
                        window, sinks, scale, scaling, threadIdx.x);
}

// Grid (tiles of 64 keys, B · G), H = G · group. dk, dv only unless FROZEN.
extern "C" __global__ void __launch_bounds__(128, KEY_BLOCKS) key_kernel(
    const bf16* q, const bf16* k, const bf16* v, const bf16* q_far, const bf16* k_far, const bf16* grad,
    const float* lse, const float* delta, const float* weight, const int* firsts, const int* lasts, const bf16* sums,
    const float* norms, bf16* dk, bf16* dv, far_t* dk_far, int q_b, int q_h, int q_t, int k_b, int k_h, int k_t,
    int v_b, int v_h, int v_t, int qf_b, int qf_h, int qf_t, int kf_b, int kf_h, int kf_t, int do_b, int do_h, int do_t,
    int dk_b, int dk_h, int dk_t, int dv_b, int dv_h, int dv_t, int dkf_b, int dkf_h, int dkf_t, int length,
    int groups, int group, int window, int sinks, float scale, float scaling) {
    DYNAMIC_SHARED(shared);
    long long b = blockIdx.y / groups, kv = blockIdx.y % groups, h = kv * group;
    long long head = b * groups * group + h, numbers = head * length, sum = head * gridDim.x;
    small_key::Inputs from = {{k + b * k_b + kv * k_h, k_t}, {v + b * v_b + kv * v_h, v_t},
                              {k_far + b * kf_b + kv * kf_h, kf_t}, {q + b * q_b + h * q_h, q_t}, q_h,
                              {q_far + b * qf_b + h * qf_h, qf_t}, qf_h, {grad + b * do_b + h * do_h, do_t}, do_h,
                              lse + numbers, delta + numbers, weight + numbers, firsts + b * length, lasts + b * length,
                              sums + sum * SMALL_SUM, norms + sum * FEATURES};
    small_key::attend(shared, from, dk + b * dk_b + kv * dk_h, dk_t, dv + b * dv_b + kv * dv_h, dv_t,
                      dk_far + b * dkf_b + kv * dkf_h, dkf_t, blockIdx.x, length, group, window, sinks, scale, scaling,
                      threadIdx.x);
}
