// Sums of floats over processes of one machine, through memory that they share. Knows no model and no Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gossamer {

// One rank's end. Every rank adds all parts in the order of the ranks, so that all get the same bits.
// Throws std::invalid_argument for memory that does not fit, std::runtime_error when another rank stays away.
class SharedSum {
 public:
  // `file`: a descriptor of at least bytes(ranks) zeros, mapped here; the caller may close it.
  SharedSum(int file, int rank, int ranks, double timeout_seconds);
  ~SharedSum();
  SharedSum(const SharedSum&) = delete;
  SharedSum& operator=(const SharedSum&) = delete;

  static size_t bytes(int ranks);
  void operator()(float* data, int64_t count);

 private:
  void await(int rank) const;
  float* slot(int rank) const;

  uint8_t* memory_;
  const int rank_, ranks_;
  const double timeout_;
  uint32_t step_ = 0;
};

}  // namespace gossamer
