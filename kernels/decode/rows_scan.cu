// A step of Mamba's scan for many rows: dt = softplus(W low_dt + bias), h = exp(-dt exp(A_log)) h + dt x B, and
// y = (<C, h> + D x) silu(z). A thread has a channel of ROWS rows. Weights, rates and states are on their way before the
// kernel in front is waited for: nothing in the same step of a layer writes them. What threads share comes to shared memory
// in the order that it lies in: with one address a channel, a warp's load would touch as many lines as it has channels.
// Macros: X, H (of states), A_T, D_T, B_T (of dt's bias), RANK, N, PARTS (of low's sums), ROWS.

constexpr int CHANNELS = 32, WARPS = 4, THREADS = CHANNELS * WARPS, LOW = RANK + 2 * N, V = 16 / sizeof(H);
constexpr int ALL = WARPS * ROWS * LOW / 4, EACH = (ALL + THREADS - 1) / THREADS;
static_assert(RANK % 8 == 0 && N % 8 == 0, "whole vectors");

extern "C" __global__ void __launch_bounds__(THREADS) scan_rows(const Args a) {
    __shared__ __align__(16) X weights[CHANNELS][RANK + 8];
    __shared__ __align__(16) float rates[CHANNELS][N + 4];
    __shared__ __align__(16) float low[WARPS * ROWS][LOW];
    const int t = threadIdx.x, lane = t % 32, warp = t / 32, tiles = a.E / CHANNELS;
    const int first_e = blockIdx.x % tiles * CHANNELS, e = first_e + lane;
    const i64 first = (i64)(blockIdx.x / tiles) * (WARPS * ROWS);
    for (int i = t; i < CHANNELS * RANK / 8; i += THREADS)
        copy_async(&weights[i / (RANK / 8)][i % (RANK / 8) * 8], static_cast<const X*>(a.dt_weight) + (i64)first_e * RANK + i * 8, true);
    commit();
    Raw<H, V> states[ROWS][N / V];
    H* state = static_cast<H*>(a.state) + ((first + warp * ROWS) * a.E + e) * N;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < N / V; i++) states[r][i] = load<V>(state + r * a.E * N + i * V, first + warp * ROWS + r < a.B);
    const float bias = number(static_cast<const B_T*>(a.dt_bias)[e]), skip = number(static_cast<const D_T*>(a.D)[e]);
#pragma unroll
    for (int i = t; i < CHANNELS * N; i += THREADS)
        rates[i / N][i % N] = -LOG2E * ex2(LOG2E * number(static_cast<const A_T*>(a.A_log)[(i64)first_e * N + i]));
    wait_for_before();
    let_follow();

    float4 parts[EACH][PARTS];  // all on their way before the first is added
#pragma unroll
    for (int n = 0; n < EACH; n++) {
        const int i = t + n * THREADS, row = i / (LOW / 4);
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            if (i < ALL && first + row < a.B)
                parts[n][part] = reinterpret_cast<const float4*>(a.low)[((first + row) * PARTS + part) * (LOW / 4) + i % (LOW / 4)];
    }
    float x[ROWS], z[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const i64 b = first + warp * ROWS + r;
        x[r] = b < a.B ? number(static_cast<const X*>(a.x)[b * a.x_b + e]) : 0;
        z[r] = b < a.B ? number(static_cast<const X*>(a.z)[b * a.z_b + e]) : 0;
    }
#pragma unroll
    for (int n = 0; n < EACH; n++) {
        const int i = t + n * THREADS;
        float4 sum = make_float4(0, 0, 0, 0);
        if (i < ALL && first + i / (LOW / 4) < a.B)
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                const float4 v = parts[n][part];
                sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
            }
        if (i < ALL) reinterpret_cast<float4*>(low[0])[i] = sum;
    }
    wait_copies<0>();
    __syncthreads();

#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const i64 b = first + warp * ROWS + r;
        if (b >= a.B) break;
        const float* mine = low[warp * ROWS + r];
        float dt = bias;
#pragma unroll
        for (int k = 0; k < RANK; k += 8) {
            const uint4 w = *reinterpret_cast<const uint4*>(&weights[lane][k]);
            const Raw<X, 8> weight = {{w.x, w.y, w.z, w.w}};
#pragma unroll
            for (int j = 0; j < 8; j++) dt = fmaf(weight[j], mine[k + j], dt);
        }
        dt = softplus(dt);
        const float dtx = dt * x[r];
        float y = skip * x[r];
#pragma unroll
        for (int i = 0; i < N / V; i++) {
            Pack<H, V> kept;
#pragma unroll
            for (int j = 0; j < V; j++) {
                const int n = i * V + j;
                float h = fmaf(ex2(dt * rates[lane][n]), states[r][i][j], dtx * mine[RANK + n]);
                y = fmaf(h, mine[RANK + N + n], y);
                put(kept.v[j], h);
            }
            *reinterpret_cast<uint4*>(state + r * a.E * N + i * V) = *reinterpret_cast<uint4*>(&kept);
        }
        put(static_cast<X*>(a.y)[b * a.E + e], y * silu(z[r]));
    }
}
