// Vectors of floats for the CPU kernels: GCC/Clang vector extensions, so the same source serves AVX2, AVX-512 and NEON.
// Activations are float, bf16 or fp16 in memory and always float in registers; rounding to memory is to nearest even,
// bit for bit torch's. Intrinsics appear only where the extensions have no word for an instruction.
// Invariant: load_part and store_part touch exactly n elements; whatever lies behind them may be unmapped or NaN.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef uint32_t BitVec __attribute__((vector_size(LANES * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(LANES * 2)));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// Which element type a launch computes in: the binder's code for torch.float32, bfloat16, float16.
enum DType : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

inline Vec splat(float value) { return Vec{} + value; }

inline Vec load(const float* p) { Vec v; memcpy(&v, p, sizeof v); return v; }

// GCC 12 turns __builtin_convertvector between 16 and 32 bits into a dozen shuffles where AVX-512 has one instruction.
inline BitVec widened(HalfVec half) {
#if defined(__AVX512F__)
    return (BitVec)_mm512_cvtepu16_epi32((__m256i)half);
#else
    return __builtin_convertvector(half, BitVec);
#endif
}

inline HalfVec narrowed(BitVec bits) {
#if defined(__AVX512F__)
    return (HalfVec)_mm512_cvtepi32_epi16((__m512i)bits);
#else
    return __builtin_convertvector(bits, HalfVec);
#endif
}

inline Vec load(const bf16* p) {
    HalfVec half;
    memcpy(&half, p, sizeof half);
    return (Vec)(widened(half) << 16);
}

inline Vec load(const fp16* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    Vec v;
    for (int i = 0; i < LANES; i++) { _Float16 half; memcpy(&half, p + i, 2); v[i] = (float)half; }
    return v;
#endif
}

inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

inline void store(bf16* p, Vec v) {
    BitVec bits = (BitVec)v;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    bits = v == v ? bits : BitVec{} + 0x7fc0;  // the addition would turn some NaNs into zero
    HalfVec half = narrowed(bits);
    memcpy(p, &half, sizeof half);
}

inline void store(fp16* p, Vec v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < LANES; i++) { _Float16 half = (_Float16)v[i]; memcpy(p + i, &half, 2); }
#endif
}

template <typename T> inline Vec load_part(const T* p, int64_t n) {  // lanes past n are zero
    T buffer[LANES] = {};
    memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
}

template <typename T> inline void store_part(T* p, Vec v, int64_t n) {
    T buffer[LANES];
    store(buffer, v);
    memcpy(p, buffer, n * sizeof(T));
}

// body(i, n): the n = LANES elements from i on; once more with n < LANES for what is left.
template <typename T, typename Body> inline void for_vectors(int64_t count, Body body) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        body(i, [](const T* p) { return load(p); }, [](T* p, Vec v) { store(p, v); });
    if (int64_t n = count - i)
        body(i, [n](const T* p) { return load_part(p, n); }, [n](T* p, Vec v) { store_part(p, v, n); });
}

template <typename T> inline float to_float(T value) { return load_part(&value, 1)[0]; }
template <> inline float to_float(float value) { return value; }
template <> inline float to_float(bf16 value) {
    uint32_t bits = (uint32_t)value.bits << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// v as it reads after a trip through memory in T: what "rounded to the activation type" means.
template <typename T> inline Vec rounded(Vec v) { T buffer[LANES]; store(buffer, v); return load(buffer); }
template <> inline Vec rounded<float>(Vec v) { return v; }

inline float sum(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
#endif
}

#if defined(__AVX512F__)
// Sums of the 16 lanes of four vectors, still apart by quarters: lane 4 q + i is the sum of quarter q of v[i].
inline __m512 quarters(const Vec* v) {
    __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}

inline __m512 add_halves(__m512 a, __m512 b) {  // quarters 0 + 1 and 2 + 3 of a, then of b
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
#endif

// The sums of four vectors at once: 14 instructions instead of four times 8.
inline void sum4(const Vec* v, float* out) {
#if defined(__AVX512F__)
    __m512 abcd = quarters(v);
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
    for (int i = 0; i < 4; i++) out[i] = sum(v[i]);
#endif
}

// out[4 m + n] = the sum of v[m][n], plus offset[n].
template <typename T> inline void sum16(const Vec (*v)[4], Vec offset, T* out) {
#if defined(__AVX512F__)
    __m512 sums = add_halves(add_halves(quarters(v[0]), quarters(v[1])), add_halves(quarters(v[2]), quarters(v[3])));
    store(out, (Vec)_mm512_add_ps(sums, _mm512_shuffle_f32x4((__m512)offset, (__m512)offset, 0)));
#else
    for (int m = 0; m < 4; m++) {
        float sums[LANES] = {};
        sum4(v[m], sums);
        store_part(out + 4 * m, load(sums) + offset, 4);
    }
#endif
}

// The greatest lane.
inline float largest(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
#endif
}

// 0, 1, 2, ...
inline Vec counted() {
    static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load(lanes);
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

// e^x to 2 ulp (range reduction and polynomial after Cephes expf). Below -87.3 the result stays the smallest normal
// number, above 88.3 it stays finite: callers mask what must be exactly zero. NaN stays NaN.
inline Vec exp(Vec x) {
    Vec bounded = x > splat(88.3f) ? splat(88.3f) : x < splat(-87.3f) ? splat(-87.3f) : x;
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Vec n = (bounded * splat(1.44269504f) + magic) - magic;
    Vec r = bounded - n * splat(0.693359375f) - n * splat(-2.12194440e-4f);
    Vec p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    return (Vec)((IntVec)p + (__builtin_convertvector(n, IntVec) << 23));
}

inline Vec tanh(Vec x) { return splat(1.0f) - splat(2.0f) / (exp(x + x) + splat(1.0f)); }

// Calls body(T{}) with the element type of that code.
template <typename Body> inline void for_dtype(int64_t dtype, Body body) {
    switch (dtype) {
        case FLOAT32: return body(float{});
        case BFLOAT16: return body(bf16{});
        case FLOAT16: return body(fp16{});
    }
}
