// The kernels for AVX2 with FMA: vectors of 8 floats.
#include <immintrin.h>

#include "kernels.hpp"

namespace gossamer {
namespace {

constexpr int Lanes = 8;
constexpr int RowTile = 2;
using F = __m256;
using I = __m256i;

inline F zeros() { return _mm256_setzero_ps(); }
inline F set1(float v) { return _mm256_set1_ps(v); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(F v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Lane i takes the two bytes that hold bits i * Bits on, and shifts its code down.
template <int Bits>
struct Window {
  alignas(32) int8_t bytes[32];
  alignas(32) int32_t shifts[8];
  constexpr Window() : bytes{}, shifts{} {
    for (int i = 0; i < 8; ++i) {
      const int first = i * Bits / 8;
      bytes[4 * i] = int8_t(first);
      bytes[4 * i + 1] = int8_t(first + 1);
      bytes[4 * i + 2] = bytes[4 * i + 3] = -1;
      shifts[i] = i * Bits % 8;
    }
  }
};
template <int Bits>
constexpr Window<Bits> window{};

template <int Bits>
inline void codes(const uint8_t* p, F* values) {
  if constexpr (Bits == 8) {
    *values = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  } else {
    const I bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const I pairs = _mm256_shuffle_epi8(bytes, *reinterpret_cast<const I*>(window<Bits>.bytes));
    const I low = _mm256_srlv_epi32(pairs, *reinterpret_cast<const I*>(window<Bits>.shifts));
    *values = _mm256_cvtepi32_ps(_mm256_and_si256(low, _mm256_set1_epi32((1 << Bits) - 1)));
  }
}

inline void codes_split(const uint8_t* p, F* values) {
  const I bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  values[0] = _mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(15)));
  values[1] = _mm256_cvtepi32_ps(_mm256_srli_epi32(bytes, 4));
}

inline void bf16_split(const uint16_t* p, F* values) {
  const I pairs = _mm256_loadu_si256(reinterpret_cast<const I*>(p));
  values[0] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  values[1] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xFFFF0000u))));
}

inline I load_int(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
inline I xor_int(I a, I b) { return _mm256_xor_si256(a, b); }
inline uint64_t fold(I v) { return uint64_t(_mm256_extract_epi64(v, 0) ^ _mm256_extract_epi64(v, 3)); }

#include "kernels.inc"

}  // namespace

constexpr Kernels avx2_kernels = table("avx2");

}  // namespace gossamer
