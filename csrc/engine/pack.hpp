// Weights in the layout of the kernels: made once, when a model is loaded, from the codes and scales of its file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "ops.hpp"

namespace gossamer {

// Memory for the weights of one model, in large pages where the system has them. Freed as a whole.
class Arena {
 public:
  ~Arena();
  uint8_t* allocate(size_t bytes);  // zeroed, aligned to 64 bytes; throws std::bad_alloc
  size_t bytes() const { return used_; }

 private:
  struct Chunk {
    uint8_t* data;
    size_t size, used;
  };
  std::mutex mutex_;
  std::vector<Chunk> chunks_;
  size_t used_ = 0;
};

struct PackedMatrix {
  Matrix matrix{};
  std::shared_ptr<Arena> arena;
};

// Rows of a combined weight that one stored weight gives. Integer: codes [rows, words], scales and zero points
// [rows, groups]. Dense: bfloat16 or float32 numbers [rows, columns].
struct Part {
  int64_t rows;
  const uint32_t* words;
  const float* scale;
  const int8_t* zero;  // or null
  int64_t groups;
  int bits;
  const uint16_t* bf16;
  const float* f32;
};

// Combines parts: one after another, or (two of equal size) tile by tile in turns. Integer parts may differ in bits
// and groups: the result has the most bits and the smallest groups of any. False if groups do not fall on blocks.
bool pack_integer(const std::vector<Part>&, int64_t columns, bool interleave, int threads, PackedMatrix&);
void pack_dense(const std::vector<Part>&, int64_t columns, bool interleave, int threads, PackedMatrix&);

// One row [32 * blocks] as floats, zeros past the last column.
void row_floats(const Matrix&, int64_t row, float* out);

}  // namespace gossamer
