// What the generating kernel needs of the machine, beyond C++: tensor cores, bulk copies and barriers they complete.

#define INFINITY __int_as_float(0x7f800000)

extern __shared__ __align__(1024) char memory[];

// c (16 x 8) += w (16 x 16) x (16 x 8) in bfloat16, or (16 x 8) (8 x 8) in the 19 bits of TF32; sums in float32.
__device__ __forceinline__ void multiply_half(float* c, uint4 w, unsigned x0, unsigned x1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "r"(x0), "r"(x1));
}

__device__ __forceinline__ void multiply_single(float* c, uint4 w, unsigned x0, unsigned x1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w), "r"(x0), "r"(x1));
}

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void begin_barrier(unsigned long long* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(arrivals) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive_at(unsigned long long* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}

// A number that one thread writes when what it counts is there, and others read.
__device__ __forceinline__ void publish(unsigned* to, unsigned value) {
    asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" :: "r"(shared_address(to)), "r"(value) : "memory");
}

__device__ __forceinline__ unsigned latest(const unsigned* from) {
    unsigned value;
    asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];" : "=r"(value) : "r"(shared_address(from)) : "memory");
    return value;
}

__device__ __forceinline__ void wait_for(unsigned long long* barrier, unsigned parity) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra AGAIN;\n}" :: "r"(shared_address(barrier)), "r"(parity) : "memory");
}

// A barrier of the first threads, which the others pass by.
__device__ __forceinline__ void meet(int threads) { asm volatile("bar.sync 1, %0;" :: "r"(threads) : "memory"); }

// Copies bytes (a multiple of 16) from global to shared memory; ``barrier`` flips when they are there.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, unsigned bytes, unsigned long long* barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

// The nearest bfloat16 numbers, the first in the lower half. A conversion of two takes a quarter of the time of one's.
__device__ __forceinline__ unsigned two_halves(float first, float second) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

__device__ __forceinline__ unsigned short nearest_half(float x) { return two_halves(x, 0.0f); }

typedef unsigned long long letter;  // a number, and above it the count of its sample
typedef unsigned remote;            // a place in the shared memory of another block of the cluster

// Both halves arrive at once, so whoever finds the count has the number: no fence, no flag of its own.
__device__ __forceinline__ void send(letter* to, float value, unsigned count) {
    const letter both = (letter)count << 32 | __float_as_uint(value);
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" :: "l"(to), "l"(both) : "memory");
}

// Where a place in a block's own shared memory is in that of the cluster's block ``rank``.
__device__ __forceinline__ remote reach(const letter* own, int rank) {
    remote there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(own)), "r"(rank));
    return there;
}

__device__ __forceinline__ void push(remote to, int j, float value, unsigned count) {
    const letter both = (letter)count << 32 | __float_as_uint(value);
    asm volatile("st.relaxed.cluster.shared::cluster.b64 [%0], %1;" :: "r"(to + 8 * j), "l"(both) : "memory");
}

// A letter, or four, from global memory, and from a block's own shared memory.
__device__ __forceinline__ letter peek_far(const letter* from) {
    letter both;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(both) : "l"(from) : "memory");
    return both;
}

__device__ __forceinline__ void peek_far(const letter* from, letter* four) {
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(four[0]), "=l"(four[1]) : "l"(from) : "memory");
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
                 : "=l"(four[2]), "=l"(four[3]) : "l"(from + 2) : "memory");
}

__device__ __forceinline__ letter peek_near(const letter* from) {
    letter both;
    asm volatile("ld.relaxed.cluster.shared::cta.b64 %0, [%1];" : "=l"(both) : "r"(shared_address(from)) : "memory");
    return both;
}

__device__ __forceinline__ void peek_near(const letter* from, letter* four) {
    const unsigned at = shared_address(from);
    asm volatile("ld.relaxed.cluster.shared::cta.v2.b64 {%0, %1}, [%2];"
                 : "=l"(four[0]), "=l"(four[1]) : "r"(at) : "memory");
    asm volatile("ld.relaxed.cluster.shared::cta.v2.b64 {%0, %1}, [%2];"
                 : "=l"(four[2]), "=l"(four[3]) : "r"(at + 16) : "memory");
}

__device__ __forceinline__ int cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
