// The layers of the net: x += layer(norm(x)), where each clip's x belongs to a warp of its own.

// Number j of x: what it was, the sums in PART, and a kept x.
__device__ __forceinline__ float settled(const Walk& w, int dim16, int s, int j, int add) {
    float value = x_at(w.x, s)[j];
    for (int p = 0; p < w.parts; p++) value += room(AT_PART)[(p * NS + s) * dim16 + j];
    if (add >= 0) value += room(AT_SKIPS)[s * SKIPPED + add + j];
    return value;
}

// Settles x, keeps it at ``store`` (unless negative), and normalises it into NORMED. Scales and shifts are next in the
// stream. Of a narrow x every warp does all of it, so that none waits for another: all write the same numbers, and x
// goes to its other room, as some may still read this one. A wide clip's x belongs to one warp, whose lanes have two
// quads or more each, so that sums take few shuffles.
template <int D>
struct Norm {
    static constexpr int BYTES = up_to(8 * up_to(D, 4), TILE), QUADS = (D + 3) / 4;
    static constexpr int FULL = QUADS > 32 ? 32 : QUADS > 16 ? 16 : QUADS > 8 ? 8 : QUADS > 4 ? 4 : QUADS > 2 ? 2 : 1;
    static constexpr int LANES = narrow(D) ? 2 * FULL : FULL;  // of a narrow x there are many sums to read: less a lane
    static constexpr int EACH = (QUADS + LANES - 1) / LANES, MOST = most(splits_of_width(D), narrow(D) ? WARPS : 1);
    static constexpr int TIMES = narrow(D) ? (NS * LANES + 31) / 32 : 1;

    static __device__ __forceinline__ float sum(float value) {
#pragma unroll
        for (int o = LANES / 2; o; o >>= 1) value += __shfl_xor_sync(~0u, value, o);
        return value;
    }

    // The x of clip s, as lane l of those that share it has it: quads l, l + LANES, ... All loads go before the first sum.
    static __device__ __forceinline__ void settle(const Walk& w, int s, int l, int add, float4* value) {
        const float4* x = (const float4*)x_at(w.x, s) + l;
        const float4* part = (const float4*)(room(AT_PART) + s * up_to(D, 16)) + l;
        const float4* kept = (const float4*)(room(AT_SKIPS) + s * SKIPPED + add) + l;
        const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float4 sums[EACH][MOST], skip[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const bool there = has(l, i);
            value[i] = there ? x[LANES * i] : zero;
            skip[i] = there && add >= 0 ? kept[LANES * i] : zero;
#pragma unroll
            for (int p = 0; p < MOST; p++)
                sums[i][p] = there && p < w.parts ? part[p * NS * up_to(D, 16) / 4 + LANES * i] : zero;
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            value[i] = plus(value[i], skip[i]);
#pragma unroll
            for (int p = 0; p < MOST; p++) value[i] = plus(value[i], sums[i][p]);
        }
    }

    static __device__ __forceinline__ bool has(int l, int i) {
        return l < LANES && (LANES * EACH == QUADS || l + LANES * i < QUADS);
    }

    // The sum of a lane's numbers; those past the last are left out.
    static __device__ __forceinline__ float own_sum(const float4* v, int l) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int j = 4 * (l + LANES * i);
            if (LANES * EACH * 4 == D) total += (v[i].x + v[i].y) + (v[i].z + v[i].w);
            else
                total += (j < D ? v[i].x : 0.0f) + (j + 1 < D ? v[i].y : 0.0f) + (j + 2 < D ? v[i].z : 0.0f) +
                         (j + 3 < D ? v[i].w : 0.0f);
        }
        return total;
    }

    static __device__ __forceinline__ void run(Walk& w, int add, int store) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, to = narrow(D) ? AT_X + AT_Y - w.x : w.x;
        if (narrow(D) || warp < NS) {
            turn(w, BYTES);
#pragma unroll 1
            for (int time = 0; time < TIMES; time++) {
                const int s = narrow(D) ? (time * (32 / LANES) + lane / LANES) % NS : warp;
                const int l = narrow(D) ? lane % LANES : lane;
                float4 value[EACH], squares[EACH], gain[EACH], shift[EACH];
                settle(w, s, l, add, value);
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    const int quad = l + LANES * i;
                    gain[i] = four_at(w.pos, least(quad, QUADS - 1));
                    shift[i] = four_at(w.pos + 4 * up_to(D, 4), least(quad, QUADS - 1));
                    if (!has(l, i)) continue;
                    ((float4*)x_at(to, s))[quad] = value[i];
                    if (store >= 0) ((float4*)(room(AT_SKIPS) + s * SKIPPED + store))[quad] = value[i];
                }
                const float mean = sum(own_sum(value, l)) * (1.0f / D);
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    value[i] = plus(value[i], make_float4(-mean, -mean, -mean, -mean));
                    squares[i] = times(value[i], value[i]);
                }
                const float scale = rsqrtf(sum(own_sum(squares, l)) * (1.0f / D) + 1e-5f);
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    const float4 scaled = times(value[i], make_float4(scale, scale, scale, scale));
                    if (has(l, i))
                        put_four(room(AT_NORMED) + s * NORMED, l + LANES * i, plus(times(scaled, gain[i]), shift[i]));
                }
            }
        }
        w.x = to;
        w.parts = 0;
        w.pos += BYTES;
    }
};

// What surrounds a layer: places of the kept x that is added before it, and where its own x is kept, or -1.
struct Place {
    int add, store;
};

// A Mamba layer; see audio/stepping.py. E is a multiple of 16 WARPS: warp w has channels 16 (q WARPS + w) and the 15 after
// it for each q, from the convolution to the gate, and waits for others only where it needs sums over all channels. Two
// lanes share a channel's N states.
template <int D, int E, int N, int W, int R, bool BIAS>
__device__ __forceinline__ void mamba(Walk& w, float* state, const Place& at) {
    constexpr int CHANNELS = 16 * WARPS, Q = E / CHANNELS, R4 = up_to(R, 4), N4 = up_to(N, 8), J = N4 / 8;
    constexpr int CLIPS = least(NS, 2), AT_H = up_to((W - 1) * E, 4), LOW_TILES = up_to(R4 + 2 * N4, 16) / 16;
    constexpr int VECTORS = up_to(4 * CHANNELS * (2 + R4 + N4), TILE);
    constexpr int ITEMS = Q * NS, AHEAD = least(ITEMS, most(1, 8 / J));  // channels of a lane, states of which it holds
    typedef Product<D, 2 * E / 16, 1, BIAS, W + 1, WARPS> In;
    typedef Share<E, LOW_TILES, false> Low;
    typedef Share<E, up_to(D, 16) / 16, BIAS> NarrowOut;
    typedef Product<E, up_to(D, 16) / 16, splits_of_width(D), BIAS> WideOut;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

    mark(D / 128 * 16 + 10);
    float past[2][CLIPS][W], taps[2][W + 1];  // of the convolution, for a thread's columns and clips
    auto load_past = [&](int q) {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int c = 0; c < CLIPS; c++) {
                const int s = 2 * t + c;
                const float* from = state + (long long)s * STATE_SIZE + q * CHANNELS + warp * 16 + g + 8 * h;
                if (s < NS)
#pragma unroll
                    for (int k = 0; k < W - 1; k++) past[h][c][k] = __ldcg(from + k * E);
            }
    };
    const int channel = warp * 16 + lane / 2, part = lane % 2;  // in the scan, q by q
    float4 h[AHEAD][J];
    auto h_at = [&](int item) {
        return (float4*)(state + (long long)(item % NS) * STATE_SIZE + AT_H) + (item / NS * CHANNELS + channel) * 2 + part;
    };
    auto load_h = [&](float4* to, int item) {
#pragma unroll
        for (int j = 0; j < J; j++) to[j] = __ldcg(h_at(item) + j * E * 2);
    };
    load_past(0);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) load_h(h[i], i);
    Norm<D>::run(w, at.add, at.store);
    mark(D / 128 * 16 + 0);
    if (narrow(D)) turn(w, In::FIRST);
    else next_phase(w, In::FIRST);
    mark(D / 128 * 16 + 1);
    In::run(
        w, room(AT_NORMED), NORMED,
        [&](int r, int group, int, unsigned extra) {
            if (r) return;
            if (group) load_past(group);
#pragma unroll
            for (int k = 0; k < W + 1; k++) {
                taps[0][k] = vector_at(extra, k * CHANNELS + warp * 16 + g);
                taps[1][k] = vector_at(extra, k * CHANNELS + warp * 16 + g + 8);
            }
        },
        [&](int r, int tile, int, const float* total) {
#pragma unroll
            for (int v = 0; v < 4; v++) {
                const int hh = v / 2, c = v % 2, s = 2 * t + c;
                const int e = tile / (2 * WARPS) * CHANNELS + warp * 16 + g + 8 * hh;
                if (c >= CLIPS || s >= NS) continue;
                if (r) {
                    room(AT_GATES)[s * GATES + e] = total[v] * sigmoid(total[v]);
                    continue;
                }
                float u = taps[hh][0] + taps[hh][W] * total[v];
                float* to = state + (long long)s * STATE_SIZE + e;
#pragma unroll
                for (int k = 0; k < W - 1; k++) {
                    u += taps[hh][k + 1] * past[hh][c][k];
                    __stcg(to + k * E, k + 2 < W ? past[hh][c][k + 1] : total[v]);
                }
                put(room(AT_INNER) + s * INNER, e, u * sigmoid(u));
            }
        });
    mark(D / 128 * 16 + 2);
    turn(w, Low::FIRST);
    mark(D / 128 * 16 + 3);
    Low::run(w, room(AT_INNER), INNER, [&](int tile, const float* total) {
        each_of(tile, total, [&](int j, int s, float value) {
            room(AT_LOW)[((1 + warp) * NS + s) * LOWS + j] = value;
        });
    });
    mark(D / 128 * 16 + 4);
    next_phase(w, VECTORS);
    mark(D / 128 * 16 + 5);
    for (int i = lane; i < NS * LOW_TILES * 4; i += 32) {  // every warp for itself: all write the same sums
        float4* low = (float4*)(room(AT_LOW) + i / (LOW_TILES * 4) * LOWS) + i % (LOW_TILES * 4);
        float4 share[WARPS], total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int p = 0; p < WARPS; p++) share[p] = low[(1 + p) * NS * LOWS / 4];
#pragma unroll
        for (int p = 0; p < WARPS; p++) total = plus(total, share[p]);
        *low = total;
    }
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < ITEMS; first += AHEAD)
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int item = first + i, s = item % NS, e = item / NS * CHANNELS + channel;
            if (ITEMS % AHEAD && item >= ITEMS) break;
            if (s == 0 && item) {
                w.pos += VECTORS;
                turn(w, VECTORS);
            }
            const unsigned rates = w.pos + 8 * CHANNELS, decays = rates + 4 * R4 * CHANNELS;
            const float4* low = (const float4*)(room(AT_LOW) + s * LOWS);
            float dt = vector_at(w.pos, channel), y = 0.0f;
            const float skip = vector_at(w.pos, CHANNELS + channel), u = get(room(AT_INNER) + s * INNER, e);
#pragma unroll
            for (int j = 0; j < R4 / 4; j++) {
                const float4 v = low[j], r = four_at(rates, j * CHANNELS + channel);
                dt = fmaf(v.x, r.x, fmaf(v.y, r.y, fmaf(v.z, r.z, fmaf(v.w, r.w, dt))));
            }
            dt = softplus(dt);
            const float du = dt * u;
#pragma unroll
            for (int j = 0; j < J; j++) {
                const float4 a = four_at(decays, (j * CHANNELS + channel) * 2 + part), b = low[R4 / 4 + j * 2 + part];
                const float4 weight = low[R4 / 4 + N4 / 4 + j * 2 + part];
                float4 v = h[i][j];
                v.x = fmaf(power_of_two(dt * a.x), v.x, du * b.x);
                v.y = fmaf(power_of_two(dt * a.y), v.y, du * b.y);
                v.z = fmaf(power_of_two(dt * a.z), v.z, du * b.z);
                v.w = fmaf(power_of_two(dt * a.w), v.w, du * b.w);
                y = fmaf(weight.x, v.x, fmaf(weight.y, v.y, fmaf(weight.z, v.z, fmaf(weight.w, v.w, y))));
                __stcg(h_at(item) + j * E * 2, v);
            }
            if (item + AHEAD < ITEMS) load_h(h[i], item + AHEAD);
            y += __shfl_xor_sync(~0u, y, 1);
            if (part == 0) put(room(AT_INNER) + s * INNER, e, (y + skip * u) * room(AT_GATES)[s * GATES + e]);
        }
    w.pos += VECTORS;
    mark(D / 128 * 16 + 6);
    if constexpr (narrow(D)) {
        turn(w, NarrowOut::FIRST);
        mark(D / 128 * 16 + 7);
        NarrowOut::run(w, room(AT_INNER), INNER, [&](int tile, const float* total) { leave<D>(tile, warp, total); });
    } else {
        next_phase(w, WideOut::FIRST);
        mark(D / 128 * 16 + 7);
        WideOut::run(w, room(AT_INNER), INNER,
                     [&](int tile, int split, const float* total) { leave<D>(tile, split, total); });
    }
    mark(D / 128 * 16 + 8);
    next_phase(w, 0);
    mark(D / 128 * 16 + 9);
    w.parts = narrow(D) ? WARPS : splits_of_width(D);
}

// An S4D layer: x_m = a_m x_m + b_m u, y = 2 Re sum c_m x_m + D u, then GELU, linear, GLU where OUT is 2 D. P threads
// share a channel's M states.
template <int D, int M, int OUT, int P>
__device__ __forceinline__ void s4d(Walk& w, float* state, const Place& at) {
    constexpr int J = (M + P - 1) / P, PLANE = D * P, BYTES = up_to(24 * PLANE, 16), GATED = OUT > D;
    constexpr int STEP = least(J, most(1, RING / 4 / BYTES)), SKIP = up_to(4 * D, TILE), SPLITS = splits_of_width(D);
    constexpr int ITEMS = NS * PLANE, ROUNDS = (ITEMS + WORKERS - 1) / WORKERS;
    typedef Product<D, GATED ? up_to(D, 8) / 8 : up_to(D, 16) / 16, 1, true> Linear;
    const int tid = threadIdx.x;
    Norm<D>::run(w, at.add, at.store);
    next_phase(w, SKIP + STEP * BYTES);
    float y[ROUNDS], u[ROUNDS];
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        const int item = least(round * WORKERS + tid, ITEMS - 1), d = item / P % D;
        u[round] = get(room(AT_NORMED) + item / PLANE * NORMED, d);
        y[round] = item % P ? 0.0f : vector_at(w.pos, d) * u[round];
    }
    w.pos += SKIP;
#pragma unroll 1
    for (int first = 0; first < J; first += STEP) {
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            const int item = round * WORKERS + tid;
            if (item >= ITEMS) continue;
            const int place = item % PLANE;
            float* h = state + (long long)(item / PLANE) * STATE_SIZE + place;
            for (int j = first; j < least(first + STEP, J); j++) {
                const unsigned plane = w.pos + (j - first) * BYTES;
                float *re_at = h + 2 * j * PLANE, *im_at = re_at + PLANE;
                const float re = __ldcg(re_at), im = __ldcg(im_at);
                const float ar = vector_at(plane, place), ai = vector_at(plane, PLANE + place);
                const float nr = ar * re - ai * im + vector_at(plane, 2 * PLANE + place) * u[round];
                const float ni = ar * im + ai * re + vector_at(plane, 3 * PLANE + place) * u[round];
                __stcg(re_at, nr);
                __stcg(im_at, ni);
                y[round] += vector_at(plane, 4 * PLANE + place) * nr - vector_at(plane, 5 * PLANE + place) * ni;
            }
        }
        const int steps = least(STEP, J - first);
        w.pos += steps * BYTES;
        if (first + STEP < J) next_phase(w, least(STEP, J - first - STEP) * BYTES);
    }
    w.pos = (w.pos + TILE - 1) / TILE * TILE;
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
#pragma unroll
        for (int o = P / 2; o; o >>= 1) y[round] += __shfl_xor_sync(~0u, y[round], o);
        const int item = round * WORKERS + tid;
        if (item < ITEMS && item % P == 0)
            put(room(AT_INNER) + item / PLANE * INNER, item / P % D, gelu(y[round]));
    }
    next_phase(w, Linear::FIRST);
    Linear::run(w, room(AT_INNER), INNER, [&](int tile, int, const float* total) {
#pragma unroll
        for (int v = 0; v < 4; v++) {
            const int s = tid % 4 * 2 + v % 2, g = tid % 32 / 4;
            const int d = GATED ? tile * 8 + g : tile * 16 + g + v / 2 * 8;
            if (s >= NS || d >= D || (GATED && v >= 2)) continue;
            const float value = GATED ? total[v] * sigmoid(total[(v + 2) % 4]) : total[v];
            for (int p = 0; p < SPLITS; p++) room(AT_PART)[(p * NS + s) * up_to(D, 16) + d] = p ? 0.0f : value;
        }
    });
    next_phase(w, 0);
    w.parts = splits_of_width(D);
}

template <int D, int HIDDEN>
__device__ __forceinline__ void feed_forward(Walk& w, const Place& at) {
    typedef Product<D, up_to(HIDDEN, 16) / 16, 1, true> In;
    typedef Product<HIDDEN, up_to(D, 16) / 16, splits_of_width(D), true> Out;
    Norm<D>::run(w, at.add, at.store);
    next_phase(w, In::FIRST);
    In::run(w, room(AT_NORMED), NORMED, [&](int tile, int, const float* total) {
        each_of(tile, total, [&](int j, int s, float value) { put(room(AT_INNER) + s * INNER, j, gelu(value)); });
    });
    next_phase(w, Out::FIRST);
    Out::run(w, room(AT_INNER), INNER, [&](int tile, int split, const float* total) { leave<D>(tile, split, total); });
    next_phase(w, 0);
    w.parts = splits_of_width(D);
}

// The layers of a stage, on one way, from block ``first`` on. A layer's x is kept at ``store``, each a step further, or
// the first one only; before all but the first layer, what was kept at ``add`` is added, each a step further back.
__device__ __noinline__ Walk layers(Walk w, int first, int count, int store, int add, int step) {
    Place at = {-1, store};
    next_phase(w, 0);  // all see x
    int shape = shapes[first], place = state_at[first];
#pragma unroll 1
    for (int i = 0; i < count; i++) {
        const int next_shape = shapes[first + i + 1], next_place = state_at[first + i + 1];  // long before it is needed
        float* state = w.state + place;
        switch (shape) { BLOCK_CASES }
        shape = next_shape;
        place = next_place;
        at.store = step && store >= 0 ? at.store + step : -1;
        at.add = add;
        if (add >= 0) add -= step;
    }
    return w;
}
