// The C interface that native.py loads.  Every function returns at once with its work done.

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "convert.h"
#include "gemm.h"
#include "threads.h"

namespace {

constexpr size_t HUGE_PAGE = size_t(2) << 20;

struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;

    void* at_least(size_t wanted) {
        if (wanted > bytes) {
            std::free(data);
            bytes = (wanted + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
            data = std::aligned_alloc(HUGE_PAGE, bytes);
        }
        return data;
    }
};

}  // namespace

extern "C" {

int tl_threads() { return tl::threads(); }
void tl_set_threads(int count) { tl::set_threads(count); }

// Memory for weights, aligned to huge pages; null when there is none left.
void* tl_alloc(size_t bytes) {
    bytes = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    void* data = std::aligned_alloc(HUGE_PAGE, bytes);
#if defined(MADV_HUGEPAGE)
    if (data != nullptr) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return data;
}
void tl_free(void* data) { std::free(data); }

size_t tl_packed_bytes(int type, int n, int k) { return tl::packed_bytes(type, n, k); }

void tl_pack(void* packed, int type, int n, int k, int source_type, const void* source,
             size_t source_stride_bytes, int first_row, int rows) {
    tl::parallel([&](int thread, int threads) {
        tl::pack(packed, type, n, k, source_type, source, source_stride_bytes, first_row, rows,
                 thread, threads);
    });
}

void tl_unpack_row(const tl::Matrix* w, int row, float* out) { tl::unpack_row(*w, row, out); }

// out[m][n] = x[m][k] W^T + bias (+ out, which must be F32), dense rows.  x and out are F32 or BF16.
void tl_linear(const tl::Matrix* w, const void* x, int x_type, int m, void* out, int out_type,
               int accumulate) {
    static thread_local Buffer buffer;
    const size_t x_stride = size_t(w->k) * (x_type == tl::F32 ? 4 : 2);
    const size_t stride = tl::activation_bytes(w->type, w->k);
    char* rows = static_cast<char*>(buffer.at_least(m * stride));
    tl::parallel([&](int thread, int threads) {
        const tl::Range mine = tl::share(m, thread, threads);
        for (int row = mine.begin; row < mine.end; ++row)
            tl::prepare_row(w->type, w->k, x_type, static_cast<const char*>(x) + row * x_stride,
                            rows + row * stride);
        tl::barrier();
        if (out_type == tl::F32)
            tl::gemm(*w, rows, m, static_cast<float*>(out), w->n, accumulate != 0, thread, threads);
        else
            tl::gemm_bf16(*w, rows, m, static_cast<uint16_t*>(out), w->n, thread, threads);
    });
}

}  // extern "C"
