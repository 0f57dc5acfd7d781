// Threads that run one step of the engine together: all of them execute the same function, and barriers divide its
// phases. The caller is one of them. Where another process competes for the cores, a step that was held up at a
// barrier makes the following ones of its kind run on fewer threads for a while.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace gossamer {

class Team;

// What a step spends its time on. Steps of the two kinds are judged apart: a few tokens wait for memory, which a single
// thread reads not much more slowly, while many tokens multiply, which it does at half the speed of two.
enum class Work { few_tokens, many_tokens };

// One thread's view of the step.
class Rank {
 public:
  Rank(Team& team, int id, int count) : id(id), count(count), team_(team) {}
  const int id, count;

  void barrier();  // all threads have arrived

  // Calls body(begin, end) for ranges that together make up 0..total, each once over all threads. Evenly: in advance.
  // Otherwise a thread takes the next `grain` when it is done with the last. Follow it with a barrier.
  template <class Body>
  void share(int64_t total, int64_t grain, bool evenly, const Body& body) {
    const int64_t units = (total + grain - 1) / grain;
    if (evenly || count == 1) {
      const int64_t begin = units * id / count * grain, end = units * (id + 1) / count * grain;
      if (begin < end) body(begin, end < total ? end : total);
      return;
    }
    std::atomic<int64_t>& next = claims(phase_++);
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
      const int64_t end = (unit + 1) * grain;
      body(unit * grain, end < total ? end : total);
    }
  }

  // The same one by one, as body(unit, next): `next` is what this thread does then, or `total`.
  template <class Body>
  void share_ahead(int64_t total, bool evenly, const Body& body) {
    if (evenly || count == 1) {
      const int64_t end = total * (id + 1) / count;
      for (int64_t unit = total * id / count; unit < end; ++unit) body(unit, unit + 1 < end ? unit + 1 : total);
      return;
    }
    std::atomic<int64_t>& free = claims(phase_++);
    auto claim = [&] { return std::min(free.fetch_add(1, std::memory_order_relaxed), total); };
    for (int64_t unit = claim(), next; unit < total; unit = next) {
      next = claim();
      body(unit, next);
    }
  }

 private:
  std::atomic<int64_t>& claims(int64_t phase);
  friend class Team;
  Team& team_;
  int64_t phase_ = 0;
  bool awake_ = false;  // all threads have been seen in this step
  std::chrono::nanoseconds waited_{0};
};

class Team {
 public:
  static Team& instance();

  // Runs body(Rank&) on up to `threads` threads and returns when all are done. `body` must not throw.
  template <class Body>
  void run(int threads, Work work, const Body& body) {
    run_function(
        threads, work, [](const void* b, Rank& rank) { (*static_cast<const Body*>(b))(rank); }, &body);
  }

  int last_threads() const { return last_; }  // of the last step

 private:
  friend class Rank;
  using Function = void (*)(const void*, Rank&);
  struct alignas(64) Worker {
    std::atomic<int> posted{0};
  };

  // How steps of a kind have gone.
  struct Conduct {
    int strikes = 0;
    std::chrono::steady_clock::time_point alone_until{};
    std::chrono::microseconds penalty;
  };

  void run_function(int threads, Work, Function, const void* body);
  int grow(int wanted);
  void work(Worker*, int id);
  static int allowed(int threads, const Conduct&);
  void report(const Rank&);
  void judge(int threads, Conduct&, std::chrono::nanoseconds took);

  std::mutex busy_;
  std::vector<std::unique_ptr<Worker>> workers_;
  Function function_ = nullptr;
  const void* body_ = nullptr;
  int size_ = 1, step_ = 0, last_ = 1;
  int caller_core_ = -1;  // where this step was begun
  Conduct conduct_[2];  // by Work
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
  alignas(64) std::atomic<int64_t> waited_{0};  // nanoseconds, by the thread that waited longest in this step
  struct alignas(64) Claim {
    std::atomic<int64_t> next{0};
  };
  Claim claims_[4];

 public:
  Team();
};

}  // namespace gossamer
