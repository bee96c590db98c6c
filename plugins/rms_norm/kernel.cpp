// RMSNorm of each chunk of D columns, with the residual added first when there is one.
// Two passes over a row that is in cache: the first adds, stores the sum and its squares, the second scales.
// Rounding follows the contract: the sum to T before it is normalised; the normalised value to T before the weight,
// unless the weight is multiplied in fp32.
#include "../simd.h"

struct RMSNormArgs {
    const void* weight;  // [D]
    int64_t D, chunks, fp32_multiply, dtype;  // chunks: n of a row of n*D
    float epsilon, weight_offset;
};

template <typename T> void rms_norm_chunk(const RMSNormArgs& args, const T* x, const T* residual, T* y, T* total) {
    const T* weight = (const T*)args.weight;
    Vec squares = {};
    for_vectors<T>(args.D, [&](int64_t i, auto read, auto write) {
        Vec v = read(x + i);
        if (residual) {
            v = rounded<T>(v + read(residual + i));
            write(total + i, v);
        }
        squares += v * v;
    });
    const T* h = residual ? total : x;
    const Vec scale = splat(1.0f / sqrtf(sum(squares) / (float)args.D + args.epsilon));
    for_vectors<T>(args.D, [&](int64_t i, auto read, auto write) {
        Vec v = read(h + i) * scale, w = read(weight + i) + splat(args.weight_offset);
        write(y + i, args.fp32_multiply ? v * w : rounded<T>(v) * w);
    });
}

// residual and total are both given or both null; x, residual, y, total: [rows, chunks * D], contiguous.
extern "C" void ingot_rms_norm(const RMSNormArgs* args, const void* x, const void* residual, void* y, void* total,
                               int64_t rows) {
    for_dtype(args->dtype, [&](auto type) {
        using T = decltype(type);
        const int64_t count = rows * args->chunks, D = args->D;
#pragma omp parallel for schedule(static) if (count * D > 4096)
        for (int64_t c = 0; c < count; c++)
            rms_norm_chunk<T>(*args, (const T*)x + c * D, residual ? (const T*)residual + c * D : nullptr,
                              (T*)y + c * D, (T*)total + c * D);
    });
}
