// The selective scan, forward. A block takes its channels over one segment of a sequence, tile by tile. Its first NW warps
// only walk: states in registers, dt, dt x, B and C from shared memory, each thread's share of <C, h> to shared memory. The
// others only load: while a tile is walked, they add up the shares of the one before, add D x, gate and write it, stage
// the next as float32 (dt after softplus), and have the rows of the one after on their way. So the walkers' special
// functions and the loaders' waiting for memory overlap. Each kind waits for the other once a tile, no warp for its own kind.
// ENDS: only the state at the segment's end, from zero, and the sum of dt; the scan proper then starts from
// h <- exp(A sum) h + end over the segments before it. ADD: y goes on top of that of the states before (float32).

constexpr int GROUP = S * CH <= 2 ? 4 : 2;  // steps whose values are read ahead of those that are walked
constexpr int BC = 2 * S;                   // floats of a lane's row of B and C
// Steps that lie side by side in shared memory, so that one instruction reads or writes both. With 33 states and more that
// was slower.
constexpr int TWO = (LN < 8 || T == CHUNK) && T * RT % (2 * LOADERS) == 0 ? 2 : 1;
// With tiles of a whole chunk a scheduler has one warp that walks: its decays are worked out a group ahead.
constexpr int AHEAD = T == CHUNK;

struct Staged {  // two tiles of each
    float (*chan)[T / TWO][PADDED(2 * TWO * BD)];  // dt and dt x
    float (*y)[T / TWO][PADDED(TWO * BD * LN)];    // shares of y
    float (*bc)[T][2 * NP];                        // B and C of each lane
    float (*keep)[T];                              // whether the state is kept
    i64 *staged, *walked;                          // barriers: what a tile's steps need is there; its shares of y are

    __device__ __forceinline__ Staged(float4* memory) {
        chan = reinterpret_cast<float(*)[T / TWO][PADDED(2 * TWO * BD)]>(memory);
        y = reinterpret_cast<float(*)[T / TWO][PADDED(TWO * BD * LN)]>(chan + 2);
        bc = reinterpret_cast<float(*)[T][2 * NP]>(y + 2);
        keep = reinterpret_cast<float(*)[T]>(bc + 2);
        staged = reinterpret_cast<i64*>(keep + 2);
        walked = staged + 2;
    }
};

// Threads that load, stage and write.
__device__ __forceinline__ void attend(const Args& a, const Place& p, const Staged& shared, int origin, int tiles) {
    const int tid = threadIdx.x - WALKERS;
    const int row0 = tid / RT, col = tid % RT * V, dc = p.d0 + col;  // what this thread loads of a tile: V channels
    const bool channel = dc < p.dend;
    float bias[V], skip[V];
#pragma unroll
    for (int i = 0; i < V; i++) {
        bias[i] = HAS_BIAS && channel ? reinterpret_cast<const float*>(a.bias)[p.k * a.channels + dc + i] : 0.0f;
        skip[i] = HAS_D && channel ? reinterpret_cast<const float*>(a.D)[p.k * a.channels + dc + i] : 0.0f;
    }
    const Rows<const TX> x(a.x, p.b * a.x_b + p.k * a.x_k + dc, a.x_l, a);
    const Rows<const TDT> dt(a.dt, p.b * a.dt_b + p.k * a.dt_k + dc, a.dt_l, a);
    const Rows<const TZ> z(a.z, p.b * a.z_b + dc, a.z_l, a);
    const Rows<const TB> B_rows(a.B, p.b * a.B_b + p.k * a.B_k + p.g * a.B_g, a.B_l, a);
    const Rows<const TC> C_rows(a.C, p.b * a.C_b + p.k * a.C_k + p.g * a.C_g, a.C_l, a);
    const Rows<TY> y(a.y, (p.b * a.L * a.K + p.k) * a.channels + dc, a.K * a.channels, a);
    const Rows<const float> before(a.partial, (p.b * a.L * a.K + p.k) * a.channels + dc, a.K * a.channels, a);

    Raw<TX, V> rx[PASS], ex[PASS];
    Raw<TDT, V> rdt[PASS];
    Raw<TZ, V> ez[PASS];
    Raw<float, V> ey[PASS];
    Raw<TB, VN> rB[BPASS];
    Raw<TC, VN> rC[BPASS];
    // Entries of this thread's rows: of the tile whose epilogue is due, of the one that is walked, of the one whose values
    // are in registers, of the one after it.
    int due[PASS], walked[PASS], loaded[PASS], next[PASS], next_B[BPASS];
    const int chan_slot = slot_of(2 * TWO * col), y_slot = slot_of(TWO * col * LN);
    auto row_in_tile = [&](int i) { return TWO * (row0 + i / TWO * (LOADERS / RT)) + i % TWO; };
    constexpr bool EVEN = T * RT % LOADERS == 0, EVEN_B = T * BT % LOADERS == 0;

    auto locate = [&](int i, int tile) {  // row i of this thread
        int r = row_in_tile(i);
        next[i] = !TABLE || (EVEN || r < T) && tile < tiles ? entry_of(a, p.b, p.k, origin + tile * T + r) : -2;
    };
    auto load_row = [&](bool sure, int i, int tile) {  // at the entry that was located, then finds the next tile's
        int token = token_of(next[i]), row = row_of(a, next[i], origin + tile * T + row_in_tile(i));
        rx[i] = load<V>(x[token], sure || channel && in_map(a, token));
        rdt[i] = load<V>(dt[row], sure || channel && in_map(a, row), !TABLE && SOFTPLUS ? FAR_BELOW<TDT> : 0);
        loaded[i] = next[i];
        locate(i, tile + 1);
    };
    auto locate_B = [&](int tile) {
#pragma unroll
        for (int i = 0; i < BPASS; i++)
            next_B[i] = !TABLE || tile < tiles ? entry_of(a, p.b, p.k, origin + tile * T + (tid + i * LOADERS) / BT % T) : -2;
    };
    auto load_B = [&](bool sure, int tile) {
#pragma unroll
        for (int i = 0; i < BPASS; i++) {
            int item = tid + i * LOADERS, n = item % BT * VN, row = row_of(a, next_B[i], origin + tile * T + item / BT % T);
            bool live = (sure || in_map(a, row)) && (WHOLE_N || n < (int)a.N);
            if (!CONST_B && i * LOADERS < T * BT) rB[i] = load<VN>(B_rows[row] + n * (int)a.B_n, live && (EVEN_B || item < T * BT));
            if (!CONST_C && !ENDS && (i + 1) * LOADERS > T * BT)
                rC[i] = load<VN>(C_rows[row] + n * (int)a.C_n, live && (EVEN_B || item / (T * BT) == 1));
        }
        locate_B(tile + 1);
    };
    auto stage_B = [&](int buf) {
#pragma unroll
        for (int i = 0; i < BPASS; i++) {
            int item = tid + i * LOADERS, r = item / BT % T, n = item % BT * VN;
            float* to = &shared.bc[buf][r][n / S * BC + n % S];
            if (!CONST_B && i * LOADERS < T * BT && (EVEN_B || item < T * BT)) stage_states(to, rB[i]);
            if (!CONST_C && !ENDS && (i + 1) * LOADERS > T * BT && (EVEN_B || item / (T * BT) == 1)) stage_states(to + S, rC[i]);
        }
    };
    auto stage_rows = [&](int i0, int buf) {  // TWO of them
        const int r = row_in_tile(i0);
        if (!EVEN && r >= T) return;
        float staged[2 * TWO * V];
#pragma unroll
        for (int i = i0; i < i0 + TWO; i++) {
#pragma unroll
            for (int v = 0; v < V; v++) {
                float step = softplus(rdt[i][v] + bias[v]);
                if (TABLE || !SOFTPLUS) step = is_step(a, loaded[i]) ? step : 0.0f;
                staged[2 * (TWO * v + i - i0)] = step;
                staged[2 * (TWO * v + i - i0) + 1] = step * rx[i][v];
            }
            if (RESTARTS && col == 0) shared.keep[buf][r + i - i0] = loaded[i] <= -3 ? 0.0f : 1.0f;
        }
        store<2 * TWO * V>(&shared.chan[buf][r / TWO][chan_slot], staged);
    };
    auto load_epilogue = [&](bool sure, int i, int tile) {
        due[i] = token_of(TABLE ? walked[i] : origin + tile * T + row_in_tile(i));
        bool live = sure || channel && in_map(a, due[i]);
        if (HAS_D) ex[i] = load<V>(x[due[i]], live);
        if (HAS_Z) ez[i] = load<V>(z[due[i]], live);
        if (ADD) ey[i] = load<V>(before[due[i]], live);
        walked[i] = loaded[i];
    };
    auto finish_rows = [&](bool sure, int i0, int buf) {  // of the tile before
        const int r = row_in_tile(i0);
        if (!EVEN && r >= T) return;
        Pack<TY, V> out[TWO];
#pragma unroll
        for (int v = 0; v < V; v++) {
            float parts[TWO * LN];
            fetch<TWO * LN>(parts, &shared.y[buf][r / TWO][y_slot + slot_of(TWO * v * LN)]);
#pragma unroll
            for (int e = 0; e < TWO; e++) {
                const int i = i0 + e;
                float sum = HAS_D ? skip[v] * ex[i][v] : 0.0f;
#pragma unroll
                for (int j = 0; j < LN; j++) sum += parts[TWO * j + e];
                if (ADD) sum += ey[i][v];
                if (HAS_Z) {
                    float gate = ez[i][v];
                    sum *= gate * sigmoid(gate);
                }
                put(out[e].v[v], sum);
            }
        }
#pragma unroll
        for (int e = 0; e < TWO; e++) save(y[due[i0 + e]], out[e], sure || channel && in_map(a, due[i0 + e]));
    };
    // What there is to do while a tile is walked, once the walk over the one before is done.
    auto attend_tile = [&](bool sure, int tile) {
        const int buf = tile & 1 ^ 1;  // of the tile before, and of the one after
        if (tile > 0) {
            wait_for(shared.walked + buf, tile - 1 >> 1);
#pragma unroll
            for (int i = 0; i < PASS; i += TWO)
                if (!ENDS) finish_rows(sure, i, buf);
        }
#pragma unroll
        for (int i = 0; i < PASS; i += TWO) stage_rows(i, buf);
        stage_B(buf);
        arrive(shared.staged + buf);
#pragma unroll
        for (int i = 0; i < PASS; i++) {
            if (!ENDS) load_epilogue(sure, i, tile);
            load_row(sure, i, tile + 2);
        }
        load_B(sure, tile + 2);
    };

    if (tiles > 0) {
        locate_B(0);
        load_B(false, 0);
#pragma unroll
        for (int i = 0; i < PASS; i++) {
            locate(i, 0);
            load_row(false, i, 0);
        }
        stage_B(0);
        load_B(false, 1);
#pragma unroll
        for (int i = 0; i < PASS; i += TWO) stage_rows(i, 0);
#pragma unroll
        for (int i = 0; i < PASS; i++) {
            walked[i] = loaded[i];
            load_row(false, i, 1);
        }
        arrive(shared.staged);
    }
    int tile = 0;
#if !TABLE
    if (p.d0 + BD <= p.dend) {
        constexpr int READ = PASS * (LOADERS / RT);  // rows that are read of a tile, some of the next one's among them
        const int whole = min(tiles, ((int)a.L - origin - max(0, READ - T)) / T - 2);
#pragma unroll 1
        for (; tile < whole; tile++) attend_tile(true, tile);
    }
#endif
#pragma unroll 1
    for (; tile < tiles; tile++) attend_tile(false, tile);
    if (!ENDS && tiles > 0) {
        const int buf = tiles - 1 & 1;
        wait_for(shared.walked + buf, tiles - 1 >> 1);
#pragma unroll
        for (int i = 0; i < PASS; i += TWO) finish_rows(false, i, buf);
    }
}

struct Values { float2 chan[CH]; float bc[BC], keep; };  // what a step reads
struct Terms { float e[CH][S], u[CH][S]; };            // and what it does to the states: h <- e h + u

// Threads that hold states.
__device__ __forceinline__ void walk(const Args& a, const Place& p, const Rates (&rates)[CH], const Staged& shared, int tiles,
                                     i64 first, Sum start) {
    float h[CH][S], B[CH][S], C[CH][S];
    Sum total[CH];
    int own_chan[CH], own_y[CH];
#pragma unroll
    for (int m = 0; m < CH; m++) {
        const Place own = p.of(m);
        const int d = p.d0 + own.ch;
        own_chan[m] = slot_of(2 * TWO * own.ch), own_y[m] = slot_of(TWO * (own.ch * LN + p.q));
        total[m] = start;
#pragma unroll
        for (int i = 0; i < S; i++) {
            int n = p.q * S + i;
            bool live = own.owns() && n < a.N;
            h[m][i] = !ENDS && HAS_INITIAL && live ? reinterpret_cast<const float*>(a.initial)[((p.s * a.K + p.k) * a.channels + d) * a.N + n] : 0.0f;
            i64 at = (p.k * a.channels + d) * a.N + n;  // constant over time: they stay in registers
            B[m][i] = CONST_B && live ? reinterpret_cast<const float*>(a.B)[at] : 0.0f;
            C[m][i] = CONST_C && live ? reinterpret_cast<const float*>(a.C)[at] : 0.0f;
        }
        for (i64 i = 0; !ENDS && i < p.seg; i++) rates[m].pass<false>(h[m], a, own, own.owns(), i);
    }

    i64 slot = first;
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        const int buf = tile & 1;
        wait_for(shared.staged + buf, tile >> 1);
        if (!ENDS && a.saved && tile % (CHUNK / T) == 0) {
#pragma unroll
            for (int m = 0; m < CH; m++)
#pragma unroll
                for (int i = 0; i < S; i++)
                    if (p.of(m).owns() && (WHOLE_N || p.q * S + i < (int)a.N)) *saved_at(a, p.of(m), slot, i) = h[m][i];
            slot++;
        }
        Values in[4][GROUP];
        Terms terms[2][GROUP];
        auto fetch_group = [&](int t0, int group) {
#pragma unroll
            for (int j = 0; j < GROUP && t0 < T; j++) {
                Values& to = in[group % 4][j];
                const float* bc = &shared.bc[buf][t0 + j][p.q * BC];
                if (!CONST_B && !(CONST_C || ENDS)) fetch<BC>(to.bc, bc);
                else if (!CONST_B) fetch<S>(*reinterpret_cast<float(*)[S]>(to.bc), bc);
                else if (!(CONST_C || ENDS)) fetch<S>(*reinterpret_cast<float(*)[S]>(to.bc + S), bc + S);
                to.keep = RESTARTS ? shared.keep[buf][t0 + j] : 1.0f;
            }
#pragma unroll
            for (int j = 0; j < GROUP && t0 < T; j += TWO)
#pragma unroll
                for (int m = 0; m < CH; m++) {
                    const float* from = &shared.chan[buf][(t0 + j) / TWO][own_chan[m]];
                    Values* to = &in[group % 4][j];
                    if constexpr (TWO == 2) {
                        const float4 both = *reinterpret_cast<const float4*>(from);
                        to[0].chan[m] = make_float2(both.x, both.y);
                        to[1].chan[m] = make_float2(both.z, both.w);
                    } else to[0].chan[m] = *reinterpret_cast<const float2*>(from);
                }
        };
        auto prepare = [&](int t0, int group) {
#pragma unroll
            for (int j = 0; j < GROUP && t0 < T; j++)
#pragma unroll
                for (int m = 0; m < CH; m++) {
                    const Values& now = in[group % 4][j];
                    Terms& to = terms[group % 2][j];
                    rates[m].decays(to.e[m], now.chan[m].x, now.keep);
#pragma unroll
                    for (int i = 0; i < S; i++) to.u[m][i] = now.chan[m].y * (CONST_B ? B[m][i] : now.bc[i]);
                }
        };
        fetch_group(0, 0);
        if (AHEAD) fetch_group(GROUP, 1), prepare(0, 0);
        Span span[CH];
        constexpr int RUN = T / GROUP < 8 ? T / GROUP : 8;  // groups that the compiler is given at once: it refuses too many
#pragma unroll
        for (int t0 = 0; t0 < T; t0 += RUN * GROUP)
#pragma unroll
        for (int group = 0; group < RUN; group++) {
            const int t = t0 + group * GROUP;
            if (MENDED && t % SPAN == 0)
#pragma unroll
                for (int m = 0; m < CH; m++) span[m].begin(h[m]);
            // Later groups' values are on their way before this one's shares are stored: no load moves over a store.
            fetch_group(t + (1 + AHEAD) * GROUP, group + 1 + AHEAD);
            prepare(t + AHEAD * GROUP, group + AHEAD);
            float shares[CH][GROUP];
#pragma unroll
            for (int j = 0; j < GROUP; j++)
#pragma unroll
                for (int m = 0; m < CH; m++) {
                    const Values& now = in[group % 4][j];
                    const Terms& of = terms[group % 2][j];
                    step(h[m], of.e[m], of.u[m]);
                    shares[m][j] = 0.0f;
#pragma unroll
                    for (int i = 0; i < S; i++) shares[m][j] = fmaf(h[m][i], CONST_C ? C[m][i] : now.bc[S + i], shares[m][j]);
                    if (ENDS) add_step(total[m], now.chan[m].x, now.keep);
                    if (MENDED) span[m].add(of.e[m], now.chan[m].x, now.keep);
                }
#pragma unroll
            for (int j = 0; j < GROUP; j += TWO)
#pragma unroll
                for (int m = 0; m < CH; m++)
                    if constexpr (!ENDS) {
                        float* to = &shared.y[buf][(t + j) / TWO][own_y[m]];
                        if constexpr (TWO == 2) *reinterpret_cast<float2*>(to) = make_float2(shares[m][j], shares[m][j + 1]);
                        else *to = shares[m][j];
                    }
            if (MENDED && (t + GROUP) % SPAN == 0)
#pragma unroll
                for (int m = 0; m < CH; m++) span[m].mend(h[m], rates[m]);
        }
        arrive(shared.walked + buf);
    }
#pragma unroll
    for (int m = 0; m < CH; m++) {
        const Place own = p.of(m);
        if (ENDS) leave_segment(a, own, h[m], total[m], own.owns());
        else if (a.final && p.seg == a.segments - 1) {
#pragma unroll
            for (int i = 0; i < S; i++) {
                i64 n = p.q * S + i, at = ((p.s * a.K + p.k) * a.channels + p.d0 + own.ch) * a.N + n;
                if (own.owns() && n < a.N) reinterpret_cast<float*>(a.final)[at] = h[m][i];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(NT, BLOCKS) forward(const Args a) {
    extern __shared__ float4 memory[];
    const Place p(a);
    if (ENDS && p.seg == a.segments - 1) return;  // nobody asks what leaves the last
    __builtin_assume(threadIdx.x < NT);
    const bool walks = p.walks();
    Rates rates[CH];
#pragma unroll
    for (int m = 0; m < CH; m++) rates[m] = Rates(a, p.of(m), p.of(m).owns());
    const i64 last = p.from(a, p.seg + 1);
    i64 first = p.from(a, p.seg);
    Sum total = 0;
#if ENDS && SOFTPLUS
    i64 start = last - reach<false>(a, p, rates, first, last, reinterpret_cast<float*>(memory));
    if (start > first) total = __int_as_float(0x7f800000);  // what came before has decayed
    first = start;
    __syncthreads();
#endif
    const int origin = (int)(first - p.base) * CHUNK;
    int tiles = (int)(last - first) * (CHUNK / T);
    if (!PACKED) tiles = max(0, min(tiles, ((int)a.P - origin + T - 1) / T));
    const Staged shared(memory);
    if (threadIdx.x < 2) set_up(shared.staged + threadIdx.x, EXTRA), set_up(shared.walked + threadIdx.x, NW);
    __syncthreads();
    if (walks) walk(a, p, rates, shared, tiles, first, total);
    else attend(a, p, shared, origin, tiles);
}
