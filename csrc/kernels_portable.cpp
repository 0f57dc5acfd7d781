// The kernels for any machine: vectors of 8 floats that the compiler lowers to whatever the target has.
#include <bit>
#include <cstring>

#include "kernels.hpp"

static_assert(std::endian::native == std::endian::little, "packed codes are little-endian");

namespace gossamer {
namespace {

constexpr int Lanes = 8;
constexpr int RowTile = 2;
typedef float F __attribute__((vector_size(32)));
typedef uint64_t I __attribute__((vector_size(32)));

inline F zeros() { return F{}; }
inline F set1(float v) { return F{v, v, v, v, v, v, v, v}; }
inline F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
inline F add(F a, F b) { return a + b; }
inline F mul(F a, F b) { return a * b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline float sum(F v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

template <int Bits>
inline void codes(const uint8_t* p, F* values) {
  uint64_t word;
  std::memcpy(&word, p, sizeof word);
  for (int i = 0; i < Lanes; ++i) (*values)[i] = float(int((word >> (Bits * i)) & ((1u << Bits) - 1)));
}

inline void codes_split(const uint8_t* p, F* values) {
  for (int i = 0; i < Lanes; ++i) {
    values[0][i] = float(int(p[i] & 15));
    values[1][i] = float(int(p[i] >> 4));
  }
}

inline void bf16_split(const uint16_t* p, F* values) {
  typedef uint32_t Bits __attribute__((vector_size(32)));
  Bits pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  values[0] = reinterpret_cast<F>(pairs << 16);
  values[1] = reinterpret_cast<F>(pairs & 0xFFFF0000u);
}

inline I load_int(const uint8_t* p) {
  I v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline I xor_int(I a, I b) { return a ^ b; }
inline uint64_t fold(I v) { return v[0] ^ v[1] ^ v[2] ^ v[3]; }

#include "kernels.inc"

}  // namespace

constexpr Kernels portable_kernels = table("portable");

}  // namespace gossamer
