// States and their decays, and how segments of a sequence that run at once hand them on.

// h <- e h + u, where e are the decays of a step.
__device__ __forceinline__ void step(float (&h)[S], const float (&e)[S], const float (&u)[S]) {
#if PAIRS
#pragma unroll
    for (int i = 0; i < S; i += 2) {
        float re = fmaf(e[i], h[i], fmaf(-e[i + 1], h[i + 1], u[i]));
        h[i + 1] = fmaf(e[i], h[i + 1], fmaf(e[i + 1], h[i], u[i + 1]));
        h[i] = re;
    }
#else
#pragma unroll
    for (int i = 0; i < S; i++) h[i] = fmaf(e[i], h[i], u[i]);
#endif
}

// to <- conj(e) from.
__device__ __forceinline__ void back(float (&to)[S], const float (&e)[S], const float (&from)[S]) {
#if PAIRS
#pragma unroll
    for (int i = 0; i < S; i += 2) {
        float re = fmaf(e[i], from[i], e[i + 1] * from[i + 1]);
        to[i + 1] = fmaf(e[i], from[i + 1], -e[i + 1] * from[i]);
        to[i] = re;
    }
#else
#pragma unroll
    for (int i = 0; i < S; i++) to[i] = e[i] * from[i];
#endif
}

// The sum of dt over a segment. Angles of complex numbers grow with it, beyond what a float holds.
#if PAIRS
typedef double Sum;
#else
typedef float Sum;
#endif

template <class F> __device__ __forceinline__ void add_step(F& total, float dt, float keep) {
    total = RESTARTS && keep == 0.0f ? (F)__int_as_float(0x7f800000) : total + dt;
}

// The GPU's exponential is off by up to two units in the last place, the same way for like steps, and a long memory adds
// that up. Where a final state is wanted in full, the scan takes it still, and every few steps mends what came of it. Not
// without softplus: where dt is negative a state grows, and with it what the steps since the last mending are off by.
constexpr bool MENDED = EXACT && !PRECISE && !PAIRS && SOFTPLUS;
constexpr int SPAN = 16;  // steps after which it does so

// A of this thread's states, as decay takes it. With PAIRS, every second one is an angle's rate: rate in the units of the
// others, rest in radians.
struct Rates {
    float rate[S], rest[S], slowest;

    Rates() = default;
    __device__ __forceinline__ Rates(const Args& a, const Place& p, bool own) {
        slowest = __int_as_float(0x7f800000);
#pragma unroll
        for (int i = 0; i < S; i++) {
            int n = p.q * S + i;
            bool live = own && n < a.N;
            float A = live ? reinterpret_cast<const float*>(a.A)[(p.k * a.channels + p.d0 + p.ch) * a.N + n] : 0.0f;
            rate[i] = A * LOG2E_HIGH;
            rest[i] = fmaf(A, LOG2E_HIGH, -rate[i]) + A * LOG2E_LOW;
            if (PAIRS && i % 2) {
                rate[i] += rest[i];
                rest[i] = A;
                continue;
            }
            if (live) slowest = fminf(slowest, -rate[i]);
#if !(PRECISE || EXACT)
            rate[i] += rest[i];
#endif
        }
    }
    // What a step multiplies the states by.
    __device__ __forceinline__ void decays(float (&e)[S], float dt, float keep) const {
#pragma unroll
        for (int i = 0; i < S; i += 1 + PAIRS) {
            float size = MENDED ? ex2(dt * rate[i]) : decay(dt, rate[i], rest[i]);
            if (RESTARTS) size *= keep;
#if PAIRS
            float2 way = turned(dt, rest[i + 1]);
            e[i] = size * way.x, e[i + 1] = size * way.y;
#else
            e[i] = size;
#endif
        }
    }
    // What leaves a segment where h enters it: h <- exp(A sum of dt) h + end; with ADJOINT, of the conjugate A.
    template <bool ADJOINT> __device__ __forceinline__ void pass(float (&h)[S], const Args& a, const Place& p, bool own, i64 segment) const {
        i64 at = ((p.s * a.segments + segment) * a.K + p.k) * a.channels + p.d0 + p.ch;
        Sum sum = own ? reinterpret_cast<const Sum*>(a.sums)[at] : 0;
        bool gone = sum == __int_as_float(0x7f800000);
        float end[S], e[S];
#pragma unroll
        for (int i = 0; i < S; i++) {
            int n = p.q * S + i;
            end[i] = own && n < a.N ? reinterpret_cast<const float*>(a.ends)[at * a.N + n] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < S; i += 1 + PAIRS) {
            float size = gone ? 0.0f : decay((float)sum, rate[i], rest[i]);
#if PAIRS
            double angle = gone ? 0.0 : sum * (double)rest[i + 1];
            float2 way = turned((float)fma(rint(angle * 0.15915494309189535), -6.283185307179586, angle), 1.0f);
            e[i] = size * way.x, e[i + 1] = size * way.y;
#else
            e[i] = size;
#endif
        }
        if (ADJOINT) back(h, e, h);
        else step(h, e, end);
#pragma unroll
        for (int i = 0; i < S; i++) h[i] += ADJOINT ? end[i] : 0.0f;
    }
};

// What some steps do to the state that they begin with: a product of approximate decays, which ``mend`` replaces by the decay
// of their sum.
struct Span {
    float from[S], kept[S], sum;

    __device__ __forceinline__ void begin(const float (&h)[S]) {
        sum = 0.0f;
#pragma unroll
        for (int i = 0; i < S; i++) from[i] = h[i], kept[i] = 1.0f;
    }
    __device__ __forceinline__ void add(const float (&e)[S], float dt, float keep) {
        add_step(sum, dt, keep);
#pragma unroll
        for (int i = 0; i < S; i++) kept[i] *= e[i];
    }
    __device__ __forceinline__ void mend(float (&h)[S], const Rates& rates) const {
        const bool gone = RESTARTS && sum == __int_as_float(0x7f800000);
#pragma unroll
        for (int i = 0; i < S; i++) {
            float whole = gone ? 0.0f : full_decay(sum, rates.rate[i], rates.rest[i]);
            h[i] = fmaf(whole - kept[i], from[i], h[i]);
        }
    }
};

// The state of this thread before a slot, as it is kept: by state, then channel, the parts of a complex number together.
__device__ __forceinline__ float* saved_at(const Args& a, const Place& p, i64 slot, int i) {
    float* states = reinterpret_cast<float*>(a.saved) + (slot * a.K + p.k) * a.saved_n * a.channels;
    const i64 n = p.q * S + i, d = p.d0 + p.ch;
    return states + (PAIRS ? n / 2 * 2 * a.channels + 2 * d + n % 2 : n * a.channels + d);
}

// What a segment leaves, from zero.
__device__ __forceinline__ void leave_segment(const Args& a, const Place& p, const float (&h)[S], Sum total, bool own) {
    i64 at = ((p.s * a.segments + p.seg) * a.K + p.k) * a.channels + p.d0 + p.ch;
    if (own && p.q == 0) reinterpret_cast<Sum*>(a.sums)[at] = total;
#pragma unroll
    for (int i = 0; i < S; i++) {
        int n = p.q * S + i;
        if (own && n < a.N) reinterpret_cast<float*>(a.ends)[at * a.N + n] = h[i];
    }
}

constexpr float FORGOTTEN = 64.0f;  // a state that has decayed to 2 ** -64 of what it was: far below a float's last place

// How many of a segment's slots the state at one of its ends depends on: beyond them, every decay of every channel of the
// block is below 2 ** -FORGOTTEN. Counted from the last slot, or (ADJOINT) from the first. All threads of the block call it.
template <bool ADJOINT> __device__ int reach(const Args& a, const Place& p, const Rates (&rates)[CH], i64 first, i64 last, float* memory) {
    constexpr int AHEAD = 4, STEP = NT / RT, ROWS = (CHUNK + STEP - 1) / STEP;  // slots read at once; rows of a thread
    const int tid = threadIdx.x, row0 = tid / RT, col = tid % RT * V, dc = p.d0 + col;
    float(*s_sum)[BD] = reinterpret_cast<float(*)[BD]>(memory);      // a row for each group of threads
    float(*s_slow)[LN] = reinterpret_cast<float(*)[LN]>(s_sum + STEP);
    const bool channel = dc < p.dend;
    const Rows<const TDT> dt(a.dt, p.b * a.dt_b + p.k * a.dt_k + dc, a.dt_l, a);
    float bias[V], sums[V] = {};
#pragma unroll
    for (int v = 0; v < V; v++) bias[v] = HAS_BIAS && channel ? reinterpret_cast<const float*>(a.bias)[p.k * a.channels + dc + v] : 0.0f;
#pragma unroll
    for (int m = 0; m < CH; m++)
        if (p.walks()) s_slow[p.ch + m * SIDE][p.q] = rates[m].slowest;
    const int count = (int)(last - first);
    int slots = 0;
    bool far = false;
    while (!far && slots < count) {
#pragma unroll 1
        for (int i = 0; i < ROWS; i++) {
            const int r = row0 + i * STEP;
            Raw<TDT, V> raw[AHEAD];
            int entry[AHEAD];
#pragma unroll
            for (int m = 0; m < AHEAD; m++) {
                const int place = (int)((ADJOINT ? first + slots + m : last - 1 - slots - m) - p.base) * CHUNK + r;
                const bool inside = (CHUNK % STEP == 0 || r < CHUNK) && slots + m < count;
                entry[m] = inside ? entry_of(a, p.b, p.k, place) : TABLE ? -2 : (int)a.L;
                const int row = inside ? row_of(a, entry[m], place) : TABLE ? -1 : (int)a.L;
                raw[m] = load<V>(dt[row], channel && in_map(a, row));
            }
#pragma unroll
            for (int m = 0; m < AHEAD; m++)
#pragma unroll
                for (int v = 0; v < V; v++) {
                    float step = softplus(raw[m][v] + bias[v]);
                    sums[v] += !is_step(a, entry[m]) ? 0.0f : RESTARTS && entry[m] <= -3 ? __int_as_float(0x7f800000) : step;
                }
        }
#pragma unroll
        for (int v = 0; v < V; v++) s_sum[row0][col + v] = sums[v];
        __syncthreads();
        bool reached = true;
        for (int c = tid; c < BD; c += NT) {
            float sum = 0.0f, slow = s_slow[c][0];
            for (int r = 0; r < STEP; r++) sum += s_sum[r][c];
#pragma unroll
            for (int q = 1; q < LN; q++) slow = fminf(slow, s_slow[c][q]);
            reached = reached && (p.d0 + c >= p.dend || sum * slow > FORGOTTEN);
        }
        far = __syncthreads_and(reached);
        slots = min(slots + AHEAD, count);
    }
    return slots;
}
