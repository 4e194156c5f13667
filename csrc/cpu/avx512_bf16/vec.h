// SPDX-License-Identifier: Apache-2.0
// vdpbf16ps: two bf16 products added to each fp32 lane. It takes subnormal inputs and results as
// zero.
#pragma once

#include "../avx512/floats.h"

namespace ey::cpu {
namespace {

// In assembler: with 24 sums gcc 12 keeps the weights of its own intrinsic in memory while
// registers are free, which halves the speed of a tile.
inline __m512 dot_bf16(__m512 sum, __m512i weights, __m512i x) {
#ifdef EY_EMULATE_AVX512
  return ey_avx512::dpbf16_ps(sum, weights, x);
#else
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
  return sum;
#endif
}

struct Vec {
  using X = uint16_t;
  using W = __m512bh;
  using Acc = __m512;
  static constexpr int kWidth = 32;
  static constexpr int kMaxTokens = 6;
  static constexpr int rows(int n) { return n == 1 ? 1 : 4; }

  static Acc zero() { return _mm512_setzero_ps(); }
  static W load_x(const X* p) { return reinterpret_cast<W>(_mm512_loadu_si512(p)); }
  static void fma(Acc& acc, W w, W x) { acc = _mm512_dpbf16_ps(acc, w, x); }
  static void mix(Acc& acc, const char* p) { acc = _mm512_xor_ps(acc, _mm512_loadu_ps(p)); }
  static float sum(Acc a) { return _mm512_reduce_add_ps(a); }
  static void sum4(Acc a, Acc b, Acc c, Acc d, float* out) {
    _mm_storeu_ps(out, sum_of_four(a, b, c, d));
  }
};

}  // namespace
}  // namespace ey::cpu
