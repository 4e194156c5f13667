// SPDX-License-Identifier: Apache-2.0
// bf16 and fp16 to fp32 and back, one value at a time, rounding to nearest even. In an anonymous
// namespace: each room compiles its own copy with its own flags, and none leaks to another.
#pragma once

#include <cstdint>
#include <cstring>

#include "../moe.h"

namespace ey::cpu {
namespace {

template <class To, class From>
inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  __builtin_memcpy(&out, &v, sizeof out);
  return out;
}

inline float from_bf16(uint16_t v) { return bits<float>(uint32_t{v} << 16); }

inline uint16_t to_bf16(float v) {
  const uint32_t u = bits<uint32_t>(v);
  const uint32_t rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16;
  const bool nan = (u & 0x7FFFFFFF) > 0x7F800000;  // rounding would turn some into infinity
  return static_cast<uint16_t>(nan ? (u >> 16 | 0x40) : rounded);
}

// fp16 by way of float arithmetic: the exponent moves by a multiplication, which also gets
// subnormals right.
inline float from_fp16(uint16_t v) {
  const uint32_t magnitude = v & 0x7FFF;
  const float scaled = bits<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 0x7C00 ? 0x7F800000u | (magnitude & 0x3FF) << 13 : 0;
  const uint32_t out = special ? special : bits<uint32_t>(scaled);
  return bits<float>(out | uint32_t{v & 0x8000u} << 16);
}

inline uint16_t to_fp16(float v) {
  const uint32_t u = bits<uint32_t>(v);
  const uint32_t sign = u >> 16 & 0x8000, magnitude = u & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);   // NaN
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds to infinity
  if (magnitude < 0x38800000) {  // subnormal: add a power of two so that the ulp is 2^-24
    const float shifted = bits<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits<uint32_t>(shifted) - 0x3F000000));
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xFFF + odd) >> 13));
}

// from[0..n) of dtype -> to[0..padded) as fp32, zeros behind n
inline void load_row_fp32(const void* from, DType dtype, int64_t n, int64_t padded, float* to) {
  const auto* half = static_cast<const uint16_t*>(from);
  if (dtype == DType::kF32) {
    std::memcpy(to, from, n * sizeof(float));
  } else if (dtype == DType::kBF16) {
    for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(half[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from_fp16(half[i]);
  }
  for (int64_t i = n; i < padded; ++i) to[i] = 0;
}

inline void store_row_fp32(const float* from, int64_t n, DType dtype, void* to) {
  auto* half = static_cast<uint16_t*>(to);
  if (dtype == DType::kF32) {
    std::memcpy(to, from, n * sizeof(float));
  } else if (dtype == DType::kBF16) {
    for (int64_t i = 0; i < n; ++i) half[i] = to_bf16(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) half[i] = to_fp16(from[i]);
  }
}

}  // namespace
}  // namespace ey::cpu
