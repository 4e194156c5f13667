// SPDX-License-Identifier: Apache-2.0
// Packed weights on AVX2: 8 lanes a vector, 16 ymm. Tiles of one and two tokens take all 32 lanes
// in one pass (4 vectors: up to 8 sums, 4 dwords, 1 weight, 1 activation), larger ones 16 lanes in
// each of two (2 vectors x 6 tokens = 12 sums, 2 weights, 1 activation).
#pragma once

#include "../block_kernel.h"
#include "vec.h"

namespace ey::cpu {
namespace {

struct Lanes {
  using F = __m256;
  using I = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int kMaxTokens = 6;
  static constexpr int regs(int num_tokens) { return num_tokens <= 2 ? 4 : 2; }

  static I load_dwords(const char* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  template <int n>
  static I shift_left(I v) {
    return _mm256_slli_epi32(v, n);
  }
  template <int n>
  static I shift_right(I v) {
    return _mm256_srli_epi32(v, n);
  }
  template <int n>
  static I shift_right_signed(I v) {
    return _mm256_srai_epi32(v, n);
  }
  static I flip(I v, uint32_t m) {
    return _mm256_xor_si256(v, _mm256_set1_epi32(static_cast<int>(m)));
  }
  static I mask(I v, uint32_t m) {
    return _mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(m)));
  }
  static I add_int(I v, uint32_t n) {
    return _mm256_add_epi32(v, _mm256_set1_epi32(static_cast<int>(n)));
  }
  static F as_floats(I v) { return _mm256_castsi256_ps(v); }
  static F to_floats(I v) { return _mm256_cvtepi32_ps(v); }
  // Byte j of each dword at its top, zeros below
  template <int j>
  static I top_byte(I v) {
    alignas(32) static constexpr uint32_t kFrom[8] = {from(j),      from(j + 4), from(j + 8),
                                                      from(j + 12), from(j),     from(j + 4),
                                                      from(j + 8),  from(j + 12)};
    I out;
    asm("vpshufb %2, %1, %0" : "=x"(out) : "x"(v), "m"(kFrom));
    return out;
  }
  static constexpr uint32_t from(int byte) { return 0x00808080u | uint32_t(byte) << 24; }
  static I high_half(I v) {
    alignas(32) static constexpr uint32_t kHigh[8] = {0xFFFF0000u, 0xFFFF0000u, 0xFFFF0000u,
                                                      0xFFFF0000u, 0xFFFF0000u, 0xFFFF0000u,
                                                      0xFFFF0000u, 0xFFFF0000u};
    I out;
    asm("vpand %2, %1, %0" : "=x"(out) : "x"(v), "m"(kHigh));
    return out;
  }
  static I look_up(const int8_t* table, I v) {  // of 16 bytes; v: bytes 0 to 15
    const auto t = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(t), v);
  }
  static I zero() { return _mm256_setzero_si256(); }
  static I or_int(I a, I b) { return _mm256_or_si256(a, b); }
  static F nan_unless_zero(I v, F other) {
    const auto none = _mm256_cmpeq_epi32(v, _mm256_setzero_si256());
    const auto nan = _mm256_andnot_si256(none, _mm256_set1_epi32(-1));  // all ones is a NaN
    return _mm256_or_ps(other, _mm256_castsi256_ps(nan));
  }
  // kLanes scales (or zeros), from the first-th of a line on
  static F scales(ScaleType type, const char* line, int first) {
    const char* p = line + first * size_of(type);
    const auto halves = [&] { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
    switch (type) {
      case ScaleType::kBf16:
        return as_floats(shift_left<16>(_mm256_cvtepu16_epi32(halves())));
      case ScaleType::kFp16:
        return _mm256_cvtph_ps(halves());
      case ScaleType::kFp32:
        return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
      case ScaleType::kE8m0: {  // 2^-127 is subnormal: its bits are not an exponent
        const auto e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        const auto zero = _mm256_cmpeq_epi32(e, _mm256_setzero_si256());
        return as_floats(
            _mm256_blendv_epi8(shift_left<23>(e), _mm256_set1_epi32(0x00400000), zero));
      }
      case ScaleType::kNone:
        break;
    }
    return set(1);
  }
  // Token by token: left alone, gcc begins with all tokens' products and runs out of registers.
  template <class T>
  static void in_order(T& v) {
    asm volatile("" : "+x"(v));
  }
  static void accumulate(F& sum, F a, F b) { cpu::accumulate(sum, a, b); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F set(float v) { return _mm256_set1_ps(v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
};

// What byte_tile.h needs beside: bytes and their products.
struct ByteLanes : Lanes {
  static constexpr int kMaxTokens = 4;  // 2 x 4 sums, 2 codes, 2 weights, 1 activation, products
  static constexpr int regs(int num_tokens) { return num_tokens == 1 ? 4 : 2; }
  static I broadcast(const char* p) {
    int v;
    __builtin_memcpy(&v, p, sizeof v);
    return _mm256_set1_epi32(v);
  }
  static I high_nibbles(I v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
  static I low_nibbles(I v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  static I magnitudes(I v) { return _mm256_abs_epi8(v); }
  static I signed_by(I v, I sign) { return _mm256_sign_epi8(v, sign); }  // 0 where sign is 0
  static I products(I u8, I s8) { return _mm256_maddubs_epi16(u8, s8); }
  static I add_words(I a, I b) { return _mm256_add_epi16(a, b); }
  static I add_dwords(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sum_pairs(I words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }
};

template <template <class> class Values>
constexpr Kernel packed_kernel() {
  return block_kernel<Lanes, Floats, Values<Lanes>, Vec>("avx2", kFeatureAvx2, 1);
}

}  // namespace
}  // namespace ey::cpu
