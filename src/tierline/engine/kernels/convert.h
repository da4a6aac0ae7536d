// Conversions between number formats, one number at a time and a vector at a time.
//
// F16 and BF16 travel as uint16_t.  Rounding to bf16 is to nearest even, as torch rounds.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "types.h"

namespace tl {

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float bf16_to_float(uint16_t value) { return bits_to_float(uint32_t(value) << 16); }

inline uint16_t float_to_bf16(float value) {
    const uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN stays NaN
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float f16_to_float(uint16_t value) { return _cvtsh_ss(value); }
inline uint16_t float_to_f16(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

// count numbers; the compiler turns these loops into vectors
inline void bf16_to_floats(const uint16_t* from, int count, float* to) {
    for (int i = 0; i < count; ++i) to[i] = bf16_to_float(from[i]);
}

inline void floats_to_bf16(const float* from, int count, uint16_t* to) {
    int i = 0;
#if defined(__AVX512BF16__)
    // vcvtneps2bf16 takes subnormal floats for zero; nothing else differs from float_to_bf16.
    for (; i + 16 <= count; i += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
    for (; i < count; ++i) to[i] = float_to_bf16(from[i]);
}

}  // namespace tl
