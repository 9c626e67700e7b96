// What the blocks of the relay do: parts of Mamba layers, poolings, and the mouth that draws levels.

// Takes what a block needs from its weights, and from its shared memory, piece by piece.
struct Cursor {
    const char* from;
    char* room;

    template <class T>
    __device__ __forceinline__ void take(T& piece) {
        piece.load(from, room);
        from += T::BYTES;
        room += up_to(T::ROOM, 16);
    }

    __device__ __forceinline__ const float* numbers(int count) {
        const float* at = (const float*)from;
        from += up_to(4 * count, 16);
        return at;
    }

    __device__ __forceinline__ float* shared(int count) {
        float* at = (float*)room;
        room += up_to(4 * count, 16);
        return at;
    }
};

__device__ __forceinline__ Cursor begin(const Args& a, const int* row) {
    return {(const char*)a.weights + 16ll * row[WEIGHTS], memory + 8 * NEAR_LETTERS + up_to(4 * COLUMNS, 16)};
}

// What the inner stages say about a frame of POOL times D numbers, for the samples of the next one. Before the first frame of
// a launch it is what the state says.
struct Said {
    const int* row;
    unsigned phase;  // samples that the first frame had before this launch
    int width;
    float* kept;

    __device__ __forceinline__ void load(const Args& a, long long before, int D, const float* state, float* room) {
        phase = before % row[POOL], width = D, kept = room;
        for (int i = threadIdx.x; i < row[POOL] * D; i += THREADS) kept[i] = state[i];
    }

    // Adds four numbers, as many as there are, at the block's turn ``count``.
    __device__ __forceinline__ void add(const Args& a, unsigned count, int quad, float4* to) const {
        const unsigned turn = phase + count - 1, full = turn / row[POOL];
        const int place = turn % row[POOL] * width + 4 * quad, most = width - 4 * quad - 1;
        if (most < 0) return;
        const letter* from = box(a, row[SAID], row[SAID_SLOT], full) + place;
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (full)
            await_all<1, 4>(1, full, sum, [&](int, letter* four) {
#pragma unroll
                for (int v = 0; v < 4; v++) four[v] = peek_far(from + least(v, most));
            });
        else
#pragma unroll
            for (int v = 0; v < 4; v++) sum[v] = kept[place + least(v, most)];
        to->x += sum[0];
        if (most > 0) to->y += sum[1];
        if (most > 1) to->z += sum[2];
        if (most > 2) to->w += sum[3];
    }

    __device__ __forceinline__ void save(const Args& a, unsigned all, float* state) const {
        const unsigned full = (phase + all) / row[POOL];
        for (int i = threadIdx.x; full && i < row[POOL] * width; i += THREADS)
            await_all<1, 1>(1, full, &(state[i] = 0.0f), [&](int, letter* one) {
                *one = peek_far(box(a, row[SAID], row[SAID_SLOT], full) + i);
            });
    }
};

// Tells the other parts of a layer this one's shares of all LOWS numbers, by its first warp, and adds theirs to them. A lane
// has EACH of them, 32 apart.
template <int S, int LOWS, int EACH>
__device__ __forceinline__ void add_other_parts(const int* row, float* own, unsigned count) {
    const int part = row[PART], first = cluster_rank() - part, lane = threadIdx.x % 32;
    letter* boxes = near_box(row[SHARED], S * LOWS, count);
    if (threadIdx.x < 32)
#pragma unroll
        for (int i = 0; i < S * EACH; i++) {
            const int p = i / EACH, j = lane + i % EACH * 32;
            if (p != part && j < LOWS) push(reach(boxes + part * LOWS + j, first + p), 0, own[i % EACH], count);
        }
    await_all<S - 1, EACH>(S - 1, count, own, [&](int i, letter* theirs) {
#pragma unroll
        for (int e = 0; e < EACH; e++)
            theirs[e] = peek_near(boxes + (i + (i >= part)) * LOWS + least(lane + 32 * e, LOWS - 1));
    });
}

// A part of a Mamba layer: 16 channels of each warp, of which two lanes share one, with half of its N states each. The other
// S - 1 parts of a layer get its share of dt, B and C, and whoever follows its share of the layer's output. x comes in
// from ``sources``; a block of threads meets three times a turn: when x is there, when the warps' shares of dt, B and C
// are, and when their gated outputs are.
template <int D, int N, int W, int R, int S, int FAR_MOST, int NEAR_MOST, int PUSH_MOST>
__device__ void layer(const Args& a) {
    constexpr int D16 = up_to(D, 16), K = D16 / 16, R4 = up_to(R, 4), N8 = up_to(N, 8), J = N8 / 8;
    constexpr int LOWS = up_to(R4 + 2 * N8, 16), LOW_TILES = LOWS / 16, LOWS_EACH = (LOWS + 31) / 32;
    const int* row = row_of_block();
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    const int channel = warp * 16 + g + t / 2 * 8, half = t % 2, part = row[PART];

    Cursor at = begin(a, row);
    Norm<D> norm;
    Weights<K, 2 * WARPS, (K <= 8)> in;
    typedef Weights<WARPS, D16 / 16, true> Out;
    Out out;
    uint4 low_weights[LOW_TILES];
    at.take(norm);
    at.take(in);
    at.take(out);
#pragma unroll
    for (int i = 0; i < LOW_TILES; i++)
        low_weights[i] = ((const uint4*)at.from)[(warp * LOW_TILES + i) * 32 + lane];
    at.from += WARPS * LOW_TILES * TILE;
    const float* numbers = at.numbers(2 * CHANNELS + (W + 3) * CHANNELS);
    const float value_bias = numbers[channel], gate_bias = numbers[CHANNELS + channel];
    numbers += 2 * CHANNELS;
    float taps[W + 1], past[W], rates[R4], decays[J][4], h[J][4];
#pragma unroll
    for (int k = 0; k < W + 1; k++) taps[k] = numbers[k * CHANNELS + channel];
    const float dt_bias = numbers[(W + 1) * CHANNELS + channel], skip = numbers[(W + 2) * CHANNELS + channel];
    numbers = at.numbers(CHANNELS * (R4 + N8));
#pragma unroll
    for (int r = 0; r < R4; r++) rates[r] = numbers[channel * R4 + r];
    numbers += CHANNELS * R4;
    float* state = (float*)a.state + row[STATE];
#pragma unroll
    for (int k = 0; k < W - 1; k++) past[k] = state[k * CHANNELS + channel];
    float* states = state + (W - 1) * CHANNELS;
    const int own_states = channel * N8 + half * N8 / 2;
#pragma unroll
    for (int i = 0; i < 4 * J; i++) {
        decays[i / 4][i % 4] = numbers[own_states + i];
        h[i / 4][i % 4] = states[own_states + i];
    }
    const float* out_bias = at.numbers(D16);
    float bias[Out::PER];
    const int out_column = warp * 16 + g + t % 2 * 8;
#pragma unroll
    for (int r = 0; r < Out::PER; r++) bias[r] = Out::mine(r) ? out_bias[out_column + r * CHANNELS] : 0.0f;
    float *shares = at.shared(LOWS * WARPS), *low = at.shared(WARPS * LOWS) + warp * LOWS;
    uint4* inner = (uint4*)at.shared(CHANNELS);
    const long long before = turns(row, a.seen);
    const unsigned all = (unsigned)(turns(row, a.seen + a.length) - before);
    Said said = {row};
    float* frame = states + CHANNELS * N8;
    if (row[POOL]) said.load(a, before, D, frame, at.shared(row[POOL] * D));
    __syncthreads();

    const Exit<PUSH_MOST> exit(a, row, part * D16);
    Watch watch;
    for (unsigned count = 1; count <= all; count++) {
        watch.mark(0);
        if (warp == 0)
            norm.run([&](int quad) {
                float4 v = gather<FAR_MOST, NEAR_MOST>(a, row, count, quad);
                if (row[POOL]) said.add(a, count, quad, &v);
                watch.mark(1);
                return v;
            });
        watch.mark(2);
        __syncthreads();
        watch.mark(3);
        float value = value_bias, gate = gate_bias, rest[Out::PER];
        in.multiply(norm.normed, [&](int r, int, float low, float high) { (r ? gate : value) += t / 2 ? high : low; });
#pragma unroll
        for (int r = 0; r < Out::PER; r++)
            rest[r] = part || !Out::mine(r) ? 0.0f : ((const float*)norm.x)[out_column + r * CHANNELS] + bias[r];
        watch.mark(4);
        float u = taps[0] + taps[W] * value;
#pragma unroll
        for (int k = 0; k < W - 1; k++) u += taps[k + 1] * past[k];
#pragma unroll
        for (int k = 0; k < W - 1; k++) past[k] = k + 2 < W ? past[k + 1] : value;
        u *= sigmoid(u);
        float four[4];
#pragma unroll
        for (int i = 0; i < 4; i++) four[i] = __shfl_sync(~0u, u, (4 * t + i) % 8 * 4 + (4 * t + i) / 8 * 2);
        const uint4 both = split(make_float4(four[0], four[1], four[2], four[3]));
        const uint2 own = g % 2 ? make_uint2(both.z, both.w) : make_uint2(both.x, both.y);
#pragma unroll
        for (int i = 0; i < LOW_TILES; i++) {
            float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            multiply_half(sum, low_weights[i], own.x, own.y);
            if (t < 2) shares[(i * 16 + g + 8 * t) * WARPS + warp] = t ? sum[2] + sum[3] : sum[0] + sum[1];
        }
        gate *= sigmoid(gate);
        watch.mark(5);
        __syncthreads();
        watch.mark(6);
        float sums[LOWS_EACH];  // by every warp for itself
#pragma unroll
        for (int i = 0; i < LOWS_EACH; i++) {
            const float4* from = (const float4*)shares + least(lane + 32 * i, LOWS - 1) * (WARPS / 4);
            sums[i] = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS / 4; w++) sums[i] += (from[w].x + from[w].y) + (from[w].z + from[w].w);
        }
        if constexpr (S > 1) add_other_parts<S, LOWS, LOWS_EACH>(row, sums, count);
#pragma unroll
        for (int i = 0; i < LOWS_EACH; i++)
            if (lane + 32 * i < LOWS) low[lane + 32 * i] = sums[i];
        __syncwarp();
        watch.mark(7);
        const float4* lows = (const float4*)low;
        float dt = dt_bias, y = 0.0f;
#pragma unroll
        for (int r = 0; r < R4 / 4; r++) {
            const float4 v = lows[r];
            dt += (v.x * rates[4 * r] + v.y * rates[4 * r + 1]) + (v.z * rates[4 * r + 2] + v.w * rates[4 * r + 3]);
        }
        dt = softplus(dt);
        const float du = dt * u;
#pragma unroll
        for (int i = 0; i < J; i++) {
            const float4 B = lows[R4 / 4 + half * J + i], C = lows[R4 / 4 + N8 / 4 + half * J + i];
            float(&v)[4] = h[i], (&d)[4] = decays[i];
            v[0] = fmaf(power_of_two(dt * d[0]), v[0], du * B.x);
            v[1] = fmaf(power_of_two(dt * d[1]), v[1], du * B.y);
            v[2] = fmaf(power_of_two(dt * d[2]), v[2], du * B.z);
            v[3] = fmaf(power_of_two(dt * d[3]), v[3], du * B.w);
            y += (C.x * v[0] + C.y * v[1]) + (C.z * v[2] + C.w * v[3]);
        }
        y += __shfl_xor_sync(~0u, y, 1);
        if (half == 0) put((half_bits*)inner, channel, (y + skip * u) * gate);
        watch.mark(8);
        __syncthreads();
        watch.mark(9);
        out.run(inner, [&](int r, int j, float sum) { exit.say(j, D16, sum + rest[r], count); });
        watch.mark(10);
    }
#pragma unroll
    for (int k = 0; k < W - 1; k++) state[k * CHANNELS + channel] = past[k];
#pragma unroll
    for (int i = 0; i < 4 * J; i++) states[own_states + i] = h[i / 4][i % 4];
    if (row[POOL]) said.save(a, all, frame);
    watch.save(a);
}

// Puts the D numbers that get(quad) returns four at a time into an input, from number ``first`` on.
template <int D, class Get>
__device__ __forceinline__ void put_all(uint4* operand, int first, Get get) {
    for (int quad = threadIdx.x; quad < (D + 3) / 4; quad += THREADS) {
        const float4 v = get(quad);
        const float numbers[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (4 * quad + i < D) put((half_bits*)operand, first + 4 * quad + i, numbers[i]);
    }
}

// A share of the columns of a pooling inwards: frames of POOL times D numbers become one number a column.
template <int D, int FRAME, int TILES, int FAR_MOST, int NEAR_MOST, int PUSH_MOST>
__device__ void pool_down(const Args& a) {
    constexpr int K = up_to(FRAME * D, 16) / 16;
    const int *row = row_of_block(), tid = threadIdx.x;
    Cursor at = begin(a, row);
    Weights<K, TILES, true> weights;
    at.take(weights);
    const float* bias = at.numbers(16 * TILES);
    uint4* frame = (uint4*)at.shared(16 * K);
    float* state = (float*)a.state + row[STATE];
    for (int i = tid; i < 16 * K; i += THREADS) ((float*)frame)[i] = state[i];
    const long long before = turns(row, a.seen);
    const unsigned phase = before % FRAME, all = (unsigned)(turns(row, a.seen + a.length) - before);
    __syncthreads();
    for (unsigned count = 1; count <= all; count++) {
        const unsigned place = (phase + count - 1) % FRAME, full = (phase + count) / FRAME;
        put_all<D>(frame, place * D, [&](int quad) { return gather<FAR_MOST, NEAR_MOST>(a, row, count, quad); });
        if (place + 1 < FRAME) continue;
        __syncthreads();
        letter* to = box(a, row[OUT], row[OUT_SLOT], full);
        weights.run(frame, [&](int, int j, float sum) { send(to + j, sum + bias[j], full); });
        __syncthreads();
    }
    __syncthreads();
    for (int i = tid; i < 16 * K; i += THREADS) state[i] = ((float*)frame)[i];
}

// A share of the columns of a pooling outwards: what a stage of width D says becomes a frame.
template <int D, int TILES, int FAR_MOST, int NEAR_MOST, int PUSH_MOST>
__device__ void pool_up(const Args& a) {
    constexpr int K = up_to(D, 16) / 16;
    const int *row = row_of_block(), tid = threadIdx.x;
    Cursor at = begin(a, row);
    Weights<K, TILES, true> weights;
    at.take(weights);
    const float* bias = at.numbers(16 * TILES);
    uint4* x = (uint4*)at.shared(16 * K);
    for (int i = tid; i < 16 * K; i += THREADS) ((float*)x)[i] = 0.0f;
    const unsigned all = (unsigned)(turns(row, a.seen + a.length) - turns(row, a.seen));
    __syncthreads();
    for (unsigned count = 1; count <= all; count++) {
        put_all<D>(x, 0, [&](int quad) { return gather<FAR_MOST, NEAR_MOST>(a, row, count, quad); });
        __syncthreads();
        letter* to = box(a, row[OUT], row[OUT_SLOT], count);
        weights.run(x, [&](int, int j, float sum) { send(to + j, sum + bias[j], count); });
        __syncthreads();
    }
}

// Draws levels, hands on their embeddings, and gets from what comes back the scores of the next one.
template <int D, int FAR_MOST, int NEAR_MOST, int PUSH_MOST>
__device__ void mouth(const Args& a) {
    constexpr int D16 = up_to(D, 16), K = D16 / 16, TILES = up_to(LEVELS, 16) / 16;
    const int *row = row_of_block(), tid = threadIdx.x, lane = tid % 32;
    Cursor at = begin(a, row);
    Norm<D> norm;
    Weights<K, TILES, (K * TILES <= 32 * WARPS)> head;
    at.take(norm);
    at.take(head);
    const float* bias_from = at.numbers(16 * TILES);
    float *logits = at.shared(16 * TILES), *chances = at.shared(LEVELS), *bias = at.shared(16 * TILES);
    float* embedding = at.shared(LEVELS * D);  // of the clip's class
    for (int q = tid; q < 16 * TILES; q += THREADS) {
        logits[q] = q < LEVELS ? ((const float*)a.logits)[q] : 0.0f;
        bias[q] = bias_from[q];
    }
    for (int i = tid; i < LEVELS * D; i += THREADS)
        embedding[i] = ((const float*)a.embedding)[*(const long long*)a.offset * D + i];
    const double* how = (const double*)a.how;
    const double temperature = how[0], top_p = how[1], min_p = how[2], *uniform = (const double*)a.uniform;
    double likelihood = 0.0, next = a.draw ? uniform[0] : 0.0;
    __syncthreads();
    Watch watch;
    for (long long step = 0; step < a.length; step++) {
        const unsigned count = (unsigned)step + 1;
        watch.mark(0);
        if (tid < 32) {
            Choice choice = {};
            if (a.draw) {
                choice = choose(logits, chances, temperature, top_p, min_p, a.top_k, next);
                if (lane == 0) ((long long*)a.levels)[step] = choice.level;
            } else
                choice.level = ((const long long*)a.levels)[step];
            letter* to = box(a, row[OUT], row[OUT_SLOT], count);
            for (int j = lane; j < D16; j += 32) send(to + j, j < D ? embedding[choice.level * D + j] : 0.0f, count);
            if (a.draw) {  // while the layers run
                likelihood += choice.log_likelihood(logits);
                if (step + 1 < a.length) next = uniform[step + 1];
            }
        }
        watch.mark(1);
        if (tid < 32) norm.run([&](int quad) { return gather<FAR_MOST, NEAR_MOST>(a, row, count, quad); });
        watch.mark(2);
        __syncthreads();
        head.run(norm.normed, [&](int, int q, float sum) { logits[q] = sum + bias[q]; });
        __syncthreads();
        watch.mark(3);
    }
    for (int q = tid; q < LEVELS; q += THREADS) ((float*)a.logits)[q] = logits[q];
    if (a.draw && tid == 0) *(double*)a.likelihood += likelihood;
    watch.save(a);
}
