// SPDX-License-Identifier: Apache-2.0
// AVX-512 without bf16 products: weights become fp32, activations are fp32, sums are fp32.
//
// Tile: 4 rows x 6 tokens = 24 accumulators + 4 weight vectors + 1 activation of 32 zmm. A step of
// 16 values is 24 FMA against 10 loads, so the two FMA units are the limit, not the load ports.
#pragma once

#include "../features.h"
#include "../fp32_kernel.h"
#include "floats.h"

namespace ey::cpu {
namespace {

struct Vec {
  using X = float;
  using W = __m512;
  using Acc = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kChains = 24;  // of multiply-adds, to measure the peak
  static constexpr int kMaxTokens = 6;
  static constexpr int rows(int) { return 4; }

  static Acc zero() { return _mm512_setzero_ps(); }
  static __m512 load_x(const X* p) { return _mm512_loadu_ps(p); }
  static void fma(Acc& acc, W w, __m512 x) { acc = _mm512_fmadd_ps(w, x, acc); }
  static void mix(Acc& acc, const char* p) {
    acc = _mm512_xor_ps(acc, _mm512_loadu_ps(reinterpret_cast<const float*>(p)));
  }
  static float sum(Acc a) { return _mm512_reduce_add_ps(a); }
  static void sum4(Acc a, Acc b, Acc c, Acc d, float* out) {
    _mm_storeu_ps(out, sum_of_four(a, b, c, d));
  }
};

template <class Weights>
constexpr Kernel kernel(Format format) {
  return fp32_kernel<Vec, Floats, Weights>("avx512", kFeatureAvx512, 2, format);
}

}  // namespace
}  // namespace ey::cpu
