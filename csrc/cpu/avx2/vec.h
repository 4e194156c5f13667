// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA: weights become fp32, activations are fp32, sums are fp32.
//
// 16 ymm: 2 rows x 6 tokens = 12 accumulators + 2 weight vectors + 1 activation. For one or two
// tokens 4 rows, because a chain of FMAs needs company to hide its latency.
#pragma once

#include <immintrin.h>

#include "../features.h"
#include "../fp32_kernel.h"

namespace ey::cpu {
namespace {

// sum += a * b in the form that overwrites the sum: others cost a copy, and a tile of twelve sums
// has no register for it. In the order that is written, so that none is kept elsewhere meanwhile.
[[gnu::always_inline]] inline void accumulate(__m256& sum, __m256 a, __m256 b) {
  __m256 s = sum;  // where sum is of an array, gcc would keep that in memory
  asm volatile("vfmadd231ps %2, %1, %0" : "+x"(s) : "x"(a), "x"(b));
  sum = s;
}

struct Vec {
  using X = float;
  using W = __m256;
  using Acc = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kChains = 12;  // of multiply-adds, to measure the peak
  static constexpr int kMaxTokens = 6;
  static constexpr int rows(int num_tokens) { return num_tokens <= 2 ? 4 : 2; }

  static Acc zero() { return _mm256_setzero_ps(); }
  static __m256 load_x(const X* p) { return _mm256_loadu_ps(p); }
  static void fma(Acc& acc, W w, __m256 x) { accumulate(acc, w, x); }
  static void mix(Acc& acc, const char* p) {
    acc = _mm256_xor_ps(acc, _mm256_loadu_ps(reinterpret_cast<const float*>(p)));
  }
  static float sum(Acc a) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
  static void sum4(Acc a, Acc b, Acc c, Acc d, float* out) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }
};

struct Floats {
  using V = __m256;
  using H = float;
  static constexpr int kWidth = 8;
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static void store_h(H* p, V v) { _mm256_storeu_ps(p, v); }
  static V set(float v) { return _mm256_set1_ps(v); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }  // b if either is NaN
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V scale(V a, V n) {  // a * 2^n for -126 <= n <= 127: n goes into the exponent of 1.0
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)));
  }
};

template <class Weights>
constexpr Kernel kernel(Format format) {
  return fp32_kernel<Vec, Floats, Weights>("avx2", kFeatureAvx2, 1, format);
}

// AVX2 has no masked 16-bit load: the tail is copied.
inline __m128i load_tail_16(const char* p, int n) {
  alignas(16) uint16_t tail[8] = {};
  __builtin_memcpy(tail, p, n * sizeof(uint16_t));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(tail));
}

}  // namespace
}  // namespace ey::cpu
