// Weights that are held without their zeros, and filled up tile by tile as they are multiplied.
//
// A tile (ops.hpp) is squeezed as it lies, scales and all, register by register of 64 bytes: a bit for each number that
// is not zero, then those numbers. Numbers are the bytes of i8, of which 128 is zero, or the words of bf16. Filled up,
// it is the same tile again: products have the bits that they would have of the whole weight.
#pragma once

#include "pack.hpp"

namespace gossamer {

// Integers of 8 bits without zero points and bfloat16, whole and with no weights beside them.
bool can_squeeze(const PackedMatrix&);
// The same weight without its zeros, in `arena`.
void squeeze(const PackedMatrix& whole, int threads, PackedMatrix& squeezed);

// True if the instruction set in use fills up a register at a time (AVX-512 with VBMI2). Byte shuffles (AVX2) take longer
// over a weight than the memory saves: 0.47 of the speed of whole 8-bit integers for one token.
bool squeezing_pays();

// Ops::matmul of a weight that may be squeezed.
void multiply(const Ops&, const PackedMatrix&, const Acts&, bool exact, int64_t begin, int64_t end, const Epilogue&);

}  // namespace gossamer
