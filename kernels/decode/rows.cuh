// What the kernels of a step of many rows share: asynchronous copies, tensor cores, and clusters of blocks that add up
// their sums. NVRTC has no headers. X (a 16-bit type) comes from the host.

extern __shared__ __align__(128) char memory[];

// Lets the next kernel start: it fetches what it needs of weights and states before it waits for this one. Let in behind
// this kernel's own wait: earlier, it takes room and bandwidth from the kernel in front of this one.
__device__ __forceinline__ void let_follow() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory, or zeros.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool live) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(live ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// One thread: makes a barrier and begins a copy of whole 16 bytes to shared memory, of which the barrier will tell the end.
// What is read once leaves the L2 cache first.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, unsigned bytes, unsigned barrier) {
    unsigned long long first;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(first));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("fence.proxy.async.shared::cta; fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
        "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(barrier), "l"(first) : "memory");
}
__device__ __forceinline__ void wait_bulk(unsigned barrier) {
    asm volatile("{.reg .pred p;\nagain: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0;\n@!p bra again;}" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void load_tiles(unsigned* r, unsigned at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

__device__ __forceinline__ void multiply(float* c, const unsigned* a, unsigned b0, unsigned b1, bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float* c, const unsigned* a, unsigned b0, unsigned b1, f16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What the blocks of a cluster wrote to their shared memory becomes visible to all of them.
__device__ __forceinline__ void show_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Waits until no block of the cluster reads others' memory any more: what was read has been used by then.
__device__ __forceinline__ void leave_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}

// Four numbers that lie at ``at`` in the shared memory of block ``rank`` of the cluster.
__device__ __forceinline__ float4 load_from(unsigned at, int rank) {
    unsigned there;
    float4 v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there) : "memory");
    return v;
}

__device__ __forceinline__ float silu(float v) { return v / (1.0f + ex2(-LOG2E * v)); }
__device__ __forceinline__ float softplus(float v) {
    return v > 20.0f ? v : fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v)));
}
