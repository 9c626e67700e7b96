// Generation steps of a U-Net of Mamba layers for one clip, by blocks of threads that hand on what they know.
//
// A layer, or 16 WARPS channels of one, has a block of threads of its own, whose weights and states stay in its registers
// and shared memory for the whole launch. A layer's input is mailed: each number goes to global memory together with the
// count of its sample, so the reader waits for numbers, and there is no barrier between blocks. To layers of the same
// cluster it goes straight into their shared memory, in a third of the time. A stage runs at its own pace: what the inner
// ones say about a frame is needed for the next frame only, so their layers run beside the outer ones'.
// All blocks have to be on the GPU at once.
//
// A number of turn n lies in slot n % DEPTH, and is overwritten DEPTH turns later. All its readers have read it by then, as
// a stage cannot begin two frames before the stage within has answered the first, and DEPTH is at least two frames long.
//
// A product takes its input as the sum of two bfloat16 numbers, in neighbouring columns of the tensor cores' tile, so that
// only the weights are rounded.
//
// Macros: WARPS of a block, CLUSTER blocks, LEVELS, DEPTH, FARS, NEARS and PUSHES (the most that a block has), NEAR_LETTERS
// of shared memory, and JOB_CASES, code for each kind of block.

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS)
relay(const __grid_constant__ Args a) {
    for (int i = threadIdx.x; i < NEAR_LETTERS; i += THREADS) ((letter*)memory)[i] = 0;
    take_row(a);
    meet_cluster();  // nobody writes into a block's shared memory before it was cleared
    switch (row_of_block()[JOB]) { JOB_CASES }
    meet_cluster();
}
