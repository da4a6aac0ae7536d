#include "stored.h"

#include <type_traits>

namespace tl {
namespace {

// A panel is a row of blocks of 32 k for PANEL outputs: the quants, then PANEL scales, then (Q4_1)
// PANEL minima, both F16.  A quant lies where its vector needs it:
//   4 bits: 4 groups of 8 k, each a vector for outputs 0-15 and one for 16-31.  A lane of 32 bits
//           is one output; quants of even k are the nibbles of its low half, of odd k of its high
//           half, so that a shift and a table make a pair of bf16 of every lane.
//   8 bits: 16 pairs of k, each a vector of 64 bytes ordered as unpacking bytes to words takes it.
// Quants are small integers and exact in bf16: a block is summed with them as they are, and its
// scale multiplies the sum, which is more exact than rounding scale x quant, and the same for any
// number of rows:  acc = acc + scale x (sum of a x q) + minimum x (sum of a).

constexpr int PAIRS = BLOCK / 2;

constexpr int quant_bytes(int type) { return PANEL * BLOCK / (type == Q8_0 ? 1 : 2); }
constexpr int block_bytes(int type) { return quant_bytes(type) + PANEL * (type == Q4_1 ? 4 : 2); }
constexpr int zero_point(int type) { return type == Q4_0 ? 8 : 0; }

// Where a quant lies: byte, and for 4 bits the shift in it.
struct Spot {
    int byte, shift;
};

Spot spot(int type, int lane, int k) {
    const int half = lane / 16, in_half = lane % 16, odd = k % 2;
    if (type == Q8_0)
        return {k / 2 * 64 + in_half / 4 * 16 + half * 8 + in_half % 4 * 2 + odd, 0};
    const int pair = k % 8 / 2;  // of the group
    return {(k / 8 * 2 + half) * 64 + in_half * 4 + odd * 2 + pair / 2, pair % 2 * 4};
}

int quant(int type, const char* block, int lane, int k) {
    const Spot at = spot(type, lane, k);
    if (type == Q8_0) return static_cast<int8_t>(block[at.byte]);
    return (static_cast<uint8_t>(block[at.byte]) >> at.shift & 15) - zero_point(type);
}

const uint16_t* scales_of(int type, const char* block) {
    return reinterpret_cast<const uint16_t*>(block + quant_bytes(type));
}

#if defined(__AVX512BF16__)

using Bf16s = __m512bh;

inline Floats scale_at(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline Bf16s pair_of(const char* a) {
    return (Bf16s)_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(a));
}

// Pairs of bf16 out of vectors of quants.

template <int TYPE>
struct Nibbles {
    static constexpr int PAIRS_AT_ONCE = 4;  // in one vector, for 16 outputs
    __m512i table;

    Nibbles() {
        alignas(64) uint16_t values[32];
        // Indices have 5 bits, of which the highest belongs to a neighbour: both halves are equal.
        for (int i = 0; i < 32; ++i) values[i] = float_to_bf16(float(i % 16 - zero_point(TYPE)));
        table = _mm512_load_si512(values);
    }

    template <int V>
    inline __attribute__((always_inline)) void load(const char* block, size_t panel_bytes, int at,
                                                    __m512i (&raw)[V]) const {
        for (int j = 0; j < V; ++j)
            raw[j] = _mm512_loadu_si512(block + j / 2 * panel_bytes + (at * 2 + j % 2) * 64);
    }

    template <int V>
    inline __attribute__((always_inline)) Bf16s pair(const __m512i (&raw)[V], int j, int pair) const {
        return (Bf16s)_mm512_permutexvar_epi16(_mm512_srli_epi32(raw[j], 4 * pair), table);
    }
};

struct Bytes {
    static constexpr int PAIRS_AT_ONCE = 1;
    __m512i low[2], high[2];  // bytes of the bf16 of 0 to 127

    Bytes() {
        alignas(64) uint8_t lows[128], highs[128];
        for (int i = 0; i < 128; ++i) {
            const uint16_t value = float_to_bf16(float(i));
            lows[i] = uint8_t(value), highs[i] = uint8_t(value >> 8);
        }
        for (int i = 0; i < 2; ++i) {
            low[i] = _mm512_load_si512(lows + 64 * i);
            high[i] = _mm512_load_si512(highs + 64 * i);
        }
    }

    template <int V>
    inline __attribute__((always_inline)) void load(const char* block, size_t panel_bytes, int at,
                                                    __m512i (&raw)[V]) const {
        for (int j = 0; j < V; j += 2) {
            const __m512i q = _mm512_loadu_si512(block + j / 2 * panel_bytes + at * 64);
            const __m512i size = _mm512_abs_epi8(q);
            const __m512i sign = _mm512_and_si512(q, _mm512_set1_epi8(char(0x80)));
            const __m512i lows = _mm512_permutex2var_epi8(low[0], size, low[1]);
            const __m512i highs =
                _mm512_or_si512(_mm512_permutex2var_epi8(high[0], size, high[1]), sign);
            raw[j] = _mm512_unpacklo_epi8(lows, highs);
            raw[j + 1] = _mm512_unpackhi_epi8(lows, highs);
        }
    }

    template <int V>
    inline __attribute__((always_inline)) Bf16s pair(const __m512i (&raw)[V], int j, int) const {
        return (Bf16s)raw[j];
    }
};

// A block unpacked to bf16 for many rows: 16 pairs, PANEL scales and PANEL minima as floats.
constexpr int OPEN_SCALES = PAIRS * PANEL * 4;
constexpr int OPEN_BYTES = OPEN_SCALES + 2 * PANEL * 4;

struct Opened {
    static constexpr int PAIRS_AT_ONCE = 1;

    template <int V>
    inline __attribute__((always_inline)) void load(const char* block, size_t panel_bytes, int at,
                                                    __m512i (&raw)[V]) const {
        for (int j = 0; j < V; ++j)
            raw[j] = _mm512_loadu_si512(block + j / 2 * panel_bytes + (at * 2 + j % 2) * 64);
    }

    template <int V>
    inline __attribute__((always_inline)) Bf16s pair(const __m512i (&raw)[V], int j, int) const {
        return (Bf16s)raw[j];
    }
};

// How to read the weights of a type, packed (OPENED false) or unpacked.
template <int TYPE, bool OPENED>
struct Source;
template <int TYPE>
struct Source<TYPE, false> : std::conditional_t<TYPE == Q8_0, Bytes, Nibbles<TYPE>> {
    static constexpr size_t STRIDE = block_bytes(TYPE);
    static Floats scale(const char* block, int half) {
        return scale_at(scales_of(TYPE, block) + half * 16);
    }
    static Floats minimum(const char* block, int half) {
        return scale_at(scales_of(TYPE, block) + PANEL + half * 16);
    }
};
template <int TYPE>
struct Source<TYPE, true> : Opened {
    static constexpr size_t STRIDE = OPEN_BYTES;
    static Floats scale(const char* block, int half) {
        return load_floats(block + OPEN_SCALES + half * 64);
    }
    static Floats minimum(const char* block, int half) {
        return load_floats(block + OPEN_SCALES + PANEL * 4 + half * 64);
    }
    static Floats load_floats(const char* p) { return _mm512_loadu_ps(p); }
};

// M rows, V vectors of outputs, t.units blocks of k.  t.sums as in the dense tile; the sums of
// activations of every block lie behind the row (t.ahead is prefetched when streaming).
template <int TYPE, bool OPENED, int M, int V>
void tile(const Tile& t, const char* a_sums) {
    using Weights = Source<TYPE, OPENED>;
    constexpr int AHEAD = 12;  // blocks
    const Weights weights;
    const size_t a_stride = t.a_stride, panel_bytes = t.panel_bytes;
    Floats acc[M][V];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < V; ++j) acc[i][j] = t.first ? zero() : load(t.sums + (i * V + j) * WIDTH);
    const char *a = t.a, *block = t.b, *next = t.b + AHEAD * Weights::STRIDE;
    for (int u = 0; u < t.units; ++u, block += Weights::STRIDE) {
        if (!OPENED) {
            if (u == std::max(0, t.units - AHEAD)) next = t.ahead;
            for (int p = 0; p < (V + 1) / 2; ++p)
                for (size_t line = 0; line < Weights::STRIDE; line += 64)
                    _mm_prefetch(next + p * panel_bytes + line, _MM_HINT_T1);
            next += Weights::STRIDE;
        }
        Floats part[M][V];
        for (int i = 0; i < M; ++i)
            for (int j = 0; j < V; ++j) part[i][j] = zero();
        for (int at = 0; at < PAIRS / Weights::PAIRS_AT_ONCE; ++at) {
            __m512i raw[V];
            weights.template load<V>(block, panel_bytes, at, raw);
#pragma GCC unroll 4
            for (int p = 0; p < Weights::PAIRS_AT_ONCE; ++p, a += 4) {
                Bf16s b[V];
                for (int j = 0; j < V; ++j) b[j] = weights.template pair<V>(raw, j, p);
                for (int i = 0; i < M; ++i) {
                    const Bf16s x = pair_of(a + i * a_stride);
                    for (int j = 0; j < V; ++j) part[i][j] = _mm512_dpbf16_ps(part[i][j], x, b[j]);
                }
            }
        }
        for (int j = 0; j < V; ++j) {
            const char* mine = block + j / 2 * panel_bytes;
            const Floats scale = Weights::scale(mine, j % 2);
            for (int i = 0; i < M; ++i) acc[i][j] = _mm512_fmadd_ps(part[i][j], scale, acc[i][j]);
            if (TYPE != Q4_1) continue;
            const Floats minimum = Weights::minimum(mine, j % 2);
            for (int i = 0; i < M; ++i) {
                const float sum = *reinterpret_cast<const float*>(a_sums + i * a_stride + u * 4);
                acc[i][j] = _mm512_fmadd_ps(_mm512_set1_ps(sum), minimum, acc[i][j]);
            }
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < V; ++j)
            if (t.last)
                put(t, i, j * WIDTH, acc[i][j]);
            else
                store(t.sums + (i * V + j) * WIDTH, acc[i][j]);
}

template <int TYPE>
void open(const char* block, char* to) {
    const Source<TYPE, false> weights;
    constexpr int AT_ONCE = Source<TYPE, false>::PAIRS_AT_ONCE;
    for (int at = 0; at < PAIRS / AT_ONCE; ++at) {
        __m512i raw[2];
        weights.template load<2>(block, 0, at, raw);
#pragma GCC unroll 4
        for (int p = 0; p < AT_ONCE; ++p)
            for (int j = 0; j < 2; ++j)
                _mm512_storeu_si512(to + ((at * AT_ONCE + p) * 2 + j) * 64,
                                    (__m512i)weights.template pair<2>(raw, j, p));
    }
    for (int half = 0; half < 2; ++half) {
        auto* scales = reinterpret_cast<float*>(to + OPEN_SCALES) + half * 16;
        store(scales, weights.scale(block, half));
        if (TYPE == Q4_1) store(scales + PANEL, weights.minimum(block, half));
    }
}

using StoredTile = void (*)(const Tile&, const char*);

constexpr int ROWS = 6;
constexpr int WIDE[] = {4, 4, 4, 2, 2, 2};
template <int TYPE>
constexpr StoredTile WIDE_TILES[] = {tile<TYPE, false, 1, 4>, tile<TYPE, false, 2, 4>,
                                     tile<TYPE, false, 3, 4>, tile<TYPE, false, 4, 2>,
                                     tile<TYPE, false, 5, 2>, tile<TYPE, false, 6, 2>};
template <int TYPE>
constexpr StoredTile NARROW_TILES[] = {tile<TYPE, false, 1, 2>, tile<TYPE, false, 2, 2>,
                                       tile<TYPE, false, 3, 2>};
template <int TYPE>
constexpr StoredTile OPEN_TILES[] = {tile<TYPE, true, 1, 2>, tile<TYPE, true, 2, 2>,
                                     tile<TYPE, true, 3, 2>, tile<TYPE, true, 4, 2>,
                                     tile<TYPE, true, 5, 2>, tile<TYPE, true, 6, 2>};
constexpr int FEW = 4 * ROWS;  // from here on unpacking to memory, once, pays
constexpr int STRETCH = 18;   // blocks that are unpacked at once: 41 KB, in the L2 cache

// Few rows: the weights stream from memory and are unpacked in registers, by every tile anew.
template <int TYPE>
void few_rows(const Matrix& w, const char* a, size_t a_stride, int m, const Target& target,
              Range panels) {
    Tile t{};
    t.a_stride = a_stride;
    t.panel_bytes = stored_panel_bytes(TYPE, w.k);
    t.units = w.k / BLOCK;
    t.first = t.last = true;
    const int tiles = (m + ROWS - 1) / ROWS;
    const int wide = tiles == 1 ? WIDE[m - 1] / 2 : 1;  // panels
    for (int panel = panels.begin, together; panel < panels.end; panel += together) {
        together = panel + wide <= panels.end ? wide : 1;
        t.b = static_cast<const char*>(w.data) + panel * t.panel_bytes;
        t.ahead = t.b + together * t.panel_bytes;  // harmless past the end
        for (int i = 0; i < tiles; ++i) {
            const Range rows = share(m, i, tiles);
            const int count = rows.end - rows.begin;
            t.a = a + rows.begin * a_stride;
            target.aim(t, w, rows.begin, panel * PANEL);
            const bool narrow = WIDE[count - 1] / 2 > together;
            (narrow ? NARROW_TILES<TYPE> : WIDE_TILES<TYPE>)[count - 1](t, t.a + size_t(w.k) * 2);
        }
    }
}

// A stretch of one panel is unpacked into the L2 cache, then all rows of a block pass.
template <int TYPE>
void one_block(const Matrix& w, const char* a, size_t a_stride, Range rows, const Target& target,
               Range panels) {
    alignas(64) static thread_local char opened[STRETCH * OPEN_BYTES];
    alignas(64) static thread_local float sums[BLOCK_ROWS_MAX * PANEL];
    const int units = w.k / BLOCK, m = rows.end - rows.begin;
    const int tiles = (m + ROWS - 1) / ROWS;
    const size_t panel_bytes = stored_panel_bytes(TYPE, w.k);
    Tile t{};
    t.a_stride = a_stride;
    t.b = opened;
    for (int panel = panels.begin; panel < panels.end; ++panel) {
        const char* block = static_cast<const char*>(w.data) + panel * panel_bytes;
        for (int unit = 0; unit < units; unit += t.units) {
            t.units = std::min(STRETCH, units - unit);
            t.first = unit == 0, t.last = unit + t.units == units;
            for (int u = 0; u < t.units; ++u, block += block_bytes(TYPE)) {
                for (int line = 0; line < block_bytes(TYPE); line += 64)
                    _mm_prefetch(block + STRETCH * block_bytes(TYPE) + line, _MM_HINT_T1);
                open<TYPE>(block, opened + u * OPEN_BYTES);
            }
            for (int i = 0; i < tiles; ++i) {
                const Range mine = share(m, i, tiles);
                const int row = rows.begin + mine.begin;
                const char* first = a + row * a_stride;
                t.a = first + unit * BLOCK * 2;
                t.sums = sums + mine.begin * PANEL;
                target.aim(t, w, row, panel * PANEL);
                OPEN_TILES<TYPE>[mine.end - mine.begin - 1](t, first + size_t(w.k) * 2 + unit * 4);
            }
        }
    }
}

template <int TYPE>
void product(const Matrix& w, const char* a, size_t a_stride, int m, const Target& target,
             Range panels) {
    if (m <= FEW) return few_rows<TYPE>(w, a, a_stride, m, target, panels);
    const int blocks = row_blocks(m, ROWS, a_stride);
    for (int block = 0; block < blocks; ++block)
        one_block<TYPE>(w, a, a_stride, share(m, block, blocks), target, panels);
}

#endif

}  // namespace

size_t stored_panel_bytes(int type, int k) { return size_t(k / BLOCK) * block_bytes(type); }

// In the file a block is scale, (minimum,) quants; the 4-bit ones hold k and k + 16 in a byte.
// Scales are chosen so that 8-bit quants lie within +-127, which `Bytes` relies on.
void stored_pack_row(char* panel, int type, int k, int lane, const void* source) {
    const int header = type == Q4_1 ? 4 : 2, bytes = header + (type == Q8_0 ? 32 : 16);
    const char* from = static_cast<const char*>(source);
    for (int b = 0; b < k / BLOCK; ++b, from += bytes, panel += block_bytes(type)) {
        char* scales = panel + quant_bytes(type) + lane * 2;
        std::memcpy(scales, from, 2);
        if (type == Q4_1) std::memcpy(scales + PANEL * 2, from + 2, 2);
        for (int i = 0; i < BLOCK; ++i) {
            const Spot at = spot(type, lane, i);
            const int byte = static_cast<int8_t>(from[header + (type == Q8_0 ? i : i % 16)]);
            if (type == Q8_0)
                panel[at.byte] = char(std::max(byte, -127));
            else
                panel[at.byte] |= char((byte >> i / 16 * 4 & 15) << at.shift);
        }
    }
}

void stored_unpack_row(const char* panel, int type, int k, int lane, float* out) {
    for (int b = 0; b < k / BLOCK; ++b, panel += block_bytes(type), out += BLOCK) {
        const float scale = f16_to_float(scales_of(type, panel)[lane]);
        const float minimum = type == Q4_1 ? f16_to_float(scales_of(type, panel)[PANEL + lane]) : 0;
        for (int i = 0; i < BLOCK; ++i)
            out[i] = scale * float(quant(type, panel, lane, i)) + minimum;
    }
}

#if defined(__AVX512BF16__)

void stored_multiply(const Matrix& w, const char* a, size_t a_stride, int m, const Target& target,
                     Range panels) {
    const auto whole = w.type == Q8_0 ? product<Q8_0> : w.type == Q4_0 ? product<Q4_0> : product<Q4_1>;
    whole(w, a, a_stride, m, target, panels);
}

#else

void stored_open(const char* block, int type, float* to) {
    float scales[PANEL], minima[PANEL];
    for (int lane = 0; lane < PANEL; ++lane) {
        scales[lane] = f16_to_float(scales_of(type, block)[lane]);
        minima[lane] = type == Q4_1 ? f16_to_float(scales_of(type, block)[PANEL + lane])
                                    : -scales[lane] * float(zero_point(type));
    }
    for (int k = 0; k < BLOCK; ++k)
        for (int half = 0; half < PANEL; half += 16, to += 16) {
            const Spot at = spot(type, half, k);
            const char* from = block + at.byte;
            for (int i = 0; i < 16; ++i) {
                const int q = type == Q8_0 ? static_cast<int8_t>(from[i / 4 * 16 + i % 4 * 2])
                                           : static_cast<uint8_t>(from[i * 4]) >> at.shift & 15;
                to[i] = scales[half + i] * float(q) + minima[half + i];
            }
        }
}

#endif

}  // namespace tl
