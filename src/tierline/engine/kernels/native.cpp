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

// out[m][n] = x[m][k] W^T + bias, dense rows.  x and out are F32 or BF16.
void tl_linear(const tl::Matrix* w, const void* x, int x_type, int m, void* out, int out_type) {
    static thread_local Buffer rows_buffer, floats_buffer, results_buffer;
    const int n = w->n, k = w->k;
    const size_t row_bytes = tl::activation_bytes(w->type, k);
    char* rows = static_cast<char*>(rows_buffer.at_least(m * row_bytes));
    float* results = static_cast<float*>(
        out_type == tl::F32 ? out : results_buffer.at_least(size_t(m) * n * sizeof(float)));
    float* floats = x_type == tl::F32
                        ? nullptr
                        : static_cast<float*>(floats_buffer.at_least(size_t(m) * k * sizeof(float)));
    tl::parallel([&](int thread, int threads) {
        const tl::Range mine = tl::share(m, thread, threads);
        for (int row = mine.begin; row < mine.end; ++row) {
            const float* values = static_cast<const float*>(x) + size_t(row) * k;
            if (x_type == tl::BF16) {
                tl::bf16_to_floats(static_cast<const uint16_t*>(x) + size_t(row) * k, k,
                                   floats + size_t(row) * k);
                values = floats + size_t(row) * k;
            }
            tl::prepare_row(w->type, k, values, rows + row * row_bytes);
        }
        tl::barrier();
        tl::gemm(*w, rows, m, results, n, false, thread, threads);
        if (out_type == tl::BF16) {
            const tl::Range columns = tl::columns_of(*w, thread, threads);
            for (int row = 0; row < m; ++row)
                tl::floats_to_bf16(results + size_t(row) * n + columns.begin,
                                   columns.end - columns.begin,
                                   static_cast<uint16_t*>(out) + size_t(row) * n + columns.begin);
        }
    });
}

}  // extern "C"
