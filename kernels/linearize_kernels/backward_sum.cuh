// Sums of features ⊗ rows, kept by four warps, and the way back through a sum: from slopes of features to a gradient of
// the mapped vector. Both passes of backward.cu. Features as prefill.cu has them.
#pragma once

// A warp has features of steps 5 half … 5 half + 4 and columns 32 side …. sum[s][n]: C fragment of one step's sixteen
// features, columns 32 side + 8 n.
typedef float FeatureSum[5][4][4];

// Place of dim `dim` (mod 16), eight tokens from 8 piece on.
__device__ __forceinline__ const uint4& turned_at(const unsigned char* turned, int dim, int piece) {
    return *reinterpret_cast<const uint4*>(turned + (dim & (MAP - 1)) * TURNED_ROW + piece * 16);
}

// Mapped vectors of a chunk turned: dims become rows. Of dim 8 dims + g, this lane gets tokens 8 piece … 8 piece + 7.
struct TurnedPiece {
    int dim, piece;
    uint4 eight;
};

__device__ __forceinline__ TurnedPiece turn_piece(const unsigned char* far_tile, int warp, int lane) {
    int part = warp & 1, dims = warp >> 1;
    int token = 32 * part + 8 * ((lane & 7) >> 1) + 2 * (lane >> 3) + (lane & 1);
    unsigned r[4];
    load_matrices_transposed(r, far_tile + token * FAR_ROW + dims * 16);
    return {8 * dims + (lane >> 2), 4 * part + (lane & 3), make_uint4(r[0], r[1], r[2], r[3])};
}

__device__ __forceinline__ void turn_rows(unsigned char* turned, const unsigned char* far_tile, int warp, int lane) {
    TurnedPiece x = turn_piece(far_tile, warp, lane);
    *reinterpret_cast<uint4*>(turned + x.dim * TURNED_ROW + x.piece * 16) = x.eight;
}

// sum += featuresᵀ · rows of a chunk. weighed: where queries have weights, their vectors times these, and as row 16 the
// weights; else turned itself.
template <bool WEIGHED>
__device__ __forceinline__ void fold_rows(FeatureSum& sum, const unsigned char* rows, const unsigned char* turned,
                                          const unsigned char* weighed, int warp, int lane) {
    int half = warp & 1, side = warp >> 1, g = lane >> 2;
#pragma unroll 1
    for (int part = 0; part < 2; part++) {  // 32 tokens
        int piece = 4 * part + (lane & 3);
        unsigned b[2][2][4];
        load_values(b, rows, part, side, lane);
        uint4 x[2] = {turned_at(weighed, g, piece), turned_at(weighed, 8 + g, piece)};
#pragma unroll
        for (int s = 0; s < 5; s++) {
            uint4 f[2];
#pragma unroll
            for (int high = 0; high < 2; high++) {
                uint4 y = turned_at(turned, 8 * high + g + s + 5 * half, piece);
                f[high] = make_uint4(multiply_bf16(x[high].x, y.x), multiply_bf16(x[high].y, y.y),
                                     multiply_bf16(x[high].z, y.z), multiply_bf16(x[high].w, y.w));
                if (s == 4 && half) f[high] = x[high];  // step 9: the vector itself
            }
            if (s == 3 && half) {  // the upper half of step 8: 1, 0, …, 0
                f[1] = make_uint4(ONES, ONES, ONES, ONES);
                if (WEIGHED) f[1] = *reinterpret_cast<const uint4*>(weighed + TURNED_TILE + piece * 16);
                if (g) f[1] = make_uint4(0, 0, 0, 0);
            }
            const unsigned a0[4] = {f[0].x, f[1].x, f[0].y, f[1].y}, a1[4] = {f[0].z, f[1].z, f[0].w, f[1].w};
#pragma unroll
            for (int n = 0; n < 4; n++) {
                multiply_add(sum[s][n], a0, b[n / 2][0][n % 2], b[n / 2][0][2 + n % 2]);
                multiply_add(sum[s][n], a1, b[n / 2][1][n % 2], b[n / 2][1][2 + n % 2]);
            }
        }
    }
}

// The sum in bfloat16: rows are features, as a tile.
__device__ __forceinline__ void write_rows(unsigned char* tile, const FeatureSum& sum, int warp, int lane) {
    int half = warp & 1, side = warp >> 1;
#pragma unroll
    for (int s = 0; s < 5; s++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                unsigned place = tile_place(16 * (5 * half + s) + 8 * r + (lane >> 2), 4 * side + n);
                *reinterpret_cast<unsigned*>(tile + place + (lane & 3) * 4) =
                    pack_bf16(sum[s][n][2 * r], sum[s][n][2 * r + 1]);
            }
}

// after = before + Σ y xᵀ (C fragments) and Σ y of a chunk's turned vectors x, and y: x with weights or x. One warp.
__device__ __forceinline__ void add_gram(unsigned char* after, const unsigned char* before, const unsigned char* y,
                                         const unsigned char* x, int lane) {
    int g = lane >> 2, t = lane & 3;
    float product[2][4] = {}, total[2][4] = {};
    const unsigned ones[4] = {ONES, ONES, ONES, ONES};
#pragma unroll
    for (int part = 0; part < 2; part++) {
        int piece = 4 * part + t;
        uint4 y0 = turned_at(y, g, piece), y1 = turned_at(y, g + 8, piece);
        uint4 x0 = turned_at(x, g, piece), x1 = turned_at(x, g + 8, piece);
        const unsigned a0[4] = {y0.x, y1.x, y0.y, y1.y}, a1[4] = {y0.z, y1.z, y0.w, y1.w};
        multiply_add(product[0], a0, x0.x, x0.y);
        multiply_add(product[0], a1, x0.z, x0.w);
        multiply_add(product[1], a0, x1.x, x1.y);
        multiply_add(product[1], a1, x1.z, x1.w);
        multiply_add(total[0], ones, y0.x, y0.y);
        multiply_add(total[0], ones, y0.z, y0.w);
        multiply_add(total[1], ones, y1.x, y1.y);
        multiply_add(total[1], ones, y1.z, y1.w);
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
        float4 old = reinterpret_cast<const float4*>(before)[32 * n + lane];
        reinterpret_cast<float4*>(after)[32 * n + lane] = make_float4(
            old.x + product[n][0], old.y + product[n][1], old.z + product[n][2], old.w + product[n][3]);
        if (lane < 4) {
            int at = MAP * MAP + 8 * n + 2 * t;
            const float* from = reinterpret_cast<const float*>(before) + at;
            store_pair(reinterpret_cast<float*>(after) + at, from[0] + total[n][0], from[1] + total[n][1]);
        }
    }
}

__device__ __forceinline__ float entry(unsigned pair, int e) { return e ? high_float(pair) : low_float(pair); }

// gradient [16 rows, 16 dims] += of Σ over features and columns of rows · features(x) · sum, with respect to x; through
// += this lane's part of that sum. rows: A fragments [16, 64].
// A product x_i x_(i+s) gives a slope to either entry: to i where it is, to i + s by a product with a one-hot matrix.
__device__ __forceinline__ void feature_gradient(float (&gradient)[2][4], float (&through)[2],
                                                 const unsigned (&rows)[4][4], const Mapped& x,
                                                 const unsigned char* sum, int lane) {
    int g = lane >> 2, t = lane & 3, apart = (g - 2 * t) & 15;
    float moved[2][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        Scores slopes = {};
        multiply_rows(slopes, rows, sum + s * 2048, s % 2 * 64, lane);
        float others[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int n = i / 4, r = score_row(i), e = i & 1, m = (4 * n + s / 2) % 8;
            float left = entry(x[r][4 * n], e);
            if (s == 9) {
                float products = gradient[n][i % 4] + moved[n][i % 4];
                through[r] += left * (0.5f * products + slopes[i]);
                gradient[n][i % 4] = products + slopes[i];
            } else if (s == 8 && n) {
                others[i] = 0;
                if (e == 0 && t == 0) through[r] += slopes[i];  // the feature 1
            } else {
                unsigned right = s % 2 ? join_halves(x[r][m], x[r][(m + 1) % 8]) : x[r][m];
                gradient[n][i % 4] += slopes[i] * entry(right, e);
                others[i] = slopes[i] * left;
            }
        }
        if (s == 0 || s == 9) continue;
        unsigned a[4], b0 = (apart == s ? 0x3f80u : 0) | (apart == s + 1 ? 0x3f800000u : 0);
        unsigned b1 = (apart == (s + 8) % 16 ? 0x3f80u : 0) | (apart == (s + 9) % 16 ? 0x3f800000u : 0);
        pack_weights(a, others);
        multiply_add(moved[0], a, b0, b1);
        multiply_add(moved[1], a, b1, b0);
    }
}

// y = Σ z + (Σ z zᵀ) x, [16 rows, 16 dims], and value += this lane's part of x·Σ z + ½ x·(Σ z zᵀ) x. gram in two parts
// of bfloat16, to be all but exact.
__device__ __forceinline__ void gram_gradient(float (&y)[2][4], float (&value)[2], const unsigned char* gram,
                                              const Mapped& x, int lane) {
    const unsigned a[4] = {x[0][0], x[1][0], x[0][4], x[1][4]};
    const float4* fragments = reinterpret_cast<const float4*>(gram);
    const float* linear = reinterpret_cast<const float*>(gram) + MAP * MAP + 2 * (lane & 3);
    float4 part[2] = {fragments[lane], fragments[32 + lane]};
#pragma unroll
    for (int n = 0; n < 2; n++) {
        float2 b0 = n ? make_float2(part[0].z, part[0].w) : make_float2(part[0].x, part[0].y);
        float2 b1 = n ? make_float2(part[1].z, part[1].w) : make_float2(part[1].x, part[1].y);
        unsigned high0 = pack_bf16(b0.x, b0.y), high1 = pack_bf16(b1.x, b1.y);
#pragma unroll
        for (int i = 0; i < 4; i++) y[n][i] = linear[8 * n + i % 2];
        multiply_add(y[n], a, high0, high1);
        multiply_add(y[n], a, pack_bf16(b0.x - low_float(high0), b0.y - high_float(high0)),
                     pack_bf16(b1.x - low_float(high1), b1.y - high_float(high1)));
#pragma unroll
        for (int i = 0; i < 4; i++)
            value[i / 2] += 0.5f * entry(x[i / 2][4 * n], i % 2) * (y[n][i] + linear[8 * n + i % 2]);
    }
}
