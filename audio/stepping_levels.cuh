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

// The largest of a warp's numbers, which are not NaN: as whole numbers in the same order.
__device__ __forceinline__ float warp_max(float value) {
    const int bits = __float_as_int(value), largest = __reduce_max_sync(~0u, bits < 0 ? bits ^ 0x7fffffff : bits);
    return __int_as_float(largest < 0 ? largest ^ 0x7fffffff : largest);
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
    float below[EACH], best = -INFINITY;
    if constexpr (LEVELS % 128 == 0) {
#pragma unroll
        for (int j = 0; j < EACH; j += 4) {
            const float4 four = ((const float4*)logits)[(first + j) / 4];
            below[j] = four.x, below[j + 1] = four.y, below[j + 2] = four.z, below[j + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int j = 0; j < EACH; j++) below[j] = first + j < LEVELS ? logits[first + j] : -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < EACH; j++) best = fmaxf(best, below[j]);
    best = warp_max(best);
    int place = LEVELS;
#pragma unroll
    for (int j = EACH - 1; j >= 0; j--) {
        below[j] -= best;
        if (below[j] == 0.0f) place = first + j;
    }
    place = __reduce_min_sync(~0u, place);
    const bool filtered = top_k > 0 || top_p < 1.0, as_it_is = temperature == 1.0f && !filtered && min_p <= 0.0;
    double mass = 0.0, total = 0.0;
    int level = place;
    if (temperature != 0.0f) {
        float weight[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) weight[j] = expf(temperature == 1.0f ? below[j] : below[j] / temperature);
        if (filtered) {
#pragma unroll
            for (int j = 0; j < EACH; j++)
                if (first + j < LEVELS) kept[first + j] = weight[j];
            __syncwarp();
            filter(logits, kept, top_k, top_p);
#pragma unroll
            for (int j = 0; j < EACH; j++) weight[j] = first + j < LEVELS ? kept[first + j] : 0.0f;
        }
        double reached[EACH];  // sums of a lane's weights up to each of them
#pragma unroll
        for (int j = 0; j < EACH; j++)
            reached[j] = (j ? reached[j - 1] : 0.0) + (weight[j] < min_p ? 0.0f : weight[j]);
        double upto = reached[EACH - 1];
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            const double other = __shfl_up_sync(~0u, upto, o);
            if (lane >= o) upto += other;
        }
        total = __shfl_sync(~0u, upto, 31);
        const double target = uniform * total, before = upto - reached[EACH - 1];
        int mine = LEVELS;
#pragma unroll
        for (int j = EACH - 1; j >= 0; j--)
            if (before + reached[j] > target) mine = first + j;
        mine = __reduce_min_sync(~0u, mine);
        if (mine < LEVELS) level = mine;  // else rounding left the sum short of the total
    }
    if (!as_it_is) {
#pragma unroll
        for (int j = 0; j < EACH; j++) mass += expf(below[j]);
        mass = warp_sum(mass);
    }
    return {level, best, as_it_is ? total : mass};
}
