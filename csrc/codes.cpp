#include "codes.hpp"

#include <cstring>

namespace gossamer {
namespace {

// Eight codes take `Bits` whole bytes, so a row is a run of such octets and a shorter last one.
template <int Bits>
inline uint64_t load_octet(const uint8_t* bytes, int64_t available) {
  uint64_t word = 0;
  std::memcpy(&word, bytes, available < Bits ? available : Bits);
  return word;
}

template <int Bits>
void unpack_row(const uint8_t* bytes, int64_t row_bytes, int8_t* codes, int64_t columns) {
  constexpr int offset = 1 << (Bits - 1);
  constexpr uint64_t mask = (1u << Bits) - 1;
  int64_t column = 0;
  for (; column + 8 <= columns; column += 8, bytes += Bits, row_bytes -= Bits) {
    const uint64_t word = load_octet<Bits>(bytes, Bits);
    for (int i = 0; i < 8; ++i) codes[column + i] = static_cast<int8_t>(int((word >> (Bits * i)) & mask) - offset);
  }
  uint64_t word = column < columns ? load_octet<Bits>(bytes, row_bytes) : 0;
  for (; column < columns; ++column, word >>= Bits) codes[column] = static_cast<int8_t>(int(word & mask) - offset);
}

template <int Bits>
void pack_row(const int8_t* codes, int64_t columns, uint8_t* bytes, int64_t row_bytes) {
  constexpr int offset = 1 << (Bits - 1);
  constexpr uint64_t mask = (1u << Bits) - 1;
  std::memset(bytes, 0, row_bytes);
  for (int64_t column = 0; column < columns; column += 8, bytes += Bits, row_bytes -= Bits) {
    const int count = columns - column < 8 ? int(columns - column) : 8;
    uint64_t word = 0;
    for (int i = 0; i < count; ++i) word |= (uint64_t(codes[column + i] + offset) & mask) << (Bits * i);
    std::memcpy(bytes, &word, row_bytes < Bits ? row_bytes : Bits);
  }
}

template <int Bits>
void unpack_all(const uint32_t* packed, int8_t* codes, int64_t rows, int64_t columns) {
  const int64_t row_bytes = 4 * words_for(columns, Bits);
  const auto* bytes = reinterpret_cast<const uint8_t*>(packed);
  for (int64_t row = 0; row < rows; ++row)
    unpack_row<Bits>(bytes + row * row_bytes, row_bytes, codes + row * columns, columns);
}

template <int Bits>
void pack_all(const int8_t* codes, uint32_t* packed, int64_t rows, int64_t columns) {
  const int64_t row_bytes = 4 * words_for(columns, Bits);
  auto* bytes = reinterpret_cast<uint8_t*>(packed);
  for (int64_t row = 0; row < rows; ++row)
    pack_row<Bits>(codes + row * columns, columns, bytes + row * row_bytes, row_bytes);
}

}  // namespace

void unpack_codes(const uint32_t* packed, int8_t* codes, int64_t rows, int64_t columns, int bits) {
  using Function = void (*)(const uint32_t*, int8_t*, int64_t, int64_t);
  static constexpr Function functions[] = {unpack_all<1>, unpack_all<2>, unpack_all<3>, unpack_all<4>,
                                           unpack_all<5>, unpack_all<6>, unpack_all<7>, unpack_all<8>};
  functions[bits - 1](packed, codes, rows, columns);
}

void pack_codes(const int8_t* codes, uint32_t* packed, int64_t rows, int64_t columns, int bits) {
  using Function = void (*)(const int8_t*, uint32_t*, int64_t, int64_t);
  static constexpr Function functions[] = {pack_all<1>, pack_all<2>, pack_all<3>, pack_all<4>,
                                           pack_all<5>, pack_all<6>, pack_all<7>, pack_all<8>};
  functions[bits - 1](codes, packed, rows, columns);
}

}  // namespace gossamer
