// What one instruction set offers to fill up squeezed weights (squeeze.hpp): a table of two functions.
#pragma once

#include <cstdint>

namespace gossamer {

constexpr int64_t SqueezedPadding = 64;  // bytes past the last number that may be read

// Fills up so many registers of 64 bytes; `to` is aligned to them.
using Expand = void (*)(const uint8_t* from, int64_t registers, uint8_t* to);
struct Expanders {
  Expand bytes, words;
};

extern const Expanders portable_expanders;
#ifdef GOSSAMER_X86
extern const Expanders avx2_expanders;
extern const Expanders avx512_expanders;  // needs VBMI2 as well
#endif

}  // namespace gossamer
