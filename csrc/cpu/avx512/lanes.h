// SPDX-License-Identifier: Apache-2.0
// Packed weights on AVX-512 without dot products of small types: 16 lanes a vector, 32 zmm. A tile
// is both lane sets x up to 12 tokens = 24 sums, 2 dwords, 2 weights, 1 activation.
#pragma once

#include "../block_kernel.h"
#include "blocks.h"
#include "vec.h"

namespace ey::cpu {
namespace {

struct Lanes {
  using F = __m512;
  using I = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kMaxTokens = 12;
  static constexpr int regs(int) { return 2; }

  static I load_dwords(const char* p) { return _mm512_loadu_si512(p); }
  template <int n>
  static I shift_left(I v) {
    return _mm512_slli_epi32(v, n);
  }
  template <int n>
  static I shift_right(I v) {
    return _mm512_srli_epi32(v, n);
  }
  template <int n>
  static I shift_right_signed(I v) {
    return _mm512_srai_epi32(v, n);
  }
  static I flip(I v, uint32_t m) {
    return _mm512_xor_si512(v, _mm512_set1_epi32(static_cast<int>(m)));
  }
  static I mask(I v, uint32_t m) {
    return _mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(m)));
  }
  static I high_half(I v) { return mask(v, 0xFFFF0000u); }
  static I add_int(I v, uint32_t n) {
    return _mm512_add_epi32(v, _mm512_set1_epi32(static_cast<int>(n)));
  }
  static F as_floats(I v) { return _mm512_castsi512_ps(v); }
  static F to_floats(I v) { return _mm512_cvtepi32_ps(v); }
  // Byte j of each dword at its top, zeros below
  template <int j>
  static I top_byte(I v) {
    constexpr int kNo = 0x00808080, kAt = j << 24;
    const auto from = _mm_setr_epi32(kNo | kAt, kNo | (kAt + (1 << 26)), kNo | (kAt + (2 << 26)),
                                     kNo | (kAt + (3 << 26)));
    return _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(from));
  }
  static I look_up(const int8_t* table, I v) {  // of 16 bytes; v: bytes 0 to 15
    const auto t = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), v);
  }
  static I zero() { return _mm512_setzero_si512(); }
  static I or_int(I a, I b) { return _mm512_or_si512(a, b); }
  static F nan_unless_zero(I v, F other) {
    const auto none = _mm512_cmpeq_epi32_mask(v, _mm512_setzero_si512());
    return _mm512_mask_blend_ps(none, _mm512_set1_ps(__builtin_nanf("")), other);
  }
  // kLanes scales (or zeros), from the first-th of a line on
  static F scales(ScaleType type, const char* line, int first) {
    return load_scales(type, line + first * size_of(type));
  }
  // Token by token: left alone, gcc begins with all tokens' products and runs out of registers.
  template <class T>
  static void in_order([[maybe_unused]] T& v) {
#ifndef EY_EMULATE_AVX512
    asm volatile("" : "+v"(v));
#endif
  }
  static void accumulate(F& sum, F a, F b) {
    F s = _mm512_fmadd_ps(a, b, sum);
    in_order(s);  // of an element of an array, and gcc would keep that in memory
    sum = s;
  }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F set(float v) { return _mm512_set1_ps(v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
};

// What byte_tile.h needs beside: bytes and their products.
struct ByteLanes : Lanes {
  static constexpr int kMaxTokens = 8;  // 16 sums, 2 codes, 2 weights, 1 activation, products
  static I broadcast(const char* p) {
    int v;
    __builtin_memcpy(&v, p, sizeof v);
    return _mm512_set1_epi32(v);
  }
  static I high_nibbles(I v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
  static I low_nibbles(I v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static I magnitudes(I v) { return _mm512_abs_epi8(v); }
  static I signed_by(I v, I sign) {
    return _mm512_mask_sub_epi8(v, _mm512_movepi8_mask(sign), _mm512_setzero_si512(), v);
  }
  static I products(I u8, I s8) { return _mm512_maddubs_epi16(u8, s8); }
  static I add_words(I a, I b) { return _mm512_add_epi16(a, b); }
  static I add_dwords(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sum_pairs(I words) { return _mm512_madd_epi16(words, _mm512_set1_epi16(1)); }
};

template <template <class> class Values>
constexpr Kernel packed_kernel() {
  return block_kernel<Lanes, Floats, Values<Lanes>, Vec>("avx512", kFeatureAvx512, 2);
}

}  // namespace
}  // namespace ey::cpu
