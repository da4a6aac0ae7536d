// Sixteen lanes at a time: one AVX-512 register or two of AVX2, chosen when the file is compiled.
//
// A `word` is what one lane multiplies in one step: one fp32, or a pair of neighbouring bf16.
// With that, the matrix products of attention are written once for both element types:
// `dot(sum, a, b)` adds to each lane the product of its words.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace tl {

constexpr float LOG2E = 1.44269504088896341f;

struct Bf16 {
    uint16_t bits;
};

inline float widen(float x) {
    return x;
}

inline float widen(Bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

#if defined(__AVX512F__)

struct Lanes {
    __m512 v;
};

inline Lanes zeros() {
    return {_mm512_setzero_ps()};
}
inline Lanes all(float x) {
    return {_mm512_set1_ps(x)};
}
inline Lanes load(const float* p) {
    return {_mm512_loadu_ps(p)};
}
inline void store(float* p, Lanes a) {
    _mm512_storeu_ps(p, a.v);
}
inline Lanes operator+(Lanes a, Lanes b) {
    return {_mm512_add_ps(a.v, b.v)};
}
inline Lanes operator-(Lanes a, Lanes b) {
    return {_mm512_sub_ps(a.v, b.v)};
}
inline Lanes operator*(Lanes a, Lanes b) {
    return {_mm512_mul_ps(a.v, b.v)};
}
inline Lanes operator/(Lanes a, Lanes b) {
    return {_mm512_div_ps(a.v, b.v)};
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline Lanes max(Lanes a, Lanes b) {
    return {_mm512_max_ps(a.v, b.v)};
}  // b when either is NaN
inline float sum(Lanes a) {
    return _mm512_reduce_add_ps(a.v);
}
inline float largest(Lanes a) {
    return _mm512_reduce_max_ps(a.v);
}

// The lanes first <= i < last; the others become `other`.
inline Lanes keep(Lanes a, int first, int last, float other) {
    uint32_t below_last = last >= 16 ? 0xffffu : (1u << (last < 0 ? 0 : last)) - 1;
    uint32_t below_first = first >= 16 ? 0xffffu : (1u << (first < 0 ? 0 : first)) - 1;
    return {_mm512_mask_blend_ps(static_cast<__mmask16>(below_last & ~below_first),
                                 _mm512_set1_ps(other), a.v)};
}

inline Lanes load(const Bf16* p) {
    __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}

inline void store(Bf16* p, Lanes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}

// 2^x, within 2 units in the last place; below 2^-126 it is 0, so that minus infinity is too.
inline Lanes exp2(Lanes x) {
    __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-200.0f), x.v);
    __m512 whole = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(clamped, whole);
    __m512 y = _mm512_set1_ps(1.535336188319500e-4f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.339887440266574e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.618437357674640e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.550332471162809e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.402264791363012e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.931472028550421e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    __mmask16 normal = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return {_mm512_maskz_scalef_ps(normal, y, whole)};
}

struct Words {
    __m512i v;
};

inline Words load_words(const uint32_t* p) {
    return {_mm512_loadu_si512(p)};
}

template <class E>
inline Lanes dot(Lanes sum, uint32_t a, Words b);

template <>
inline Lanes dot<float>(Lanes sum, uint32_t a, Words b) {
    __m512 wide = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(a)));
    return {_mm512_fmadd_ps(wide, _mm512_castsi512_ps(b.v), sum.v)};
}

template <>
inline Lanes dot<Bf16>(Lanes sum, uint32_t a, Words b) {
    return {_mm512_dpbf16_ps(sum.v,
                             reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))),
                             reinterpret_cast<__m512bh>(b.v))};
}

constexpr int ROWS_AT_ONCE = 8;

#else

struct Lanes {
    __m256 lo, hi;
};

inline Lanes zeros() {
    return {_mm256_setzero_ps(), _mm256_setzero_ps()};
}
inline Lanes all(float x) {
    return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
inline Lanes load(const float* p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
inline void store(float* p, Lanes a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
inline Lanes operator+(Lanes a, Lanes b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline Lanes operator-(Lanes a, Lanes b) {
    return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline Lanes operator*(Lanes a, Lanes b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline Lanes operator/(Lanes a, Lanes b) {
    return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Lanes max(Lanes a, Lanes b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}

inline float sum(Lanes a) {
    float lane[16], total[8];
    store(lane, a);
    for (int i = 0; i < 8; ++i) total[i] = lane[i] + lane[i + 8];
    for (int width = 4; width; width /= 2)
        for (int i = 0; i < width; ++i) total[i] += total[i + width];
    return total[0];
}

inline float largest(Lanes a) {
    float lane[16];
    store(lane, a);
    float most = lane[0];
    for (int i = 1; i < 16; ++i) most = lane[i] > most ? lane[i] : most;
    return most;
}

inline Lanes keep(Lanes a, int first, int last, float other) {
    float lane[16];
    store(lane, a);
    for (int i = 0; i < 16; ++i)
        if (i < first || i >= last) lane[i] = other;
    return load(lane);
}

inline __m256 widen_half(__m128i raw) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

inline Lanes load(const Bf16* p) {
    return {widen_half(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            widen_half(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + 1))};
}

inline __m128i narrow_half(__m256 x) {  // to nearest, ties to even; a NaN stays one
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i top = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
}

inline void store(Bf16* p, Lanes a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_half(a.lo));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + 1, narrow_half(a.hi));
}

inline __m256 exp2_half(__m256 x) {
    __m256 clamped = _mm256_max_ps(_mm256_set1_ps(-126.0f), x);
    clamped = _mm256_min_ps(_mm256_set1_ps(127.0f), clamped);
    __m256 whole = _mm256_round_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 f = _mm256_sub_ps(clamped, whole);
    __m256 y = _mm256_set1_ps(1.535336188319500e-4f);
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(1.339887440266574e-3f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(9.618437357674640e-3f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(5.550332471162809e-2f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(2.402264791363012e-1f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(6.931472028550421e-1f));
    y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(1.0f));
    __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    __m256 scaled = _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
    return _mm256_and_ps(scaled, _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ));
}

inline Lanes exp2(Lanes x) {
    return {exp2_half(x.lo), exp2_half(x.hi)};
}

struct Words {
    __m256i lo, hi;
};

inline Words load_words(const uint32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + 1)};
}

template <class E>
inline Lanes dot(Lanes sum, uint32_t a, Words b);

template <>
inline Lanes dot<float>(Lanes sum, uint32_t a, Words b) {
    __m256 wide = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(a)));
    return {_mm256_fmadd_ps(wide, _mm256_castsi256_ps(b.lo), sum.lo),
            _mm256_fmadd_ps(wide, _mm256_castsi256_ps(b.hi), sum.hi)};
}

inline __m256 dot_half(__m256 sum, uint32_t a, __m256i b) {
    __m256 even = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(a << 16)));
    __m256 odd = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(a & 0xffff0000u)));
    sum = _mm256_fmadd_ps(even, _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)), sum);
    __m256i high = _mm256_and_si256(b, _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    return _mm256_fmadd_ps(odd, _mm256_castsi256_ps(high), sum);
}

template <>
inline Lanes dot<Bf16>(Lanes sum, uint32_t a, Words b) {
    return {dot_half(sum.lo, a, b.lo), dot_half(sum.hi, a, b.hi)};
}

constexpr int ROWS_AT_ONCE = 4;

#endif

// Words of 16 probabilities, as `dot` wants its first operand.
inline void store_words(uint32_t* p, Lanes a, float) {
    store(reinterpret_cast<float*>(p), a);
}
inline void store_words(uint32_t* p, Lanes a, Bf16) {
    store(reinterpret_cast<Bf16*>(p), a);
}

}  // namespace tl
