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

__device__ __forceinline__ bool has(letter both, unsigned count) { return (unsigned)(both >> 32) == count; }
__device__ __forceinline__ float number(letter both) { return __uint_as_float((unsigned)both); }

__device__ __forceinline__ float await(const letter* from, unsigned count) {
    letter both;
    do both = peek(from);
    while (!has(both, count));
    return number(both);
}

// Mail in a block's own shared memory has two slots: a layer is not asked again before its answer was read.
__device__ __forceinline__ letter* near_box(int at, int slot, unsigned count) {
    return (letter*)memory + at + (int)(count % 2) * slot;
}

// Where a block's output goes: by global memory to all who want it, and straight to those that wait for it.
struct Exit {
    letter* far;
    int slot, pushes;
    remote near[PUSHES];

    __device__ __forceinline__ Exit(const Args& a, const int* row, int skipped) {
        far = (letter*)a.mail + row[OUT] + skipped;
        slot = row[OUT_SLOT], pushes = row[PUSH_COUNT];
#pragma unroll
        for (int i = 0; i < PUSHES; i++)
            near[i] = reach((letter*)memory + row[PUSH + 2 * i + 1], i < pushes ? row[PUSH + 2 * i] : 0);
    }

    // Number j of a share of ``width``.
    __device__ __forceinline__ void say(int j, int width, float value, unsigned count) const {
#pragma unroll
        for (int i = 0; i < PUSHES; i++)
            if (i < pushes) push(near[i], (count % 2) * width + j, value, count);
        send(far + (long long)(count % DEPTH) * slot + j, value, count);
    }
};

// Numbers that come together: all are asked before any is waited for. from(i) is where the ith of up to MOST is.
template <int MOST, class Peek>
__device__ __forceinline__ float await_all(int number_of, unsigned count, Peek peek_at) {
    letter both[MOST];
    bool all;
    do {
        all = true;
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if (i < number_of) both[i] = peek_at(i);
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if (i < number_of) all = all && has(both[i], count);
    } while (!all);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < MOST; i++)
        if (i < number_of) sum += number(both[i]);
    return sum;
}

// Number j of what a block's sources say together at their turn ``count``: first what comes from afar, which is the older.
__device__ __forceinline__ float gather(const Args& a, const int* row, unsigned count, int j) {
    const letter *far[FARS], *near[NEARS];
#pragma unroll
    for (int i = 0; i < FARS; i++) far[i] = box(a, row[FAR + 2 * i], row[FAR + 2 * i + 1], count) + j;
#pragma unroll
    for (int i = 0; i < NEARS; i++) near[i] = near_box(row[NEAR + 2 * i], row[NEAR + 2 * i + 1], count) + j;
    const float from_far = await_all<FARS>(row[FAR_COUNT], count, [&](int i) { return peek(far[i]); });
    return from_far + await_all<NEARS>(row[NEAR_COUNT], count, [&](int i) { return peek_near(near[i]); });
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
            for (int i = 0; i < 16; i++) ((long long*)a.profile)[blockIdx.x * 16 + i] = sum[i];
    }
#else
    __device__ __forceinline__ void mark(int) {}
    __device__ __forceinline__ void save(const Args&) const {}
#endif
};

// Four numbers as lane 4 g + t gives them to a product: column g has their upper parts in bfloat16, or if it is odd the lower.
__device__ __forceinline__ uint2 split(float4 v) {
    unsigned a = two_halves(v.x, v.y), b = two_halves(v.z, v.w);
    const unsigned c = two_halves(v.x - __uint_as_float(a << 16), v.y - __uint_as_float(a & 0xffff0000u));
    const unsigned d = two_halves(v.z - __uint_as_float(b << 16), v.w - __uint_as_float(b & 0xffff0000u));
    return threadIdx.x & 4 ? make_uint2(c, d) : make_uint2(a, b);
}

// Number j of an input in shared memory: for each four, the upper and then the lower parts.
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

    // total(r, row g, row g + 8) of each of the warp's tiles; every lane of a quad gets the same. input(k) is a lane's part
    // of the kth 16 inputs.
    template <class Input, class Total>
    __device__ __forceinline__ void multiply(Input input, Total total) const {
        float sum[PER][CHAINS][4];
#pragma unroll
        for (int i = 0; i < PER * CHAINS * 4; i++) sum[i / (4 * CHAINS)][i / 4 % CHAINS][i % 4] = 0.0f;
        if (!mine(0)) return;
#pragma unroll
        for (int k = 0; k < K; k++) {
            const uint2 x = input(k);
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
            total(r, sum[r][0][0] + sum[r][0][1], sum[r][0][2] + sum[r][0][3]);
        }
    }

    // The same with inputs in shared memory; out(column, value) once for each column.
    template <class Out>
    __device__ __forceinline__ void run(const half_bits* operand, Out out) const {
        const int lane = threadIdx.x % 32, t = lane % 4;
        const char* x = (const char*)operand + t * 16 + lane / 4 % 2 * 8;
        multiply([&](int k) { return *(const uint2*)(x + k * 64); },
                 [&](int r, float low, float high) {
                     if (t < 2) out((threadIdx.x / 32 + r * WARPS) * 16 + lane / 4 + 8 * t, t ? high : low);
                 });
    }
};

// LayerNorm of x (D) in shared memory, by every warp for itself: a lane's four numbers of each 16, as products take them.
template <int D>
struct Norm {
    static constexpr int D16 = up_to(D, 16), K = D16 / 16, BYTES = 8 * D16, ROOM = BYTES;
    float4 *gain, *shift;

    __device__ __forceinline__ void load(const char* from, char* room) {
        gain = (float4*)room;
        shift = gain + D16 / 4;
        for (int i = threadIdx.x; i < D16 / 2; i += THREADS) gain[i] = ((const float4*)from)[i];
    }

    static __device__ __forceinline__ float of_quad(float value) {
        value += __shfl_xor_sync(~0u, value, 1);
        return value + __shfl_xor_sync(~0u, value, 2);
    }

    __device__ __forceinline__ void run(const float* x, uint2* input) const {
        const int t = threadIdx.x % 4;
        float4 v[K];
        float sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int k = 0; k < K; k++) {
            v[k] = ((const float4*)x)[4 * k + t];
            sum += (v[k].x + v[k].y) + (v[k].z + v[k].w);
        }
        const float mean = of_quad(sum) * (1.0f / D);
#pragma unroll
        for (int k = 0; k < K; k++) {
            const int j = 16 * k + 4 * t;
            v[k].x -= mean, v[k].y -= mean, v[k].z -= mean, v[k].w -= mean;
            if (D % 16) {  // numbers past the last
                if (j >= D) v[k].x = 0.0f;
                if (j + 1 >= D) v[k].y = 0.0f;
                if (j + 2 >= D) v[k].z = 0.0f;
                if (j + 3 >= D) v[k].w = 0.0f;
            }
            squares += (v[k].x * v[k].x + v[k].y * v[k].y) + (v[k].z * v[k].z + v[k].w * v[k].w);
        }
        const float scale = rsqrtf(of_quad(squares) * (1.0f / D) + 1e-5f);
#pragma unroll
        for (int k = 0; k < K; k++) {
            const float4 g = gain[4 * k + t], s = shift[4 * k + t];
            input[k] = split(make_float4(v[k].x * scale * g.x + s.x, v[k].y * scale * g.y + s.y,
                                         v[k].z * scale * g.z + s.z, v[k].w * scale * g.w + s.w));
        }
    }
};
