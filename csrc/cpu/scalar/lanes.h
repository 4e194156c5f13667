// SPDX-License-Identifier: Apache-2.0
// Packed weights in plain C++: a "vector" is one lane.
#pragma once

#include "../block_kernel.h"
#include "vec.h"

namespace ey::cpu {
namespace {

// The i-th scale of a line in fp32
inline float scale_at(ScaleType type, const char* line, int64_t i) {
  const char* p = line + i * size_of(type);
  uint16_t half = 0;
  float single = 1;
  switch (type) {
    case ScaleType::kNone:
      return 1;
    case ScaleType::kFp32:
      __builtin_memcpy(&single, p, sizeof single);
      return single;
    case ScaleType::kE8m0: {
      const auto e = static_cast<uint8_t>(*p);
      return bits<float>(e == 0 ? 0x00400000u : uint32_t{e} << 23);  // 2^-127 is subnormal
    }
    case ScaleType::kBf16:
      __builtin_memcpy(&half, p, sizeof half);
      return from_bf16(half);
    case ScaleType::kFp16:
      __builtin_memcpy(&half, p, sizeof half);
      return from_fp16(half);
  }
  return single;
}

struct Lanes {
  using F = float;
  using I = uint32_t;
  static constexpr int kLanes = 1;
  static constexpr int kMaxTokens = 2;
  static constexpr int regs(int) { return 4; }

  static I load_dwords(const char* p) {
    I v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  template <int n>
  static I shift_left(I v) {
    return v << n;
  }
  template <int n>
  static I shift_right(I v) {
    return v >> n;
  }
  template <int n>
  static I shift_right_signed(I v) {
    return static_cast<I>(static_cast<int32_t>(v) >> n);
  }
  static I mask(I v, uint32_t m) { return v & m; }
  static I flip(I v, uint32_t m) { return v ^ m; }
  static I high_half(I v) { return v & 0xFFFF0000u; }
  static I add_int(I v, uint32_t n) { return v + n; }
  static F as_floats(I v) { return bits<float>(v); }
  static F to_floats(I v) { return static_cast<float>(static_cast<int32_t>(v)); }
  // Byte j at the top, zeros below
  template <int j>
  static I top_byte(I v) {
    return v << (24 - 8 * j) & 0xFF000000u;
  }
  static I look_up(const int8_t* table, I v) {  // of 16 bytes; v: bytes 0 to 15
    I out = 0;
    for (int i = 0; i < 32; i += 8) out |= I{static_cast<uint8_t>(table[v >> i & 15])} << i;
    return out;
  }
  static I zero() { return 0; }
  static I or_int(I a, I b) { return a | b; }
  static F nan_unless_zero(I v, F other) { return v != 0 ? __builtin_nanf("") : other; }
  static F scales(ScaleType type, const char* line, int first) {
    return scale_at(type, line, first);
  }
  static void in_order(F&) {}
  static void accumulate(F& sum, F a, F b) { sum = a * b + sum; }
  static F load(const float* p) { return *p; }
  static void store(float* p, F v) { *p = v; }
  static F set(float v) { return v; }
  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
};

template <template <class> class Values>
constexpr Kernel packed_kernel() {
  return block_kernel<Lanes, Floats, Values<Lanes>, Vec>("scalar", 0, 0);
}

}  // namespace
}  // namespace ey::cpu
