// Products with packed weights: out = W a + bias for any number of rows of activations.
//
// Called inside a parallel region by every thread of it (`gemm`, `prepare_row`), or whole
// (`tl_linear` in native.cpp).  No barrier is inside; results of one call are complete after
// the caller's next barrier, except columns_of(thread), which that thread wrote itself.
//
// INV-ENG-41: a result is a fixed sequence of operations over k, whatever the number of rows,
// of threads and whatever else is in the batch.  A row alone equals the same row in a batch,
// bit for bit (for one instruction set and one type of weights).
#pragma once

#include "types.h"

namespace tl {

// Bytes of W once packed.
size_t packed_bytes(int type, int n, int k);

// Puts `rows` rows of source (source_stride_bytes apart) to rows first_row... of a packed
// matrix of n rows.  GGUF types are only packed from themselves.  Called by every thread;
// thread t packs its share of the panels.  Rows nobody puts are zero (the thread that packs a
// panel first clears it): pass all matrices that are stacked in one go, from row 0 upwards,
// each starting at a multiple of PANEL or right after the one before.
void pack(void* packed, int type, int n, int k, int source_type, const void* source,
          size_t source_stride_bytes, int first_row, int rows, int thread, int threads);

// Reads one row of W back as floats (an embedding that is also the head).
void unpack_row(const Matrix& w, int row, float* out);

// Bytes of one prepared row of activations for weights of a type, a multiple of 64.  Rows of
// prepared activations lie this far apart.  Types with equal activation_kind share rows.
int activation_kind(int type);
size_t activation_bytes(int type, int k);

// Puts a row of k floats in the form that products read: rounded to bf16 (avx512bf16, all
// types but F32) or as it is, padded with zeros.
void prepare_row(int type, int k, const float* x, void* row);
void prepare_row(int type, int k, int x_type, const void* x, void* row);  // F32 or BF16

// The columns of `out` that a thread writes.
Range columns_of(const Matrix& w, int thread, int threads);

// out[r][c] = W a[r] + bias (+ out[r][c] when accumulating) for m rows and this thread's columns.
// a: m prepared rows; ldo: floats between rows of out.
void gemm(const Matrix& w, const void* a, int m, float* out, int ldo, bool accumulate, int thread,
          int threads);

// The same with results rounded to bf16.
void gemm_bf16(const Matrix& w, const void* a, int m, uint16_t* out, int ldo, int thread,
               int threads);

}  // namespace tl
