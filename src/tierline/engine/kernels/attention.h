// Attention on a paged cache, for any mix of prompt chunks and decodes.
//
// Called by every thread of a parallel region (`write_cache`, a barrier, `attend`) from the
// whole step, and from Python for networks that torch runs.
//
// The cache: one layer's share of a page holds, for each KV head and each tile of 16 tokens,
// first K as [words of head_dim][16 tokens], then V as [words of 16 tokens][head_dim].  A word
// is one fp32 or two bf16, so both products of attention read rows of 16 lanes from it, and
// what a head reads of a block lies in one piece.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "types.h"

namespace tl {

constexpr int TILE_TOKENS = 16;
constexpr int CHUNK_TOKENS = 128;  // keys per round of the online softmax, at fixed positions

// Where the keys and values of one layer lie.
struct Cache {
    uint8_t* pages;
    int64_t page_bytes;
    int64_t offset;  // of this layer inside a page
    int32_t block_tokens, kv_heads, head_dim, element_bytes;

    int64_t tile_words() const { return int64_t(TILE_TOKENS) * head_dim * element_bytes / 4; }
};

// One step's sequences: rows starts[s] to starts[s + 1] are the last tokens of sequence s.
struct Sequences {
    int32_t count;
    const int32_t* starts;
    const int32_t* lengths;  // tokens in the cache once this step has written
};

inline int position_of(const Sequences& batch, int sequence, int row) {
    return batch.lengths[sequence] - (batch.starts[sequence + 1] - row);
}

// Pages of a cache group: that of block b, for a layer in `part`, at [s * stride + b * parts +
// part].
struct Table {
    const int32_t* entries;
    int32_t stride, parts, part;
};

// Some rows of one sequence against some keys of one KV head.
struct WorkItem {
    int32_t sequence, kv_head;
    int32_t row, rows;      // tokens, counted over the whole batch
    int32_t chunk, chunks;  // of keys
    int32_t split;          // index into `splits`, or -1: nobody else has these rows
    int32_t partial;        // the first of its results there
};

// Rows whose keys several threads share; the last one done merges what they left.
struct Split {
    int32_t items, partial, chunks;
};

// Who does what: made once a step for all layers of one shape.
struct AttentionPlan {
    std::vector<WorkItem> items;  // the dearest first
    std::vector<Split> splits;
    std::vector<std::atomic<int32_t>> left;  // of each split: items not done
    std::vector<float> partials;             // records of split items
    int32_t partial_count = 0;
    std::atomic<int32_t> next{0};
    int32_t group = 0, rows_max = 0;  // heads of a KV head; rows of the largest item
};

struct AttentionShape {
    int32_t heads, kv_heads, head_dim;
    int32_t window;  // 0: everything before
    float scale;
};

void plan_attention(AttentionPlan& plan, const AttentionShape& shape, const Sequences& batch,
                    int threads);

// Bytes that every thread needs in `attend`.
int64_t attention_scratch_bytes(const AttentionShape& shape);

// The sequence that a row belongs to.
int sequence_of(const Sequences& batch, int row);

// The rows whose keys and values are one thread's to write: an even share, moved so that no
// two threads write into one tile.
Range rows_of(const Sequences& batch, int thread, int threads);

// Put one token's key and value of one KV head into the cache; E (float or Bf16) is its element.
// The first token of a tile clears the tile: what is never written weighs 0 and is not NaN.
template <class E, class Source>
void write_cache(const Cache& cache, const Table& table, int sequence, int position, int kv_head,
                 const Source* k, const Source* v);

// Softmax(scale q k) v of every row.  q and out: [rows][heads x head_dim] with strides in
// elements.  `plan.next` must be 0 and everything written when the first thread enters.
template <class E, class Out>
void attend(AttentionPlan& plan, const AttentionShape& shape, const Cache& cache,
            const Table& table, const Sequences& batch, const E* q, int64_t q_stride, Out* out,
            int64_t out_stride, void* scratch);

}  // namespace tl
