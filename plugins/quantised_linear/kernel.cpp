// QuantisedLinear: y[M, N] = (x * x_scale) ((weight - zero) * scale)^T + bias, weights read as they lie in the file.
// Columns that share all their scales are a segment: products within one are summed as integers or exact fp32 products,
// a sum is multiplied by its scales once, and sums of segments are added in fp32, which is rounded once.
// Up to FEW_ROWS weights become operands in registers, since memory is what such a product waits for; with more rows a
// panel of weights is unpacked once into a buffer that stays in cache and serves all of them.
#include "numbers.h"

#include <algorithm>
#include <memory>

struct QuantisedArgs {
    const void* weight;  // [N, K], INT4 two in a byte; contiguous
    const float* scale;  // [N, 1] or [N, S]
    const int8_t* zero;  // shape of scale, or null
    const float* bias;   // [N] or null
    int64_t N, K, segment, scales;      // scales: 1 or S = ceil(K / segment), of a row
    int64_t format, x_dtype, y_dtype;   // x_dtype: DType, or INT8_ROWS
};

struct QuantisedCall {
    const void* x;         // [M, K], contiguous
    const float* x_scale;  // null, one, [M, 1] or [M, S]
    void* y;               // [M, N]
    int64_t M, x_stride, x_step;  // of x_scale, from row to row and from segment to segment
};

constexpr int64_t INT8_ROWS = 3, FEW_ROWS = 4, PIECE = 256;

// A buffer that each thread keeps from call to call.
template <typename T> T* scratch(int64_t size) {
    static thread_local std::unique_ptr<T[]> buffer;
    static thread_local int64_t held = 0;
    if (held < size) buffer.reset(new T[size]), held = size;
    return buffer.get();
}

// A square of dwords: LANES registers, what was lane j of register i becomes lane i of register j.
template <typename Reg> inline void transpose(Reg* r) {
    static_assert(sizeof(Reg) == LANES * 4);
#if defined(__AVX512F__)
    __m512i a[16], b[16];
    UNROLL for (int i = 0; i < 16; i++) a[i] = (__m512i)r[i];
    UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) UNROLL for (int j = 0; j < 2; j++) {
        a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
        a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
    }
    UNROLL for (int i = 0; i < 16; i += 8) UNROLL for (int j = 0; j < 4; j++) {
        b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + 4 + j], 0x88);
        b[i + 4 + j] = _mm512_shuffle_i32x4(a[i + j], a[i + 4 + j], 0xdd);
    }
    UNROLL for (int j = 0; j < 8; j++) {
        r[j] = (Reg)_mm512_shuffle_i32x4(b[j], b[8 + j], 0x88);
        r[8 + j] = (Reg)_mm512_shuffle_i32x4(b[j], b[8 + j], 0xdd);
    }
#else
    uint32_t from[LANES][LANES], to[LANES][LANES];
    memcpy(from, r, sizeof from);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) to[j][i] = from[i][j];
    memcpy(r, to, sizeof to);
#endif
}

template <typename Dot, int FORMAT> struct Product {
    typedef Numbers<Dot, FORMAT> Weights;
    typedef typename Dot::Element X;
    typedef typename Dot::Reg Reg;
    static constexpr bool BYTES = sizeof(X) == 1;
    static constexpr int PACK = Dot::STEP / LANES, VECTORS = 2, PANEL = VECTORS * LANES;
    static constexpr int LINE = FORMAT == INT4 ? 128 : 64;  // columns of 64 bytes

    const QuantisedArgs& args;
    const QuantisedCall& call;
    const int64_t N = args.N, K = args.K, M = call.M, segment = args.segment, S = (K + segment - 1) / segment;

    static int64_t bytes(int64_t columns) { return FORMAT == INT4 ? columns / 2 : columns; }
    const uint8_t* row(int64_t n) const { return (const uint8_t*)args.weight + std::min(n, N - 1) * bytes(K); }
    int zero_of(int64_t n, int64_t s) const {
        return args.zero[std::min(n, N - 1) * args.scales + (args.scales == 1 ? 0 : s)];
    }

    // y[0 .. MB, n .. n + 4). w: four rows of weights. ahead: where those lie that come soon.
    // Rows past the last are computed as copies of the last, and not stored.
    template <int MB>
    void tile(const uint8_t* const (&w)[4], int64_t n, const uint8_t* const* ahead, const int32_t* x_sums) const {
        const X* x[MB];
        UNROLL for (int i = 0; i < MB; i++) x[i] = (const X*)call.x + std::min<int64_t>(i, M - 1) * K;
        const float* scale[4];
        UNROLL for (int j = 0; j < 4; j++) scale[j] = args.scale + std::min(n + j, N - 1) * args.scales;
        Weights reader[4];
        Vec total[4][4] = {};
        for (int64_t s = 0, k = 0; s < S; s++) {
            const int64_t end = std::min(k + segment, K);
            typename Dot::Sum sum[MB][4] = {};
            if constexpr (BYTES) {
                UNROLL for (int j = 0; j < 4; j++) {
                    const int32_t offset = -Weights::OFFSET - (args.zero ? zero_of(n + j, s) : 0);
                    UNROLL for (int i = 0; i < MB; i++)
                        ((IntVec&)sum[i][j])[0] = offset * x_sums[s * M + std::min<int64_t>(i, M - 1)];
                }
            } else if (args.zero) {
                UNROLL for (int j = 0; j < 4; j++) reader[j] = Weights(zero_of(n + j, s));
            }
            for (; k + Dot::STEP <= end; k += Dot::STEP) {
                if (k % LINE == 0)
                    UNROLL for (int j = 0; j < 4; j++) __builtin_prefetch(ahead[j] + bytes(k), 0, 2);
                Reg b[4];
                UNROLL for (int j = 0; j < 4; j++) b[j] = reader[j].read(w[j], k);
                UNROLL for (int i = 0; i < MB; i++) {
                    Reg a = Dot::read(x[i] + k);
                    UNROLL for (int j = 0; j < 4; j++) sum[i][j] = Dot::add(sum[i][j], a, b[j]);
                }
            }
            if (const int64_t left = end - k; left > 0) {
                UNROLL for (int i = 0; i < MB; i++)
                    UNROLL for (int j = 0; j < 4; j++)
                        sum[i][j] = Dot::add(sum[i][j], Dot::read_part(x[i] + k, left), reader[j].part(w[j], k, left));
                k = end;
            }
            float x_scale[MB];
            UNROLL for (int i = 0; i < MB; i++)
                x_scale[i] = call.x_step ? call.x_scale[std::min<int64_t>(i, M - 1) * call.x_stride + s] : 1.0f;
            UNROLL for (int j = 0; j < 4; j++) {
                const float w_scale = scale[j][args.scales == 1 ? 0 : s];
                UNROLL for (int i = 0; i < MB; i++) total[i][j] += Dot::value(sum[i][j]) * splat(w_scale * x_scale[i]);
            }
        }
        if (call.x_scale && !call.x_step)
            UNROLL for (int i = 0; i < MB; i++)
                UNROLL for (int j = 0; j < 4; j++)
                    total[i][j] *= splat(call.x_scale[std::min<int64_t>(i, M - 1) * call.x_stride]);
        const int64_t columns = std::min<int64_t>(4, N - n), rows = std::min<int64_t>(MB, M);
        const Vec bias = args.bias ? load_part(args.bias + n, columns) : Vec{};
        for_dtype(args.y_dtype, [&](auto type) {
            using Y = decltype(type);
            Y sums[16];
            sum16(total, bias, sums);
            for (int i = 0; i < rows; i++)
                memcpy((Y*)call.y + i * N + n, sums + 4 * i, columns * sizeof(Y));
        });
    }

    // Columns k .. end of PANEL rows of weights from n on, one dword of each row side by side: [(end - k) / PACK, PANEL].
    // Zeros fill the last dword, and copies of the last row the panel.
    void unpack(int64_t n, int64_t s, int64_t k, int64_t end, Reg* to) const {
        for (int64_t v = 0; v < VECTORS; v++, n += LANES) {
            const uint8_t* w[LANES];
            Weights weights[LANES];
            for (int i = 0; i < LANES; i++) {
                w[i] = row(n + i);
                if (!BYTES && args.zero) weights[i] = Weights(zero_of(n + i, s));
            }
            Reg* out = to + v;
            for (int64_t at = k; at < end; at += Dot::STEP) {
                const int64_t left = end - at;
                Reg square[LANES];
                UNROLL for (int i = 0; i < LANES; i++) {
                    const Weights& of = weights[i];
                    square[i] = left < Dot::STEP ? Dot::cut(of.part(w[i], at, left), left) : of.read(w[i], at);
                }
                if (at % LINE == 0)
                    UNROLL for (int i = 0; i < LANES; i++) __builtin_prefetch(w[i] + bytes(PANEL * K + at), 0, 2);
                transpose(square);
                for (int j = 0; j < LANES && j * PACK < left; j++, out += VECTORS) *out = square[j];
            }
        }
    }

    // total[MB, PANEL] += x[m .. m + MB, k .. end) weights, times their scales.
    template <int MB> void block(int64_t m, int64_t s, int64_t k, int64_t end, const Reg* w, const Vec* scale,
                                 const IntVec* offset, const int32_t* x_sums, Vec* total) const {
        const X* x = (const X*)call.x + m * K;
        typename Dot::Sum sum[MB][VECTORS] = {};
        if constexpr (BYTES)
            UNROLL for (int i = 0; i < MB; i++)
                UNROLL for (int v = 0; v < VECTORS; v++) sum[i][v] = (typename Dot::Sum)(offset[v] * x_sums[m + i]);
        const auto step = [&](const X* from, int64_t n) {
            UNROLL for (int i = 0; i < MB; i++) {
                const Reg a = Dot::repeated(from + i * K, n);
                UNROLL for (int v = 0; v < VECTORS; v++) sum[i][v] = Dot::add(sum[i][v], a, w[v]);
            }
            w += VECTORS;
        };
        for (; k + PACK <= end; k += PACK) step(x + k, PACK);
        if (k < end) step(x + k, end - k);
        UNROLL for (int i = 0; i < MB; i++) {
            const float x_scale = call.x_step ? call.x_scale[(m + i) * call.x_stride + s] : 1.0f;
            UNROLL for (int v = 0; v < VECTORS; v++)
                total[i * VECTORS + v] += Dot::value(sum[i][v]) * (scale[v] * splat(x_scale));
        }
    }

    void few_rows() const {
        const int32_t* x_sums = BYTES ? sums_of_x(segment) : nullptr;
#pragma omp parallel for schedule(static) if (N * K * M > 32768)  // below, waking a thread costs more than it saves
        for (int64_t n = 0; n < N; n += 4) {
            const uint8_t *w[4], *ahead[4];
            for (int j = 0; j < 4; j++) w[j] = row(n + j), ahead[j] = row(n + 8 + j);
            switch (M) {
                case 1: tile<1>(w, n, ahead, x_sums); break;
                case 2: tile<2>(w, n, ahead, x_sums); break;
                default: tile<4>(w, n, ahead, x_sums);
            }
        }
    }

    void many_rows() const {
        const int32_t* x_sums = BYTES ? sums_of_x(PIECE) : nullptr;
#pragma omp parallel for schedule(static)
        for (int64_t n = 0; n < N; n += PANEL) {
            Reg* w = scratch<Reg>(PIECE / PACK * VECTORS + M * VECTORS);
            Vec* total = (Vec*)(w + PIECE / PACK * VECTORS);
            std::fill(total, total + M * VECTORS, Vec{});
            Vec scale[VECTORS];
            IntVec offset[VECTORS] = {};
            const int32_t* sums = x_sums;
            for (int64_t s = 0; s < S; s++) {
                for (int i = 0; i < PANEL; i++) {
                    ((float*)scale)[i] = args.scale[std::min(n + i, N - 1) * args.scales + (args.scales == 1 ? 0 : s)];
                    if constexpr (BYTES)
                        ((int32_t*)offset)[i] = -Weights::OFFSET - (args.zero ? zero_of(n + i, s) : 0);
                }
                const int64_t last = std::min((s + 1) * segment, K);
                for (int64_t k = s * segment, end; k < last; k = end, sums += M) {
                    end = std::min(k + PIECE, last);
                    unpack(n, s, k, end, w);
                    int64_t m = 0;
                    for (; m + 8 <= M; m += 8) block<8>(m, s, k, end, w, scale, offset, sums, total + m * VECTORS);
                    for (; m + 2 <= M; m += 2) block<2>(m, s, k, end, w, scale, offset, sums, total + m * VECTORS);
                    if (m < M) block<1>(m, s, k, end, w, scale, offset, sums, total + m * VECTORS);
                }
            }
            for_dtype(args.y_dtype, [&](auto type) { write((decltype(type)*)call.y, n, total); });
        }
    }

    template <typename Y> void write(Y* y, int64_t n, const Vec* total) const {
        for (int v = 0; v < VECTORS && n < N; v++, n += LANES) {
            const int64_t columns = std::min<int64_t>(LANES, N - n);
            const Vec bias = args.bias ? load_part(args.bias + n, columns) : Vec{};
            for (int64_t m = 0; m < M; m++) {
                const float x_scale = call.x_scale && !call.x_step ? call.x_scale[m * call.x_stride] : 1.0f;
                const Vec sum = total[m * VECTORS + v] * splat(x_scale) + bias;
                if (columns == LANES) store(y + m * N + n, sum);
                else store_part(y + m * N + n, sum, columns);
            }
        }
    }

    // Sums of int8 x over what ends with a segment or after `longest` columns, whichever is first: [pieces, M].
    const int32_t* sums_of_x(int64_t longest) const {
        const int64_t pieces = (std::min(segment, K) + longest - 1) / longest;
        int32_t* sums = scratch<int32_t>(S * pieces * M);
        if constexpr (BYTES)
            for (int64_t s = 0; s < S; s++)
                for (int64_t p = 0; p < pieces; p++) {
                    const int64_t k = s * segment + p * longest, end = std::min(std::min(k + longest, (s + 1) * segment), K);
                    for (int64_t m = 0; m < M; m++)
                        sums[(s * pieces + p) * M + m] = k < end ? Dot::sum((const X*)call.x + m * K + k, end - k) : 0;
                }
        return sums;
    }

    void run() const {
        if (N == 0 || M == 0) return;
        if (M > FEW_ROWS) return many_rows();
        few_rows();
    }
};

template <typename Dot> void product(const QuantisedArgs& args, const QuantisedCall& call) {
    switch (args.format) {
        case INT4: return Product<Dot, INT4>{args, call}.run();
        case INT8: return Product<Dot, INT8>{args, call}.run();
        case FP8:
            if constexpr (sizeof(typename Dot::Element) > 1) return Product<Dot, FP8>{args, call}.run();
    }
}

extern "C" void ingot_quantised_linear(const QuantisedArgs* args, const QuantisedCall* call) {
    switch (args->x_dtype) {
        case FLOAT32: return product<FloatDot<float>>(*args, *call);
        case FLOAT16: return product<FloatDot<fp16>>(*args, *call);
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
        case BFLOAT16: return product<BFloatDot>(*args, *call);
#else
        case BFLOAT16: return product<FloatDot<bf16>>(*args, *call);
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
        case INT8_ROWS: return product<ByteDot>(*args, *call);
#endif
    }
}

// Whether products of int8 with integers are made as such; x is to be converted where not.
extern "C" int64_t ingot_multiplies_bytes() {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return 1;
#else
    return 0;
#endif
}
