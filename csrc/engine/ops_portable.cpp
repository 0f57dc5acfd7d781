// The engine's operators, compiled for one instruction set.

#include "ops.hpp"

namespace gossamer {
namespace {
#include "simd_portable.inc"
#include "ops.inc"
}  // namespace

constexpr Ops portable_ops = table("portable");

}  // namespace gossamer
