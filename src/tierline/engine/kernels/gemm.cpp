#include "gemm.h"

#include <immintrin.h>

#include <algorithm>
#include <cassert>
#include <cstring>

#include "convert.h"

namespace tl {
namespace {

// A packed matrix is a row of panels of PANEL outputs.  A panel is a row of units: one k of F32
// or two k of BF16 (a pair lies together, as vdpbf16ps takes it) for all PANEL outputs, so that
// one row of activations streams it from end to end.  n and k are padded with zeros.

constexpr int UNIT_BYTES = PANEL * 4;
constexpr int UNITS_MAX = 128;  // in one stretch of k: 16 KB of weights stay in the L1 cache
constexpr int ROWS_BYTES_MAX = 480 << 10;  // of activations that stay in the L2 cache
constexpr int AHEAD_BYTES = 24 * UNIT_BYTES;  // prefetched, for products that wait for memory

#if defined(__AVX512BF16__)
using Floats = __m512;
constexpr int WIDTH = 16;
constexpr int TILE_ROWS = 12;  // x 2 vectors = 24 accumulators of 32 registers
inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
#else
using Floats = __m256;
constexpr int WIDTH = 8;
constexpr int TILE_ROWS = 4;  // x 2 vectors = 8 accumulators of 16 registers
inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
#endif
constexpr int VECTORS = PANEL / WIDTH;  // of one panel

// One unit for M rows and V vectors of outputs: acc += a x b.  `at(j)` says where vector j is.

struct Float32 {
    static constexpr int ROW_BYTES = 4;  // of a row of activations in one unit

    template <int M, int V, class At>
    static inline __attribute__((always_inline)) void step(Floats (&acc)[M][V], const char* a,
                                                           size_t a_stride, At at) {
        Floats b[V];
        for (int j = 0; j < V; ++j) b[j] = load(reinterpret_cast<const float*>(at(j)));
        for (int i = 0; i < M; ++i) {
            const float x = *reinterpret_cast<const float*>(a + i * a_stride);
#if defined(__AVX512BF16__)
            for (int j = 0; j < V; ++j) acc[i][j] = _mm512_fmadd_ps(_mm512_set1_ps(x), b[j], acc[i][j]);
#else
            for (int j = 0; j < V; ++j) acc[i][j] = _mm256_fmadd_ps(_mm256_set1_ps(x), b[j], acc[i][j]);
#endif
        }
    }
};

struct Bfloat16 {
#if defined(__AVX512BF16__)
    static constexpr int ROW_BYTES = 4;

    template <int M, int V, class At>
    static inline __attribute__((always_inline)) void step(Floats (&acc)[M][V], const char* a,
                                                           size_t a_stride, At at) {
        __m512bh b[V];
        for (int j = 0; j < V; ++j) b[j] = (__m512bh)_mm512_loadu_si512(at(j));
        for (int i = 0; i < M; ++i) {
            const __m512bh x =
                (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(a + i * a_stride));
            for (int j = 0; j < V; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], x, b[j]);
        }
    }
#else
    static constexpr int ROW_BYTES = 8;  // two floats: weights are widened, activations are not rounded

    template <int M, int V, class At>
    static inline __attribute__((always_inline)) void step(Floats (&acc)[M][V], const char* a,
                                                           size_t a_stride, At at) {
        for (int odd = 0; odd < 2; ++odd) {
            __m256 b[V];
            for (int j = 0; j < V; ++j) {
                const __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at(j)));
                b[j] = _mm256_castsi256_ps(odd ? _mm256_and_si256(pair, _mm256_set1_epi32(int(0xffff0000)))
                                               : _mm256_slli_epi32(pair, 16));
            }
            for (int i = 0; i < M; ++i) {
                const __m256 x = _mm256_set1_ps(reinterpret_cast<const float*>(a + i * a_stride)[odd]);
                for (int j = 0; j < V; ++j) acc[i][j] = _mm256_fmadd_ps(x, b[j], acc[i][j]);
            }
        }
    }
#endif
};

// What a tile works on: M rows and V vectors of neighbouring outputs, one stretch of k.
struct Tile {
    const char* a;
    size_t a_stride;
    const char* b;  // first unit of the stretch, first vector
    size_t panel_bytes;
    const char* ahead;  // what follows in memory order after this tile, to be prefetched; or null
    int units;
    float* sums;  // [M][PANEL] between stretches
    bool first, last;
    float* out;
    int ldo;
    const float* bias;  // or null
    bool accumulate;
    int columns;  // that exist, from `out` on
};

void put(const Tile& t, int row, int column, Floats value) {
    if (column >= t.columns) return;
    float* out = t.out + size_t(row) * t.ldo + column;
    alignas(64) float whole[WIDTH], other[WIDTH] = {};
    const int count = std::min(WIDTH, t.columns - column);
    const bool part = count < WIDTH;
    if (t.bias != nullptr) {
        if (part) std::memcpy(other, t.bias + column, count * sizeof(float));
        value = add(value, part ? load(other) : load(t.bias + column));
    }
    if (t.accumulate) {
        if (part) std::memcpy(other, out, count * sizeof(float));
        value = add(value, part ? load(other) : load(out));
    }
    if (!part) return store(out, value);
    store(whole, value);
    std::memcpy(out, whole, count * sizeof(float));
}

template <class Op, int M, int V>
void tile(const Tile& t) {
    constexpr int PANELS = (V + VECTORS - 1) / VECTORS;
    Floats acc[M][V];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < V; ++j)
            acc[i][j] = t.first ? zero() : load(t.sums + i * PANEL + j * WIDTH);
    const char *a = t.a, *b = t.b;
    const size_t panel_bytes = t.panel_bytes, a_stride = t.a_stride;
    const auto at = [&](int j) {
        return b + (j / VECTORS) * panel_bytes + (j % VECTORS) * (WIDTH * 4);
    };
    if (t.ahead != nullptr) {
        const int own = std::max(0, t.units - AHEAD_BYTES / UNIT_BYTES);
        const char* next = b + AHEAD_BYTES;
        for (int u = 0; u < t.units; ++u, a += Op::ROW_BYTES, b += UNIT_BYTES, next += UNIT_BYTES) {
            if (u == own) next = t.ahead;
            for (int p = 0; p < PANELS; ++p)
                for (int line = 0; line < UNIT_BYTES; line += 64)
                    _mm_prefetch(next + p * panel_bytes + line, _MM_HINT_T0);
            Op::template step<M, V>(acc, a, a_stride, at);
        }
    } else {
        for (int u = 0; u < t.units; ++u, a += Op::ROW_BYTES, b += UNIT_BYTES)
            Op::template step<M, V>(acc, a, a_stride, at);
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < V; ++j)
            if (t.last)
                put(t, i, j * WIDTH, acc[i][j]);
            else
                store(t.sums + i * PANEL + j * WIDTH, acc[i][j]);
}

using TileFunction = void (*)(const Tile&);

// Row counts 1 to TILE_ROWS.  A single row needs many vectors at once to hide the latency of
// the multiplier; there a tile spans several panels.
#if defined(__AVX512BF16__)
template <class Op>
constexpr TileFunction ONE_PANEL[] = {
    tile<Op, 1, 2>, tile<Op, 2, 2>, tile<Op, 3, 2>, tile<Op, 4, 2>,  tile<Op, 5, 2>,  tile<Op, 6, 2>,
    tile<Op, 7, 2>, tile<Op, 8, 2>, tile<Op, 9, 2>, tile<Op, 10, 2>, tile<Op, 11, 2>, tile<Op, 12, 2>};
template <class Op>
constexpr TileFunction MANY_PANELS[] = {tile<Op, 1, 8>, tile<Op, 2, 8>, tile<Op, 3, 4>,
                                        tile<Op, 4, 4>, tile<Op, 5, 4>, tile<Op, 6, 4>};
constexpr int PANELS_AT_ONCE[] = {4, 4, 2, 2, 2, 2};
constexpr int PART_VECTORS = 2;
#else
template <class Op>
constexpr TileFunction ONE_PANEL[] = {tile<Op, 1, 2>, tile<Op, 2, 2>, tile<Op, 3, 2>, tile<Op, 4, 2>};
template <class Op>
constexpr TileFunction MANY_PANELS[] = {tile<Op, 1, 8>};
constexpr int PANELS_AT_ONCE[] = {2};
constexpr int PART_VECTORS = 2;
#endif
constexpr int MANY_ROWS_MAX = sizeof PANELS_AT_ONCE / sizeof *PANELS_AT_ONCE;

size_t k_padded(int type, int k) { return type == F32 ? k : (size_t(k) + 1) / 2 * 2; }
int units_of(int type, int k) { return type == F32 ? k : (k + 1) / 2; }
int panels_of(int n) { return (n + PANEL - 1) / PANEL; }

// One row tile: every panel is read once, from memory, by one tile (or a few tiles together).
template <class Op>
void few_rows(const Matrix& w, const char* a, size_t a_stride, int m, float* out, int ldo,
              bool accumulate, Range panels) {
    const int units = units_of(w.type, w.k);
    const size_t panel_bytes = size_t(units) * UNIT_BYTES;
    Tile t{a, a_stride, nullptr, panel_bytes, nullptr, units, nullptr, true, true, nullptr, ldo, nullptr, accumulate, 0};
    for (int panel = panels.begin; panel < panels.end;) {
        int together = m <= MANY_ROWS_MAX ? PANELS_AT_ONCE[m - 1] : 1;
        if (panel + together > panels.end) together = 1;
        const char* b = static_cast<const char*>(w.data) + panel * panel_bytes;
        for (int v = 0; v < (together > 1 ? 1 : VECTORS); v += PART_VECTORS) {
            const int column = panel * PANEL + v * WIDTH;
            t.b = b + v * WIDTH * 4;
            t.ahead = b + together * panel_bytes;  // harmless past the end
            t.out = out + column;
            t.bias = w.bias == nullptr ? nullptr : w.bias + column;
            t.columns = w.n - column;
            (together > 1 ? MANY_PANELS<Op>[m - 1] : ONE_PANEL<Op>[m - 1])(t);
        }
        panel += together;
    }
}

// Many rows: blocks of rows stay in the L2 cache while the panels pass, a stretch of one panel
// in the L1 cache while the rows pass.
template <class Op>
void many_rows(const Matrix& w, const char* a, size_t a_stride, int m, float* out, int ldo,
               bool accumulate, Range panels) {
    const int units = units_of(w.type, w.k);
    const size_t panel_bytes = size_t(units) * UNIT_BYTES;
    constexpr int ROWS_MAX = 256;
    const int fit = std::max<int>(4 * TILE_ROWS, std::min<int>(ROWS_MAX, int(ROWS_BYTES_MAX / a_stride)));
    const int blocks = (m + fit - 1) / fit;
    alignas(64) static thread_local float sums[ROWS_MAX * PANEL];
    for (int block = 0; block < blocks; ++block) {
        const Range rows = share(m, block, blocks);
        const int tiles = (rows.end - rows.begin + TILE_ROWS - 1) / TILE_ROWS;
        for (int part = panels.begin * (VECTORS / PART_VECTORS); part < panels.end * (VECTORS / PART_VECTORS); ++part) {
            const int column = part * PART_VECTORS * WIDTH;
            const char* b = static_cast<const char*>(w.data) + column / PANEL * panel_bytes +
                            column % PANEL * 4;
            for (int unit = 0; unit < units; unit += UNITS_MAX) {
                const int stretch = std::min(UNITS_MAX, units - unit);
                for (int i = 0; i < tiles; ++i) {
                    const Range tile_rows = share(rows.end - rows.begin, i, tiles);
                    const int row = rows.begin + tile_rows.begin;
                    const Tile t{a + row * a_stride + size_t(unit) * Op::ROW_BYTES,
                                 a_stride,
                                 b + size_t(unit) * UNIT_BYTES,
                                 panel_bytes,
                                 nullptr,
                                 stretch,
                                 sums + tile_rows.begin * PANEL,
                                 unit == 0,
                                 unit + stretch == units,
                                 out + size_t(row) * ldo + column,
                                 ldo,
                                 w.bias == nullptr ? nullptr : w.bias + column,
                                 accumulate,
                                 w.n - column};
                    ONE_PANEL<Op>[tile_rows.end - tile_rows.begin - 1](t);
                }
            }
        }
    }
}

template <class Op>
void product(const Matrix& w, const void* a, int m, float* out, int ldo, bool accumulate,
             Range panels) {
    const auto rows = m <= TILE_ROWS ? few_rows<Op> : many_rows<Op>;
    rows(w, static_cast<const char*>(a), activation_bytes(w.type, w.k), m, out, ldo, accumulate, panels);
}

// Packing

float read(int type, const void* row, int k) {
    if (type == F32) return static_cast<const float*>(row)[k];
    const uint16_t value = static_cast<const uint16_t*>(row)[k];
    return type == BF16 ? bf16_to_float(value) : f16_to_float(value);
}

void pack_row(char* panel, int type, int k, int lane, int source_type, const void* source) {
    if (type == F32) {
        auto* to = reinterpret_cast<float*>(panel) + lane;
        for (int i = 0; i < k; ++i) to[size_t(i) * PANEL] = read(source_type, source, i);
        return;
    }
    auto* to = reinterpret_cast<uint16_t*>(panel) + 2 * lane;
    for (int i = 0; i < k; ++i)
        to[size_t(i / 2) * PANEL * 2 + i % 2] = source_type == BF16
                                                    ? static_cast<const uint16_t*>(source)[i]
                                                    : float_to_bf16(read(source_type, source, i));
}

}  // namespace

size_t packed_bytes(int type, int n, int k) {
    return size_t(panels_of(n)) * units_of(type, k) * UNIT_BYTES;
}

void pack(void* packed, int type, int n, int k, int source_type, const void* source,
          size_t source_stride_bytes, int first_row, int rows, int thread, int threads) {
    const Range panels = share(panels_of(n), thread, threads);
    const size_t panel_bytes = size_t(units_of(type, k)) * UNIT_BYTES;
    for (int panel = panels.begin; panel < panels.end; ++panel) {
        const int begin = std::max(panel * PANEL, first_row);
        const int end = std::min((panel + 1) * PANEL, first_row + rows);
        if (begin >= end) continue;
        char* to = static_cast<char*>(packed) + panel * panel_bytes;
        if (begin == panel * PANEL) std::memset(to, 0, panel_bytes);
        for (int row = begin; row < end; ++row)
            pack_row(to, type, k, row - panel * PANEL, source_type,
                     static_cast<const char*>(source) + (row - first_row) * source_stride_bytes);
    }
}

void unpack_row(const Matrix& w, int row, float* out) {
    const char* panel = static_cast<const char*>(w.data) +
                        size_t(row / PANEL) * units_of(w.type, w.k) * UNIT_BYTES;
    const int lane = row % PANEL;
    for (int i = 0; i < w.k; ++i)
        out[i] = w.type == F32
                     ? reinterpret_cast<const float*>(panel)[size_t(i) * PANEL + lane]
                     : bf16_to_float(reinterpret_cast<const uint16_t*>(
                           panel)[(size_t(i / 2) * PANEL + lane) * 2 + i % 2]);
}

int activation_kind(int type) {
#if defined(__AVX512BF16__)
    return type == F32 ? F32 : BF16;
#else
    (void)type;
    return F32;
#endif
}

// An odd number of cache lines: rows never fall into the same few sets of the L1 cache.
size_t activation_bytes(int type, int k) {
    const size_t bytes = k_padded(type, k) * (activation_kind(type) == F32 ? 4 : 2);
    return ((bytes + 63) / 64 | 1) * 64;
}

void prepare_row(int type, int k, const float* x, void* row) {
    const size_t bytes = activation_bytes(type, k);
    const bool rounded = activation_kind(type) == BF16;
    const size_t used = size_t(k) * (rounded ? 2 : 4);
    if (rounded)
        floats_to_bf16(x, k, static_cast<uint16_t*>(row));
    else
        std::memcpy(row, x, used);
    std::memset(static_cast<char*>(row) + used, 0, bytes - used);
}

Range columns_of(const Matrix& w, int thread, int threads) {
    const Range panels = share(panels_of(w.n), thread, threads);
    return {std::min(panels.begin * PANEL, w.n), std::min(panels.end * PANEL, w.n)};
}

void gemm(const Matrix& w, const void* a, int m, float* out, int ldo, bool accumulate, int thread,
          int threads) {
    const Range panels = share(panels_of(w.n), thread, threads);
    const auto whole = w.type == F32 ? product<Float32> : product<Bfloat16>;
    if (m > 0) whole(w, a, m, out, ldo, accumulate, panels);
}

}  // namespace tl
