// The pass over keys of backward.cu, backward in time: gradients of k, v and k_far. Scores are transposed: rows are
// keys, columns queries. Also the sinks' gradients, which all queries give.
#pragma once

// What the sum over newer chunks gives to values and mapped keys.
__device__ __forceinline__ void newer_queries(KeyGradients& to, const unsigned char* values, int block, const Mapped& x,
                                              const unsigned char* sum, const unsigned char* gram, int lane) {
    unsigned rows[4][4];
    float norm[2][4], unused[2] = {};
    load_rows(rows, values, block, lane);
    feature_gradient(to.k_far, unused, rows, x, sum, lane);
    gram_gradient(norm, unused, gram, x, lane);
#pragma unroll
    for (int i = 0; i < 8; i++) to.k_far[i / 4][i % 4] += norm[i / 4][i % 4];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        unsigned a[4];
        make_features(a, x, s, lane & 3);
        add_values(to.v, a, sum + s * 2048, s % 2 * 64, lane);
    }
}

__device__ __forceinline__ int previous_in_ring(int place) { return place == 0 ? 2 : place - 1; }

namespace key_pass {

// add_queries of the tile at a place in the rings, in bytes.
template <bool EXACT, bool FAR, class Exact, class Far>
__device__ __forceinline__ void add_tile(KeyGradients& to, const unsigned char* shared, int block, unsigned at,
                                         const unsigned (&mapped)[4], float scale, Exact exact, Far far, int lane) {
    int tile = at / 2048;
    const float* numbers = reinterpret_cast<const float*>(shared + NUMBERS_AT + tile / 4 * NUMBERS) + tile % 4 * 16;
    add_queries<EXACT, FAR, false>(to, TileRows{shared + K_AT, block}, TileRows{shared + V_AT, block},
                                   shared + Q_AT + at, shared + GRAD_AT + at, tile % 2 * 64, numbers, mapped,
                                   shared + Q_FAR_AT + tile * 16 * FAR_ROW, scale, exact, far, lane);
}

// The role of half the warps: keys 16 block … of every chunk.
__device__ __forceinline__ void attend_keys(unsigned char* shared, Rows k, Rows v, Rows k_far, bf16* dk, int dk_stride,
                                            bf16* dv, int dv_stride, far_t* dk_far, int dk_far_stride, int last,
                                            int length, int sinks, float scale, float scaling, int block, int lane) {
    int row = 16 * block, g = lane >> 2;
    unsigned char* far_rows = shared + K_FAR_AT + row * Q_FAR_ROW;
    copy_queries(shared + K_AT, k, row, last * CHUNK + row, length, lane);
    copy_queries(shared + V_AT, v, row, last * CHUNK + row, length, lane);
    copy_far_queries(far_rows, k_far, 0, last * CHUNK + row, length, lane);
    wait_for_copies();
    meet();
    int now = 0;
#pragma unroll 1
    for (int c = last; c >= 0; c--) {
        int token = c * CHUNK + row;
        KeyGradients sums = {};
        wait_for_copies();
        meet();  // A
        Mapped x;
        load_mapped(x, far_rows, lane);
        const unsigned mapped[4] = {x[0][0], x[1][0], x[0][4], x[1][4]};
        if (c + 2 <= last)
            newer_queries(sums, shared + V_AT, block, x, shared + SUM_AT, shared + GRAM_AT + c % 2 * GRAM_BYTES, lane);
        __syncwarp();
        if (c > 0) copy_far_queries(far_rows, k_far, 0, token - CHUNK, length, lane);
        meet();  // B
        auto all = [](int, int) { return true; };
#pragma unroll UNROLL
        for (int n = 0; n < 4; n++)
            add_tile<true, false>(sums, shared, block, find_tile(now, block + n), mapped, scale,
                                  [&](int key, int query) { return n > 0 || query >= key; }, all, lane);
        add_tile<true, true>(sums, shared, block, find_tile(now, block + 4), mapped, scale,
                             [](int key, int query) { return query < key; },
                             [](int key, int query) { return query >= key; }, lane);
        __syncwarp();
        if (c > 0) copy_queries(shared + K_AT, k, row, token - CHUNK, length, lane);
#pragma unroll 1
        for (int tile = block + 1; tile < 4; tile++)
            add_tile<false, true>(sums, shared, block, next_in_ring(now) * TILE + tile * 2048, mapped, scale, all, all,
                                  lane);
        __syncwarp();
        if (c > 0) copy_queries(shared + V_AT, v, row, token - CHUNK, length, lane);
        const float is_far[2] = {token + g >= sinks ? 1.0f : 0.0f, token + g + 8 >= sinks ? 1.0f : 0.0f};
        store_gradient(dk, dk_stride, sums.k, scaling, token, length, lane);
        store_gradient(dv, dv_stride, sums.v, 1, token, length, lane);
        store_mapped(dk_far, dk_far_stride, sums.k_far, is_far, token, length, lane);
        now = previous_in_ring(now);
    }
}

// Mapped queries of a chunk turned: as they are, times their weights (row 16: the weights), times -weight · delta.
__device__ __forceinline__ void turn_queries(unsigned char* shared, int place, int warp, int lane) {
    TurnedPiece x = turn_piece(shared + Q_FAR_AT + place * FAR_TILE, warp, lane);
    const float* delta = reinterpret_cast<const float*>(shared + NUMBERS_AT + place * NUMBERS) + CHUNK + 8 * x.piece;
    const unsigned words[4] = {x.eight.x, x.eight.y, x.eight.z, x.eight.w};
    unsigned weighed[4], deltas[4], weights[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float w0 = delta[CHUNK + 2 * i], w1 = delta[CHUNK + 2 * i + 1];
        float x0 = w0 * low_float(words[i]), x1 = w1 * high_float(words[i]);
        weights[i] = pack_bf16(w0, w1);
        weighed[i] = pack_bf16(x0, x1);
        deltas[i] = pack_bf16(-delta[2 * i] * x0, -delta[2 * i + 1] * x1);
    }
    unsigned at = x.dim * TURNED_ROW + x.piece * 16;
    *reinterpret_cast<uint4*>(shared + TURNED_AT + at) = x.eight;
    *reinterpret_cast<uint4*>(shared + WEIGHED_AT + at) = make_uint4(weighed[0], weighed[1], weighed[2], weighed[3]);
    *reinterpret_cast<uint4*>(shared + DELTAS_AT + at) = make_uint4(deltas[0], deltas[1], deltas[2], deltas[3]);
    if (x.dim == 0)
        *reinterpret_cast<uint4*>(shared + WEIGHED_AT + TURNED_TILE + at) =
            make_uint4(weights[0], weights[1], weights[2], weights[3]);
}

// The role of the others: they load queries ahead and keep the sum over queries.
__device__ __forceinline__ void keep_queries(unsigned char* shared, Rows q, Rows q_far, Rows grad, const float* lse,
                                             const float* delta, const float* weight, int last, int length, int warp,
                                             int lane) {
    int thread = 32 * warp + lane;
    auto load = [&](int chunk, int place) {
        int token = chunk * CHUNK;
        copy_tile(shared + Q_AT + place * TILE, q, token, CHUNK, 0, length, 0, thread);
        copy_tile(shared + GRAD_AT + place * TILE, grad, token, CHUNK, 0, length, 0, thread);
        copy_far_tile(shared + Q_FAR_AT + place * FAR_TILE, q_far, token, 0, length, thread);
        load_numbers(reinterpret_cast<float*>(shared + NUMBERS_AT + place * NUMBERS), lse, delta, weight, token, length,
                     thread);
    };
    load(last + 1, 1);
    load(last, 0);
    for (int i = thread; i < 2 * GRAM_FLOATS; i += KEEPERS) reinterpret_cast<float*>(shared + GRAM_AT)[i] = 0;
    FeatureSum sum = {};
    wait_for_copies();
    meet();
    turn_queries(shared, 1, warp, lane);
    int now = 0;
#pragma unroll 1
    for (int c = last; c > 0; c--) {
        wait_for_copies();
        meet();  // A
        fold_rows<true>(sum, shared + GRAD_AT + next_in_ring(now) * TILE, shared + TURNED_AT, shared + WEIGHED_AT, warp,
                        lane);
        if (warp == 0)
            add_gram(shared + GRAM_AT + (c + 1) % 2 * GRAM_BYTES, shared + GRAM_AT + c % 2 * GRAM_BYTES,
                     shared + DELTAS_AT, shared + TURNED_AT, lane);
        meet();  // B
        load(c - 1, previous_in_ring(now));
        write_rows(shared + SUM_AT, sum, warp, lane);
        turn_queries(shared, now, warp, lane);
        now = previous_in_ring(now);
    }
    wait_for_copies();
    meet();  // A
    meet();  // B
}

}  // namespace key_pass

namespace sink_pass {

// Gradients of up to 16 sinks from queries first … end: dk and dv [16, 64] float32. 128 threads; a warp takes every
// fourth tile of sixteen queries.
__device__ __forceinline__ void sink_gradients(unsigned char* shared, Rows q, Rows k, Rows v, Rows grad,
                                               const float* lse, const float* delta, float* dk, float* dv, int first,
                                               int end, int length, int sinks, float scale, float scaling, int warp,
                                               int lane) {
    int thread = 32 * warp + lane;
    auto load = [&](int token, int at) {
        copy_tile(shared + Q_AT + at * TILE, q, token, CHUNK, 0, length, 0, thread);
        copy_tile(shared + GRAD_AT + at * TILE, grad, token, CHUNK, 0, length, 0, thread);
        load_numbers(reinterpret_cast<float*>(shared + NUMBERS_AT) + at * 2 * CHUNK, lse, delta, nullptr, token, length,
                     thread);
    };
    copy_tile(shared + K_AT, k, 0, 16, 0, min(sinks, length), 0, thread);
    copy_tile(shared + V_AT, v, 0, 16, 0, min(sinks, length), 0, thread);
    load(first, 0);
    KeyGradients sums = {};
    const unsigned unused[4] = {};
    int at = 0;
#pragma unroll 1
    for (int token = first; token < end; token += CHUNK) {
        wait_for_copies();
        meet();
        if (token + CHUNK < end) load(token + CHUNK, at ^ 1);
        auto exact = [&](int key, int query) { return key < sinks && token + 16 * warp + query >= key; };
        unsigned rows = at * TILE + warp * 2048;
        add_queries<true, false, false>(
            sums, TileRows{shared + K_AT, 0}, TileRows{shared + V_AT, 0}, shared + Q_AT + rows, shared + GRAD_AT + rows,
            warp % 2 * 64, reinterpret_cast<const float*>(shared + NUMBERS_AT) + at * 2 * CHUNK + 16 * warp, unused,
            nullptr, scale, exact, exact, lane);
        at ^= 1;
        meet();
    }
    float* parts = reinterpret_cast<float*>(shared);  // one a warp, of dk and dv
    float* mine = parts + warp * 2048 + (lane >> 2) * 64 + (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            store_pair(mine + r * 512 + n * 8, sums.k[n][2 * r] * scaling, sums.k[n][2 * r + 1] * scaling);
            store_pair(mine + 1024 + r * 512 + n * 8, sums.v[n][2 * r], sums.v[n][2 * r + 1]);
        }
    meet();
    for (int i = thread; i < 1024; i += 128) {
        dk[i] = parts[i] + parts[2048 + i] + (parts[4096 + i] + parts[6144 + i]);
        dv[i] = parts[1024 + i] + parts[3072 + i] + (parts[5120 + i] + parts[7168 + i]);
    }
}

}  // namespace sink_pass
