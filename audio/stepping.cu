// Generation steps of a U-Net: one block of threads takes NS clips through any number of samples.
//
// Nothing is shared between blocks, so there is no barrier of the grid and no launch per layer: the weights stream from
// L2 and each number of them serves NS clips; activations live in shared memory; a clip's state in global memory.
// Which layers run at a sample follows from the sample's number, exactly: stage d of the net runs once in each product
// of the pool factors before it. Tables and layouts are those of audio/packing.py. All sizes are known when the kernel
// is compiled: a step is short of latency, not of arithmetic, and divisions and loop counters would be most of it.
//
// Macros: NS clips of a block, THREADS, HALF (matrices in bfloat16 beside float32 vectors), columns of the tables,
// BLOCK_CASES (a case for each shape of layer), and sizes: WIDEST, INNER_WIDE, LOW_WIDE, PART_WIDE, SKIPS_KEPT, LEVELS,
// WIDTH_OUT, STATE_SIZE, BLOCK_COUNT, STAGE_COUNT, UNET.

typedef unsigned short half_bits;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }

extern __shared__ __align__(16) float memory[];
constexpr int AT_WEIGHTS = 0, AT_X = 2 * NS * LEVELS, AT_NORMED = AT_X + NS * WIDEST, AT_INNER = AT_NORMED + NS * WIDEST;
constexpr int AT_U = AT_INNER + NS * INNER_WIDE, AT_LOW = AT_U + NS * INNER_WIDE, AT_LOGITS = AT_LOW + NS * LOW_WIDE;
constexpr int AT_PART = AT_LOGITS + NS * LEVELS, AT_SKIPS = AT_PART + NS * PART_WIDE;
constexpr int AT_TABLES = AT_SKIPS + NS * SKIPS_KEPT * WIDEST;
#define X (memory + AT_X)
#define NORMED (memory + AT_NORMED)
#define INNER_ROOM (memory + AT_INNER)
#define U_ROOM (memory + AT_U)
#define LOW_ROOM (memory + AT_LOW)
#define LOGITS (memory + AT_LOGITS)
#define PARTS (memory + AT_PART)
#define SKIPS (memory + AT_SKIPS)

struct Net {
    const float* weights;
    const void* matrices;  // the same numbers, in bfloat16 where HALF
    float* state;          // of the first clip, STATE_SIZE numbers each
};

struct Four { float v[4]; };

__device__ __forceinline__ Four load_four(const Net& n, int at) {
    Four f;
#if HALF
    const uint2 raw = __ldg((const uint2*)((const half_bits*)n.matrices + at));
    f.v[0] = __uint_as_float(raw.x << 16);
    f.v[1] = __uint_as_float(raw.x & 0xffff0000u);
    f.v[2] = __uint_as_float(raw.y << 16);
    f.v[3] = __uint_as_float(raw.y & 0xffff0000u);
#else
    const float4 raw = __ldg((const float4*)(n.weights + at));
    f.v[0] = raw.x; f.v[1] = raw.y; f.v[2] = raw.z; f.v[3] = raw.w;
#endif
    return f;
}

__device__ __forceinline__ float load_one(const Net& n, int at) {
#if HALF
    return __uint_as_float((unsigned)__ldg((const half_bits*)n.matrices + at) << 16);
#else
    return __ldg(n.weights + at);
#endif
}

__device__ __forceinline__ float vector_at(const Net& n, int at) { return __ldg(n.weights + at); }

// A product out(s, j, b_j + sum_i x[s][i] W[i][j]) for every clip s and column j; the weights hold b, then W (rows,
// columns). Threads share columns and rows out, and their sums meet in PARTS. What a thread reads of a small matrix fits
// into registers: ``load`` can then run long before x is there.
template <int ROWS, int COLS>
struct Product {
    static constexpr int V = COLS % 4 == 0 ? 4 : 1, ITEMS = COLS / V, HERE = least(ITEMS, THREADS);
    static constexpr int CHUNKS = (ITEMS + HERE - 1) / HERE;
    static constexpr int SPLITS = most(1, least(THREADS / HERE, ROWS / 4)), EACH = (ROWS + SPLITS - 1) / SPLITS;
    static constexpr bool EARLY = NS == 1 && V == 4 && CHUNKS == 1 && EACH <= 8;
    static constexpr int BATCH = EARLY ? EACH : least(8, EACH);

    Four held[EARLY ? EACH : 1];

    __device__ __forceinline__ void load(const Net& n, int at) {
        if constexpr (EARLY) {
            const int q = threadIdx.x % HERE, k = threadIdx.x / HERE;
            if (k < SPLITS)
#pragma unroll
                for (int e = 0; e < EACH; e++)
                    if (ROWS % SPLITS == 0 || k + e * SPLITS < ROWS) held[e] = load_four(n, at + COLS + (k + e * SPLITS) * COLS + q * V);
        }
    }

    template <class Out>
    __device__ __forceinline__ void run(const Net& n, const float* x, int stride, int at, Out out) {
        const int q = threadIdx.x % HERE, k = threadIdx.x / HERE;
#pragma unroll 1
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int item = chunk * HERE + q;
            if (k < SPLITS && (ITEMS % HERE == 0 || item < ITEMS)) {
                float sum[NS][V];
#pragma unroll
                for (int s = 0; s < NS; s++)
#pragma unroll
                    for (int v = 0; v < V; v++) sum[s][v] = 0.0f;
#pragma unroll 1
                for (int first = 0; first < EACH; first += BATCH) {
                    Four w[BATCH];
#pragma unroll
                    for (int e = 0; e < BATCH; e++) {
                        const int i = k + (first + e) * SPLITS;
                        const bool there = (EACH % BATCH == 0 && ROWS % SPLITS == 0) || i < ROWS;
                        if constexpr (EARLY) w[e] = held[e];
                        else if constexpr (V == 4) { if (there) w[e] = load_four(n, at + COLS + i * COLS + item * V); }
                        else if (there) w[e].v[0] = load_one(n, at + COLS + i * COLS + item);
                    }
#pragma unroll
                    for (int e = 0; e < BATCH; e++) {
                        const int i = k + (first + e) * SPLITS;
                        if ((EACH % BATCH == 0 && ROWS % SPLITS == 0) || i < ROWS)
#pragma unroll
                            for (int s = 0; s < NS; s++) {
                                const float value = x[s * stride + i];
#pragma unroll
                                for (int v = 0; v < V; v++) sum[s][v] = fmaf(value, w[e].v[v], sum[s][v]);
                            }
                    }
                }
#pragma unroll
                for (int s = 0; s < NS; s++)
#pragma unroll
                    for (int v = 0; v < V; v++) PARTS[(k * NS + s) * HERE * V + q * V + v] = sum[s][v];
            }
            __syncthreads();
            constexpr int WIDE_HERE = HERE * V;
#pragma unroll
            for (int s = 0; s < NS; s++)
                for (int j = threadIdx.x; j < WIDE_HERE; j += THREADS) {
                    const int column = chunk * WIDE_HERE + j;
                    if (COLS % WIDE_HERE == 0 || column < COLS) {
                        float total = vector_at(n, at + column);
#pragma unroll
                        for (int split = 0; split < SPLITS; split++) total += PARTS[(split * NS + s) * WIDE_HERE + j];
                        out(s, column, total);
                    }
                }
            __syncthreads();
        }
    }
};

template <int DIM_>
__device__ __forceinline__ void layer_norm(const Net& n, int at) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp < NS) {
        const float* row = X + warp * WIDEST;
        constexpr int EACH = (DIM_ + 31) / 32;
        float value[EACH], weight[EACH], bias[EACH], mean = 0.0f, square = 0.0f;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int i = lane + 32 * j;
            const bool there = i < DIM_;
            value[j] = there ? row[i] : 0.0f;
            weight[j] = there ? vector_at(n, at + i) : 0.0f;
            bias[j] = there ? vector_at(n, at + DIM_ + i) : 0.0f;
            mean += value[j];
        }
        for (int o = 16; o; o >>= 1) mean += __shfl_xor_sync(~0u, mean, o);
        mean /= DIM_;
#pragma unroll
        for (int j = 0; j < EACH; j++) square += lane + 32 * j < DIM_ ? (value[j] - mean) * (value[j] - mean) : 0.0f;
        for (int o = 16; o; o >>= 1) square += __shfl_xor_sync(~0u, square, o);
        const float scale = 1.0f / sqrtf(square / DIM_ + 1e-5f);
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (lane + 32 * j < DIM_) NORMED[warp * WIDEST + lane + 32 * j] = (value[j] - mean) * scale * weight[j] + bias[j];
    }
    __syncthreads();
}

// One step of a Mamba layer, added to x; see audio/stepping.py.
template <int D, int E, int N, int W, int R>
__device__ __noinline__ void mamba(const Net n, const int* row) {
    const int tid = threadIdx.x;
    Product<D, 2 * E> in;
    Product<E, R + 2 * N> low;
    Product<E, D> out;
    in.load(n, row[W_IN]);
    low.load(n, row[W_X]);
    out.load(n, row[W_OUT]);
    layer_norm<D>(n, row[W_NORM]);
    in.run(n, NORMED, WIDEST, row[W_IN], [&](int s, int j, float value) { INNER_ROOM[s * INNER_WIDE + j] = value; });
    for (int i = tid; i < NS * E; i += THREADS) {
        const int s = i / E, e = i % E;
        float* past = n.state + s * STATE_SIZE + row[S_CONV] + e;
        const float now = INNER_ROOM[s * INNER_WIDE + e];
        float u = vector_at(n, row[W_CONV] + e) + vector_at(n, row[W_CONV] + W * E + e) * now, before[W];
#pragma unroll
        for (int k = 0; k < W - 1; k++) before[k] = past[k * E];
        before[W - 1] = now;
#pragma unroll
        for (int k = 0; k < W - 1; k++) {
            u += vector_at(n, row[W_CONV] + (k + 1) * E + e) * before[k];
            past[k * E] = before[k + 1];
        }
        U_ROOM[s * INNER_WIDE + e] = u * sigmoid(u);
    }
    __syncthreads();
    constexpr int PARTS_ = most(1, least(THREADS / (NS * E), N)), TURNS = (N + PARTS_ - 1) / PARTS_;
    constexpr bool HOLD = PARTS_ * NS * E <= THREADS && TURNS <= 8;  // a thread has one channel: its state can come early
    float early[HOLD ? TURNS : 1];
    if constexpr (HOLD)
        if (tid < PARTS_ * NS * E)
#pragma unroll
            for (int j = 0; j < TURNS; j++) {
                const int m = tid / (E * NS) + j * PARTS_;
                if (m < N) early[j] = n.state[tid / E % NS * STATE_SIZE + row[S_SSM] + m * E + tid % E];
            }
    low.run(n, U_ROOM, INNER_WIDE, row[W_X], [&](int s, int j, float value) { LOW_ROOM[s * LOW_WIDE + j] = value; });
    for (int i = tid; i < PARTS_ * NS * E; i += THREADS) {
        const int e = i % E, s = i / E % NS, p = i / (E * NS);
        const float* low_row = LOW_ROOM + s * LOW_WIDE;
        float dt = vector_at(n, row[W_DT] + e), u = U_ROOM[s * INNER_WIDE + e], y = 0.0f;
#pragma unroll
        for (int j = 0; j < R; j++) dt = fmaf(low_row[j], load_one(n, row[W_DT] + (j + 1) * E + e), dt);
        dt = softplus(dt);
        float* h = n.state + s * STATE_SIZE + row[S_SSM] + e;
#pragma unroll
        for (int j = 0; j < TURNS; j++) {
            const int m = p + j * PARTS_;
            if (N % PARTS_ == 0 || m < N) {
                const float old = HOLD ? early[HOLD ? j : 0] : h[m * E];
                const float value = expf(dt * vector_at(n, row[W_A] + m * E + e)) * old + dt * low_row[R + m] * u;
                h[m * E] = value;
                y = fmaf(low_row[R + N + m], value, y);
            }
        }
        PARTS[i] = y;
    }
    __syncthreads();
    for (int i = tid; i < NS * E; i += THREADS) {
        const int s = i / E, e = i % E;
        float y = vector_at(n, row[W_SKIP] + e) * U_ROOM[s * INNER_WIDE + e];
        const float z = INNER_ROOM[s * INNER_WIDE + E + e];
#pragma unroll
        for (int p = 0; p < PARTS_; p++) y += PARTS[p * NS * E + i];
        U_ROOM[s * INNER_WIDE + e] = y * z * sigmoid(z);
    }
    __syncthreads();
    out.run(n, U_ROOM, INNER_WIDE, row[W_OUT], [&](int s, int j, float value) { X[s * WIDEST + j] += value; });
}

// One step of an S4D layer: x_m = a_m x_m + b_m u, y = 2 Re sum c_m x_m + D u, then GELU, linear, GLU; added to x.
template <int D, int OUT, int M>
__device__ __noinline__ void s4d(const Net n, const int* row) {
    const int tid = threadIdx.x;
    Product<D, OUT> out;
    out.load(n, row[W_OUT]);
    layer_norm<D>(n, row[W_NORM]);
    constexpr int PARTS_ = most(1, least(THREADS / (NS * D), M)), PLANE = M * D;
    for (int i = tid; i < PARTS_ * NS * D; i += THREADS) {
        const int e = i % D, s = i / D % NS, p = i / (D * NS), w = row[W_A] + e;
        const float u = NORMED[s * WIDEST + e];
        float* h = n.state + s * STATE_SIZE + row[S_SSM] + e;
        float y = 0.0f;
#pragma unroll 4
        for (int m = p; m < M; m += PARTS_) {
            const int at = m * D;
            const float re = h[at], im = h[PLANE + at], ar = vector_at(n, w + at), ai = vector_at(n, w + PLANE + at);
            const float nr = ar * re - ai * im + vector_at(n, w + 2 * PLANE + at) * u;
            const float ni = ar * im + ai * re + vector_at(n, w + 3 * PLANE + at) * u;
            h[at] = nr;
            h[PLANE + at] = ni;
            y += vector_at(n, w + 4 * PLANE + at) * nr - vector_at(n, w + 5 * PLANE + at) * ni;
        }
        PARTS[i] = y;
    }
    __syncthreads();
    for (int i = tid; i < NS * D; i += THREADS) {
        const int s = i / D, e = i % D;
        float y = vector_at(n, row[W_SKIP] + e) * NORMED[s * WIDEST + e];
        for (int p = 0; p < PARTS_; p++) y += PARTS[p * NS * D + i];
        U_ROOM[s * INNER_WIDE + e] = gelu(y);
    }
    __syncthreads();
    out.run(n, U_ROOM, INNER_WIDE, row[W_OUT], [&](int s, int j, float value) { INNER_ROOM[s * INNER_WIDE + j] = value; });
    for (int i = tid; i < NS * D; i += THREADS) {
        const int s = i / D, e = i % D;
        float value = INNER_ROOM[s * INNER_WIDE + e];
        if (OUT > D) value *= sigmoid(INNER_ROOM[s * INNER_WIDE + D + e]);
        X[s * WIDEST + e] += value;
    }
    __syncthreads();
}

template <int D, int HIDDEN>
__device__ __noinline__ void feed_forward(const Net n, const int* row) {
    Product<D, HIDDEN> in;
    Product<HIDDEN, D> out;
    in.load(n, row[W_IN]);
    out.load(n, row[W_OUT]);
    layer_norm<D>(n, row[W_NORM]);
    in.run(n, NORMED, WIDEST, row[W_IN], [&](int s, int j, float value) { INNER_ROOM[s * INNER_WIDE + j] = gelu(value); });
    out.run(n, INNER_ROOM, INNER_WIDE, row[W_OUT], [&](int s, int j, float value) { X[s * WIDEST + j] += value; });
}

__device__ __forceinline__ void block(const Net& n, const int* row) {
    switch (row[SHAPE]) { BLOCK_CASES }
}

// Poolings, from and to INNER_ROOM; POOL_CASES has a case for each stage.
template <int ROWS, int COLS>
__device__ __noinline__ void pool_down(const Net n, int at) {
    Product<ROWS, COLS> product;
    product.load(n, at);
    product.run(n, INNER_ROOM, INNER_WIDE, at, [&](int s, int j, float value) { X[s * WIDEST + j] = value; });
}

template <int ROWS, int COLS>
__device__ __noinline__ void pool_up(const Net n, int at) {
    Product<ROWS, COLS> product;
    product.load(n, at);
    product.run(n, X, WIDEST, at, [&](int s, int j, float value) { INNER_ROOM[s * INNER_WIDE + j] = value; });
}

__device__ __forceinline__ void keep(int place, int dim) {
    for (int s = 0; s < NS; s++)
        for (int i = threadIdx.x; i < dim; i += THREADS) SKIPS[(place * NS + s) * WIDEST + i] = X[s * WIDEST + i];
    // Read again by the same threads only, in add_kept and the sum at a pooling: no barrier.
}

__device__ __forceinline__ void add_kept(int place, int dim) {
    for (int s = 0; s < NS; s++)
        for (int i = threadIdx.x; i < dim; i += THREADS) X[s * WIDEST + i] += SKIPS[(place * NS + s) * WIDEST + i];
    __syncthreads();
}

// One step of the net for NS clips, sample number t; X holds the embedded levels.
__device__ __forceinline__ void net(const Net& n, const Args& a, const int* blocks, const int* stages, long long t) {
    const int last = STAGE_COUNT - 1, tid = threadIdx.x;
    int depth = 0, kept = 0;
    int phases[STAGE_COUNT];
    long long frame = t;  // number of the sample within its stage
#pragma unroll
    for (int d = 0; d < STAGE_COUNT - 1; d++) {
        const int pool = stages[d * STAGE_COLUMNS + POOL];
        phases[d] = frame % pool;
        frame /= pool;
    }
    while (true) {
        const int* stage = stages + depth * STAGE_COLUMNS;
        const int dim = stage[WIDE], pool = stage[POOL];
        if (depth == last) keep(kept, dim);
        for (int i = 0; i < stage[BLOCKS]; i++) {
            if (depth < last && UNET) keep(kept++, dim);
            block(n, blocks + (stage[FIRST_DOWN] + i) * COLUMNS);
        }
        if (depth == last) {
            add_kept(kept, dim);
            break;
        }
        keep(kept++, dim);
        const int phase = phases[depth];
        for (int s = 0; s < NS; s++)
            for (int i = tid; i < dim; i += THREADS)
                n.state[s * STATE_SIZE + stage[S_WAITING] + phase * dim + i] = X[s * WIDEST + i];
        if (phase < pool - 1) break;
        __syncthreads();
        for (int s = 0; s < NS; s++)
            for (int j = tid; j < dim * pool; j += THREADS)  // in the order of the pooling's weights, pool fastest
                INNER_ROOM[s * INNER_WIDE + j] = n.state[s * STATE_SIZE + stage[S_WAITING] + j % pool * dim + j / pool];
        __syncthreads();
        switch (depth) { DOWN_CASES }
        depth++;
    }
    for (int d = least(depth, last - 1); d >= 0; d--) {
        const int* stage = stages + d * STAGE_COLUMNS;
        const int dim = stage[WIDE], pool = stage[POOL], phase = phases[d];
        const bool full = phase == pool - 1;
        if (full)  // X is what the inner stages say about this frame, for the next one
            switch (d) { UP_CASES }
        kept--;
        for (int s = 0; s < NS; s++)
            for (int j = tid; j < dim; j += THREADS) {
                const float now = n.state[s * STATE_SIZE + stage[S_CURRENT] + phase * dim + j];
                X[s * WIDEST + j] = now + SKIPS[(kept * NS + s) * WIDEST + j];
            }
        __syncthreads();
        if (full) {
            for (int s = 0; s < NS; s++)
                for (int j = tid; j < dim * pool; j += THREADS)
                    n.state[s * STATE_SIZE + stage[S_CURRENT] + j % pool * dim + j / pool] = INNER_ROOM[s * INNER_WIDE + j];
            __syncthreads();
        }
        if (!UNET) keep(kept, dim);  // without skips of each layer, the sum is added again after them
        for (int i = 0; i < stage[UP_BLOCKS]; i++) {
            block(n, blocks + (stage[FIRST_UP] + i) * COLUMNS);
            if (UNET) add_kept(--kept, dim);
        }
        if (!UNET) add_kept(kept, dim);
    }
    Product<WIDTH_OUT, LEVELS> head;
    head.load(n, a.head);
    layer_norm<WIDTH_OUT>(n, a.last_norm);
    head.run(n, NORMED, WIDEST, a.head, [&](int s, int j, float value) { LOGITS[s * LEVELS + j] = value; });
}

// How many levels are likelier than q, or as likely and before it, and their weight together.
__device__ __noinline__ int rank_of(const float* logits, const double* weights, int Q, int q, double* before) {
    int rank = 0;
    *before = 0.0;
    for (int o = 0; o < Q; o++)
        if (logits[o] > logits[q] || (logits[o] == logits[q] && o < q)) {
            rank++;
            *before += weights[o];
        }
    return rank;
}

// ``how`` is temperature, top_p, min_p.
// Level of clip s where the distribution function passes a number; one warp a clip. As _choose in audio/stepping.py.
__device__ __noinline__ int choose(const double* how, int top_k, int s, double uniform, double* log_likelihood) {
    const int lane = threadIdx.x % 32, Q = LEVELS, each = (LEVELS + 31) / 32;
    const float* logits = LOGITS + s * Q;
    double* weights = (double*)(memory + AT_WEIGHTS) + s * Q;
    float best = -INFINITY;
    int place = 0;
    for (int q = lane; q < Q; q += 32)
        if (logits[q] > best) { best = logits[q]; place = q; }
    for (int o = 16; o; o >>= 1) {
        const float other = __shfl_xor_sync(~0u, best, o);
        const int there = __shfl_xor_sync(~0u, place, o);
        if (other > best || (other == best && there < place)) { best = other; place = there; }
    }
    double mass = 0.0;
    for (int q = lane; q < Q; q += 32) mass += exp((double)(logits[q] - best));
    for (int o = 16; o; o >>= 1) mass += __shfl_xor_sync(~0u, mass, o);
    int level = place;
    if (how[0] != 0.0) {
        for (int q = lane; q < Q; q += 32) weights[q] = exp(((double)logits[q] - (double)best) / how[0]);
        __syncwarp();
        const int kept = top_k > 0 ? min(top_k, Q) : Q;
        if (top_k > 0 || how[1] < 1.0) {
            double total = 0.0, before;
            unsigned drop = 0;  // a bit for each level of this lane: at most 1024 levels
            for (int q = lane; q < Q; q += 32) total += rank_of(logits, weights, Q, q, &before) < kept ? weights[q] : 0.0;
            for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(~0u, total, o);
            for (int j = 0, q = lane; q < Q; j++, q += 32) {
                const int rank = rank_of(logits, weights, Q, q, &before);
                if (rank > 0 && (rank >= kept || (how[1] < 1.0 && before >= (how[1] - 1e-7) * total))) drop |= 1u << j;
            }
            __syncwarp();
            for (int j = 0, q = lane; q < Q; j++, q += 32)
                if (drop >> j & 1) weights[q] = 0.0;
        }
        __syncwarp();
        double own = 0.0;
        for (int q = lane * each; q < min(Q, (lane + 1) * each); q++) {
            if (weights[q] < how[2]) weights[q] = 0.0;
            own += weights[q];
        }
        double upto = own;
        for (int o = 1; o < 32; o <<= 1) {
            const double other = __shfl_up_sync(~0u, upto, o);
            if (lane >= o) upto += other;
        }
        const double target = uniform * __shfl_sync(~0u, upto, 31);
        double reached = upto - own;
        int mine = Q;
        for (int q = lane * each; q < min(Q, (lane + 1) * each); q++) {
            reached += weights[q];
            if (reached > target) { mine = q; break; }
        }
        for (int o = 16; o; o >>= 1) mine = min(mine, __shfl_xor_sync(~0u, mine, o));
        if (mine < Q) level = mine;  // else rounding left the sum short of the total
    }
    *log_likelihood += (double)logits[level] - (double)best - log(mass);
    return level;
}

extern "C" __global__ void __launch_bounds__(THREADS) advance(const __grid_constant__ Args a) {
    __shared__ int chosen[NS], offset[NS];
    const int tid = threadIdx.x, warp = tid / 32;
    const long long first = (long long)blockIdx.x * NS;  // clips past the last one have a state, and the last one's levels
    const Net n = {(const float*)a.weights, a.matrices, (float*)a.state + first * STATE_SIZE};
    int* blocks = (int*)(memory + AT_TABLES);
    int* stages = blocks + BLOCK_COUNT * COLUMNS;
    for (int i = tid; i < BLOCK_COUNT * COLUMNS; i += THREADS) blocks[i] = ((const long long*)a.blocks)[i];
    for (int i = tid; i < STAGE_COUNT * STAGE_COLUMNS; i += THREADS) stages[i] = ((const long long*)a.stages)[i];
    for (int s = 0; s < NS; s++) {
        const long long clip = min(first + s, a.count - 1);
        if (tid == 0) offset[s] = (int)((const long long*)a.offset)[clip];
        for (int q = tid; q < LEVELS; q += THREADS) LOGITS[s * LEVELS + q] = ((const float*)a.logits)[clip * LEVELS + q];
    }
    __syncthreads();
    double likelihood = 0.0;
    const int dim = stages[WIDE];
    const long long mine = min(first + warp, a.count - 1);
    const bool real = first + warp < a.count;
    for (long long step = 0; step < a.length; step++) {
        if (warp < NS) {
            const long long place = mine * a.length + step;
            int level = 0;
            if (a.draw) {
                level = choose((const double*)a.how, a.top_k, warp, ((const double*)a.uniform)[place], &likelihood);
                if (real && tid % 32 == 0) ((long long*)a.levels)[place] = level;
            } else
                level = (int)((const long long*)a.levels)[place];
            if (tid % 32 == 0) chosen[warp] = level;
        }
        __syncthreads();
        for (int s = 0; s < NS; s++)
            for (int i = tid; i < dim; i += THREADS)
                X[s * WIDEST + i] = __ldg(n.weights + a.embedding + (long long)(offset[s] + chosen[s]) * dim + i);
        __syncthreads();
        net(n, a, blocks, stages, a.seen + step);
    }
    for (int s = 0; s < NS && first + s < a.count; s++)
        for (int q = tid; q < LEVELS; q += THREADS) ((float*)a.logits)[(first + s) * LEVELS + q] = LOGITS[s * LEVELS + q];
    if (a.draw && warp < NS && tid % 32 == 0 && real) ((double*)a.likelihood)[mine] += likelihood;
}
