// Generation steps of a U-Net: one block of threads takes NS clips through any number of samples.
//
// Nothing is shared between blocks, so there is no barrier of the grid and no launch per layer: the weights stream from
// L2 and each number of them serves NS clips; activations live in shared memory; a clip's state in global memory.
// Which layers run at a sample follows from the sample's number, exactly: stage d of the net runs once in each product
// of the pool factors before it. Tables and layouts are those of audio/packing.py.
//
// Macros: NS clips of a block, THREADS, HALF (matrices in bfloat16 beside float32 vectors), columns of the tables.

typedef unsigned short half_bits;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

struct Four { float v[4]; };

__device__ __forceinline__ Four load_four(const Args& a, long long at) {
    Four f;
#if HALF
    uint2 raw = __ldg((const uint2*)((const half_bits*)a.matrices + at));
    f.v[0] = __uint_as_float(raw.x << 16);
    f.v[1] = __uint_as_float(raw.x & 0xffff0000u);
    f.v[2] = __uint_as_float(raw.y << 16);
    f.v[3] = __uint_as_float(raw.y & 0xffff0000u);
#else
    float4 raw = __ldg((const float4*)((const float*)a.weights + at));
    f.v[0] = raw.x; f.v[1] = raw.y; f.v[2] = raw.z; f.v[3] = raw.w;
#endif
    return f;
}

__device__ __forceinline__ float load_one(const Args& a, long long at) {
#if HALF
    return __uint_as_float((unsigned)__ldg((const half_bits*)a.matrices + at) << 16);
#else
    return __ldg((const float*)a.weights + at);
#endif
}

__device__ __forceinline__ float vector_at(const Args& a, long long at) { return __ldg((const float*)a.weights + at); }

// Sums over this thread's rows of x[s][i] W[i][column] for four columns (or one, where they are no multiple of four).
// One copy for all layers: the code of a step then stays in the instruction cache.
__device__ __noinline__ void partial_sums(
    const Args& a, const float* x, int stride, int rows, int cols, long long column, int k, int splits, float* out, int next
) {
    float sum[NS][4];
#pragma unroll
    for (int s = 0; s < NS; s++)
        for (int v = 0; v < 4; v++) sum[s][v] = 0.0f;
    if (cols % 4 == 0) {
#pragma unroll 8
        for (int i = k; i < rows; i += splits) {
            const Four w = load_four(a, column + (long long)i * cols);
#pragma unroll
            for (int s = 0; s < NS; s++) {
                const float value = x[s * stride + i];
#pragma unroll
                for (int v = 0; v < 4; v++) sum[s][v] = fmaf(value, w.v[v], sum[s][v]);
            }
        }
#pragma unroll
        for (int s = 0; s < NS; s++) *(float4*)(out + s * next) = make_float4(sum[s][0], sum[s][1], sum[s][2], sum[s][3]);
    } else {
        for (int i = k; i < rows; i += splits) {
            const float w = load_one(a, column + (long long)i * cols);
#pragma unroll
            for (int s = 0; s < NS; s++) sum[s][0] = fmaf(x[s * stride + i], w, sum[s][0]);
        }
#pragma unroll
        for (int s = 0; s < NS; s++) out[s * next] = sum[s][0];
    }
}

// out(s, j, b_j + sum_i x[s][i] W[i][j]) for every clip s and column j; the weights hold b, then W (rows, columns).
// Threads share the rows out, and their sums meet in ``part``.
template <class Out>
__device__ __forceinline__ void linear(
    const Args& a, const float* x, int stride, int rows, int cols, long long at, float* part, Out out
) {
    const int tid = threadIdx.x, width = cols % 4 == 0 ? 4 : 1, items = cols / width;
    for (int first = 0; first < items; first += THREADS) {
        const int here = min(items - first, THREADS), wide = here * width;
        const int splits = max(1, min(THREADS / here, rows / 4));
        const int q = tid % here, k = tid / here;
        if (k < splits)
            partial_sums(a, x, stride, rows, cols, at + cols + (long long)(first + q) * width, k, splits,
                         part + k * NS * wide + q * width, wide);
        __syncthreads();
#pragma unroll
        for (int s = 0; s < NS; s++)
            for (int j = tid; j < wide; j += THREADS) {
                float total = vector_at(a, at + first * width + j);
#pragma unroll 8
                for (int split = 0; split < splits; split++) total += part[(split * NS + s) * wide + j];
                out(s, first * width + j, total);
            }
        __syncthreads();
    }
}

__device__ void layer_norm(const Args& a, const float* x, float* y, int dim, long long at) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int s = warp; s < NS; s += THREADS / 32) {
        const float* row = x + s * a.widest;
        float mean = 0.0f, square = 0.0f;
        for (int i = lane; i < dim; i += 32) mean += row[i];
        for (int o = 16; o; o >>= 1) mean += __shfl_xor_sync(~0u, mean, o);
        mean /= dim;
        for (int i = lane; i < dim; i += 32) square += (row[i] - mean) * (row[i] - mean);
        for (int o = 16; o; o >>= 1) square += __shfl_xor_sync(~0u, square, o);
        const float scale = 1.0f / sqrtf(square / dim + 1e-5f);
        for (int i = lane; i < dim; i += 32)
            y[s * a.widest + i] = (row[i] - mean) * scale * vector_at(a, at + i) + vector_at(a, at + dim + i);
    }
    __syncthreads();
}

struct Room {
    float *x, *normed, *inner, *u, *low, *part, *skips, *logits;
    double* weights;  // of the levels, relative to the most likely one
    const float* state;
    float* states[NS];
};

// One step of a Mamba layer on normed (D), added to x; see audio/stepping.py.
__device__ void mamba(const Args& a, const int* row, const Room& r) {
    const int tid = threadIdx.x, E = row[INNER], N = row[STATE], W = row[WIDTH], R = row[RANK];
    const int wide = a.inner, small = a.low;
    linear(a, r.normed, a.widest, row[DIM], 2 * E, row[W_IN], r.part,
           [&](int s, int j, float value) { r.inner[s * wide + j] = value; });
    for (int i = tid; i < NS * E; i += THREADS) {
        const int s = i / E, e = i % E;
        float* past = r.states[s] + row[S_CONV];
        const float now = r.inner[s * wide + e];
        float u = vector_at(a, row[W_CONV] + e) + vector_at(a, row[W_CONV] + W * E + e) * now;
        for (int k = 0; k < W - 1; k++) {
            u += vector_at(a, row[W_CONV] + (k + 1) * E + e) * past[k * E + e];
            if (k) past[(k - 1) * E + e] = past[k * E + e];
        }
        if (W > 1) past[(W - 2) * E + e] = now;
        r.u[s * wide + e] = u * sigmoid(u);
    }
    __syncthreads();
    linear(a, r.u, wide, E, R + 2 * N, row[W_X], r.part, [&](int s, int j, float value) { r.low[s * small + j] = value; });
    const int parts = max(1, min(THREADS / (NS * E), N));
    for (int i = tid; i < parts * NS * E; i += THREADS) {
        const int e = i % E, s = i / E % NS, p = i / (E * NS);
        const float* low = r.low + s * small;
        float dt = vector_at(a, row[W_DT] + e), u = r.u[s * wide + e], y = 0.0f;
        for (int j = 0; j < R; j++) dt = fmaf(low[j], load_one(a, row[W_DT] + (long long)(j + 1) * E + e), dt);
        dt = softplus(dt);
        float* h = r.states[s] + row[S_SSM] + e;
#pragma unroll 4
        for (int n = p; n < N; n += parts) {
            float value = expf(dt * vector_at(a, row[W_A] + n * E + e)) * h[n * E] + dt * low[R + n] * u;
            h[n * E] = value;
            y = fmaf(low[R + N + n], value, y);
        }
        r.part[i] = y;
    }
    __syncthreads();
    for (int i = tid; i < NS * E; i += THREADS) {
        const int s = i / E, e = i % E;
        float y = vector_at(a, row[W_SKIP] + e) * r.u[s * wide + e], z = r.inner[s * wide + E + e];
        for (int p = 0; p < parts; p++) y += r.part[p * NS * E + i];
        r.u[s * wide + e] = y * z * sigmoid(z);
    }
    __syncthreads();
    linear(a, r.u, wide, E, row[DIM], row[W_OUT], r.part,
           [&](int s, int j, float value) { r.x[s * a.widest + j] += value; });
}

// One step of an S4D layer: x_m = a_m x_m + b_m u, y = 2 Re sum c_m x_m + D u, then GELU, linear, GLU.
__device__ void s4d(const Args& a, const int* row, const Room& r) {
    const int tid = threadIdx.x, E = row[DIM], M = row[STATE], wide = a.inner;
    const int parts = max(1, min(THREADS / (NS * E), M));
    const int plane = M * E;  // numbers of a real or imaginary part
    for (int i = tid; i < parts * NS * E; i += THREADS) {
        const int e = i % E, s = i / E % NS, p = i / (E * NS);
        const float u = r.normed[s * a.widest + e];
        float* h = r.states[s] + row[S_SSM] + e;
        const long long w = row[W_A] + e;
        float y = 0.0f;
#pragma unroll 2
        for (int m = p; m < M; m += parts) {
            const int at = m * E;
            const float re = h[at], im = h[plane + at], ar = vector_at(a, w + at), ai = vector_at(a, w + plane + at);
            const float nr = ar * re - ai * im + vector_at(a, w + 2 * plane + at) * u;
            const float ni = ar * im + ai * re + vector_at(a, w + 3 * plane + at) * u;
            h[at] = nr;
            h[plane + at] = ni;
            y += vector_at(a, w + 4 * plane + at) * nr - vector_at(a, w + 5 * plane + at) * ni;
        }
        r.part[i] = y;
    }
    __syncthreads();
    for (int i = tid; i < NS * E; i += THREADS) {
        const int s = i / E, e = i % E;
        float y = vector_at(a, row[W_SKIP] + e) * r.normed[s * a.widest + e];
        for (int p = 0; p < parts; p++) y += r.part[p * NS * E + i];
        r.u[s * wide + e] = gelu(y);
    }
    __syncthreads();
    linear(a, r.u, wide, E, row[INNER], row[W_OUT], r.part,
           [&](int s, int j, float value) { r.inner[s * wide + j] = value; });
    for (int i = tid; i < NS * E; i += THREADS) {
        const int s = i / E, e = i % E;
        float value = r.inner[s * wide + e];
        if (row[INNER] > E) value *= sigmoid(r.inner[s * wide + E + e]);
        r.x[s * a.widest + e] += value;
    }
    __syncthreads();
}

__device__ void feed_forward(const Args& a, const int* row, const Room& r) {
    linear(a, r.normed, a.widest, row[DIM], row[INNER], row[W_IN], r.part,
           [&](int s, int j, float value) { r.inner[s * a.inner + j] = gelu(value); });
    linear(a, r.inner, a.inner, row[INNER], row[DIM], row[W_OUT], r.part,
           [&](int s, int j, float value) { r.x[s * a.widest + j] += value; });
}

__device__ __noinline__ void block(const Args& a, const int* row, const Room& r) {
    layer_norm(a, r.x, r.normed, row[DIM], row[W_NORM]);
    if (row[KIND] == MIXER) mamba(a, row, r);
    else if (row[KIND] == DIAGONAL) s4d(a, row, r);
    else feed_forward(a, row, r);
}

__device__ void keep(const Args& a, const Room& r, int place, int dim) {
    for (int i = threadIdx.x; i < NS * dim; i += THREADS)
        r.skips[(place * NS + i / dim) * a.widest + i % dim] = r.x[i / dim * a.widest + i % dim];
    __syncthreads();
}

__device__ void add_kept(const Args& a, const Room& r, int place, int dim) {
    for (int i = threadIdx.x; i < NS * dim; i += THREADS)
        r.x[i / dim * a.widest + i % dim] += r.skips[(place * NS + i / dim) * a.widest + i % dim];
    __syncthreads();
}

// One step of the net for NS clips, sample number t; x holds the embedded levels.
__device__ void net(const Args& a, const int* blocks, const int* stages, const Room& r, long long t) {
    const int last = a.stage_count - 1, tid = threadIdx.x;
    int depth = 0, kept = 0;
    long long frame = t;  // number of the sample within its stage
    while (true) {
        const int* stage = stages + depth * STAGE_COLUMNS;
        const int dim = stage[WIDE], pool = stage[POOL];
        if (depth == last && a.centre_skip) keep(a, r, kept, dim);
        for (int i = 0; i < stage[BLOCKS]; i++) {
            if (depth < last && a.skips) keep(a, r, kept++, dim);
            block(a, blocks + (stage[FIRST_DOWN] + i) * COLUMNS, r);
        }
        if (depth == last) {
            if (a.centre_skip) add_kept(a, r, kept, dim);
            break;
        }
        keep(a, r, kept++, dim);
        const int phase = frame % pool;
        const bool full = phase == pool - 1;
        for (int i = tid; i < NS * dim; i += THREADS)
            r.states[i / dim][stage[S_WAITING] + phase * dim + i % dim] = r.x[i / dim * a.widest + i % dim];
        __syncthreads();
        if (!full) break;
        for (int i = tid; i < NS * dim * pool; i += THREADS) {  // in the order of the pooling's weights, pool fastest
            const int s = i / (dim * pool), j = i % (dim * pool);
            r.inner[s * a.inner + j] = r.states[s][stage[S_WAITING] + j % pool * dim + j / pool];
        }
        __syncthreads();
        linear(a, r.inner, a.inner, pool * dim, stages[(depth + 1) * STAGE_COLUMNS + WIDE], stage[W_DOWN], r.part,
               [&](int s, int j, float value) { r.x[s * a.widest + j] = value; });
        frame /= pool;
        depth++;
    }
    for (int d = min(depth, last - 1); d >= 0; d--) {
        const int* stage = stages + d * STAGE_COLUMNS;
        const int dim = stage[WIDE], pool = stage[POOL];
        long long number = t;
        for (int e = 0; e < d; e++) number /= stages[e * STAGE_COLUMNS + POOL];
        const int phase = number % pool;
        if (phase == pool - 1)  // x is what the inner stages say about this frame, for the next one
            linear(a, r.x, a.widest, stages[(d + 1) * STAGE_COLUMNS + WIDE], pool * dim, stage[W_UP], r.part,
                   [&](int s, int j, float value) { r.inner[s * a.inner + j] = value; });
        kept--;
        for (int i = tid; i < NS * dim; i += THREADS) {
            const int s = i / dim, j = i % dim;
            r.x[s * a.widest + j] = r.states[s][stage[S_CURRENT] + phase * dim + j] + r.skips[(kept * NS + s) * a.widest + j];
        }
        __syncthreads();
        if (phase == pool - 1)
            for (int i = tid; i < NS * dim * pool; i += THREADS) {
                const int s = i / (dim * pool), j = i % (dim * pool);
                r.states[s][stage[S_CURRENT] + j % pool * dim + j / pool] = r.inner[s * a.inner + j];
            }
        __syncthreads();
        if (!a.skips) keep(a, r, kept, dim);  // without skips of each layer, the sum is added again after them
        for (int i = 0; i < stage[UP_BLOCKS]; i++) {
            block(a, blocks + (stage[FIRST_UP] + i) * COLUMNS, r);
            if (a.skips) add_kept(a, r, --kept, dim);
        }
        if (!a.skips) add_kept(a, r, kept, dim);
    }
    layer_norm(a, r.x, r.normed, stages[WIDE], a.last_norm);
    linear(a, r.normed, a.widest, stages[WIDE], a.levels_count, a.head, r.part,
           [&](int s, int j, float value) { r.logits[s * a.levels_count + j] = value; });
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

// Level of clip s where the distribution function passes a number; one warp a clip. As _choose in audio/stepping.py.
__device__ __noinline__ int choose(const Args& a, const Room& r, int s, double uniform, double* log_likelihood) {
    const int lane = threadIdx.x % 32, Q = a.levels_count, each = (Q + 31) / 32;
    const float* logits = r.logits + s * Q;
    const double* how = (const double*)a.how;  // temperature, top_p, min_p
    double* weights = r.weights + (long long)s * Q;
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
        const int kept = a.top_k > 0 ? min((int)a.top_k, Q) : Q;
        if (a.top_k > 0 || how[1] < 1.0) {
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
    extern __shared__ __align__(16) char memory[];
    __shared__ int chosen[NS], offset[NS];
    const int tid = threadIdx.x, Q = a.levels_count;
    Room r;
    r.weights = (double*)memory;
    float* at = (float*)(r.weights + NS * Q);
    r.x = at; at += NS * a.widest;
    r.normed = at; at += NS * a.widest;
    r.inner = at; at += NS * a.inner;
    r.u = at; at += NS * a.inner;
    r.low = at; at += NS * a.low;
    r.logits = at; at += NS * Q;
    r.part = at; at += NS * a.part;
    r.skips = at; at += NS * a.skip_count * a.widest;
    int* blocks = (int*)at;
    int* stages = blocks + a.block_count * COLUMNS;
    for (int i = tid; i < a.block_count * COLUMNS; i += THREADS) blocks[i] = ((const long long*)a.blocks)[i];
    for (int i = tid; i < a.stage_count * STAGE_COLUMNS; i += THREADS) stages[i] = ((const long long*)a.stages)[i];
    long long clips[NS];
#pragma unroll
    for (int s = 0; s < NS; s++) {  // clips past the last one are that one's shadow: the same numbers, written nowhere
        clips[s] = (long long)blockIdx.x * NS + s;
        const bool real = clips[s] < a.count;
        r.states[s] = (float*)(real ? a.state : a.spare) + (real ? clips[s] : (long long)s) * a.state_size;
        if (!real) clips[s] = a.count - 1;
        if (tid == 0) offset[s] = (int)((const long long*)a.offset)[clips[s]];
        for (int q = tid; q < Q; q += THREADS) r.logits[s * Q + q] = ((const float*)a.logits)[clips[s] * Q + q];
    }
    __syncthreads();
    double likelihood = 0.0;
    const int warp = tid / 32;
    const int dim = stages[WIDE];
    for (long long step = 0; step < a.length; step++) {
        if (warp < NS) {
            const long long place = clips[warp] * a.length + step;
            int level = (int)((const long long*)a.levels)[place];
            if (a.draw) level = choose(a, r, warp, ((const double*)a.uniform)[place], &likelihood);
            if (tid % 32 == 0) chosen[warp] = level;
        }
        __syncthreads();
        for (int i = tid; i < NS * dim; i += THREADS)
            r.x[i / dim * a.widest + i % dim] =
                vector_at(a, a.embedding + (long long)(offset[i / dim] + chosen[i / dim]) * dim + i % dim);
        __syncthreads();
        if (a.draw && tid < NS && (long long)blockIdx.x * NS + tid < a.count)
            ((long long*)a.levels)[clips[tid] * a.length + step] = chosen[tid];
        net(a, blocks, stages, r, a.seen + step);
    }
    for (int s = 0; s < NS; s++) {
        if ((long long)blockIdx.x * NS + s >= a.count) break;
        for (int q = tid; q < Q; q += THREADS) ((float*)a.logits)[clips[s] * Q + q] = r.logits[s * Q + q];
    }
    if (a.draw && warp < NS && tid % 32 == 0 && (long long)blockIdx.x * NS + warp < a.count)
        ((double*)a.likelihood)[clips[warp]] += likelihood;
}
