#include "attention.h"

#include <algorithm>
#include <limits>

#include "threads.h"

namespace tl {

namespace {

constexpr int CHUNK_TILES = CHUNK_TOKENS / TILE_TOKENS;
constexpr int ITEM_ROWS = 64;  // rows (token x head) of a work item, about
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

int tokens_of_tile(const AttentionShape& shape) {
    return std::max(1, ITEM_ROWS / (shape.heads / shape.kv_heads));
}

int first_key(int window, int position) {
    return window ? std::max(0, position - window + 1) : 0;
}

// One round of the online softmax: the weighted values of some keys and what they weigh.
// Records of [most, weight, -, -, values...], so that they can be put by and merged later.
constexpr int RECORD_HEAD = 16;

void merge(float* total, const float* part, int head_dim) {
    float most = std::max(total[0], part[0]);
    float reference = most == NOTHING ? 0.0f : most;
    float keep_total = std::exp2(total[0] - reference), keep_part = std::exp2(part[0] - reference);
    total[0] = most;
    total[1] = total[1] * keep_total + part[1] * keep_part;
    for (int d = RECORD_HEAD; d < RECORD_HEAD + head_dim; d += 16)
        store(total + d, fma(load(part + d), all(keep_part), load(total + d) * all(keep_total)));
}

void clear(float* total, int head_dim) {
    std::fill(total, total + RECORD_HEAD + head_dim, 0.0f);
    total[0] = NOTHING;
}

// R rows of words times C tiles of 16 columns.
template <class E, int R, int C>
inline __attribute__((always_inline)) void multiply(const uint32_t* a, int64_t a_stride,
                                                    const uint32_t* const* b, int64_t b_stride,
                                                    int steps, Lanes (&sum)[R][C]) {
    for (int i = 0; i < steps; ++i) {
        Words column[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) column[c] = load_words(b[c] + i * b_stride);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            uint32_t word = a[r * a_stride + i];
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) sum[r][c] = dot<E>(sum[r][c], word, column[c]);
        }
    }
}

// What one R-row round works on.
struct Round {
    const uint32_t* q;  // [R][head_dim words]
    const uint32_t* const* tiles;
    int tile_count, head_dim;
    int first_position;  // of the first tile
    float scale;         // of scores, for exponents of two
};

template <class E>
constexpr int words_of(int elements) {
    return elements * static_cast<int>(sizeof(E)) / 4;
}

template <class E, int R, int C>
inline void scores_of(const Round& round, int tile, float (*scores)[CHUNK_TOKENS]) {
    Lanes sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = zeros();
    int words = words_of<E>(round.head_dim);
    multiply<E, R, C>(round.q, words, round.tiles + tile, 16, words, sum);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(scores[r] + (tile + c) * TILE_TOKENS, sum[r][c]);
}

// Turn a row's scores into words of probabilities; keys outside [first, last) weigh nothing.
template <class E>
inline void soften(const Round& round, float* scores, int first, int last, uint32_t* weights,
                   float* record) {
    Lanes most = all(NOTHING), scale = all(round.scale);
    for (int t = 0; t < round.tile_count; ++t) {
        int position = round.first_position + t * TILE_TOKENS;
        Lanes s = load(scores + t * TILE_TOKENS) * scale;
        if (first > position || last < position + TILE_TOKENS)
            s = keep(s, first - position, last - position, NOTHING);
        store(scores + t * TILE_TOKENS, s);
        most = max(most, s);
    }
    record[0] = largest(most);
    Lanes reference = all(record[0] == NOTHING ? 0.0f : record[0]), total = zeros();
    for (int t = 0; t < round.tile_count; ++t) {
        Lanes p = exp2(load(scores + t * TILE_TOKENS) - reference);
        total = total + p;
        store_words(weights + t * words_of<E>(TILE_TOKENS), p, E{});
    }
    record[1] = sum(total);
}

template <class E, int R, int C>
inline void values_of(const Round& round, int d, const uint32_t* weights, int weights_stride,
                      float* records, int64_t record_stride) {
    Lanes sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = zeros();
    int64_t keys = int64_t(TILE_TOKENS) * words_of<E>(round.head_dim);
    int steps = words_of<E>(TILE_TOKENS);
    for (int t = 0; t < round.tile_count; ++t) {
        const uint32_t* column[C];
        for (int c = 0; c < C; ++c) column[c] = round.tiles[t] + keys + d + 16 * c;
        multiply<E, R, C>(weights + t * steps, weights_stride, column, round.head_dim, steps, sum);
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            store(records + r * record_stride + RECORD_HEAD + d + 16 * c, sum[r][c]);
}

// R rows against one chunk: their records.
template <class E, int R>
void attend_rows(const Round& round, const int* first, const int* last, float* records,
                 int64_t record_stride) {
    constexpr int C = ROWS_AT_ONCE < 8 ? 1 : (R <= 4 ? 4 : 2);
    constexpr int weights_stride = words_of<E>(CHUNK_TOKENS);
    alignas(64) float scores[R][CHUNK_TOKENS];
    alignas(64) uint32_t weights[R * weights_stride];
    int tile = 0;
    for (; tile + C <= round.tile_count; tile += C) scores_of<E, R, C>(round, tile, scores);
    for (; tile < round.tile_count; ++tile) scores_of<E, R, 1>(round, tile, scores);
    for (int r = 0; r < R; ++r)
        soften<E>(round, scores[r], first[r], last[r], weights + r * weights_stride,
                  records + r * record_stride);
    int d = 0;
    for (; d + 16 * C <= round.head_dim; d += 16 * C)
        values_of<E, R, C>(round, d, weights, weights_stride, records, record_stride);
    for (; d < round.head_dim; d += 16)
        values_of<E, R, 1>(round, d, weights, weights_stride, records, record_stride);
}

template <class E>
using RowsKernel = void (*)(const Round&, const int*, const int*, float*, int64_t);

template <class E>
RowsKernel<E> rows_kernel(int rows) {
    static constexpr RowsKernel<E> kernels[] = {
        attend_rows<E, 1>, attend_rows<E, 2>, attend_rows<E, 3>, attend_rows<E, 4>,
#if defined(__AVX512F__)
        attend_rows<E, 5>, attend_rows<E, 6>, attend_rows<E, 7>, attend_rows<E, 8>,
#endif
    };
    return kernels[rows - 1];
}

int64_t aligned(int64_t bytes) {
    return (bytes + 63) / 64 * 64;
}

// A thread's own memory during one work item.
struct Scratch {
    uint32_t* q;     // [rows][words of head_dim]
    float* totals;   // [rows] records
    float* records;  // [ROWS_AT_ONCE] records

    Scratch(void* memory, int rows, int head_dim) {
        auto* at = static_cast<uint8_t*>(memory);
        q = reinterpret_cast<uint32_t*>(at);
        totals = reinterpret_cast<float*>(at += aligned(int64_t(rows) * head_dim * 4));
        int64_t record = int64_t(RECORD_HEAD + head_dim) * 4;
        records = reinterpret_cast<float*>(at += aligned(rows * record));
    }
};

template <class Out>
void finish_row(const float* total, Out* out, int head_dim) {
    Lanes share = all(1.0f / total[1]);
    for (int d = 0; d < head_dim; d += 16) store(out + d, load(total + RECORD_HEAD + d) * share);
}

uint32_t* tile_at(const Cache& cache, const Table& table, int sequence, int kv_head, int position) {
    int block = position / cache.block_tokens, slot = position % cache.block_tokens;
    int64_t entry = int64_t(sequence) * table.stride + int64_t(block) * table.parts + table.part;
    int tiles = cache.block_tokens / TILE_TOKENS;
    int64_t tile = (int64_t(kv_head) * tiles + slot / TILE_TOKENS) * 2 * cache.tile_words();
    uint8_t* page = cache.pages + table.entries[entry] * cache.page_bytes + cache.offset;
    return reinterpret_cast<uint32_t*>(page) + tile;
}

}  // namespace

int64_t attention_scratch_bytes(const AttentionShape& shape) {
    int64_t record = int64_t(RECORD_HEAD + shape.head_dim) * 4;
    int64_t rows = int64_t(tokens_of_tile(shape)) * (shape.heads / shape.kv_heads);
    return aligned(rows * shape.head_dim * 4) + aligned(rows * record) +
           aligned(ROWS_AT_ONCE * record);
}

namespace {

int64_t cost(const WorkItem& item) {
    return int64_t(item.rows) * item.chunks;
}

// Cut items that are more than a quarter of a thread's work into pieces of whole chunks.
void split_items(AttentionPlan& plan, int64_t total, int threads) {
    std::vector<WorkItem> whole;
    whole.swap(plan.items);
    int32_t partials = 0;
    for (const WorkItem& item : whole) {
        int64_t share = std::max<int64_t>(1, total / (4 * threads * item.rows));
        if (item.chunks < 2 * share) {
            plan.items.push_back(item);
            continue;
        }
        int pieces = int((item.chunks + share - 1) / share);
        for (int p = 0; p < pieces; ++p) {
            Range chunks = tl::share(item.chunks, p, pieces);
            WorkItem piece = item;
            piece.chunk = item.chunk + chunks.begin;
            piece.chunks = chunks.end - chunks.begin;
            piece.split = int32_t(plan.splits.size());
            piece.partial = partials + chunks.begin * plan.rows_max;
            plan.items.push_back(piece);
        }
        plan.splits.push_back({pieces, partials, item.chunks});
        partials += item.chunks * plan.rows_max;
    }
    plan.partial_count = partials;
}

}  // namespace

void plan_attention(AttentionPlan& plan, const AttentionShape& shape, const Sequences& batch,
                    int threads) {
    plan.group = shape.heads / shape.kv_heads;
    int tokens = tokens_of_tile(shape);
    plan.rows_max = tokens * plan.group;
    plan.partial_count = 0;
    plan.items.clear();
    plan.splits.clear();
    int64_t total = 0, dearest = 0;
    for (int s = 0; s < batch.count; ++s) {
        int row = batch.starts[s], end = batch.starts[s + 1];
        for (; row < end; row += tokens) {
            int rows = std::min(tokens, end - row), position = position_of(batch, s, row);
            int chunk = first_key(shape.window, position) / CHUNK_TOKENS;
            int chunks = (position + rows - 1) / CHUNK_TOKENS + 1 - chunk;
            for (int h = 0; h < shape.kv_heads; ++h)
                plan.items.push_back({s, h, row, rows, chunk, chunks, -1, 0});
            total += cost(plan.items.back()) * shape.kv_heads;
            dearest = std::max(dearest, cost(plan.items.back()));
        }
    }
    int64_t rounds = (int64_t(plan.items.size()) + threads - 1) / threads;
    if (dearest * rounds * threads * 4 > total * 5)  // somebody might wait for others
        split_items(plan, total, threads);
    plan.partials.resize(size_t(plan.partial_count) * (RECORD_HEAD + shape.head_dim));
    if (plan.left.size() < plan.splits.size())
        plan.left = std::vector<std::atomic<int32_t>>(plan.splits.size());
    for (size_t i = 0; i < plan.splits.size(); ++i) plan.left[i] = plan.splits[i].items;
    std::stable_sort(plan.items.begin(), plan.items.end(),
                     [](const WorkItem& a, const WorkItem& b) { return cost(a) > cost(b); });
    plan.next = 0;
}

template <class E, class Source>
void write_cache(const Cache& cache, const Table& table, int sequence, int position, int kv_head,
                 const Source* k, const Source* v) {
    int head_dim = cache.head_dim, at = position % TILE_TOKENS;
    uint32_t* keys = tile_at(cache, table, sequence, kv_head, position);
    uint32_t* values = keys + cache.tile_words();
    if (at == 0) std::memset(keys, 0, size_t(2 * cache.tile_words() * 4));
    constexpr int per_word = 4 / static_cast<int>(sizeof(E));
    uint32_t words[16];
    E narrow[16];
    for (int d = 0; d < head_dim; d += 16) {
        store_words(words, load(k + d), E{});
        for (int i = 0; i < 16 / per_word; ++i) keys[(d / per_word + i) * 16 + at] = words[i];
        store(narrow, load(v + d));
        E* to =
            reinterpret_cast<E*>(values + int64_t(at / per_word) * head_dim + d) + at % per_word;
        for (int i = 0; i < 16; ++i) to[i * per_word] = narrow[i];
    }
}

namespace {

// What `attend` was called with, and how one thread goes about it.
template <class E, class Out>
struct Worker {
    AttentionPlan& plan;
    const AttentionShape& shape;
    const Cache& cache;
    const Table& table;
    const Sequences& batch;
    const E* q;
    int64_t q_stride;
    Out* out;
    int64_t out_stride;
    Scratch mine;
    int64_t record = RECORD_HEAD + shape.head_dim;

    void work(const WorkItem& item) {
        int rows = item.rows * plan.group, words = words_of<E>(shape.head_dim);
        for (int r = 0; r < rows; ++r) {
            std::memcpy(mine.q + r * words, q + place(item, r, q_stride), size_t(words) * 4);
            clear(mine.totals + r * record, shape.head_dim);
        }
        for (int c = 0; c < item.chunks; ++c) chunk(item, c);
        if (item.split >= 0 && !gather(item)) return;
        for (int r = 0; r < rows; ++r)
            finish_row(mine.totals + r * record, out + place(item, r, out_stride), shape.head_dim);
    }

  private:
    // Rows of an item are its tokens' heads: where one of them lies among all rows.
    int64_t place(const WorkItem& item, int row, int64_t stride) const {
        int head = item.kv_head * plan.group + row % plan.group;
        return (item.row + row / plan.group) * stride + int64_t(head) * shape.head_dim;
    }

    void chunk(const WorkItem& item, int c) {
        int position = position_of(batch, item.sequence, item.row);
        int seen = first_key(shape.window, position) / TILE_TOKENS * TILE_TOKENS;
        int begin = (item.chunk + c) * CHUNK_TOKENS;
        int from = std::max(begin, seen), to = std::min(begin + CHUNK_TOKENS, position + item.rows);
        const uint32_t* tiles[CHUNK_TILES];
        for (int t = 0; from + t * TILE_TOKENS < to; ++t)
            tiles[t] = tile_at(cache, table, item.sequence, item.kv_head, from + t * TILE_TOKENS);
        int rows = item.rows * plan.group;
        for (int r = 0; r < rows; r += ROWS_AT_ONCE) {
            int count = std::min(ROWS_AT_ONCE, rows - r), first[ROWS_AT_ONCE], last[ROWS_AT_ONCE];
            for (int i = 0; i < count; ++i) {
                int own = position + (r + i) / plan.group;
                first[i] = first_key(shape.window, own), last[i] = own + 1;
            }
            float* records = item.split < 0 ? mine.records : partial(item.partial, c, r);
            int skip = std::max(0, (first[0] - from) / TILE_TOKENS);
            int start = from + skip * TILE_TOKENS, stop = std::min(to, last[count - 1]);
            Round round{mine.q + r * words_of<E>(shape.head_dim),
                        tiles + skip,
                        (stop - start + TILE_TOKENS - 1) / TILE_TOKENS,
                        shape.head_dim,
                        start,
                        shape.scale * LOG2E};
            if (start < stop)
                rows_kernel<E>(count)(round, first, last, records, record);
            else  // these rows see nothing of this chunk
                for (int i = 0; i < count; ++i) clear(records + i * record, shape.head_dim);
            if (item.split < 0)
                for (int i = 0; i < count; ++i)
                    merge(mine.totals + (r + i) * record, records + i * record, shape.head_dim);
        }
    }

    float* partial(int first, int chunk, int row) {
        return plan.partials.data() + (first + int64_t(chunk) * plan.rows_max + row) * record;
    }

    // True for the last one done, who has then merged everybody's chunks, in order.
    bool gather(const WorkItem& item) {
        if (plan.left[item.split].fetch_sub(1, std::memory_order_acq_rel) > 1) return false;
        const Split& split = plan.splits[item.split];
        plan.left[item.split].store(split.items, std::memory_order_relaxed);  // for the next layer
        for (int r = 0; r < item.rows * plan.group; ++r)
            for (int c = 0; c < split.chunks; ++c)
                merge(mine.totals + r * record, partial(split.partial, c, r), shape.head_dim);
        return true;
    }
};

}  // namespace

template <class E, class Out>
void attend(AttentionPlan& plan, const AttentionShape& shape, const Cache& cache,
            const Table& table, const Sequences& batch, const E* q, int64_t q_stride, Out* out,
            int64_t out_stride, void* scratch) {
    Worker<E, Out> worker{
        plan, shape,    cache, table,      batch,
        q,    q_stride, out,   out_stride, Scratch(scratch, plan.rows_max, shape.head_dim)};
    int items = static_cast<int>(plan.items.size());
    for (int at; (at = plan.next.fetch_add(1, std::memory_order_relaxed)) < items;)
        worker.work(plan.items[at]);
}

int sequence_of(const Sequences& batch, int row) {
    return int(std::upper_bound(batch.starts, batch.starts + batch.count + 1, row) - batch.starts) -
           1;
}

Range rows_of(const Sequences& batch, int thread, int threads) {
    int rows = batch.starts[batch.count];
    auto boundary = [&](int row) {
        if (row >= rows) return rows;
        int s = sequence_of(batch, row), end = batch.starts[s + 1];
        if (row == batch.starts[s]) return row;
        int inside = (batch.lengths[s] - (end - row)) % TILE_TOKENS;
        return inside ? std::min(end, row + TILE_TOKENS - inside) : row;
    };
    Range even = share(rows, thread, threads);
    return {boundary(even.begin), boundary(even.end)};
}

template void write_cache<float, float>(const Cache&, const Table&, int, int, int, const float*,
                                        const float*);
template void write_cache<Bf16, float>(const Cache&, const Table&, int, int, int, const float*,
                                       const float*);
template void write_cache<Bf16, Bf16>(const Cache&, const Table&, int, int, int, const Bf16*,
                                      const Bf16*);
template void attend<float, float>(AttentionPlan&, const AttentionShape&, const Cache&,
                                   const Table&, const Sequences&, const float*, int64_t, float*,
                                   int64_t, void*);
template void attend<float, Bf16>(AttentionPlan&, const AttentionShape&, const Cache&, const Table&,
                                  const Sequences&, const float*, int64_t, Bf16*, int64_t, void*);
template void attend<Bf16, float>(AttentionPlan&, const AttentionShape&, const Cache&, const Table&,
                                  const Sequences&, const Bf16*, int64_t, float*, int64_t, void*);
template void attend<Bf16, Bf16>(AttentionPlan&, const AttentionShape&, const Cache&, const Table&,
                                 const Sequences&, const Bf16*, int64_t, Bf16*, int64_t, void*);

}  // namespace tl

// The C interface.

namespace {

struct AttendCall {
    tl::AttentionShape shape;
    tl::Cache cache;
    tl::Table table;
    tl::Sequences batch;
    const void *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;  // elements between rows
    void* out;
    int64_t out_stride;
};

template <class E>
void attend_all(const AttendCall& call) {
    using namespace tl;
    static thread_local AttentionPlan plan;
    static thread_local std::vector<uint8_t> scratch;
    plan_attention(plan, call.shape, call.batch, threads());
    int64_t bytes = attention_scratch_bytes(call.shape);
    if (int64_t(scratch.size()) < bytes * threads()) scratch.resize(size_t(bytes * threads()));
    AttentionPlan& shared = plan;
    uint8_t* memory = scratch.data();
    parallel([&, memory](int thread, int threads) {
        Range mine = rows_of(call.batch, thread, threads);
        for (int row = mine.begin; row < mine.end; ++row)
            for (int h = 0, s = sequence_of(call.batch, row); h < call.shape.kv_heads; ++h)
                write_cache<E>(
                    call.cache, call.table, s, position_of(call.batch, s, row), h,
                    static_cast<const E*>(call.k) + row * call.k_stride + h * call.shape.head_dim,
                    static_cast<const E*>(call.v) + row * call.v_stride + h * call.shape.head_dim);
        barrier();
        attend(shared, call.shape, call.cache, call.table, call.batch,
               static_cast<const E*>(call.q), call.q_stride, static_cast<E*>(call.out),
               call.out_stride, memory + bytes * thread);
    });
}

}  // namespace

extern "C" void tl_attend(const AttendCall* call) {
    if (call->cache.element_bytes == 4)
        attend_all<float>(*call);
    else
        attend_all<tl::Bf16>(*call);
}
