// The relay's table of jobs, its mail, and products of numbers in shared memory by weights in registers.

constexpr int THREADS = 32 * WARPS, CHANNELS = 16 * WARPS, TILE = 512;  // bytes of 16 columns by 16 rows

// Columns of the table, in which each block of threads has a row: then FARS places of mail in global memory (number 0 of slot
// 0, numbers of a slot), NEARS of mail in its own shared memory (the same), and PUSHES in that of others of its cluster
// (which one, number 0 of slot 0).
enum {
    JOB, PERIOD, WEIGHTS, STATE, OUT, OUT_SLOT, PART, SHARED, SAID, SAID_SLOT, POOL, FAR_COUNT, NEAR_COUNT,
    PUSH_COUNT, FAR, NEAR = FAR + 2 * FARS, PUSH = NEAR + 2 * NEARS, COLUMNS = PUSH + 2 * PUSHES
};

// The block's row, in its shared memory from ``take_row`` on.
__device__ __forceinline__ int* row_of_block() { return (int*)(memory + 8 * NEAR_LETTERS); }

__device__ __forceinline__ void take_row(const Args& a) {
    for (int i = threadIdx.x; i < COLUMNS; i += THREADS)
        row_of_block()[i] = ((const int*)a.table)[blockIdx.x * COLUMNS + i];
}

// How often a stage that runs once in PERIOD samples runs before sample ``seen``.
__device__ __forceinline__ long long turns(const int* row, long long seen) { return seen / row[PERIOD]; }

__device__ __forceinline__ letter* box(const Args& a, int at, int slot, unsigned count) {
    return (letter*)a.mail + at + (long long)(count % DEPTH) * slot;
}

// Mail in a block's own shared memory, from layers to layers, has two slots: a layer is not asked again before its answer
// was read.
__device__ __forceinline__ letter* near_box(int at, int slot, unsigned count) {
    return (letter*)memory + at + (int)(count % 2) * slot;
}

__device__ __forceinline__ bool has(letter both, unsigned count) { return (unsigned)(both >> 32) == count; }
__device__ __forceinline__ float number(letter both) { return __uint_as_float((unsigned)both); }

// Sizes of loops in what follows: FAR_MOST, NEAR_MOST and PUSH_MOST of a kind of block, 0 if it has none.

// Where a block's output goes: by global memory to all who want it, and straight to those that wait for it.
template <int PUSH_MOST>
struct Exit {
    letter* far;
    int slot, pushes;
    remote near[most(PUSH_MOST, 1)];

    __device__ __forceinline__ Exit(const Args& a, const int* row, int skipped) {
        far = (letter*)a.mail + row[OUT] + skipped;
        slot = row[OUT_SLOT], pushes = row[PUSH_COUNT];
#pragma unroll
        for (int i = 0; i < PUSH_MOST; i++)
            near[i] = reach((letter*)memory + row[PUSH + 2 * i + 1], i < pushes ? row[PUSH + 2 * i] : 0);
    }

    // Number j of a share of ``width``.
    __device__ __forceinline__ void say(int j, int width, float value, unsigned count) const {
#pragma unroll
        for (int i = 0; i < PUSH_MOST; i++)
            if (i < pushes) push(near[i], (count % 2) * width + j, value, count);
        send(far + (long long)(count % DEPTH) * slot + j, value, count);
    }
};

// Sums of N numbers each that come together: all are asked before any is waited for. peek(i, letters) asks for the ith of up
// to MOST.
template <int MOST, int N, class Peek>
__device__ __forceinline__ void await_all(int sources, unsigned count, float* sum, Peek peek) {
    if (MOST == 0) return;
    letter both[most(MOST, 1)][N];
    bool all;
    const unsigned lanes = __activemask();  // they go on together
    do {
        all = true;
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if (i < sources) peek(i, both[i]);
#pragma unroll
        for (int i = 0; i < MOST * N; i++)
            if (i / N < sources) all = all && has(both[i / N][i % N], count);
    } while (__any_sync(lanes, !all));
#pragma unroll
    for (int i = 0; i < MOST * N; i++)
        if (i / N < sources) sum[i % N] += number(both[i / N][i % N]);
}

// Four numbers of what a block's sources say together at their turn ``count``: first what comes from afar, which is the older.
template <int FAR_MOST, int NEAR_MOST>
__device__ __forceinline__ float4 gather(const Args& a, const int* row, unsigned count, int quad) {
    const letter *far[most(FAR_MOST, 1)], *near[most(NEAR_MOST, 1)];
#pragma unroll
    for (int i = 0; i < FAR_MOST; i++) far[i] = box(a, row[FAR + 2 * i], row[FAR + 2 * i + 1], count) + 4 * quad;
#pragma unroll
    for (int i = 0; i < NEAR_MOST; i++) near[i] = near_box(row[NEAR + 2 * i], row[NEAR + 2 * i + 1], count) + 4 * quad;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    await_all<FAR_MOST, 4>(row[FAR_COUNT], count, sum, [&](int i, letter* four) { peek_far(far[i], four); });
    await_all<NEAR_MOST, 4>(row[NEAR_COUNT], count, sum, [&](int i, letter* four) { peek_near(near[i], four); });
    return make_float4(sum[0], sum[1], sum[2], sum[3]);
}

// Cycles of a block's first thread from each mark to the next.
struct Watch {
#ifdef PROFILE
    unsigned last = 0, sum[16] = {};

    __device__ __forceinline__ void mark(int i) {
        const unsigned now = (unsigned)clock64();
        if (last) sum[i] += now - last;
        last = now;
    }

    __device__ __forceinline__ void save(const Args& a) const {
        if (threadIdx.x == 0)
            for (int i = 0; i < 16; i++) ((long long*)a.profile)[blockIdx.x * 16 + i] = (int)sum[i];
    }
#else
    __device__ __forceinline__ void mark(int) {}
    __device__ __forceinline__ void save(const Args&) const {}
#endif
};

// Four numbers of an input in shared memory: the upper parts in bfloat16, then the lower ones.
__device__ __forceinline__ uint4 split(float4 v) {
    const unsigned a = two_halves(v.x, v.y), b = two_halves(v.z, v.w);
    const unsigned c = two_halves(v.x - __uint_as_float(a << 16), v.y - __uint_as_float(a & 0xffff0000u));
    const unsigned d = two_halves(v.z - __uint_as_float(b << 16), v.w - __uint_as_float(b & 0xffff0000u));
    return make_uint4(a, b, c, d);
}

// One number of them.
__device__ __forceinline__ void put(half_bits* operand, int j, float value) {
    half_bits* at = operand + j / 4 * 8 + j % 4;
    at[0] = nearest_half(value);
    at[4] = nearest_half(value - __uint_as_float((unsigned)at[0] << 16));
}

// A warp's share of a product's weights: PER tiles of 16 columns, WARPS apart, by K tiles of 16 rows. They stay in
// registers, or in shared memory where they are too many.
template <int K, int TILES, bool HELD>
struct Weights {
    static constexpr int PER = (TILES + WARPS - 1) / WARPS, CHAINS = PER == 1 ? least(K, 4) : least(K, 2);
    static constexpr int BYTES = K * TILES * TILE, ROOM = HELD ? 0 : BYTES;
    uint4 held[HELD ? K * PER : 1];
    const uint4* kept;

    __device__ __forceinline__ static bool mine(int r) {
        return TILES % WARPS == 0 || (int)threadIdx.x / 32 + r * WARPS < TILES;
    }

    __device__ __forceinline__ static int place(int k, int r) {
        return (k * TILES + threadIdx.x / 32 + r * WARPS) * 32 + threadIdx.x % 32;
    }

    __device__ __forceinline__ void load(const char* from, char* room) {
        const uint4* all = (const uint4*)from;
        if constexpr (HELD) {
#pragma unroll
            for (int k = 0; k < K; k++)
#pragma unroll
                for (int r = 0; r < PER; r++) held[k * PER + r] = mine(r) ? all[place(k, r)] : make_uint4(0, 0, 0, 0);
        } else {
            kept = (const uint4*)room;
            for (int i = threadIdx.x; i < BYTES / 16; i += THREADS) ((uint4*)room)[i] = all[i];
        }
    }

    // total(r, first column, row g, row g + 8) of each of the warp's tiles; every lane of a quad gets the same. Lanes of even g
    // give the upper parts of the input, those of odd g the lower.
    template <class Total>
    __device__ __forceinline__ void multiply(const uint4* operand, Total total) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const uint2* from = (const uint2*)operand + lane % 4 * 2 + lane / 4 % 2;
        float sum[PER][CHAINS][4];
#pragma unroll
        for (int i = 0; i < PER * CHAINS * 4; i++) sum[i / (4 * CHAINS)][i / 4 % CHAINS][i % 4] = 0.0f;
        if (!mine(0)) return;
#pragma unroll
        for (int k = 0; k < K; k++) {
            const uint2 x = from[8 * k];
#pragma unroll
            for (int r = 0; r < PER; r++)
                if (mine(r)) multiply_half(sum[r][k % CHAINS], HELD ? held[k * PER + r] : kept[place(k, r)], x.x, x.y);
        }
#pragma unroll
        for (int r = 0; r < PER; r++) {
            if (!mine(r)) continue;
#pragma unroll
            for (int c = 1; c < CHAINS; c++)
#pragma unroll
                for (int v = 0; v < 4; v++) sum[r][0][v] += sum[r][c][v];
            total(r, (warp + r * WARPS) * 16, sum[r][0][0] + sum[r][0][1], sum[r][0][2] + sum[r][0][3]);
        }
    }

    // The same, but out(r, column, value) once for each column.
    template <class Out>
    __device__ __forceinline__ void run(const uint4* operand, Out out) const {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        multiply(operand, [&](int r, int first, float low, float high) {
            if (t < 2) out(r, first + g + 8 * t, t ? high : low);
        });
    }
};

// x (D) of a block's turn by its first warp, and its LayerNorm as products take it. A warp is faster at it than eight that
// wait for each other, or that do all of it eight times.
template <int D>
struct Norm {
    static constexpr int D16 = up_to(D, 16), QUADS = D16 / 4, BYTES = 8 * D16, ROOM = 16 * D16;
    static constexpr bool EVEN = D16 == D && (QUADS & (QUADS - 1)) == 0;  // all lanes have as many numbers
    static constexpr int LANES = EVEN ? least(QUADS, 32) : 32, EACH = (QUADS + LANES - 1) / LANES;
    float4 *gain, *shift;
    float4* x;
    uint4* normed;

    __device__ __forceinline__ void load(const char* from, char* room) {
        gain = (float4*)room, shift = gain + QUADS, x = shift + QUADS, normed = (uint4*)(x + QUADS);
        for (int i = threadIdx.x; i < 2 * QUADS; i += THREADS) gain[i] = ((const float4*)from)[i];
    }

    static __device__ __forceinline__ float of_all(float value) {
#pragma unroll
        for (int o = LANES / 2; o; o >>= 1) value += __shfl_xor_sync(~0u, value, o);
        return value;
    }

    static __device__ __forceinline__ float total(float4 v) { return (v.x + v.y) + (v.z + v.w); }

    static __device__ __forceinline__ float4 less(float4 v, float mean) {
        return make_float4(v.x - mean, v.y - mean, v.z - mean, v.w - mean);
    }

    static __device__ __forceinline__ float squares(float4 v) {
        return (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
    }

    // Mean, and the sum of squares of what the numbers differ from it by. Lanes of as many numbers join theirs in one go
    // (Chan et al.): a difference d of two sums of n numbers adds d^2 / 2 n to the squares.
    static __device__ __forceinline__ void moments(const float4* v, int lane, float* mean, float* square) {
        float sum = 0.0f;
        *square = 0.0f;
#pragma unroll
        for (int i = 0; i < EACH; i++) sum += total(v[i]);
        if constexpr (EVEN) {
#pragma unroll
            for (int i = 0; i < EACH; i++) *square += squares(less(v[i], sum * (0.25f / EACH)));
#pragma unroll
            for (int o = 1; o < LANES; o *= 2) {
                const float other = __shfl_xor_sync(~0u, sum, o), d = other - sum;
                *square += __shfl_xor_sync(~0u, *square, o);
                *square = fmaf(d * d, 0.125f / (EACH * o), *square);
                sum += other;
            }
            *mean = sum * (1.0f / D);
            return;
        }
        *mean = of_all(sum) * (1.0f / D);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int j = 4 * (lane + 32 * i);
            float4 d = less(v[i], *mean);
            d.x = j < D ? d.x : 0.0f, d.y = j + 1 < D ? d.y : 0.0f;
            d.z = j + 2 < D ? d.z : 0.0f, d.w = j + 3 < D ? d.w : 0.0f;
            *square += squares(d);
        }
        *square = of_all(*square);
    }

    // Of the quads that get(quad) returns; to be called by the first warp.
    template <class Get>
    __device__ __forceinline__ void run(Get get) const {
        const int lane = threadIdx.x % LANES;
        float4 v[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++)
            v[i] = lane + 32 * i < QUADS ? get(lane + 32 * i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float mean, square;
        moments(v, lane, &mean, &square);
        const float scale = rsqrtf(square * (1.0f / D) + 1e-5f);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int quad = lane + 32 * i;
            if (quad >= QUADS) continue;
            const float4 g = gain[quad], s = shift[quad], d = less(v[i], mean);
            x[quad] = v[i];
            normed[quad] = split(make_float4(d.x * scale * g.x + s.x, d.y * scale * g.y + s.y,
                                             d.z * scale * g.z + s.z, d.w * scale * g.w + s.w));
        }
    }
};
