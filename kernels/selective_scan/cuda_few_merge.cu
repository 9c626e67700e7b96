// The scan over one state: what becomes of the routes' maps and of the channel blocks' sums.
//
// B batch, L tokens, D channels, K routes, G groups.

// seen (B or 1, L, K), zeros before: whether a route visits a token.
extern "C" __global__ void __launch_bounds__(256) mark(const Args a) {
    const i64 at = (i64)blockIdx.x * 256 + threadIdx.x, size = a.per_row * CHUNK;
    if (at >= (a.t_b ? a.batch : 1) * a.K * size) return;
    const i64 token = token_of(reinterpret_cast<const int*>(a.tokens)[at]), k = at / size % a.K, row = at / size / a.K;
    if (token >= 0) reinterpret_cast<char*>(a.seen)[(row * a.L + token) * a.K + k] = 1;
}

// merged (B, L, D) = the sum of map (B, L, K, D) over the routes that visit the token; in rest, a map of dt, zeros are
// put where a route doesn't. A block takes 256 / packs tokens of a row, a thread V channels.
extern "C" __global__ void __launch_bounds__(256) merge(const Args a) {
    const int packs = (int)a.channels / V, tokens = max(256 / packs, 1), per_row = ((int)a.L + tokens - 1) / tokens;
    const int b = blockIdx.x / per_row, t = blockIdx.x % per_row * tokens + threadIdx.x / packs, K = (int)a.K;
    if (t >= (int)a.L || (int)threadIdx.x >= tokens * packs) return;
    const i64 token = b * a.L + t;
    const char* seen = reinterpret_cast<const char*>(a.seen) + (a.t_b ? token : t) * K;
    for (int pack = threadIdx.x % packs; pack < packs; pack += 256) {
        const i64 first = token * K * a.channels + pack * V;
        float sum[V] = {};
        for (int k = 0; k < K; k += 4) {
            Raw<TY, V> values[4];
            bool visited[4];
#pragma unroll
            for (int j = 0; j < 4; j++)  // whether it counts or not: to know would take as long as the load
                values[j] = load<V>(reinterpret_cast<const TY*>(a.map) + first + (k + j) * a.channels, k + j < K);
#pragma unroll
            for (int j = 0; j < 4; j++) visited[j] = k + j < K && seen[k + j];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                TDT* rest = reinterpret_cast<TDT*>(a.rest) + first + (k + j) * a.channels;
                if (a.rest && k + j < K && !visited[j]) *reinterpret_cast<Pack<TDT, V>*>(rest) = {};
#pragma unroll
                for (int v = 0; v < V; v++) sum[v] += visited[j] ? values[j][v] : 0.0f;
            }
        }
        write<V>(reinterpret_cast<TY*>(a.merged) + token * a.channels + pack * V, sum, true);
    }
}

// dB and dC (B, L, K, G): the partial sums of the channel blocks, added up in their order and put back at the tokens'
// rows.
extern "C" __global__ void __launch_bounds__(256) reduce(const Args a) {
    const int part = blockIdx.x * (256 / CHUNK) + threadIdx.x / CHUNK, j = threadIdx.x % CHUNK;  // (slot, route, group)
    if (part >= (int)(a.slots * a.K * a.G)) return;
    const int g = part % (int)a.G, k = part / (int)a.G % (int)a.K, slot = part / (int)a.G / (int)a.K;
    const int b = PACKED ? 0 : slot / (int)a.per_row, place = (slot - b * (int)a.per_row) * CHUNK + j;
    const i64 at = (i64)part * CHUNK + j, size = a.slots * a.K * a.G * CHUNK;
#if TABLE
    const int entry = reinterpret_cast<const int*>(a.tokens)[b * a.t_b + k * a.t_k + place];
#else
    const int entry = place < (int)a.L ? (int)a.first + (int)a.sign * place : -2;
#endif
    const int row = row_of(a, entry, place);
    if (row < 0) return;
    float dB = 0.0f, dC = 0.0f;
    const float2* from = reinterpret_cast<const float2*>(a.partial) + at;
#pragma unroll 4
    for (int m = 0; m < (int)a.blocks; m++) {
        const float2 both = from[m * size];
        dB += both.x, dC += both.y;
    }
    const i64 to = ((b * a.L + row) * a.K + k) * a.G + g;
    if (!CONST_B) put(reinterpret_cast<TB*>(a.dB)[to], dB * UNIT);
    if (!CONST_C) put(reinterpret_cast<TB*>(a.dC)[to], dC);
}
