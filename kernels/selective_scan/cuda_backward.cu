// The selective scan, backward. A block walks its channels over one segment of a sequence from the last slot to the
// first. Of a slot, everything the steps need comes into shared memory; a first walk from the saved state leaves the
// state before each part of T steps. Then, part by part from the last, the T states are found again, in registers, and
// the walk back goes over them with
//     G_t = dy_t C_t + g_t,  g_{t-1} = a_t G_t,  q_t = a_t h_{t-1} G_t,
//     dB_t = dt_t x_t G_t, dC_t = dy_t h_t (summed over channels), d(dt_t x_t) = <B_t, G_t>, d(dt_t) = <A, q_t>, dA = sum dt_t q_t.
// The sums over channels are matrix products with ones: a lane holds the products of a token and two states, and the
// column of ones says which token's sum they go to. Sums over the warps follow in shared memory.
// LOCAL: a channel's lanes share out the steps of a part and their gradients, so only the sums over warps need other
// warps. These wait for each other late: sums are added up once all have arrived with theirs, and stored once all have
// read those before.
// ENDS: only g at the segment's start, from zero, and the sum of dt.

__device__ __forceinline__ unsigned bits(float v) { return __float_as_uint(v); }

// to += first second, (16, 8) by (8, 8), in tf32: the unit cuts off what floats have more than ten bits.
__device__ __forceinline__ void multiply(float (&to)[4], const unsigned (&first)[4], const unsigned (&second)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(to[0]), "+f"(to[1]), "+f"(to[2]), "+f"(to[3])
        : "r"(first[0]), "r"(first[1]), "r"(first[2]), "r"(first[3]), "r"(second[0]), "r"(second[1]));
}

// Parts of eleven bits that a product is multiplied in: three hold a float32, two what it is in a sum over rounded inputs.
constexpr int PRODUCTS = PRECISE ? 3 : !CONST_B && sizeof(TB) == 4 || !CONST_C && sizeof(TC) == 4 ? 2 : 1;

// Adds dB and dC of two states, summed over lane % 4, to what lane % 4 == token % 4 holds: dB, dB, dC, dC.
__device__ __forceinline__ void add_up(float (&to)[4], const float (&one)[8], int token, const float (&db)[2], const float (&dc)[2]) {
    const float first = one[2 * token % 8], second = one[(2 * token + 1) % 8];
    const unsigned ones[2] = {bits(first), bits(second)};
    if constexpr (PRODUCTS > 1) {
        float rest[4] = {db[0], dc[0], db[1], dc[1]};
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++) {
            unsigned part[4];
#pragma unroll
            for (int m = 0; m < 4; m++) part[m] = bits(rest[m]) & 0xffffe000u, rest[m] -= __uint_as_float(part[m]);
            multiply(to, part, ones);
        }
    } else {
        constexpr unsigned half = CUT ? 0 : 0x1000u;  // rounds
        multiply(to, {bits(db[0]) + half, bits(dc[0]) + half, bits(db[1]) + half, bits(dc[1]) + half}, ones);
    }
}

// A sum over this launch's steps, added to those of the launches before.
__device__ __forceinline__ void leave(const Args& a, void* sums, i64 at, float sum) {
    float* to = reinterpret_cast<float*>(sums) + at;
    *to = a.add ? *to + sum : sum;
}

constexpr bool SUMS = !(CONST_B && CONST_C);
constexpr int HELD = 2;      // steps whose shares wait in registers: no load moves over a store
constexpr int KEPT = T / 2;  // steps whose dt, dt x and B stay in registers between the walks forth and back
constexpr bool LOCAL = EXTRA == 0 && LN == 4 && T == 8;  // a warp's lanes share out the rows of a part among themselves
// Floats of a row of shares, so that lanes that read two rows meet different banks.
constexpr int Y_ROW = PADDED(BD * LN) + 4, UW_ROW = PADDED(2 * BD * LN) + 8;
// Floats of a step's dB and dC, which lie as add_up leaves them, and of a part's, so that lanes that write at once meet
// different banks.
constexpr int EVEN = (S + 1) / 2 * 2, SUMMED = 2 * EVEN * LN, SUM_ROW = SUMMED + 4, SUM_ROWS = T * SUM_ROW + 16;
// RAW: x, dy and z of a slot stay in shared memory, and their gradients take their places.
constexpr bool RAW = LOCAL && sizeof(TX) == 2 && sizeof(TDY) == 2 && sizeof(TDX) == 2 && sizeof(TDDT) == 2 &&
                     (!HAS_Z || sizeof(TZ) == 2 && sizeof(TDZ) == 2);
constexpr int RAW_ROW = BD + 4;                                               // elements
constexpr int GV = RAW ? 1 : V, GT = BD / GV, ROWS_OF = (T * GT + NT - 1) / NT;  // of gradients: channels, threads, rows
constexpr int TO_C = CHUNK * NP + 16;  // floats from B to C, likewise

// W floats of shared memory, read where this stands: else the compiler holds on to what was read before, and to too much.
template <int W> __device__ __forceinline__ void again(float (&to)[W], const float* p) {
    constexpr int once = W % 4 == 0 ? 4 : W % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < W; i += once) {
        const unsigned from = address(p + i);
        if constexpr (once == 4)
            asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                : "=f"(to[i]), "=f"(to[i + 1]), "=f"(to[i + 2]), "=f"(to[i + 3]) : "r"(from));
        else if constexpr (once == 2)
            asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];" : "=f"(to[i]), "=f"(to[i + 1]) : "r"(from));
        else
            asm volatile("ld.volatile.shared.f32 %0, [%1];" : "=f"(to[i]) : "r"(from));
    }
}

// The one of a and b that this lane keeps, its own and lane ^ other's.
__device__ __forceinline__ float halved(float a, float b, bool second, int other) {
    const float kept = second ? b : a, given = second ? a : b;
    return kept + __shfl_xor_sync(0xffffffffu, given, other);
}

// Two-byte elements to shared memory as they are.
template <class E, int W> __device__ __forceinline__ void put_raw(unsigned short* to, const Raw<E, W>& from) {
    const float first = __uint_as_float(from.word[0]), last = __uint_as_float(from.word[from.WORDS - 1]);
    if constexpr (W == 4) *reinterpret_cast<float2*>(to) = make_float2(first, last);
    else if constexpr (W == 2) *reinterpret_cast<unsigned*>(to) = from.word[0];
    else *to = from.word[0];
}

// Sums over a channel's four lanes of what each has for T steps; lane q keeps steps q and q + 4, or with GV = 2 one of the
// two, for its channel and a neighbour's.
__device__ __forceinline__ void share_out(float (&to)[2], const float (&from)[T], int q, int lane) {
    float two[T / 2], one[2];
#pragma unroll
    for (int j = 0; j < T / 2; j++) two[j] = halved(from[j / 2 * 4 + j % 2], from[j / 2 * 4 + j % 2 + 2], q & 2, 16);
#pragma unroll
    for (int j = 0; j < 2; j++) one[j] = halved(two[2 * j], two[2 * j + 1], q & 1, 8);
    if constexpr (GV == 2) {
        const bool odd = lane & 1;
        const float kept = odd ? one[1] : one[0], given = odd ? one[0] : one[1], got = __shfl_xor_sync(0xffffffffu, given, 1);
        to[0] = odd ? got : kept, to[1] = odd ? kept : got;
    } else to[0] = one[0], to[1] = one[1];
}

// One of the block's groups of channels, number round of them; turn counts the parts of all.
__device__ __forceinline__ void walk(const Args& a, const Place& p, int round, int& turn) {
    constexpr int PARTS = CHUNK / T, TURNS = NT > T * GT ? NT / (T * GT) : 1;  // threads take turns at the gradients
    extern __shared__ float4 memory[];
    float(*s_chan)[PADDED(2 * BD)] = reinterpret_cast<float(*)[PADDED(2 * BD)]>(memory);      // dt, dt x
    float(*s_dy)[BD] = reinterpret_cast<float(*)[BD]>(s_chan + CHUNK);                        // before the gate
    float(*s_B)[NP] = reinterpret_cast<float(*)[NP]>(s_dy + CHUNK);
    float(*s_C)[NP] = reinterpret_cast<float(*)[NP]>(&s_B[0][0] + TO_C);  // also the sums of dB and dC, in their places
    float(*s_h)[WALKERS][S] = reinterpret_cast<float(*)[WALKERS][S]>(s_C + CHUNK);                     // states before parts
    float(*s_y)[Y_ROW] = reinterpret_cast<float(*)[Y_ROW]>(s_h + (ENDS ? 0 : PARTS));
    unsigned short(*s_raw)[CHUNK][RAW_ROW] = reinterpret_cast<unsigned short(*)[CHUNK][RAW_ROW]>(s_y);  // x, dy, z
    float(*s_uw)[UW_ROW] = reinterpret_cast<float(*)[UW_ROW]>(s_y + (ENDS || LOCAL ? 0 : T));
    float(*s_sum)[SUM_ROWS] = reinterpret_cast<float(*)[SUM_ROWS]>(  // dB and dC, of four channels each
        RAW && !ENDS ? reinterpret_cast<float*>(s_raw + 3) : &s_uw[ENDS || LOCAL ? 0 : T][0]);
    i64* s_stored = reinterpret_cast<i64*>(s_sum + (ENDS || !SUMS ? 0 : NW * GR));  // all warps' sums of a part are there
    i64* s_read = s_stored + 1;                                                   // and added up
    float* s_keep = reinterpret_cast<float*>(s_read + 1);

    if (ENDS && p.seg == 0) return;  // nobody asks what leaves the first
    const int tid = threadIdx.x, lane = tid & 31, d = p.d0 + p.ch;
    __builtin_assume(tid < NT);
    const int own_chan = slot_of(2 * p.ch), own_y = slot_of(p.ch * LN + p.q), own_uw = slot_of(2 * (p.ch * LN + p.q));
    const int row0 = LOCAL ? p.q + (lane & GV - 1) * 4 : tid / RT, col = LOCAL ? p.ch & -GV : tid % RT * V, dc = p.d0 + col;
    const int row_chan = slot_of(2 * col), row_y = slot_of(col * LN), row_uw = slot_of(2 * col * LN);
    const bool channel = dc < p.dend, own = p.walks() && d < p.dend;
    // What this thread stages of a slot: whole rows of the block, side by side, so that a warp's reads touch few lines.
    constexpr int RS = BD / VS;
    const int stage0 = tid / RS, stage_col = tid % RS * VS;
    const int rows_at = RAW ? p.d0 + stage_col : dc, shift = p.d0 + stage_col - rows_at;  // where the rows below begin
    const bool staged = p.d0 + stage_col < p.dend;
    const int begin = (int)(p.from(a, p.seg) + a.lo), end = (int)p.from(a, p.seg + 1);  // of this launch's slice
    const int first = min(begin, end);
    int last = min(begin + (int)(a.hi - a.lo), end);
    const int shares = PACKED ? 0 : (int)(p.s * a.segments + p.seg) * (int)(a.hi - a.lo) - begin;  // of a slot, in this launch

    float skip[GV], sum_D[GV] = {}, sum_bias[GV] = {};
#pragma unroll
    for (int i = 0; i < GV; i++) skip[i] = HAS_D && channel ? reinterpret_cast<const float*>(a.D)[p.k * a.channels + dc + i] : 0.0f;
    const Rates of_channels[CH] = {Rates(a, p, own)}, &rates = of_channels[0];  // CH is 1 here
    float g[S], B[S], C[S], sum_A[S] = {}, sum_B[S] = {}, sum_C[S] = {};
    Sum total = 0;
    const i64 state = ((p.s * a.K + p.k) * a.channels + d) * a.N;
    const i64 here = ((p.s * a.segments + p.seg) * a.K + p.k) * a.channels + d;  // among what each segment has
    const float* later = a.g_in ? reinterpret_cast<const float*>(a.g_in) + here * a.N : reinterpret_cast<const float*>(a.dfinal) + state;
#pragma unroll
    for (int i = 0; i < S; i++) {
        int n = p.q * S + i;
        bool live = own && n < a.N;
        i64 at = (p.k * a.channels + d) * a.N + n;
        g[i] = !ENDS && live && (a.g_in || a.dfinal) ? later[n] : 0.0f;
        B[i] = CONST_B && live ? reinterpret_cast<const float*>(a.B)[at] : 0.0f;
        C[i] = CONST_C && live ? reinterpret_cast<const float*>(a.C)[at] : 0.0f;
    }
    for (i64 i = a.segments - 1; !ENDS && !a.g_in && i > p.seg; i--) rates.pass<true>(g, a, p, own, i);
    float one[8];
#pragma unroll
    for (int i = 0; i < 8; i++) one[i] = lane >> 2 == i ? 1.0f : 0.0f;

    const Rows<const TX> x(a.x, p.b * a.x_b + p.k * a.x_k + rows_at, a.x_l, a);
    const Rows<const TDT> dt(a.dt, p.b * a.dt_b + p.k * a.dt_k + rows_at, a.dt_l, a);
    const Rows<const TZ> z(a.z, p.b * a.z_b + rows_at, a.z_l, a);
    const Rows<const TB> B_rows(a.B, p.b * a.B_b + p.k * a.B_k + p.g * a.B_g, a.B_l, a);
    const Rows<const TC> C_rows(a.C, p.b * a.C_b + p.k * a.C_k + p.g * a.C_g, a.C_l, a);
    const Rows<const TDY> dy(a.dy, (p.b * a.L * a.dy_k + (a.dy_k > 1 ? p.k : 0)) * a.channels + rows_at, a.dy_k * a.channels, a);
    const i64 out = (p.b * a.L * a.K + p.k) * a.channels + rows_at, out_l = a.K * a.channels;
    const Rows<TDX> dx(a.dx, out, out_l, a);
    const Rows<TDDT> ddt(a.ddt, out, out_l, a);
    const Rows<TDZ> dz(a.dz, out, out_l, a);

    const i64 part_of = (p.d0 - (int)p.g * (int)(a.channels / a.G)) / (BD * ROUNDS);  // each block writes sums of its own
    Part* partial = reinterpret_cast<Part*>(a.partial) + part_of * (a.slots * a.K * a.G * CHUNK * 2 * a.N);

#if ENDS && SOFTPLUS
    int stop = first + reach<true>(a, p, of_channels, first, last, reinterpret_cast<float*>(memory));
    if (stop < last) total = __int_as_float(0x7f800000);  // what came after has decayed
    last = stop;
    __syncthreads();
#endif
    if (LOCAL && SUMS && !ENDS && tid == 0 && turn == 0) set_up(s_stored, NW), set_up(s_read, NW);
    for (int slot = last - 1; slot >= first; slot--) {
        const int place = (slot - (int)p.base) * CHUNK;
        const int parts = PACKED ? PARTS : (min(CHUNK, (int)a.P - place) + T - 1) / T;
        // 1. Everything the slot's steps need: first all loads, then what is made of them.
        float h[S];
#pragma unroll
        for (int i = 0; i < S && !ENDS; i++) {
            bool live = own && (WHOLE_N || p.q * S + i < (int)a.N);
            h[i] = live ? *saved_at(a, p, slot, i) : 0.0f;
        }
        constexpr int ROWS = (CHUNK * RS + NT - 1) / NT, BROWS = (CHUNK * BT + NT - 1) / NT;
        constexpr int ONCE = (PRECISE ? 4 : 8) * 2 / (VS == 4 ? 4 : 2);  // rows
        Raw<TB, VN> vB[BROWS];
        Raw<TC, VN> vC[BROWS];
#pragma unroll
        for (int i = 0; i < BROWS; i++) {
            int item = tid + i * NT, r = item / BT, n = item % BT * VN;
            bool inside = CHUNK * BT % NT == 0 || r < CHUNK;
            int row = inside ? row_of(a, entry_of(a, p.b, p.k, place + r), place + r) : -1;
            bool live = inside && in_map(a, row) && (WHOLE_N || n < (int)a.N);
            if (!CONST_B && !ENDS) vB[i] = load<VN>(B_rows[row] + n * (int)a.B_n, live);
            if (!CONST_C) vC[i] = load<VN>(C_rows[row] + n * (int)a.C_n, live);
        }
        float bias[VS];
#pragma unroll
        for (int i = 0; i < VS; i++)
            bias[i] = HAS_BIAS && staged ? reinterpret_cast<const float*>(a.bias)[p.k * a.channels + p.d0 + stage_col + i] : 0.0f;
#pragma unroll 1  // precise softplus and sigmoid are long: once is enough for the compiler
        for (int half = 0; half < ROWS; half += ONCE) {
            Raw<TX, VS> vx[ONCE];
            Raw<TDT, VS> vdt[ONCE];
            Raw<TDY, VS> vdy[ONCE];
            Raw<TZ, VS> vz[ONCE];
            int entry[ONCE];
#pragma unroll
            for (int i = 0; i < ONCE; i++) {
                int r = stage0 + (half + i) * (NT / RS);
                bool inside = half + i < ROWS && (CHUNK * RS % NT == 0 || r < CHUNK);
                entry[i] = inside ? entry_of(a, p.b, p.k, place + r) : -2;
                int token = token_of(entry[i]), row = row_of(a, entry[i], place + r);
                bool in = inside && staged && in_map(a, token);
                vx[i] = load<VS>(x[token] + shift, in);
                vdt[i] = load<VS>(dt[row] + shift, inside && staged && in_map(a, row), !TABLE && SOFTPLUS ? FAR_BELOW<TDT> : 0);
                vdy[i] = load<VS>(dy[token] + shift, in);
                if (HAS_Z) vz[i] = load<VS>(z[token] + shift, in);
            }
#pragma unroll
            for (int i = 0; i < ONCE; i++) {
                int r = stage0 + (half + i) * (NT / RS);
                if (half + i >= ROWS || CHUNK * RS % NT && r >= CHUNK) continue;
                float steps[2 * VS], gated[VS];
#pragma unroll
                for (int v = 0; v < VS; v++) {
                    float step = softplus(vdt[i][v] + bias[v]);
                    if (TABLE || !SOFTPLUS) step = is_step(a, entry[i]) ? step : 0.0f;
                    steps[2 * v] = step;
                    steps[2 * v + 1] = step * vx[i][v];
                    gated[v] = vdy[i][v];
                    if (HAS_Z) gated[v] *= vz[i][v] * sigmoid(vz[i][v]);
                }
                store<2 * VS>(&s_chan[r][slot_of(2 * stage_col)], steps);
                store<VS>(&s_dy[r][stage_col], gated);
                if constexpr (RAW && !ENDS) {
                    put_raw(&s_raw[0][r][stage_col], vx[i]);
                    put_raw(&s_raw[1][r][stage_col], vdy[i]);
                    if constexpr (HAS_Z) put_raw(&s_raw[2][r][stage_col], vz[i]);
                }
                if (RESTARTS && stage_col == 0) s_keep[r] = entry[i] <= -3 ? 0.0f : 1.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < BROWS; i++) {
            int item = tid + i * NT, r = item / BT, n = item % BT * VN;
            if (CHUNK * BT % NT && r >= CHUNK) continue;
            if (!CONST_B && !ENDS) stage_states(&s_B[r][n], vB[i]);
            if (!CONST_C) stage_states(&s_C[r][n], vC[i]);
        }
        if (slot > first && tid < CHUNK) {  // the next slot's rows on their way to the second-level cache
            int token = token_of(entry_of(a, p.b, p.k, place - CHUNK + tid));
            int from = p.d0 - rows_at;
            if (in_map(a, token)) {
                asm volatile("prefetch.global.L2 [%0];" ::"l"(x[token] + from));
                asm volatile("prefetch.global.L2 [%0];" ::"l"(dy[token] + from));
                if (AT_TOKEN) asm volatile("prefetch.global.L2 [%0];" ::"l"(dt[token] + from));
                if (HAS_Z) asm volatile("prefetch.global.L2 [%0];" ::"l"(z[token] + from));
            }
        }
        __syncthreads();
#if ENDS
#pragma unroll 16
        for (int t = p.walks() ? CHUNK - 1 : -1; t >= 0; t--) {
            float dt = s_chan[t][own_chan], dy = s_dy[t][p.ch], keep = RESTARTS ? s_keep[t] : 1.0f, e[S];
            if (!CONST_C) fetch<S>(C, &s_C[t][p.q * S]);
            rates.decays(e, dt, keep);
#pragma unroll
            for (int i = 0; i < S; i++) g[i] = fmaf(dy, C[i], g[i]);
            back(g, e, g);
            add_step(total, dt, keep);
        }
#else
        // 2. The state before each part of T steps.
        if (p.walks()) {
            store<S>(s_h[0][tid], h);
            auto pass = [&](int part) {
#pragma unroll
                for (int j = 0; j < T; j++) {
                    const int t = part * T + j;
                    float2 c = *reinterpret_cast<const float2*>(&s_chan[t][own_chan]);
                    if (!CONST_B) fetch<S>(B, &s_B[t][p.q * S]);
                    float e[S], u[S];
                    rates.decays(e, c.x, RESTARTS ? s_keep[t] : 1.0f);
#pragma unroll
                    for (int i = 0; i < S; i++) u[i] = c.y * B[i];
                    step(h, e, u);
                }
                store<S>(s_h[part + 1][tid], h);
            };
            if (RAW && parts == PARTS)  // nearly all slots; addresses are constants then
#pragma unroll
                for (int part = 0; part < PARTS - 1; part++) pass(part);
            else
#pragma unroll 1
                for (int part = 0; part < parts - 1; part++) pass(part);
        }
        // 3. Part by part from the last: the states again, and back over them.
#pragma unroll 1
        for (int part = parts - 1; part >= 0; part--) {
            const int t0 = part * T;
            // What the gradients need from memory, ahead of the walks.
            Raw<TX, GV> vx[ROWS_OF];
            Raw<TDY, GV> vdy[ROWS_OF];
            Raw<TZ, GV> vz[ROWS_OF];
            int entry[ROWS_OF];
#pragma unroll
            for (int m = 0; m < ROWS_OF; m++) {
                int r = row0 + m * (NT / GT) - part % TURNS * T;
                bool inside = channel && 0 <= r && r < T;
                entry[m] = !TABLE || inside ? entry_of(a, p.b, p.k, place + t0 + r) : -2;
                if (RAW) continue;
                int token = token_of(entry[m]);
                bool live = inside && in_map(a, token);
                vx[m] = load<GV>(x[token], live);
                vdy[m] = load<GV>(dy[token], live);
                if (HAS_Z) vz[m] = load<GV>(z[token], live);
            }
            float sum_u[2], sum_w[2], sum_y[2];
            if (p.walks()) {
                float hs[T + 1][S], es[T][S];
                fetch<S>(hs[0], s_h[part][tid]);
#pragma unroll
                for (int j = 0; j < T; j++) {
                    float2 c = *reinterpret_cast<const float2*>(&s_chan[t0 + j][own_chan]);
                    if (!CONST_B) fetch<S>(B, &s_B[t0 + j][p.q * S]);
                    float u[S];
                    rates.decays(es[j], c.x, RESTARTS ? s_keep[t0 + j] : 1.0f);
#pragma unroll
                    for (int i = 0; i < S; i++) u[i] = c.y * B[i], hs[j + 1][i] = hs[j][i];
                    step(hs[j + 1], es[j], u);
                }
                float sums[T / 4][(S + 1) / 2][4] = {};
                float us[T], ws[T];
                float shares[T];  // of y
#pragma unroll
                for (int j = T - 1; j >= 0; j--) {
                    float c[2];
                    if (LOCAL && j < T - KEPT) again(c, &s_chan[t0 + j][own_chan]);
                    else fetch<2>(c, &s_chan[t0 + j][own_chan]);
                    float gy = s_dy[t0 + j][p.ch], u = 0.0f, w = 0.0f, share = 0.0f;
                    if (!CONST_B && LOCAL && j < T - KEPT) again(B, &s_B[t0 + j][p.q * S]);
                    else if (!CONST_B) fetch<S>(B, &s_B[t0 + j][p.q * S]);
                    if (!CONST_C) fetch<S>(C, &s_C[t0 + j][p.q * S]);
                    float G[S];
#pragma unroll
                    for (int i = 0; i < S; i++) G[i] = fmaf(gy, C[i], g[i]);
                    back(g, es[j], G);
#pragma unroll
                    for (int i = 0; i < S; i += 2) {
                        float dB[2] = {}, dC[2] = {}, q[2];
#if PAIRS  // g conj(h)
                        q[0] = fmaf(g[i], hs[j][i], g[i + 1] * hs[j][i + 1]);
                        q[1] = fmaf(g[i + 1], hs[j][i], -g[i] * hs[j][i + 1]);
#else
#pragma unroll
                        for (int m = 0; m < 2 && i + m < S; m++) q[m] = g[i + m] * hs[j][i + m];
#endif
#pragma unroll
                        for (int m = 0; m < 2 && i + m < S; m++) {
                            dB[m] = c[1] * G[i + m];
                            dC[m] = gy * hs[j + 1][i + m];
                            u = fmaf(B[i + m], G[i + m], u);
                            w = fmaf(rates.rate[i + m], q[m], w);
                            sum_A[i + m] = fmaf(c[0], q[m], sum_A[i + m]);
                            if (HAS_Z) share = fmaf(hs[j + 1][i + m], C[i + m], share);
                            if (CONST_B) sum_B[i + m] += dB[m], dB[m] = 0.0f;
                            if (CONST_C) sum_C[i + m] += dC[m], dC[m] = 0.0f;
                        }
                        if (SUMS) add_up(sums[j / 4][i / 2], one, j, dB, dC);
                    }
                    us[j] = u, ws[j] = w;
                    shares[j] = share;
                    if (!LOCAL && j % HELD == 0) {
#pragma unroll
                        for (int m = j; m < j + HELD; m++) {
                            *reinterpret_cast<float2*>(&s_uw[m][own_uw]) = make_float2(us[m], ws[m]);
                            if (HAS_Z) s_y[m][own_y] = shares[m];
                        }
                    }
                }
                if constexpr (LOCAL) {
                    share_out(sum_u, us, p.q, lane);
                    share_out(sum_w, ws, p.q, lane);
                    if (HAS_Z) share_out(sum_y, shares, p.q, lane);
                }
                if (SUMS) {
                    if (LOCAL && turn > 0) wait_for(s_read, turn - 1);
#pragma unroll
                    for (int high = 0; high < T / 4; high++) {
                        float* to = &s_sum[p.ch / 4][(4 * high + (lane & 3)) * SUM_ROW + p.q * 2 * EVEN];
#pragma unroll
                        for (int i = 0; i < EVEN / 2; i++) store<4>(to + 4 * i, sums[high][i]);
                    }
                }
            }
            // 4. The gradients of the part.
            if (!LOCAL) __syncthreads();
            else if (SUMS) arrive(s_stored);
            else __syncwarp();
#pragma unroll
            for (int m = 0; m < ROWS_OF; m++) {
                int r = row0 + m * (NT / GT) - part % TURNS * T;
                if (!RAW && !(channel && 0 <= r && r < T)) continue;
                int token = token_of(entry[m]), row = row_of(a, entry[m], place + t0 + r);
                Pack<TDX, GV> ox;
                Pack<TDDT, GV> odt;
                Pack<TDZ, GV> oz;
                float steps[2 * GV];
                fetch<2 * GV>(steps, &s_chan[t0 + r][row_chan]);
                unsigned short* raw = &s_raw[0][t0 + r][p.ch];
                if constexpr (RAW) {
                    vx[m].word[0] = raw[0], vdy[m].word[0] = raw[CHUNK * RAW_ROW];
                    if constexpr (HAS_Z) vz[m].word[0] = raw[2 * CHUNK * RAW_ROW];
                }
#pragma unroll
                for (int v = 0; v < GV; v++) {
                    const float gate = HAS_Z ? vz[m][v] : 0.0f, sig = HAS_Z ? sigmoid(gate) : 0.0f;
                    float step = steps[2 * v], gy = HAS_Z ? vdy[m][v] * (gate * sig) : vdy[m][v], u = 0.0f, w = 0.0f;
                    if constexpr (LOCAL) u = sum_u[GV * m + v], w = sum_w[GV * m + v];
                    else {
                        float part_uw[2 * LN];
                        fetch<2 * LN>(part_uw, &s_uw[r][row_uw + slot_of(2 * v * LN)]);
#pragma unroll
                        for (int i = 0; i < LN; i++) u += part_uw[2 * i], w += part_uw[2 * i + 1];
                    }
                    float slope = fmaf(vx[m][v], u, w * LN2);
                    if (SOFTPLUS) slope *= sigmoid_of_softplus(step);
                    if (TABLE || !SOFTPLUS) slope = is_step(a, entry[m]) ? slope : 0.0f;
                    put(ox.v[v], fmaf(step, u, skip[v] * gy));
                    put(odt.v[v], slope);
                    sum_D[v] = fmaf(gy, vx[m][v], sum_D[v]);
                    sum_bias[v] += slope;
                    if (HAS_Z) {
                        float y = skip[v] * vx[m][v];
                        if constexpr (LOCAL) y += sum_y[GV * m + v];
                        else {
                            float shares[LN];
                            fetch<LN>(shares, &s_y[r][row_y + slot_of(v * LN)]);
#pragma unroll
                            for (int i = 0; i < LN; i++) y += shares[i];
                        }
                        put(oz.v[v], vdy[m][v] * y * sig * fmaf(gate, 1.0f - sig, 1.0f));
                    }
                }
                if constexpr (RAW) {
                    *reinterpret_cast<TDX*>(raw) = ox.v[0];
                    *reinterpret_cast<TDDT*>(raw + CHUNK * RAW_ROW) = odt.v[0];
                    if constexpr (HAS_Z) *reinterpret_cast<TDZ*>(raw + 2 * CHUNK * RAW_ROW) = oz.v[0];
                    continue;
                }
                save(ddt[row], odt, in_map(a, row));
                save(dx[token], ox, in_map(a, token));
                if (HAS_Z) save(dz[token], oz, in_map(a, token));
            }
            if (SUMS) {  // over the warps; into the part's rows of B and C, which nobody needs any more
                if (LOCAL) wait_for(s_stored, turn);
                constexpr int W = 2 - S % 2;
#pragma unroll
                for (int i0 = 0; i0 < T * SUMMED; i0 += NT * W) {
                    // by threads that have no gradients this time, if there are any
                    const int place = TURNS > 1 ? (tid + NT - (part % TURNS + 1) * T * GT) % NT : tid;
                    const int i = i0 + place * W, j = i / SUMMED, at = i % SUMMED, in_lane = at % (2 * EVEN);
                    const int state = in_lane / 4 * 2 + at % 2, which = at / 2 % 2;
                    if (T * SUMMED % (NT * W) && i >= T * SUMMED) break;
                    if (S % 2 && state >= S) continue;
                    float sum[W], one_warp[W];
                    fetch<W>(sum, &s_sum[0][j * SUM_ROW + at]);
#pragma unroll
                    for (int m = 1; m < NW * GR; m++) {
                        fetch<W>(one_warp, &s_sum[m][j * SUM_ROW + at]);
#pragma unroll
                        for (int v = 0; v < W; v++) sum[v] += one_warp[v];
                    }
                    store<W>(&s_B[t0 + j][at / (2 * EVEN) * S + state] + which * TO_C, sum);
                }
                if (LOCAL) arrive(s_read);
            }
            if (!LOCAL) __syncthreads();
            else if (!SUMS) __syncwarp();
            turn++;
        }
        if (LOCAL) __syncthreads();
        if constexpr (RAW) {
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const int r = stage0 + i * (NT / RS);
                if (CHUNK * RS % NT && r >= CHUNK) continue;
                const int entry = entry_of(a, p.b, p.k, place + r), token = token_of(entry), row = row_of(a, entry, place + r);
                auto rows = [&](int i) { return &s_raw[i][r][stage_col]; };
                save(dx[token], *reinterpret_cast<const Pack<TDX, VS>*>(rows(0)), staged && in_map(a, token));
                save(ddt[row], *reinterpret_cast<const Pack<TDDT, VS>*>(rows(1)), staged && in_map(a, row));
                if constexpr (HAS_Z) save(dz[token], *reinterpret_cast<const Pack<TDZ, VS>*>(rows(2)), staged && in_map(a, token));
            }
        }
        // 5. The slot's dB and dC, on top of those of the rounds before: first all loads, for a thread waits once.
        if (SUMS) {
            Part* to = partial + (((slot + shares) * a.K + p.k) * a.G + p.g) * CHUNK * 2 * a.N;
            constexpr int MANY = CHUNK * 2 * NP, EACH = 4;  // numbers, and how many times VN of them a thread takes at once
#pragma unroll 1
            for (int i0 = tid * VN; i0 < MANY; i0 += EACH * NT * VN) {
                Raw<Part, VN> before[EACH];
                auto place_of = [&](int i) { return to + i / NP * (int)a.N + i % NP; };
                auto lives = [&](int i) { return i < MANY && (WHOLE_N || i % NP < (int)a.N); };
#pragma unroll
                for (int m = 0; m < EACH && ROUNDS > 1; m++) {
                    const int i = i0 + m * NT * VN;
                    before[m] = load<VN>(place_of(i), round > 0 && lives(i));
                }
#pragma unroll
                for (int m = 0; m < EACH; m++) {
                    const int i = i0 + m * NT * VN;
                    if (i >= MANY) break;
                    float sum[VN];
                    fetch<VN>(sum, &s_B[i / (2 * NP)][i % NP] + (i / NP & 1) * TO_C);
                    Pack<Part, VN> part;
#pragma unroll
                    for (int v = 0; v < VN; v++) put(part.v[v], ROUNDS > 1 ? sum[v] + before[m][v] : sum[v]);
                    save(place_of(i), part, lives(i));
                }
            }
            __syncthreads();
        }
        if (RAW && !SUMS) __syncthreads();
#endif
        if (ENDS) __syncthreads();
    }
#if ENDS
    leave_segment(a, p, g, total, own);
#else
#pragma unroll
    for (int i = 0; i < S; i++) {
        int n = p.q * S + i;
        if (!(own && n < a.N)) continue;
        leave(a, a.dA, here * a.N + n, sum_A[i]);
        if (CONST_B) leave(a, a.dB, here * a.N + n, sum_B[i]);
        if (CONST_C) leave(a, a.dC, here * a.N + n, sum_C[i]);
        if (a.g_out) reinterpret_cast<float*>(a.g_out)[here * a.N + n] = g[i];
        if (a.dinitial && p.seg == 0) reinterpret_cast<float*>(a.dinitial)[state + n] = g[i];
    }
    // dD and d dt_bias: the rows of threads that hold the same channels, one after another
    float(*s_row)[2][BD] = reinterpret_cast<float(*)[2][BD]>(memory);
#pragma unroll
    for (int v = 0; v < GV; v++) {
        s_row[row0][0][col + v] = sum_D[v];
        s_row[row0][1][col + v] = sum_bias[v];
    }
    __syncthreads();
    for (int i = tid; i < BD; i += NT) {
        if (p.d0 + i >= p.dend) continue;
        float sD = 0.0f, sb = 0.0f;
        for (int r = 0; r < NT / GT; r++) sD += s_row[r][0][i], sb += s_row[r][1][i];
        i64 to = ((p.s * a.segments + p.seg) * a.K + p.k) * a.channels + p.d0 + i;
        if (HAS_D) leave(a, a.dD, to, sD);
        if (HAS_BIAS) leave(a, a.dbias, to, sb);
    }
#endif
}

extern "C" __global__ void __launch_bounds__(NT, BLOCKS) backward(const Args a) {
    follow();
    int turn = 0;
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round++) {
        walk(a, Place(a, (i64)blockIdx.x * ROUNDS + round), round, turn);
        if (ROUNDS > 1) __syncthreads();
    }
}
