// SPDX-License-Identifier: Apache-2.0
// Packed weights on AVX2: 8 lanes a vector. A tile is 2 vectors x 4 tokens = 8 sums of the group
// and 8 of the row (which may live in memory), 2 dwords, 2 weights, 1 activation.
#pragma once

#include "../block_kernel.h"
#include "vec.h"

namespace ey::cpu {
namespace {

struct Lanes {
  using F = __m256;
  using I = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int kRegs = 2;
  static constexpr int kMaxTokens = 4;

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
  static I mask(I v, uint32_t m) {
    return _mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(m)));
  }
  static I add_int(I v, uint32_t n) {
    return _mm256_add_epi32(v, _mm256_set1_epi32(static_cast<int>(n)));
  }
  static F as_floats(I v) { return _mm256_castsi256_ps(v); }
  static F to_floats(I v) { return _mm256_cvtepi32_ps(v); }
  static F select_small(I v, uint32_t limit, F small, F large) {
    const auto is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(limit)), v);
    return _mm256_blendv_ps(large, small, _mm256_castsi256_ps(is_small));
  }
  static F nan_at(I v, uint32_t code, F other) {
    const auto is_code = _mm256_cmpeq_epi32(_mm256_set1_epi32(static_cast<int>(code)), v);
    return _mm256_or_ps(other, _mm256_castsi256_ps(is_code));  // all ones is a NaN
  }
  static F sign_of(I sign, F v) { return _mm256_or_ps(v, _mm256_castsi256_ps(sign)); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F set(float v) { return _mm256_set1_ps(v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
};

template <template <class> class Values>
constexpr Kernel packed_kernel() {
  return block_kernel<Lanes, Floats, Values<Lanes>, Vec>("avx2", kFeatureAvx2, 1);
}

}  // namespace
}  // namespace ey::cpu
