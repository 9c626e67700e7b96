// Sizes, rooms in shared memory, and the stream of weights through a ring there.

typedef unsigned short half_bits;

__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int up_to(int n, int unit) { return (n + unit - 1) / unit * unit; }

constexpr int WORKERS = 32 * WARPS, THREADS = WORKERS + 32, LAST = STAGES - 1;
constexpr int TILE = HALF ? 512 : 1024;  // bytes of 16 columns by 16 rows
constexpr int SLOTS = RING / CHUNK;

__constant__ const int wides[] = WIDES, downs[] = DOWNS, ups[] = UPS, first_down[] = FIRST_DOWN;
__constant__ const int first_up[] = FIRST_UP, skip_at[] = SKIP_AT, waiting_at[] = WAITING_AT, current_at[] = CURRENT_AT;
__constant__ const int shapes[] = SHAPES, state_at[] = STATE_AT;
__constant__ const unsigned segment_at[] = SEGMENT_AT, segment_bytes[] = SEGMENT_BYTES;

// Rooms, after the ring: numbers of 4 bytes.
constexpr int AT_X = 0, AT_NORMED = AT_X + NS * WIDEST, AT_INNER = AT_NORMED + NS * NORMED;
constexpr int AT_GATES = AT_INNER + NS * INNER, AT_LOW = AT_GATES + NS * GATES, AT_PART = AT_LOW + NS * LOWS;
constexpr int AT_SKIPS = AT_PART + NS * PARTS, AT_RESIDENT = AT_SKIPS + NS * SKIPPED;
constexpr int AT_LOGITS = AT_RESIDENT + NS * RESIDENT, AT_CHANCES = AT_LOGITS + NS * LEVELS;
constexpr int ROOM = up_to(AT_CHANCES + NS * LEVELS, 4);

__device__ __forceinline__ float* room(int at) { return (float*)(memory + RING) + at; }

#ifdef PROFILE  // cycles of the first thread up to each mark from the last one: 16 marks for widths of 64, 128, 256
__device__ __forceinline__ long long* profile() { return (long long*)(memory + RING + 4 * ROOM + 512); }

__device__ __forceinline__ void mark(int i) {
    long long* cycles = profile();
    const long long now = clock64();
    if (threadIdx.x == 0) {
        cycles[i] += now - cycles[63];
        cycles[63] = now;
    }
}
#else
__device__ __forceinline__ void mark(int) {}
#endif

// Where the threads are: equal in all of them.
struct Walk {
    unsigned pos;   // bytes of the stream read so far, modulo 2^32
    float* state;   // of the block's first clip
    bool pending;   // whether x lacks the sums in PART
};

struct Supply {
    const char* stream;
    const char* from;
    unsigned left, issued, landed;  // bytes: of the segment, of the stream in the ring, of those there
    long long step, length;
    int depth, index;
    unsigned seen;
    unsigned long long full[SLOTS];
};

__device__ __forceinline__ Supply& supply() { return *(Supply*)(memory + RING + 4 * ROOM); }

__host__ __device__ constexpr int pool_of(int d) {
    const int pools[] = POOLS;
    return pools[d];
}

// How deep the net runs at a sample, and the sample's number within each stage's frame.
__device__ __forceinline__ int depth_at(unsigned frame, int* phase) {
    int depth = 0;
#pragma unroll
    for (int d = 0; d < LAST; d++) {
        phase[d] = frame % pool_of(d);
        if (depth == d && phase[d] == pool_of(d) - 1) depth = d + 1;
        frame /= pool_of(d);
    }
    return depth;
}

// The segments of a sample: the stages inwards, the last of them the centre where all frames are full, then outwards.
__device__ __noinline__ bool next_segment(Supply& s) {
    const int outwards = least(s.depth, LAST - 1);
    if (++s.index == s.depth + 1 + outwards + 1) {
        if (++s.step >= s.length) return false;
        int phase[STAGES];
        s.depth = depth_at(s.seen + (unsigned)s.step, phase);
        s.index = 0;
    }
    const int segment = s.index <= s.depth ? s.index : STAGES + outwards - (s.index - s.depth - 1);
    s.from = s.stream + segment_at[segment];
    s.left = segment_bytes[segment];
    return true;
}

// Fills the ring up to where ``pos`` leaves room.
__device__ __noinline__ void feed(unsigned pos) {
    Supply& s = supply();
    while (s.issued - pos / CHUNK * CHUNK < RING) {
        while (s.left == 0)  // a stage without layers on its way down has an empty segment
            if (s.step >= s.length || !next_segment(s)) return;
        const unsigned bytes = s.left < CHUNK ? s.left : CHUNK, at = s.issued % RING;
        copy_bulk(memory + at, s.from, bytes, s.full + at / CHUNK);
        s.from += bytes;
        s.left -= bytes;
        s.issued += CHUNK;
    }
}

__device__ __forceinline__ void wait_chunk(unsigned pos) {
    wait_for(supply().full + pos % RING / CHUNK, pos / RING % 2);
}

// Waits until the next bytes are there; for a few threads that read before the next phase.
__device__ __noinline__ void need(unsigned pos, int bytes) {
    for (unsigned at = pos / CHUNK * CHUNK; (int)(at - (pos + bytes)) < 0; at += CHUNK) wait_chunk(at);
}

// Ends a phase: what was read before pos may be overwritten, and the next bytes are there afterwards.
__device__ __forceinline__ void next_phase(const Walk& w, int bytes) {
    const bool conducts = threadIdx.x == WORKERS;
    if (conducts) {
        Supply& s = supply();
        for (; (int)(s.landed - (w.pos + bytes)) < 0; s.landed += CHUNK) wait_chunk(s.landed);
    }
    __syncwarp();
    __syncthreads();
    if (conducts) feed(w.pos);
}

// Numbers that begin at pos in the stream: one, or four.
__device__ __forceinline__ float vector_at(unsigned pos, int i) {
    return *(const float*)(memory + (pos + 4 * i) % RING);
}

__device__ __forceinline__ float4 four_at(unsigned pos, int i) {
    return *(const float4*)(memory + (pos + 16 * i) % RING);
}
