// The selective scan over one state, forward: a block walks its channels from the first tile to the last. Of a tile,
// each thread finds what its run does to the state; warps walk over the runs; then each thread goes over its run again
// from the state that enters it, and writes y. The next tile's values are on their way meanwhile.

extern "C" __global__ void __launch_bounds__(NT, BLOCKS) forward(const Args a) {
    __shared__ __align__(16) float s_keep[RUNS][BD], s_state[RUNS][BD], s_BC[RUNS][2 * R];
    __shared__ __align__(16) Channels channels;
    const Place p(a);
    const int tiles = p.tiles(), col = p.col;

    channels.fill(a, p, a.initial);
    __syncthreads();
    const Rows<const TX> x(a.x, p.b * a.x_b + p.k * a.x_k + p.d, a.x_l, a);
    const Rows<const TDT> dt(a.dt, p.b * a.dt_b + p.k * a.dt_k + p.d, a.dt_l, a);
    const Rows<const TZ> z(a.z, p.b * a.z_b + p.d, a.z_l, a);
    const Rows<const TB> BCs = Staged::rows(a, p);
    const Rows<TY> y(a.y, (p.b * a.L * a.K + p.k) * a.channels + p.d, a.K * a.channels, a);

    int entry[R], next[R];
    Raw<TDT, V> vdt[R];
    Raw<TX, V> vx[R], now[R];
    Raw<TZ, V> vz[R];
    Staged staged;
    auto load_tile = [&](int tile) {  // at the entries that were read, then reads those of the next
#pragma unroll
        for (int i = 0; i < R; i++) {
            const int token = token_of(next[i]), row = row_of(a, next[i], p.place(tile) + i);
            vdt[i] = load<V>(dt[row], p.live() && row >= 0, SOFTPLUS && next[i] == -2 ? NO_STEP<TDT> : 0u);
            vx[i] = load<V>(x[token], p.live() && token >= 0);
        }
        staged.read(BCs, a, p, tile, next);
    };

    entries(next, a, p, 0);
    load_tile(0);
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        // 1. What the run does to the state.
#pragma unroll
        for (int i = 0; i < R; i++) entry[i] = next[i], now[i] = vx[i];
        entries(next, a, p, tile + 1);
        __syncwarp();
        staged.write(s_BC[p.run], p);
        __syncwarp();
        float e[R][V], in[R][V], keep[V], end[V], bias[V], rate[V], rest[V], B[V], of_run[R];
        get<V>(bias, &channels.bias[col]);
        get<V>(rate, &channels.rate[col]);
        get<V>(rest, &channels.rest[col]);
        if (CONST_B) get<V>(B, &channels.B[col]);
        else get<R>(of_run, &s_BC[p.run][0]);
#pragma unroll
        for (int v = 0; v < V; v++) keep[v] = 1.0f, end[v] = 0.0f;
#pragma unroll
        for (int i = 0; i < R; i++) {
#pragma unroll
            for (int v = 0; v < V; v++) {
                float step = step_of(vdt[i][v], bias[v]);
                if (!SOFTPLUS && entry[i] == -2) step = 0.0f;
                e[i][v] = decay(step, rate[v], rest[v]);
                if (RESTARTS && entry[i] <= -3) e[i][v] = 0.0f;
                in[i][v] = step * (now[i][v] * (CONST_B ? B[v] : of_run[i]));
                end[v] = fmaf(e[i][v], end[v], in[i][v]);
                keep[v] *= e[i][v];
            }
        }
        set<V>(&s_keep[p.run][col], keep);
        set<V>(&s_state[p.run][col], end);
        load_tile(tile + 1);
#pragma unroll
        for (int i = 0; i < R; i++)
            if (HAS_Z) vz[i] = load<V>(z[token_of(entry[i])], p.live() && token_of(entry[i]) >= 0);
        __syncthreads();
        // 2. What enters each run; the warps take turns.
        const int c = p.walker(tile);
        if (c < BD) {
            float h = channels.state[c];
            const int place = p.first + tile * TILE;
            float* saved = reinterpret_cast<float*>(a.saved) + (p.slot(place) * a.K + p.k) * a.channels + p.d0 + c;
#pragma unroll 8
            for (int run = 0; run < RUNS; run++) {
                if (run * R % CHUNK == 0 && p.own(c) && place + run * R < p.end)
                    saved[(i64)(run * R / CHUNK) * (int)(a.K * a.channels)] = h;
                float state = fmaf(s_keep[run][c], h, s_state[run][c]);
                s_state[run][c] = h;
                h = state;
            }
            channels.state[c] = h;
        }
        __syncthreads();
        // 3. Over the run again.
        float h[V], skip[V], C[V];
        get<V>(h, &s_state[p.run][col]);
        get<V>(skip, &channels.skip[col]);
        if (CONST_C) get<V>(C, &channels.C[col]);
        else get<R>(of_run, &s_BC[p.run][R]);
#pragma unroll
        for (int i = 0; i < R; i++) {
            float out[V];
#pragma unroll
            for (int v = 0; v < V; v++) {
                h[v] = fmaf(e[i][v], h[v], in[i][v]);
                out[v] = fmaf(h[v], CONST_C ? C[v] : of_run[i], HAS_D ? skip[v] * now[i][v] : 0.0f);
                if (HAS_Z) {
                    float gate = vz[i][v];
                    out[v] *= gate * sigmoid(gate);
                }
            }
            const int token = token_of(entry[i]);
            write<V>(y[token], out, p.live() && token >= 0);
        }
    }
    __syncthreads();
    const int c = threadIdx.x;
    if (p.own(c)) reinterpret_cast<float*>(a.final)[p.state(a, c)] = channels.state[c];
}
