// What the CUDA scans share: numbers, the layout of threads, and how rows of tokens come into shared memory.
//
// A thread holds S states of one channel; LN lanes share a channel. A lane's place: lane / 4 = q * GR + group and
// channel = group * 4 + lane % 4, so that a matrix product over lane % 4 sums channels (backward). The first NW warps of a
// block hold BD channels. T steps are a tile. Macros come from the host: S, LN, NW, HELP, T, V (channels a thread loads at once),
// VN (states at once), the element types TX, TDT, TB, TC, TZ, TY, and the options.

typedef long long i64;
struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };

#define NP (S * LN)             // states, padded
#define GR (8 / LN)             // groups of four channels in a warp
#define BD (4 * GR * NW)        // channels of a block
#define WALKERS (32 * NW)       // threads that hold states; the rest help to load, stage and write
#define NT (WALKERS * HELP)     // threads
#define CHUNK 64                // steps between two saved states
#define RT (BD / V)             // threads that load one row of channels
#define PASS ((T * RT + NT - 1) / NT)  // rows a thread loads of a tile
#define BT (NP / VN)            // threads that load one row of B or C
#define BPASS ((2 * T * BT + NT - 1) / NT)
#define PADDED(n) (((n) + 31) / 32 * 36)  // floats of a row in shared memory, see slot_of
#define LOG2E 1.4426950408889634f
#define LOG2E_HIGH 1.4426950216293335f
#define LOG2E_LOW 1.9259629911266175e-08f
#define LN2 0.6931471805599453f

__device__ __forceinline__ float number(float v) { return v; }
__device__ __forceinline__ float number(bf16 v) { return __uint_as_float((unsigned)v.bits << 16); }
__device__ __forceinline__ float number(f16 v) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits)); return r; }
__device__ __forceinline__ void put(float& to, float v) { to = v; }
__device__ __forceinline__ void put(bf16& to, float v) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(v)); }
__device__ __forceinline__ void put(f16& to, float v) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(v)); }

template <class E, int W> struct alignas(sizeof(E) * W) Pack { E v[W]; };

// W neighbours as they came from memory. They are taken apart where they are used: earlier, the thread would wait for them.
template <class E, int W> struct Raw {
    static constexpr int WORDS = (sizeof(E) * W + 3) / 4;
    unsigned word[WORDS];

    __device__ __forceinline__ float operator[](int i) const {
        if constexpr (sizeof(E) == 4) return __uint_as_float(word[i]);
        else if constexpr (W == 1) return number(E{(unsigned short)word[0]});
        else return number(E{(unsigned short)(i % 2 ? word[i / 2] >> 16 : word[i / 2])});
    }
};

// base + index * stride elements.
template <class E> __device__ __forceinline__ E* at(E* base, int index, int stride) {
    i64 address;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(address) : "r"(index), "r"(stride * (int)sizeof(E)), "l"(base));
    return reinterpret_cast<E*>(address);
}

// Zeros unless live.
template <int W, class E> __device__ __forceinline__ Raw<E, W> load(const E* p, bool live) {
    Raw<E, W> r;
    constexpr int bytes = sizeof(E) * W;
#pragma unroll
    for (int i = 0; i < r.WORDS; i++) r.word[i] = 0;
    if constexpr (bytes == 16)
        asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
            : "+r"(r.word[0]), "+r"(r.word[1]), "+r"(r.word[2]), "+r"(r.word[3]) : "l"(p), "r"((int)live));
    else if constexpr (bytes == 8)
        asm volatile("{.reg .pred p; setp.ne.s32 p, %3, 0; @p ld.global.v2.b32 {%0, %1}, [%2];}"
            : "+r"(r.word[0]), "+r"(r.word[1]) : "l"(p), "r"((int)live));
    else if constexpr (bytes == 4)
        asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.b32 %0, [%1];}" : "+r"(r.word[0]) : "l"(p), "r"((int)live));
    else if (live) r.word[0] = *reinterpret_cast<const unsigned short*>(p);
    return r;
}

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

// Puts VN states from n on in their row.
template <class E> __device__ __forceinline__ void stage_states(float* row, int n, const Raw<E, VN>& values) {
#pragma unroll
    for (int i = 0; i < VN; i++) row[n + i] = values[i];
}

__device__ __forceinline__ float ex2(float v) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
__device__ __forceinline__ float lg2(float v) { float r; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
__device__ __forceinline__ float rcp(float v) { float r; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }

// exp(dt A) = 2 ** (dt (rate + rest)). PRECISE (float32) and EXACT (the final state is float32): a polynomial of the fraction, right to the last place or so;
// the rate's second part matters there, because one rounded rate is off by the same amount at every step.
__device__ __forceinline__ float decay(float dt, float rate, float rest) {
#if PRECISE || EXACT
    float t = dt * rate, shifted = t + 12582912.0f, n = shifted - 12582912.0f;  // rounds to an integer, in its low bits
    float f = fmaf(dt, rest, fmaf(dt, rate, -n));
    float p = 1.535336188319500e-4f;
    p = fmaf(p, f, 1.339887440266574e-3f);
    p = fmaf(p, f, 9.618437357674640e-3f);
    p = fmaf(p, f, 5.550332471162809e-2f);
    p = fmaf(p, f, 2.402264791363012e-1f);
    p = fmaf(p, f, 6.931472028550421e-1f);
    p = fmaf(p, f, 1.0f);
    p = fmaf(0.0f, f, __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23)));  // 0 f keeps NaN
    return t < -126.0f ? 0.0f : t > 127.4f ? __int_as_float(0x7f800000) : p;
#else
    return ex2(dt * rate);
#endif
}

__device__ __forceinline__ float sigmoid(float v) {
#if PRECISE
    return 1.0f / (1.0f + expf(-v));
#else
    return rcp(1.0f + ex2(-LOG2E * v));
#endif
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
    float t = -LOG2E * fabsf(v), e = ex2(t);
    e = fmaf(e, LN2 * fmaf(-LOG2E, fabsf(v), -t), e);  // what t was rounded by
    float u = e * rcp(e + 2.0f), w = u * u;  // log(1 + e) = 2 atanh(e / (e + 2))
    float p = fmaf(0.140827291f, w, 0.139765031f);
    p = fmaf(p, w, 0.200132243f);
    p = fmaf(p, w, 0.333331201f);
    p = fmaf(p, w, 1.00000001f);
    return fmaf(2.0f * u, p, fmaxf(v, 0.0f));
#endif
}

// What a step does is one number, as in triton_steps.py: its token, -3 - token where the state restarts, -1 for a padding
// slot, -2 for no step at all.
__device__ __forceinline__ int entry_of(const Args& a, i64 b, i64 k, int place) {
#if TABLE
    return reinterpret_cast<const int*>(a.tokens)[b * a.t_b + k * a.t_k + place];
#else
    return place < (int)a.L ? (int)a.first + (int)a.sign * place : -2;
#endif
}

__device__ __forceinline__ int token_of(int entry) { return TABLE && entry <= -3 ? -3 - entry : entry; }

// The row of dt, B and C, which lies beside the token's or at the position itself; negative where they are zero.
__device__ __forceinline__ int row_of(const Args& a, int entry, int place) {
    int token = token_of(entry);
    return AT_TOKEN || token < 0 ? token : (int)a.first + (int)a.sign * place;
}

// This thread's place in the block.
struct Place {
    i64 s, k, g, begin, end, seg;      // sequence, route, group; its slots, of which this block takes one segment
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
        int lane = threadIdx.x & 31, n8 = lane >> 2;
        q = n8 / GR;
        ch = (threadIdx.x >> 5) * (4 * GR) + (n8 % GR) * 4 + (lane & 3);
#if PACKED
        const int* bounds = reinterpret_cast<const int*>(a.bounds);
        int from = bounds[s], to = bounds[s + 1];
        b = 0; base = 0; begin = from / CHUNK + s;
        end = begin + (to - from + CHUNK - 1) / CHUNK;
#else
        b = s; base = begin = s * a.per_row; end = begin + a.per_row;
#endif
    }
    // Whether this thread holds states.
    __device__ __forceinline__ bool walks() const { return HELP == 1 || threadIdx.x < WALKERS; }
    // Slots of segment i.
    __device__ __forceinline__ i64 from(const Args& a, i64 i) const {
        i64 span = (end - begin + a.segments - 1) / a.segments, at = begin + i * span;
        return at < end ? at : end;
    }
};

// A of this thread's states, as decay takes it.
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
            if (live) slowest = fminf(slowest, -rate[i]);
#if !(PRECISE || EXACT)
            rate[i] += rest[i];
#endif
        }
    }
    // What leaves a segment where h enters it: h <- exp(A sum of dt) h + end.
    __device__ __forceinline__ void pass(float (&h)[S], const Args& a, const Place& p, bool own, i64 segment) const {
        i64 at = ((p.s * a.segments + segment) * a.K + p.k) * a.channels + p.d0 + p.ch;
        float sum = own ? reinterpret_cast<const float*>(a.sums)[at] : 0.0f;
#pragma unroll
        for (int i = 0; i < S; i++) {
            int n = p.q * S + i;
            if (!(own && n < a.N)) continue;
            float keep = sum == __int_as_float(0x7f800000) ? 0.0f : decay(sum, rate[i], rest[i]);
            h[i] = fmaf(keep, h[i], reinterpret_cast<const float*>(a.ends)[at * a.N + n]);
        }
    }
};

// How many of a segment's slots the state at one of its ends depends on: beyond them, every decay of every channel of the
// block is below 2 ** -126. Counted from the last slot, or (ADJOINT) from the first. All threads of the block call it.
template <bool ADJOINT, int ROWS> __device__ int reach(const Args& a, const Place& p, const TDT* dt, const float (&bias)[V],
                                                       float slowest, i64 first, i64 last, float* memory) {
    const int tid = threadIdx.x, row0 = tid / RT, col = tid % RT * V;
    float(*s_sum)[BD] = reinterpret_cast<float(*)[BD]>(memory);      // a row for each group of threads
    float(*s_slow)[LN] = reinterpret_cast<float(*)[LN]>(s_sum + NT / RT);
    const bool channel = p.d0 + col < p.dend;
    if (p.walks()) s_slow[p.ch][p.q] = slowest;
    float sums[V] = {};
    int slots = 0;
    bool far = false;
    while (!far && slots < (int)(last - first)) {
        const int place = (int)((ADJOINT ? first + slots : last - 1 - slots) - p.base) * CHUNK;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            int r = row0 + i * (NT / RT);
            if (CHUNK * RT % NT && r >= CHUNK) break;
            int entry = entry_of(a, p.b, p.k, place + r), row = row_of(a, entry, place + r);
            Raw<TDT, V> raw = load<V>(at(dt, row, (int)a.dt_l), channel && row >= 0);
#pragma unroll
            for (int v = 0; v < V; v++) {
                float step = softplus(raw[v] + bias[v]);
                sums[v] += entry == -2 ? 0.0f : TABLE && entry <= -3 ? __int_as_float(0x7f800000) : step;
            }
        }
#pragma unroll
        for (int v = 0; v < V; v++) s_sum[row0][col + v] = sums[v];
        __syncthreads();
        bool reached = true;
        for (int c = tid; c < BD; c += NT) {
            float sum = 0.0f, slow = s_slow[c][0];
            for (int r = 0; r < NT / RT; r++) sum += s_sum[r][c];
#pragma unroll
            for (int q = 1; q < LN; q++) slow = fminf(slow, s_slow[c][q]);
            reached = reached && (p.d0 + c >= p.dend || sum * slow > 126.0f);
        }
        far = __syncthreads_and(reached);
        slots++;
    }
    return slots;
}
