// Products with weights that stay as a GGUF file stores them: 32 inputs share a scale.
//
// Called by gemm.cpp for the types Q8_0, Q4_0 and Q4_1.
#pragma once

#include "tile.h"

namespace tl {

inline bool is_stored(int type) { return type >= Q8_0; }

size_t stored_panel_bytes(int type, int k);

// Moves one row, as it is in the file, into lane `lane` of a panel.
void stored_pack_row(char* panel, int type, int k, int lane, const void* source);
void stored_unpack_row(const char* panel, int type, int k, int lane, float* out);

#if defined(__AVX512BF16__)
void stored_multiply(const Matrix& w, const char* a, size_t a_stride, int m, const Target& target,
                     Range panels);
#else
constexpr int OPEN_FLOATS = BLOCK * PANEL;
void stored_open(const char* block, int type, float* to);  // weights as [BLOCK k][PANEL] floats
#endif

}  // namespace tl
