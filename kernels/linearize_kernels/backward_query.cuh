// The pass over queries of backward.cu, forward in time: gradients of q, q_far and the gate, and two numbers a query
// that the other kernels need.
#pragma once

// What the sum over older chunks gives to dq_far and the gate.
__device__ __forceinline__ void older_keys(float (&dq_far)[2][4], QuerySums& sums, const unsigned (&rows_grad)[4][4],
                                           const Mapped& x, const float (&delta)[2], const unsigned char* sum,
                                           const unsigned char* gram, int num_keys, int lane) {
    float norm[2][4], value[2] = {};
    feature_gradient(dq_far, sums.far, rows_grad, x, sum, lane);
    gram_gradient(norm, value, gram, x, lane);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if ((lane & 3) == 0) value[r] += num_keys;
        sums.far[r] -= delta[r] * value[r];
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) dq_far[n][2 * r + e] -= delta[r] * norm[n][2 * r + e];
    }
}

namespace query_pass {

// Keys that may be exact: five tiles of chunks c - 1 and c, and the sinks. before: place of chunk c - 1 in the rings;
// first: its keys before this place are none.
__device__ __forceinline__ void near_keys(float (&acc)[8][4], float (&acc_far)[2][4], QuerySums& sums,
                                          const unsigned (&rows_grad)[4][4], const unsigned (&mapped)[4],
                                          const unsigned char* shared, int before, int first, int token, int block,
                                          const float (&lse)[2], const float (&delta)[2], int sinks, float scale,
                                          int lane) {
    const unsigned char* keys_far = shared + K_FAR_AT + before * FAR_TILE;
    Scores dp;
    const TileRows rows_q = {shared + Q_AT, block};
#pragma unroll UNROLL
    for (int n = 0; n < 5; n++) {
        unsigned turn = (block + n) % 2 * 64, at = find_tile(before, block + n);
        int low = first - 16 * (block + n);
        auto visible = [&](int i, int key) { return key >= low && (n > 0 || key > i) && (n < 4 || key <= i); };
        exact_queries<false>(acc, sums, dp, rows_grad, rows_q, shared + K_AT + at, shared + V_AT + at, turn, lse, delta,
                             scale, 8, visible, lane);
        if (n == 0) {
            auto far = [&](int i, int key) { return key >= low && key <= i; };
            far_queries(acc_far, sums, dp, mapped, keys_far + 16 * block * FAR_ROW, far, lane);
        }
    }
    if (SINKS) {
        auto visible = [&](int i, int key) { return key < sinks && key <= token + i; };
        exact_queries<false>(acc, sums, dp, rows_grad, rows_q, shared + SINK_K_AT, shared + SINK_V_AT, 0, lse, delta,
                             scale, SINKS > 8 ? 8 : 4, visible, lane);
    }
}

// The tiles of chunk c - 1 that are all far.
__device__ __forceinline__ void far_keys(float (&acc_far)[2][4], QuerySums& sums, const unsigned (&rows_grad)[4][4],
                                         const unsigned (&mapped)[4], const unsigned char* shared, int before,
                                         int first, int block, const float (&delta)[2], int lane) {
    const unsigned char* keys_far = shared + K_FAR_AT + before * FAR_TILE;
#pragma unroll 1
    for (int tile = 0; tile < block; tile++) {
        Scores dp;
        multiply_grads(dp, rows_grad, shared + V_AT + before * TILE + tile * 2048, tile % 2 * 64, delta, lane);
        auto far = [&](int, int key) { return key >= first - 16 * tile; };
        far_queries(acc_far, sums, dp, mapped, keys_far + 16 * tile * FAR_ROW, far, lane);
    }
}

// The role of half the warps: rows 16 block … of every chunk.
__device__ __forceinline__ void attend_queries(unsigned char* shared, Rows q, Rows q_far, Rows grad,
                                               const QueryNumbers& numbers, bf16* dq, int dq_stride, far_t* dq_far,
                                               int dq_far_stride, int last, int length, int sinks, float scale,
                                               float scaling, int block, int lane) {
    int row = 16 * block, g = lane >> 2;
    unsigned char* far_rows = shared + Q_FAR_AT + row * Q_FAR_ROW;
    copy_queries(shared + Q_AT, q, row, row, length, lane);
    copy_queries(shared + GRAD_AT, grad, row, row, length, lane);
    copy_far_queries(far_rows, q_far, 0, row, length, lane);
    wait_for_copies();
    meet();
    int before = 0;
#pragma unroll 1
    for (int c = 0; c <= last; c++) {
        int token = c * CHUNK + row;
        float lse[2], far_weight[2], delta[2], acc[8][4] = {}, acc_far[2][4] = {};
        QuerySums sums = {};
        load_weights(lse, far_weight, numbers, token, length, CHUNK, {sinks, sinks}, lane);
        wait_for_copies();
        meet();  // A
        Mapped x;
        unsigned rows_grad[4][4];
        load_rows(rows_grad, shared + GRAD_AT, block, lane);
        load_mapped(x, far_rows, lane);
#pragma unroll
        for (int r = 0; r < 2; r++)
            delta[r] = reinterpret_cast<float*>(shared + DELTA_AT)[c % 2 * CHUNK + row + g + 8 * r];
        __syncwarp();
        if (c < last) {
            copy_queries(shared + GRAD_AT, grad, row, token + CHUNK, length, lane);
            copy_far_queries(far_rows, q_far, 0, token + CHUNK, length, lane);
        }
        if (c > 1)
            older_keys(acc_far, sums, rows_grad, x, delta, shared + SUM_AT, shared + GRAM_AT + c % 2 * GRAM_BYTES,
                       (c - 1) * CHUNK - sinks, lane);
        meet();  // B
        const unsigned mapped[4] = {x[0][0], x[1][0], x[0][4], x[1][4]};
        int first = sinks - (c - 1) * CHUNK;  // keys of chunk c - 1 before this place are none
        near_keys(acc, acc_far, sums, rows_grad, mapped, shared, before, first, token, block, lse, delta, sinks, scale,
                  lane);
        __syncwarp();
        if (c < last) copy_queries(shared + Q_AT, q, row, token + CHUNK, length, lane);
        far_keys(acc_far, sums, rows_grad, mapped, shared, before, first, block, delta, lane);
        store_numbers(numbers, sums, far_weight, delta, token, length, lane);
        store_gradient(dq, dq_stride, acc, scaling, token, length, lane);
        store_mapped(dq_far, dq_far_stride, acc_far, far_weight, token, length, lane);
        before = next_in_ring(before);
    }
}

// The role of the others: they load keys ahead, find delta, and keep the sum over keys.
__device__ __forceinline__ void keep_keys(unsigned char* shared, Rows k, Rows v, Rows k_far, Rows grad, Rows out,
                                          const bf16* rest, int last, int length, int sinks, int warp, int lane) {
    int thread = 32 * warp + lane;
    auto load = [&](int chunk, int place) {
        int token = chunk * CHUNK;
        copy_tile(shared + K_AT + place * TILE, k, token, CHUNK, 0, length, 0, thread);
        copy_tile(shared + V_AT + place * TILE, v, token, CHUNK, sinks, length, 0, thread);
        copy_far_tile(shared + K_FAR_AT + place * FAR_TILE, k_far, token, sinks, length, thread);
    };
    auto delta = [&](int c) {
        float* to = reinterpret_cast<float*>(shared + DELTA_AT) + c % 2 * CHUNK;
        find_delta(to, grad, out, rest, c * CHUNK, length, thread);
    };
    load(-1, 0);
    load(0, 1);
    if (SINKS) {
        copy_tile(shared + SINK_K_AT, k, 0, 16, 0, min(sinks, length), 0, thread);
        copy_tile(shared + SINK_V_AT, v, 0, 16, 0, min(sinks, length), 0, thread);
    }
    for (int i = thread; i < 2 * GRAM_FLOATS; i += KEEPERS) reinterpret_cast<float*>(shared + GRAM_AT)[i] = 0;
    delta(0);
    FeatureSum sum = {};
    wait_for_copies();
    meet();
    turn_rows(shared + TURNED_AT, shared + K_FAR_AT, warp, lane);
    int before = 0, now = 1;
#pragma unroll 1
    for (int c = 0; c < last; c++) {
        wait_for_copies();
        meet();  // A
        fold_rows<false>(sum, shared + V_AT + before * TILE, shared + TURNED_AT, shared + TURNED_AT, warp, lane);
        if (warp == 0)
            add_gram(shared + GRAM_AT + (c + 1) % 2 * GRAM_BYTES, shared + GRAM_AT + c % 2 * GRAM_BYTES,
                     shared + TURNED_AT, shared + TURNED_AT, lane);
        meet();  // B
        load(c + 1, next_in_ring(now));
        write_rows(shared + SUM_AT, sum, warp, lane);
        turn_rows(shared + TURNED_AT, shared + K_FAR_AT + now * FAR_TILE, warp, lane);
        delta(c + 1);
        before = now, now = next_in_ring(now);
    }
    wait_for_copies();
    meet();  // A
    meet();  // B
}

}  // namespace query_pass
