// dB and dC: the partial sums of the channel blocks, added up in their order and put back at the tokens' rows.

extern "C" __global__ void __launch_bounds__(256) reduce(const Args a) {
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;  // (slot, route, group, step, dB or dC, state)
    if (i >= a.slots * a.K * a.G * CHUNK * 2 * a.N) return;
    i64 n = i % a.N, rest = i / a.N;
    int which = rest & 1; rest >>= 1;
    int j = rest % CHUNK; rest /= CHUNK;
    i64 g = rest % a.G; rest /= a.G;
    i64 k = rest % a.K, slot = rest / a.K;
    i64 b = PACKED ? 0 : slot / (a.hi - a.lo), local = PACKED ? slot : a.lo + slot % (a.hi - a.lo);
    if (which ? CONST_C : CONST_B) return;
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
