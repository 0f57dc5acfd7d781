// Products of a few activations with stored weights: arranges the activations, splits the rows among threads and runs
// the kernels of the instruction set in use. Shapes are trusted here; module.cpp checks them.
#pragma once

#include <cstdint>

namespace gossamer {

// A packed weight [rows, columns] as Python hands it over; bits 2..8, groups * group_size == columns.
struct Packed {
  const uint32_t* words;  // [rows, words_for(columns, bits)]
  const float* scale;     // [rows, groups]
  const int8_t* zero;     // [rows, groups] or null
  int64_t rows, columns, groups;
  int bits;
};

// y [tokens, rows] = x [tokens, columns] times the transpose of the weight, accumulated in float32.
void packed_linear(const float* x, int64_t tokens, const Packed& weight, int threads, float* y);
void bf16_linear(const float* x, int64_t tokens, const uint16_t* weight, int64_t rows, int64_t columns, int threads,
                 float* y);

// out [rows, columns] = (code - zero) * scale.
void dequantize(const Packed& weight, int threads, float* out);

// Reads all bytes once (whole 64-byte blocks), to measure bandwidth.
uint64_t read_bytes(const uint8_t* data, int64_t count, int threads);

}  // namespace gossamer
