// Sizes, rooms in shared memory, and the stream of weights through a ring there.

constexpr int WORKERS = 32 * WARPS, THREADS = WORKERS + 64, LAST = STAGES - 1;
constexpr int TILE = HALF ? 512 : 1024;  // bytes of 16 columns by 16 rows
constexpr int CHUNK = RING / SLOTS;

__constant__ const int wides[] = WIDES, downs[] = DOWNS, ups[] = UPS, first_down[] = FIRST_DOWN;
__constant__ const int first_up[] = FIRST_UP, skip_at[] = SKIP_AT, waiting_at[] = WAITING_AT, current_at[] = CURRENT_AT;
__constant__ const int shapes[] = SHAPES, state_at[] = STATE_AT;
__constant__ const unsigned segment_at[] = SEGMENT_AT, segment_bytes[] = SEGMENT_BYTES;

// Rooms, after the ring: numbers of 4 bytes.
constexpr int AT_X = 0, AT_Y = AT_X + NS * WIDEST, AT_NORMED = AT_Y + NS * NARROW, AT_INNER = AT_NORMED + NS * NORMED;
constexpr int AT_GATES = AT_INNER + NS * INNER, AT_LOW = AT_GATES + NS * GATES, AT_PART = AT_LOW + (1 + WARPS) * NS * LOWS;
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

// Where a warp is. All warps read all of the stream, each at its own pace between two barriers of theirs.
struct Walk {
    unsigned pos;            // bytes of the stream read so far, modulo 2^32
    unsigned landed, freed;  // bytes seen in the ring, and given back to be overwritten
    float* state;            // of the block's first clip
    int x;                   // room of x: AT_X, or AT_Y if it is narrow
    int parts;               // how many sums in PART x lacks
};

__device__ __forceinline__ float* x_at(int place, int s) { return room(place) + s * (place == AT_X ? WIDEST : NARROW); }

// The barriers of the ring's chunks, there to be read and read by all warps, and how many bytes of the stream are there.
struct Supply {
    unsigned long long full[SLOTS], read[SLOTS];
    unsigned landed;
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

// Brings the weights of all samples into the ring, as far ahead as it has room: the work of one thread. Another one, which
// ``watches``, tells the warps how far they are there: asking a barrier would take each of them longer. A sample's
// segments are the stages inwards, the last of them the centre where all frames are full, then outwards.
__device__ __noinline__ void bring(const char* stream, unsigned seen, long long length, bool watches) {
    unsigned issued = 0, slot = 0, round = 0;  // round: how often the ring has been full
    for (long long step = 0; step < length; step++) {
        int phase[STAGES];
        const int depth = depth_at(seen + (unsigned)step, phase), outwards = least(depth, LAST - 1);
        for (int i = 0; i <= depth + 1 + outwards; i++) {
            const int segment = i <= depth ? i : STAGES + outwards - (i - depth - 1);
            const char* from = stream + segment_at[segment];
            for (int left = segment_bytes[segment]; left > 0; left -= CHUNK, from += CHUNK) {
                issued += CHUNK;
                if (watches) {
                    wait_for(supply().full + slot, round % 2);
                    publish(&supply().landed, issued);
                } else {
                    if (round) wait_for(supply().read + slot, (round + 1) % 2);
                    copy_bulk(memory + slot * CHUNK, from, least(CHUNK, left), supply().full + slot);
                }
                if (++slot == SLOTS) slot = 0, round++;
            }
        }
    }
}

// Gives back what the warp has read, and waits for the next bytes.
__device__ __forceinline__ void turn(Walk& w, int bytes) {
    __syncwarp();
#pragma unroll 1
    for (; (int)(w.pos - w.freed) >= CHUNK; w.freed += CHUNK)
        if (threadIdx.x % 32 == 0) arrive_at(supply().read + w.freed % RING / CHUNK);
    while ((int)(w.landed - (w.pos + bytes)) < 0) w.landed = latest(&supply().landed);
}

// Ends a phase of all warps, and waits for the bytes of the next one.
__device__ __forceinline__ void next_phase(Walk& w, int bytes) {
    turn(w, bytes);
    meet(WORKERS);
}

// Numbers that begin at pos in the stream: one, or four.
__device__ __forceinline__ float vector_at(unsigned pos, int i) {
    return *(const float*)(memory + (pos + 4 * i) % RING);
}

__device__ __forceinline__ float4 four_at(unsigned pos, int i) {
    return *(const float4*)(memory + (pos + 16 * i) % RING);
}
