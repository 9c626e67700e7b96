// Generation steps of a U-Net: one block of threads takes NS clips through any number of samples.
//
// Nothing is shared between blocks, so there is no barrier of the grid and no launch per layer. The weights of a step
// come in the order of their use, as one stream: one thread copies it from L2 into a ring in shared memory, well
// ahead of the workers, which multiply by tensor cores: a tile of weights serves up to 8 clips. Activations live in
// shared memory, the states of layers in global memory. Which layers run at a sample follows from the sample's number:
// stage d of the net runs once in each product of the pool factors before it. Layouts are those of audio/tiles.py.
//
// A product of bfloat16 weights takes its input as the sum of two bfloat16 numbers, one of float32 weights takes both
// as sums of two TF32 numbers: what is lost is below 2^-16 and 2^-21 of a factor.
//
// Macros: NS clips of a block, WARPS that compute, HALF (weights in bfloat16), RING (bytes) and its SLOTS, sizes of rooms
// in shared memory (numbers of a clip: WIDEST, NORMED, INNER, GATES, LOWS, PARTS, LEVELS, SKIPPED, RESIDENT), tables of
// stages (WIDES, POOLS, DOWNS, UPS, FIRST_DOWN, FIRST_UP, SKIP_AT, WAITING_AT, CURRENT_AT), of blocks (SHAPES,
// STATE_AT) and of the stream (SEGMENT_AT, SEGMENT_BYTES), and code for each shape: BLOCK_CASES, DOWN_CASES, UP_CASES,
// HEAD. PROFILE counts cycles.

extern "C" __global__ void __launch_bounds__(THREADS) advance(const __grid_constant__ Args a) {
    const int tid = threadIdx.x, s = tid / 32, lane = tid % 32;
    const long long first = (long long)blockIdx.x * NS;
    Walk w = {0u, 0u, 0u, (float*)a.state + first * STATE_SIZE, AT_X, 0};
    for (int i = tid; i < ROOM; i += THREADS) room(0)[i] = 0.0f;
    if (tid == 0) {
        supply().landed = 0;
        for (int i = 0; i < SLOTS; i++) {
            begin_barrier(supply().full + i, 1);
            begin_barrier(supply().read + i, WARPS);
        }
    }
#ifdef PROFILE
    if (tid < 64) profile()[tid] = tid == 63 ? clock64() : 0;
#endif
    __syncthreads();
    if (tid >= WORKERS) {
        if (tid % 32 == 0) bring((const char*)a.stream, (unsigned)a.seen, a.length, tid > WORKERS);
        return;
    }
    // Clips past the last one are that one's shadow, with a state of their own that nobody reads.
    const bool owner = s < NS, real = owner && first + s < a.count;
    const long long mine = real ? first + s : a.count - 1;
    float *resident = room(AT_RESIDENT) + s * RESIDENT, *kept = w.state + (long long)s * STATE_SIZE;
    float *logits = room(AT_LOGITS) + s * LEVELS, *chances = room(AT_CHANCES) + s * LEVELS;
    if (owner) {
        for (int i = lane; i < RESIDENT; i += 32) resident[i] = kept[i];
        for (int q = lane; q < LEVELS; q += 32) logits[q] = ((const float*)a.logits)[mine * LEVELS + q];
        __syncwarp();
    }
    const double* how = (const double*)a.how;
    const double temperature = how[0], top_p = how[1], min_p = how[2];
    const double* uniform = (const double*)a.uniform + mine * a.length;
    const long long offset = ((const long long*)a.offset)[mine];
    double likelihood = 0.0, next = a.draw ? uniform[0] : 0.0;
    for (long long step = 0; step < a.length; step++) {
        mark(12);
        if (owner) {
            const long long place = mine * a.length + step;
            long long level;
            if (a.draw) {
                const double number = next;
                if (step + 1 < a.length) next = uniform[step + 1];  // long before it is needed
                const Choice choice = choose(logits, chances, temperature, top_p, min_p, a.top_k, number);
                level = choice.level;
                likelihood += choice.log_likelihood(logits);
                if (real && lane == 0) ((long long*)a.levels)[place] = level;
            } else
                level = ((const long long*)a.levels)[place];
            const float* embedded = (const float*)a.embedding + (level + offset) * WIDTH;
            for (int j = lane; j < WIDTH; j += 32) x_at(AT_X, s)[j] = embedded[j];
            __syncwarp();
        }
        w.parts = 0;
        w.x = AT_X;
        mark(13);
        net(w, (unsigned)(a.seen + step));
    }
    if (real)
        for (int q = lane; q < LEVELS; q += 32) ((float*)a.logits)[mine * LEVELS + q] = logits[q];
    if (owner)
        for (int i = lane; i < RESIDENT; i += 32) kept[i] = resident[i];
    if (a.draw && real && lane == 0) ((double*)a.likelihood)[mine] += likelihood;
#ifdef PROFILE
    if (blockIdx.x == 0 && tid < 64) ((long long*)a.profile)[tid] = profile()[tid];
#endif
}
