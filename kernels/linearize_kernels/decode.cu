// The CUDA kernel of `decode`: everything a layer does for one token of one kv head, in one launch. The same function
// and the same state as decode_kernels.py, which says what the features and their order are.
//
// Defined by cuda_decode.py: the types ELEMENT (q, k, v and the ring; ELEMENT_BYTES), SUM, RING_FAR, Q_FAR, K_FAR, GATE, OUT; HEADS
// (query heads a kv head), HEAD_DIM, VALUE_DIM, MAP_DIM, WINDOW, SINKS, FOLD, DECAY; COLUMNS (value columns of a
// block), THREADS, BLOCKS (a multiprocessor, at least), STAGED, UNROLL, EAGER, AHEAD, EARLY.
//
// A block owns COLUMNS value columns of one kv head, with its own normaliser and token counter. A thread owns 4 columns
// and every PARTS-th feature of the sum, and of the ring every PARTS-th value. The sum is most of what is read, and
// nothing has to be known to ask for it: its first STAGED pieces a thread are on their way to shared memory, to be
// read by the thread that asked for them, before anything else is done.
// EAGER: keys and values are read before the token counter has come, wanted or not; for few blocks, where the chain of
// steps counts.
// AHEAD: what the block will read later, values and the rest of the sum, is asked into the L2 cache at once, so that
// memory is busy while it computes; for blocks that own all columns.
// EARLY: the kernel may begin while that of the maps (maps.cu) runs, and asks for what the state holds meanwhile.
#include "vectors.cuh"

constexpr int PAIRS = MAP_DIM * (MAP_DIM + 1) / 2, FEATURES = PAIRS + MAP_DIM + 1;
constexpr int RING = WINDOW + FOLD - 1, ROWS = SINKS + RING;
constexpr int WARPS = THREADS / 32, LANES = COLUMNS / 4, PARTS = THREADS / LANES;
constexpr int PIECES = (FEATURES + PARTS - 1) / PARTS;  // of the sum, a thread
constexpr int VALUES = (ROWS + PARTS - 1) / PARTS;      // rows of values a thread

__host__ __device__ constexpr int power(int size) { return size > 1 ? 2 * power((size + 1) / 2) : 1; }
__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }

constexpr int PAD = power(HEADS);  // heads, padded
constexpr int VALUE_ROUNDS = EAGER ? 1 : (VALUES * ELEMENT_BYTES + 15) / 16;
constexpr int VALUE_UNROLL = (VALUES + VALUE_ROUNDS - 1) / VALUE_ROUNDS;  // that a thread holds at once
constexpr float LOG2E = 1.4426950408889634f;
#define NEVER __uint_as_float(0xff800000u)      // -infinity, the score of what is not seen
enum Sort : signed char { UNSEEN, EXACT, FAR };  // how a row of sinks and ring counts

using RawSum = Raw4<SUM>::type;
using RawValue = Raw4<ELEMENT>::type;
using RawFar = Raw4<RING_FAR>::type;

// A feature of x, without the 1/2 of squares.
__device__ __forceinline__ float expand(const float* x, int feature) {
    if (feature < PAIRS) {
        const int i = feature % MAP_DIM, j = i + feature / MAP_DIM;
        return x[i] * x[j < MAP_DIM ? j : j - MAP_DIM];
    }
    return feature < PAIRS + MAP_DIM ? x[feature - PAIRS] : 1.f;
}

constexpr int DIM = ELEMENT_BYTES == 2 ? (HEAD_DIM + 31) / 32 * 32 : 4 * power(HEAD_DIM / 4);  // padded for `Keys`

struct __align__(16) Inputs {  // in shared memory
    ELEMENT queries[HEADS][DIM], key[HEAD_DIM], value[COLUMNS];
    float far[HEADS][MAP_DIM], new_far[MAP_DIM];
    float4 old_far[FOLD - 1][MAP_DIM / 4];  // of what the window has left, newest first
    float gate[HEADS];
};

// What a thread brings of SIZE elements to shared memory: all are asked for before one is waited for.
template <int SIZE, class T = float> struct Fetch {
    static constexpr int EACH = (SIZE + THREADS - 1) / THREADS;
    T x[EACH];

    template <class Get> __device__ __forceinline__ explicit Fetch(Get get) {
#pragma unroll
        for (int i = 0; i < EACH; i++) x[i] = get(min(int(threadIdx.x) + i * THREADS, SIZE - 1));
    }
    __device__ __forceinline__ void put(T* to) const {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (int(threadIdx.x) + i * THREADS < SIZE) to[threadIdx.x + i * THREADS] = x[i];
    }
};

#include "decode_fold.cuh"
#include "decode_keys.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) decode_kernel(
    const ELEMENT* q, const ELEMENT* k, const ELEMENT* v, const Q_FAR* q_far, const K_FAR* k_far, const GATE* gate,
    const float* log_decay, OUT* out, SUM* total, float* norm, ELEMENT* keys, ELEMENT* values, RING_FAR* ring_far,
    signed char* ring_kind, int* position, const int* offset, int q_b, int q_h, int k_b, int k_h, int v_b, int v_h,
    int qf_b, int qf_h, int kf_b, int kf_h, int g_b, int g_h, int o_b, int o_h, float scale) {
    DYNAMIC_SHARED(memory);
    __shared__ Inputs in;
    __shared__ __align__(16) float features[FEATURES][PAD];
    __shared__ __align__(16) float scores[ROWS + 1][PAD];  // then weights; the last row is the new token
    __shared__ float norms[FEATURES], far_factor[PAD];
    __shared__ signed char sort[(ROWS + THREADS - 1) / THREADS * THREADS];  // padded: written without a condition
    const int t = threadIdx.x, warp = t / 32, lane = t % 32;
    const int split = blockIdx.x, g = blockIdx.y;
    const size_t b = blockIdx.z, bg = b * gridDim.y + g;
    const size_t own = bg * gridDim.x + split;  // this block's counter and normaliser
    const int part = t / LANES, column = split * COLUMNS + t % LANES * 4;
    const bool works = part < PARTS && column < VALUE_DIM;
    total += bg * FEATURES * VALUE_DIM;
    norm += own * FEATURES;
    keys += bg * ROWS * HEAD_DIM;
    values += bg * ROWS * VALUE_DIM;
    ring_far += bg * RING * MAP_DIM;
    ring_kind += bg * RING;

    // What waits for nothing is asked for first.
    const RawSum* sums = reinterpret_cast<const RawSum*>(total + part * VALUE_DIM + column);
    constexpr int STEP = PARTS * VALUE_DIM / 4;  // from a piece to the thread's next one
    RawSum* staged = reinterpret_cast<RawSum*>(memory) + t;
#pragma unroll
    for (int i = 0; i < STAGED; i++)
        if (works && part + i * PARTS < FEATURES) copy_piece(staged + i * THREADS, sums + i * STEP);
    static_assert(!AHEAD || (COLUMNS == VALUE_DIM && VALUE_DIM * ELEMENT_BYTES % 16 == 0 && VALUE_DIM * sizeof(SUM) % 16 == 0));
    constexpr int REST = FEATURES - least(STAGED * PARTS, FEATURES);  // features that are not staged
    if (AHEAD && t == 0) fetch_to_l2(total + (FEATURES - REST) * VALUE_DIM, REST * VALUE_DIM * sizeof(SUM));
    const int now = position[own], length = now + offset[b];  // this token's number; tokens before it, less padding
    const float rate = DECAY ? log_decay[g] * LOG2E : 0.f;
    const Fetch<ROWS, signed char> kinds([&](int r) { return ring_kind[max(r - SINKS, 0)]; });
    const Fetch<FEATURES> fetch_norms([&](int i) { return norm[i]; });
    RawValue raw_values[VALUE_UNROLL];
    if (EAGER)
#pragma unroll
        for (int i = 0; i < VALUE_UNROLL; i++)
            if (works && part + i * PARTS < ROWS)
                raw_values[i] = __ldcg(reinterpret_cast<const RawValue*>(values + (part + i * PARTS) * VALUE_DIM + column));
    const int folded = max(now - WINDOW + 1, 0) / FOLD * FOLD, age_limit = now - folded, new_slot = now % RING;
    if (AHEAD && t == 0) {  // values of the sinks, and of the tokens in the ring that are not folded: one piece or two
        constexpr int ROW = VALUE_DIM * ELEMENT_BYTES;
        const int begin = new_slot - age_limit;
        fetch_to_l2(values, min(length, SINKS) * ROW);
        fetch_to_l2(values + (SINKS + max(begin, 0)) * VALUE_DIM, (new_slot - max(begin, 0)) * ROW);
        fetch_to_l2(values + (SINKS + RING + min(begin, 0)) * VALUE_DIM, max(-begin, 0) * ROW);
    }
    const Place place = {length, min(WINDOW - 1, age_limit), new_slot};
    Keys some;
    some.load(keys, 0, place);
    const Fetch<(FOLD - 1) * (MAP_DIM / 4), RawFar> fetch_old([&](int i) {
        const int age = WINDOW + i / (MAP_DIM / 4), slot = new_slot - age + (new_slot < age ? RING : 0);
        const RawFar* at = reinterpret_cast<const RawFar*>(ring_far + slot * MAP_DIM) + i % (MAP_DIM / 4);
        return age <= age_limit ? __ldcg(at) : RawFar();
    });

    if (EARLY) wait_for_launch_before();
    q += b * q_b + g * HEADS * q_h;
    k += b * k_b + size_t(g) * k_h;
    v += b * v_b + size_t(g) * v_h;
    q_far += b * qf_b + g * HEADS * qf_h;
    k_far += b * kf_b + size_t(g) * kf_h;
    gate += b * g_b + g * HEADS * g_h;
    const Fetch<HEADS * DIM, ELEMENT> fetch_q([&](int i) { return q[i / DIM * q_h + min(i % DIM, HEAD_DIM - 1)]; });
    const Fetch<HEAD_DIM, ELEMENT> fetch_k([&](int i) { return k[i]; });
    const Fetch<COLUMNS, ELEMENT> fetch_v([&](int i) { return v[min(split * COLUMNS + i, VALUE_DIM - 1)]; });
    const Fetch<HEADS * MAP_DIM> fetch_far([&](int i) { return to_float(q_far[i / MAP_DIM * qf_h + i % MAP_DIM]); });
    const Fetch<MAP_DIM> fetch_new_far([&](int i) { return to_float(k_far[i]); });
    const Fetch<HEADS> fetch_gate([&](int i) { return to_float(gate[i * g_h]) * LOG2E; });

    fetch_q.put(&in.queries[0][0]);
    fetch_k.put(in.key);
    fetch_v.put(in.value);
    fetch_far.put(&in.far[0][0]);
    fetch_new_far.put(in.new_far);
    fetch_gate.put(in.gate);
    fetch_norms.put(norms);
#pragma unroll
    for (int i = 0; i < fetch_old.EACH; i++)
        if (t + i * THREADS < (FOLD - 1) * (MAP_DIM / 4)) (&in.old_far[0][0])[t + i * THREADS] = widen(fetch_old.x[i]);
#pragma unroll
    for (int i = 0; i < kinds.EACH; i++) {
        const int r = t + i * THREADS;
        int age = new_slot - (r - SINKS);
        age = age < 0 ? age + RING : age;
        const bool usable = r >= SINKS && kinds.x[i] == 1 && age > 0 && age <= age_limit;
        sort[r] = r < SINKS ? (r < length ? EXACT : UNSEEN) : !usable ? UNSEEN : age < WINDOW ? EXACT : FAR;
    }
    __syncthreads();

    // Features of the queries, and all scores.
    for (int i = t; i < FEATURES * PAD; i += THREADS)
        (&features[0][0])[i] = i % PAD < HEADS ? expand(in.far[i % PAD], i / PAD) : 0.f;
    some.score(in, sort, scores, 0, scale);
#pragma unroll 1
    for (int block = 1; block * Keys::AT_ONCE < ROWS; block++) {
        some.load(keys, block, place);
        some.score(in, sort, scores, block, scale);
    }
    for (int i = t; i < (FOLD - 1) * HEADS; i += THREADS) {  // T(x) of what the window has left, and is not folded
        const int age = WINDOW + i / HEADS, h = i % HEADS, slot = new_slot - age + (new_slot < age ? RING : 0);
        if (sort[SINKS + slot] != FAR) continue;
        float x = 0;
#pragma unroll
        for (int c = 0; c < MAP_DIM / 4; c++) {
            const float4 far = in.old_far[i / HEADS][c];
            const float* query = &in.far[h][4 * c];
            x += far.x * query[0] + far.y * query[1] + far.z * query[2] + far.w * query[3];
        }
        scores[SINKS + slot][h] = in.gate[h] + log2f(0.5f * (1.f + x) * (1.f + x) + 0.5f) + rate * age;
    }
    for (int h = warp; h < HEADS; h += WARPS) {
        float x = 0;
#pragma unroll
        for (int c = lane; c < HEAD_DIM; c += 32) x += to_float(in.queries[h][c]) * to_float(in.key[c]);
        x = warp_sum(x);
        if (lane == 0) scores[ROWS][h] = x * scale;
    }
    __syncthreads();

    // The token enters the ring, and the sinks where the text is that short.
    for (int i = t; i < COLUMNS && split * COLUMNS + i < VALUE_DIM; i += THREADS) {
        ELEMENT* to = values + split * COLUMNS + i;
        to[(SINKS + new_slot) * VALUE_DIM] = in.value[i];
        if (length < SINKS) to[length * VALUE_DIM] = in.value[i];
    }
    if (split == 0) {
        for (int i = t; i < HEAD_DIM; i += THREADS) {
            keys[(SINKS + new_slot) * HEAD_DIM + i] = in.key[i];
            if (length < SINKS) keys[length * HEAD_DIM + i] = in.key[i];
        }
        for (int i = t; i < MAP_DIM; i += THREADS)
            ring_far[new_slot * MAP_DIM + i] = from_float<RING_FAR>(in.new_far[i]);
        if (t == 0) ring_kind[new_slot] = length < SINKS ? 2 : 1;
    }

    // One softmax in base 2 a head; the sum joins it with the gate for a score. Other warps go on to the sum.
#pragma unroll 1
    for (int h = WARPS - 1 - warp; h < PAD; h += WARPS) {
        constexpr int EACH = (ROWS + 32) / 32;
        float score[EACH], top = norms[FEATURES - 1] > 0 && h < HEADS ? in.gate[h] : NEVER, denominator = 0, far = 0;
        if (DECAY) top += rate * (age_limit - WINDOW + 1);
        const float sum_score = top;
        if (h < HEADS) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                score[i] = lane + 32 * i <= ROWS ? scores[lane + 32 * i][h] : NEVER;
                top = fmaxf(top, score[i]);
            }
            top = warp_max(top);  // the token sees itself, so it is finite
            for (int f = lane; f < FEATURES; f += 32) far += features[f][h] * norms[f];
            far *= exp2_fast(sum_score - top);
#pragma unroll
            for (int i = 0; i < EACH; i++) denominator += score[i] = exp2_fast(score[i] - top);
            denominator = __fdividef(1.f, warp_sum(denominator + far));
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (lane + 32 * i <= ROWS) scores[lane + 32 * i][h] = h < HEADS ? score[i] * denominator : 0.f;
        if (lane == 0) far_factor[h] = h < HEADS ? exp2_fast(sum_score - top) * denominator : 0.f;
    }

    float4 acc[PAD];
#pragma unroll
    for (int h = 0; h < PAD; h++) acc[h] = make_float4(0, 0, 0, 0);
    auto use = [&](int i, RawSum raw) {  // piece i of the sum
        const float4 s = widen(raw);
        const float* x = features[part + i * PARTS];
#pragma unroll
        for (int h = 0; h < PAD; h++) add(acc[h], x[h], s);
    };
    auto exists = [&](int i) { return works && i < PIECES && part + i * PARTS < FEATURES; };
    RawSum ahead[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
        if (exists(STAGED + u)) ahead[u] = __ldcg(sums + (STAGED + u) * STEP);
    wait_for_copies();
#pragma unroll
    for (int i = 0; i < STAGED; i++)
        if (exists(i)) use(i, staged[i * THREADS]);
#pragma unroll
    for (int i = STAGED; i < PIECES; i += UNROLL) {
        RawSum next[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            if (exists(i + UNROLL + u)) next[u] = __ldcg(sums + (i + UNROLL + u) * STEP);
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            if (exists(i + u)) use(i + u, ahead[u]);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) ahead[u] = next[u];
    }

    auto load_values = [&](int i) {
#pragma unroll
        for (int u = 0; u < VALUE_UNROLL; u++) {
            const int r = part + (i + u) * PARTS;
            if (works && r < ROWS && sort[r] != UNSEEN)
                raw_values[u] = __ldcg(reinterpret_cast<const RawValue*>(values + r * VALUE_DIM + column));
        }
    };
    if (!EAGER) load_values(0);
    __syncthreads();
#pragma unroll
    for (int h = 0; h < PAD; h++) acc[h] = far_factor[h] * acc[h];
#pragma unroll 1
    for (int i = 0; i < VALUES; i += VALUE_UNROLL) {
        if (i) load_values(i);
#pragma unroll
        for (int u = 0; u < VALUE_UNROLL; u++) {
            const int r = part + (i + u) * PARTS;
            if (!works || r >= ROWS || sort[r] == UNSEEN) continue;
            const float4 value = widen(raw_values[u]);
#pragma unroll
            for (int h = 0; h < PAD; h++) add(acc[h], scores[r][h], value);
        }
    }

    // Parts are added up, with the new token.
    float* parts = reinterpret_cast<float*>(memory);
    if (works)
#pragma unroll
        for (int h = 0; h < HEADS; h++)
            *reinterpret_cast<float4*>(parts + (part * HEADS + h) * COLUMNS + t % LANES * 4) = acc[h];
    __syncthreads();
    for (int i = t; i < HEADS * COLUMNS; i += THREADS) {
        const int h = i / COLUMNS, c = split * COLUMNS + i % COLUMNS;
        if (c >= VALUE_DIM) continue;
        float sum = scores[ROWS][h] * to_float(in.value[i % COLUMNS]);
#pragma unroll 8
        for (int p = 0; p < PARTS; p++) sum += parts[p * HEADS * COLUMNS + i];
        out[b * o_b + size_t(g * HEADS + h) * o_h + c] = from_float<OUT>(sum);
    }
    if (t == 0) position[own] = now + 1;
    if (max(now - WINDOW + 2, 0) / FOLD * FOLD > folded) {
        __syncthreads();
        fold(memory, total, norm, values + SINKS * VALUE_DIM, ring_far, sort + SINKS, folded, rate, part, split, works);
    }
}
