// Element types of KV pages in 8 bits, which simd.h's loads and stores are extended to.
// A number that is loaded is `unit` times too small (fp8 passes through fp16, whose exponent has another bias), which
// costs nothing where it is folded into the pages' scale. NaN stays NaN in fp8, and becomes 0 in int8.
#pragma once
#include "../simd.h"

struct page_fp8 { uint8_t bits; };  // E4M3: no infinities, 0x7f and 0xff are NaN
struct page_int8 { int8_t bits; };

template <typename P> constexpr float unit = 1.0f;
template <> constexpr float unit<page_fp8> = 256.0f;

typedef uint8_t ByteVec __attribute__((vector_size(LANES)));

inline Vec load(const page_int8* p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
    int8_t bytes[LANES];
    memcpy(bytes, p, LANES);
    Vec v;
    for (int i = 0; i < LANES; i++) v[i] = bytes[i];
    return v;
#endif
}

inline Vec load(const page_fp8* p) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
    const __m256i size = _mm256_and_si256(bytes, _mm256_set1_epi16(0x7f));
    // exponent and mantissa to their places in fp16, then the sign above them
    __m256i half = _mm256_or_si256(_mm256_slli_epi16(size, 7),
                                   _mm256_slli_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(0x80)), 8));
    const __mmask16 nan = _mm256_cmpeq_epi16_mask(size, _mm256_set1_epi16(0x7f));
    half = _mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00));
    return (Vec)_mm512_cvtph_ps(half);
#else
    BitVec bits;
    uint8_t bytes[LANES];
    memcpy(bytes, p, LANES);
    for (int i = 0; i < LANES; i++) bits[i] = bytes[i];
    const BitVec size = bits & 0x7f;
    // as fp32 it is 2^-120 of itself; the product is exact, and brings it to 2^-8
    Vec v = (Vec)((Vec)(size << 20) * splat(0x1p112f));
    v = size == 0x7f ? splat(NAN) : v;
    return (Vec)((BitVec)v | (bits & 0x80) << 24);
#endif
}

inline void store_bytes(void* p, BitVec bits) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)bits));
#else
    const ByteVec bytes = __builtin_convertvector(bits, ByteVec);
    memcpy(p, &bytes, sizeof bytes);
#endif
}

// To the nearest integer, ties to even, saturated.
inline void store(page_int8* p, Vec v) {
    v = v == v ? min(max(v, splat(-128.0f)), splat(127.0f)) : Vec{};
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    v = (v + magic) - magic;
    store_bytes(p, (BitVec)__builtin_convertvector(v, IntVec));
}

// To the nearest E4M3 number, ties to even, saturated at 448.
inline void store(page_fp8* p, Vec v) {
    const BitVec sign = (BitVec)v >> 24 & 0x80, size = (BitVec)v & 0x7fffffff;
    const Vec x = min((Vec)size, splat(448.0f));
    // from 2^-6 on three bits of mantissa stay, and the exponent's bias is 7 instead of 127
    BitVec bits = (BitVec)x;
    bits = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    // below it numbers are multiples of 2^-9: adding 2^14 leaves their count in the last bits
    const BitVec small = (BitVec)(x + splat(16384.0f)) & 0xf;
    bits = x < splat(0x1p-6f) ? small : bits;
    bits = size > 0x7f800000 ? BitVec{} + 0x7f : bits;
    store_bytes(p, bits | sign);
}
