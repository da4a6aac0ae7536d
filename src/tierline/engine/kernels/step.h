// A whole step of a decoder in one call: token numbers in, logits (and sums of states) out.
//
// native_step.py fills these structures once (`Model`) and for every step (`Batch`); the
// fields are in step with it.  All threads go through the layers together and meet at
// barriers; nothing is allocated unless a step has more rows than any before it.
#pragma once

#include "attention.h"
#include "types.h"

namespace tl {

struct Rope {
    const float* inverse_frequencies;
    int32_t count;  // half as many as dimensions that turn
    int32_t interleaved;
    float scale;
};

enum Activation : int32_t { SILU = 0, GELU_TANH = 1 };

// Routed experts: each token goes to the `active` ones that its router scores highest.
struct Experts {
    int32_t count, active, normalised;
    float scale;
    Matrix router;                 // F32
    const Matrix *gate_up, *down;  // of each expert
};

// Weights of norms are F32 with the network's offset added; absent ones are null.
struct Layer {
    Matrix qkv, o;
    Matrix gate_up;          // panels of gate and up in turn: 32 outputs of one, 32 of the other
    Matrix down;             // with experts both are like those of every expert, without data
    const Experts* experts;  // null: dense
    const float *norm, *post_attention_norm, *ffn_norm, *post_ffn_norm;
    const float *q_norm, *k_norm;
    AttentionShape attention;
    int32_t rope;
    int32_t intermediate, activation;
    int32_t group, parts, part, slot;  // where the cache of this layer lies
};

struct Model {
    int32_t hidden, vocabulary, layer_count, rope_count;
    float norm_eps, embedding_scale;
    float logit_softcap;  // 0: none
    Matrix head;
    Matrix embed;  // the head again when they are tied
    const float* norm;
    const Layer* layers;
    const Rope* ropes;
};

struct Batch {
    Sequences sequences;
    const int32_t* tokens;
    const int32_t* wanted;  // rows with logits, ascending
    int32_t wanted_count;
    int32_t element_bytes;  // of the cache
    uint8_t* pages;
    int64_t page_bytes;
    int32_t block_tokens;
    const int32_t* const* tables;  // of each group
    const int32_t* strides;        // entries between rows of a group's table
    const int32_t* pooled;         // sequences whose last normed rows are summed, ascending
    float* sums;                   // [pooled][hidden], added to row by row
    int32_t pooled_count;
};

}  // namespace tl
