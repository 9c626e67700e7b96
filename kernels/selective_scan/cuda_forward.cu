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
    const int tid = threadIdx.x, d = p.d0 + p.ch;
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

    const TX* x = reinterpret_cast<const TX*>(a.x) + p.b * a.x_b + p.k * a.x_k + dc;
    const TDT* dt = reinterpret_cast<const TDT*>(a.dt) + p.b * a.dt_b + p.k * a.dt_k + dc;
    const TZ* z = reinterpret_cast<const TZ*>(a.z) + p.b * a.z_b + dc;
    const TB* B_rows = reinterpret_cast<const TB*>(a.B) + p.b * a.B_b + p.k * a.B_k + p.g * a.B_g;
    const TC* C_rows = reinterpret_cast<const TC*>(a.C) + p.b * a.C_b + p.k * a.C_k + p.g * a.C_g;
    TY* y = reinterpret_cast<TY*>(a.y) + (p.b * a.L * a.K + p.k) * a.channels + dc;
    const int x_l = (int)a.x_l, dt_l = (int)a.dt_l, z_l = (int)a.z_l, y_l = (int)(a.K * a.channels);
#if ENDS && SOFTPLUS
    i64 start = last - reach<false, (CHUNK * RT + NT - 1) / NT>(a, p, dt, bias, rates.slowest, first, last, reinterpret_cast<float*>(memory));
    if (start > first) total = __int_as_float(0x7f800000);  // what came before has decayed
    first = start;
    __syncthreads();
#endif
    const int origin = (int)(first - p.base) * CHUNK, tiles = (int)(last - first) * (CHUNK / T);

    Raw<TX, V> rx[PASS], ex[PASS];
    Raw<TDT, V> rdt[PASS];
    Raw<TZ, V> ez[PASS];
    Raw<TB, VN> rB[BPASS];
    Raw<TC, VN> rC[BPASS];
    // Entries of this thread's rows: of the tile whose epilogue is due, of the one that is walked, of the one whose values
    // are in registers, of the one after it.
    int due[PASS], walked[PASS], loaded[PASS], next[PASS], next_B[BPASS];

    auto locate = [&](int tile) {
        const int place = origin + tile * T;
#pragma unroll
        for (int i = 0; i < PASS; i++) {
            int r = row0 + i * (NT / RT);
            next[i] = (T * RT % NT == 0 || r < T) && tile < tiles ? entry_of(a, p.b, p.k, place + r) : -2;
        }
#pragma unroll
        for (int i = 0; i < BPASS; i++)
            next_B[i] = tile < tiles ? entry_of(a, p.b, p.k, place + (tid + i * NT) / BT % T) : -2;
    };
    auto load_tile = [&](int tile) {  // at the entries that were located, then finds those of the next
        const int place = origin + tile * T;
#pragma unroll
        for (int i = 0; i < PASS; i++) {
            int token = token_of(next[i]), row = row_of(a, next[i], place + row0 + i * (NT / RT));
            rx[i] = load<V>(at(x, token, x_l), channel && token >= 0);
            rdt[i] = load<V>(at(dt, row, dt_l), channel && row >= 0);
            loaded[i] = next[i];
        }
#pragma unroll
        for (int i = 0; i < BPASS; i++) {
            int item = tid + i * NT, n = item % BT * VN, row = row_of(a, next_B[i], place + item / BT % T);
            bool live = row >= 0 && n < (int)a.N;
            if (!CONST_B) rB[i] = load<VN>(at(B_rows, row, (int)a.B_l) + n * (int)a.B_n, live && item < T * BT);
            if (!CONST_C && !ENDS)
                rC[i] = load<VN>(at(C_rows, row, (int)a.C_l) + n * (int)a.C_n, live && item / (T * BT) == 1);
        }
        locate(tile + 1);
    };
    auto stage_tile = [&](int buf) {
#pragma unroll
        for (int i = 0; i < PASS; i++) {
            int r = row0 + i * (NT / RT);
            if (T * RT % NT && r >= T) break;
#pragma unroll
            for (int v = 0; v < V; v++) {
                float step = softplus(rdt[i][v] + bias[v]);
                step = loaded[i] == -2 ? 0.0f : step;
                *reinterpret_cast<float2*>(&s_chan[buf][r][slot_of(2 * (col + v))]) = make_float2(step, step * rx[i][v]);
            }
            if (TABLE && col == 0) s_keep[buf][r] = loaded[i] <= -3 ? 0.0f : 1.0f;
        }
#pragma unroll
        for (int i = 0; i < BPASS; i++) {
            int item = tid + i * NT, r = item / BT % T, n = item % BT * VN;
            if (!CONST_B && item < T * BT) stage_states(s_B[buf][r], n, rB[i]);
            if (!CONST_C && !ENDS && item / (T * BT) == 1) stage_states(s_C[buf][r], n, rC[i]);
        }
    };
    auto load_epilogue = [&]() {
#pragma unroll
        for (int i = 0; i < PASS; i++) {
            due[i] = channel ? token_of(walked[i]) : -1;
            if (HAS_D) ex[i] = load<V>(at(x, due[i], x_l), due[i] >= 0);
            if (HAS_Z) ez[i] = load<V>(at(z, due[i], z_l), due[i] >= 0);
            walked[i] = loaded[i];
        }
    };
    auto epilogue = [&](int buf) {
#pragma unroll
        for (int i = 0; i < PASS; i++) {
            int r = row0 + i * (NT / RT);
            if (T * RT % NT && r >= T) break;
            Pack<TY, V> out;
#pragma unroll
            for (int v = 0; v < V; v++) {
                float part[LN], sum = HAS_D ? skip[v] * ex[i][v] : 0.0f;
                fetch<LN>(part, &s_y[buf][r][slot_of((col + v) * LN)]);
#pragma unroll
                for (int j = 0; j < LN; j++) sum += part[j];
                if (HAS_Z) {
                    float gate = ez[i][v];
                    sum *= gate * sigmoid(gate);
                }
                put(out.v[v], sum);
            }
            if (due[i] >= 0) *reinterpret_cast<Pack<TY, V>*>(at(y, due[i], y_l)) = out;
        }
    };

    float B[S], C[S];
#pragma unroll
    for (int i = 0; i < S; i++) {  // constant over time: they stay in registers
        int n = p.q * S + i;
        i64 at = (p.k * a.channels + d) * a.N + n;
        B[i] = CONST_B && own && n < a.N ? reinterpret_cast<const float*>(a.B)[at] : 0.0f;
        C[i] = CONST_C && own && n < a.N ? reinterpret_cast<const float*>(a.C)[at] : 0.0f;
    }

    if (tiles > 0) {
        locate(0);
        load_tile(0);
        stage_tile(0);
#pragma unroll
        for (int i = 0; i < PASS; i++) walked[i] = loaded[i];
        load_tile(1);
        __syncthreads();
    }
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        int buf = tile & 1;
        if (!ENDS && tile > 0) epilogue(buf ^ 1);
        if (tile + 1 < tiles) stage_tile(buf ^ 1);
        if (!ENDS) load_epilogue();
        load_tile(tile + 2);
        if (!ENDS && tile % (CHUNK / T) == 0 && own) {
            float* to = reinterpret_cast<float*>(a.saved) + (((first + tile / (CHUNK / T)) * a.K + p.k) * a.N + p.q * S) * a.channels + d;
#pragma unroll
            for (int i = 0; i < S; i++)
                if (p.q * S + i < (int)a.N) to[(i64)i * (int)a.channels] = h[i];
        }
        if (p.walks()) {
            // Steps go in groups: the next group's values are on their way before this one's shares are stored, since the
            // compiler moves no load over a store.
            Values in[2][GROUP];
            auto fetch_group = [&](Values(&to)[GROUP], int t0) {
#pragma unroll
                for (int j = 0; j < GROUP; j++) {
                    to[j].chan = *reinterpret_cast<const float2*>(&s_chan[buf][t0 + j][slot_of(2 * p.ch)]);
                    if (!CONST_B) fetch<S>(to[j].B, &s_B[buf][t0 + j][p.q * S]);
                    if (!CONST_C && !ENDS) fetch<S>(to[j].C, &s_C[buf][t0 + j][p.q * S]);
                    to[j].keep = TABLE ? s_keep[buf][t0 + j] : 1.0f;
                }
            };
            fetch_group(in[0], 0);
#pragma unroll
            for (int t = 0; t < T; t += GROUP) {
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
                    if (!ENDS) s_y[buf][t + j][slot_of(p.ch * LN + p.q)] = shares[j];
            }
        }
        __syncthreads();
    }
    if (!ENDS && tiles > 0) epilogue(tiles - 1 & 1);
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
