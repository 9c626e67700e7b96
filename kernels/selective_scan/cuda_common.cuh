// What the kernels share that hold states in threads: the layout of these, and how rows of tokens come into shared memory.
//
// A thread holds S states of one channel; LN lanes share a channel. The first NW warps of a block hold BD channels, EXTRA
// warps none. T steps are a tile. With PAIRS two neighbouring states are the parts of a complex number; so are those of A,
// B and C, and the host has made C of twice the conjugate. Macros come from the host: S, LN, NW, EXTRA, T, V (channels a
// thread loads at once), VN (states at once), FORWARD, CUT (products aren't rounded to tf32 but cut), WHOLE_N (N fills the
// lanes), the element types TX, TDT, TB, TC, TZ, TY, and the options.

#define NP (S * LN)             // states, padded
#define GR (8 / LN)             // groups of four channels in a warp
#define BD (4 * GR * NW)        // channels of a block
#define WALKERS (32 * NW)       // threads that hold states
#define NT (32 * (NW + EXTRA))  // threads
#define LOADERS (FORWARD ? 32 * EXTRA : NT)  // threads that load, stage and write
#define CHUNK 64                // steps between two saved states
#define RT (BD / V)             // threads that load one row of channels
#define PASS ((T * RT + LOADERS - 1) / LOADERS)  // rows a thread loads of a tile
#define BT (NP / VN)            // threads that load one row of B or C
#define BPASS ((2 * T * BT + LOADERS - 1) / LOADERS)
#define PADDED(n) (((n) + 31) / 32 * 36)  // floats of a row in shared memory, see slot_of
// -32768 in every element: softplus makes zero of it.
template <class E> constexpr unsigned FAR_BELOW = sizeof(E) == 4 ? 0xc7000000u : 0xc700c700u;
template <> constexpr unsigned FAR_BELOW<f16> = 0xf800f800u;

// W neighbours to p if live: no branch, which would part what stands around it.
template <class E, int W> __device__ __forceinline__ void save(E* p, const Pack<E, W>& from, bool live) {
    constexpr int bytes = sizeof(E) * W;
    if constexpr (bytes == 16) {
        uint4 w = *reinterpret_cast<const uint4*>(&from);
        asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p st.global.v4.b32 [%4], {%0, %1, %2, %3};}"
            ::"r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "l"(p), "r"((int)live) : "memory");
    } else if constexpr (bytes == 8) {
        uint2 w = *reinterpret_cast<const uint2*>(&from);
        asm volatile("{.reg .pred p; setp.ne.s32 p, %3, 0; @p st.global.v2.b32 [%2], {%0, %1};}"
            ::"r"(w.x), "r"(w.y), "l"(p), "r"((int)live) : "memory");
    } else if constexpr (bytes == 4) {
        unsigned w = *reinterpret_cast<const unsigned*>(&from);
        asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.b32 [%1], %0;}" ::"r"(w), "l"(p), "r"((int)live) : "memory");
    } else if (live) *p = from.v[0];
}

#define UNCUT 1.000352f  // makes good on average for what CUT takes off products: .72 of half a unit in the last of ten places

// The W floats at p, which is aligned to them: one instruction.
template <int W> __device__ __forceinline__ void fetch(float (&to)[W], const float* p) {
    if constexpr (W % 4 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 4) {
            float4 f = *reinterpret_cast<const float4*>(p + i);
            to[i] = f.x; to[i + 1] = f.y; to[i + 2] = f.z; to[i + 3] = f.w;
        }
    } else if constexpr (W % 2 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 2) {
            float2 f = *reinterpret_cast<const float2*>(p + i);
            to[i] = f.x; to[i + 1] = f.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) to[i] = p[i];
    }
}

// Place of float f of a row: threads that read 8 or 16 floats each meet different banks.
__device__ __forceinline__ int slot_of(int f) { return f + (f >> 5) * 4; }

// W floats to p, which is aligned to them.
template <int W> __device__ __forceinline__ void store(float* p, const float (&from)[W]) {
    if constexpr (W % 4 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 4) *reinterpret_cast<float4*>(p + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
    } else if constexpr (W % 2 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 2) *reinterpret_cast<float2*>(p + i) = make_float2(from[i], from[i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) p[i] = from[i];
    }
}

// Puts VN states in their row.
template <class E> __device__ __forceinline__ void stage_states(float* to, const Raw<E, VN>& values) {
    float out[VN];
#pragma unroll
    for (int i = 0; i < VN; i++) out[i] = values[i];
    store<VN>(to, out);
}

// The slope of softplus where its value is dt.
__device__ __forceinline__ float sigmoid_of_softplus(float dt) {
#if PRECISE
    return -expm1f(-dt);
#else
    float e = 1.0f - ex2(-LOG2E * dt);
    return dt < 0.015625f ? dt * fmaf(dt, -0.5f, 1.0f) : e;
#endif
}

__device__ __forceinline__ float softplus(float v) {
#if !SOFTPLUS
    return v;
#elif PRECISE
    return v > 20.0f ? v : fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
#else
    float t = -LOG2E * fabsf(v), e = ex2(t);  // log(1 + e) as e times a polynomial
#if FORWARD && !EXACT
    float p = 0.0141408565f;
    p = fmaf(p, e, -0.0664013188f);
    p = fmaf(p, e, 0.149223363f);
    p = fmaf(p, e, -0.23503836f);
    p = fmaf(p, e, 0.331094441f);
    p = fmaf(p, e, -0.499869654f);
    p = fmaf(p, e, 0.999998732f);
#else
    e = fmaf(e, LN2 * fmaf(-LOG2E, fabsf(v), -t), e);  // what t was rounded by
    float p = 0.00523262925f;
    p = fmaf(p, e, -0.0295049866f);
    p = fmaf(p, e, 0.0782255571f);
    p = fmaf(p, e, -0.13663214f);
    p = fmaf(p, e, 0.191059928f);
    p = fmaf(p, e, -0.24842979f);
    p = fmaf(p, e, 0.333190965f);
    p = fmaf(p, e, -0.499994931f);
    p = fmaf(p, e, 0.99999997f);
#endif
    return fmaf(e, p, fmaxf(v, 0.0f));
#endif
}

// What a step does is one number, its entry. With a table, as in triton_steps.py: its token, -3 - token where the state
// restarts, -1 for a padding slot, -2 for no step at all. Without one, its place in the order of the scan: no step from L on.
__device__ __forceinline__ int entry_of(const Args& a, i64 b, i64 k, int place) {
#if TABLE
    return reinterpret_cast<const int*>(a.tokens)[b * a.t_b + k * a.t_k + place];
#else
    return place;
#endif
}

__device__ __forceinline__ bool is_step(const Args& a, int entry) { return TABLE ? entry != -2 : entry < (int)a.L; }

__device__ __forceinline__ int token_of(int entry) { return TABLE && entry <= -3 ? -3 - entry : entry; }

// The row of dt, B and C, which lies beside the token's or at the position itself.
__device__ __forceinline__ int row_of(const Args& a, int entry, int place) {
    int token = token_of(entry);
    return AT_TOKEN || token < 0 ? token : (int)a.first + (int)a.sign * place;
}

// Whether a token or row of these is one of the tensors'; else it is read as zeros.
__device__ __forceinline__ bool in_map(const Args& a, int row) {
#if TABLE
    int none = -1;
    asm("" : "+r"(none));  // the compiler makes more of a comparison with 0 than one
    return row > none;
#else
    return row < (int)a.L;
#endif
}

// Rows of a tensor, by token; without a table by place, so that its base and stride hold where the scan starts and which way it goes.
template <class E> struct Rows {
    E* base;
    int stride;  // bytes

    __device__ __forceinline__ Rows(void* start, i64 offset, i64 step, const Args& a) {
        base = reinterpret_cast<E*>(start) + offset + (TABLE ? 0 : a.first * step);
        stride = (TABLE ? 1 : (int)a.sign) * (int)step * (int)sizeof(E);
        pin(base);
        pin(stride);
    }
    __device__ __forceinline__ E* operator[](int row) const {
        E* p;
        asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(p) : "r"(row), "r"(stride), "l"(base));
        return p;
    }
};

// This thread's place in the block.
struct Place {
    i64 s, k, g, begin, end, seg;      // sequence, route, group; its slots of this launch, of which the block takes one segment
    i64 b, base;                       // row of tokens, and its first slot
    int d0, dend;                      // channels [d0, d0 + BD) of the group that ends at dend
    int q, ch;                         // S states from q S on, of channel d0 + ch

    __device__ __forceinline__ Place(const Args& a) {
        i64 id = blockIdx.x;
        int blk = id % a.blocks; id /= a.blocks;
        g = id % a.G; id /= a.G;
        k = id % a.K; id /= a.K;
        seg = id % a.segments; s = id / a.segments;
        int width = (int)(a.channels / a.G);
        d0 = (int)g * width + blk * BD; dend = ((int)g + 1) * width;
        const int lane = threadIdx.x & 31, n8 = lane >> 2, warp = threadIdx.x >> 5;
        constexpr int WIDE = 4 * GR;  // channels of a warp
#if FORWARD  // a channel's lanes and a state's channels both differ in the lowest bits: their reads of 16 bytes then merge
        q = LN == 1 ? 0 : (lane >> 1 & 1) | lane / WIDE & ~1;
        ch = warp * WIDE + (LN == 1 ? lane : (lane & 1) | (lane >> 2) % (WIDE / 2) << 1);
#else  // a matrix product over lane % 4 sums channels
        q = n8 / GR;
        ch = warp * WIDE + (n8 % GR) * 4 + (lane & 3);
#endif
#if PACKED
        const int* bounds = reinterpret_cast<const int*>(a.bounds);
        int from = bounds[s], to = bounds[s + 1];
        b = 0; base = 0; begin = from / CHUNK + s;
        end = begin + (to - from + CHUNK - 1) / CHUNK;
#else
        b = s; base = s * a.per_row; begin = base + a.lo; end = base + a.hi;
#endif
    }
    // Whether this thread holds states.
    __device__ __forceinline__ bool walks() const { return EXTRA == 0 || threadIdx.x < WALKERS; }
    // Slots of segment i.
    __device__ __forceinline__ i64 from(const Args& a, i64 i) const {
        i64 span = (end - begin + a.segments - 1) / a.segments, at = begin + i * span;
        return at < end ? at : end;
    }
};

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

__device__ __forceinline__ void add_step(Sum& total, float dt, float keep) {
    total = RESTARTS && keep == 0.0f ? (Sum)__int_as_float(0x7f800000) : total + dt;
}

// A of this thread's states, as decay takes it. With PAIRS, every second one is an angle's rate: rate in the units of the
// others, rest in radians.
struct Rates {
    float rate[S], rest[S], slowest;

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
            float size = decay(dt, rate[i], rest[i]);
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

// How many of a segment's slots the state at one of its ends depends on: beyond them, every decay of every channel of the
// block is below 2 ** -126. Counted from the last slot, or (ADJOINT) from the first. All threads of the block call it.
template <bool ADJOINT> __device__ int reach(const Args& a, const Place& p, float slowest, i64 first, i64 last, float* memory) {
    constexpr int AHEAD = 4, STEP = NT / RT, ROWS = (CHUNK + STEP - 1) / STEP;  // slots read at once; rows of a thread
    const int tid = threadIdx.x, row0 = tid / RT, col = tid % RT * V, dc = p.d0 + col;
    float(*s_sum)[BD] = reinterpret_cast<float(*)[BD]>(memory);      // a row for each group of threads
    float(*s_slow)[LN] = reinterpret_cast<float(*)[LN]>(s_sum + STEP);
    const bool channel = dc < p.dend;
    const Rows<const TDT> dt(a.dt, p.b * a.dt_b + p.k * a.dt_k + dc, a.dt_l, a);
    float bias[V], sums[V] = {};
#pragma unroll
    for (int v = 0; v < V; v++) bias[v] = HAS_BIAS && channel ? reinterpret_cast<const float*>(a.bias)[p.k * a.channels + dc + v] : 0.0f;
    if (p.walks()) s_slow[p.ch][p.q] = slowest;
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
            reached = reached && (p.d0 + c >= p.dend || sum * slow > 126.0f);
        }
        far = __syncthreads_and(reached);
        slots = min(slots + AHEAD, count);
    }
    return slots;
}
