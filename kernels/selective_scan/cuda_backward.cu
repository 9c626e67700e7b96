// The selective scan, backward. A block walks its channels over one segment of a sequence from the last slot to the
// first. Of a slot, everything the steps need comes into shared memory; a first walk from the saved state leaves the
// state before each part of T steps. Then, part by part from the last, the T states are found again, in registers, and
// the walk back goes over them with
//     G_t = dy_t C_t + g_t,  g_{t-1} = a_t G_t,  q_t = a_t h_{t-1} G_t,
//     dB_t = dt_t x_t G_t, dC_t = dy_t h_t (summed over channels), d(dt_t x_t) = <B_t, G_t>, d(dt_t) = <A, q_t>, dA = sum dt_t q_t.
// The sums over channels are matrix products with ones: a lane holds the products of a token, and the row of ones says
// which token's sum they go to. ENDS: only g at the segment's start, from zero, and the sum of dt.

__device__ __forceinline__ void add_up(float (&to)[4], const float (&one)[8], int t, float db, float dc) {
    // row 2 t of a product of T = 8 tokens sums db over lane % 4, row 2 t + 1 dc
    float a0 = t < 4 ? one[(2 * t) % 8] : 0.0f, a1 = t < 4 ? 0.0f : one[(2 * t) % 8];
    float a2 = t < 4 ? one[(2 * t + 1) % 8] : 0.0f, a3 = t < 4 ? 0.0f : one[(2 * t + 1) % 8];
    auto product = [&](unsigned x, unsigned y) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(to[0]), "+f"(to[1]), "+f"(to[2]), "+f"(to[3])
            : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)), "r"(x), "r"(y));
    };
#if PRECISE  // three parts of eleven bits hold a float32
    const unsigned mask = 0xffffe000u;
#pragma unroll
    for (int i = 0; i < 3; i++) {
        unsigned x = __float_as_uint(db) & mask, y = __float_as_uint(dc) & mask;
        product(x, y);
        db -= __uint_as_float(x);
        dc -= __uint_as_float(y);
    }
#else
    product(__float_as_uint(db) + 0x1000u, __float_as_uint(dc) + 0x1000u);  // the unit cuts off what is rounded here
#endif
}

extern "C" __global__ void __launch_bounds__(NT, BLOCKS) backward(const Args a) {
    constexpr int PARTS = CHUNK / T, TURNS = NT > T * RT ? NT / (T * RT) : 1;  // threads take turns at the gradients
    extern __shared__ float4 memory[];
    float(*s_chan)[PADDED(2 * BD)] = reinterpret_cast<float(*)[PADDED(2 * BD)]>(memory);      // dt, dt x
    float(*s_dy)[BD] = reinterpret_cast<float(*)[BD]>(s_chan + CHUNK);                        // before the gate
    float(*s_B)[NP] = reinterpret_cast<float(*)[NP]>(s_dy + CHUNK);
    float(*s_C)[NP] = s_B + CHUNK;
    float(*s_h)[WALKERS][S] = reinterpret_cast<float(*)[WALKERS][S]>(s_C + CHUNK);                     // states before parts
    float(*s_y)[PADDED(BD * LN)] = reinterpret_cast<float(*)[PADDED(BD * LN)]>(s_h + (ENDS ? 0 : PARTS));
    float(*s_uw)[PADDED(2 * BD * LN)] = reinterpret_cast<float(*)[PADDED(2 * BD * LN)]>(s_y + (ENDS ? 0 : T));
    float(*s_sum)[NW][T][2][NP] = reinterpret_cast<float(*)[NW][T][2][NP]>(s_uw + (ENDS ? 0 : T));
    float* s_keep = reinterpret_cast<float*>(s_sum + (ENDS || CONST_B && CONST_C ? 0 : 1));
    auto chan = [&](int t, int channel) { return *reinterpret_cast<const float2*>(&s_chan[t][slot_of(2 * channel)]); };

    const Place p(a);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, d = p.d0 + p.ch;
    const int row0 = tid / RT, col = tid % RT * V, dc = p.d0 + col;
    const bool channel = dc < p.dend, own = p.walks() && d < p.dend;
    const i64 first = p.from(a, p.seg);
    i64 last = p.from(a, p.seg + 1);

    float bias[V], skip[V], sum_D[V] = {}, sum_bias[V] = {};
#pragma unroll
    for (int i = 0; i < V; i++) {
        bias[i] = HAS_BIAS && channel ? reinterpret_cast<const float*>(a.bias)[p.k * a.channels + dc + i] : 0.0f;
        skip[i] = HAS_D && channel ? reinterpret_cast<const float*>(a.D)[p.k * a.channels + dc + i] : 0.0f;
    }
    const Rates rates(a, p, own);
    float g[S], B[S], C[S], sum_A[S] = {}, sum_B[S] = {}, sum_C[S] = {}, total = 0.0f;
    const i64 state = ((p.s * a.K + p.k) * a.channels + d) * a.N;
#pragma unroll
    for (int i = 0; i < S; i++) {
        int n = p.q * S + i;
        bool live = own && n < a.N;
        i64 at = (p.k * a.channels + d) * a.N + n;
        g[i] = !ENDS && HAS_FINAL && live ? reinterpret_cast<const float*>(a.dfinal)[state + n] : 0.0f;
        B[i] = CONST_B && live ? reinterpret_cast<const float*>(a.B)[at] : 0.0f;
        C[i] = CONST_C && live ? reinterpret_cast<const float*>(a.C)[at] : 0.0f;
    }
    for (i64 i = a.segments - 1; !ENDS && i > p.seg; i--) rates.pass(g, a, p, own, i);
    float one[8];
#pragma unroll
    for (int i = 0; i < 8; i++) one[i] = lane >> 2 == i ? 1.0f : 0.0f;

    const TX* x = reinterpret_cast<const TX*>(a.x) + p.b * a.x_b + p.k * a.x_k + dc;
    const TDT* dt = reinterpret_cast<const TDT*>(a.dt) + p.b * a.dt_b + p.k * a.dt_k + dc;
    const TDY* dy = reinterpret_cast<const TDY*>(a.dy) + (p.b * a.L * a.dy_k + (a.dy_k > 1 ? p.k : 0)) * a.channels + dc;
    const TZ* z = reinterpret_cast<const TZ*>(a.z) + p.b * a.z_b + dc;
    const TB* B_rows = reinterpret_cast<const TB*>(a.B) + p.b * a.B_b + p.k * a.B_k + p.g * a.B_g;
    const TC* C_rows = reinterpret_cast<const TC*>(a.C) + p.b * a.C_b + p.k * a.C_k + p.g * a.C_g;
    const i64 out = (p.b * a.L * a.K + p.k) * a.channels + dc;
    TDX* dx = reinterpret_cast<TDX*>(a.dx) + out;
    TDT* ddt = reinterpret_cast<TDT*>(a.ddt) + out;
    TDZ* dz = reinterpret_cast<TDZ*>(a.dz) + out;
    const int x_l = (int)a.x_l, dt_l = (int)a.dt_l, z_l = (int)a.z_l, dy_l = (int)(a.dy_k * a.channels), out_l = (int)(a.K * a.channels);

    float* partial = reinterpret_cast<float*>(a.partial) + (p.d0 - (int)p.g * (int)(a.channels / a.G)) / BD * (a.slots * a.K * a.G * CHUNK * 2 * a.N);

#if ENDS && SOFTPLUS
    i64 stop = first + reach<true, (CHUNK * RT + NT - 1) / NT>(a, p, dt, bias, rates.slowest, first, last, reinterpret_cast<float*>(memory));
    if (stop < last) total = __int_as_float(0x7f800000);  // what came after has decayed
    last = stop;
    __syncthreads();
#endif
    for (i64 slot = last - 1; slot >= first; slot--) {
        const int place = (int)(slot - p.base) * CHUNK;
        // 1. Everything the slot's steps need: first all loads, then what is made of them.
        constexpr int ROWS = (CHUNK * RT + NT - 1) / NT, BROWS = (CHUNK * BT + NT - 1) / NT;
#pragma unroll
        for (int half = 0; half < ROWS; half += 4) {
            Raw<TX, V> vx[4];
            Raw<TDT, V> vdt[4];
            Raw<TDY, V> vdy[4];
            Raw<TZ, V> vz[4];
            int entry[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int r = row0 + (half + i) * (NT / RT);
                entry[i] = half + i < ROWS && r < CHUNK ? entry_of(a, p.b, p.k, place + r) : -2;
                int token = token_of(entry[i]), row = row_of(a, entry[i], place + r);
                bool in = channel && token >= 0;
                vx[i] = load<V>(at(x, token, x_l), in);
                vdt[i] = load<V>(at(dt, row, dt_l), channel && row >= 0);
                vdy[i] = load<V>(at(dy, token, dy_l), in);
                if (HAS_Z) vz[i] = load<V>(at(z, token, z_l), in);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int r = row0 + (half + i) * (NT / RT);
                if (half + i >= ROWS || CHUNK * RT % NT && r >= CHUNK) continue;
#pragma unroll
                for (int v = 0; v < V; v++) {
                    float step = softplus(vdt[i][v] + bias[v]), g = vdy[i][v];
                    step = entry[i] == -2 ? 0.0f : step;
                    if (HAS_Z) g *= vz[i][v] * sigmoid(vz[i][v]);
                    *reinterpret_cast<float2*>(&s_chan[r][slot_of(2 * (col + v))]) = make_float2(step, step * vx[i][v]);
                    s_dy[r][col + v] = g;
                }
                if (TABLE && col == 0) s_keep[r] = entry[i] <= -3 ? 0.0f : 1.0f;
            }
        }
        {
            Raw<TB, VN> vB[BROWS];
            Raw<TC, VN> vC[BROWS];
#pragma unroll
            for (int i = 0; i < BROWS; i++) {
                int item = tid + i * NT, r = item / BT, n = item % BT * VN;
                int row = r < CHUNK ? row_of(a, entry_of(a, p.b, p.k, place + r), place + r) : -1;
                bool live = row >= 0 && n < (int)a.N;
                if (!CONST_B && !ENDS) vB[i] = load<VN>(at(B_rows, row, (int)a.B_l) + n * (int)a.B_n, live);
                if (!CONST_C) vC[i] = load<VN>(at(C_rows, row, (int)a.C_l) + n * (int)a.C_n, live);
            }
#pragma unroll
            for (int i = 0; i < BROWS; i++) {
                int item = tid + i * NT, r = item / BT, n = item % BT * VN;
                if (CHUNK * BT % NT && r >= CHUNK) continue;
                if (!CONST_B && !ENDS) stage_states(s_B[r], n, vB[i]);
                if (!CONST_C) stage_states(s_C[r], n, vC[i]);
            }
        }
        if (slot > first && tid < CHUNK) {  // the next slot's rows on their way to the second-level cache
            int token = token_of(entry_of(a, p.b, p.k, place - CHUNK + tid));
            int from = p.d0 - dc;
            if (token >= 0) {
                asm volatile("prefetch.global.L2 [%0];" ::"l"(at(x + from, token, x_l)));
                asm volatile("prefetch.global.L2 [%0];" ::"l"(at(dy + from, token, dy_l)));
                if (AT_TOKEN) asm volatile("prefetch.global.L2 [%0];" ::"l"(at(dt + from, token, dt_l)));
                if (HAS_Z) asm volatile("prefetch.global.L2 [%0];" ::"l"(at(z + from, token, z_l)));
            }
        }
        __syncthreads();
#if ENDS
#pragma unroll 16
        for (int t = p.walks() ? CHUNK - 1 : -1; t >= 0; t--) {
            float dt = chan(t, p.ch).x, dy = s_dy[t][p.ch], keep = TABLE ? s_keep[t] : 1.0f;
            if (!CONST_C) fetch<S>(C, &s_C[t][p.q * S]);
#pragma unroll
            for (int i = 0; i < S; i++) g[i] = decay(dt, rates.rate[i], rates.rest[i]) * keep * fmaf(dy, C[i], g[i]);
            total = TABLE && keep == 0.0f ? __int_as_float(0x7f800000) : total + dt;
        }
#else
        // 2. The state before each part of T steps.
        if (p.walks()) {
            float h[S];
#pragma unroll
            for (int i = 0; i < S; i++) {
                int n = p.q * S + i;
                h[i] = own && n < (int)a.N ? reinterpret_cast<const float*>(a.saved)[((slot * a.K + p.k) * a.N + n) * a.channels + d] : 0.0f;
                s_h[0][tid][i] = h[i];
            }
#pragma unroll 1
            for (int part = 0; part < PARTS - 1; part++) {
#pragma unroll
                for (int j = 0; j < T; j++) {
                    const int t = part * T + j;
                    float2 c = chan(t, p.ch);
                    if (!CONST_B) fetch<S>(B, &s_B[t][p.q * S]);
                    float keep = TABLE ? s_keep[t] : 1.0f;
#pragma unroll
                    for (int i = 0; i < S; i++) {
                        float e = decay(c.x, rates.rate[i], rates.rest[i]);
                        if (TABLE) e *= keep;
                        h[i] = fmaf(e, h[i], c.y * B[i]);
                    }
                }
#pragma unroll
                for (int i = 0; i < S; i++) s_h[part + 1][tid][i] = h[i];
            }
        }
        // 3. Part by part from the last: the states again, and back over them.
#pragma unroll 1
        for (int part = PARTS - 1; part >= 0; part--) {
            const int t0 = part * T;
            // What the gradients need from memory, ahead of the walks.
            Raw<TX, V> vx[PASS];
            Raw<TDY, V> vdy[PASS];
            Raw<TZ, V> vz[PASS];
            int entry[PASS];
#pragma unroll
            for (int m = 0; m < PASS; m++) {
                int r = row0 + m * (NT / RT) - part % TURNS * T;
                entry[m] = channel && 0 <= r && r < T ? entry_of(a, p.b, p.k, place + t0 + r) : -2;
                int token = token_of(entry[m]);
                vx[m] = load<V>(at(x, token, x_l), token >= 0);
                if (HAS_Z) vdy[m] = load<V>(at(dy, token, dy_l), token >= 0);
                if (HAS_Z) vz[m] = load<V>(at(z, token, z_l), token >= 0);
            }
            if (p.walks()) {
                float hs[T + 1][S], es[T][S], shares[T];  // shares are stored after the walk: no load moves over a store
                fetch<S>(hs[0], s_h[part][tid]);
#pragma unroll
                for (int j = 0; j < T; j++) {
                    float2 c = chan(t0 + j, p.ch);
                    if (!CONST_B) fetch<S>(B, &s_B[t0 + j][p.q * S]);
                    if (!CONST_C && HAS_Z) fetch<S>(C, &s_C[t0 + j][p.q * S]);
                    float keep = TABLE ? s_keep[t0 + j] : 1.0f;
                    shares[j] = 0.0f;
#pragma unroll
                    for (int i = 0; i < S; i++) {
                        es[j][i] = decay(c.x, rates.rate[i], rates.rest[i]);
                        if (TABLE) es[j][i] *= keep;
                        hs[j + 1][i] = fmaf(es[j][i], hs[j][i], c.y * B[i]);
                        if (HAS_Z) shares[j] = fmaf(hs[j + 1][i], C[i], shares[j]);
                    }
                }
#pragma unroll
                for (int j = 0; j < T; j++)
                    if (HAS_Z) s_y[j][slot_of(p.ch * LN + p.q)] = shares[j];
                float sums[S][4] = {};
                float2 uw[T];
#pragma unroll
                for (int j = T - 1; j >= 0; j--) {
                    float2 c = chan(t0 + j, p.ch);
                    float gy = s_dy[t0 + j][p.ch], u = 0.0f, w = 0.0f;
                    if (!CONST_B) fetch<S>(B, &s_B[t0 + j][p.q * S]);
                    if (!CONST_C) fetch<S>(C, &s_C[t0 + j][p.q * S]);
#pragma unroll
                    for (int i = 0; i < S; i++) {
                        float G = fmaf(gy, C[i], g[i]), dB = c.y * G, dC = gy * hs[j + 1][i];
                        g[i] = es[j][i] * G;
                        float q = g[i] * hs[j][i];
                        u = fmaf(B[i], G, u);
                        w = fmaf(rates.rate[i], q, w);
                        sum_A[i] = fmaf(c.x, q, sum_A[i]);
                        if (CONST_B) sum_B[i] += dB;
                        if (CONST_C) sum_C[i] += dC;
                        if (!(CONST_B && CONST_C)) add_up(sums[i], one, j, CONST_B ? 0.0f : dB, CONST_C ? 0.0f : dC);
                    }
                    uw[j] = make_float2(u, w);
                    if (j % 4 == 0) {
#pragma unroll
                        for (int m = j; m < j + 4; m++)
                            *reinterpret_cast<float2*>(&s_uw[m][slot_of(2 * (p.ch * LN + p.q))]) = uw[m];
                    }
                }
                if (!(CONST_B && CONST_C)) {  // summed over lane % 4; over the rest of the warp now
                    constexpr int SHARE = GR > 1 ? GR / 2 : 1;  // lanes that hold parts of the same sum
                    const int token = lane >> 3, which = lane >> 2 & 1, place_q = (lane & 3) / SHARE;
#pragma unroll
                    for (int i = 0; i < S; i++) {
#pragma unroll
                        for (int high = 0; high < T / 4; high++) {
                            float first_q = sums[i][2 * high], second_q = sums[i][2 * high + 1];
                            float(&to)[2][NP] = (*s_sum)[warp][4 * high + token];
                            if (GR == 1) {
                                to[which][2 * place_q * S + i] = first_q;
                                to[which][(2 * place_q + 1) * S + i] = second_q;
                            } else {
                                float sum = first_q + second_q;
#pragma unroll
                                for (int m = 1; m < SHARE; m *= 2) sum += __shfl_xor_sync(~0u, sum, m);
                                if ((lane & 3) % SHARE == 0) to[which][place_q * S + i] = sum;
                            }
                        }
                    }
                }
            }
            // 4. The gradients of the part.
            __syncthreads();
#pragma unroll
            for (int m = 0; m < PASS; m++) {
                int r = row0 + m * (NT / RT) - part % TURNS * T;
                if (!(0 <= r && r < T)) continue;
                int token = token_of(entry[m]), row = row_of(a, entry[m], place + t0 + r);
                Pack<TDX, V> ox;
                Pack<TDT, V> odt;
                Pack<TDZ, V> oz;
#pragma unroll
                for (int v = 0; v < V; v++) {
                    float2 c = chan(t0 + r, col + v);
                    float gy = s_dy[t0 + r][col + v], u = 0.0f, w = 0.0f, part_uw[2 * LN];
                    fetch<2 * LN>(part_uw, &s_uw[r][slot_of(2 * (col + v) * LN)]);
#pragma unroll
                    for (int i = 0; i < LN; i++) u += part_uw[2 * i], w += part_uw[2 * i + 1];
                    float slope = fmaf(vx[m][v], u, w * LN2);
                    if (SOFTPLUS) slope *= sigmoid_of_softplus(c.x);
                    if (entry[m] == -2) slope = 0.0f;
                    put(ox.v[v], fmaf(c.x, u, skip[v] * gy));
                    put(odt.v[v], slope);
                    sum_D[v] = fmaf(gy, vx[m][v], sum_D[v]);
                    sum_bias[v] += slope;
                    if (HAS_Z) {
                        float y = skip[v] * vx[m][v], gate = vz[m][v], sig = sigmoid(gate), shares[LN];
                        fetch<LN>(shares, &s_y[r][slot_of((col + v) * LN)]);
#pragma unroll
                        for (int i = 0; i < LN; i++) y += shares[i];
                        put(oz.v[v], vdy[m][v] * y * sig * fmaf(gate, 1.0f - sig, 1.0f));
                    }
                }
                if (row >= 0) *reinterpret_cast<Pack<TDT, V>*>(at(ddt, row, out_l)) = odt;
                if (token >= 0) *reinterpret_cast<Pack<TDX, V>*>(at(dx, token, out_l)) = ox;
                if (HAS_Z && token >= 0) *reinterpret_cast<Pack<TDZ, V>*>(at(dz, token, out_l)) = oz;
            }
            if (!(CONST_B && CONST_C)) {
                float* to = partial + ((slot * a.K + p.k) * a.G + p.g) * CHUNK * 2 * a.N;
#pragma unroll 1
                for (int i = tid * VN; i < T * 2 * NP; i += NT * VN) {
                    int j = i / (2 * NP), which = i / NP & 1, n = i % NP;
                    float sum[VN] = {}, one_warp[VN];
#pragma unroll
                    for (int m = 0; m < NW; m++) {
                        fetch<VN>(one_warp, &(*s_sum)[m][j][which][n]);
#pragma unroll
                        for (int v = 0; v < VN; v++) sum[v] += one_warp[v];
                    }
                    if (n >= (int)a.N) continue;
                    Pack<float, VN> packed;
#pragma unroll
                    for (int v = 0; v < VN; v++) packed.v[v] = sum[v];
                    *reinterpret_cast<Pack<float, VN>*>(to + ((t0 + j) * 2 + which) * (int)a.N + n) = packed;
                }
            }
            __syncthreads();
        }
#endif
        if (ENDS) __syncthreads();
    }
    const i64 at = ((p.s * a.segments + p.seg) * a.K + p.k) * a.channels + d;
#if ENDS
    if (own && p.q == 0) reinterpret_cast<float*>(a.sums)[at] = total;
#pragma unroll
    for (int i = 0; i < S; i++) {
        int n = p.q * S + i;
        if (own && n < a.N) reinterpret_cast<float*>(a.ends)[at * a.N + n] = g[i];
    }
#else
#pragma unroll
    for (int i = 0; i < S; i++) {
        int n = p.q * S + i;
        if (!(own && n < a.N)) continue;
        reinterpret_cast<float*>(a.dA)[at * a.N + n] = sum_A[i];
        if (CONST_B) reinterpret_cast<float*>(a.dB)[at * a.N + n] = sum_B[i];
        if (CONST_C) reinterpret_cast<float*>(a.dC)[at * a.N + n] = sum_C[i];
        if (p.seg == 0) reinterpret_cast<float*>(a.dinitial)[state + n] = g[i];
    }
    // dD and d dt_bias: the rows of threads that hold the same channels, one after another
    float(*s_row)[2][BD] = reinterpret_cast<float(*)[2][BD]>(memory);
#pragma unroll
    for (int v = 0; v < V; v++) {
        s_row[row0][0][col + v] = sum_D[v];
        s_row[row0][1][col + v] = sum_bias[v];
    }
    __syncthreads();
    for (int i = tid; i < BD; i += NT) {
        if (p.d0 + i >= p.dend) continue;
        float sD = 0.0f, sb = 0.0f;
        for (int r = 0; r < NT / RT; r++) sD += s_row[r][0][i], sb += s_row[r][1][i];
        i64 to = ((p.s * a.segments + p.seg) * a.K + p.k) * a.channels + p.d0 + i;
        if (HAS_D) reinterpret_cast<float*>(a.dD)[to] = sD;
        if (HAS_BIAS) reinterpret_cast<float*>(a.dbias)[to] = sb;
    }
#endif
}
