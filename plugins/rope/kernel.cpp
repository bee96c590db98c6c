// Rotary embedding of the first heads of each row; the rest of the row is copied.
// Arithmetic in the type C of cos_sin: each product and the sum are rounded to it, then the result to T.
#include "../simd.h"

struct RopeArgs {
    int64_t num_heads, head_dim, interleaved, offset, dtype, table_dtype;
};

template <typename C> struct Turned {
    Vec first, second;
    Turned(Vec a, Vec b, Vec cosine, Vec sine)
        : first(rounded<C>(rounded<C>(a * cosine) - rounded<C>(b * sine))),
          second(rounded<C>(rounded<C>(b * cosine) + rounded<C>(a * sine))) {}
};

// head: its r rotated columns; the pairs (i, i + half).
template <typename T, typename C> void turn_halves(const T* x, const C* table, T* y, int64_t half) {
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        Turned<C> turned(load(x + i), load(x + half + i), load(table + i), load(table + half + i));
        store(y + i, turned.first);
        store(y + half + i, turned.second);
    }
    if (const int64_t n = half - i) {
        Turned<C> turned(load_part(x + i, n), load_part(x + half + i, n), load_part(table + i, n),
                         load_part(table + half + i, n));
        store_part(y + i, turned.first, n);
        store_part(y + half + i, turned.second, n);
    }
}

// The pairs (2i, 2i + 1).
template <typename T, typename C> void turn_pairs(const T* x, const C* table, T* y, int64_t half) {
    for (int64_t i = 0; i < half; i += LANES) {
        const int64_t n = half - i < LANES ? half - i : LANES;
        T even[LANES] = {}, odd[LANES] = {};
        for (int64_t j = 0; j < n; j++) even[j] = x[2 * (i + j)], odd[j] = x[2 * (i + j) + 1];
        Turned<C> turned(load(even), load(odd), load_part(table + i, n), load_part(table + half + i, n));
        store(even, turned.first);
        store(odd, turned.second);
        for (int64_t j = 0; j < n; j++) y[2 * (i + j)] = even[j], y[2 * (i + j) + 1] = odd[j];
    }
}

// x, y [rows, W], table [rows, r], all contiguous.
extern "C" void ingot_rope(const RopeArgs* args, const void* x, const void* table, void* y, int64_t rows, int64_t W,
                           int64_t r) {
    for_dtype(args->dtype, [&](auto type) {
        for_dtype(args->table_dtype, [&](auto table_type) {
            using T = decltype(type);
            using C = decltype(table_type);
            if constexpr (sizeof(C) >= sizeof(T)) {  // fp32 activations with 16-bit tables are declined by the binder
#pragma omp parallel for schedule(static) if (rows * W > 8192)
                for (int64_t row = 0; row < rows; row++) {
                    const T* in = (const T*)x + row * W;
                    T* out = (T*)y + row * W;
                    memcpy(out, in, W * sizeof(T));
                    for (int64_t h = 0; h < args->num_heads; h++) {
                        const int64_t at = h * args->head_dim + args->offset;
                        (args->interleaved ? turn_pairs<T, C> : turn_halves<T, C>)(
                            in + at, (const C*)table + row * r, out + at, r / 2);
                    }
                }
            }
        });
    });
}
