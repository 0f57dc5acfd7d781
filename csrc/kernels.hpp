// What one instruction set offers: a table of functions over ranges of rows. Each kernels_<isa>.cpp fills one table.
// Callers (linear.cpp) arrange the activations, split the rows among threads and pick the table.
#pragma once

#include <cstdint>

namespace gossamer {

// A packed weight [rows, columns]: y = sum over groups of scale * (code - zero) * x.
struct PackedWeight {
  const uint8_t* bytes;    // [rows, row_bytes] codes + 2^(bits-1), dense little-endian bits
  const uint8_t* tail;     // a copy of the rows from first_tail_row on, and 16 bytes: kernels may read as far past a row
  int64_t first_tail_row;
  const float* scale;      // [rows, groups]
  const int8_t* zero;      // [rows, groups], or null if all are 0
  int64_t rows, columns, groups, group_size, row_bytes;
  int bits;                // 2..8
};

// Activations in the order in which a kernel reads them.
struct Activations {
  const float* x;     // [tokens, stride]; "natural" columns, or "split": of every 2 * lanes columns the even ones first
  const float* sums;  // [tokens, groups, lanes] -2^(bits-1) times the sum of x over a group, lane by lane (packed only)
  int64_t tokens, stride;
};

struct Kernels {
  const char* name;
  int lanes;  // floats in a vector

  // True if packed_linear reads a weight with these groups in registers; if not, it goes through a row of floats
  // and reads `natural` activations.
  bool (*groups_fit)(int bits, int64_t group_size);

  // y[token * rows + row] for rows begin..end. `row_buffer` [columns] is used only where groups do not fit.
  void (*packed_linear)(const PackedWeight&, const Activations&, float* y, int64_t begin, int64_t end,
                        float* row_buffer);

  // weight [rows, columns] for rows begin..end, each exactly (code - zero) * scale in float32.
  void (*dequantize)(const PackedWeight&, float* weight, int64_t begin, int64_t end);

  // The same product for bfloat16 weights [rows, columns]; x is split and padded with zeros to 2 * lanes columns.
  void (*bf16_linear)(const uint16_t* weight, int64_t rows, int64_t columns, const Activations&, float* y,
                      int64_t begin, int64_t end);

  // Reads 64-byte blocks as fast as it can; the result only keeps the compiler from leaving the reads out.
  uint64_t (*read_blocks)(const uint8_t* data, int64_t blocks);
};

// Activations are "split" for bf16, and for 4-bit groups that fit.
inline bool split_order(int bits) { return bits == 4; }

extern const Kernels portable_kernels;
#ifdef GOSSAMER_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace gossamer
