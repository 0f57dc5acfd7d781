#include "team.hpp"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <system_error>
#include <thread>
#include <utility>

namespace gossamer {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// Between two phases of a step nobody waits for long, unless the other has lost its core.
constexpr auto spin_in_step = microseconds(60);
// Between two steps the caller samples and schedules.
constexpr auto spin_between_steps = microseconds(200);
// A step was held up if a thread waited for so long, and for so large a part of it.
constexpr auto hold_up = microseconds(700);
constexpr int hold_up_part = 5;
// A long step hands out its work in pieces: who has only half a core does fewer of them, and that is still a gain.
constexpr auto long_step = microseconds(8'000);
constexpr int long_hold_up_part = 2;
// A turn on a core, where others want it too: shorter than most phases.
constexpr uint64_t turn_nanoseconds = 100'000;
constexpr auto shortest_penalty = microseconds(20'000), longest_penalty = microseconds(1'000'000);

inline void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `value` is something else than `old`: spins first, then sleeps on it.
int wait_change(const std::atomic<int>& value, int old, microseconds spin) {
  for (int i = 0; i < 64; ++i) {
    if (const int now = value.load(std::memory_order_acquire); now != old) return now;
    pause_core();
  }
  const auto end = Clock::now() + spin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (const int now = value.load(std::memory_order_acquire); now != old) return now;
      pause_core();
    }
  } while (Clock::now() < end);
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

std::atomic<Team*> team{nullptr};

int this_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Moves this thread to another core that the process may use, if there is one; after that it is free again. A worker
// that was woken on its caller's core would share it until the system notices, which can take longer than many steps.
void leave_core(int core) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (core < 0 || core >= CPU_SETSIZE || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return;
  sched_setaffinity(0, sizeof allowed, &allowed);
#else
  (void)core;
#endif
}

// Asks the system for short turns of this thread, once; it gets no larger a share of its core by that. Threads that meet
// at barriers lose twice when one of them waits for its core, because the others wait for it. Turns that are shorter
// than a phase are evened out by handing out work in pieces; the usual ones, of milliseconds, last many phases.
void take_short_turns() {
#if defined(__linux__) && defined(SYS_sched_setattr)
  struct {  // struct sched_attr of linux/sched/types.h
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } attributes{};
  thread_local bool asked = false;
  if (std::exchange(asked, true) || syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0) return;
  if (attributes.policy != SCHED_OTHER && attributes.policy != SCHED_BATCH) return;
  attributes.runtime = turn_nanoseconds;  // Linux before 6.12 does not look at it
  syscall(SYS_sched_setattr, 0, &attributes, 0);
#endif
}

}  // namespace

Team::Team() {
  for (Conduct& conduct : conduct_) conduct.penalty = shortest_penalty;
}

Team& Team::instance() {
  // Never destroyed: its threads live as long as the process. A forked child starts over with a team of its own.
  static const bool made = [] {
    team = new Team;
    pthread_atfork(nullptr, nullptr, [] { team = new Team; });
    return true;
  }();
  (void)made;
  return *team;
}

void Rank::barrier() {
  if (count == 1) return;
  // Threads that slept take their time to come to the first barrier: that is no other process' doing.
  const bool counts = std::exchange(awake_, true);
  const int generation = team_.generation_.load(std::memory_order_relaxed);
  if (team_.arrived_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
    team_.arrived_.store(0, std::memory_order_relaxed);
    team_.generation_.store(generation + 1, std::memory_order_release);
    team_.generation_.notify_all();
    return;
  }
  for (int i = 0; i < 64; ++i) {  // most waits end here, and never look at the clock
    if (team_.generation_.load(std::memory_order_acquire) != generation) return;
    pause_core();
  }
  const auto began = Clock::now();
  for (int now = generation; now == generation;) now = wait_change(team_.generation_, generation, spin_in_step);
  if (counts) waited_ += Clock::now() - began;
}

std::atomic<int64_t>& Rank::claims(int64_t phase) {
  // A barrier lies between two phases, so nobody is still in the one before the last.
  if (id == 0) team_.claims_[(phase + 2) % 4].next.store(0, std::memory_order_relaxed);
  return team_.claims_[phase % 4].next;
}

int Team::grow(int wanted) {
  while (int(workers_.size()) < wanted) {
    workers_.push_back(std::make_unique<Worker>());
    try {
      std::thread(&Team::work, this, workers_.back().get(), int(workers_.size())).detach();
    } catch (const std::system_error&) {  // no more threads to be had: go on with those that exist
      workers_.pop_back();
      break;
    }
  }
  return std::min(int(workers_.size()), wanted);
}

void Team::work(Worker* worker, int id) {
  take_short_turns();
  for (int seen = 0;;) {
    seen = wait_change(worker->posted, seen, spin_between_steps);
    if (this_core() == caller_core_) leave_core(caller_core_);
    Rank rank(*this, id, size_);
    function_(body_, rank);
    report(rank);
    rank.barrier();
  }
}

int Team::allowed(int threads, const Conduct& conduct) {
  return Clock::now() < conduct.alone_until ? std::max(1, threads / 2) : threads;
}

void Team::report(const Rank& rank) {
  const int64_t waited = rank.waited_.count();
  int64_t most = waited_.load(std::memory_order_relaxed);
  while (most < waited && !waited_.compare_exchange_weak(most, waited, std::memory_order_relaxed)) {
  }
}

void Team::judge(int threads, Conduct& conduct, std::chrono::nanoseconds took) {
  const std::chrono::nanoseconds waited(waited_.exchange(0, std::memory_order_relaxed));
  const int part = took > long_step ? long_hold_up_part : hold_up_part;
  if (waited > hold_up && part * waited > took) {
    if (++conduct.strikes < 2) return;  // once may be chance
    conduct.alone_until = Clock::now() + conduct.penalty;
    conduct.penalty = std::min(2 * conduct.penalty, longest_penalty);
  } else if (threads == size_) {
    conduct.penalty = std::max(conduct.penalty - conduct.penalty / 64, shortest_penalty);
    if (conduct.penalty == shortest_penalty) conduct.strikes = 0;
  }
}

void Team::run_function(int threads, Work work, Function function, const void* body) {
  const std::unique_lock lock(busy_, std::try_to_lock);
  if (!lock || threads <= 1) {  // another thread has the team: work alone
    Rank alone(*this, 0, 1);
    function(body, alone);
    return;
  }
  take_short_turns();
  const auto began = Clock::now();
  Conduct& conduct = conduct_[int(work)];
  size_ = 1 + grow(allowed(threads, conduct) - 1);
  last_ = size_;
  function_ = function;
  body_ = body;
  caller_core_ = this_core();
  for (Claim& claim : claims_) claim.next.store(0, std::memory_order_relaxed);
  ++step_;
  for (int i = 0; i + 1 < size_; ++i) {
    workers_[i]->posted.store(step_, std::memory_order_release);
    workers_[i]->posted.notify_all();
  }
  Rank rank(*this, 0, size_);
  function(body, rank);
  rank.barrier();
  report(rank);
  judge(threads, conduct, Clock::now() - began);
}

}  // namespace gossamer
