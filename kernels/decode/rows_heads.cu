// A step of Mamba-2's scan for many rows: dt = clamp(softplus(dt + bias)), h = exp(-dt exp(A_log)) h + dt x B, and
// y = (<C, h> + D x) silu(z), on its way to the norm: times the norm's weight, its squares summed (NORM 1), or those
// before the gate (NORM 2). A block has a head of a row; lanes share a row of its state. States are on their way to shared
// memory before the kernel in front is waited for: nothing in the same step of a layer writes them, and beside a product
// there is more room in shared memory than in registers. Macros: X, H (of states), A_T, D_T, B_T, P, N, NORM, D_WIDE
// (D of each channel), WARPS.

constexpr int V = 16 / sizeof(H), LANES = N / V > 32 ? 32 : N / V, NV = N / V / LANES, AT_ONCE = WARPS * 32 / LANES;
constexpr int ITEMS = (P + AT_ONCE - 1) / AT_ONCE;
static_assert(N % V == 0 && (LANES & (LANES - 1)) == 0 && N == LANES * V * NV && P % 8 == 0 && P <= WARPS * 32, "whole vectors");

extern "C" __global__ void __launch_bounds__(WARPS * 32) heads_rows(const Args a) {
    __shared__ float outputs[P];
    __shared__ __align__(8) unsigned long long arrived;
    const unsigned barrier = shared_address(&arrived);
    const int t = threadIdx.x, h = blockIdx.x % a.heads, part = t % LANES;
    const i64 b = blockIdx.x / a.heads;
    H* state = static_cast<H*>(a.state) + (b * a.heads + h) * (P * N);
    const H* states = reinterpret_cast<const H*>(memory);
    if (t == 0) copy_bulk(memory, state, P * N * sizeof(H), barrier);
    const float rate = -LOG2E * expf(number(static_cast<const A_T*>(a.A_log)[h]));
    const float bias = number(static_cast<const B_T*>(a.dt_bias)[h]);
    float skip = 0, norm = 1;
    if (t < P) {
        if (a.D) skip = number(static_cast<const D_T*>(a.D)[D_WIDE ? h * P + t : h]);
        if (NORM) norm = number(static_cast<const X*>(a.norm_weight)[h * P + t]);
    }
    wait_for_before();
    let_follow();

    const X* x = static_cast<const X*>(a.x) + b * a.x_b + h * P;
    const i64 at = b * a.x_b + (h / a.per_group) * N + part * V;
    Raw<X, V> keys[NV], queries[NV];
#pragma unroll
    for (int v = 0; v < NV; v++) {
        keys[v] = load<V>(static_cast<const X*>(a.keys) + at + v * LANES * V, true);
        queries[v] = load<V>(static_cast<const X*>(a.queries) + at + v * LANES * V, true);
    }
    float own = 0, gate = 0;
    if (t < P) {
        own = number(x[t]);
        gate = number(static_cast<const X*>(a.z)[b * a.z_b + h * P + t]);
    }
    float u[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int p = i * AT_ONCE + t / LANES;
        u[i] = p < P ? number(x[p]) : 0;
    }
    float dt = softplus(number(static_cast<const X*>(a.dt)[b * a.dt_b + h]) + bias);
    dt = fminf(fmaxf(dt, __int_as_float((int)a.least)), __int_as_float((int)a.most));
    const float decay = ex2(dt * rate);
    __syncthreads();  // the barrier has been made
    wait_bulk(barrier);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        const int p = i * AT_ONCE + t / LANES;
        float y = 0;
#pragma unroll
        for (int v = 0; v < NV; v++) {
            const int place = (p < P ? p : 0) * N + (v * LANES + part) * V;
            const uint4 held = *reinterpret_cast<const uint4*>(states + place);
            const Raw<H, V> before = {held.x, held.y, held.z, held.w};
            Pack<H, V> kept;
#pragma unroll
            for (int j = 0; j < V; j++) {
                float value = fmaf(before[j], decay, dt * u[i] * keys[v][j]);
                y = fmaf(value, queries[v][j], y);
                put(kept.v[j], value);
            }
            if (p < P) *reinterpret_cast<uint4*>(state + place) = *reinterpret_cast<uint4*>(&kept);
        }
#pragma unroll
        for (int far = LANES / 2; far; far /= 2) y += __shfl_xor_sync(~0u, y, far);
        if (part == 0 && p < P) outputs[p] = y;
    }
    __syncthreads();
    if (t / 32 * 32 >= P) return;
    float y = t < P ? fmaf(skip, own, outputs[t]) : 0, gated = y * silu(gate), squared = NORM == 2 ? y : gated;
    if (t < P) put(static_cast<X*>(a.y)[(b * a.heads + h) * P + t], gated * norm);
    if (NORM) {
        float square = squared * squared;
        for (int far = 16; far; far /= 2) square += __shfl_xor_sync(~0u, square, far);
        constexpr int PARTS = (P + 31) / 32;
        if (t % 32 == 0) static_cast<float*>(a.squares)[(b * a.heads + h) * PARTS + t / 32] = square;
    }
}
