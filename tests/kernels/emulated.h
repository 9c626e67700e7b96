// What the CUDA sources need to run on a CPU: a block at a time, or all at once, with a fiber for each thread. A fiber goes on
// until it waits for others (a barrier, a product of the whole warp); shared memory starts as NaN.

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __builtin_assume(x)

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static float2 make_float2(float a, float b) { return {a, b}; }
static float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
template <class To, class From> static To cast_bits(From v) { To to; memcpy(&to, &v, sizeof(to)); return to; }
static float __int_as_float(int v) { return cast_bits<float>(v); }
static float __uint_as_float(unsigned v) { return cast_bits<float>(v); }
static int __float_as_int(float v) { return cast_bits<int>(v); }
static unsigned __float_as_uint(float v) { return cast_bits<unsigned>(v); }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned select) {
    unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned found = 0;
    for (int i = 0; i < 4; i++) found |= (unsigned)(both >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
    return found;
}
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }

struct Index { int x; };
struct Barrier { int arrived = 0; long phase = 0; int all = 1; };
struct Fiber { ucontext_t context; char* stack; bool done; Index index; Barrier* waits; long phase; };  // for a phase to end
static std::vector<Fiber> fibers;
static int current, threads_;
static ucontext_t scheduler;
struct Block { Index index; float4* room; Barrier barrier; };
static std::vector<Block> blocks_;  // those that run side by side
static std::vector<Barrier> of_warp;
#define threadIdx (fibers[current].index)
#define blockIdx (blocks_[current / threads_].index)
#define shared_memory (blocks_[current / threads_].room)
#define of_block (blocks_[current / threads_].barrier)
static void others() { swapcontext(&fibers[current].context, &scheduler); }

static void wait_at(Barrier& b, int count) {
    long phase = b.phase;
    if (++b.arrived == count) b.arrived = 0, b.phase++;
    else {
        fibers[current].waits = &b, fibers[current].phase = phase;
        while (b.phase == phase) others();
        fibers[current].waits = nullptr;
    }
}
static void __syncthreads() { wait_at(of_block, threads_); }
static void __syncwarp() { wait_at(of_warp[current / 32], 32); }
static int __syncthreads_and(int value) {
    if (!value) of_block.all = 0;
    __syncthreads();
    int all = of_block.all;
    __syncthreads();
    of_block.all = 1;
    __syncthreads();
    return all;
}

struct Arrivals { int wanted, arrived; long phase; };
static std::map<void*, Arrivals> arrivals;  // mbarriers

// The tensor core's m16n8k8 in tf32, whose operands lie as PTX says.
static void product(float (&to)[4], const unsigned (&first)[4], const unsigned (&second)[2]) {
    static unsigned held[1024][32][6];
    const int warp = current / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < 4; i++) held[warp][lane][i] = first[i] & 0xffffe000u;
    for (int i = 0; i < 2; i++) held[warp][lane][4 + i] = second[i] & 0xffffe000u;
    __syncwarp();
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + i % 2;
        float sum = 0;
        for (int k = 0; k < 8; k++)
            sum += __uint_as_float(held[warp][row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]) *
                   __uint_as_float(held[warp][column * 4 + k % 4][4 + k / 4]);
        to[i] += sum;
    }
    __syncwarp();
}

// What lane ^ other gives.
static float __shfl_xor_sync(unsigned, float value, int other) {
    static float held[1024][32];
    const int warp = current / 32, lane = threadIdx.x % 32;
    held[warp][lane] = value;
    __syncwarp();
    const float found = held[warp][lane ^ other];
    __syncwarp();
    return found;
}

static unsigned short to_bf16(float v) {
    unsigned u = __float_as_uint(v);
    return v != v ? 0x7fff : u + 0x7fff + (u >> 16 & 1) >> 16;
}

// Runs blocks of threads, as many side by side as are to run ``together``.
template <class Arguments>
static void run_blocks(void (*start)(), long long blocks, int threads, int bytes, int together = 1) {
    const int room = 1 << 17;
    threads_ = threads;
    fibers.resize(threads * together);
    for (Fiber& f : fibers) if (!f.stack) f.stack = static_cast<char*>(malloc(room));
    for (long long first = 0; first < blocks; first += together) {
        blocks_.assign(together, Block());
        for (int b = 0; b < together; b++) {
            blocks_[b].index.x = first + b;
            blocks_[b].room = static_cast<float4*>(aligned_alloc(64, bytes / 64 * 64 + 128));
            memset(blocks_[b].room, 0xff, bytes / 64 * 64 + 128);
        }
        of_warp.assign(threads * together / 32 + 1, Barrier());
        arrivals.clear();
        for (size_t i = 0; i < fibers.size(); i++) {
            Fiber& f = fibers[i];
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack;
            f.context.uc_stack.ss_size = room;
            f.done = false;
            f.index.x = i % threads;
            f.waits = nullptr;
            makecontext(&f.context, start, 0);
        }
        for (int left = 1; left;) {
            left = 0;
            for (current = 0; current < (int)fibers.size(); current++) {
                const Fiber& f = fibers[current];
                if (!f.done && !(f.waits && f.waits->phase == f.phase)) swapcontext(&scheduler, &fibers[current].context);
                left += !f.done;
            }
        }
        for (Block& block : blocks_) free(block.room);
    }
}
