// The engine's operators, compiled for one instruction set.
#include <immintrin.h>
#include "ops.hpp"

namespace gossamer {
namespace {
#include "simd_avx2.inc"
#include "ops.inc"
}  // namespace

constexpr Ops avx2_ops = table("avx2");

}  // namespace gossamer
