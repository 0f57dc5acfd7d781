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
  int64_t turns = 0;  // rows of each of two parts whose tiles are in turns; 0: rows are in order
  size_t sparse_bytes = 0;
  std::vector<int64_t> tile_start;  // squeezed (squeeze.hpp): [tiles + 1] bytes before each tile; empty: tiles are whole
  std::shared_ptr<PackedMatrix> first;  // of two factors: what an input is multiplied by before this one, or null

  int64_t inputs() const { return first ? first->matrix.columns : matrix.columns; }
};

// Rows of a combined weight that one stored weight gives. Coded: codes [rows, words], scales and zero points
// [rows, groups]. Dense: bfloat16, float32 or 8-bit float numbers [rows, columns].
struct Part {
  int64_t rows;
  const uint32_t* words;
  const float* scale;
  const int8_t* zero;  // or null
  int64_t groups;
  int bits;
  const uint16_t* bf16;
  const float* f32;
  const uint8_t* e4m3;
  const float* factor;  // [rows] codebooks and 8-bit floats: what a row is multiplied by, or null
};

// Combines parts: one after another, or (two of equal size) tile by tile in turns. Integer parts may differ in bits
// and groups: the result has the most bits and the smallest groups of any. False if groups do not fall on blocks.
bool pack_integer(const std::vector<Part>&, int64_t columns, bool interleave, int threads, PackedMatrix&);
void pack_dense(const std::vector<Part>&, int64_t columns, bool interleave, int threads, PackedMatrix&);
// Codes are the numbers of 16 levels, less 8; groups may also be of 16 columns. False if they do not fall on blocks.
bool pack_codebook(const std::vector<Part>&, const float* levels, int64_t columns, bool interleave, int threads,
                   PackedMatrix&);
void pack_e4m3(const std::vector<Part>&, int64_t columns, bool interleave, int threads, PackedMatrix&);

// Keeps weights beside a packed one, in float32: `count` of them at rows and columns. Once for a weight, before use.
void keep_beside(PackedMatrix&, int64_t count, const int32_t* rows, const int32_t* columns, const float* values);

// One row [32 * blocks] as floats, zeros past the last column.
void row_floats(const Matrix&, int64_t row, float* out);

}  // namespace gossamer
