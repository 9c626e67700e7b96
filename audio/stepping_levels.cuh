// How the next level is drawn: one warp a clip.

// How many levels are likelier than q, or as likely and before it, and their weight together.
__device__ __noinline__ int rank_of(const float* logits, const float* weights, int q, double* before) {
    int rank = 0;
    *before = 0.0;
    for (int o = 0; o < LEVELS; o++)
        if (logits[o] > logits[q] || (logits[o] == logits[q] && o < q)) {
            rank++;
            *before += weights[o];
        }
    return rank;
}

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
    for (int o = 16; o; o >>= 1) value += __shfl_xor_sync(~0u, value, o);
    return value;
}

// Drops the levels past the top_k likeliest, and past those that together have probability top_p.
__device__ __noinline__ void filter(const float* logits, float* weights, int top_k, double top_p) {
    const int lane = threadIdx.x % 32, kept = top_k > 0 ? least(top_k, LEVELS) : LEVELS;
    double total = 0.0, before;
    unsigned drop = 0;  // a bit for each level of this lane: at most 1024 levels
    for (int q = lane; q < LEVELS; q += 32) total += rank_of(logits, weights, q, &before) < kept ? weights[q] : 0.0f;
    total = warp_sum(total);
    for (int j = 0, q = lane; q < LEVELS; j++, q += 32) {
        const int rank = rank_of(logits, weights, q, &before);
        if (rank > 0 && (rank >= kept || (top_p < 1.0 && before >= (top_p - 1e-7) * total))) drop |= 1u << j;
    }
    __syncwarp();
    for (int j = 0, q = lane; q < LEVELS; j++, q += 32)
        if (drop >> j & 1) weights[q] = 0.0f;
    __syncwarp();
}

// A level, and what its likelihood under the net itself is made of.
struct Choice {
    int level;
    float best;   // the largest of the logits
    double mass;  // the sum of exp(logit - best)

    __device__ __forceinline__ double log_likelihood(const float* logits) const {
        const float near = mass;  // a logarithm in float64 would take a tenth of the time of a layer
        return (double)logits[level] - (double)best - ((double)logf(near) + (mass - near) / near);
    }
};

// Level where the distribution function passes a number, by one warp; ``kept`` is room for LEVELS numbers. As choose in
// audio/stepping_levels.py.
__device__ __noinline__ Choice choose(const float* logits, float* kept, float temperature, double top_p, double min_p,
                                      int top_k, double uniform) {
    constexpr int EACH = (LEVELS + 31) / 32;
    const int lane = threadIdx.x % 32, first = lane * EACH;
    float weight[EACH], best = -INFINITY;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        weight[j] = first + j < LEVELS ? logits[first + j] : -INFINITY;
        best = fmaxf(best, weight[j]);
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) best = fmaxf(best, __shfl_xor_sync(~0u, best, o));
    double mass = 0.0, own = 0.0;
    int place = LEVELS;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const float below = weight[j] - best, chance = expf(below);
        if (below == 0.0f && place == LEVELS) place = first + j;
        weight[j] = temperature == 1.0f ? chance : expf(below / temperature);
        mass += chance;
        own += weight[j];
    }
    place = __reduce_min_sync(~0u, place);
    int level = place;
    const bool filtered = top_k > 0 || top_p < 1.0, as_it_is = temperature == 1.0f && !filtered && min_p <= 0.0;
    if (temperature != 0.0f) {
        if (filtered) {
#pragma unroll
            for (int j = 0; j < EACH; j++)
                if (first + j < LEVELS) kept[first + j] = weight[j];
            __syncwarp();
            filter(logits, kept, top_k, top_p);
#pragma unroll
            for (int j = 0; j < EACH; j++) weight[j] = first + j < LEVELS ? kept[first + j] : 0.0f;
        }
        if (filtered || min_p > 0.0) {
            own = 0.0;
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                if (weight[j] < min_p) weight[j] = 0.0f;
                own += weight[j];
            }
        }
        double upto = own;
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            const double other = __shfl_up_sync(~0u, upto, o);
            if (lane >= o) upto += other;
        }
        const double total = __shfl_sync(~0u, upto, 31), target = uniform * total;
        double reached = upto - own;
        int mine = LEVELS;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            reached += weight[j];
            if (reached > target && mine == LEVELS) mine = first + j;
        }
        mine = __reduce_min_sync(~0u, mine);
        if (mine < LEVELS) level = mine;  // else rounding left the sum short of the total
        if (as_it_is) mass = total;
    }
    if (!as_it_is) mass = warp_sum(mass);
    return {level, best, mass};
}
