// What the backward left in parts, added up in their order: those of dB and dC, one for each block of channels, which go
// back to the tokens' rows, and in the last launch (whose blocks past part_blocks do it) what each sequence and segment has.

// Element i of the sum over a.rows parts of this size; false, and i counts on from it, if it is not in this one.
__device__ __forceinline__ bool add_parts(i64& i, const Args& a, const void* parts, void* sums, i64 size) {
    if (i >= size) {
        i -= size;
        return false;
    }
    const float* from = reinterpret_cast<const float*>(parts) + i;
    float sum = 0.0f;
#pragma unroll 4
    for (i64 m = 0; m < a.rows; m++) sum += from[m * size];
    reinterpret_cast<float*>(sums)[i] = sum;
    return true;
}

extern "C" __global__ void __launch_bounds__(256) reduce(const Args a) {
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
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;  // (slot, route, group, step, dB or dC, state)
    if (i >= a.slots * a.K * a.G * CHUNK * 2 * a.N) return;
    i64 n = i % a.N, rest = i / a.N;
    int which = rest & 1; rest >>= 1;
    int j = rest % CHUNK; rest /= CHUNK;
    i64 g = rest % a.G; rest /= a.G;
    i64 k = rest % a.K, slot = rest / a.K, b = 0, local = slot;
    if (which ? CONST_C : CONST_B) return;
#if !PACKED
    const i64 slice = a.hi - a.lo, span = (a.per_row + a.segments - 1) / a.segments, in_segment = a.lo + slot % slice;
    b = slot / slice / a.segments;
    local = slot / slice % a.segments * span + in_segment;
    if (in_segment >= span || local >= a.per_row) return;
#endif
    int place = (int)local * CHUNK + j, row = row_of(a, entry_of(a, b, k, place), place);
    if (!in_map(a, row)) return;
    if (!TABLE) row = (int)a.first + (int)a.sign * row;
    float sum = 0.0f;
    const float* from = reinterpret_cast<const float*>(a.partial) + i;
    i64 stride = a.slots * a.K * a.G * CHUNK * 2 * a.N;
    for (i64 m = 0; m < a.blocks; m++) sum += from[m * stride];
    if (CUT) sum *= UNCUT;
    i64 to = (((b * a.L + row) * a.K + k) * a.G + g) * a.N + n;
    if (which) put(reinterpret_cast<TC*>(a.dC)[to], sum);
    else put(reinterpret_cast<TB*>(a.dB)[to], sum);
}
