// What the backward left in parts, added up in their order: those of dB and dC, one for each block of channels, which go
// back to the tokens' rows, and in the last launch (whose blocks past part_blocks do it) what each sequence and segment has.

constexpr int FLYING = ADDERS > 1 ? 8 : 16;  // loads that a thread has on their way: a GPU that waits for one at a time is idle

// The sums of W neighbours each over count rows, stride apart, in their order.
template <int W, class E> __device__ __forceinline__ void sum_up(float (&sums)[W], const E* from, i64 stride, int count) {
#pragma unroll
    for (int i = 0; i < W; i++) sums[i] = 0.0f;
    for (int m = 0; m < count; m += FLYING) {
        Raw<E, W> rows[FLYING];
#pragma unroll
        for (int j = 0; j < FLYING; j++) rows[j] = load<W>(from + (m + j) * stride, m + j < count);
#pragma unroll
        for (int j = 0; j < FLYING; j++)
#pragma unroll
            for (int i = 0; i < W; i++) sums[i] += rows[j][i];
    }
}

// Element i of the sum over a.rows parts of this size; false, and i counts on from it, if it is not in this one.
__device__ __forceinline__ bool add_parts(i64& i, const Args& a, const void* parts, void* sums, i64 size) {
    if (i >= size) {
        i -= size;
        return false;
    }
    float sum[1];
    sum_up(sum, reinterpret_cast<const float*>(parts) + i, size, (int)a.rows);
    reinterpret_cast<float*>(sums)[i] = sum[0];
    return true;
}

extern "C" __global__ void __launch_bounds__(256) reduce(const Args a) {
    follow();
    if (blockIdx.x >= a.part_blocks) {
        const i64 numbers = a.K * a.channels, states = numbers * a.N;
        i64 i = ((i64)blockIdx.x - a.part_blocks) * 256 + threadIdx.x;
        if (add_parts(i, a, a.dA, a.sum_A, states)) return;
        if (CONST_B && add_parts(i, a, a.dB, a.sum_B, states)) return;
        if (CONST_C && add_parts(i, a, a.dC, a.sum_C, states)) return;
        if (HAS_D && add_parts(i, a, a.dD, a.sum_D, numbers)) return;
        if (HAS_BIAS) add_parts(i, a, a.dbias, a.sum_bias, numbers);
        return;
    }
    // (slot, route, group, step, dB or dC, state), W states a thread, whose parts ADDERS threads share; a run is CHUNK of these
    // numbers, so that 32 bits hold what is divided
    constexpr int W = TOGETHER, PER_RUN = CHUNK / W, SIDE_BY_SIDE = 32 / ADDERS;  // lanes of other numbers
    const unsigned lane = threadIdx.x % 32, adder = lane / SIDE_BY_SIDE;
    const unsigned mine = blockIdx.x * (256 / ADDERS) + threadIdx.x / 32 * SIDE_BY_SIDE + lane % SIDE_BY_SIDE;
    const unsigned N = a.N, run = mine / PER_RUN, unit = run / (2 * N);
    if (unit >= a.slots * a.K * a.G) return;  // a whole warp's
    const unsigned in_run = mine % PER_RUN * W, at = run % (2 * N) * CHUNK + in_run;
    const unsigned n = at % N, which = at / N & 1, j = at / N / 2;
    const unsigned g = unit % (unsigned)a.G, k = unit / (unsigned)a.G % (unsigned)a.K, slot = unit / (unsigned)(a.G * a.K);
    i64 b = 0, local = slot;
    bool live = !(which ? CONST_C : CONST_B);
#if !PACKED
    const unsigned slice = a.hi - a.lo, segments = a.segments, span = ((unsigned)a.per_row + segments - 1) / segments;
    const unsigned in_segment = (unsigned)a.lo + slot % slice;
    b = slot / slice / segments;
    local = slot / slice % segments * span + in_segment;
    live = live && in_segment < span && local < a.per_row;
#endif
    int place = (int)local * CHUNK + j, row = live ? row_of(a, entry_of(a, b, k, place), place) : 0;
    live = live && in_map(a, row);
    if (!TABLE) row = (int)a.first + (int)a.sign * row;
    const i64 stride = a.slots * a.K * a.G * CHUNK * 2 * a.N;
    float sums[W];
    const int parts = (int)a.blocks / ROUNDS, each = (parts + ADDERS - 1) / ADDERS, first = min(parts, (int)adder * each);
    sum_up(sums, reinterpret_cast<const Part*>(a.partial) + (i64)run * CHUNK + in_run + first * stride, stride,
           live ? min(each, parts - first) : 0);
#pragma unroll
    for (int other = SIDE_BY_SIDE; other < 32; other *= 2)
#pragma unroll
        for (int i = 0; i < W; i++) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], other);
    Pack<TB, W> dB;
    Pack<TC, W> dC;
#pragma unroll
    for (int i = 0; i < W; i++) {
        if (CUT) sums[i] *= UNCUT;
        put(dB.v[i], sums[i]);
        put(dC.v[i], sums[i]);
    }
    i64 to = (((b * a.L + row) * a.K + k) * a.G + g) * a.N + n;
    save(reinterpret_cast<TB*>(a.dB) + to, dB, live && !adder && !which);
    save(reinterpret_cast<TC*>(a.dC) + to, dC, live && !adder && which);
}
