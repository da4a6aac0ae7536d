#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tl {
namespace {

constexpr auto SPIN = std::chrono::microseconds(40);

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// A number that threads wait on until it changes.
class Signal {
  public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }

    void advance() {
        value_.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) wake();
    }

    void wait_while(uint32_t old) {
        const auto until = std::chrono::steady_clock::now() + SPIN;
        do {
            for (int i = 0; i < 64; ++i) {
                if (value() != old) return;
                pause();
            }
        } while (std::chrono::steady_clock::now() < until);
        // Announced before the last look: either the advancing thread sees a sleeper and wakes
        // it, or this thread sees the new value (the futex looks once more).
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        while (value_.load(std::memory_order_seq_cst) == old) sleep(old);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }

  private:
#if defined(__linux__)
    void sleep(uint32_t old) {
        syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
    }
    void wake() { syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }
#else
    void sleep(uint32_t) { std::this_thread::sleep_for(std::chrono::microseconds(50)); }
    void wake() {}
#endif

    alignas(64) std::atomic<uint32_t> value_{0};
    alignas(64) std::atomic<int> sleepers_{0};
};

struct Pool {
    explicit Pool(int count) : threads(count) {
        for (int thread = 1; thread < count; ++thread)
            workers.emplace_back([this, thread] { serve(thread); });
    }

    void run(Work next, void* next_argument) {
        work = next;
        argument = next_argument;
        begun.advance();
        work(0, threads, argument);
        meet();
    }

    void meet() {
        if (threads == 1) return;
        const uint32_t round = met.value();
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            met.advance();
        } else {
            met.wait_while(round);
        }
    }

    void stop() {
        work = nullptr;
        begun.advance();
        for (std::thread& worker : workers) worker.join();
    }

    const int threads;

  private:
    void serve(int thread) {
        for (uint32_t seen = 0;; ++seen) {
            begun.wait_while(seen);
            if (work == nullptr) return;
            work(thread, threads, argument);
            meet();
        }
    }

    Signal begun, met;
    alignas(64) std::atomic<int> arrived{0};
    Work work = nullptr;
    void* argument = nullptr;
    std::vector<std::thread> workers;
};

int cores() {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    const unsigned found = std::thread::hardware_concurrency();
    return found > 0 ? int(found) : 1;
}

// Never destroyed: workers sleep in it while the process exits, and a child of fork() leaves
// its parent's behind.
std::mutex* turn = new std::mutex;
Pool* pool = nullptr;
int wanted = 0;

void forget_pool() {
    pool = nullptr;
    turn = new std::mutex;
}

Pool* current_pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
    if (wanted == 0) wanted = cores();
    if (pool != nullptr && pool->threads != wanted) {
        pool->stop();
        delete pool;
        pool = nullptr;
    }
    if (pool == nullptr) pool = new Pool(wanted);
    return pool;
}

}  // namespace

int threads() {
    std::lock_guard<std::mutex> mine(*turn);
    if (wanted == 0) wanted = cores();
    return wanted;
}

void set_threads(int count) {
    std::lock_guard<std::mutex> mine(*turn);
    wanted = count > 0 ? count : cores();
}

void run_parallel(Work work, void* argument) {
    std::lock_guard<std::mutex> mine(*turn);
    current_pool()->run(work, argument);
}

void barrier() { pool->meet(); }

}  // namespace tl
