// Small functions of numbers that both kernels of generation share.

typedef unsigned short half_bits;

__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int most(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int up_to(int n, int unit) { return (n + unit - 1) / unit * unit; }

constexpr float LOG2_E = 1.44269504f;

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + power_of_two(-LOG2_E * x)); }

// log(1 + e^x): the logarithm by the series of 2 artanh(t / (2 + t)), so that small values keep their digits.
__device__ __forceinline__ float softplus(float x) {
    const float t = power_of_two(-LOG2_E * fabsf(x)), s = t * reciprocal(2.0f + t), s2 = s * s, s4 = s2 * s2;
    const float low = fmaf(s4, fmaf(s2, 1.0f / 7, 1.0f / 5), fmaf(s2, 1.0f / 3, 1.0f));
    const float high = fmaf(s4, fmaf(s2, 1.0f / 15, 1.0f / 13), fmaf(s2, 1.0f / 11, 1.0f / 9));
    return fmaxf(x, 0.0f) + 2.0f * s * fmaf(s4 * s4, high, low);
}

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
