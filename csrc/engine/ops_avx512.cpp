// The engine's operators, compiled for one instruction set.
#include <immintrin.h>
#include "ops.hpp"

namespace gossamer {
namespace {
#include "simd_avx512.inc"
#include "ops.inc"
}  // namespace

constexpr Ops avx512_ops = table("avx512");

}  // namespace gossamer
