// Cosines and sines of positions * inv_freq: libm's, since angles of a long context need its range reduction.
// One launch a step (64 values a token), so it is scalar and serial.
#include "../simd.h"

// positions [T] int32, inv_freq [half] -> y [T, 2 * half] in dtype.
extern "C" void ingot_rotary_cos_sin(const float* inv_freq, int64_t half, float scaling, int64_t dtype,
                                     const int32_t* positions, void* y, int64_t T) {
    for_dtype(dtype, [&](auto type) {
        using C = decltype(type);
        for (int64_t t = 0; t < T; t++) {
            C* out = (C*)y + 2 * t * half;
            for (int64_t start = 0; start < half; start += LANES) {
                const int64_t n = half - start < LANES ? half - start : LANES;
                Vec cosine = {}, sine = {};
                for (int64_t i = 0; i < n; i++) {
                    const float angle = (float)positions[t] * inv_freq[start + i];
                    cosine[i] = cosf(angle) * scaling, sine[i] = sinf(angle) * scaling;
                }
                store_part(out + start, cosine, n);
                store_part(out + half + start, sine, n);
            }
        }
    });
}
