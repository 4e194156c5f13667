// SPDX-License-Identifier: Apache-2.0
// Packed weights on AVX-512 without dot products of small types: 16 lanes a vector, fp32 products.
// A tile is both lane sets x 5 tokens = 10 sums of the group, 10 of the row, 2 dwords, 2 weights, 1
// activation of 32 zmm.
#pragma once

#include "../block_kernel.h"
#include "vec.h"

namespace ey::cpu {
namespace {

struct Lanes {
  using F = __m512;
  using I = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kRegs = 2;
  static constexpr int kMaxTokens = 5;

  static I load_dwords(const char* p) { return _mm512_loadu_si512(p); }
  template <int n>
  static I shift_left(I v) {
    return _mm512_slli_epi32(v, n);
  }
  template <int n>
  static I shift_right(I v) {
    return _mm512_srli_epi32(v, n);
  }
  static I mask(I v, uint32_t m) {
    return _mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(m)));
  }
  static I add_int(I v, uint32_t n) {
    return _mm512_add_epi32(v, _mm512_set1_epi32(static_cast<int>(n)));
  }
  static F as_floats(I v) { return _mm512_castsi512_ps(v); }
  static F to_floats(I v) { return _mm512_cvtepi32_ps(v); }
  static F select_small(I v, uint32_t limit, F small, F large) {
    const auto is_small = _mm512_cmplt_epu32_mask(v, _mm512_set1_epi32(static_cast<int>(limit)));
    return _mm512_mask_blend_ps(is_small, large, small);
  }
  static F nan_at(I v, uint32_t code, F other) {
    const auto is_code = _mm512_cmpeq_epi32_mask(v, _mm512_set1_epi32(static_cast<int>(code)));
    return _mm512_mask_blend_ps(is_code, other, _mm512_set1_ps(__builtin_nanf("")));
  }
  static F sign_of(I sign, F v) { return _mm512_or_ps(v, _mm512_castsi512_ps(sign)); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F set(float v) { return _mm512_set1_ps(v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
};

template <template <class> class Values>
constexpr Kernel packed_kernel() {
  return block_kernel<Lanes, Floats, Values<Lanes>, Vec>("avx512", kFeatureAvx512, 2);
}

}  // namespace
}  // namespace ey::cpu
