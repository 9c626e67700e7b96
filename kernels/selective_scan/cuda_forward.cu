// The selective scan, forward. A block walks its channels over one segment of a sequence, tile by tile: while a tile is
// walked, the next is staged in shared memory as float32 (dt after softplus, dt x, B, C) and the one after is loaded.
// Each thread leaves its share of <C, h> in shared memory; the tile's epilogue adds the shares up, adds D x and gates.
// ENDS: only the state at the segment's end, from zero, and the sum of dt; the scan proper then starts from
// h <- exp(A sum) h + end over the segments before it.

constexpr int GROUP = S <= 4 ? 4 : 2;
struct Values { float2 chan; float B[S], C[S], keep; };  // what a step reads

extern "C" __global__ void __launch_bounds__(NT, BLOCKS) forward(const Args a) {
    extern __shared__ float4 memory[];
    // Two tiles of each: dt and dt x, shares of y, B and C, whether the state is kept.
    float(*s_chan)[T][PADDED(2 * BD)] = reinterpret_cast<float(*)[T][PADDED(2 * BD)]>(memory);
    float(*s_y)[T][PADDED(BD * LN)] = reinterpret_cast<float(*)[T][PADDED(BD * LN)]>(s_chan + 2);
    float(*s_keep)[T] = reinterpret_cast<float(*)[T]>(s_y + 2);
    float(*s_B)[T][NP] = reinterpret_cast<float(*)[T][NP]>(s_keep + 2);
    float(*s_C)[T][NP] = s_B + 2;

    const Place p(a);
    if (ENDS && p.seg == a.segments - 1) return;  // nobody asks what leaves the last
    const int tid = threadIdx.x, d = p.d0 + p.ch;
    __builtin_assume(tid < NT);
    const int row0 = tid / RT, col = tid % RT * V, dc = p.d0 + col;  // what this thread loads of a tile: V channels
    const bool channel = dc < p.dend && col < BD;
    const bool own = p.walks() && d < p.dend;
    const i64 last = p.from(a, p.seg + 1);
    i64 first = p.from(a, p.seg);

    float bias[V], skip[V];
#pragma unroll
    for (int i = 0; i < V; i++) {
        bool live = channel && dc + i < p.dend;
        bias[i] = HAS_BIAS && live ? reinterpret_cast<const float*>(a.bias)[p.k * a.channels + dc + i] : 0.0f;
        skip[i] = HAS_D && live ? reinterpret_cast<const float*>(a.D)[p.k * a.channels + dc + i] : 0.0f;
    }
    const Rates rates(a, p, own);
    float h[S], total = 0.0f;  // total: the sum of dt
    const i64 state = ((p.s * a.K + p.k) * a.channels + d) * a.N;
#pragma unroll
    for (int i = 0; i < S; i++) {
        int n = p.q * S + i;
        h[i] = !ENDS && HAS_INITIAL && own && n < a.N ? reinterpret_cast<const float*>(a.initial)[state + n] : 0.0f;
    }
    for (i64 i = 0; !ENDS && i < p.seg; i++) rates.pass(h, a, p, own, i);

    const Rows<const TX> x(a.x, p.b * a.x_b + p.k * a.x_k + dc, a.x_l, a);
    const Rows<const TDT> dt(a.dt, p.b * a.dt_b + p.k * a.dt_k + dc, a.dt_l, a);
    const Rows<const TZ> z(a.z, p.b * a.z_b + dc, a.z_l, a);
    const Rows<const TB> B_rows(a.B, p.b * a.B_b + p.k * a.B_k + p.g * a.B_g, a.B_l, a);
    const Rows<const TC> C_rows(a.C, p.b * a.C_b + p.k * a.C_k + p.g * a.C_g, a.C_l, a);
    const Rows<TY> y(a.y, (p.b * a.L * a.K + p.k) * a.channels + dc, a.K * a.channels, a);
#if ENDS && SOFTPLUS
    constexpr int ROWS = (CHUNK * RT + NT - 1) / NT;
    float* sums = reinterpret_cast<float*>(memory);
    i64 start = last - reach<false, ROWS>(a, p, dt, bias, rates.slowest, first, last, sums);
    if (start > first) total = __int_as_float(0x7f800000);  // what came before has decayed
    first = start;
    __syncthreads();
#endif
    const int origin = (int)(first - p.base) * CHUNK;
    int tiles = (int)(last - first) * (CHUNK / T);
    if (!PACKED) tiles = max(0, min(tiles, ((int)a.P - origin + T - 1) / T));

    Raw<TX, V> rx[PASS], ex[PASS];
    Raw<TDT, V> rdt[PASS];
    Raw<TZ, V> ez[PASS];
    Raw<TB, VN> rB[BPASS];
    Raw<TC, VN> rC[BPASS];
    // Entries of this thread's rows: of the tile whose epilogue is due, of the one that is walked, of the one whose values
    // are in registers, of the one after it.
    int due[PASS], walked[PASS], loaded[PASS], next[PASS], next_B[BPASS];
    const int chan_slot = slot_of(2 * col), y_slot = slot_of(col * LN);
    const int own_chan = slot_of(2 * p.ch), own_y = slot_of(p.ch * LN + p.q);
    constexpr bool EVEN = T * RT % NT == 0, EVEN_B = T * BT % NT == 0;

    auto locate = [&](int i, int tile) {  // row i of this thread
        int r = row0 + i * (NT / RT);
        next[i] = !TABLE || (EVEN || r < T) && tile < tiles ? entry_of(a, p.b, p.k, origin + tile * T + r) : -2;
    };
    auto load_row = [&](int i, int tile) {  // at the entry that was located, then finds the next tile's
        int token = token_of(next[i]), row = row_of(a, next[i], origin + tile * T + row0 + i * (NT / RT));
        rx[i] = load<V>(x[token], channel && in_map(a, token));
        rdt[i] = load<V>(dt[row], channel && in_map(a, row), !TABLE && SOFTPLUS ? FAR_BELOW<TDT> : 0);
        loaded[i] = next[i];
        locate(i, tile + 1);
    };
    auto locate_B = [&](int tile) {
#pragma unroll
        for (int i = 0; i < BPASS; i++)
            next_B[i] = !TABLE || tile < tiles ? entry_of(a, p.b, p.k, origin + tile * T + (tid + i * NT) / BT % T) : -2;
    };
    auto load_B = [&](int tile) {
#pragma unroll
        for (int i = 0; i < BPASS; i++) {
            int item = tid + i * NT, n = item % BT * VN, row = row_of(a, next_B[i], origin + tile * T + item / BT % T);
            bool live = in_map(a, row) && (WHOLE_N || n < (int)a.N);
            if (!CONST_B && i * NT < T * BT) rB[i] = load<VN>(B_rows[row] + n * (int)a.B_n, live && (EVEN_B || item < T * BT));
            if (!CONST_C && !ENDS && (i + 1) * NT > T * BT)
                rC[i] = load<VN>(C_rows[row] + n * (int)a.C_n, live && (EVEN_B || item / (T * BT) == 1));
        }
        locate_B(tile + 1);
    };
    auto stage_B = [&](int buf) {
#pragma unroll
        for (int i = 0; i < BPASS; i++) {
            int item = tid + i * NT, r = item / BT % T, n = item % BT * VN;
            if (!CONST_B && i * NT < T * BT && (EVEN_B || item < T * BT)) stage_states(&s_B[buf][r][n], rB[i]);
            if (!CONST_C && !ENDS && (i + 1) * NT > T * BT && (EVEN_B || item / (T * BT) == 1))
                stage_states(&s_C[buf][r][n], rC[i]);
        }
    };
    float staged[2 * V];
    Pack<TY, V> out;
    auto stage_value = [&](int i, int v, int buf) {  // channel v of row i
        int r = row0 + i * (NT / RT);
        if (!EVEN && r >= T) return;
        float step = softplus(rdt[i][v] + bias[v]);
        if (TABLE || !SOFTPLUS) step = is_step(a, loaded[i]) ? step : 0.0f;
        staged[2 * v] = step;
        staged[2 * v + 1] = step * rx[i][v];
        if (v < V - 1) return;
        store<2 * V>(&s_chan[buf][r][chan_slot], staged);
        if (TABLE && col == 0) s_keep[buf][r] = loaded[i] <= -3 ? 0.0f : 1.0f;
    };
    auto load_epilogue = [&](int i, int tile) {
        due[i] = token_of(TABLE ? walked[i] : origin + tile * T + row0 + i * (NT / RT));
        bool live = channel && in_map(a, due[i]);
        if (HAS_D) ex[i] = load<V>(x[due[i]], live);
        if (HAS_Z) ez[i] = load<V>(z[due[i]], live);
        walked[i] = loaded[i];
    };
    auto finish_value = [&](int i, int v, int buf) {  // channel v of row i of the tile before
        int r = row0 + i * (NT / RT);
        if (!EVEN && r >= T) return;
        float parts[LN], sum = HAS_D ? skip[v] * ex[i][v] : 0.0f;
        fetch<LN>(parts, &s_y[buf][r][y_slot + slot_of(v * LN)]);
#pragma unroll
        for (int j = 0; j < LN; j++) sum += parts[j];
        if (HAS_Z) {
            float gate = ez[i][v];
            sum *= gate * sigmoid(gate);
        }
        put(out.v[v], sum);
        if (v == V - 1) save(y[due[i]], out, channel && in_map(a, due[i]));
    };

    float B[S], C[S];
#pragma unroll
    for (int i = 0; i < S; i++) {  // constant over time: they stay in registers
        int n = p.q * S + i;
        i64 at = (p.k * a.channels + d) * a.N + n;
        B[i] = CONST_B && own && n < a.N ? reinterpret_cast<const float*>(a.B)[at] : 0.0f;
        C[i] = CONST_C && own && n < a.N ? reinterpret_cast<const float*>(a.C)[at] : 0.0f;
    }

    float* saved = reinterpret_cast<float*>(a.saved) + ((first * a.K + p.k) * a.N + p.q * S) * a.channels + d;
    if (tiles > 0) {
        locate_B(0);
        load_B(0);
        stage_B(0);
        load_B(1);
#pragma unroll
        for (int i = 0; i < PASS; i++) {
            locate(i, 0);
            load_row(i, 0);
            walked[i] = loaded[i];
            due[i] = TABLE ? -2 : (int)a.L;  // there is no tile before
            ex[i] = {}, ez[i] = {};
        }
#pragma unroll
        for (int i = 0; i < PASS; i++) {
#pragma unroll
            for (int v = 0; v < V; v++) stage_value(i, v, 0);
            load_row(i, 1);
        }
        __syncthreads();
    }
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        const int buf = tile & 1;
#pragma unroll
        for (int e = 0; e < PASS * V && !ENDS; e++) finish_value(e / V, e % V, buf ^ 1);
#pragma unroll
        for (int e = 0; e < PASS * V; e++) stage_value(e / V, e % V, buf ^ 1);
        stage_B(buf ^ 1);
#pragma unroll
        for (int i = 0; i < PASS; i++) {
            if (!ENDS) load_epilogue(i, tile);
            load_row(i, tile + 2);
        }
        load_B(tile + 2);
        if (!ENDS && tile % (CHUNK / T) == 0 && own) {
#pragma unroll
            for (int i = 0; i < S; i++)
                if (WHOLE_N || p.q * S + i < (int)a.N) saved[(i64)i * (int)a.channels] = h[i];
            saved += a.K * a.N * a.channels;
        }
        // Steps go in groups: the next group's values are on their way before this one's shares are stored, since the compiler
        // moves no load over a store.
        Values in[2][GROUP];
        auto fetch_group = [&](Values(&to)[GROUP], int t0) {
#pragma unroll
            for (int j = 0; j < GROUP; j++) {
                to[j].chan = *reinterpret_cast<const float2*>(&s_chan[buf][t0 + j][own_chan]);
                if (!CONST_B) fetch<S>(to[j].B, &s_B[buf][t0 + j][p.q * S]);
                if (!CONST_C && !ENDS) fetch<S>(to[j].C, &s_C[buf][t0 + j][p.q * S]);
                to[j].keep = TABLE ? s_keep[buf][t0 + j] : 1.0f;
            }
        };
        if (p.walks()) fetch_group(in[0], 0);
#pragma unroll
        for (int t = 0; t < T; t += GROUP) {
            if (!p.walks()) continue;
            Values(&now)[GROUP] = in[t / GROUP % 2];
            if (t + GROUP < T) fetch_group(in[t / GROUP % 2 ^ 1], t + GROUP);
            float shares[GROUP];
#pragma unroll
            for (int j = 0; j < GROUP; j++) {
                shares[j] = 0.0f;
#pragma unroll
                for (int i = 0; i < S; i++) {
                    float e = decay(now[j].chan.x, rates.rate[i], rates.rest[i]);
                    if (TABLE) e *= now[j].keep;
                    h[i] = fmaf(e, h[i], now[j].chan.y * (CONST_B ? B[i] : now[j].B[i]));
                    shares[j] = fmaf(h[i], CONST_C ? C[i] : now[j].C[i], shares[j]);
                }
                if (ENDS) total = TABLE && now[j].keep == 0.0f ? __int_as_float(0x7f800000) : total + now[j].chan.x;
            }
#pragma unroll
            for (int j = 0; j < GROUP; j++)
                if (!ENDS) s_y[buf][t + j][own_y] = shares[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int e = 0; e < PASS * V; e++)
        if (!ENDS && tiles > 0) finish_value(e / V, e % V, tiles - 1 & 1);
    if (ENDS || p.seg == a.segments - 1) {
        i64 at = ((p.s * a.segments + p.seg) * a.K + p.k) * a.channels + d;
        if (ENDS && own && p.q == 0) reinterpret_cast<float*>(a.sums)[at] = total;
#pragma unroll
        for (int i = 0; i < S; i++) {
            int n = p.q * S + i;
            if (!(own && n < a.N)) continue;
            if (ENDS) reinterpret_cast<float*>(a.ends)[at * a.N + n] = h[i];
            else reinterpret_cast<float*>(a.final)[state + n] = h[i];
        }
    }
}
