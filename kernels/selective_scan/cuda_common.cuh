// What the kernels share that hold states in threads: the layout of these, and how rows of tokens come into shared memory.
//
// A thread holds S states of each of CH channels; LN lanes share a channel. The first NW warps of a block hold BD channels, EXTRA
// warps none. T steps are a tile. With PAIRS two neighbouring states are the parts of a complex number; so are those of A,
// B and C, and the host has made C of twice the conjugate. Macros come from the host: S, CH, LN, NW, EXTRA, T, V (channels a
// thread loads at once), VS (where the backward stages a slot), VN (states at once), FORWARD, CUT (products aren't rounded to
// tf32 but cut), WHOLE_N (N fills the lanes), the element types TX, TDT, TB, TC, TZ, TY, and the options.

#define NP (S * LN)             // states, padded
#define GR (8 / LN)             // groups of four channels in a warp
#define SIDE (4 * GR)            // channels side by side in a warp: a thread's are so far apart
#define BD (SIDE * CH * NW)     // channels of a block
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

// What the parts of dB and dC are kept in: as exact as these themselves, so that a sum of many is off by little more.
#if CUT
typedef bf16 Part;
#else
typedef float Part;
#endif

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
#elif PRECISE || PAIRS  // an angle grows with dt: what dt is off by counts more there
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

// Barriers that threads arrive at and wait for at different times; one thread of each warp arrives.
__device__ __forceinline__ unsigned address(const void* shared) { return (unsigned)__cvta_generic_to_shared(shared); }
__device__ __forceinline__ void set_up(i64* barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(i64* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(address(barrier)) : "memory");
}
// Waits until arrival number turn (from zero) is complete; every thread has waited for the one before.
__device__ __forceinline__ void wait_for(i64* barrier, int turn) {
    unsigned there;
    do {
#if __CUDA_ARCH__ >= 900
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
            : "=r"(there) : "r"(address(barrier)), "r"(turn & 1) : "memory");
#else
        asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
            : "=r"(there) : "r"(address(barrier)), "r"(turn & 1) : "memory");
#endif
    } while (!there);
}

// This thread's place in the block.
struct Place {
    i64 s, k, g, begin, end, seg;      // sequence, route, group; its slots, of which the block takes one segment
    i64 b, base;                       // row of tokens, and its first slot
    int d0, dend;                      // channels [d0, d0 + BD) of the group that ends at dend
    int q, ch;                         // S states from q S on, of channels d0 + ch, d0 + ch + SIDE, ...

    __device__ __forceinline__ Place(const Args& a, i64 id = blockIdx.x) {
        int blk = id % a.blocks; id /= a.blocks;
        g = id % a.G; id /= a.G;
        k = id % a.K; id /= a.K;
        seg = id % a.segments; s = id / a.segments;
        int width = (int)(a.channels / a.G);
        d0 = (int)g * width + blk * BD; dend = ((int)g + 1) * width;
        const int lane = threadIdx.x & 31, n8 = lane >> 2, warp = threadIdx.x >> 5;
#if FORWARD  // a channel's lanes and a state's channels both differ in the lowest bits: their reads of 16 bytes then merge
        q = LN == 1 ? 0 : (lane >> 1 & 1) | lane / SIDE & ~1;
        ch = warp * (SIDE * CH) + (LN == 1 ? lane : (lane & 1) | (lane >> 2) % (SIDE / 2) << 1);
#else  // a matrix product over lane % 4 sums channels
        q = n8 / GR;
        ch = warp * (SIDE * CH) + (n8 % GR) * 4 + (lane & 3);
#endif
#if PACKED
        const int* bounds = reinterpret_cast<const int*>(a.bounds);
        int from = bounds[s], to = bounds[s + 1];
        b = 0; base = 0; begin = from / CHUNK + s;
        end = begin + (to - from + CHUNK - 1) / CHUNK;
#else
        b = s; base = begin = s * a.per_row; end = base + a.per_row;
#endif
    }
    // That of this thread's channel m, and whether there is one.
    __device__ __forceinline__ Place of(int m) const {
        Place found = *this;
        found.ch += m * SIDE;
        return found;
    }
    __device__ __forceinline__ bool owns() const { return walks() && d0 + ch < dend; }
    // Whether this thread holds states.
    __device__ __forceinline__ bool walks() const { return EXTRA == 0 || threadIdx.x < WALKERS; }
    // Slots of segment i.
    __device__ __forceinline__ i64 from(const Args& a, i64 i) const {
        i64 span = (end - begin + a.segments - 1) / a.segments, at = begin + i * span;
        return at < end ? at : end;
    }
};
