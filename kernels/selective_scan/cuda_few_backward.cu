// The selective scan over one state, backward: a block walks its channels from the last tile to the first. With
//     G_t = dy_t C_t + g_t,  g_{t-1} = a_t G_t,  q_t = g_{t-1} h_{t-1},
//     dB_t = dt_t x_t G_t,  dC_t = dy_t h_t  (both summed over channels),
//     d(dt_t x_t) = B_t G_t,  d(dt_t) = A q_t,  dA = sum dt_t q_t.
// Of a tile, each thread finds what its run does to h and, the other way, to g; warps walk over the runs with h from
// the saved state while others do with g; then each thread goes over its run again, forth with h and back with g.

// v[m] summed over the LANES threads of a row: thread c gets the sums c N / LANES and those after it, first in v.
template <int N> __device__ __forceinline__ void add_up(float (&v)[N], int lane) {
#pragma unroll
    for (int span = LANES / 2, half = N / 2; span; span /= 2, half /= 2) {
        const bool high = lane & span;
#pragma unroll
        for (int j = 0; j < half; j++) {
            const float other = high ? v[j] : v[j + half], mine = high ? v[j + half] : v[j];
            v[j] = mine + __shfl_xor_sync(~0u, other, span);
        }
    }
}

// Adds up the runs' sums by channel and writes them to a (S, K, D).
__device__ __forceinline__ void finish(void* to, const float (&sum)[V], float scale, float (*shared)[BD],
                                       const Args& a, const Place& p) {
    __syncthreads();
    set<V>(&shared[p.run][p.col], sum);
    __syncthreads();
    const int c = threadIdx.x;
    if (!p.own(c)) return;
    float total = 0.0f;
#pragma unroll 8
    for (int run = 0; run < RUNS; run++) total += shared[run][c];
    reinterpret_cast<float*>(to)[p.state(a, c)] = total * scale;
}

extern "C" __global__ void __launch_bounds__(NT, BLOCKS) backward(const Args a) {
    __shared__ __align__(16) float s_keep[RUNS][BD], s_state[RUNS][BD], s_adjoint[RUNS][BD], s_BC[RUNS][2 * R];
    __shared__ __align__(16) Channels channels;
    const Place p(a);
    const int col = p.col;
    float sum_A[V] = {}, sum_B[V] = {}, sum_C[V] = {}, sum_D[V] = {}, sum_bias[V] = {};

    channels.fill(a, p, a.dfinal);
    const Rows<const TX> x(a.x, p.b * a.x_b + p.k * a.x_k + p.d, a.x_l, a);
    const Rows<const TDT> dt(a.dt, p.b * a.dt_b + p.k * a.dt_k + p.d, a.dt_l, a);
    const i64 dy_row = p.b * a.L * a.dy_k + (a.dy_k > 1 ? p.k : 0);
    const Rows<const TDY> dy(a.dy, dy_row * a.channels + p.d, a.dy_k * a.channels, a);
    const Rows<const TZ> z(a.z, p.b * a.z_b + p.d, a.z_l, a);
    const Rows<const TB> BCs = Staged::rows(a, p);
    const i64 out = (p.b * a.L * a.K + p.k) * a.channels + p.d, out_l = a.K * a.channels;
    const Rows<TDX> dx(a.dx, out, out_l, a);
    const Rows<TDT> ddt(a.ddt, out, out_l, a);
    const Rows<TDZ> dz(a.dz, out, out_l, a);

    int entry[R], next[R];
    entries(next, a, p, p.tiles() - 1);
    __syncthreads();
#pragma unroll 1
    for (int tile = p.tiles() - 1; tile >= 0; tile--) {
        const int place = p.place(tile), start = p.first + tile * TILE;
        // 1. What the run does to h and to g.
        float saved = 0.0f;
        const int c = p.walker(tile);
        if (p.own(c))
            saved = reinterpret_cast<const float*>(a.saved)[(p.slot(start) * a.K + p.k) * a.channels + p.d0 + c];
        Raw<TDT, V> vdt[R];
        Raw<TX, V> vx[R];
        Raw<TDY, V> vdy[R];
        Raw<TZ, V> vz[R];
        Staged staged;
#pragma unroll
        for (int i = 0; i < R; i++) {
            entry[i] = next[i];
            const int token = token_of(entry[i]), row = row_of(a, entry[i], place + i);
            vdt[i] = load<V>(dt[row], p.live() && row >= 0, SOFTPLUS && entry[i] == -2 ? NO_STEP<TDT> : 0u);
            vx[i] = load<V>(x[token], p.live() && token >= 0);
            vdy[i] = load<V>(dy[token], p.live() && token >= 0);
            if (HAS_Z) vz[i] = load<V>(z[token], p.live() && token >= 0);
        }
        staged.read(BCs, a, p, tile, entry);
        entries(next, a, p, tile - 1);
        __syncwarp();
        staged.write(s_BC[p.run], p);
        __syncwarp();
        float step[R][V], e[R][V], in[R][V], gated[R][V], keep[V], end[V], adjoint[V];
        float bias[V], rate[V], rest[V], A[V], skip[V], B[V], C[V], Bs[R], Cs[R];
        get<V>(bias, &channels.bias[col]);
        get<V>(rate, &channels.rate[col]);
        get<V>(rest, &channels.rest[col]);
        auto fetch_params = [&]() {
            if (CONST_B) get<V>(B, &channels.B[col]);
            else get<R>(Bs, &s_BC[p.run][0]);
            if (CONST_C) get<V>(C, &channels.C[col]);
            else get<R>(Cs, &s_BC[p.run][R]);
        };
        auto B_at = [&](int i, int v) { return CONST_B ? B[v] : Bs[i]; };
        auto C_at = [&](int i, int v) { return CONST_C ? C[v] : Cs[i]; };
        fetch_params();
        auto dy_at = [&](int i, int v) { return HAS_Z ? gated[i][v] : vdy[i][v]; };  // before the gate
#pragma unroll
        for (int v = 0; v < V; v++) keep[v] = 1.0f, end[v] = 0.0f, adjoint[v] = 0.0f;
#pragma unroll
        for (int i = 0; i < R; i++) {
#pragma unroll
            for (int v = 0; v < V; v++) {
                step[i][v] = step_of(vdt[i][v], bias[v]);
                if (!SOFTPLUS && entry[i] == -2) step[i][v] = 0.0f;
                e[i][v] = decay(step[i][v], rate[v], rest[v]);
                if (RESTARTS && entry[i] <= -3) e[i][v] = 0.0f;
                in[i][v] = step[i][v] * (vx[i][v] * B_at(i, v));
                end[v] = fmaf(e[i][v], end[v], in[i][v]);
                keep[v] *= e[i][v];
                if (HAS_Z) gated[i][v] = vdy[i][v] * vz[i][v] * sigmoid(vz[i][v]);
            }
        }
#pragma unroll
        for (int i = R - 1; i >= 0; i--) {
#pragma unroll
            for (int v = 0; v < V; v++) adjoint[v] = e[i][v] * fmaf(dy_at(i, v), C_at(i, v), adjoint[v]);
        }
        set<V>(&s_keep[p.run][col], keep);
        set<V>(&s_state[p.run][col], end);
        set<V>(&s_adjoint[p.run][col], adjoint);
        __syncthreads();
        // 2. What enters each run, from both sides; the warps take turns.
        if (c < BD) {
#pragma unroll 8
            for (int run = 0; run < RUNS; run++) {
                float state = fmaf(s_keep[run][c], saved, s_state[run][c]);
                s_state[run][c] = saved;
                saved = state;
            }
        }
        const int other = p.walker(tile + NW / 2);
        if (other < BD) {
            float g = channels.state[other];
#pragma unroll 8
            for (int run = RUNS - 1; run >= 0; run--) {
                float state = fmaf(s_keep[run][other], g, s_adjoint[run][other]);
                s_adjoint[run][other] = g;
                g = state;
            }
            channels.state[other] = g;
        }
        __syncthreads();
        // 3. Forth with h, and back with g.
        float h[V], g[V], before[R][V], sums[2 * R];  // the states before the positions; dB and dC of each
        get<V>(h, &s_state[p.run][col]);
        get<V>(g, &s_adjoint[p.run][col]);
        get<V>(skip, &channels.skip[col]);
        get<V>(A, &channels.A[col]);
        fetch_params();
#pragma unroll
        for (int i = 0; i < R; i++) {
            float oz[V];
#pragma unroll
            for (int v = 0; v < V; v++) {
                before[i][v] = h[v];
                h[v] = fmaf(e[i][v], h[v], in[i][v]);
                if (HAS_Z) {
                    float gate = vz[i][v], sig = sigmoid(gate), y = fmaf(C_at(i, v), h[v], skip[v] * vx[i][v]);
                    oz[v] = vdy[i][v] * y * sig * fmaf(gate, 1.0f - sig, 1.0f);
                }
            }
            if (HAS_Z) write<V>(dz[token_of(entry[i])], oz, p.live() && token_of(entry[i]) >= 0);
        }
#pragma unroll
        for (int i = R - 1; i >= 0; i--) {
            float ox[V], odt[V];
            sums[2 * i] = sums[2 * i + 1] = 0.0f;
#pragma unroll
            for (int v = 0; v < V; v++) {
                const float gy = dy_at(i, v), X = vx[i][v], G = fmaf(gy, C_at(i, v), g[v]), GB = G * B_at(i, v);
                g[v] = e[i][v] * G;
                const float q = g[v] * before[i][v];
                float slope = fmaf(A[v], q, X * GB) * slope_of(step[i][v]);
                if (!SOFTPLUS && entry[i] == -2) slope = 0.0f;
                ox[v] = fmaf(step[i][v], GB, HAS_D ? skip[v] * gy : 0.0f);
                odt[v] = slope;
                sum_A[v] = fmaf(step[i][v], q, sum_A[v]);
                if (HAS_D) sum_D[v] = fmaf(gy, X, sum_D[v]);
                if (HAS_BIAS) sum_bias[v] += slope;
                const float after = i + 1 < R ? before[i + 1 < R ? i + 1 : 0][v] : h[v];
                if (CONST_C) sum_C[v] = fmaf(gy, after, sum_C[v]);
                else sums[2 * i + 1] = fmaf(gy, after, sums[2 * i + 1]);
                if (CONST_B) sum_B[v] = fmaf(step[i][v] * X, G, sum_B[v]);
                else sums[2 * i] = fmaf(step[i][v] * X, G, sums[2 * i]);
            }
            const int token = token_of(entry[i]), row = row_of(a, entry[i], place + i);
            write<V>(ddt[row], odt, p.live() && row >= 0);
            write<V>(dx[token], ox, p.live() && token >= 0);
        }
        if (!(CONST_B && CONST_C)) {
            add_up(sums, p.lane);
            float part[2 * R / LANES];
#pragma unroll
            for (int m = 0; m < 2 * R / LANES; m++) part[m] = sums[m];
            float* to = reinterpret_cast<float*>(a.partial)
                + (((p.block * a.slots + p.slot(place)) * a.K + p.k) * a.G + p.g) * (2 * CHUNK)
                + (place - p.first) % CHUNK * 2 + p.lane % LANES * (2 * R / LANES);
            if (place < p.end) set<2 * R / LANES>(to, part);
        }
    }
    finish(a.dA, sum_A, UNIT, s_keep, a, p);
    if (CONST_B) finish(a.dB, sum_B, UNIT, s_keep, a, p);
    if (CONST_C) finish(a.dC, sum_C, 1.0f, s_keep, a, p);
    if (HAS_D) finish(a.dD, sum_D, 1.0f, s_keep, a, p);
    if (HAS_BIAS) finish(a.dbias, sum_bias, 1.0f, s_keep, a, p);
    const int c = threadIdx.x;
    if (p.own(c)) reinterpret_cast<float*>(a.dinitial)[p.state(a, c)] = channels.state[c];
}
