#include "shared_sum.hpp"

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <string>

namespace gossamer {
namespace {

constexpr int64_t slot_floats = 1 << 16;
constexpr size_t line = 64;
constexpr int max_ranks = 64;
// Steps apart by two use the same slot: whoever is at the later one has seen all others leave the earlier one.
constexpr int slots = 2;
constexpr auto spin = std::chrono::microseconds(30);

std::atomic<uint32_t>& steps_of(uint8_t* memory, int rank) {
  return *reinterpret_cast<std::atomic<uint32_t>*>(memory + rank * line);
}

long futex(std::atomic<uint32_t>& word, int operation, uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, &word, operation, value, timeout, nullptr, 0);
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

size_t SharedSum::bytes(int ranks) { return ranks * line + size_t(slots) * ranks * slot_floats * sizeof(float); }

SharedSum::SharedSum(int file, int rank, int ranks, double timeout_seconds)
    : memory_(nullptr), rank_(rank), ranks_(ranks), timeout_(timeout_seconds) {
  if (ranks < 1 || ranks > max_ranks || rank < 0 || rank >= ranks || !(timeout_seconds > 0))
    throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(ranks) + " makes no sense");
  struct stat found {};
  if (fstat(file, &found) != 0 || size_t(found.st_size) < bytes(ranks))
    throw std::invalid_argument("the shared memory is smaller than " + std::to_string(bytes(ranks)) + " bytes");
  void* data = mmap(nullptr, bytes(ranks), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (data == MAP_FAILED) throw std::invalid_argument("the shared memory cannot be mapped");
  memory_ = static_cast<uint8_t*>(data);
}

SharedSum::~SharedSum() { munmap(memory_, bytes(ranks_)); }

float* SharedSum::slot(int rank) const {
  float* first = reinterpret_cast<float*>(memory_ + ranks_ * line);
  return first + (size_t(step_ % slots) * ranks_ + rank) * slot_floats;
}

// Returns when this rank has reached our step.
void SharedSum::await(int rank) const {
  std::atomic<uint32_t>& word = steps_of(memory_, rank);
  const auto began = std::chrono::steady_clock::now();
  for (;;) {
    const uint32_t there = word.load(std::memory_order_acquire);
    if (int32_t(there - step_) >= 0) return;
    const auto waited = std::chrono::steady_clock::now() - began;
    if (waited < spin) {
      relax();
      continue;
    }
    if (std::chrono::duration<double>(waited).count() > timeout_)
      throw std::runtime_error("rank " + std::to_string(rank) + " has not answered for " +
                               std::to_string(int(timeout_)) + " s");
    const timespec pause{0, 100'000'000};
    futex(word, FUTEX_WAIT, there, &pause);
  }
}

void SharedSum::operator()(float* data, int64_t count) {
  for (int64_t done = 0; done < count; done += slot_floats) {
    const int64_t n = std::min(slot_floats, count - done);
    float* part = data + done;
    ++step_;
    std::memcpy(slot(rank_), part, n * sizeof(float));
    std::atomic<uint32_t>& own = steps_of(memory_, rank_);
    own.store(step_, std::memory_order_release);
    futex(own, FUTEX_WAKE, INT_MAX, nullptr);
    for (int rank = 0; rank < ranks_; ++rank) {
      if (rank != rank_) await(rank);
      const float* other = slot(rank);
      if (rank == 0) {
        std::memcpy(part, other, n * sizeof(float));
        continue;
      }
      for (int64_t i = 0; i < n; ++i) part[i] += other[i];
    }
  }
}

}  // namespace gossamer
