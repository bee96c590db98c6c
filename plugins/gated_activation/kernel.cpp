// act(gate) * up in one pass; the activation is rounded to T before the product, as the definition does.
#include "../simd.h"

enum Activation : int64_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

inline Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

// Abramowitz and Stegun 7.1.26, |error| < 1.5e-7: below fp32's own rounding of 1 + erf.
inline Vec erf(Vec x) {
    Vec size = x < Vec{} ? -x : x;
    Vec t = splat(1.0f) / (splat(1.0f) + splat(0.3275911f) * size);
    Vec p = splat(1.061405429f);
    p = p * t + splat(-1.453152027f);
    p = p * t + splat(1.421413741f);
    p = p * t + splat(-0.284496736f);
    p = p * t + splat(0.254829592f);
    Vec y = splat(1.0f) - p * t * exp(-size * size);
    return x < Vec{} ? -y : y;
}

template <int64_t activation> inline Vec activate(Vec x) {
    if constexpr (activation == SILU) return x * sigmoid(x);
    if constexpr (activation == GELU) return splat(0.5f) * x * (splat(1.0f) + erf(x * splat(0.70710678f)));
    if constexpr (activation == GELU_TANH)  // (1 + tanh z) / 2 = sigmoid(2z)
        return x * sigmoid(splat(1.59576912f) * (x + splat(0.044715f) * x * x * x));
    return x < Vec{} ? Vec{} : x;  // NaN passes
}

template <typename T, int64_t activation> void gated(const T* x, T* y, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (int64_t r = 0; r < rows; r++) {
        const T *gate = x + 2 * r * width, *up = gate + width;
        T* out = y + r * width;
        for_vectors<T>(width, [&](int64_t i, auto read, auto write) {
            write(out + i, rounded<T>(activate<activation>(read(gate + i))) * read(up + i));
        });
    }
}

// x [rows, 2 * width] -> y [rows, width], both contiguous.
extern "C" void ingot_gated_activation(int64_t activation, int64_t dtype, const void* x, void* y, int64_t rows,
                                       int64_t width) {
    for_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        switch (activation) {
            case SILU: return gated<T, SILU>((const T*)x, (T*)y, rows, width);
            case GELU: return gated<T, GELU>((const T*)x, (T*)y, rows, width);
            case GELU_TANH: return gated<T, GELU_TANH>((const T*)x, (T*)y, rows, width);
            case RELU: return gated<T, RELU>((const T*)x, (T*)y, rows, width);
        }
    });
}
