// Squeezed registers filled up by one instruction each (VBMI2).
#include <immintrin.h>

#include "expand.hpp"

namespace gossamer {
namespace {

constexpr int64_t Ahead = 2048;  // bytes; a prefetch cannot fault

void bytes(const uint8_t* from, int64_t registers, uint8_t* to) {
  const __m512i zero = _mm512_set1_epi8(char(0x80));
  for (; registers; --registers, to += 64) {
    uint64_t bits;
    __builtin_memcpy(&bits, from, 8);
    __builtin_prefetch(from + Ahead);
    const __m512i filled = _mm512_maskz_expand_epi8(bits, _mm512_loadu_si512(from + 8));
    _mm512_store_si512(to, _mm512_xor_si512(filled, zero));
    from += 8 + __builtin_popcountll(bits);
  }
}

void words(const uint8_t* from, int64_t registers, uint8_t* to) {
  for (; registers; --registers, to += 64) {
    uint32_t bits;
    __builtin_memcpy(&bits, from, 4);
    __builtin_prefetch(from + Ahead);
    _mm512_store_si512(to, _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(from + 4)));
    from += 4 + 2 * __builtin_popcount(bits);
  }
}

}  // namespace

constexpr Expanders avx512_expanders = {bytes, words};

}  // namespace gossamer
