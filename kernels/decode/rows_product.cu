// y = r x W^T + bias for many rows, with what surrounds it: r is 1 / (root mean square) of rows whose squares other
// kernels summed; then a convolution's step on some outputs (CONV taps), or the addition to the residual stream
// (ADDS), whose sum goes on as rows for the next product, times its norm's weight, and as sums of squares.
//
// A cluster of S blocks has a tile of 64 rows and BO outputs; each block K / S of the inputs. The block has its weights
// on their way before it waits for the kernel in front. Macros: X, Y (of the output), R (of the stream), K, S, BO, CHUNK
// (inputs that are multiplied while others arrive), CONV, ADDS, BIAS, SQUARES (parts of each row's sum, or 0).

constexpr int BM = 64, THREADS = 256, PER = K / S, CHUNKS = PER / CHUNK, LINE = PER + 8, SUMS = BO + 4;
constexpr int OWN = BO / S, GROUPS = OWN / 4, ITEMS = (BM * GROUPS + THREADS - 1) / THREADS, NT = BO / 16;
static_assert(K % S == 0 && PER % CHUNK == 0 && CHUNK % 16 == 0 && BO % 32 == 0 && OWN % 4 == 0, "tile");
static_assert((GROUPS & (GROUPS - 1)) == 0 && GROUPS <= 32, "a row's sum of squares is made by neighbouring threads");

template <class E> struct alignas(sizeof(E) * 4) Four { E v[4]; };

template <int DONE> __device__ __forceinline__ void product(float (&acc)[NT][4], unsigned xs, unsigned ws) {
    if constexpr (DONE < CHUNKS) {
        wait_copies<CHUNKS - 1 - DONE>();
        __syncthreads();
#pragma unroll
        for (int k = DONE * CHUNK; k < (DONE + 1) * CHUNK; k += 16) {
            unsigned a[4];
            load_tiles(a, xs + 2 * k);
#pragma unroll
            for (int j = 0; j < NT / 2; j++) {
                unsigned b[4];
                load_tiles(b, ws + 2 * (j * 16 * LINE + k));
                multiply(acc[2 * j], a, b[0], b[1], X{});
                multiply(acc[2 * j + 1], a, b[2], b[3], X{});
            }
        }
        product<DONE + 1>(acc, xs, ws);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) __cluster_dims__(S, 1, 1) product_rows(const Args a) {
    X* weights = reinterpret_cast<X*>(memory);
    X* inputs = weights + BO * LINE;
    float* sums = reinterpret_cast<float*>(inputs + BM * LINE);
    float* scales = sums + BM * SUMS;
    constexpr int PIECES = PER / 8, MINE = CHUNK / 8;
    const int t = threadIdx.x, lane = t % 32, warp = t / 32, rank = blockIdx.x % S, tile = blockIdx.x / S;
    const int tiles = (a.O + BO - 1) / BO, first_o = tile % tiles * BO;
    const i64 first_b = tile / tiles * BM;

    const X* w = static_cast<const X*>(a.weight) + rank * PER;
#pragma unroll 4
    for (int i = t; i < BO * PIECES; i += THREADS) {
        int o = i / PIECES, k = i % PIECES * 8;
        copy_async(weights + o * LINE + k, w + (i64)min(first_o + o, (int)a.O - 1) * K + k, true);
    }
    // This thread's outputs are the same in all of its rows.
    const int o = first_o + rank * OWN + t % GROUPS * 4;
    const bool live_o = o < a.O;
    Four<X> bias = {};  // kept as they come: a conversion would wait for them
#if BIAS
    if (live_o) bias = *reinterpret_cast<const Four<X>*>(static_cast<const X*>(a.bias) + o);
#endif
#if CONV
    const int c = o - (int)a.first;
    const bool mixed = live_o && c >= 0 && c < a.C;
    X taps[4][CONV];
    Four<X> conv_bias = {}, past[ITEMS][CONV > 1 ? CONV - 1 : 1];
    if (mixed) {
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int i = 0; i < CONV; i++) taps[j][i] = static_cast<const X*>(a.conv_weight)[(c + j) * CONV + i];
        if (a.conv_bias) conv_bias = *reinterpret_cast<const Four<X>*>(static_cast<const X*>(a.conv_bias) + c);
#pragma unroll
        for (int n = 0; n < ITEMS; n++) {
            i64 b = first_b + (t + n * THREADS) / GROUPS;
            if (b < a.B && t + n * THREADS < BM * GROUPS)
#pragma unroll
                for (int i = 0; i < CONV - 1; i++)
                    past[n][i] = *reinterpret_cast<const Four<X>*>(static_cast<const X*>(a.conv_state) + (b * (CONV - 1) + i) * a.C + c);
        }
    }
#endif
#if ADDS
    Four<X> next = {};
    if (live_o) next = *reinterpret_cast<const Four<X>*>(static_cast<const X*>(a.next_weight) + o);
#endif

    wait_for_before();
    let_follow();
    const X* x = static_cast<const X*>(a.x) + rank * PER;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
#pragma unroll 4
        for (int i = t; i < BM * MINE; i += THREADS) {
            i64 b = first_b + i / MINE;
            int k = chunk * CHUNK + i % MINE * 8;
            copy_async(inputs + i / MINE * LINE + k, x + min(b, a.B - 1) * a.x_b + k, b < a.B);
        }
        commit();
    }
#if ADDS
    Four<R> stream[ITEMS];
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        i64 b = first_b + (t + n * THREADS) / GROUPS;
        if (live_o && b < a.B && t + n * THREADS < BM * GROUPS)
            stream[n] = *reinterpret_cast<const Four<R>*>(static_cast<const R*>(a.residual) + b * a.O + o);
    }
#endif
#if SQUARES
    Raw<float, 1> squares[(SQUARES + 3) / 4];  // four threads have a row's
#pragma unroll
    for (int i = 0; i < (SQUARES + 3) / 4; i++) {
        const i64 b = first_b + t / 4;
        const int part = 4 * i + t % 4;
        squares[i] = load<1>(static_cast<const float*>(a.squares) + b * SQUARES + part, b < a.B && part < SQUARES);
    }
#endif

    float acc[NT][4] = {};
    const int row = warp % 4 * 16, half = warp / 4 * (BO / 2);
    product<0>(acc, shared_address(inputs + (row + lane % 16) * LINE + lane / 16 * 8),
        shared_address(weights + (half + lane / 16 * 8 + lane % 8) * LINE + lane / 8 % 2 * 8));
#pragma unroll
    for (int j = 0; j < NT; j++) {
        float* at = sums + (row + lane / 4) * SUMS + half + j * 8 + lane % 4 * 2;
        at[0] = acc[j][0], at[1] = acc[j][1];
        at[8 * SUMS] = acc[j][2], at[8 * SUMS + 1] = acc[j][3];
    }
#if SQUARES
    float square_sum = 0;
#pragma unroll
    for (int i = 0; i < (SQUARES + 3) / 4; i++) square_sum += squares[i][0];
    square_sum += __shfl_xor_sync(~0u, square_sum, 1);
    square_sum += __shfl_xor_sync(~0u, square_sum, 2);
    if (t % 4 == 0) scales[t / 4] = rsqrtf(square_sum / K + __int_as_float((int)a.eps));
#endif
    show_cluster();  // the sums, and to this block the scales

#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        const int i = t + n * THREADS, m = i / GROUPS;
        if (i >= BM * GROUPS) break;
        const i64 b = first_b + m;
        const unsigned at = shared_address(sums + m * SUMS + rank * OWN + t % GROUPS * 4);
        float v[4] = {0, 0, 0, 0};
#pragma unroll
        for (int s = 0; s < S; s++) {
            float4 part = load_from(at, s);
            v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
        }
        const bool live = live_o && b < a.B;
        float scale = 1;
#if SQUARES
        scale = scales[m];
#endif
        for (int j = 0; j < 4; j++) v[j] = fmaf(v[j], scale, number(bias.v[j]));
#if CONV
        if (mixed && live) {
            Four<X> now;
            X* state = static_cast<X*>(a.conv_state) + b * (CONV - 1) * a.C + c;
            for (int j = 0; j < 4; j++) {
                put(now.v[j], v[j]);  // the convolution reads what a prompt's would
                float y = fmaf(number(now.v[j]), number(taps[j][CONV - 1]), number(conv_bias.v[j]));
#pragma unroll
                for (int w = 0; w < CONV - 1; w++) y = fmaf(number(past[n][w].v[j]), number(taps[j][w]), y);
                v[j] = silu(y);
            }
#pragma unroll
            for (int w = 1; w < CONV - 1; w++) *reinterpret_cast<Four<X>*>(state + (w - 1) * a.C) = past[n][w];
            if (CONV > 1) *reinterpret_cast<Four<X>*>(state + (CONV - 2) * a.C) = now;
        }
#endif
#if ADDS
        float square = 0;
        Four<R> total;
        Four<X> ahead;
        for (int j = 0; j < 4; j++) {
            float sum = live ? v[j] + number(stream[n].v[j]) : 0;
            square = fmaf(sum, sum, square);
            put(total.v[j], sum);
            put(ahead.v[j], sum * number(next.v[j]));
        }
#pragma unroll
        for (int far = GROUPS / 2; far; far /= 2) square += __shfl_xor_sync(~0u, square, far);
        if (live) {
            *reinterpret_cast<Four<R>*>(static_cast<R*>(a.total) + b * a.O + o) = total;
            *reinterpret_cast<Four<X>*>(static_cast<X*>(a.y) + b * a.O + o) = ahead;
        }
        if (t % GROUPS == 0 && b < a.B) static_cast<float*>(a.sums)[b * (tiles * S) + tile % tiles * S + rank] = square;
#else
        Four<Y> y;
        for (int j = 0; j < 4; j++) put(y.v[j], v[j]);
        if (live) *reinterpret_cast<Four<Y>*>(static_cast<Y*>(a.y) + b * a.O + o) = y;
#endif
    }
    leave_cluster();  // others may yet read this block's sums
}
