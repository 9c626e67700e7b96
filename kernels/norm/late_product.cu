// A product whose outputs are added to the residual stream and normalised: y = n(r (x W^T) + residual), both written.
//
// A cluster has ROWS tiles of 128 rows and all D = COLS * TN outputs. Blocks of a row of the cluster share x, those of a
// column the weight: each fetches a part and sends it to all of them. Of a block's three warp groups one fetches; the
// other two have a tile of 128 by TN each, in turns: one adds, normalises and writes while the other multiplies. A row's
// sum of squares is that of its COLS blocks, which tell each other theirs.
//
// The weight's rows come in another order (q and v of column 16 u + 4 q + 2 v + e changed), so that a thread has four
// neighbouring outputs, a whole 16 bytes of the stream.
//
// From the host: TN, COLS, ROWS, STAGES, STEPS (of 64 inputs), PARTS of the inputs' squares (0: no norm waits), BATCH, PREFETCH.

constexpr int PEERS = COLS + ROWS - 1;           // blocks that send to this one, itself included
constexpr int X_BYTES = 128 * 128, W_BYTES = TN * 128, STAGE = X_BYTES + W_BYTES;
constexpr int GROUPS = TN / 16, D = COLS * TN;
constexpr int SUMS = STAGES * STAGE;             // [turn][group][source][warp][8] float4
constexpr int SUM_BYTES = 2 * 2 * COLS * 4 * 8 * 16;
constexpr int FULL = SUMS + SUM_BYTES, FREE = FULL + 8 * STAGES, TOLD = FREE + 8 * STAGES;  // TOLD [turn][group][warp]

// One thread: all that a block multiplies, and its part of the stream to the L2 cache.
__device__ __forceinline__ void fetch_all(const Args& args, int clusters, int cluster, int tiles, unsigned base) {
    const int rank = block_rank(), col = rank % COLS, part = rank / COLS;
    const u16 of_row = (u16)(((1 << COLS) - 1) << (part * COLS)), of_column = (u16)((ROWS > 1 ? 1 | 1 << COLS : 1) << col);
    int slot = 0;
    unsigned parity = 1;
    for (int tile = cluster; tile < tiles; tile += clusters) {
        const int row = (tile * ROWS + part) * 128;
#pragma unroll 1
        for (int k = 0; k < STEPS; ++k) {
            const unsigned full = base + FULL + 8 * slot, to = base + slot * STAGE;
            wait(base + FREE + 8 * slot, parity);
            expect(full, STAGE);
            fetch(to + col * (X_BYTES / COLS), args.x_map, k * 64, row + col * (128 / COLS), full, of_row);
            fetch(to + X_BYTES + part * (W_BYTES / ROWS), args.weight_map, k * 64, 0, 0, 0,
                  col * GROUPS + part * (GROUPS / ROWS), full, of_column);
            if (PREFETCH && k < 8)
                asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::
                    "l"(args.stream_map), "r"(col * TN), "r"(row + 16 * k) : "memory");
            if (++slot == STAGES) slot = 0, parity ^= 1;
        }
    }
}

// The four rows of a thread: 64 m + 8 h beyond its first one.
__device__ __forceinline__ int beyond(int i) { return (i >> 1) * 64 + (i & 1) * 8; }

__device__ __forceinline__ void multiply_all(const Args& args, int clusters, int cluster, int tiles, unsigned base, int group) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3, q = lane & 3, g = lane >> 2;
    const int rank = block_rank(), col = rank % COLS, part = rank / COLS;
    const float eps = __int_as_float((int)args.eps), inner_eps = __int_as_float((int)args.inner_eps);
    const float share = __int_as_float((int)args.share);
    unsigned peer = 0;  // whom this lane tells that a slot is free
    if (lane < PEERS) {
        const int other = lane < COLS ? part * COLS + lane : ((part + 1 + lane - COLS) % ROWS) * COLS + col;
        peer = in_block(base + FREE, other);
    }
    float acc[2][TN / 2];
    for (int turn = group, at = group * STEPS; cluster + turn * clusters < tiles; turn += 2, at += 2 * STEPS) {
        const long long row = (long long)((cluster + turn * clusters) * ROWS + part) * 128 + warp * 16 + g;
        float scale[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float sum = 0;
            const long long r = min(row + beyond(i), args.M - 1);
#pragma unroll
            for (int p = q; p < PARTS; p += 4) sum += ((const float*)args.squares)[r * PARTS + p];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            scale[i] = PARTS > 0 ? rsqrtf(sum * share + inner_eps) : 1.0f;
        }
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

        const int c = col * TN + 4 * q;
        float sums[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const long long r = row + beyond(i);
            const bool live = r < args.M;
            const float4* from = (const float4*)((const float*)args.residual + (live ? r : 0) * D + c);
            float4* to = (float4*)((float*)args.total + r * D + c);
            float sum = 0;
#pragma unroll
            for (int first = 0; first < GROUPS; first += BATCH) {
                float4 given[BATCH];
#pragma unroll
                for (int b = 0; b < BATCH; ++b) given[b] = first + b < GROUPS ? from[4 * (first + b)] : float4();
#pragma unroll
                for (int b = 0; b < BATCH; ++b) {
                    if (first + b >= GROUPS) continue;
                    float* a = &acc[i >> 1][8 * (first + b) + 2 * (i & 1)];
                    float4 v = given[b];
                    v.x = a[0] = fmaf(a[0], scale[i], v.x);
                    v.y = a[1] = fmaf(a[1], scale[i], v.y);
                    v.z = a[4] = fmaf(a[4], scale[i], v.z);
                    v.w = a[5] = fmaf(a[5], scale[i], v.w);
                    sum = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, sum))));
                    if (live) to[4 * (first + b)] = v;
                }
            }
            sum += __shfl_xor_sync(~0u, sum, 1);
            sums[i] = sum + __shfl_xor_sync(~0u, sum, 2);
        }
        const int time = turn >> 1 & 1, told = TOLD + 8 * ((time * 2 + group) * 4 + warp);
        const int place = SUMS + 16 * ((((time * 2 + group) * COLS) * 4 + warp) * 8 + g);  // of source 0
        // A barrier's next sums are those of the turn after the next one: they come when this turn's have been read.
        if (lane == 0) expect(base + told, COLS * 8 * 16);
#pragma unroll
        for (int other = q; other < COLS; other += 4) {
            const unsigned to = in_block(base + place + col * (4 * 8 * 16), part * COLS + other);
            asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::
                "r"(to), "f"(sums[0]), "f"(sums[1]), "f"(sums[2]), "f"(sums[3]), "r"(in_block(base + told, part * COLS + other)) : "memory");
        }
        wait(base + told, turn >> 2 & 1);
        float4 all = {0, 0, 0, 0};
#pragma unroll
        for (int source = 0; source < COLS; ++source) {
            float4 v;
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(base + place + source * (4 * 8 * 16)) : "memory");
            all.x += v.x, all.y += v.y, all.z += v.z, all.w += v.w;
        }
        constexpr float part_of = 1.0f / D;
        const float roots[4] = {rsqrtf(all.x * part_of + eps), rsqrtf(all.y * part_of + eps), rsqrtf(all.z * part_of + eps), rsqrtf(all.w * part_of + eps)};
#pragma unroll
        for (int u = 0; u < GROUPS; ++u) {
            const uint2 two = *(const uint2*)((const u16*)args.norm_weight + c + 16 * u);
            const float w0 = __uint_as_float(two.x << 16), w1 = __uint_as_float(two.x & 0xffff0000u);
            const float w2 = __uint_as_float(two.y << 16), w3 = __uint_as_float(two.y & 0xffff0000u);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* a = &acc[i >> 1][8 * u + 2 * (i & 1)];
                const float s = roots[i];
                const uint2 both = {packed(a[0] * s * w0, a[1] * s * w1), packed(a[4] * s * w2, a[5] * s * w3)};
                const long long r = row + beyond(i);
                if (r < args.M) *(uint2*)((u16*)args.y + r * D + c + 16 * u) = both;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(COLS* ROWS, 1, 1)
late_product(const __grid_constant__ Args args) {
    const unsigned base = (unsigned)__cvta_generic_to_shared(memory);
    const int group = threadIdx.x >> 7, cluster = blockIdx.x / (COLS * ROWS), clusters = gridDim.x / (COLS * ROWS);
    const int tiles = (int)((args.M + 128 * ROWS - 1) / (128 * ROWS));
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) make_barrier(base + FULL + 8 * s, 1), make_barrier(base + FREE + 8 * s, 4 * PEERS);
        for (int s = 0; s < 16; ++s) make_barrier(base + TOLD + 8 * s, 1);
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
