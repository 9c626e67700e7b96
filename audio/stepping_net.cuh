// The net: its stages inwards and outwards, and the scores of the next level.

// From a full frame of ROWS numbers to the next stage's x, D wide.
template <int ROWS, int D>
__device__ __forceinline__ void pool_down(Walk& w, int waiting) {
    typedef Product<ROWS, up_to(D, 16) / 16, splits_of_width(D), true> Linear;
    next_phase(w, Linear::FIRST);
    Linear::run(w, room(AT_RESIDENT) + waiting, RESIDENT,
                [&](int tile, int split, const float* total) { leave<D>(tile, split, total); });
    next_phase(w, 0);
    w.parts = splits_of_width(D);
}

// From the x of a stage, D wide, to a frame of COLUMNS numbers.
template <int D, int COLUMNS>
__device__ __forceinline__ void pool_up(Walk& w, int current) {
    typedef Product<D, up_to(COLUMNS, 16) / 16, 1, true> Linear;
    next_phase(w, Linear::FIRST);
    Linear::run(w, room(AT_INNER), INNER, [&](int tile, int, const float* total) {
        each_of(tile, total, [&](int j, int s, float value) {
            if (j < COLUMNS) room(AT_RESIDENT)[s * RESIDENT + current + j] = value;
        });
    });
}

template <int D>
__device__ __forceinline__ void score(Walk& w, int add) {
    typedef Product<D, up_to(LEVELS, 16) / 16, 1, true> Linear;
    Norm<D>::run(w, add, -1);
    next_phase(w, Linear::FIRST);
    Linear::run(w, room(AT_NORMED), NORMED, [&](int tile, int, const float* total) {
        each_of(tile, total, [&](int j, int s, float value) {
            if (j < LEVELS) room(AT_LOGITS)[s * LEVELS + j] = value;
        });
    });
    w.pos = (w.pos + CHUNK - 1) / CHUNK * CHUNK;
    next_phase(w, 0);
}

// One step of the net for all clips, sample number t; x holds the embedded levels.
__device__ __forceinline__ void net(Walk& w, unsigned t) {
    const int s = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool owner = s < NS;  // of a clip's x
    float* skips = room(AT_SKIPS) + s * SKIPPED;
    float* resident = room(AT_RESIDENT) + s * RESIDENT;
    int phase[STAGES];
    const int depth = depth_at(t, phase);
#pragma unroll
    for (int d = 0; d < STAGES; d++) {
        if (d > depth) break;
        const int dim = wides[d];
        if (d) {
            switch (d - 1) { DOWN_CASES }
        }
        w = layers(w, first_down[d], downs[d], UNET || d == LAST ? skip_at[d] : -1, -1, d < LAST ? up_to(dim, 4) : 0);
        if (d == LAST) break;
        if (owner)
            for (int j = lane; j < dim; j += 32) {
                const float value = settled(w, up_to(dim, 16), s, j, -1);
                skips[skip_at[d] + downs[d] * up_to(dim, 4) + j] = value;
                put(resident + waiting_at[d], phase[d] * dim + j, value);
            }
        if (owner && d < depth)
            for (int j = lane; j < wides[d + 1]; j += 32) x_at(AT_X, s)[j] = 0.0f;
        w.parts = 0;
        w.x = AT_X;
        w.pos = (w.pos + CHUNK - 1) / CHUNK * CHUNK;
    }
    int add = depth == LAST ? skip_at[LAST] : -1;
#pragma unroll
    for (int d = LAST - 1; d >= 0; d--) {
        if (d > depth) continue;
        const int dim = wides[d], inner = wides[d + 1];
        if (owner) {
            if (d < depth)  // x is what the inner stages say about this frame, for the next one
                for (int j = lane; j < inner; j += 32)
                    put(room(AT_INNER) + s * INNER, j,
                        settled(w, up_to(inner, 16), s, j, add));
            __syncwarp();
            for (int j = lane; j < dim; j += 32) {
                float* kept = skips + skip_at[d] + downs[d] * up_to(dim, 4) + j;
                const float x = resident[current_at[d] + phase[d] * dim + j] + *kept;
                x_at(AT_X, s)[j] = x;
                if (!UNET) *kept = x;
            }
            __syncwarp();
        }
        w.parts = 0;
        w.x = AT_X;
        if (d < depth) {
            switch (d) { UP_CASES }
            w.pos = (w.pos + CHUNK - 1) / CHUNK * CHUNK;
        }
        const int step = up_to(dim, 4);
        w = layers(w, first_up[d], ups[d], -1, UNET ? skip_at[d] + (downs[d] - 1) * step : -1, step);
        add = skip_at[d];
    }
    mark(14);
    HEAD(w, add);
}
