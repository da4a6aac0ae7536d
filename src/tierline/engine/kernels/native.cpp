// The C interface that native.py loads.  Every function returns at once with its work done.

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

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

namespace tl {
namespace {

// Matrices lie one behind the other in slabs of huge pages: read in order they are one stream,
// and a small matrix does not take a huge page of its own.  A slab is freed with its last one.
struct Slab {
    size_t used, bytes;
    int matrices;
};
constexpr size_t SLAB_BYTES = 32 << 20, LINE_BYTES = 64;

std::mutex slabs_mutex;
Slab* current = nullptr;

size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

Slab* new_slab(size_t bytes) {
    bytes = rounded(bytes, HUGE_PAGE);
    void* data = std::aligned_alloc(HUGE_PAGE, bytes);
    if (data == nullptr) return nullptr;
#if defined(MADV_HUGEPAGE)
    madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return new (data) Slab{LINE_BYTES, bytes, 0};
}

// In front of every matrix lies a line that names its slab.
void* weights_alloc(size_t bytes) {
    const std::lock_guard<std::mutex> lock(slabs_mutex);
    const size_t needed = LINE_BYTES + rounded(bytes, LINE_BYTES);
    Slab* slab = current;
    if (slab == nullptr || slab->used + needed > slab->bytes) {
        slab = new_slab(std::max(SLAB_BYTES, LINE_BYTES + needed));
        if (slab == nullptr) return nullptr;
        current = slab;
    }
    char* place = reinterpret_cast<char*>(slab) + slab->used;
    slab->used += needed;
    slab->matrices += 1;
    *reinterpret_cast<Slab**>(place) = slab;
    return place + LINE_BYTES;
}

void weights_free(void* data) {
    const std::lock_guard<std::mutex> lock(slabs_mutex);
    Slab* slab = *reinterpret_cast<Slab**>(static_cast<char*>(data) - LINE_BYTES);
    slab->matrices -= 1;
    if (slab->matrices > 0) return;
    if (slab == current) current = nullptr;
    std::free(slab);
}

}  // namespace
}  // namespace tl

extern "C" {

int tl_threads() { return tl::threads(); }
void tl_set_threads(int count) { tl::set_threads(count); }

// Memory for weights, aligned to cache lines; null when there is none left.
void* tl_alloc(size_t bytes) { return tl::weights_alloc(bytes); }
void tl_free(void* data) { tl::weights_free(data); }

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
