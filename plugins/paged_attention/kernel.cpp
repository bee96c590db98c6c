// KV write and attention over pages, decode and prompt alike, without gathering the pages first.
// A task is some query tokens of one sequence and one KV head: all query heads that share the KV head are its rows, so
// each key is read once for them (GQA packing). Keys pass in blocks of BLOCK under an online softmax (Milakov and
// Gimelshein, arXiv:1805.02867) in fp32; a long context with few tasks is split over keys and merged (Flash-Decoding).
// Pages hold the activations' type T, or fewer bits P with a scale for each KV head: that of the keys is folded into the
// queries, that of the values into the results, so that reading them costs their conversion alone.
// Invariant: no key outside a query's reach is ever read, so unused pages may hold NaN.
#include "pages.h"

#include <algorithm>
#include <cfloat>
#include <type_traits>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

enum Pages : int64_t { PLAIN = 0, INT8 = 1, FP8 = 2 };  // PLAIN: of the activations' type

struct AttentionArgs {
    int64_t num_heads, num_kv_heads, head_dim, v_head_dim, page_size, window, dtype, pages;
    float scale, softcap;
};

struct AttentionCall {
    const void *query, *key, *value;  // [T, ...] with row strides in elements
    int64_t query_stride, key_stride, value_stride;
    const int32_t *slots, *query_start, *kv_len, *pages;  // [T], [S+1], [S], [S, table_width]
    int64_t num_tokens, num_sequences, table_width;
    void *k_pages, *v_pages;  // [pages, page_size, num_kv_heads, head_dim or v_head_dim]
    const float *k_scale, *v_scale;  // [num_kv_heads], null where pages are plain
    const void* sinks;        // [num_heads] or null
    void* y;                  // [T, num_heads * v_head_dim]
    const int32_t* ancestors; // [T] or null: bit b says whether the token sees key kv_len - TREE + b
};

constexpr int TREE = 32;  // last keys of a sequence that may be nodes of a tree of drafts
constexpr int BLOCK = 64, ROWS = 4, MAX_ROWS = 64;  // keys of a block; rows of a register tile; rows of a task

struct Task {
    int64_t sequence, token, num_tokens;  // token: first query token, counted in the sequence
    int64_t kv_head, num_kv_heads, low, high;  // low, high: keys
};

inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Running softmax of the rows of a task, in the caller's memory: maximum, sum and weighted values so far.
struct Rows {
    float *most, *mass, *value;  // [rows], [rows], [rows, padded(v_head_dim)]
    static int64_t size(int64_t rows, int64_t width) { return rows * (width + 2); }
    Rows(float* memory, int64_t rows) : most(memory), mass(memory + rows), value(memory + 2 * rows) {}
    void clear(int64_t rows, int64_t width) {
        std::fill(most, most + rows, -FLT_MAX);
        std::fill(mass, most + size(rows, width), 0.0f);
    }
};

// A buffer that each thread keeps from call to call; what it held is not kept.
template <typename Tag> float* scratch(int64_t size) {
    static thread_local std::vector<float> buffer;
    if ((int64_t)buffer.size() < size) buffer.resize(size);
    return buffer.data();
}

// The rows of the next block, to be fetched while this one is computed: pages lie anywhere, and the CPU's own prefetcher
// ends with a page. One row at a time between the products: asked for at once, they would make the core wait for them.
template <typename T> struct Ahead {
    const T* rows[BLOCK];
    int64_t count, width;
    // always inlined: GCC takes a function that only prefetches for one without effect, and drops its calls
    __attribute__((always_inline)) void fetch(int64_t row) const {
        if (row < count)
            for (int64_t d = 0; d < width; d += 64 / sizeof(T)) __builtin_prefetch(rows[row] + d, 0, 2);
    }
};

// out[r] = q[r] @ k for R rows.
template <int R, typename K, typename T>
inline void scores(const float* q, int64_t width, const K* const* k, int64_t num_keys, float* out,
                   const Ahead<T>& ahead) {
    for (int64_t i = 0; i < num_keys; i += 4) {  // the pointers are padded to a multiple of 4
        for (int64_t j = i; j < i + 4; j++) ahead.fetch(j);
        Vec acc[R][4] = {};
        for (int64_t d = 0; d < width; d += LANES) {
            Vec key[4];
            UNROLL for (int j = 0; j < 4; j++) key[j] = load(k[i + j] + d);
            UNROLL for (int r = 0; r < R; r++) {
                Vec row = load(q + r * width + d);
                UNROLL for (int j = 0; j < 4; j++) acc[r][j] += row * key[j];
            }
        }
        UNROLL for (int r = 0; r < R; r++) sum4(acc[r], out + r * BLOCK + i);
    }
}

// value[r] = value[r] * shrink[r] + weights[r] @ v, for C vectors of columns from `at` on.
template <int R, int C, typename V, typename T>
inline void weigh(const float* weights, const float* shrink, const V* const* v, int64_t num_keys, float* value,
                  int64_t width, int64_t at, const Ahead<T>& ahead) {
    Vec acc[R][C];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) acc[r][c] = load(value + r * width + at + c * LANES) * splat(shrink[r]);
    for (int64_t i = 0; i < num_keys; i++) {
        ahead.fetch(i);
        Vec column[C];
        UNROLL for (int c = 0; c < C; c++) column[c] = load(v[i] + at + c * LANES);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < C; c++) acc[r][c] += splat(weights[r * BLOCK + i]) * column[c];
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) store(value + r * width + at + c * LANES, acc[r][c]);
}

// Pointers to the rows of keys [from, from + n) in the pages of one KV head; padded to a multiple of 4 by repetition.
template <typename T>
void locate(const T* pool, int64_t width, int64_t kv_head, const AttentionArgs& args, const int32_t* table,
            int64_t from, int64_t n, const T** rows) {
    const int64_t stride = args.num_kv_heads * width, last = from + n - 1;
    for (int64_t key = from; key <= last;) {
        const int64_t page = key / args.page_size, offset = key % args.page_size;
        const int64_t end = std::min(last, key + args.page_size - 1 - offset);  // divided once a page, not once a key
        const T* row = pool + (table[page] * args.page_size + offset) * stride + kv_head * width;
        for (; key <= end; key++, row += stride) *rows++ = row;
    }
    for (int64_t i = n; n && i % 4; i++, rows++) *rows = rows[-1];
}

// The same rows as fp32, padded to whole vectors with zeros: worth it where many rows of queries read them.
template <typename T> void convert(const T* const* rows, int64_t n, int64_t width, float* copy, const float** copies) {
    for (int64_t i = 0; i < n; i++, copy += padded(width)) {
        for_vectors<T>(width, [&](int64_t d, auto read, auto) { store(copy + d, read(rows[i] + d)); });
        copies[i] = copy;
    }
    for (int64_t i = n; i % 4; i++) copies[i] = copies[n - 1];
}

// Calls body(R, r) for tiles of R <= ROWS rows from r on, R a constant.
template <typename Body> inline void for_tiles(int64_t num_rows, Body body) {
    int64_t r = 0;
    for (; r + ROWS <= num_rows; r += ROWS) body(std::integral_constant<int, ROWS>{}, r);
    switch (num_rows - r) {
        case 3: return body(std::integral_constant<int, 3>{}, r);
        case 2: return body(std::integral_constant<int, 2>{}, r);
        case 1: return body(std::integral_constant<int, 1>{}, r);
    }
}

// Keys before the count-th of the last TREE that a token does not see: so many positions it is earlier than its place.
inline int64_t hidden(int32_t ancestors, int64_t count) {
    const uint32_t before = count <= 0 ? 0 : count >= TREE ? ~0u : (1u << count) - 1;
    return __builtin_popcount(~(uint32_t)ancestors & before);
}

// What a row of the task's tokens sees of a block's keys: [begin, end) without holes (a bit for each key).
struct Sight {
    int64_t begin, end;
    uint64_t holes;
};

// asker: the place of the row's token; from: that of the block's first key, one of n.
inline Sight sight(int64_t asker, int64_t from, int64_t n, int64_t window, int32_t ancestors, int64_t length) {
    const int64_t base = length - TREE, position = asker - hidden(ancestors, asker - base);
    Sight found = {window ? std::max<int64_t>(position - window + 1 - from, 0) : 0, std::min(asker + 1 - from, n), 0};
    if (ancestors != -1)
        for (int64_t key = std::max(from, base); key < from + found.end; key++) {
            const bool seen = (uint32_t)ancestors >> (key - base) & 1;
            if (!seen || (window && key - hidden(ancestors, key - base) <= position - window))
                found.holes |= (uint64_t)1 << (key - from);
        }
    return found;
}

// Scores of one row -> weights, in place, for the keys in sight of the block's n; returns what shrinks the value so far.
inline float soften(float* row, int64_t n, const Sight& see, float softcap, float& most_so_far, float& mass_so_far) {
    const int64_t begin = see.begin, end = see.end;
    Vec most = splat(most_so_far);
    const bool masked = begin > 0 || end < n || n % LANES || see.holes;
    for (int64_t i = 0; i < n; i += LANES) {
        Vec s = load(row + i);
        if (softcap) s = splat(softcap) * tanh(s / splat(softcap));
        if (masked) {
            const Vec at = counted() + splat((float)i);
            s = at >= splat((float)begin) ? s : splat(-FLT_MAX);
            s = at < splat((float)end) ? s : splat(-FLT_MAX);
            for (uint64_t holes = see.holes >> i; holes; holes &= holes - 1) {
                const int lane = __builtin_ctzll(holes);
                if (lane >= LANES) break;
                s[lane] = -FLT_MAX;
            }
        }
        store(row + i, s);
        most = max(most, s);
    }
    const float peak = largest(most);
    Vec mass = {};
    for (int64_t i = 0; i < n; i += LANES) {
        Vec s = load(row + i), p = exp(s - splat(peak));
        if (masked) p = s > splat(-FLT_MAX) ? p : Vec{};
        store(row + i, p);
        mass += p;
    }
    const float shrink = expf(most_so_far - peak);
    mass_so_far = mass_so_far * shrink + sum(mass);
    most_so_far = peak;
    return shrink;
}

// What a number of the pages of a KV head is multiplied by.
template <typename P> inline float scale_of(const float* scales, int64_t kv_head) {
    return scales ? scales[kv_head] * unit<P> : 1.0f;
}

// The queries of a task in fp32, times the scales of scores and keys: [KV heads, rows, padded(head_dim)].
template <typename T, typename P>
void read_queries(const AttentionArgs& args, const AttentionCall& call, const Task& task, float* queries) {
    const int64_t group = args.num_heads / args.num_kv_heads, num_rows = task.num_tokens * group;
    const int64_t first_token = call.query_start[task.sequence] + task.token;
    for (int64_t r = 0; r < task.num_kv_heads * num_rows; r++, queries += padded(args.head_dim)) {
        const int64_t kv_head = task.kv_head + r / num_rows, token = first_token + r % num_rows / group;
        const T* row = (const T*)call.query + token * call.query_stride + (kv_head * group + r % group) * args.head_dim;
        const Vec scale = splat(args.scale * scale_of<P>(call.k_scale, kv_head));
        for_vectors<T>(args.head_dim, [&](int64_t d, auto read, auto) { store(queries + d, read(row + d) * scale); });
    }
}

// Attends the rows of a task to its keys: for each KV head its query tokens' heads, one after the other.
template <typename P>
void attend(const AttentionArgs& args, const AttentionCall& call, const Task& task, const float* queries, Rows all) {
    const int64_t group = args.num_heads / args.num_kv_heads, num_rows = task.num_tokens * group;
    const int64_t width = padded(args.head_dim), v_width = padded(args.v_head_dim), window = args.window;
    const int64_t num_queries = call.query_start[task.sequence + 1] - call.query_start[task.sequence];
    const int64_t position = call.kv_len[task.sequence] - num_queries + task.token;  // of the task's first token
    const int32_t* table = call.pages + task.sequence * call.table_width;
    const int32_t* ancestors = call.ancestors ? call.ancestors + call.query_start[task.sequence] + task.token : nullptr;
    const P *k_pages = (const P*)call.k_pages, *v_pages = (const P*)call.v_pages;

    float* k_copy = scratch<struct Keys>(BLOCK * width);
    float* v_copy = scratch<struct Values>(BLOCK * v_width);
    alignas(64) float weights[MAX_ROWS * BLOCK];
    float shrink[MAX_ROWS];
    const bool whole = width == args.head_dim && v_width == args.v_head_dim;
    const bool in_place = whole && (sizeof(P) == 4 || num_rows <= ROWS);  // few rows: converted where it is read
    for (int64_t from = task.low; from < task.high; from += BLOCK) {
        const int64_t n = std::min<int64_t>(BLOCK, task.high - from), next = std::min<int64_t>(BLOCK, task.high - from - n);
        for (int64_t h = 0; h < task.num_kv_heads; h++) {
            const float* q = queries + h * num_rows * width;
            const Rows rows(all.most + h * Rows::size(num_rows, v_width), num_rows);
            const P *k[BLOCK], *v[BLOCK];
            locate(k_pages, args.head_dim, task.kv_head + h, args, table, from, n, k);
            locate(v_pages, args.v_head_dim, task.kv_head + h, args, table, from, n, v);
            Ahead<P> next_k{{}, next, args.head_dim}, next_v{{}, next, args.v_head_dim};
            locate(k_pages, args.head_dim, task.kv_head + h, args, table, from + n, next, next_k.rows);
            locate(v_pages, args.v_head_dim, task.kv_head + h, args, table, from + n, next, next_v.rows);
            auto block = [&](auto k, auto v) {
                for_tiles(num_rows, [&](auto R, int64_t r) {
                    scores<R()>(q + r * width, width, k, n, weights + r * BLOCK, next_k);
                    next_k.count = 0;
                });
                for (int64_t r = 0; r < num_rows; r++) {
                    const Sight see = sight(position + r / group, from, n, window, ancestors ? ancestors[r / group] : -1,
                                            call.kv_len[task.sequence]);
                    shrink[r] = soften(weights + r * BLOCK, n, see, args.softcap, rows.most[r], rows.mass[r]);
                }
                for_tiles(num_rows, [&](auto R, int64_t r) {
                    float* value = rows.value + r * v_width;
                    int64_t at = 0;
                    for (; at + 4 * LANES <= v_width; at += 4 * LANES, next_v.count = 0)
                        weigh<R(), 4>(weights + r * BLOCK, shrink + r, v, n, value, v_width, at, next_v);
                    for (; at < v_width; at += LANES, next_v.count = 0)
                        weigh<R(), 1>(weights + r * BLOCK, shrink + r, v, n, value, v_width, at, next_v);
                });
            };
            if (in_place) {
                block((const P* const*)k, (const P* const*)v);
            } else {
                const float *k_rows[BLOCK], *v_rows[BLOCK];
                convert(k, n, args.head_dim, k_copy, k_rows);
                convert(v, n, args.v_head_dim, v_copy, v_rows);
                block((const float* const*)k_rows, (const float* const*)v_rows);
            }
        }
    }
}

// Merges what the splits of a task found for one KV head, adds the sinks, divides and writes.
template <typename T, typename P>
void finish(const AttentionArgs& args, const AttentionCall& call, const Task& task, int64_t h, float* parts,
            int64_t size, int64_t splits) {
    const int64_t group = args.num_heads / args.num_kv_heads, v_width = padded(args.v_head_dim);
    const int64_t first_token = call.query_start[task.sequence] + task.token, num_rows = task.num_tokens * group;
    const float scale = scale_of<P>(call.v_scale, task.kv_head + h);
    auto part = [&](int64_t s) { return Rows(parts + s * size + h * Rows::size(num_rows, v_width), num_rows); };
    for (int64_t r = 0; r < num_rows; r++) {
        const int64_t head = (task.kv_head + h) * group + r % group;
        const float sink = call.sinks ? to_float(((const T*)call.sinks)[head]) : -FLT_MAX;
        float most = sink, factor[MAX_ROWS];
        for (int64_t s = 0; s < splits; s++) most = std::max(most, part(s).most[r]);
        float mass = call.sinks ? expf(sink - most) : 0.0f;
        for (int64_t s = 0; s < splits; s++) mass += part(s).mass[r] * (factor[s] = expf(part(s).most[r] - most));
        T* y = (T*)call.y + ((first_token + r / group) * args.num_heads + head) * args.v_head_dim;
        for_vectors<T>(args.v_head_dim, [&](int64_t d, auto, auto write) {
            Vec value = {};
            for (int64_t s = 0; s < splits; s++) value += load(part(s).value + r * v_width + d) * splat(factor[s]);
            write(y + d, value / splat(mass / scale));
        });
    }
}

// A row of the step's keys or values [num_kv_heads, width] into its slot.
template <typename T, typename P> void write(const T* row, P* slot, int64_t heads, int64_t width, const float* scales) {
    if constexpr (std::is_same_v<T, P>) {
        memcpy(slot, row, heads * width * sizeof(T));
    } else {
        for (int64_t h = 0; h < heads; h++, row += width, slot += width)
            for (int64_t d = 0; d < width; d += LANES) {
                const int64_t n = std::min<int64_t>(LANES, width - d);
                store_part(slot + d, load_part(row + d, n) / splat(scales[h]), n);
            }
    }
}

template <typename T, typename P> void paged_attention(const AttentionArgs& args, const AttentionCall& call) {
    const int64_t group = args.num_heads / args.num_kv_heads, heads = args.num_kv_heads;
    for (int64_t t = 0; t < call.num_tokens; t++) {
        const int64_t slot = call.slots[t] * heads;
        write((const T*)call.key + t * call.key_stride, (P*)call.k_pages + slot * args.head_dim, heads, args.head_dim,
              call.k_scale);
        write((const T*)call.value + t * call.value_stride, (P*)call.v_pages + slot * args.v_head_dim, heads,
              args.v_head_dim, call.v_scale);
    }
    int64_t threads = 1, splits = 1, work = 0;
    for (int64_t s = 0; s < call.num_sequences; s++)
        work += (call.query_start[s + 1] - call.query_start[s]) * call.kv_len[s] * args.num_heads * args.head_dim;
#if defined(_OPENMP)
    if (work > 32768) threads = omp_get_max_threads();  // below, waking a thread costs more than it saves
#endif
    std::vector<Task> tasks;
    int64_t most_rows = 0;  // of a task
    for (int64_t s = 0; s < call.num_sequences; s++) {
        const int64_t n = call.query_start[s + 1] - call.query_start[s];
        // few rows: all KV heads in one task, which reads whole pages in their order; many: they are work enough
        const bool together = n * args.num_heads <= MAX_ROWS && call.num_sequences >= 2 * threads;
        const int64_t tile = std::max<int64_t>(1, MAX_ROWS / group), count = together ? heads : 1;
        for (int64_t token = 0; token < n; token += tile)
            for (int64_t h = 0; h < heads; h += count) {
                const int64_t num = std::min(tile, n - token), position = call.kv_len[s] - n + token;
                const int64_t first = position - args.window + 1 - (call.ancestors ? TREE : 0);
                const int64_t low = args.window ? std::max<int64_t>(0, first) : 0;
                tasks.push_back({s, token, num, h, count, low, position + num});
                most_rows = std::max(most_rows, num * group * count);
            }
    }
    const int64_t num_tasks = tasks.size();
    if (num_tasks && num_tasks < threads) splits = std::min<int64_t>((threads + num_tasks - 1) / num_tasks, MAX_ROWS);
    const int64_t v_width = padded(args.v_head_dim), size = Rows::size(most_rows, v_width);
    float* memory = splits == 1 ? nullptr : scratch<struct Parts>(num_tasks * splits * size);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < num_tasks * splits; i++) {
        Task part = tasks[i / splits];
        const int64_t span = ((part.high - part.low + splits - 1) / splits + BLOCK - 1) / BLOCK * BLOCK;
        part.low += i % splits * span;
        part.high = std::min(part.high, part.low + span);
        float* found = splits == 1 ? scratch<struct Whole>(size) : memory + i * size;
        const int64_t num_rows = part.num_tokens * group;
        for (int64_t h = 0; h < part.num_kv_heads; h++)
            Rows(found + h * Rows::size(num_rows, v_width), num_rows).clear(num_rows, v_width);
        float* queries = scratch<struct Queries>(part.num_kv_heads * num_rows * padded(args.head_dim));
        read_queries<T, P>(args, call, part, queries);
        attend<P>(args, call, part, queries, Rows(found, num_rows));
        if (splits == 1)
            for (int64_t h = 0; h < part.num_kv_heads; h++) finish<T, P>(args, call, part, h, found, size, 1);
    }
    if (splits > 1)
        for (int64_t i = 0; i < num_tasks; i++)
            for (int64_t h = 0; h < tasks[i].num_kv_heads; h++)
                finish<T, P>(args, call, tasks[i], h, memory + i * splits * size, size, splits);
}

extern "C" void ingot_paged_attention(const AttentionArgs* args, const AttentionCall* call) {
    for_dtype(args->dtype, [&](auto type) {
        using T = decltype(type);
        switch (args->pages) {
            case PLAIN: return paged_attention<T, T>(*args, *call);
            case INT8: return paged_attention<T, page_int8>(*args, *call);
            case FP8: return paged_attention<T, page_fp8>(*args, *call);
        }
    });
}
