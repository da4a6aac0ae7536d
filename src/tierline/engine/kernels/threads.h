// A pool of threads that is cheap to enter and burns nothing when idle.
//
// The step and tl_linear call `parallel`; inside, every thread calls `barrier` the same number
// of times.  Waiting is a bounded spin (a barrier between two products is a matter of
// microseconds), then a futex, so that a worker that lost its core does not hold up the machine.
//
// After fork() the child has no workers: it starts its own at its first parallel region.
// A region cannot be opened inside a region; callers from several threads take turns.
#pragma once

namespace tl {

using Work = void (*)(int thread, int threads, void* argument);

int threads();                             // in the next region, the caller among them
void set_threads(int count);               // not inside a region
void run_parallel(Work work, void* argument);
void barrier();                            // only inside a region, by all of its threads

// parallel([&](int thread, int threads) { ... })
template <class F>
void parallel(F&& work) {
    run_parallel([](int thread, int threads, void* f) { (*static_cast<F*>(f))(thread, threads); },
                 &work);
}

}  // namespace tl
