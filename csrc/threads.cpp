#include "threads.hpp"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace gossamer::detail {
namespace {

// Long enough to bridge the gap between two layers of a step, short enough to leave the core to others.
constexpr auto spin_time = std::chrono::microseconds(40);

inline void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `value` is something else than `old`: spins first, then sleeps on it.
int wait_change(const std::atomic<int>& value, int old) {
  const auto end = std::chrono::steady_clock::now() + spin_time;
  do {
    for (int i = 0; i < 32; ++i) {
      if (const int now = value.load(std::memory_order_acquire); now != old) return now;
      pause_core();
    }
  } while (std::chrono::steady_clock::now() < end);
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

struct Loop {
  RangeFunction function;
  const void* task;
  int64_t count;
  int parts;

  void run_part(int part) const {
    const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
    if (begin < end) function(task, begin, end);
  }
};

struct alignas(64) Worker {
  std::atomic<int> posted{0};  // changes when a loop with this worker in it begins
};

class Pool {
 public:
  // False if another thread is inside a loop.
  bool run(Loop loop) {
    std::unique_lock lock(busy_, std::try_to_lock);
    if (!lock) return false;
    loop.parts = grow(loop.parts - 1) + 1;
    loop_ = loop;
    pending_.store(loop.parts - 1, std::memory_order_relaxed);
    for (int i = 0; i < loop.parts - 1; ++i) {
      workers_[i]->posted.fetch_add(1, std::memory_order_release);
      workers_[i]->posted.notify_all();
    }
    loop.run_part(0);
    for (int left = pending_.load(std::memory_order_acquire); left != 0;) left = wait_change(pending_, left);
    return true;
  }

 private:
  // Starts workers up to `wanted`; returns how many there are to use.
  int grow(int wanted) {
    while (int(workers_.size()) < wanted) {
      workers_.push_back(std::make_unique<Worker>());
      try {
        std::thread(&Pool::work, this, workers_.back().get(), int(workers_.size())).detach();
      } catch (const std::system_error&) {  // no more threads to be had: go on with those that exist
        workers_.pop_back();
        break;
      }
    }
    return int(workers_.size()) < wanted ? int(workers_.size()) : wanted;
  }

  void work(Worker* worker, int part) {
    for (int seen = 0;;) {
      seen = wait_change(worker->posted, seen);
      loop_.run_part(part);
      if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_all();
    }
  }

  std::mutex busy_;
  std::vector<std::unique_ptr<Worker>> workers_;
  Loop loop_{};
  alignas(64) std::atomic<int> pending_{0};
};

// Never destroyed: its threads live as long as the process.
std::atomic<Pool*> pool{nullptr};

Pool* the_pool() {
  static const bool made = [] {
    pool = new Pool;
    // A forked child has none of the threads, and perhaps a held lock: it starts over with a pool of its own.
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    return true;
  }();
  (void)made;
  return pool;
}

}  // namespace

void run_ranges(int64_t count, int threads, RangeFunction function, const void* task) {
  const Loop loop{function, task, count, threads};
  if (threads <= 1 || !the_pool()->run(loop)) function(task, 0, count);
}

}  // namespace gossamer::detail
