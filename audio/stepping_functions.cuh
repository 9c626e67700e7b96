// Small functions of numbers that both kernels of generation share.

typedef unsigned short half_bits;

__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int up_to(int n, int unit) { return (n + unit - 1) / unit * unit; }

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// log(1 + e^x): the logarithm by the series of 2 artanh(t / (2 + t)), so that small values keep their digits.
__device__ __forceinline__ float softplus(float x) {
    const float t = __expf(-fabsf(x)), s = __fdividef(t, 2.0f + t), s2 = s * s;
    float sum = 1.0f / 15;
#pragma unroll
    for (int n = 13; n > 0; n -= 2) sum = fmaf(sum, s2, 1.0f / n);
    return fmaxf(x, 0.0f) + 2.0f * s * sum;
}

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
