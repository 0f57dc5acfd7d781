// A persistent pool of threads for short parallel loops. The caller is one of the threads and works too.
// Not OpenMP: torch brings a runtime of its own, and two of them spin against each other.
#pragma once

#include <cstdint>

namespace gossamer {

// Splits 0..count into contiguous ranges that up to `threads` threads take one after another, and runs
// task(begin, end, slot) on each; slot is the thread's number, below `threads`. Returns when all are done. Workers spin
// for some microseconds for the next loop, then sleep; what a worker has not begun, because it sleeps or another process
// has its core, the caller does. If another thread is inside a loop the caller does everything. `task` must not throw.
template <class Task>
void parallel_for(int64_t count, int threads, const Task& task);

namespace detail {
using RangeFunction = void (*)(const void* task, int64_t begin, int64_t end, int slot);
void run_ranges(int64_t count, int threads, RangeFunction function, const void* task);
}  // namespace detail

template <class Task>
void parallel_for(int64_t count, int threads, const Task& task) {
  detail::run_ranges(
      count, threads,
      [](const void* t, int64_t begin, int64_t end, int slot) { (*static_cast<const Task*>(t))(begin, end, slot); },
      &task);
}

}  // namespace gossamer
