// What every kernel file agrees on: types of weights, a packed matrix, row types of activations.
//
// Called by nobody in particular: gemm.cpp packs and multiplies, the step composes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tl {

// The numbers are part of the C interface; native.py names them.  Weights can have any of
// them; activations and results are F32 or BF16; F16 is only ever read from a checkpoint.
enum Type : int32_t { F32 = 0, BF16 = 1, F16 = 2, Q8_0 = 3, Q4_0 = 4, Q4_1 = 5 };

constexpr int PANEL = 32;  // outputs that lie together in a packed matrix
constexpr int BLOCK = 32;  // inputs that share a scale in a GGUF type

// y = W x + bias with W of n outputs and k inputs, packed by tl_pack.
struct Matrix {
    int32_t n, k, type;
    const void* data;   // tl_packed_bytes(type, n, k) bytes, aligned to 64
    const float* bias;  // n numbers, or null
};

struct Range {
    int begin, end;
};

// The part of `count` things that is one thread's: contiguous, sizes differ by at most one.
inline Range share(int count, int thread, int threads) {
    return {int(int64_t(count) * thread / threads), int(int64_t(count) * (thread + 1) / threads)};
}

}  // namespace tl
