// Weights in few bits as operands of dot products, and the dot products themselves.
// A `Dot` says what multiplies: STEP elements a register, added up in an accumulator. A `Numbers<Dot, FORMAT>` reads
// weights for it, less their zero point: integers of up to 9 bits and FP8 are exact in bf16, so no product is rounded
// before it is summed. Order is that of memory, and nothing is packed anew: the file's bytes are what is read.
// Invariant: part(row, k, n) touches exactly the bytes of n elements, and what lies behind them counts as finite.
// FP8 weights are numbers: the two NaN codes of E4M3 read as 480.
#pragma once
#include "../simd.h"

enum Format : int64_t { INT4 = 0, INT8 = 1, FP8 = 2 };

typedef int8_t ByteVec __attribute__((vector_size(LANES)));

// 0, 1, 2, ...
inline IntVec counted_ints() { return __builtin_convertvector(counted(), IntVec); }

template <typename X> struct FloatDot {  // of any activations, in fp32
    static constexpr int STEP = LANES;
    typedef X Element;
    typedef Vec Reg;
    typedef Vec Sum;
    static Reg read(const X* p) { return load(p); }
    static Reg read_part(const X* p, int64_t n) { return load_part(p, n); }
    static Sum add(Sum sum, Reg x, Reg w) { return sum + x * w; }
    static Vec value(Sum sum) { return sum; }
    static Reg repeated(const X* p, int64_t) { return splat(to_float(*p)); }
    static Reg cut(Reg w, int64_t n) { return counted_ints() < (int32_t)n ? w : Reg{}; }
};

inline IntVec widened(ByteVec bytes) {
#if defined(__AVX512F__)
    return (IntVec)_mm512_cvtepi8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
    int64_t eight;
    memcpy(&eight, &bytes, 8);
    return (IntVec)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(eight));
#else
    return __builtin_convertvector(bytes, IntVec);
#endif
}

inline Vec converted(IntVec v) { return __builtin_convertvector(v, Vec); }

inline ByteVec bytes(const uint8_t* p) { ByteVec v; memcpy(&v, p, sizeof v); return v; }

template <typename Dot, int FORMAT> struct Numbers;

template <typename X> struct Numbers<FloatDot<X>, INT8> {
    Vec zero;
    explicit Numbers(int zero = 0) : zero(splat(zero)) {}
    Vec read(const uint8_t* row, int64_t k) const { return converted(widened(bytes(row + k))) - zero; }
    Vec part(const uint8_t* row, int64_t k, int64_t n) const {
        uint8_t buffer[LANES] = {};
        memcpy(buffer, row + k, n);
        return read(buffer, 0);
    }
};

template <typename X> struct Numbers<FloatDot<X>, INT4> {
    Vec zero;
    explicit Numbers(int zero = 0) : zero(splat(zero)) {}
    Vec read(const uint8_t* row, int64_t k) const {
        IntVec q;  // the number in the upper four bits
#if defined(__AVX512F__)
        __m512i pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(row + k / 2)));
        q = (IntVec)_mm512_or_si512(_mm512_slli_epi64(pairs, 28), _mm512_slli_epi64(pairs, 56));
#else
        static const BitVec up = {28, 24, 20, 16, 12, 8, 4, 0};
        uint32_t eight;
        memcpy(&eight, row + k / 2, 4);
        q = (IntVec)((BitVec{} + eight) << up);
#endif
        return converted(q >> 28) - zero;
    }
    Vec part(const uint8_t* row, int64_t k, int64_t n) const {
        uint8_t buffer[LANES / 2] = {};
        memcpy(buffer, row + k / 2, (n + 1) / 2);
        return read(buffer, 0);
    }
};

template <typename X> struct Numbers<FloatDot<X>, FP8> {
    explicit Numbers(int = 0) {}
    Vec read(const uint8_t* row, int64_t k) const {
        BitVec code = (BitVec)widened(bytes(row + k));
        BitVec rest = code & 0x7f;
        Vec normal = (Vec)((rest << 20) + (120u << 23));             // the exponents' biases differ by 120
        Vec small = (normal - splat(0x1p-7f)) * splat(2.0f);         // exponent 0: no leading one
        Vec magnitude = (IntVec)rest < 8 ? small : normal;
        return (Vec)((BitVec)magnitude | (code & 0x80000000u));      // the sign was spread by widening
    }
    Vec part(const uint8_t* row, int64_t k, int64_t n) const {
        uint8_t buffer[LANES] = {};
        memcpy(buffer, row + k, n);
        return read(buffer, 0);
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
struct BFloatDot {  // of bf16 activations: 32 products an instruction, no conversion of x
    static constexpr int STEP = 32;
    typedef bf16 Element;
    typedef __m512i Reg;
    typedef Vec Sum;
    static Reg read(const bf16* p) { return _mm512_loadu_si512(p); }
    static Reg read_part(const bf16* p, int64_t n) { return _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p); }
    static Sum add(Sum sum, Reg x, Reg w) { return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w); }
    static Vec value(Sum sum) { return sum; }
    static Reg repeated(const bf16* p, int64_t n) {
        uint32_t pair = 0;
        memcpy(&pair, p, 2 * n);
        return _mm512_set1_epi32(pair);
    }
    static Reg cut(Reg w, int64_t n) { return _mm512_maskz_mov_epi16((__mmask32)((1ull << n) - 1), w); }
};

inline __m512i paired(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

template <> struct Numbers<BFloatDot, INT4> {
    __m512i table;  // number - zero of each code, twice: a code's fifth bit may be anything
    explicit Numbers(int zero = 0) {
        IntVec codes = counted_ints();
        __m512 v = (__m512)converted(((codes ^ 8) - 8) - zero);
        table = paired(v, v);
    }
    __m512i read(const uint8_t* row, int64_t k) const { return look_up(_mm_loadu_si128((const __m128i*)(row + k / 2))); }
    __m512i part(const uint8_t* row, int64_t k, int64_t n) const {
        __mmask16 mask = (__mmask16)((1u << ((n + 1) / 2)) - 1);
        return look_up(_mm_maskz_loadu_epi8(mask, row + k / 2));
    }
    __m512i look_up(__m128i packed) const {
#if defined(__AVX512VBMI__)
        const __m512i where = _mm512_set1_epi64(0x000c000800040000);  // the bit at which each word's code begins
        return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(where, _mm512_cvtepu16_epi64(packed)), table);
#else
        const __m512i pairs = _mm512_cvtepu8_epi32(packed);
        return _mm512_permutexvar_epi16(_mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12)), table);
#endif
    }
};

template <> struct Numbers<BFloatDot, INT8> {
    __m512i zero;
    explicit Numbers(int zero = 0) : zero(_mm512_set1_epi32(zero)) {}
    __m512i read(const uint8_t* row, int64_t k) const { return convert(_mm256_loadu_si256((const __m256i*)(row + k))); }
    __m512i part(const uint8_t* row, int64_t k, int64_t n) const {
        return convert(_mm256_maskz_loadu_epi8((__mmask32)((1ull << n) - 1), row + k));
    }
    __m512i convert(__m256i bytes) const {
        __m512i low = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes));
        __m512i high = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1));
        return paired(_mm512_cvtepi32_ps(_mm512_sub_epi32(low, zero)), _mm512_cvtepi32_ps(_mm512_sub_epi32(high, zero)));
    }
};

template <> struct Numbers<BFloatDot, FP8> {
    __m512i small;  // those without a leading one: m / 512
    explicit Numbers(int = 0) {
        __m512 v = (__m512)(counted() * splat(0x1p-9f));
        small = paired(v, v);
    }
    __m512i read(const uint8_t* row, int64_t k) const { return convert(_mm256_loadu_si256((const __m256i*)(row + k))); }
    __m512i part(const uint8_t* row, int64_t k, int64_t n) const {
        return convert(_mm256_maskz_loadu_epi8((__mmask32)((1ull << n) - 1), row + k));
    }
    __m512i convert(__m256i bytes) const {
        __m512i code = _mm512_cvtepi8_epi16(bytes), rest = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
        __m512i magnitude = _mm512_add_epi16(_mm512_slli_epi16(rest, 4), _mm512_set1_epi16(120 << 7));
        __mmask32 is_small = _mm512_testn_epi16_mask(code, _mm512_set1_epi16(0x78));
        magnitude = _mm512_mask_permutexvar_epi16(magnitude, is_small, code, small);  // the index is code & 31
        return _mm512_ternarylogic_epi32(magnitude, code, _mm512_set1_epi16((short)0x8000), 0xf8);  // a | (b & c)
    }
};
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
// Of int8 activations. The instruction takes unsigned times signed, so weights are moved up by OFFSET, and OFFSET times
// the sum of x (`kernel.cpp` has it ready, zero point included) is taken off where an accumulator begins.
struct ByteDot {
    static constexpr int STEP = 64;
    typedef int8_t Element;
    typedef __m512i Reg;
    typedef IntVec Sum;
    static __mmask64 first(int64_t n) { return (__mmask64)((1ull << n) - 1); }  // n < 64
    static Reg read(const int8_t* p) { return _mm512_loadu_si512(p); }
    static Reg read_part(const int8_t* p, int64_t n) { return _mm512_maskz_loadu_epi8(first(n), p); }
    static Sum add(Sum sum, Reg x, Reg w) { return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, w, x); }
    static Vec value(Sum sum) { return converted(sum); }
    static Reg repeated(const int8_t* p, int64_t n) {
        uint32_t four = 0;
        memcpy(&four, p, n);
        return _mm512_set1_epi32(four);
    }
    static Reg cut(Reg w, int64_t n) { return _mm512_maskz_mov_epi8(first(n), w); }
    static int32_t sum(const int8_t* p, int64_t n) {
        Sum sums = {};
        for (; n >= STEP; p += STEP, n -= STEP) sums = add(sums, read(p), _mm512_set1_epi8(1));
        if (n) sums = add(sums, read_part(p, n), _mm512_set1_epi8(1));
        return _mm512_reduce_add_epi32((__m512i)sums);
    }
};

template <> struct Numbers<ByteDot, INT8> {
    static constexpr int OFFSET = 128;
    explicit Numbers(int = 0) {}
    __m512i read(const uint8_t* row, int64_t k) const { return up(_mm512_loadu_si512(row + k)); }
    __m512i part(const uint8_t* row, int64_t k, int64_t n) const { return up(_mm512_maskz_loadu_epi8(ByteDot::first(n), row + k)); }
    __m512i up(__m512i w) const { return _mm512_xor_si512(w, _mm512_set1_epi8((char)0x80)); }
};

template <> struct Numbers<ByteDot, INT4> {
    static constexpr int OFFSET = 8;
    explicit Numbers(int = 0) {}
    __m512i read(const uint8_t* row, int64_t k) const { return up(_mm256_loadu_si256((const __m256i*)(row + k / 2))); }
    __m512i part(const uint8_t* row, int64_t k, int64_t n) const {
        return up(_mm256_maskz_loadu_epi8((__mmask32)((1ull << (n + 1) / 2) - 1), row + k / 2));
    }
    __m512i up(__m256i packed) const {
        __m512i pairs = _mm512_cvtepu8_epi16(packed);
        pairs = _mm512_ternarylogic_epi32(pairs, _mm512_slli_epi16(pairs, 4), _mm512_set1_epi8(15), 0xa8);  // (a | b) & c
        return _mm512_xor_si512(pairs, _mm512_set1_epi8(8));
    }
};
#endif
