#include "gemm.h"

#include "stored.h"
#include "tile.h"

#include <vector>

namespace tl {
namespace {

// A packed matrix is a row of panels of PANEL outputs.  A panel is a row of units: one k of F32
// or two k of BF16 (a pair lies together, as vdpbf16ps takes it) for all PANEL outputs, so that
// one row of activations streams it from end to end.  n and k are padded with zeros.

constexpr int UNIT_BYTES = PANEL * 4;
constexpr int UNITS_MAX = 448;  // in one stretch of k: 112 KB of two panels, in the L2 cache
constexpr int AHEAD_BYTES = 32 * UNIT_BYTES;  // prefetched, for products that wait for memory

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

template <class Op, int M, int V>
void tile(const Tile& t) {
    constexpr int PANELS = (V + VECTORS - 1) / VECTORS;
    Floats acc[M][V];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < V; ++j)
            acc[i][j] = t.first ? zero() : load(t.sums + (i * V + j) * WIDTH);
    const char *a = t.a, *b = t.b;
    const size_t panel_bytes = t.panel_bytes, a_stride = t.a_stride;
    const auto at = [&](int j) {
        return b + (j / VECTORS) * panel_bytes + (j % VECTORS) * (WIDTH * 4);
    };
    if (t.stream) {  // ahead of itself, towards the end what the next tile begins with
        const int own = std::max(0, t.units - AHEAD_BYTES / UNIT_BYTES);
        const char* next = b + AHEAD_BYTES;
        for (int u = 0; u < t.units; ++u, a += Op::ROW_BYTES, b += UNIT_BYTES, next += UNIT_BYTES) {
            if (u == own) next = t.ahead;
            for (int p = 0; p < PANELS; ++p)
                for (int line = 0; line < UNIT_BYTES; line += 64)
                    _mm_prefetch(next + p * panel_bytes + line, _MM_HINT_T1);
            Op::template step<M, V>(acc, a, a_stride, at);
        }
    } else {  // one panel of what the next stretch begins with
        const char* next = t.ahead;
        for (int u = 0; u < t.units; ++u, a += Op::ROW_BYTES, b += UNIT_BYTES, next += UNIT_BYTES) {
            for (int line = 0; line < UNIT_BYTES; line += 64) _mm_prefetch(next + line, _MM_HINT_T1);
            Op::template step<M, V>(acc, a, a_stride, at);
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < V; ++j)
            if (t.last)
                put(t, i, j * WIDTH, acc[i][j]);
            else
                store(t.sums + (i * V + j) * WIDTH, acc[i][j]);
}

// Functions for 1, 2, ... rows.  Few rows take one panel at a time (or half a one), so that a
// thread reads one long stream; two vectors hide enough of the multiplier's latency for that.
// Many rows are multiplied fastest by tiles of 6 rows x 4 vectors.
constexpr int NARROW = 2;
#if defined(__AVX512BF16__)
template <class Op>
constexpr TileFunction NARROW_TILES[] = {
    tile<Op, 1, 2>, tile<Op, 2, 2>, tile<Op, 3, 2>, tile<Op, 4, 2>,  tile<Op, 5, 2>,  tile<Op, 6, 2>,
    tile<Op, 7, 2>, tile<Op, 8, 2>, tile<Op, 9, 2>, tile<Op, 10, 2>, tile<Op, 11, 2>, tile<Op, 12, 2>};
constexpr int WIDE = 4;
template <class Op>
constexpr TileFunction WIDE_TILES[] = {tile<Op, 1, 4>, tile<Op, 2, 4>, tile<Op, 3, 4>,
                                       tile<Op, 4, 4>, tile<Op, 5, 4>, tile<Op, 6, 4>};
#else
template <class Op>
constexpr TileFunction NARROW_TILES[] = {tile<Op, 1, 2>, tile<Op, 2, 2>, tile<Op, 3, 2>, tile<Op, 4, 2>};
constexpr int WIDE = 2;
template <class Op>
constexpr auto& WIDE_TILES = NARROW_TILES<Op>;
#endif
constexpr int FEW = sizeof NARROW_TILES<Float32> / sizeof(TileFunction);  // rows of one tile
constexpr int ROWS = sizeof WIDE_TILES<Float32> / sizeof(TileFunction);   // of a tile among many

size_t k_padded(int type, int k) { return type == F32 ? k : (size_t(k) + 1) / 2 * 2; }
int units_of(int type, int k) { return type == F32 ? k : (k + 1) / 2; }

const char* weights_at(const Matrix& w, size_t panel_bytes, int column) {
    return static_cast<const char*>(w.data) + column / PANEL * panel_bytes + column % PANEL * 4;
}

// One tile of rows: the weights stream through it, once.
template <class Op>
void few_rows(const Matrix& w, const char* a, size_t a_stride, int m, const Target& target,
              Range panels) {
    const int units = units_of(w.type, w.k);
    Tile t{};
    t.a = a, t.a_stride = a_stride;
    t.panel_bytes = size_t(units) * UNIT_BYTES;
    t.units = units;
    t.stream = t.first = t.last = true;
    for (int column = panels.begin * PANEL; column < panels.end * PANEL; column += NARROW * WIDTH) {
        t.b = weights_at(w, t.panel_bytes, column);
        t.ahead = weights_at(w, t.panel_bytes, column + NARROW * WIDTH);  // harmless past the end
        target.aim(t, w, 0, column);
        NARROW_TILES<Op>[m - 1](t);
    }
}

// A stretch of k for two panels stays in the L2 cache while the rows of a block pass, and the
// block stays there while the panels pass.  (Short stretches that fit the L1 cache cost more in
// beginnings and ends of tiles than they save: 209 GFLOP/s against 230 of 232 possible.)
template <class Op>
void one_block(const Matrix& w, const char* a, size_t a_stride, Range rows, const Target& target,
               Range panels) {
    alignas(64) static thread_local float sums[BLOCK_ROWS_MAX * WIDE * WIDTH];
    const int units = units_of(w.type, w.k), m = rows.end - rows.begin;
    const int tiles = (m + ROWS - 1) / ROWS;
    Tile t{};
    t.a_stride = a_stride;
    t.panel_bytes = size_t(units) * UNIT_BYTES;
    for (int column = panels.begin * PANEL, end = panels.end * PANEL; column < end;) {
        const bool whole = column + WIDE * WIDTH <= end;
        const int width = (whole ? WIDE : NARROW) * WIDTH;
        for (int unit = 0; unit < units; unit += t.units) {
            t.units = std::min(UNITS_MAX, units - unit);
            t.b = weights_at(w, t.panel_bytes, column) + size_t(unit) * UNIT_BYTES;
            t.first = unit == 0, t.last = unit + t.units == units;
            const char* next = t.last ? weights_at(w, t.panel_bytes, column + width)
                                      : t.b + t.units * UNIT_BYTES;
            for (int i = 0; i < tiles; ++i) {
                const Range mine = share(m, i, tiles);
                const int row = rows.begin + mine.begin;
                t.a = a + row * a_stride + size_t(unit) * Op::ROW_BYTES;
                t.sums = sums + mine.begin * width;
                t.ahead = i < WIDE / VECTORS ? next + i * t.panel_bytes : t.b;
                target.aim(t, w, row, column);
                (whole ? WIDE_TILES<Op> : NARROW_TILES<Op>)[mine.end - mine.begin - 1](t);
            }
        }
        column += width;
    }
}

template <class Op>
void product(const Matrix& w, const char* a, int m, const Target& target, Range panels) {
    const size_t a_stride = activation_bytes(w.type, w.k);
    if (m <= FEW) return few_rows<Op>(w, a, a_stride, m, target, panels);
    const int blocks = row_blocks(m, ROWS, a_stride);
    for (int block = 0; block < blocks; ++block)
        one_block<Op>(w, a, a_stride, share(m, block, blocks), target, panels);
}

#if !defined(__AVX512BF16__)

// GGUF blocks: a stretch of one panel becomes floats in the L1 cache, then all rows pass.
void stored_multiply(const Matrix& w, const char* a, size_t a_stride, int m, const Target& target,
                     Range panels) {
    constexpr int STRETCH = 4;  // blocks
    alignas(64) static thread_local float opened[STRETCH * OPEN_FLOATS];
    std::vector<float> sums(size_t(m) * PANEL);
    const int units = w.k / BLOCK, tiles = (m + FEW - 1) / FEW;
    const size_t block_bytes = units > 0 ? stored_panel_bytes(w.type, w.k) / units : 0;
    const char* block = static_cast<const char*>(w.data) + size_t(panels.begin) * units * block_bytes;
    Tile t{};
    t.a_stride = a_stride;
    for (int panel = panels.begin; panel < panels.end; ++panel)
        for (int unit = 0, count = 0; unit < units; unit += count) {
            count = std::min(STRETCH, units - unit);
            for (int u = 0; u < count; ++u, block += block_bytes)
                stored_open(block, w.type, opened + u * OPEN_FLOATS);
            t.units = count * BLOCK;
            t.first = unit == 0, t.last = unit + count == units;
            for (int part = 0; part < PANEL; part += NARROW * WIDTH)
                for (int i = 0; i < tiles; ++i) {
                    const Range rows = share(m, i, tiles);
                    t.a = a + rows.begin * a_stride + size_t(unit) * BLOCK * sizeof(float);
                    t.b = t.ahead = reinterpret_cast<const char*>(opened + part);
                    t.sums = sums.data() + size_t(m) * part + rows.begin * NARROW * WIDTH;
                    target.aim(t, w, rows.begin, panel * PANEL + part);
                    NARROW_TILES<Float32>[rows.end - rows.begin - 1](t);
                }
        }
}

#endif

void multiply(const Matrix& w, const void* a, int m, const Target& target, Range panels) {
    const char* rows = static_cast<const char*>(a);
    if (m == 0) return;
    if (is_stored(w.type))
        stored_multiply(w, rows, activation_bytes(w.type, w.k), m, target, panels);
    else if (w.type == F32)
        product<Float32>(w, rows, m, target, panels);
    else
        product<Bfloat16>(w, rows, m, target, panels);
}

// Packing

size_t panel_bytes_of(int type, int k) {
    return is_stored(type) ? stored_panel_bytes(type, k) : size_t(units_of(type, k)) * UNIT_BYTES;
}

float read(int type, const void* row, int k) {
    if (type == F32) return static_cast<const float*>(row)[k];
    const uint16_t value = static_cast<const uint16_t*>(row)[k];
    return type == BF16 ? bf16_to_float(value) : f16_to_float(value);
}

void pack_row(char* panel, int type, int k, int lane, int source_type, const void* source) {
    if (is_stored(type)) return stored_pack_row(panel, type, k, lane, source);
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

size_t packed_bytes(int type, int n, int k) { return panels_of(n) * panel_bytes_of(type, k); }

void pack(void* packed, int type, int n, int k, int source_type, const void* source,
          size_t source_stride_bytes, int first_row, int rows, int thread, int threads) {
    const Range panels = share(panels_of(n), thread, threads);
    const size_t panel_bytes = panel_bytes_of(type, k);
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
    const char* panel =
        static_cast<const char*>(w.data) + row / PANEL * panel_bytes_of(w.type, w.k);
    const int lane = row % PANEL;
    if (is_stored(w.type)) return stored_unpack_row(panel, w.type, w.k, lane, out);
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

// A row rounded to bf16 is followed by the sums of its blocks, which minima multiply.
static size_t values_bytes(int type, int k) {
    return k_padded(type, k) * (activation_kind(type) == F32 ? 4 : 2);
}

// An odd number of cache lines: rows never fall into the same few sets of the L1 cache.
size_t activation_bytes(int type, int k) {
    const size_t sums = activation_kind(type) == BF16 ? size_t(k / BLOCK) * sizeof(float) : 0;
    return ((values_bytes(type, k) + sums + 63) / 64 | 1) * 64;
}

static void sum_blocks(const uint16_t* x, int blocks, float* sums) {
    for (int b = 0; b < blocks; ++b, x += BLOCK) {
        float values[BLOCK];
        bf16_to_floats(x, BLOCK, values);
        for (int width = BLOCK / 2; width > 0; width /= 2)
            for (int i = 0; i < width; ++i) values[i] += values[i + width];
        sums[b] = values[0];
    }
}

void prepare_row(int type, int k, int x_type, const void* x, void* row) {
    const int kind = activation_kind(type);
    const size_t used = size_t(k) * (kind == F32 ? 4 : 2);
    if (x_type == kind)
        std::memcpy(row, x, used);
    else if (kind == BF16)
        floats_to_bf16(static_cast<const float*>(x), k, static_cast<uint16_t*>(row));
    else
        bf16_to_floats(static_cast<const uint16_t*>(x), k, static_cast<float*>(row));
    char* end = static_cast<char*>(row) + values_bytes(type, k);
    std::memset(static_cast<char*>(row) + used, 0, values_bytes(type, k) - used);
    if (kind == BF16 && k % BLOCK == 0)
        sum_blocks(static_cast<const uint16_t*>(row), k / BLOCK, reinterpret_cast<float*>(end));
}

void prepare_row(int type, int k, const float* x, void* row) { prepare_row(type, k, F32, x, row); }

Range columns_of(const Matrix& w, int thread, int threads) {
    const Range panels = share(panels_of(w.n), thread, threads);
    return {std::min(panels.begin * PANEL, w.n), std::min(panels.end * PANEL, w.n)};
}

void gemm(const Matrix& w, const void* a, int m, float* out, int ldo, bool accumulate, int thread,
          int threads) {
    const Target target{reinterpret_cast<char*>(out), size_t(ldo) * sizeof(float), F32, accumulate};
    multiply(w, a, m, target, share(panels_of(w.n), thread, threads));
}

void gemm_bf16(const Matrix& w, const void* a, int m, uint16_t* out, int ldo, int thread,
               int threads) {
    const Target target{reinterpret_cast<char*>(out), size_t(ldo) * sizeof(uint16_t), BF16, false};
    multiply(w, a, m, target, share(panels_of(w.n), thread, threads));
}

}  // namespace tl
