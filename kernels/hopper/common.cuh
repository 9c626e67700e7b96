// What products with epilogues of their own share: barriers of clusters, boxes sent to all blocks of a row or column, tiles
// as the tensor cores want them. NVRTC has no headers.

typedef unsigned long long u64;
typedef unsigned short u16;

extern __shared__ __align__(1024) char memory[];

__device__ __forceinline__ unsigned block_rank() { unsigned r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
__device__ __forceinline__ unsigned in_block(unsigned at, unsigned rank) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    return there;
}
__device__ __forceinline__ void make_barrier(unsigned at, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
// Of a block's own reads: wider than a block's, a release would wait for all that was written to global memory.
__device__ __forceinline__ void arrive(unsigned there) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}
__device__ __forceinline__ void expect(unsigned at, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(unsigned at, unsigned parity) {
    asm volatile("{.reg .pred p;\nagain: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;}" ::"r"(at), "r"(parity) : "memory");
}
// The barriers of one thread become visible to copies and to the cluster, which has to meet behind this.
__device__ __forceinline__ void show_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void meet() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// A box, to the same place in all blocks of the mask.
__device__ __forceinline__ void fetch(unsigned to, const void* map, int k, int row, unsigned barrier, u16 mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::
        "r"(to), "l"(map), "r"(k), "r"(row), "r"(barrier), "h"(mask) : "memory");
}
__device__ __forceinline__ void fetch(unsigned to, const void* map, int k, int b, int c, int d, int e, unsigned barrier, u16 mask) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::
        "r"(to), "l"(map), "r"(k), "r"(b), "r"(c), "r"(d), "r"(e), "r"(barrier), "h"(mask) : "memory");
}

// A tile's place for the tensor cores: lines of 128 bytes, swizzled, eight of them 1024 bytes.
__device__ __forceinline__ u64 described(unsigned at) {
    return (u64)(at >> 4 & 0x3fff) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

__device__ __forceinline__ unsigned packed(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// The two groups that multiply take turns: a barrier tells its last phase from the one before, no more, so a group must not
// wait for tiles that come behind those of the other.
__device__ __forceinline__ void await_turn(int group) { asm volatile("bar.sync %0, 256;" ::"r"(3 + group) : "memory"); }
__device__ __forceinline__ void give_turn(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(4 - group) : "memory"); }
