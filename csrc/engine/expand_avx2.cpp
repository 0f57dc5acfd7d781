// Squeezed registers filled up by byte shuffles: a table says for 8 bits which number goes where.
#include <immintrin.h>

#include "expand.hpp"

namespace gossamer {
namespace {

constexpr int64_t Ahead = 2048;  // bytes; a prefetch cannot fault

struct Table {
  alignas(64) uint8_t to[256][16];  // for each byte of the result the number's byte, or 128: zero
};

constexpr Table table(int size) {
  Table t{};
  for (int bits = 0; bits < 256; ++bits) {
    for (int i = 0; i < 16; ++i) t.to[bits][i] = 128;
    for (int i = 0, number = 0; i < 8; ++i) {
      if (!(bits >> i & 1)) continue;
      for (int b = 0; b < size; ++b) t.to[bits][i * size + b] = uint8_t(number * size + b);
      ++number;
    }
  }
  return t;
}

constexpr Table byte_table = table(1), word_table = table(2);

inline __m128i load16(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m128i load8(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }

void bytes(const uint8_t* from, int64_t registers, uint8_t* to) {
  const __m128i zero = _mm_set1_epi8(char(0x80));
  for (; registers; --registers, to += 64) {
    const uint8_t* bits = from;
    from += 8;
    __builtin_prefetch(bits + Ahead);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      const int first = __builtin_popcount(bits[i]), second = __builtin_popcount(bits[i + 1]);
      const __m128i low = _mm_shuffle_epi8(load8(from), load16(byte_table.to[bits[i]]));
      const __m128i high = _mm_shuffle_epi8(load8(from + first), load16(byte_table.to[bits[i + 1]]));
      const __m128i both = _mm_xor_si128(_mm_unpacklo_epi64(low, high), zero);
      _mm_store_si128(reinterpret_cast<__m128i*>(to + 8 * i), both);
      from += first + second;
    }
  }
}

void words(const uint8_t* from, int64_t registers, uint8_t* to) {
  for (; registers; --registers, to += 64) {
    const uint8_t* bits = from;
    from += 4;
    __builtin_prefetch(bits + Ahead);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m128i filled = _mm_shuffle_epi8(load16(from), load16(word_table.to[bits[i]]));
      _mm_store_si128(reinterpret_cast<__m128i*>(to + 16 * i), filled);
      from += 2 * __builtin_popcount(bits[i]);
    }
  }
}

}  // namespace

constexpr Expanders avx2_expanders = {bytes, words};

}  // namespace gossamer
