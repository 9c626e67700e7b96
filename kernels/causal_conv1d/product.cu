// A product C of whose N outputs go through a causal convolution of TAPS taps and silu: y = silu(conv(x W^T) + bias); the others
// go to ``rest``, those in front of the C and then those behind them.
//
// A tile has 128 tokens, of which it is the first TAPS - 1 that only the others see: they belong to the tile before, which
// has worked them out too. Clusters of ROWS by COLS blocks share x and the weight; of a block's three warp groups one
// fetches, the other two have a tile of 128 by TN each, in turns: one convolves and writes while the other multiplies.
//
// A thread has four tokens in a row and eight neighbouring outputs: lines of x and of the weight come in another order.
// Token 32 w + 4 g + 2 m + h of a tile is at place 64 m + 16 w + 8 h + g, column 32 a + 8 q + 2 j + e at 32 a + 8 j + 2 q + e.
//
// From the host: TN, COLS, ROWS, STAGES, STEPS (of 64 inputs).

constexpr int TAPS = 4, FRESH = 128 - (TAPS - 1);  // tokens of a tile that are its own
constexpr int PEERS = COLS + ROWS - 1;             // blocks that send to this one, itself included
constexpr int X_BYTES = 128 * 128, W_BYTES = TN * 128, STAGE = X_BYTES + W_BYTES;
constexpr int GROUPS = TN / 32;
constexpr int EDGES = STAGES * STAGE;  // [group][warp][TAPS - 1][TN]: a warp's last tokens
constexpr int EDGE_BYTES = 2 * 4 * (TAPS - 1) * TN * 4;
constexpr int FULL = EDGES + EDGE_BYTES, FREE = FULL + 8 * STAGES;

struct Tile {
    int row, from, end, column;  // the first token and the ones that are written, the first output
};

// Tiles side by side. The last one may repeat outputs of the one before.
__device__ __forceinline__ int columns_of(const Args& args) { return ((int)args.N + TN * COLS - 1) / (TN * COLS); }

__device__ __forceinline__ Tile tile_of(const Args& args, int tile, int part, int col) {
    const int across = columns_of(args), t = (tile / across) * ROWS + part, own = t * FRESH;
    const int row = max(0, min(own - (TAPS - 1), (int)args.M - 128));
    return {row, own, min(own + FRESH, (int)args.M), min((tile % across * COLS + col) * TN, (int)args.N - TN)};
}

// One thread: all that a block multiplies.
__device__ __forceinline__ void fetch_all(const Args& args, int clusters, int cluster, int tiles, unsigned base) {
    const int rank = block_rank(), col = rank % COLS, part = rank / COLS;
    const u16 of_row = (u16)(((1 << COLS) - 1) << (part * COLS)), of_column = (u16)((ROWS > 1 ? 1 | 1 << COLS : 1) << col);
    int slot = 0;
    unsigned parity = 1;
    for (int tile = cluster; tile < tiles; tile += clusters) {
        const Tile at = tile_of(args, tile, part, col);
#pragma unroll 1
        for (int k = 0; k < STEPS; ++k) {
            const unsigned full = base + FULL + 8 * slot, to = base + slot * STAGE;
            wait(base + FREE + 8 * slot, parity);
            expect(full, STAGE);
            fetch(to + col * (X_BYTES / COLS), args.x_map, k * 64, 0, at.row, 0, col, full, of_row);
            fetch(to + X_BYTES + part * (W_BYTES / ROWS), args.weight_map, k * 64, at.column + part * (TN / ROWS), 0, 0, 0,
                  full, of_column);
            if (++slot == STAGES) slot = 0, parity ^= 1;
        }
    }
}

__device__ __forceinline__ float silu(float v) {
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1 + power));
    return v * inverse;
}

__device__ __forceinline__ float low(unsigned two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float high(unsigned two) { return __uint_as_float(two & 0xffff0000u); }

// A token's eight neighbouring sums.
__device__ __forceinline__ uint4 plain(const float (&acc)[2][TN / 2], int a, int i) {
    const float* v = &acc[i >> 1][16 * a + 2 * (i & 1)];
    return {packed(v[0], v[1]), packed(v[4], v[5]), packed(v[8], v[9]), packed(v[12], v[13])};
}

// Eight outputs of a thread's four tokens. ``start`` is the one of them, or of the two before, that begins a sequence.
template <bool CUT>
__device__ __forceinline__ void convolve(const float (&acc)[2][TN / 2], int a, const float* edge, const u16* weight,
                                         const u16* bias, int start, uint4 (&out)[4]) {
    const int g = (threadIdx.x & 31) >> 2;
    const uint4 eight = *(const uint4*)bias;
    const unsigned biases[4] = {eight.x, eight.y, eight.z, eight.w};
    unsigned found[4][4];
    float last[4];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        const uint2 two = ((const uint2*)weight)[c];
        const float taps[TAPS] = {low(two.x), high(two.x), low(two.y), high(two.y)};
        float v[TAPS - 1 + 4];  // three tokens before, four own ones
#pragma unroll
        for (int i = 0; i < 4; ++i) v[3 + i] = acc[i >> 1][4 * (4 * a + c / 2) + 2 * (i & 1) + (c & 1)];
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            v[i] = __shfl_up_sync(~0u, v[4 + i], 4);
            if (g == 0) v[i] = edge[i * TN + c];
        }
        const float b = c & 1 ? high(biases[c / 2]) : low(biases[c / 2]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float sum = b;
#pragma unroll
            for (int tap = 0; tap < TAPS; ++tap) {
                const int from = i + tap - (TAPS - 1);  // relative to the thread's first token
                sum = fmaf(taps[tap], CUT && from < start && start <= i ? 0.0f : v[3 + from], sum);
            }
            sum = silu(sum);
            if (c & 1) found[i][c / 2] = packed(last[i], sum);
            last[i] = sum;
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = {found[i][0], found[i][1], found[i][2], found[i][3]};
}

__device__ __forceinline__ void multiply_all(const Args& args, int clusters, int cluster, int tiles, unsigned base, int group) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3, q = lane & 3, g = lane >> 2;
    const int rank = block_rank(), col = rank % COLS, part = rank / COLS, L = (int)args.L, C = (int)args.C;
    unsigned peer = 0;  // whom this lane tells that a slot is free
    if (lane < PEERS) {
        const int other = lane < COLS ? part * COLS + lane : ((part + 1 + lane - COLS) % ROWS) * COLS + col;
        peer = in_block(base + FREE, other);
    }
    float acc[2][TN / 2];
    for (int turn = group, at = group * STEPS; cluster + turn * clusters < tiles; turn += 2, at += 2 * STEPS) {
        int slot = at % STAGES, before = 0;
        unsigned parity = at / STAGES & 1;
        if (turn > 0) await_turn(group);
        for (int k = 0; k < STEPS; ++k) {
            wait(base + FULL + 8 * slot, parity);
            const u64 x = described(base + slot * STAGE), w = described(base + slot * STAGE + X_BYTES);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                multiply(acc[0], x + 2 * i, w + 2 * i, k > 0 || i > 0);
                multiply(acc[1], x + 2 * i + (64 * 128 >> 4), w + 2 * i, k > 0 || i > 0);
            }
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (k > 0 && lane < PEERS) arrive(peer + 8 * before);
            before = slot;
            if (++slot == STAGES) slot = 0, parity ^= 1;
        }
        if (cluster + (turn + 1) * clusters < tiles) give_turn(group);
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
        for (int i = 0; i < TN / 2; ++i) asm volatile("" : "+f"(acc[0][i]), "+f"(acc[1][i])::"memory");
        if (lane < PEERS) arrive(peer + 8 * before);

        float* edges = (float*)(memory + EDGES) + group * (4 * 3 * TN);  // read before the turn was given back
        if (g == 7) {
#pragma unroll
            for (int i = 0; i < 3; ++i)
#pragma unroll
                for (int p = 0; p < TN / 8; ++p) {  // pairs of neighbouring columns
                    const float* a = &acc[(i + 1) >> 1][4 * p + 2 * ((i + 1) & 1)];
                    *(float2*)(edges + (warp * 3 + i) * TN + p / 4 * 32 + 8 * q + 2 * (p % 4)) = {a[0], a[1]};
                }
        }
        asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
        const Tile tile = tile_of(args, cluster + turn * clusters, part, col);
        const int row = tile.row + 32 * warp + 4 * g, time = row % L;
        const int start = time <= 2 ? -time : L - time <= 3 ? L - time : -4;
        const bool cut = __any_sync(~0u, start > -4);
        const bool ends = __any_sync(~0u, time + 3 >= L - (TAPS - 1));
#pragma unroll
        for (int a = 0; a < GROUPS; ++a) {
            const int from = tile.column + 32 * a + 8 * q, c = from - (int)args.first;  // of all outputs, of the C ones
            const bool inner = 0 <= c && c < C;
            if (ends && inner) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int t = (row + i) % L - (L - (TAPS - 1));
                    if (t >= 0 && row + i >= tile.from && row + i < tile.end)
                        *(uint4*)((u16*)args.state + ((long long)((row + i) / L) * (TAPS - 1) + t) * C + c) = plain(acc, a, i);
                }
            }
            if (__any_sync(~0u, inner)) {
                const int known = max(0, min(c, C - 8));
                const float* edge = edges + max(warp - 1, 0) * (3 * TN) + 32 * a + 8 * q;
                const u16 *weight = (const u16*)args.conv_weight + known * TAPS, *bias = (const u16*)args.conv_bias + known;
                uint4 out[4];
                if (cut)
                    convolve<true>(acc, a, edge, weight, bias, start, out);
                else
                    convolve<false>(acc, a, edge, weight, bias, start, out);
                u16* to = (u16*)args.y + (long long)row * C + c;
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (inner && row + i >= tile.from && row + i < tile.end) *(uint4*)(to + i * C) = out[i];
            }
            if (!inner) {
                u16* to = (u16*)args.rest + row * args.rest_line + (c < 0 ? from : from - C);
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (row + i >= tile.from && row + i < tile.end) *(uint4*)(to + i * args.rest_line) = plain(acc, a, i);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(COLS* ROWS, 1, 1)
product_conv(const __grid_constant__ Args args) {
    const unsigned base = (unsigned)__cvta_generic_to_shared(memory);
    const int group = threadIdx.x >> 7, cluster = blockIdx.x / (COLS * ROWS), clusters = gridDim.x / (COLS * ROWS);
    const int down = ((int)args.M + FRESH - 1) / FRESH, tiles = (down + ROWS - 1) / ROWS * columns_of(args);
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) make_barrier(base + FULL + 8 * s, 1), make_barrier(base + FREE + 8 * s, 4 * PEERS);
        show_barriers();
    }
    meet();
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 256) fetch_all(args, clusters, cluster, tiles, base);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        multiply_all(args, clusters, cluster, tiles, base, group);
    }
    __syncwarp();
    meet();  // no block leaves while others may send to it
}
