// What the backward left in parts, added up in their order: those of dB and dC, one for each block of channels, which go
// back to the tokens' rows, and in the last launch (whose blocks past part_blocks do it) what each sequence and segment has.

constexpr int FLYING = 16;  // numbers that a thread has on their way: a GPU that waits for one at a time is idle

// The sum of count numbers, stride apart, in their order.
template <class E> __device__ __forceinline__ float sum_of(const E* from, i64 stride, int count) {
    float sum = 0.0f;
    for (int m = 0; m < count; m += FLYING) {
        float numbers[FLYING];
#pragma unroll
        for (int j = 0; j < FLYING; j++) numbers[j] = m + j < count ? number(from[(m + j) * stride]) : 0.0f;
#pragma unroll
        for (int j = 0; j < FLYING; j++) sum += numbers[j];
    }
    return sum;
}

// Element i of the sum over a.rows parts of this size; false, and i counts on from it, if it is not in this one.
__device__ __forceinline__ bool add_parts(i64& i, const Args& a, const void* parts, void* sums, i64 size) {
    if (i >= size) {
        i -= size;
        return false;
    }
    reinterpret_cast<float*>(sums)[i] = sum_of(reinterpret_cast<const float*>(parts) + i, size, (int)a.rows);
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
    // (slot, route, group, step, dB or dC, state); a run is CHUNK of these numbers, so that 32 bits hold what is divided
    const unsigned N = a.N, run = blockIdx.x * (256 / CHUNK) + threadIdx.x / CHUNK, unit = run / (2 * N);
    if (unit >= a.slots * a.K * a.G) return;
    const unsigned at = run % (2 * N) * CHUNK + threadIdx.x % CHUNK, n = at % N, which = at / N & 1, j = at / N / 2;
    const unsigned g = unit % (unsigned)a.G, k = unit / (unsigned)a.G % (unsigned)a.K, slot = unit / (unsigned)(a.G * a.K);
    i64 b = 0, local = slot;
    if (which ? CONST_C : CONST_B) return;
#if !PACKED
    const unsigned slice = a.hi - a.lo, segments = a.segments, span = ((unsigned)a.per_row + segments - 1) / segments;
    const unsigned in_segment = (unsigned)a.lo + slot % slice;
    b = slot / slice / segments;
    local = slot / slice % segments * span + in_segment;
    if (in_segment >= span || local >= a.per_row) return;
#endif
    int place = (int)local * CHUNK + j, row = row_of(a, entry_of(a, b, k, place), place);
    if (!in_map(a, row)) return;
    if (!TABLE) row = (int)a.first + (int)a.sign * row;
    const i64 stride = a.slots * a.K * a.G * CHUNK * 2 * a.N;
    float sum = sum_of(reinterpret_cast<const Part*>(a.partial) + (i64)run * CHUNK + threadIdx.x % CHUNK, stride, (int)a.blocks / ROUNDS);
    if (CUT) sum *= UNCUT;
    i64 to = (((b * a.L + row) * a.K + k) * a.G + g) * a.N + n;
    if (which) put(reinterpret_cast<TC*>(a.dC)[to], sum);
    else put(reinterpret_cast<TB*>(a.dB)[to], sum);
}
