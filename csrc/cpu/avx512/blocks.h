// SPDX-License-Identifier: Apache-2.0
// What the fast kernels of packed weights on AVX-512 share: scales as vectors, and a tile's
// activations. The multiplication itself is a room's own.
//
// A tile is M tokens x 32 lanes (2 zmm each) over a stretch of k. Its sums over a group stay in
// registers; scaled, they are added to c, which is in L1.
#pragma once

#include <immintrin.h>

#include "../block_tiles.h"
#include "../convert.h"

namespace ey::cpu {
namespace {

inline constexpr int kTileM = 12;  // 24 sums + 2 weights + 1 activation, some to expand codes

struct Scales {
  __m512 set[2];
};

inline __m512 widen_bf16(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

// 16 scales (or zeros), aligned to as many bytes
inline __m512 load_scales(ScaleType type, const char* p) {
  const auto half = [&] { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); };
  switch (type) {
    case ScaleType::kBf16:
      return widen_bf16(half());
    case ScaleType::kFp16:
      return _mm512_cvtph_ps(half());
    case ScaleType::kFp32:
      return _mm512_load_ps(p);
    case ScaleType::kE8m0: {  // 2^-127 is subnormal: its bits are not an exponent
      const auto e = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
      const auto zero = _mm512_cmpeq_epi32_mask(e, _mm512_setzero_si512());
      return _mm512_castsi512_ps(
          _mm512_mask_mov_epi32(_mm512_slli_epi32(e, 23), zero, _mm512_set1_epi32(0x00400000)));
    }
    case ScaleType::kNone:
      break;
  }
  return _mm512_set1_ps(1);
}

// Both lane sets' scales of one group
inline Scales load_both(ScaleType type, const char* p) {
  return {{load_scales(type, p), load_scales(type, p + kLaneSet * size_of(type))}};
}

// M rows at one distance take a register for every three: a base, and base + stride, + 2 stride.
// With one for each, a tile of 12 would leave none to the loop.
template <int M>
struct Tokens {
  static constexpr int kBases = (M + 2) / 3;
  const char* base[kBases];
  int64_t stride;

  Tokens(const char* x, int64_t x_stride, int64_t offset) : stride(x_stride) {
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) base[i] = x + 3 * i * x_stride + offset;
  }
  [[gnu::always_inline]] __m512i broadcast(int m, int64_t offset) const {
    int v;
    __builtin_memcpy(&v, base[m / 3] + m % 3 * stride + offset, sizeof v);
    return _mm512_set1_epi32(v);
  }
  [[gnu::always_inline]] void advance(int64_t bytes) {
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) base[i] += bytes;
  }
};

}  // namespace
}  // namespace ey::cpu
