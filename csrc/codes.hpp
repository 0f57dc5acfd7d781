// Dense bit packing of small integers, as compressed-tensors 0.20 stores them.
// Element i of a row occupies `bits` bits from bit i * bits on, little-endian, and is stored as code + 2^(bits-1).
// Knows no scales and no formats.
#pragma once

#include <cstdint>

namespace gossamer {

// 32-bit words that hold one row of `columns` codes.
inline int64_t words_for(int64_t columns, int bits) { return (columns * bits + 31) / 32; }

// packed [rows, words_for(columns, bits)] -> codes [rows, columns], from -2^(bits-1) to 2^(bits-1) - 1. bits: 1..8.
void unpack_codes(const uint32_t* packed, int8_t* codes, int64_t rows, int64_t columns, int bits);

// The inverse; bits after the last code are zero. Only the low `bits` bits of code + 2^(bits-1) are kept.
void pack_codes(const int8_t* codes, uint32_t* packed, int64_t rows, int64_t columns, int bits);

}  // namespace gossamer
