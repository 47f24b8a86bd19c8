// The warps of prefill.cu that load ahead and keep S, the sum over all chunks before.
#pragma once

// S transposed [values, 160 features], split over warps: `half` of the features, `side` says which 32 values.
// EntrySum: of the entries i from 8 · high on, in `Sum` both. sum[high][m][s]: C fragment of values 32 side + 16 m,
// step 5 half + s.
typedef float EntrySum[2][5][4];
typedef EntrySum Sum[2];

// k_far of a chunk turned: dims become rows. A thread then has 8 tokens of one dim in 16 bytes. Four warps.
__device__ __forceinline__ void turn_keys(unsigned char* turned, const unsigned char* far_tile, int warp, int lane) {
    int part = warp & 1, dims = warp >> 1;
    int token = 32 * part + 8 * ((lane & 7) >> 1) + 2 * (lane >> 3) + (lane & 1);
    unsigned r[4];
    load_matrices_transposed(r, far_tile + token * FAR_ROW + dims * 16);
    unsigned char* to = turned + (8 * dims + (lane >> 2)) * TURNED_ROW + (4 * part + (lane & 3)) * 16;
    uint4 eight = make_uint4(r[0], r[1], r[2], r[3]);
    *reinterpret_cast<uint4*>(to) = eight;
    if (8 * dims + (lane >> 2) < 9) *reinterpret_cast<uint4*>(to + MAP * TURNED_ROW) = eight;
}

// The chunk's values [32 of a side, 16 tokens] as A fragments, twice; tokens in the order in which turned keys have
// them.
__device__ __forceinline__ void load_values(unsigned (&a)[2][2][4], const unsigned char* v_tile, int part, int side,
                                            int lane) {
#pragma unroll
    for (int step = 0; step < 2; step++) {
        int token = 32 * part + 8 * ((lane & 7) >> 1) + 4 * step + 2 * (lane >> 4) + (lane & 1);
        unsigned place = tile_place(token, 4 * (side & 1) + (lane >> 3 & 1));
#pragma unroll
        for (int m = 0; m < 2; m++) load_matrices_transposed(a[m][step], v_tile + (place ^ (m << 5)));
    }
}

// sum += valuesᵀ · features of 32 tokens, part 0 or 1 of a chunk. values: as load_values gives them.
__device__ __forceinline__ void fold_entries(EntrySum& sum, const unsigned (&values)[2][2][4],
                                             const unsigned char* turned, int part, int high, int half, int lane) {
    int g = lane >> 2;
    const unsigned char* column = turned + (8 * high + g) * TURNED_ROW + (4 * part + (lane & 3)) * 16;
    uint4 x = *reinterpret_cast<const uint4*>(column);
    column += 5 * half * TURNED_ROW;
#pragma unroll
    for (int s = 0; s < 5; s++) {
        uint4 y = *reinterpret_cast<const uint4*>(column + s * TURNED_ROW);
        uint4 f = make_uint4(multiply_bf16(x.x, y.x), multiply_bf16(x.y, y.y), multiply_bf16(x.z, y.z),
                             multiply_bf16(x.w, y.w));
        if (s == 4 && half) f = x;  // step 9: x itself
        if (s == 3 && high && half) f.x = f.y = f.z = f.w = g == 0 ? ONES : 0;  // the upper half of step 8
#pragma unroll
        for (int m = 0; m < 2; m++) multiply_add(sum[m][s], values[m][0], f.x, f.y);
#pragma unroll
        for (int m = 0; m < 2; m++) multiply_add(sum[m][s], values[m][1], f.z, f.w);
    }
}

// The same for all entries. v_tile: of the first half of the columns; the second is `ring` bytes further.
__device__ __forceinline__ void fold(Sum& sum, const unsigned char* v_tile, unsigned ring,
                                     const unsigned char* turned, int part, int warp, int lane) {
    int half = warp & 1, side = warp >> 1;
    unsigned values[2][2][4];
    load_values(values, v_tile + (side >> 1) * ring, part, side, lane);
#pragma unroll
    for (int high = 0; high < 2; high++) fold_entries(sum[high], values, turned, part, high, half, lane);
}

constexpr int GRAM_WARP = 4 * (HALVES - 1);  // the warp that does it

// gram += Σ x xᵀ and Σ x over a chunk; one warp.
__device__ __forceinline__ void fold_gram(unsigned char* gram, const unsigned char* far_tile, int lane) {
    float4* fragments = reinterpret_cast<float4*>(gram);
    float* linear = reinterpret_cast<float*>(gram) + MAP * MAP + 2 * (lane & 3);
    float product[2][4], total[2][4];
#pragma unroll
    for (int n = 0; n < 2; n++) {
        float4 old = fragments[32 * n + lane];
        product[n][0] = old.x, product[n][1] = old.y, product[n][2] = old.z, product[n][3] = old.w;
        total[n][0] = total[n][2] = linear[8 * n], total[n][1] = total[n][3] = linear[8 * n + 1];
    }
    __syncwarp();
    const unsigned ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
    for (int step = 0; step < 4; step++) {
        unsigned x[4];  // as A: xᵀ [16 dims, 16 tokens]; as B: x [16 tokens, dims 0 … 7] is x0, x2, the others x1, x3
        int token = 16 * step + (lane & 7) + 8 * (lane >> 4);
        load_matrices_transposed(x, far_tile + token * FAR_ROW + (lane >> 3 & 1) * 16);
        multiply_add(product[0], x, x[0], x[2]);
        multiply_add(product[1], x, x[1], x[3]);
        multiply_add(total[0], ones, x[0], x[2]);
        multiply_add(total[1], ones, x[1], x[3]);
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
        fragments[32 * n + lane] = make_float4(product[n][0], product[n][1], product[n][2], product[n][3]);
        if (lane < 4) linear[8 * n] = total[n][0], linear[8 * n + 1] = total[n][1];
    }
}

// S as B fragments: word [step][pair of value tiles][lane][value tile][b0, b1].
__device__ __forceinline__ void write_sum(unsigned char* shared, const Sum& sum, int warp, int lane) {
    int half = warp & 1, side = warp >> 1;
#pragma unroll
    for (int s = 0; s < 5; s++) {
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const float(&low)[4] = sum[0][m][s], (&high)[4] = sum[1][m][s];
            int part = 4 * (5 * half + s) + 2 * (side & 1) + m;
            *reinterpret_cast<uint4*>(shared + SUM_AT + (side >> 1) * HALF_SUM + (part * 32 + lane) * 16) =
                make_uint4(pack_bf16(low[0], low[1]), pack_bf16(high[0], high[1]), pack_bf16(low[2], low[3]),
                           pack_bf16(high[2], high[3]));
        }
    }
}

// The sum of the segments before this one, from global memory.
__device__ __forceinline__ void start_sum(Sum& sum, unsigned char* gram, const float* sums, int num_sums, int thread) {
#pragma unroll
    for (int i = 0; i < 80; i++) (&sum[0][0][0][0])[i] = 0;
    float start[3] = {0, 0, 0};
    for (int s = 0; s < num_sums; s++, sums += SUM_FLOATS + GRAM_FLOATS) {
#pragma unroll
        for (int i = 0; i < 20; i++) {
            float4 more = reinterpret_cast<const float4*>(sums)[i * KEEPERS + thread];
            float(&c)[4] = sum[i / 10][i / 5 % 2][i % 5];
            c[0] += more.x, c[1] += more.y, c[2] += more.z, c[3] += more.w;
        }
#pragma unroll
        for (int i = 0; i < 3; i++)
            if (i * KEEPERS + thread < GRAM_FLOATS) start[i] += sums[SUM_FLOATS + i * KEEPERS + thread];
    }
#pragma unroll
    for (int i = 0; i < 3; i++)
        if (i * KEEPERS + thread < GRAM_FLOATS) reinterpret_cast<float*>(gram)[i * KEEPERS + thread] = start[i];
}

// Puts S and the normaliser into `staged` [153, V + 1], in the order and with the weights of Taylor.expand.
__device__ void stage_total(float* staged, const Sum& sum, const float* gram, int num_keys, int warp, int lane) {
    const float root_half = 0.70710678118654752f;
    int half = warp & 1, side = warp >> 1, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < 10; n++) {
        int step = 5 * half + n / 2;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            int i = 8 * (n & 1) + 2 * t + e;
            int row = step == 9 ? 1 + i : step == 8 && i >= 8 ? (i == 8 ? 0 : -1) : pair_row(i, (i + step) % MAP, MAP);
            if (row < 0) continue;
            float weight = step == 0 ? root_half : 1;
#pragma unroll
            for (int m = 0; m < 2; m++) {
                float* at = staged + row * (HEAD_DIM + 1) + 32 * side + 16 * m + g;
                at[0] = sum[n & 1][m][n / 2][e] * weight;
                at[8] = sum[n & 1][m][n / 2][2 + e] * weight;
            }
        }
    }
    for (int word = 32 * warp + lane; word < MAP * MAP; word += KEEPERS) {
        int of = word / 4 % 32, i = of / 4 + (word & 2) * 4, j = 2 * (of % 4) + (word & 1) + word / 128 * 8;
        if (i <= j) staged[pair_row(i, j, MAP) * (HEAD_DIM + 1) + HEAD_DIM] = gram[word] * (i == j ? root_half : 1);
    }
    if (warp == 0 && lane < MAP) staged[(1 + lane) * (HEAD_DIM + 1) + HEAD_DIM] = gram[MAP * MAP + lane];
    if (warp == 1 && lane == 0) staged[HEAD_DIM] = float(num_keys);
}

// Zeros for rows of a chunk's values and mapped keys that are not to be folded.
__device__ __forceinline__ void clear_from(unsigned char* v_tile, unsigned char* far_tile, int first_row, int thread) {
    for (int n = thread; n < HALVES * CHUNK * 8; n += KEEPERS) {
        int row = n / 8 % CHUNK;
        unsigned char* at = v_tile + n / (8 * CHUNK) * RING + row * 128 + n % 8 * 16;
        if (row >= first_row) *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
    }
    for (int n = thread; n < CHUNK * 2; n += KEEPERS)
        if (n / 2 >= first_row)
            *reinterpret_cast<uint4*>(far_tile + n / 2 * FAR_ROW + n % 2 * 16) = make_uint4(0, 0, 0, 0);
}

// After the last chunk: folds what has left the window of the next token, and writes State.total [153, V + 1]. before,
// now: places of the last two chunks in the rings.
constexpr int FINAL_MEETINGS = 6;
__device__ __forceinline__ void write_total(float* total, Sum& sum, unsigned char* shared, int last, int before,
                                            int now, int end, int sinks, int warp, int lane) {
    int thread = 32 * warp + lane, rest = end - last * CHUNK;  // how many tokens of the last chunk
    unsigned char *v_before = shared + V_AT + before * TILE, *v_now = shared + V_AT + now * TILE;
    unsigned char *far_before = shared + K_FAR_AT + before * FAR_TILE, *far_now = shared + K_FAR_AT + now * FAR_TILE;
    meet();
    clear_from(v_before, far_before, CHUNK + rest, thread);
    clear_from(v_now, far_now, rest, thread);
    meet();
#pragma unroll 1
    for (int again = 0; again < 2; again++) {
        if (again ? rest > 0 : last > 0) {
#pragma unroll 1  // once a text: registers are worth more than time here
            for (int part = 0; part < 2; part++)
                fold(sum, again ? v_now : v_before, RING, shared + TURNED_AT, part, warp, lane);
            if (warp == 0) fold_gram(shared + GRAM_AT, again ? far_now : far_before, lane);
        }
        meet();
        if (!again) {
            if (warp < 4) turn_keys(shared + TURNED_AT, far_now, warp, lane);
            meet();
        }
    }
    float* staged = reinterpret_cast<float*>(shared);
    stage_total(staged, sum, reinterpret_cast<float*>(shared + GRAM_AT), max(end - sinks, 0), warp, lane);
    meet();
    for (int i = thread; i < NUM_FEATURES * (HEAD_DIM + 1); i += KEEPERS) total[i] = staged[i];
}

// The role of half the warps: loads ahead, keeps the sum, writes it for the others.
__device__ __forceinline__ void keep_sum(unsigned char* shared, Rows k, Rows v, Rows k_far, const float* sums,
                                         int num_sums, float* total, int first, int last, int length, int sinks,
                                         int warp, int lane) {
    int half = warp / 4, in_half = 32 * (warp % 4) + lane;  // of the columns that this thread loads
    auto load = [&](int chunk, int place) {
        int token = chunk * CHUNK;
        copy_tile(shared + K_AT + half * RING + place * TILE, k, token, CHUNK, 0, length, 64 * half, in_half);
        copy_tile(shared + V_AT + half * RING + place * TILE, v, token, CHUNK, sinks, length, 64 * half, in_half);
        if (warp < 4) copy_far_tile(shared + K_FAR_AT + place * FAR_TILE, k_far, token, sinks, length, in_half);
    };
    load(first - 1, 0);
    load(first, 1);
    if (SINKS) {
        copy_tile(shared + SINK_K_AT + half * SINK_TILE, k, 0, 16, 0, min(sinks, length), 64 * half, in_half);
        copy_tile(shared + SINK_V_AT + half * SINK_TILE, v, 0, 16, 0, min(sinks, length), 64 * half, in_half);
    }
    Sum sum;
    start_sum(sum, shared + GRAM_AT, sums, num_sums, 32 * warp + lane);
    write_sum(shared, sum, warp, lane);
    wait_for_copies();
    meet();
    if (warp < 4) turn_keys(shared + TURNED_AT, shared + K_FAR_AT, warp, lane);
    int before = 0, now = 1;  // places of chunks c - 1 and c in the rings
#pragma unroll 1
    for (int c = first; c < last; c++) {
        wait_for_copies();
        meet();  // A
#pragma unroll
        for (int part = 0; part < 2; part++)
            fold(sum, shared + V_AT + before * TILE, RING, shared + TURNED_AT, part, warp, lane);
        meet();  // B
        load(c + 1, next_in_ring(now));  // later than it could be: fewer registers live in fold
        write_sum(shared, sum, warp, lane);
        if (warp == GRAM_WARP) fold_gram(shared + GRAM_AT, shared + K_FAR_AT + before * FAR_TILE, lane);
        if (warp < 4) turn_keys(shared + TURNED_AT, shared + K_FAR_AT + now * FAR_TILE, warp, lane);
        before = now, now = next_in_ring(now);
    }
    wait_for_copies();
    meet();  // A
    meet();  // B
    if (total) write_total(total, sum, shared, last, before, now, length - CHUNK + 1, sinks, warp, lane);
}
