// QuantiseTokens, and QuantizeLinear with one scale for all: x [T, K] in 8 bits, bit for bit the reference's numbers.
// A group of columns is read twice, for its scale and for its values; it is in the first-level cache the second time.
#include "../simd.h"

#include <algorithm>

struct QuantiseArgs {
    int64_t x_dtype, fp8;  // fp8: 0 for int8, 1 for E4M3
    int64_t group;         // columns that share a scale
};

typedef uint8_t ByteVec __attribute__((vector_size(LANES)));

inline Vec absolute(Vec v) { return (Vec)((IntVec)v & 0x7fffffff); }

inline ByteVec low_bytes(IntVec v) {
#if defined(__AVX512F__)
    return (ByteVec)_mm512_cvtepi32_epi8((__m512i)v);
#else
    return __builtin_convertvector(v, ByteVec);
#endif
}

// To the nearest integer, ties to even: the sum with 1.5 * 2^23 has no room for fractions.
inline ByteVec to_int8(Vec v) {
    v = max(min(v, splat(127.0f)), splat(-128.0f));
    return low_bytes((IntVec)(v + splat(0x1.8p23f)));
}

// To the nearest E4M3 number, ties to the even mantissa; NaN stays NaN.
inline ByteVec to_fp8(Vec v) {
    const BitVec bits = (BitVec)v;
    const Vec magnitude = min(absolute(v), splat(448.0f));
    const BitVec m = (BitVec)magnitude;
    const BitVec normal = (m + 0x7ffff + ((m >> 20) & 1) - (120u << 23)) >> 20;  // the carry may reach the exponent
    const BitVec small = (BitVec)(magnitude + splat(0x1p14f)) & 0xff;            // below 2^-6: steps of 2^-9
    BitVec code = magnitude < splat(0x1p-6f) ? small : normal;
    code = v == v ? code : BitVec{} + 0x7f;
    return low_bytes((IntVec)(code | ((bits >> 24) & 0x80)));
}

inline void store_bytes(uint8_t* p, ByteVec v, int64_t n) { memcpy(p, &v, n); }

template <typename T, bool FP8> void values(const T* x, int64_t count, float scale, uint8_t* out) {
    for_vectors<T>(count, [&](int64_t i, auto load, auto) {
        const Vec v = load(x + i) / splat(scale);
        store_bytes(out + i, FP8 ? to_fp8(v) : to_int8(v), std::min<int64_t>(LANES, count - i));
    });
}

// scales: [T, ceil(K / group)], to be written; null: `scale` serves for all.
template <typename T, bool FP8>
void quantise(const QuantiseArgs& args, const T* x, uint8_t* out, float* scales, float scale, int64_t rows, int64_t K) {
    const int64_t groups = (K + args.group - 1) / args.group;
#pragma omp parallel for schedule(static) if (rows * K > 16384)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t start = row * K + g * args.group, count = std::min(args.group, K - g * args.group);
            float own = scale;
            if (scales) {
                Vec most = {};
                for_vectors<T>(count, [&](int64_t i, auto load, auto) {
                    const Vec v = absolute(load(x + start + i));
                    most = v > most ? v : v == v ? most : v;  // NaN, once met, stays
                });
                float reach = 0;
                for (int i = 0; i < LANES; i++) reach = most[i] > reach || most[i] != most[i] ? most[i] : reach;
                own = reach > 0 ? std::max(reach / (FP8 ? 448.0f : 127.5f), 0x1p-126f) : 1.0f;
                scales[row * groups + g] = own;
            }
            values<T, FP8>(x + start, count, own, out + start);
        }
}

extern "C" void ingot_quantise(const QuantiseArgs* args, const void* x, void* out, float* scales, float scale,
                               int64_t rows, int64_t K) {
    for_dtype(args->x_dtype, [&](auto type) {
        using T = decltype(type);
        (args->fp8 ? quantise<T, true> : quantise<T, false>)(*args, (const T*)x, (uint8_t*)out, scales, scale, rows, K);
    });
}
