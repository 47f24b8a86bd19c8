// The CUDA kernel of `decode`: everything a layer does for one token of one kv head, in one launch. The same function
// and the same state as decode_kernels.py, which says what the features and their order are.
//
// Defined by cuda_decode.py: the types ELEMENT (q, k, v and the ring), SUM, RING_FAR, Q_FAR, K_FAR, GATE, OUT; HEADS
// (query heads a kv head), HEAD_DIM, VALUE_DIM, MAP_DIM, WINDOW, SINKS, FOLD, DECAY; COLUMNS (value columns of a
// block), THREADS, BLOCKS (a multiprocessor, at least), STAGED, UNROLL, EAGER.
//
// A block owns COLUMNS value columns of one kv head, with its own normaliser and token counter. A thread owns 4 columns
// and every PARTS-th feature of the sum, and of the ring every PARTS-th value. The sum is most of what is read, and
// nothing has to be known to ask for it: its first STAGED pieces a thread are on their way to shared memory, to be
// read by the thread that asked for them, before anything else is done. Keys: a row is shared by KEY_LANES lanes.
// EAGER: keys and values are read before the token counter has come, wanted or not; for few blocks, where the chain of
// steps counts.
#include "vectors.cuh"

constexpr int PAIRS = MAP_DIM * (MAP_DIM + 1) / 2, FEATURES = PAIRS + MAP_DIM + 1;
constexpr int RING = WINDOW + FOLD - 1, ROWS = SINKS + RING;
constexpr int WARPS = THREADS / 32, LANES = COLUMNS / 4, PARTS = THREADS / LANES;
constexpr int PIECES = (FEATURES + PARTS - 1) / PARTS;  // of the sum, a thread
constexpr int VALUES = (ROWS + PARTS - 1) / PARTS;      // rows of values a thread

__host__ __device__ constexpr int power(int size) { return size > 1 ? 2 * power((size + 1) / 2) : 1; }
__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }

constexpr int PAD = power(HEADS);                               // heads, padded
constexpr int CHUNK = 16 / sizeof(ELEMENT);                     // elements of a key that a lane reads at once
constexpr int KEY_LANES = power(HEAD_DIM / CHUNK);              // lanes of one key; some idle where that was padded
constexpr int BLOCK_ROWS = 32 / KEY_LANES * WARPS;              // keys that a block reads at once
constexpr int KEYS = least(8, KEY_LANES);                       // keys that a lane holds at once
constexpr int VALUE_UNROLL = EAGER ? VALUES : least(VALUES, 4);
constexpr float LOG2E = 1.4426950408889634f;
#define NEVER __uint_as_float(0xff800000u)  // -infinity, the score of what is not seen
enum Sort : signed char { UNSEEN, EXACT, FAR };                 // how a row of sinks and ring counts

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

struct Inputs {  // in shared memory, as floats
    float queries[HEADS][KEY_LANES * CHUNK], key[KEY_LANES * CHUNK], value[COLUMNS];
    float far[HEADS][MAP_DIM], new_far[MAP_DIM], gate[HEADS];
};

// What a thread brings of SIZE elements to shared memory: all are asked for before one is waited for.
template <int SIZE> struct Fetch {
    static constexpr int EACH = (SIZE + THREADS - 1) / THREADS;
    float x[EACH];

    template <class Get> __device__ __forceinline__ explicit Fetch(Get get) {
#pragma unroll
        for (int i = 0; i < EACH; i++) x[i] = get(min(int(threadIdx.x) + i * THREADS, SIZE - 1));
    }
    __device__ __forceinline__ void put(float* to) const {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (int(threadIdx.x) + i * THREADS < SIZE) to[threadIdx.x + i * THREADS] = x[i];
    }
};

// Scores of the rows of `keys` that are exact, base 2, and -infinity for those that are not seen; far ones are left out.
struct Keys {
    uint4 raw[KEYS];
    int lane, first;  // in a key; the row of key 0

    __device__ __forceinline__ int row(int block, int i) const { return first + (block * KEYS + i) * BLOCK_ROWS; }

    __device__ __forceinline__ void load(const ELEMENT* keys, int block, int length, int nearest, int new_slot) {
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            const int r = row(block, i), age = new_slot - (r - SINKS);
            bool wanted = r < SINKS ? r < length : unsigned(age < 0 ? age + RING : age) - 1u < unsigned(nearest);
            wanted = (EAGER || wanted) && r < ROWS && lane * CHUNK < HEAD_DIM;
            raw[i] = wanted ? __ldcg(reinterpret_cast<const uint4*>(keys + r * HEAD_DIM) + lane) : make_uint4(0, 0, 0, 0);
        }
    }

    __device__ __forceinline__ void score(const Inputs& in, const signed char* sort, float (*scores)[PAD], int block,
                                          float scale) {
        const int mine = row(block, lane / (KEY_LANES / KEYS));
        const bool writes = lane % (KEY_LANES / KEYS) == 0 && mine < ROWS && sort[mine] != FAR;
#pragma unroll 1
        for (int h = 0; h < HEADS; h++) {
            float query[CHUNK], part[KEYS];
            if (BLOCKS > 2)
#pragma unroll
                for (int i = 0; i < KEYS; i++) forget(raw[i]);
#pragma unroll
            for (int c = 0; c < CHUNK; c++) query[c] = in.queries[h][lane * CHUNK + c];
#pragma unroll
            for (int i = 0; i < KEYS; i++) {
                float key[CHUNK];
                unpack(raw[i], key);
                part[i] = 0;
#pragma unroll
                for (int c = 0; c < CHUNK; c++) part[i] += query[c] * key[c];
            }
            const float s = sum_over_lanes<KEYS, KEY_LANES>(part, lane);
            if (writes) scores[mine][h] = sort[mine] == EXACT ? s * scale : NEVER;
        }
    }
};

// The folding of FOLD tokens, number `folded` and on, into the sum; by all threads, once nothing else is in `memory`.
__device__ __forceinline__ void fold(unsigned char* memory, SUM* total, float* norm, const ELEMENT* values,
                                     const RING_FAR* ring_far, const signed char* sort, int folded, float rate,
                                     int part, int split, bool works) {
    constexpr int EACH = PARTS <= 16 ? 8 : 4;  // features a thread at once
    constexpr int AT_ONCE = least(PARTS * EACH, (FEATURES + EACH - 1) / EACH * EACH);
    auto features = reinterpret_cast<float(*)[AT_ONCE]>(memory);
    auto leaving = reinterpret_cast<float(*)[COLUMNS]>(features + FOLD);
    auto x = reinterpret_cast<float(*)[MAP_DIM]>(leaving + FOLD);
    const int t = threadIdx.x, column = t % LANES * 4;
    total += split * COLUMNS + column;
    for (int base = 0; base < FEATURES; base += PARTS * EACH) {
        float4 sums[EACH];
        const int first = base + part * EACH;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (works && first + i < FEATURES)
                sums[i] = widen(__ldcg(reinterpret_cast<const RawSum*>(total + (first + i) * VALUE_DIM)));
        if (base == 0) {
#pragma unroll 4
            for (int i = t; i < FOLD * LANES; i += THREADS) {
                const int slot = (folded + i / LANES) % RING, c = split * COLUMNS + i % LANES * 4;
                float4 value = make_float4(0, 0, 0, 0);
                if (sort[slot] != UNSEEN && c < VALUE_DIM)
                    value = widen(__ldcg(reinterpret_cast<const RawValue*>(values + slot * VALUE_DIM + c)));
                *reinterpret_cast<float4*>(&leaving[0][0] + 4 * i) = value;
            }
            for (int i = t; i < FOLD * (MAP_DIM / 4); i += THREADS) {
                const int slot = (folded + i / (MAP_DIM / 4)) % RING;
                float4 far = make_float4(0, 0, 0, 0);
                if (sort[slot] != UNSEEN)
                    far = widen(__ldcg(reinterpret_cast<const RawFar*>(ring_far + slot * MAP_DIM) + i % (MAP_DIM / 4)));
                *reinterpret_cast<float4*>(&x[0][0] + 4 * i) = far;
            }
        }
        __syncthreads();
        for (int i = t; i < FOLD * AT_ONCE; i += THREADS) {
            const int f = base + i % AT_ONCE, token = i / AT_ONCE;
            float weight = f < FEATURES && sort[(folded + token) % RING] != UNSEEN ? 1.f : 0.f;
            if (f < MAP_DIM) weight *= 0.5f;
            if (DECAY) weight *= exp2f(rate * (FOLD + WINDOW - 1 - token));
            (&features[0][0])[i] = weight * expand(x[token], min(f, FEATURES - 1));
        }
        __syncthreads();
        const float kept = DECAY ? exp2f(rate * FOLD) : 1.f;
        for (int i = t; i < AT_ONCE && base + i < FEATURES; i += THREADS) {
            float sum = norm[base + i] * kept;
#pragma unroll 8
            for (int token = 0; token < FOLD; token++) sum += features[token][i];
            norm[base + i] = sum;
        }
        if (!works || first >= FEATURES) continue;  // the barriers of the next round are the same for all
#pragma unroll
        for (int i = 0; i < EACH && DECAY; i++) sums[i] = kept * sums[i];
#pragma unroll 1
        for (int token = 0; token < FOLD; token++) {
            const float4 v = *reinterpret_cast<const float4*>(&leaving[token][column]);
            float w[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i += 4)
                *reinterpret_cast<float4*>(w + i) = *reinterpret_cast<const float4*>(&features[token][first - base + i]);
#pragma unroll
            for (int i = 0; i < EACH; i++) add(sums[i], w[i], v);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (first + i < FEATURES)
                __stcg(reinterpret_cast<RawSum*>(total + (first + i) * VALUE_DIM), narrow(sums[i], SUM()));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) decode_kernel(
    const ELEMENT* q, const ELEMENT* k, const ELEMENT* v, const Q_FAR* q_far, const K_FAR* k_far, const GATE* gate,
    const float* log_decay, OUT* out, SUM* total, float* norm, ELEMENT* keys, ELEMENT* values, RING_FAR* ring_far,
    signed char* ring_kind, int* position, const int* offset, int q_b, int q_h, int k_b, int k_h, int v_b, int v_h,
    int qf_b, int qf_h, int kf_b, int kf_h, int g_b, int g_h, int o_b, int o_h, int groups, int splits, float scale) {
    DYNAMIC_SHARED(memory);
    __shared__ Inputs in;
    __shared__ __align__(16) float features[FEATURES][PAD];
    __shared__ __align__(16) float scores[ROWS + 1][PAD];  // then weights; the last row is the new token
    __shared__ float norms[FEATURES], far_factor[PAD];
    __shared__ signed char sort[ROWS];
    const int t = threadIdx.x, warp = t / 32, lane = t % 32;
    const size_t own = blockIdx.x, bg = own / splits, b = bg / groups;  // own: this block's counter and normaliser
    const int split = own % splits, g = bg % groups;
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
        if (works && part + i * PARTS < FEATURES) copy_async(staged + i * THREADS, sums + i * STEP);
    q += b * q_b + g * HEADS * q_h;
    k += b * k_b + size_t(g) * k_h;
    v += b * v_b + size_t(g) * v_h;
    q_far += b * qf_b + g * HEADS * qf_h;
    k_far += b * kf_b + size_t(g) * kf_h;
    gate += b * g_b + g * HEADS * g_h;
    constexpr int DIM = KEY_LANES * CHUNK;
    const int now = position[own], length = now + offset[b];  // this token's number; tokens before it, less padding
    const float rate = DECAY ? log_decay[g] * LOG2E : 0.f;
    const Fetch<ROWS> kinds([&](int r) { return float(ring_kind[max(r - SINKS, 0)]); });
    const Fetch<HEADS * DIM> fetch_q([&](int i) { return to_float(q[i / DIM * q_h + min(i % DIM, HEAD_DIM - 1)]); });
    const Fetch<DIM> fetch_k([&](int i) { return to_float(k[min(i, HEAD_DIM - 1)]); });
    const Fetch<COLUMNS> fetch_v([&](int i) { return to_float(v[min(split * COLUMNS + i, VALUE_DIM - 1)]); });
    const Fetch<HEADS * MAP_DIM> fetch_far([&](int i) { return to_float(q_far[i / MAP_DIM * qf_h + i % MAP_DIM]); });
    const Fetch<MAP_DIM> fetch_new_far([&](int i) { return to_float(k_far[i]); });
    const Fetch<HEADS> fetch_gate([&](int i) { return to_float(gate[i * g_h]) * LOG2E; });
    const Fetch<FEATURES> fetch_norms([&](int i) { return norm[i]; });
    RawValue raw_values[VALUE_UNROLL];
    if (EAGER)
#pragma unroll
        for (int i = 0; i < VALUE_UNROLL; i++)
            if (works && part + i * PARTS < ROWS)
                raw_values[i] = __ldcg(reinterpret_cast<const RawValue*>(values + (part + i * PARTS) * VALUE_DIM + column));
    const int folded = max(now - WINDOW + 1, 0) / FOLD * FOLD, age_limit = now - folded, new_slot = now % RING;
    Keys block_keys;
    block_keys.lane = lane % KEY_LANES;
    block_keys.first = warp * (32 / KEY_LANES) + lane / KEY_LANES;
    block_keys.load(keys, 0, length, min(WINDOW - 1, age_limit), new_slot);

    fetch_q.put(&in.queries[0][0]);
    fetch_k.put(in.key);
    fetch_v.put(in.value);
    fetch_far.put(&in.far[0][0]);
    fetch_new_far.put(in.new_far);
    fetch_gate.put(in.gate);
    fetch_norms.put(norms);
#pragma unroll
    for (int i = 0; i < kinds.EACH; i++) {
        const int r = t + i * THREADS;
        int age = new_slot - (r - SINKS);
        age = age < 0 ? age + RING : age;
        const bool usable = r >= SINKS && kinds.x[i] == 1.f && age > 0 && age <= age_limit;
        if (r < ROWS) sort[r] = r < SINKS ? (r < length ? EXACT : UNSEEN) : !usable ? UNSEEN : age < WINDOW ? EXACT : FAR;
    }
    __syncthreads();

    // Features of the queries, and all scores.
    for (int i = t; i < FEATURES * PAD; i += THREADS)
        (&features[0][0])[i] = i % PAD < HEADS ? expand(in.far[i % PAD], i / PAD) : 0.f;
    constexpr int KEY_BLOCKS = (ROWS + BLOCK_ROWS * KEYS - 1) / (BLOCK_ROWS * KEYS);
    block_keys.score(in, sort, scores, 0, scale);
#pragma unroll 1
    for (int block = 1; block < KEY_BLOCKS; block++) {
        block_keys.load(keys, block, length, min(WINDOW - 1, age_limit), new_slot);
        block_keys.score(in, sort, scores, block, scale);
    }
    for (int i = t; i < (FOLD - 1) * HEADS; i += THREADS) {  // T(x) of what the window has left, and is not folded
        const int age = WINDOW + i / HEADS, h = i % HEADS;
        int slot = new_slot - age;
        slot = slot < 0 ? slot + RING : slot;
        if (sort[SINKS + slot] != FAR) continue;
        float x = 0;
#pragma unroll
        for (int c = 0; c < MAP_DIM; c += 4) {
            const float4 far = widen(__ldcg(reinterpret_cast<const RawFar*>(ring_far + slot * MAP_DIM + c)));
            x += far.x * in.far[h][c] + far.y * in.far[h][c + 1] + far.z * in.far[h][c + 2] + far.w * in.far[h][c + 3];
        }
        scores[SINKS + slot][h] = in.gate[h] + log2f(0.5f * (1.f + x) * (1.f + x) + 0.5f) + rate * age;
    }
    for (int h = warp; h < HEADS; h += WARPS) {
        float x = 0;
#pragma unroll
        for (int c = lane; c < HEAD_DIM; c += 32) x += in.queries[h][c] * in.key[c];
        x = warp_sum(x);
        if (lane == 0) scores[ROWS][h] = x * scale;
    }
    __syncthreads();

    // The token enters the ring, and the sinks where the text is that short.
    for (int i = t; i < COLUMNS && split * COLUMNS + i < VALUE_DIM; i += THREADS) {
        ELEMENT* to = values + split * COLUMNS + i;
        to[(SINKS + new_slot) * VALUE_DIM] = from_float<ELEMENT>(in.value[i]);
        if (length < SINKS) to[length * VALUE_DIM] = from_float<ELEMENT>(in.value[i]);
    }
    if (split == 0) {
        for (int i = t; i < HEAD_DIM; i += THREADS) {
            keys[(SINKS + new_slot) * HEAD_DIM + i] = from_float<ELEMENT>(in.key[i]);
            if (length < SINKS) keys[length * HEAD_DIM + i] = from_float<ELEMENT>(in.key[i]);
        }
        for (int i = t; i < MAP_DIM; i += THREADS)
            ring_far[new_slot * MAP_DIM + i] = from_float<RING_FAR>(in.new_far[i]);
        if (t == 0) ring_kind[new_slot] = length < SINKS ? 2 : 1;
    }

    // One softmax in base 2 a head; the sum joins it with the gate for a score. Other warps go on to the sum.
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
            far *= exp2f(sum_score - top);
#pragma unroll
            for (int i = 0; i < EACH; i++) denominator += score[i] = exp2f(score[i] - top);
            denominator = 1.f / warp_sum(denominator + far);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (lane + 32 * i <= ROWS) scores[lane + 32 * i][h] = h < HEADS ? score[i] * denominator : 0.f;
        if (lane == 0) far_factor[h] = h < HEADS ? exp2f(sum_score - top) * denominator : 0.f;
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
    copies_done();
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
        float sum = scores[ROWS][h] * in.value[i % COLUMNS];
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
