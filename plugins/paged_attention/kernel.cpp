// KV write and attention over pages, decode and prompt alike, without gathering the pages first.
// A task is some query tokens of one sequence and one KV head: all query heads that share the KV head are its rows, so
// each key is read once for them (GQA packing). Keys pass in blocks of BLOCK under an online softmax (Milakov and
// Gimelshein, arXiv:1805.02867) in fp32; a long context with few tasks is split over keys and merged (Flash-Decoding).
// Invariant: no key outside a query's reach is ever read, so unused pages may hold NaN.
#include "../simd.h"

#include <algorithm>
#include <cfloat>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

struct AttentionArgs {
    int64_t num_heads, num_kv_heads, head_dim, v_head_dim, page_size, window, dtype;
    float scale, softcap;
};

struct AttentionCall {
    const void *query, *key, *value;  // [T, ...] with row strides in elements
    int64_t query_stride, key_stride, value_stride;
    const int32_t *slots, *query_start, *kv_len, *pages;  // [T], [S+1], [S], [S, table_width]
    int64_t num_tokens, num_sequences, table_width;
    void *k_pages, *v_pages;  // [pages, page_size, num_kv_heads, head_dim or v_head_dim]
    const void* sinks;        // [num_heads] or null
    void* y;                  // [T, num_heads * v_head_dim]
};

constexpr int BLOCK = 64, ROWS = 4, MAX_ROWS = 64;  // keys of a block; rows of a register tile; rows of a task

struct Task {
    int64_t sequence, kv_head, token, num_tokens;  // token: first query token, counted in the sequence
    int64_t low, high;                             // keys
};

inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Running softmax of the rows of a task: maximum, sum and weighted values so far.
struct Rows {
    std::vector<float> most, mass, value;  // [rows], [rows], [rows, padded(v_head_dim)]
    Rows(int64_t rows, int64_t width) : most(rows, -FLT_MAX), mass(rows), value(rows * width) {}
};

template <int R> inline void scores(const float* q, int64_t width, const float* const* k, int64_t num_keys, float* out) {
    for (int64_t i = 0; i < num_keys; i += 4) {  // the pointers are padded to a multiple of 4
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
template <int R, int C>
inline void weigh(const float* weights, const float* shrink, const float* const* v, int64_t num_keys, float* value,
                  int64_t width, int64_t at) {
    Vec acc[R][C];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) acc[r][c] = load(value + r * width + at + c * LANES) * splat(shrink[r]);
    for (int64_t i = 0; i < num_keys; i++) {
        Vec column[C];
        UNROLL for (int c = 0; c < C; c++) column[c] = load(v[i] + at + c * LANES);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < C; c++) acc[r][c] += splat(weights[r * BLOCK + i]) * column[c];
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) store(value + r * width + at + c * LANES, acc[r][c]);
}

// Pointers to the fp32 rows of keys [from, from + n) in the pool: into it where it is fp32, else into a converted copy.
template <typename T>
void locate(const T* pool, int64_t width, int64_t kv_head, const AttentionArgs& args, const int32_t* table,
            int64_t from, int64_t n, std::vector<float>& copy, const float** rows) {
    const int64_t padded_width = padded(width);
    for (int64_t i = 0; i < n; i++) {
        const int64_t page = table[(from + i) / args.page_size], slot = page * args.page_size + (from + i) % args.page_size;
        const T* row = pool + (slot * args.num_kv_heads + kv_head) * width;
        if constexpr (sizeof(T) == 4) {
            if (width == padded_width) { rows[i] = row; continue; }
        }
        float* target = copy.data() + i * padded_width;
        for_vectors<T>(width, [&](int64_t d, auto read, auto) { store(target + d, read(row + d)); });
        rows[i] = target;
    }
    for (int64_t i = n; i % 4; i++) rows[i] = rows[n - 1];
}

// Attends the rows of a task to its keys.
template <typename T> void attend(const AttentionArgs& args, const AttentionCall& call, const Task& task, Rows& rows) {
    const int64_t group = args.num_heads / args.num_kv_heads, num_rows = task.num_tokens * group;
    const int64_t width = padded(args.head_dim), v_width = padded(args.v_head_dim), window = args.window;
    const int64_t first_token = call.query_start[task.sequence] + task.token;
    const int64_t num_queries = call.query_start[task.sequence + 1] - call.query_start[task.sequence];
    const int64_t position = call.kv_len[task.sequence] - num_queries + task.token;  // of the task's first token
    const int32_t* table = call.pages + task.sequence * call.table_width;

    std::vector<float> q(num_rows * width), k_copy(BLOCK * width), v_copy(BLOCK * v_width);
    alignas(64) float weights[MAX_ROWS * BLOCK];
    float shrink[MAX_ROWS];
    for (int64_t r = 0; r < num_rows; r++) {
        const T* row = (const T*)call.query + (first_token + r / group) * call.query_stride +
                       (task.kv_head * group + r % group) * args.head_dim;
        for_vectors<T>(args.head_dim, [&](int64_t d, auto read, auto) {
            store(q.data() + r * width + d, read(row + d) * splat(args.scale));
        });
    }
    for (int64_t from = task.low; from < task.high; from += BLOCK) {
        const int64_t n = std::min<int64_t>(BLOCK, task.high - from);
        const float *k[BLOCK], *v[BLOCK];
        locate((const T*)call.k_pages, args.head_dim, task.kv_head, args, table, from, n, k_copy, k);
        locate((const T*)call.v_pages, args.v_head_dim, task.kv_head, args, table, from, n, v_copy, v);
        for (int64_t r = 0; r < num_rows;) {
            const float* part = q.data() + r * width;
            switch (std::min<int64_t>(ROWS, num_rows - r)) {
                case 4: scores<4>(part, width, k, n, weights + r * BLOCK); r += 4; break;
                case 3: scores<3>(part, width, k, n, weights + r * BLOCK); r += 3; break;
                case 2: scores<2>(part, width, k, n, weights + r * BLOCK); r += 2; break;
                default: scores<1>(part, width, k, n, weights + r * BLOCK); r += 1;
            }
        }
        for (int64_t r = 0; r < num_rows; r++) {
            const int64_t asker = position + r / group;  // sees keys in (asker - window, asker]
            const float begin = (float)(window ? std::max<int64_t>(asker - window + 1 - from, 0) : 0);
            const float end = (float)std::min<int64_t>(asker + 1 - from, n);
            float* row = weights + r * BLOCK;
            Vec most = splat(rows.most[r]), index;
            for (int i = 0; i < LANES; i++) index[i] = (float)i;
            for (int64_t i = 0; i < n; i += LANES) {
                Vec s = load(row + i), at = index + splat((float)i);
                if (args.softcap) s = splat(args.softcap) * tanh(s / splat(args.softcap));
                s = (at >= splat(begin)) & (at < splat(end)) ? s : splat(-FLT_MAX);
                store(row + i, s);
                most = max(most, s);
            }
            float peak = most[0];
            for (int i = 1; i < LANES; i++) peak = std::max(peak, most[i]);
            Vec mass = {};
            for (int64_t i = 0; i < n; i += LANES) {
                Vec s = load(row + i);
                Vec p = s > splat(-FLT_MAX) ? exp(s - splat(peak)) : Vec{};
                store(row + i, p);
                mass += p;
            }
            shrink[r] = exp(splat(rows.most[r] - peak))[0];
            rows.mass[r] = rows.mass[r] * shrink[r] + sum(mass);
            rows.most[r] = peak;
        }
        for (int64_t r = 0; r < num_rows;) {
            const int64_t height = std::min<int64_t>(ROWS, num_rows - r);
            float* value = rows.value.data() + r * v_width;
            auto pass = [&](auto height) {
                constexpr int R = decltype(height)::value;
                int64_t at = 0;
                for (; at + 4 * LANES <= v_width; at += 4 * LANES)
                    weigh<R, 4>(weights + r * BLOCK, shrink + r, v, n, value, v_width, at);
                for (; at < v_width; at += LANES)
                    weigh<R, 1>(weights + r * BLOCK, shrink + r, v, n, value, v_width, at);
            };
            switch (height) {
                case 4: pass(std::integral_constant<int, 4>{}); break;
                case 3: pass(std::integral_constant<int, 3>{}); break;
                case 2: pass(std::integral_constant<int, 2>{}); break;
                default: pass(std::integral_constant<int, 1>{});
            }
            r += height;
        }
    }
}

// Merges what the splits of a task found, adds the sinks, divides and writes.
template <typename T>
void finish(const AttentionArgs& args, const AttentionCall& call, const Task& task, const Rows* parts, int64_t splits) {
    const int64_t group = args.num_heads / args.num_kv_heads, v_width = padded(args.v_head_dim);
    const int64_t first_token = call.query_start[task.sequence] + task.token;
    for (int64_t r = 0; r < task.num_tokens * group; r++) {
        const int64_t head = task.kv_head * group + r % group;
        const float sink = call.sinks ? to_float(((const T*)call.sinks)[head]) : -FLT_MAX;
        float most = sink, factor[MAX_ROWS];
        for (int64_t s = 0; s < splits; s++) most = std::max(most, parts[s].most[r]);
        float mass = call.sinks ? expf(sink - most) : 0.0f;
        for (int64_t s = 0; s < splits; s++) mass += parts[s].mass[r] * (factor[s] = expf(parts[s].most[r] - most));
        T* y = (T*)call.y + ((first_token + r / group) * args.num_heads + head) * args.v_head_dim;
        for_vectors<T>(args.v_head_dim, [&](int64_t d, auto, auto write) {
            Vec value = {};
            for (int64_t s = 0; s < splits; s++) value += load(parts[s].value.data() + r * v_width + d) * splat(factor[s]);
            write(y + d, value / splat(mass));
        });
    }
}

template <typename T> void paged_attention(const AttentionArgs& args, const AttentionCall& call) {
    const int64_t group = args.num_heads / args.num_kv_heads, heads = args.num_kv_heads;
    const int64_t k_row = heads * args.head_dim, v_row = heads * args.v_head_dim;
    for (int64_t t = 0; t < call.num_tokens; t++) {
        memcpy((T*)call.k_pages + call.slots[t] * k_row, (const T*)call.key + t * call.key_stride, k_row * sizeof(T));
        memcpy((T*)call.v_pages + call.slots[t] * v_row, (const T*)call.value + t * call.value_stride, v_row * sizeof(T));
    }
    const int64_t tile = std::max<int64_t>(1, MAX_ROWS / group);  // query tokens of a task
    int64_t work = 0;
    std::vector<Task> tasks;
    for (int64_t s = 0; s < call.num_sequences; s++) {
        const int64_t n = call.query_start[s + 1] - call.query_start[s];
        for (int64_t token = 0; token < n; token += tile)
            for (int64_t h = 0; h < heads; h++) {
                const int64_t count = std::min(tile, n - token), position = call.kv_len[s] - n + token;
                const int64_t low = args.window ? std::max<int64_t>(0, position - args.window + 1) : 0;
                tasks.push_back({s, h, token, count, low, position + count});
                work += (position + count - low) * count * group * (args.head_dim + args.v_head_dim);
            }
    }
    int64_t threads = 1, splits = 1;
#if defined(_OPENMP)
    if (work > 65536) threads = omp_get_max_threads();  // below, waking a thread costs more than it saves
#endif
    const int64_t num_tasks = tasks.size();
    if (num_tasks && num_tasks < threads) splits = std::min<int64_t>((threads + num_tasks - 1) / num_tasks, MAX_ROWS);
    std::vector<Rows> rows;
    rows.reserve(num_tasks * splits);
    for (const Task& task : tasks)
        for (int64_t s = 0; s < splits; s++) rows.emplace_back(task.num_tokens * group, padded(args.v_head_dim));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < num_tasks * splits; i++) {
        Task part = tasks[i / splits];
        const int64_t span = ((part.high - part.low + splits - 1) / splits + BLOCK - 1) / BLOCK * BLOCK;
        part.low += i % splits * span;
        part.high = std::min(part.high, part.low + span);
        attend<T>(args, call, part, rows[i]);
        if (splits == 1) finish<T>(args, call, part, &rows[i], 1);
    }
    if (splits > 1)
        for (int64_t i = 0; i < num_tasks; i++) finish<T>(args, call, tasks[i], &rows[i * splits], splits);
}

extern "C" void ingot_paged_attention(const AttentionArgs* args, const AttentionCall* call) {
    for_dtype(args->dtype, [&](auto type) { paged_attention<decltype(type)>(*args, *call); });
}
