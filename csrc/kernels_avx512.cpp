// The kernels for AVX-512 F, BW, DQ and VL: vectors of 16 floats.
#include <immintrin.h>

#include "kernels.hpp"

namespace gossamer {
namespace {

constexpr int Lanes = 16;
constexpr int RowTile = 4;
using F = __m512;
using I = __m512i;

inline F zeros() { return _mm512_setzero_ps(); }
inline F set1(float v) { return _mm512_set1_ps(v); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(F v) { return _mm512_reduce_add_ps(v); }

// Lane i takes the two bytes that hold bits i * Bits on, and shifts its code down.
template <int Bits>
struct Window {
  alignas(64) int8_t bytes[64];
  alignas(64) int32_t shifts[16];
  constexpr Window() : bytes{}, shifts{} {
    for (int i = 0; i < 16; ++i) {
      const int first = i * Bits / 8;
      bytes[4 * i] = int8_t(first);
      bytes[4 * i + 1] = int8_t(first < 15 ? first + 1 : -1);
      bytes[4 * i + 2] = bytes[4 * i + 3] = -1;
      shifts[i] = i * Bits % 8;
    }
  }
};
template <int Bits>
constexpr Window<Bits> window{};

// vpermps looks at the low 4 bits of an index only: up to 4 bits, a table that repeats turns an unmasked code into a
// float in one instruction, where mask and conversion would be two.
template <int Bits>
inline F as_float(I low) {
  if constexpr (Bits <= 4) {
    constexpr int m = (1 << Bits) - 1;
    const F table = _mm512_setr_ps(0 & m, 1 & m, 2 & m, 3 & m, 4 & m, 5 & m, 6 & m, 7 & m, 8 & m, 9 & m, 10 & m,
                                   11 & m, 12 & m, 13 & m, 14 & m, 15 & m);
    return _mm512_permutexvar_ps(low, table);
  } else {
    return _mm512_cvtepi32_ps(_mm512_and_si512(low, _mm512_set1_epi32((1 << Bits) - 1)));
  }
}

template <int Bits>
inline void codes(const uint8_t* p, F* values) {
  if constexpr (Bits == 8) {
    *values = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  } else if constexpr (Bits == 2) {
    int word;
    __builtin_memcpy(&word, p, sizeof word);
    *values = as_float<2>(_mm512_srlv_epi32(
        _mm512_set1_epi32(word), _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)));
  } else {
    const I bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const I pairs = _mm512_shuffle_epi8(bytes, _mm512_load_si512(window<Bits>.bytes));
    *values = as_float<Bits>(_mm512_srlv_epi32(pairs, _mm512_load_si512(window<Bits>.shifts)));
  }
}

inline void codes_split(const uint8_t* p, F* values) {
  const I bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  values[0] = as_float<4>(bytes);
  values[1] = as_float<4>(_mm512_srli_epi32(bytes, 4));
}

inline void bf16_split(const uint16_t* p, F* values) {
  const I pairs = _mm512_loadu_si512(p);
  values[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  values[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xFFFF0000u))));
}

inline I load_int(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline I xor_int(I a, I b) { return _mm512_xor_si512(a, b); }
inline uint64_t fold(I v) { return uint64_t(_mm512_reduce_or_epi64(v)); }

#include "kernels.inc"

}  // namespace

constexpr Kernels avx512_kernels = table("avx512");

}  // namespace gossamer
