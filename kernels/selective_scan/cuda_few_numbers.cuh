// Numbers of the scan over one state, beyond those of all scans: what becomes of dt, and how values go to memory.

// The unit dt is kept in: after a softplus to the base 2 its decay is 2 ** (dt A) without another factor.
#define BASE2 (SOFTPLUS && !PRECISE)
#define UNIT (BASE2 ? LN2 : 1.0f)

// -infinity in every element: softplus makes zero of it.
template <class E> constexpr unsigned NO_STEP = sizeof(E) == 4 ? 0xff800000u : 0xff80ff80u;
template <> constexpr unsigned NO_STEP<f16> = 0xfc00fc00u;

// W numbers to p, rounded, where live.
template <int W, class E> __device__ __forceinline__ void write(E* p, const float* from, bool live) {
    Pack<E, W> pack;
#pragma unroll
    for (int i = 0; i < W; i++) put(pack.v[i], from[i]);
    if (live) *reinterpret_cast<Pack<E, W>*>(p) = pack;
}

// W floats in shared memory, at p, which is aligned to them.
template <int W> __device__ __forceinline__ void get(float* to, const float* p) {
    const Pack<float, W> pack = *reinterpret_cast<const Pack<float, W>*>(p);
#pragma unroll
    for (int i = 0; i < W; i++) to[i] = pack.v[i];
}
template <int W> __device__ __forceinline__ void set(float* p, const float* from) {
    Pack<float, W> pack;
#pragma unroll
    for (int i = 0; i < W; i++) pack.v[i] = from[i];
    *reinterpret_cast<Pack<float, W>*>(p) = pack;
}

// dt in its unit, of the number before its bias; the bias in that unit too.
__device__ __forceinline__ float step_of(float v, float bias) {
#if !SOFTPLUS
    return v + bias;
#elif PRECISE
    v += bias;
    return v > 20.0f ? v : fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
#else
    v = fmaf(v, LOG2E, bias);
    float e = ex2(-fabsf(v)), p = -0.0123194596f;  // log2(1 + e) / e to 2e-7
    p = fmaf(p, e, 0.0636078417f);
    p = fmaf(p, e, -0.155351803f);
    p = fmaf(p, e, 0.256009668f);
    p = fmaf(p, e, -0.353394806f);
    p = fmaf(p, e, 0.480063707f);
    p = fmaf(p, e, -0.721310079f);
    p = fmaf(p, e, 1.44269478f);
    return fmaf(e, p, fmaxf(v, 0.0f));
#endif
}

// The slope of softplus where its value is step, over UNIT.
__device__ __forceinline__ float slope_of(float step) {
#if !SOFTPLUS
    return 1.0f;
#elif PRECISE
    return -expm1f(-step);
#else
    float near = step * fmaf(step, -LN2 / 2.0f, 1.0f);  // where 1 - 2 ** -step would lose places
    return step < 0.001953125f ? near : fmaf(-LOG2E, ex2(-step), LOG2E);
#endif
}
