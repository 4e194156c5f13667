// SPDX-License-Identifier: Apache-2.0
// Many tokens on AVX-512 BF16: a block of 32 weight rows re-ordered so that a lane is a row.
//
//   panel: for each pair of k two zmm; lane r of the first holds (w[r][k], w[r][k + 1]), of the
//          second (w[16 + r][k], w[16 + r][k + 1]); 64 bytes each, k ascending, odd k padded with 0
//
// A tile is 2 zmm x up to 12 tokens: 24 accumulators + 2 weights + 1 broadcast of 32 zmm. A step of
// two k is 24 vdpbf16ps (12 cycles) against 2 + 12 loads (7 cycles), and no sum over lanes at the
// end: an accumulator lane is a finished c[t][r].
#pragma once

#include <immintrin.h>

#include <utility>

#include "../row_kernel.h"

namespace ey::cpu {
namespace {

inline constexpr int kPanelTokens = 12;
inline constexpr int64_t kPanelStep = 128;  // bytes of a panel for two k

inline int64_t panel_bytes(int64_t k) { return (k + 31) / 32 * 16 * kPanelStep; }

// 16 rows of 16 dwords -> 16 columns of 16 dwords, in four rounds of interleaving.
inline void transpose(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

inline void pack(const PackArgs& a) {
  char* out = a.panel + a.half * 64;
  for (int64_t k = 0; k < a.k; k += 32) {
    const int64_t n = a.k - k < 32 ? a.k - k : 32;
    const auto mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
    __m512i v[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      const char* row = a.w + r * a.w_stride + k * 2;
      v[r] = r < a.num_rows ? _mm512_maskz_loadu_epi16(mask, row) : _mm512_setzero_si512();
    }
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (k / 2 + i) * kPanelStep, v[i]);
  }
}

// Two k at a time. The loop over 16 stretches lets each step also fetch one cache line of the rows
// that are packed next: a stretch is as many steps as a row of the same k has lines.
template <int M>
[[gnu::noinline]] void panel_tile(const char* panel, int64_t k, const void* const* x_rows,
                                  int64_t x_offset, const char* next, int64_t next_stride, bool add,
                                  float* c) {
  __m512 acc[M][2];
  const char* x[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    x[m] = static_cast<const char*>(x_rows[m]) + x_offset;
    acc[m][0] = add ? _mm512_loadu_ps(c + m * kBlockRows) : _mm512_setzero_ps();
    acc[m][1] = add ? _mm512_loadu_ps(c + m * kBlockRows + 16) : _mm512_setzero_ps();
  }
  const auto step = [&](int64_t pair) __attribute__((always_inline)) {
    const char* w = panel + pair * kPanelStep;
    const auto w0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w));
    const auto w1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + 64));
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      int two;
      __builtin_memcpy(&two, x[m] + pair * 4, sizeof two);
      const auto xm = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
      acc[m][0] = _mm512_dpbf16_ps(acc[m][0], w0, xm);
      acc[m][1] = _mm512_dpbf16_ps(acc[m][1], w1, xm);
    }
  };
  const int64_t pairs = (k + 1) / 2;
  int64_t pair = 0;
  if (next != nullptr) {
    for (int row = 0; row < kHalfRows; ++row) {
      const char* line = next + row * next_stride;
      for (const int64_t end = pairs * (row + 1) / kHalfRows; pair < end; ++pair, line += 64) {
        __builtin_prefetch(line);
        step(pair);
      }
    }
  }
  for (; pair < pairs; ++pair) step(pair);
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    _mm512_storeu_ps(c + m * kBlockRows, acc[m][0]);
    _mm512_storeu_ps(c + m * kBlockRows + 16, acc[m][1]);
  }
}

template <int... M>
inline void panel_by_count(std::integer_sequence<int, M...>, const PanelArgs& a) {
  static constexpr decltype(&panel_tile<1>) tiles[] = {panel_tile<M + 1>...};
  const int count = (a.num_tokens + kPanelTokens - 1) / kPanelTokens;
  for (int t = 0; t < count; ++t) {  // tiles of nearly equal size: 13 tokens are 7 + 6, not 12 + 1
    const int first = a.num_tokens * t / count;
    const int tokens = a.num_tokens * (t + 1) / count - first;
    const char* next = t < 2 ? a.next[t] : nullptr;  // the first two tiles fetch a half each
    tiles[tokens - 1](a.panel, a.k, a.x + first, a.x_offset, next, a.next_stride, a.add,
                      a.c + first * kBlockRows);
  }
}

inline void panel(const PanelArgs& a) {
  panel_by_count(std::make_integer_sequence<int, kPanelTokens>{}, a);
}

}  // namespace
}  // namespace ey::cpu
