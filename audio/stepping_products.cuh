// Products of the stream's weights by tensor cores.

// How many warps share the rows of a product with so many tiles of columns.
__host__ __device__ constexpr int splits_of(int tiles) { return most(1, WARPS / tiles); }
__host__ __device__ constexpr int splits_of_width(int dim) { return splits_of(up_to(dim, 16) / 16); }

// Whether every warp normalises an x of this width for itself, and leaves a share of each sum.
__host__ __device__ constexpr bool narrow(int dim) { return dim <= NARROW; }

// The input of a product: four numbers a time, in bfloat16 first their upper and then their lower parts.
__device__ __forceinline__ void put(float* operand, int j, float value) {
#if HALF
    half_bits* at = (half_bits*)operand + j / 4 * 8 + j % 4;
    const half_bits upper = nearest_half(value);
    at[0] = upper;
    at[4] = nearest_half(value - __uint_as_float((unsigned)upper << 16));
#else
    operand[j] = value;
#endif
}

__device__ __forceinline__ void put_four(float* operand, int quad, float4 v) {
#if HALF
    const half_bits a = nearest_half(v.x), b = nearest_half(v.y), c = nearest_half(v.z), d = nearest_half(v.w);
    const float4 rest = make_float4(v.x - __uint_as_float((unsigned)a << 16), v.y - __uint_as_float((unsigned)b << 16),
                                    v.z - __uint_as_float((unsigned)c << 16), v.w - __uint_as_float((unsigned)d << 16));
    ((uint4*)operand)[quad] = make_uint4(a | (unsigned)b << 16, c | (unsigned)d << 16,
                                         nearest_half(rest.x) | (unsigned)nearest_half(rest.y) << 16,
                                         nearest_half(rest.z) | (unsigned)nearest_half(rest.w) << 16);
#else
    ((float4*)operand)[quad] = v;
#endif
}

__device__ __forceinline__ float4 plus(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ __forceinline__ float4 times(float4 a, float4 b) {
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}

__device__ __forceinline__ float get(const float* operand, int j) {
#if HALF
    const half_bits* at = (const half_bits*)operand + j / 4 * 8 + j % 4;
    return __uint_as_float((unsigned)at[0] << 16) + __uint_as_float((unsigned)at[4] << 16);
#else
    return operand[j];
#endif
}

// One tile's share of a product: chains of sums, which do not wait for each other. The thread's weights are at ``pos``.
__device__ __forceinline__ void multiply(float (*sum)[4], unsigned pos, const char* x) {
    const char* w = memory + pos % RING;
    const uint4 first = *(const uint4*)w;
#if HALF
    const uint4 v = *(const uint4*)x;
    multiply_half(sum[0], first, v.x, v.y);
    multiply_half(sum[1], first, v.z, v.w);
#else
    const uint4 pair[2] = {first, *(const uint4*)(w + 512)};
    const float4 v = *(const float4*)x;
    const float values[2][2] = {{v.x, v.y}, {v.z, v.w}};
    constexpr unsigned UPPER = 0xffffe000u;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const unsigned a[4] = {pair[h].x, pair[h].y, pair[h].z, pair[h].w};
        unsigned upper[4], lower[4], x_upper[2], x_lower[2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            upper[i] = a[i] & UPPER;
            lower[i] = __float_as_uint(__uint_as_float(a[i]) - __uint_as_float(upper[i]));
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            x_upper[i] = __float_as_uint(values[h][i]) & UPPER;
            x_lower[i] = __float_as_uint(values[h][i] - __uint_as_float(x_upper[i]));
        }
        const uint4 large = make_uint4(upper[0], upper[1], upper[2], upper[3]);
        multiply_single(sum[0], large, x_upper[0], x_upper[1]);
        multiply_single(sum[1], large, x_lower[0], x_lower[1]);
        multiply_single(sum[1], make_uint4(lower[0], lower[1], lower[2], lower[3]), x_upper[0], x_upper[1]);
    }
#endif
}

// y = b + W x for all clips: TILES times 16 numbers from ROWS. A warp has PER tiles of columns, or shares one with
// SPLITS - 1 others. The stream brings, for each group of PER * WARPS tiles, the biases if there are any, EXTRA more
// numbers for each column of a group's first EXTRA_TILES, and the weights, a row of tiles at a time. Warps do not wait
// for each other.
template <int ROWS, int TILES, int SPLITS, bool BIAS, int EXTRA = 0, int EXTRA_TILES = 0>
struct Product {
    static constexpr int PER = TILES > WARPS ? 2 : 1, GROUP = PER * WARPS, WIDE = least(TILES, GROUP);
    static constexpr int K = up_to(ROWS, 16) / 16, GROUPS = (TILES + GROUP - 1) / GROUP;
    static constexpr int STEP = least(K, up_to(most(1, RING / 4 / (WIDE * TILE)), SPLITS));
    static constexpr int COUNT = (STEP + SPLITS - 1) / SPLITS, BATCH = least(8 / PER, COUNT), CHAINS = COUNT > 1 ? 2 : 1;
    static constexpr bool EXACT = K % STEP == 0 && STEP % SPLITS == 0 && COUNT % BATCH == 0;  // no row is missing

    static constexpr int FIRST = up_to(64 * (BIAS * WIDE + EXTRA * EXTRA_TILES), TILE) + STEP * WIDE * TILE;  // bytes that have to be there before it begins

    static __host__ __device__ constexpr int wide(int group) { return least(GROUP, TILES - group * GROUP); }
    static __host__ __device__ constexpr int vectors(int group) {
        return up_to(64 * (BIAS * wide(group) + EXTRA * EXTRA_TILES), TILE);
    }

    // Calls begin(r, group, tile, place of the group's extra numbers) and out(r, tile, split, sums) for the rth tile of
    // a warp: sums of columns tile * 16 + g and the 8th after it, for clips 2 t and 2 t + 1 each, where g and t are
    // lane / 4 and lane % 4.
    template <class Begin, class Out>
    static __device__ __forceinline__ void run(Walk& w, const float* operand, int stride, Begin begin, Out out) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
        const char* x = (const char*)(operand + g % NS * stride) + lane % 4 * 16;
#pragma unroll 1
        for (int group = 0; group < GROUPS; group++) {
            const int wide_here = GROUPS == 1 ? WIDE : wide(group);
            const int m = PER == 1 ? warp % WIDE : warp, split = PER == 1 ? warp / WIDE : 0;
            const auto mine = [&](int r) {
                return PER == 1 ? warp < WIDE * SPLITS : m + r * WARPS < wide_here;
            };
            float bias[PER][2], sum[PER][2 * CHAINS][4];
#pragma unroll
            for (int r = 0; r < PER; r++) {
#pragma unroll
                for (int i = 0; i < 8 * CHAINS; i++) sum[r][i / 4][i % 4] = 0.0f;
                if (!mine(r)) continue;
#pragma unroll
                for (int h = 0; h < 2; h++)
                    bias[r][h] = BIAS && split == 0 ? vector_at(w.pos, (m + r * WARPS) * 16 + g + 8 * h) : 0.0f;
                begin(r, group, group * GROUP + m + r * WARPS, w.pos + BIAS * 64 * wide_here);
            }
            w.pos += vectors(group);
#pragma unroll 1
            for (int first = 0; first < K; first += STEP) {
                const int rows = least(STEP, K - first);
                const unsigned mine_at = w.pos + m * TILE + lane * 16;
#pragma unroll 1
                for (int batch = 0; batch < COUNT && mine(0); batch += BATCH)
#pragma unroll
                    for (int i = 0; i < BATCH; i++) {
                        const int k = split + (batch + i) * SPLITS;
                        if (!EXACT && k >= rows) continue;
#pragma unroll
                        for (int r = 0; r < PER; r++)
                            if (mine(r))
                                multiply(sum[r] + i % CHAINS * 2, mine_at + (k * wide_here + r * WARPS) * TILE,
                                         x + (first + k) * 64);
                    }
                w.pos += rows * wide_here * TILE;
                if (first + STEP < K)
                    turn(w, least(STEP, K - first - STEP) * wide_here * TILE);
                else if (group + 1 < GROUPS)
                    turn(w, vectors(group + 1) + STEP * wide(group + 1) * TILE);
            }
#pragma unroll
            for (int r = 0; r < PER; r++) {
                if (!mine(r)) continue;
                float total[4];
#pragma unroll
                for (int v = 0; v < 4; v++) {
                    total[v] = sum[r][0][v] + sum[r][1][v];
                    if (CHAINS == 2) total[v] += sum[r][2 * CHAINS - 2][v] + sum[r][2 * CHAINS - 1][v];
                    if (BIAS) total[v] += bias[r][v / 2];
                }
                out(r, group * GROUP + m + r * WARPS, split, total);
            }
        }
    }

    template <class Out>
    static __device__ __forceinline__ void run(Walk& w, const float* operand, int stride, Out out) {
        run(w, operand, stride, [](int, int, int, unsigned) {},
            [&](int, int tile, int split, const float* total) { out(tile, split, total); });
    }
};

// Calls f(column, clip, value) for what a thread has of a tile.
template <class F>
__device__ __forceinline__ void each_of(int tile, const float* total, F f) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int v = 0; v < 4; v++)
        if (lane % 4 * 2 + v % 2 < NS) f(tile * 16 + lane / 4 + v / 2 * 8, lane % 4 * 2 + v % 2, total[v]);
}

// Leaves a product's sums where the next settle() finds them.
template <int D>
__device__ __forceinline__ void leave(int tile, int split, const float* total) {
    float* part = room(AT_PART) + split * NS * up_to(D, 16);
    each_of(tile, total, [&](int j, int s, float value) { part[s * up_to(D, 16) + j] = value; });
}

// A product in which each warp takes the rows it has itself, TILES times 16 numbers from ROWS: row of tiles q * WARPS
// + warp for each q. out(tile, sums) gets a warp's share of each number; the biases, if any, are the first warp's.
template <int ROWS, int TILES, bool BIAS>
struct Share {
    static constexpr int ROUNDS = ROWS / (16 * WARPS), STEP = WARPS * TILES * TILE;
    static constexpr int VECTORS = BIAS ? up_to(64 * TILES, TILE) : 0, FIRST = VECTORS + STEP;

    template <class Out>
    static __device__ __forceinline__ void run(Walk& w, const float* operand, int stride, Out out) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
        const char* x = (const char*)(operand + g % NS * stride) + lane % 4 * 16 + warp * 64;
        float sum[TILES][2][4];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int v = 0; v < 4; v++) {
                sum[tile][0][v] = BIAS && warp == 0 ? vector_at(w.pos, tile * 16 + g + v / 2 * 8) : 0.0f;
                sum[tile][1][v] = 0.0f;
            }
        w.pos += VECTORS;
#pragma unroll 1
        for (int q = 0; q < ROUNDS; q++) {
            if (q) turn(w, STEP);
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
                multiply(sum[tile], w.pos + (warp * TILES + tile) * TILE + lane * 16, x + q * WARPS * 64);
            w.pos += STEP;
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int v = 0; v < 4; v++) sum[tile][0][v] += sum[tile][1][v];
            out(tile, sum[tile][0]);
        }
    }
};
