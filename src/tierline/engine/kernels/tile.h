// What the products of gemm.cpp (dense weights) and stored.cpp (GGUF blocks) share: vectors of
// this instruction set, a tile of results, and how a tile is put where it belongs.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "convert.h"
#include "types.h"

namespace tl {

#if defined(__AVX512BF16__)
using Floats = __m512;
constexpr int WIDTH = 16;
inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
#else
using Floats = __m256;
constexpr int WIDTH = 8;
inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
#endif
constexpr int VECTORS = PANEL / WIDTH;  // of one panel

// What a tile works on: M rows and V vectors of neighbouring outputs, one stretch of k.
struct Tile {
    const char* a;
    size_t a_stride;
    const char* b;  // first unit of the stretch, first vector
    size_t panel_bytes;
    const char* ahead;  // prefetched: see `tile`
    bool stream;        // the weights come from memory and are used once
    int units;
    float* sums;  // [M][PANEL] between stretches
    bool first, last;
    char* out;
    size_t out_stride;  // bytes
    int out_type;
    const float* bias;  // or null
    bool accumulate;
    int columns;  // that exist, from `out` on
};

// One vector of results, whole or as much of it as the matrix has columns.
inline void put(const Tile& t, int row, int column, Floats value) {
    const int count = std::min(WIDTH, t.columns - column);
    if (count <= 0) return;
    alignas(64) float values[WIDTH] = {};
    const auto read = [&](const float* from) {
        if (count == WIDTH) return load(from);
        std::memcpy(values, from, count * sizeof(float));
        return load(values);
    };
    char* out = t.out + row * t.out_stride;
    if (t.bias != nullptr) value = add(value, read(t.bias + column));
    if (t.out_type == BF16) {
        store(values, value);
        floats_to_bf16(values, count, reinterpret_cast<uint16_t*>(out) + column);
        return;
    }
    float* floats = reinterpret_cast<float*>(out) + column;
    if (t.accumulate) value = add(value, read(floats));
    if (count == WIDTH) return store(floats, value);
    store(values, value);
    std::memcpy(floats, values, count * sizeof(float));
}

// Where results go.
struct Target {
    char* data;
    size_t stride;
    int type;
    bool accumulate;

    void aim(Tile& t, const Matrix& w, int row, int column) const {
        t.out = data + row * stride + size_t(column) * (type == BF16 ? 2 : 4);
        t.out_stride = stride;
        t.out_type = type;
        t.accumulate = accumulate;
        t.bias = w.bias == nullptr ? nullptr : w.bias + column;
        t.columns = w.n - column;
    }
};

using TileFunction = void (*)(const Tile&);

inline int panels_of(int n) { return (n + PANEL - 1) / PANEL; }

constexpr int BLOCK_BYTES = 480 << 10;  // of activations that stay in the L2 cache
constexpr int BLOCK_ROWS_MAX = 256;

// Rows that pass a panel together, all of about the same number.
inline int row_blocks(int m, int tile_rows, size_t row_bytes) {
    const int fit = std::max<int>(8 * tile_rows, int(BLOCK_BYTES / row_bytes));
    return (m + std::min(fit, BLOCK_ROWS_MAX) - 1) / std::min(fit, BLOCK_ROWS_MAX);
}

}  // namespace tl
