#include "threads.hpp"

#include <pthread.h>

#include <algorithm>
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

  void run(int part, int slot) const {
    const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
    if (begin < end) function(task, begin, end, slot);
  }
};

// The loop's number, how many parts it has and which is next: one word, so that a part is claimed of this loop or not
// at all, however late a worker wakes up.
struct Ticket {
  uint32_t loop;
  uint16_t parts, next;
};
static_assert(std::atomic<Ticket>::is_always_lock_free);

// Parts for each thread: where one thread is held up by another process, the rest take its share.
constexpr int parts_per_thread = 4;
constexpr int max_parts = 4096;

class Pool {
 public:
  // False if another thread is inside a loop.
  bool run(Loop loop, int threads) {
    std::unique_lock lock(busy_, std::try_to_lock);
    if (!lock) return false;
    const int workers = grow(threads - 1);
    loop.parts = std::min(max_parts, parts_per_thread * (workers + 1));
    loop_ = loop;
    finished_.store(0, std::memory_order_relaxed);
    const uint32_t number = ticket_.load(std::memory_order_relaxed).loop + 1;
    ticket_.store({number, uint16_t(loop.parts), 0}, std::memory_order_release);
    for (int i = 0; i < workers; ++i) {
      workers_[i]->posted.store(int(number), std::memory_order_release);
      workers_[i]->posted.notify_all();
    }
    take_parts(number, 0);
    for (int done = finished_.load(std::memory_order_acquire); done != loop.parts;) done = wait_change(finished_, done);
    return true;
  }

 private:
  struct alignas(64) Worker {
    std::atomic<int> posted{0};  // number of the last loop that this worker may help with
  };

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
    return std::min(int(workers_.size()), wanted);
  }

  void work(Worker* worker, int slot) {
    for (int seen = 0;;) {
      seen = wait_change(worker->posted, seen);
      take_parts(uint32_t(seen), slot);
    }
  }

  // Runs parts of this loop until none is left. A claimed part keeps the loop, and so loop_, alive.
  void take_parts(uint32_t number, int slot) {
    Ticket ticket = ticket_.load(std::memory_order_acquire);
    while (ticket.loop == number && ticket.next < ticket.parts) {
      const Ticket claimed{number, ticket.parts, uint16_t(ticket.next + 1)};
      if (!ticket_.compare_exchange_weak(ticket, claimed, std::memory_order_acq_rel)) continue;
      loop_.run(ticket.next, slot);
      const int parts = ticket.parts;
      if (finished_.fetch_add(1, std::memory_order_acq_rel) == parts - 1) finished_.notify_all();
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  std::mutex busy_;
  std::vector<std::unique_ptr<Worker>> workers_;
  Loop loop_{};
  alignas(64) std::atomic<Ticket> ticket_{};
  alignas(64) std::atomic<int> finished_{0};
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
  const Loop loop{function, task, count, 1};
  if (threads <= 1 || !the_pool()->run(loop, threads)) function(task, 0, count, 0);
}

}  // namespace gossamer::detail
