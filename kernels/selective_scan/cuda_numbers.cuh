// Numbers of the CUDA scans: how they come from memory and go there, and the functions that they go through. Macros come from
// the host: PRECISE (float32), EXACT (the final state is wanted in full).

typedef long long i64;

// Waits for the end of the kernels launched before, and lets the next one start, which then waits likewise.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void follow() { asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory"); }
#else
__device__ __forceinline__ void follow() {}
#endif

struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };

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

// Keeps a pointer or a number in its registers: left alone, the compiler makes it anew wherever it is used.
template <class E> __device__ __forceinline__ void pin(E*& p) { asm volatile("" : "+l"(p)); }
__device__ __forceinline__ void pin(int& v) { asm volatile("" : "+r"(v)); }

// W neighbours, or fill in every word unless live.
template <int W, class E> __device__ __forceinline__ Raw<E, W> load(const E* p, bool live, unsigned fill = 0) {
    Raw<E, W> r;
    constexpr int bytes = sizeof(E) * W;
#pragma unroll
    for (int i = 0; i < r.WORDS; i++) r.word[i] = fill;
    if constexpr (bytes == 16)
        asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
            : "+r"(r.word[0]), "+r"(r.word[1]), "+r"(r.word[2]), "+r"(r.word[3]) : "l"(p), "r"((int)live));
    else if constexpr (bytes == 8)
        asm volatile("{.reg .pred p; setp.ne.s32 p, %3, 0; @p ld.global.v2.b32 {%0, %1}, [%2];}"
            : "+r"(r.word[0]), "+r"(r.word[1]) : "l"(p), "r"((int)live));
    else if constexpr (bytes == 4)
        asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.b32 %0, [%1];}" : "+r"(r.word[0]) : "l"(p), "r"((int)live));
    else
        asm volatile("{.reg .pred p; .reg .b16 h; setp.ne.s32 p, %2, 0; cvt.u16.u32 h, %0; "
            "@p ld.global.b16 h, [%1]; cvt.u32.u16 %0, h;}" : "+r"(r.word[0]) : "l"(p), "r"((int)live));
    return r;
}

__device__ __forceinline__ float ex2(float v) { float r; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }
__device__ __forceinline__ float rcp(float v) { float r; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v)); return r; }

// exp(dt A) = 2 ** (dt (rate + rest)) by a polynomial of the fraction, right to the last place or so. The rate's second part
// matters there, because one rounded rate is off by the same amount at every step.
__device__ __forceinline__ float full_decay(float dt, float rate, float rest) {
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
}

// The same as exactly as is wanted: by the polynomial for PRECISE (float32) and EXACT (the final state is float32).
__device__ __forceinline__ float decay(float dt, float rate, float rest) {
#if PRECISE || EXACT
    return full_decay(dt, rate, rest);
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

// exp(i dt A), A in radians: the angle less quarter turns, in three parts of pi / 2, then polynomials.
__device__ __forceinline__ float2 turned(float dt, float A) {
    float angle = dt * A, quarters = rintf(angle * 0.636619772f), rest = fmaf(dt, A, -angle);
    angle = fmaf(quarters, -1.57079637050628662f, angle);
    angle = fmaf(quarters, 4.37113900018624283e-8f, angle);
    angle = fmaf(quarters, 1.71512451000588e-15f, angle) + rest;
    float w = angle * angle;
    float sine = fmaf(fmaf(-1.9515295891e-4f, w, 8.3321608736e-3f), w, -1.6666654611e-1f);
    float cosine = fmaf(fmaf(2.443315711809948e-5f, w, -1.388731625493765e-3f), w, 4.166664568298827e-2f);
    sine = fmaf(sine * w, angle, angle);
    cosine = fmaf(w * w, cosine, fmaf(w, -0.5f, 1.0f));
    int turn = (int)quarters;
    float re = turn & 1 ? sine : cosine, im = turn & 1 ? cosine : sine;
    return make_float2(turn + 1 & 2 ? -re : re, turn & 2 ? -im : im);
}
