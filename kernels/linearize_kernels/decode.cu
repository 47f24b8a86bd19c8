// The CUDA kernel of `decode`: everything a layer does for one token of one kv head, in one launch. The same function
// and the same state as decode_kernels.py, which says what the features and their order are.
//
// Defined by cuda_decode.py: the types ELEMENT (q, k, v and the ring; ELEMENT_BYTES), SUM, RING_FAR, Q_FAR, K_FAR, GATE, OUT; HEADS
// (query heads a kv head), HEAD_DIM, VALUE_DIM, MAP_DIM, WINDOW, SINKS, FOLD, DECAY; SPLITS (blocks a kv head),
// COLUMNS (value columns of a block), THREADS, BLOCKS (a multiprocessor, at least), STAGED, UNROLL, EAGER, EARLY.
//
// A block owns COLUMNS value columns of one kv head, with its own normaliser and token counter. The last blocks of a kv
// head may own fewer or none (112 columns in 8 splits are 7 blocks of 16); they keep their counters all the same. A
// thread owns 4 columns and every PARTS-th feature of the sum, and of the ring every PARTS-th value. The sum is most of
// what is read, and nothing has to be known to ask for it: its first STAGED pieces a thread are on their way to shared
// memory, to be read by the thread that asked for them, before anything else is done.
// EAGER: keys and values are read before the token counter has come, wanted or not; for few blocks, where the chain of
// steps counts.
// EARLY: the kernel may begin while that of the maps (maps.cu) runs, and asks for what the state holds meanwhile.
#include "vectors.cuh"

constexpr int PAIRS = MAP_DIM * (MAP_DIM + 1) / 2, FEATURES = PAIRS + MAP_DIM + 1;
constexpr int RING = WINDOW + FOLD - 1, ROWS = SINKS + RING;
constexpr int WARPS = THREADS / 32, LANES = COLUMNS / 4, PARTS = THREADS / LANES;
static_assert(PARTS > 0 && WARPS > 2, "a thread or more for each 4 columns; three warps for what `enter` does");
constexpr bool ALL_COLUMNS = VALUE_DIM == SPLITS * COLUMNS;         // every column of every block exists
constexpr bool ALL_WORK = ALL_COLUMNS && THREADS == PARTS * LANES;  // there is something for each thread
constexpr int PIECES = (FEATURES + PARTS - 1) / PARTS;  // of the sum, a thread
constexpr int VALUES = (ROWS + PARTS - 1) / PARTS;      // rows of values a thread

__host__ __device__ constexpr int power(int size) { return size > 1 ? 2 * power((size + 1) / 2) : 1; }
__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int most(int a, int b) { return a < b ? b : a; }

constexpr int PAD = power(HEADS);  // heads, padded
constexpr int VALUE_ROUNDS = EAGER ? 1 : (VALUES * ELEMENT_BYTES + 15) / 16;
constexpr int VALUE_UNROLL = (VALUES + VALUE_ROUNDS - 1) / VALUE_ROUNDS;  // that a thread holds at once
// Rows of scores: as many as all threads' rounds of values take, so that none has to ask whether a row exists; those
// beyond the new token's weigh 0. And of `sort`: as many as threads write without a condition.
constexpr int PADDED = most(VALUE_UNROLL * VALUE_ROUNDS * PARTS, ROWS + 1);
constexpr int SORTS = (PADDED + THREADS - 1) / THREADS * THREADS;
constexpr float LOG2E = 1.4426950408889634f;
#define NEVER __uint_as_float(0xff800000u)      // -infinity, the score of what is not seen
enum Sort : signed char { UNSEEN, EXACT, FAR };  // how a row of sinks and ring counts

using RawSum = Raw4<SUM>::type;
using RawValue = Raw4<ELEMENT>::type;
using RawFar = Raw4<RING_FAR>::type;

// A feature is x[i] * x[j], where a 1 stands at x[MAP_DIM]; without the 1/2 of squares.
struct Factors {
    int i, j;

    __device__ __forceinline__ explicit Factors(int feature) {
        i = feature < PAIRS ? feature % MAP_DIM : feature - PAIRS;
        const int next = i + feature / MAP_DIM;
        j = feature >= PAIRS ? MAP_DIM : next < MAP_DIM ? next : next - MAP_DIM;
    }
};

#include "decode_inputs.cuh"
#include "decode_fold.cuh"
#include "decode_keys.cuh"
#include "decode_scores.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) decode_kernel(
    const ELEMENT* q, const ELEMENT* k, const ELEMENT* v, const Q_FAR* q_far, const K_FAR* k_far, const GATE* gate,
    const float* log_decay, OUT* out, SUM* total, float* norm, ELEMENT* keys, ELEMENT* values, RING_FAR* ring_far,
    signed char* ring_kind, int* position, const int* offset, int q_b, int q_h, int k_b, int k_h, int v_b, int v_h,
    int qf_b, int qf_h, int kf_b, int kf_h, int g_b, int g_h, int o_b, int o_h, float scale) {
    DYNAMIC_SHARED(memory);
    __shared__ Inputs in;
    __shared__ __align__(16) float features[FEATURES][PAD];
    __shared__ __align__(16) float scores[PADDED][PAD];  // then weights; row ROWS is the new token, and no others count
    __shared__ float norms[FEATURES], far_factor[PAD];
    __shared__ signed char sort[SORTS];
    const int t = threadIdx.x, split = blockIdx.x, g = blockIdx.y;
    const size_t b = blockIdx.z, bg = b * gridDim.y + g;
    const size_t own = bg * SPLITS + split;  // this block's counter and normaliser
    const int part = t / LANES, column = split * COLUMNS + t % LANES * 4;
    const bool works = ALL_WORK || part < PARTS && column < VALUE_DIM;
    total += bg * FEATURES * VALUE_DIM;
    norm += own * FEATURES;
    keys += bg * ROWS * HEAD_DIM;
    values += bg * ROWS * VALUE_DIM;
    ring_far += bg * RING * MAP_DIM;
    ring_kind += bg * RING;

    // What waits for nothing is asked for first.
    // Always 0, which the compiler does not know: a number at one address for all threads it would read to a uniform
    // register, and wait for it here.
    const int zero = t / THREADS;
    const int now = position[own + zero], length = now + offset[b + zero];  // this token's; tokens before, less padding
    const float rate = DECAY ? log_decay[g] * LOG2E : 0.f;
    const Fetch<SORTS, signed char> kinds([&](int r) { return ring_kind[min(max(r - SINKS, 0), RING - 1)]; });
    const Fetch<FEATURES> fetch_norms([&](int i) { return norm[i]; });
    const RawSum* sums = reinterpret_cast<const RawSum*>(total + part * VALUE_DIM + column);
    constexpr int STEP = PARTS * VALUE_DIM / 4;  // from a piece to the thread's next one
    RawSum* staged = reinterpret_cast<RawSum*>(memory) + t;
    auto exists = [&](int i) {  // piece i
        return works && i < PIECES && ((i + 1) * PARTS <= FEATURES || part + i * PARTS < FEATURES);
    };
#pragma unroll
    for (int i = 0; i < STAGED; i++)
        if (exists(i)) copy_piece_once(staged + i * THREADS, sums + i * STEP);
    __syncwarp();  // keeps the compiler from putting what needs `now`, and so waits for it, before the copies
    RawValue raw_values[VALUE_UNROLL];
    if (EAGER)
#pragma unroll
        for (int i = 0; i < VALUE_UNROLL; i++)
            if (works && part + i * PARTS < ROWS)
                raw_values[i] = load_once(reinterpret_cast<const RawValue*>(values + (part + i * PARTS) * VALUE_DIM + column));
    const int folded = max(now - WINDOW + 1, 0) / FOLD * FOLD, age_limit = now - folded, new_slot = now % RING;
    const Place place = {length, min(WINDOW - 1, age_limit), new_slot};
    Keys some;
    some.load(keys, 0, place);
    const Fetch<(FOLD - 1) * (MAP_DIM / 4), RawFar> fetch_old([&](int i) {
        const int age = WINDOW + i / (MAP_DIM / 4), slot = new_slot - age + (new_slot < age ? RING : 0);
        const RawFar* at = reinterpret_cast<const RawFar*>(ring_far + slot * MAP_DIM) + i % (MAP_DIM / 4);
        return age <= age_limit ? __ldcg(at) : RawFar();
    });

    if (EARLY) wait_for_launch_before();
    const Token token = {q + b * q_b + g * HEADS * q_h, k + b * k_b + size_t(g) * k_h,
                         v + b * v_b + size_t(g) * v_h + split * COLUMNS, q_far + b * qf_b + g * HEADS * qf_h,
                         k_far + b * kf_b + size_t(g) * kf_h, gate + b * g_b + g * HEADS * g_h,
                         q_h, qf_h, g_h, VALUE_DIM - split * COLUMNS};
    const uint4 piece = token.get(t);
    fetch_norms.put(norms);
#pragma unroll
    for (int i = 0; i < fetch_old.EACH; i++)
        if (t + i * THREADS < (FOLD - 1) * (MAP_DIM / 4)) (&in.old_far[0][0])[t + i * THREADS] = widen(fetch_old.x[i]);
#pragma unroll
    for (int i = 0; i < kinds.EACH; i++) {
        const int r = t + i * THREADS;
        int age = new_slot - (r - SINKS);
        age = age < 0 ? age + RING : age;
        const bool usable = r >= SINKS && r < ROWS && kinds.x[i] == 1 && age > 0 && age <= age_limit;
        sort[r] = r < SINKS ? (r < length ? EXACT : UNSEEN) : !usable ? UNSEEN : age < WINDOW ? EXACT : FAR;
    }
    token.put(in, t, piece);
    if constexpr (Token::END > THREADS)
        for (int i = t + THREADS; i < Token::END; i += THREADS) token.put(in, i, token.get(i));
    __syncthreads();

    put_features(in, features);
    some.score(in, sort, scores, 0, scale);
#pragma unroll 1
    for (int block = 1; block * Keys::AT_ONCE < ROWS; block++) {
        some.load(keys, block, place);
        some.score(in, sort, scores, block, scale);
    }
    score_unfolded(in, sort, scores, new_slot, rate);
    score_new(in, scores, scale);
    __syncthreads();

    enter(in, length, new_slot, split, keys, values, ring_far, ring_kind);
    softmax(in, features, norms, scores, far_factor, DECAY ? rate * (age_limit - WINDOW + 1) : 0.f);

    float4 acc[PAD];
#pragma unroll
    for (int h = 0; h < PAD; h++) acc[h] = make_float4(0, 0, 0, 0);
    auto use = [&](int i, RawSum raw) {  // piece i of the sum
        const float4 s = widen(raw);
        const float* x = features[part + i * PARTS];
#pragma unroll
        for (int h = 0; h < PAD; h++) add(acc[h], x[h], s);
    };
    RawSum ahead[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
        if (exists(STAGED + u)) ahead[u] = load_once(sums + (STAGED + u) * STEP);
    wait_for_copies();
#pragma unroll
    for (int i = 0; i < STAGED; i++)
        if (exists(i)) use(i, staged[i * THREADS]);
#pragma unroll
    for (int i = STAGED; i < PIECES; i += UNROLL) {
        RawSum next[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            if (exists(i + UNROLL + u)) next[u] = load_once(sums + (i + UNROLL + u) * STEP);
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            if (exists(i + u)) use(i + u, ahead[u]);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) ahead[u] = next[u];
    }

    auto load_values = [&](int first) {
        const RawValue* at = reinterpret_cast<const RawValue*>(values + first * VALUE_DIM + column);
        const signed char* kind = sort + first;
#pragma unroll
        for (int u = 0; u < VALUE_UNROLL; u++)
            raw_values[u] = works && kind[u * PARTS] != UNSEEN ? load_once(at + u * STEP) : RawValue();
    };
    if (!EAGER) load_values(part);
    __syncthreads();
#pragma unroll
    for (int h = 0; h < PAD; h++) acc[h] = far_factor[h] * acc[h];
#pragma unroll 1
    for (int i = 0; i < VALUES; i += VALUE_UNROLL) {
        const int first = part + i * PARTS;
        if (i) load_values(first);
#pragma unroll
        for (int u = 0; u < VALUE_UNROLL; u++) {
            if (!works || (EAGER && sort[first + u * PARTS] == UNSEEN)) continue;
            const float4 value = widen(raw_values[u]);
            const float* weights = scores[first] + u * PARTS * PAD;
#pragma unroll
            for (int h = 0; h < PAD; h++) add(acc[h], weights[h], value);
        }
    }

    // Parts are added up, with the new token.
    float* parts = reinterpret_cast<float*>(memory);
    if (works)
#pragma unroll
        for (int h = 0; h < HEADS; h++)
            *reinterpret_cast<float4*>(parts + (part * HEADS + h) * COLUMNS + t % LANES * 4) = acc[h];
    __syncthreads();
    for (int i = t; i < HEADS * LANES; i += THREADS) {
        const int h = i / LANES, c = i % LANES * 4;
        if (!ALL_COLUMNS && split * COLUMNS + c >= VALUE_DIM) continue;
        float4 sum = scores[ROWS][h] * widen(*reinterpret_cast<const RawValue*>(in.value + c));
#pragma unroll 8
        for (int p = 0; p < PARTS; p++) add(sum, 1, reinterpret_cast<const float4*>(parts)[p * HEADS * LANES + i]);
        OUT* to = out + b * o_b + size_t(g * HEADS + h) * o_h + split * COLUMNS + c;
        *reinterpret_cast<Raw4<OUT>::type*>(to) = narrow(sum, OUT());
    }
    if (t == 0) position[own] = now + 1;
    if (max(now - WINDOW + 2, 0) / FOLD * FOLD > folded) {
        __syncthreads();
        fold(memory, total, norm, values + SINKS * VALUE_DIM, ring_far, sort + SINKS, folded, rate, part, split, works);
    }
}
