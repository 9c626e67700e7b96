// Stands in for audio/stepping_machine.cuh on a CPU, upon the fibers of tests/kernels/emulated.h. A copy to shared
// memory leaves NaN there until it is done, some turns later: reading or overwriting too early shows.

#define __host__
#define __noinline__ __attribute__((noinline))
#define __constant__ static
#define __grid_constant__
#define __expf expf
#define memory ((char*)shared_memory)

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <class T> static T __ldcg(const T* p) { return *p; }
template <class T> static void __stcg(T* p, T v) { *p = v; }
static float __fdividef(float a, float b) { return a / b; }
static float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static float power_of_two(float x) { return exp2f(x); }
static float reciprocal(float x) { return 1.0f / x; }
static unsigned short nearest_half(float x) { return to_bf16(x); }
static unsigned two_halves(float first, float second) { return to_bf16(first) | (unsigned)to_bf16(second) << 16; }

template <class T> static T from_lane(T value, int lane) {
    static unsigned long long held[1024][32];
    const int warp = current / 32;
    memcpy(&held[warp][threadIdx.x % 32], &value, sizeof value);
    __syncwarp();
    if (lane >= 0) memcpy(&value, &held[warp][lane], sizeof value);
    __syncwarp();
    return value;
}
template <class T> static T __shfl_sync(unsigned, T value, int lane) { return from_lane(value, lane); }
template <class T> static T __shfl_xor_sync(unsigned, T value, int o) { return from_lane(value, threadIdx.x % 32 ^ o); }
template <class T> static T __shfl_up_sync(unsigned, T value, int o) { return from_lane(value, threadIdx.x % 32 - o); }

static int __reduce_min_sync(unsigned, int value) {
    for (int o = 16; o; o >>= 1) {
        const int other = __shfl_xor_sync(~0u, value, o);
        if (other < value) value = other;
    }
    return value;
}
static unsigned __activemask() { return ~0u; }
static bool __any_sync(unsigned, bool own) { return own; }  // enough for a lane that waits for itself
static int __reduce_max_sync(unsigned, int value) { return -__reduce_min_sync(~0u, -value); }

static void multiply_single(float* c, uint4 w, unsigned x0, unsigned x1) {
    product(*(float(*)[4])c, {w.x, w.y, w.z, w.w}, {x0, x1});
}

static void multiply_half(float* c, uint4 w, unsigned x0, unsigned x1) {
    static unsigned held[1024][32][6];
    const int warp = current / 32, lane = threadIdx.x % 32;
    const unsigned given[6] = {w.x, w.y, w.z, w.w, x0, x1};
    memcpy(held[warp][lane], given, sizeof given);
    __syncwarp();
    auto number = [](unsigned pair, int k) { return __uint_as_float(k % 2 ? pair & 0xffff0000u : pair << 16); };
    for (int v = 0; v < 4; v++) {
        const int row = lane / 4 + v / 2 * 8, column = lane % 4 * 2 + v % 2;
        for (int k = 0; k < 16; k++)
            c[v] += number(held[warp][row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k) *
                    number(held[warp][column * 4 + k % 8 / 2][4 + k / 8], k);
    }
    __syncwarp();
}

static void meet(int threads) { static Barrier barrier; wait_at(barrier, threads); }

struct Copy { void* to; const void* from; unsigned bytes; unsigned long long* barrier; int turns; };
static std::vector<Copy> copies;
static std::map<void*, std::pair<int, int>> expected;  // arrivals of a barrier, and those so far
static void begin_barrier(unsigned long long* barrier, int arrivals) {
    *barrier = 0;
    expected[barrier] = {arrivals, 0};
}
static void arrive_at(unsigned long long* barrier) {
    auto& [all, now] = expected[barrier];
    if (++now == all) now = 0, ++*barrier;
}
static void copy_bulk(void* to, const void* from, unsigned bytes, unsigned long long* barrier) {
    memset(to, 0xff, bytes);
    copies.push_back({to, from, bytes, barrier, rand() % 100});
}
static void pause_a_little() {  // some turns of all threads, in which copies come to an end
    for (size_t i = 0; i < copies.size();) {
        Copy& copy = copies[i];
        if (copy.turns-- > 0) { i++; continue; }
        memcpy(copy.to, copy.from, copy.bytes);
        ++*copy.barrier;
        copies.erase(copies.begin() + i);
    }
    others();
}
static void wait_for(unsigned long long* barrier, unsigned parity) { while (*barrier % 2 == parity) pause_a_little(); }
static void publish(unsigned* to, unsigned value) { *to = value; }
static unsigned latest(const unsigned* from) {
    pause_a_little();
    return *from;
}

typedef unsigned long long letter;
static void send(letter* to, float value, unsigned count) { *to = (letter)count << 32 | __float_as_uint(value); }
static letter peek_far(const letter* from) {
    others();
    return *from;
}
static void peek_far(const letter* from, letter* four) {
    others();
    for (int i = 0; i < 4; i++) four[i] = from[i];
}
static letter peek_near(const letter* from) { return peek_far(from); }
static void peek_near(const letter* from, letter* four) { peek_far(from, four); }
#define __cluster_dims__(...)
#ifdef CLUSTER
static int cluster_rank() { return blockIdx.x % CLUSTER; }
typedef letter* remote;
static remote reach(const letter* own, int rank) {
    Block& other = blocks_[blockIdx.x / CLUSTER * CLUSTER + rank];
    return (letter*)((char*)other.room + ((char*)own - (char*)shared_memory));
}
static void push(remote to, int j, float value, unsigned count) { send(to + j, value, count); }
static void meet_cluster() {
    static std::map<int, Barrier> barriers;
    wait_at(barriers[blockIdx.x / CLUSTER], CLUSTER * threads_);
}
#endif
