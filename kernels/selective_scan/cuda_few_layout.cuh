// What the kernels of the scan over one state share: the layout of threads, and how a tile's parameters come to them.
//
// A block walks BD channels of a route tile by tile. A thread takes V neighbouring channels over a run of R positions
// in scan order; LANES threads make a row of BD channels, so a warp holds 32 / LANES runs, a tile RUNS of them. Over a
// run the recurrence is h <- keep h + end, with keep the product of the decays: a warp walks over the runs of the tile,
// a lane a channel, and leaves what enters each. Macros come from the host: V, R, NW (warps), BLOCKS (of a
// multiprocessor), the element types TX, TDT, TB (of B and C), TZ, ..., and the options.
//
// B batch, L tokens, D channels, K routes, P positions, G groups, S sequences.

#define CHUNK 64                    // positions between two saved states
#define LANES 8                     // threads that share a row
#define BD (LANES * V)              // channels of a block
#define RUNS (NW * (32 / LANES))
#define TILE (RUNS * R)
#define NT (32 * NW)
#define ITEMS (2 * R / LANES)       // values of B or C that a thread stages

// This thread's place: what the block walks, and the thread's channels and run.
struct Place {
    i64 s, k, g, b, begin;        // sequence, route, group, row of tokens, first slot
    int block, d0, dend;          // channels [d0, d0 + BD) of the group that ends at dend
    int first, end;               // places of the table
    int lane, warp, run, col, d;  // d = d0 + col: the first of this thread's channels

    __device__ __forceinline__ Place(const Args& a) {
        i64 id = blockIdx.x;
        block = id % a.blocks; id /= a.blocks;
        g = id % a.G; id /= a.G;
        k = id % a.K; s = id / a.K;
        int width = (int)(a.channels / a.G);
        d0 = (int)g * width + block * BD; dend = ((int)g + 1) * width;
        lane = threadIdx.x & 31; warp = threadIdx.x >> 5; run = threadIdx.x / LANES;
        col = threadIdx.x % LANES * V; d = d0 + col;
#if PACKED
        const int* bounds = reinterpret_cast<const int*>(a.bounds);
        int from = bounds[s], to = bounds[s + 1];
        b = 0; begin = from / CHUNK + s; first = (int)begin * CHUNK;
        end = first + (to - from + CHUNK - 1) / CHUNK * CHUNK;
#else
        b = s; begin = s * a.per_row; first = 0; end = (int)a.per_row * CHUNK;
#endif
    }
    __device__ __forceinline__ bool live() const { return d < dend; }
    __device__ __forceinline__ int tiles() const { return (end - first + TILE - 1) / TILE; }
    // Of the first position of this thread's run.
    __device__ __forceinline__ int place(int tile) const { return first + tile * TILE + run * R; }
    __device__ __forceinline__ i64 slot(int place) const { return begin + (place - first) / CHUNK; }
    // The channel of the block that this lane walks over the runs with; from BD on it has none. The warps take turns.
    __device__ __forceinline__ int walker(int turn) const { return (warp + turn) % NW * 32 + lane; }
    // Whether the group has the channel, and its place in a (S, K, D).
    __device__ __forceinline__ bool own(int c) const { return c < BD && d0 + c < dend; }
    __device__ __forceinline__ i64 state(const Args& a, int c) const { return (s * a.K + k) * a.channels + d0 + c; }
};

// What the channels of the block have to themselves, in shared memory: in registers it would be in the way of values.
struct Channels {
    float A[BD], bias[BD], skip[BD], rate[BD], rest[BD], B[BD], C[BD];
    float state[BD];  // h or g where the walks over runs stand

    // from: the state to start with, or null.
    __device__ __forceinline__ void fill(const Args& a, const Place& p, const void* from) {
        const int c = threadIdx.x;
        if (c >= BD) return;
        const bool live = p.own(c);
        const i64 at = p.k * a.channels + p.d0 + c;
        auto read = [&](const void* t, i64 i) { return t && live ? reinterpret_cast<const float*>(t)[i] : 0.0f; };
        const float A = read(a.A, at);
        this->A[c] = A * UNIT;
        bias[c] = read(a.bias, at) * (BASE2 ? LOG2E : 1.0f);
        skip[c] = read(a.D, at);
        rate[c] = BASE2 ? A : A * LOG2E_HIGH;
        rest[c] = BASE2 ? 0.0f : fmaf(A, LOG2E_HIGH, -rate[c]) + A * LOG2E_LOW;
        if (!(PRECISE || EXACT)) rate[c] += rest[c];
        B[c] = CONST_B ? read(a.B, at) * UNIT : 0.0f;
        C[c] = CONST_C ? read(a.C, at) : 0.0f;
        state[c] = read(from, p.state(a, c));
    }
};

// What the positions of a run do, one number each, as in triton_steps.py: the token, -3 - token where the state
// restarts, -1 for a padding slot, -2 for no step at all. Without a table the token is the place in the scan.
__device__ __forceinline__ void entries(int (&to)[R], const Args& a, const Place& p, int tile) {
    const int place = p.place(tile);
    const bool inside = tile >= 0 && place < p.end;  // of the sequence; so is all of the run, or nothing
#if TABLE
    const int* from = reinterpret_cast<const int*>(a.tokens) + p.b * a.t_b + p.k * a.t_k + place;
#pragma unroll
    for (int i = 0; i < R; i += 4) {
        const Raw<float, 4> raw = load<4>(reinterpret_cast<const float*>(from + i), inside, (unsigned)-2);
#pragma unroll
        for (int j = 0; j < 4; j++) to[i + j] = (int)raw.word[j];
    }
#else
#pragma unroll
    for (int i = 0; i < R; i++) to[i] = inside && place + i < (int)a.L ? place + i : -2;
#endif
}

__device__ __forceinline__ int token_of(int entry) { return RESTARTS && entry <= -3 ? -3 - entry : entry; }

// The row of dt, B and C, which lies beside the token's or at the position itself; negative where they are zero.
__device__ __forceinline__ int row_of(const Args& a, int entry, int place) {
    int token = token_of(entry);
    return AT_TOKEN || token < 0 ? token : (int)a.first + (int)a.sign * place;
}

// Rows of a map by token; without a table by place, so that base and stride hold where the scan starts and which way it
// goes.
template <class E> struct Rows {
    E* base;
    int stride;  // bytes

    __device__ __forceinline__ Rows(void* start, i64 offset, i64 step, const Args& a) {
        base = reinterpret_cast<E*>(start) + offset + (TABLE ? 0 : a.first * step);
        stride = (TABLE ? 1 : (int)a.sign) * (int)step * (int)sizeof(E);
        pin(base);
        pin(stride);
    }
    __device__ __forceinline__ E* operator[](int row) const {
        E* p;
        asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(p) : "r"(row), "r"(stride), "l"(base));
        return p;
    }
};

// B and C of the runs of a warp on their way through shared memory: half of a row's threads bring B, the others C.
struct Staged {
    Raw<TB, 1> raw[ITEMS];

    static __device__ __forceinline__ bool second(const Place& p) { return p.lane & (LANES / 2); }
    static __device__ __forceinline__ Rows<const TB> rows(const Args& a, const Place& p) {
        const i64 B = p.b * a.B_b + p.k * a.B_k + p.g * a.B_g, C = p.b * a.C_b + p.k * a.C_k + p.g * a.C_g;
        return Rows<const TB>(second(p) ? a.C : a.B, second(p) ? C : B, second(p) ? a.C_l : a.B_l, a);
    }
    __device__ __forceinline__ void read(const Rows<const TB>& rows, const Args& a, const Place& p, int tile,
                                         const int (&entry)[R]) {
        const bool varies = second(p) ? !CONST_C : !CONST_B;
#pragma unroll
        for (int m = 0; m < ITEMS; m++) {
            const int i = p.lane % (LANES / 2) * ITEMS + m;
            int mine = entry[0];
#pragma unroll
            for (int j = 1; j < R; j++) mine = i == j ? entry[j] : mine;
            const int row = row_of(a, mine, p.place(tile) + i);
            raw[m] = load<1>(rows[row], varies && row >= 0);
        }
    }
    __device__ __forceinline__ void write(float (&to)[2 * R], const Place& p) const {
        const float unit = second(p) ? 1.0f : UNIT;
#pragma unroll
        for (int m = 0; m < ITEMS; m++) to[p.lane % LANES * ITEMS + m] = raw[m][0] * unit;
    }
};
