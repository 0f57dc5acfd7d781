// Numbers of 8 and 16 bits that scales and weights are stored as, and the float32 that each is. Conversions to them say
// whether there is one that is equal.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace gossamer {

inline float bf16_value(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t bf16_of(float value) {  // of a float that is one
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t(bits >> 16);
}

inline bool is_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits & 0xFFFF) == 0;
}

// The half-precision number equal to a float, if there is one.
inline bool to_f16(float value, uint16_t& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, fraction = bits & 0x7FFFFF;
  const int exponent = int((bits >> 23) & 255) - 127;
  if ((bits & 0x7FFFFFFF) == 0) return out = uint16_t(sign), true;
  if (exponent > 15 || exponent < -24) return false;
  const int lost = exponent >= -14 ? 13 : 13 + (-14 - exponent);
  const uint32_t whole = fraction | 0x800000;
  if (whole & ((1u << lost) - 1)) return false;
  const uint32_t kept = whole >> lost;
  out = uint16_t(sign | (exponent >= -14 ? (uint32_t(exponent + 15) << 10) | (kept & 0x3FF) : kept));
  return true;
}

inline float f16_value(uint16_t h) {
  const int exponent = (h >> 10) & 31;
  const float fraction = float(h & 1023);
  const float size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return h & 0x8000 ? -size : size;
}

// 8 bits: sign, 4 of the exponent, 3 of the fraction; the largest is 448, and there is no infinity (OCP OFP8, E4M3).
inline float e4m3_value(uint8_t h) {
  const int exponent = (h >> 3) & 15, fraction = h & 7;
  if ((h & 127) == 127) return NAN;
  const float size = exponent ? std::ldexp(float(8 + fraction), exponent - 10) : std::ldexp(float(fraction), -9);
  return h & 128 ? -size : size;
}

// Of a number that is not negative.
inline bool to_e4m3(float value, uint8_t& out) {
  if (!(value >= 0.0f && value <= 448.0f)) return false;
  int exponent;
  std::frexp(value, &exponent);
  exponent = exponent < -5 ? -5 : exponent;
  const float units = std::ldexp(value, 4 - exponent);  // below 16
  if (units != std::floor(units)) return false;
  out = uint8_t(units >= 8.0f ? (exponent + 6) * 8 + int(units) - 8 : int(units));
  return true;
}

// The power of two that an exponent with bias 127 says, from 2^-126 on.
inline float e8m0_value(uint8_t h) { return std::ldexp(1.0f, int(h) - 127); }

inline bool to_e8m0(float value, uint8_t& out) {
  int exponent;
  if (!(value > 0.0f) || !std::isfinite(value) || std::frexp(value, &exponent) != 0.5f || exponent < -125) return false;
  out = uint8_t(exponent + 126);
  return true;
}

}  // namespace gossamer
