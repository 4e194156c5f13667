// SPDX-License-Identifier: Apache-2.0
// What the fast kernels of packed weights share: scales as vectors, what to fetch ahead, and the
// cut of (tokens, k) into tiles. The multiplication itself is a room's own.
//
// A tile is M tokens x 32 lanes (2 zmm each) over a stretch of k. Its sums over a group stay in
// registers; scaled, they are added to c, which is in L1.
#pragma once

#include <immintrin.h>

#include <utility>

#include "../convert.h"
#include "../kernel.h"

namespace ey::cpu {
namespace {

inline constexpr int kTileM = 12;        // 24 sums + 2 weights + 1 activation, some to expand codes
inline constexpr int64_t kAhead = 4096;  // bytes: some tens of cache lines in flight

// More tiles than one: k is cut so that the block's stretch and a tile's activations stay in L2 and
// L1 while all tiles pass.
inline constexpr int64_t kStretchK = 2048;

struct Scales {
  __m512 set[2];
};

inline __m512 widen_bf16(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

// 32 scales (or zeros) of one group
inline Scales load_scales(ScaleType type, const char* p) {
  Scales s;
  for (int i = 0; i < 2; ++i) {
    const auto half = [&] {
      return _mm256_load_si256(reinterpret_cast<const __m256i*>(p + i * 32));
    };
    switch (type) {
      case ScaleType::kNone:
        s.set[i] = _mm512_set1_ps(1);
        break;
      case ScaleType::kBf16:
        s.set[i] = widen_bf16(half());
        break;
      case ScaleType::kFp16:
        s.set[i] = _mm512_cvtph_ps(half());
        break;
      case ScaleType::kFp32:
        s.set[i] = _mm512_load_ps(p + i * 64);
        break;
      case ScaleType::kE8m0: {  // 2^-127 is subnormal: its bits are not an exponent
        const auto e =
            _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p + i * 16)));
        const auto zero = _mm512_cmpeq_epi32_mask(e, _mm512_setzero_si512());
        s.set[i] = _mm512_castsi512_ps(
            _mm512_mask_mov_epi32(_mm512_slli_epi32(e, 23), zero, _mm512_set1_epi32(0x00400000)));
        break;
      }
    }
  }
  return s;
}

// One tile's work: k_begin .. k_end of a block, both at borders of scale lines (or of steps, where
// a line is the whole row).
struct Stretch {
  const BlockShape* shape;
  const char* block;
  int64_t k_begin, k_end;
  bool add;  // to c, or over it
  // Prefetching, two lines a step, by offset in the block. One tile: both of the weights, kAhead
  // further on; the last kAhead bytes come from the next block. Several tiles: the first two fetch
  // half of the next block each, a line a step; the other line is of the rows that the next tile
  // will read, if those are in no near cache yet.
  bool whole;              // one tile
  const char* fetch;       // null: nothing
  const char* fetch_tail;  // instead of fetch, from offset tail_at on
  int64_t tail_at;
  const char* x_next;  // null: nothing

  const char* fetch_at(const char* steps) const {
    const int64_t at = steps - block;
    const char* from = at < tail_at ? fetch : fetch_tail;
    return from == nullptr ? steps : whole ? from + at : from + at / 2;
  }
  const char* second_at(const char* steps) const {
    if (whole) return fetch_at(steps) + 64;
    return x_next == nullptr ? steps : x_next + (steps - block) / 2;
  }
  int64_t fetch_step() const { return whole ? kStepBytes : kStepBytes / 2; }
};

// x: the first token's row; the others' follow, x_stride bytes apart.
using TileFunction = void (*)(const Stretch&, const char* x, int64_t x_stride, float* c);

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

// Calls tiles[M - 1] for all tokens and stretches of k. kMax: the largest tile.
template <int kMax>
inline void run_tiles(const MultiplyArgs& a, const BlockShape& shape, const TileFunction* tiles) {
  const int count = (a.num_tokens + kMax - 1) / kMax;
  const auto* x = static_cast<const char*>(a.x[0]);
  const int64_t x_stride = a.num_tokens > 1 ? static_cast<const char*>(a.x[1]) - x : 0;
  const int64_t padded = shape.padded_k(), bytes = shape.block_bytes();
  const int64_t unit = shape.line_k() < padded ? shape.line_k() : kGroup;
  const int64_t stretch = count == 1 ? padded : round_up(kStretchK, unit);
  for (int64_t k = 0; k < padded; k += stretch) {
    for (int t = 0; t < count; ++t) {  // tiles of nearly equal size: 13 tokens are 7 + 6
      const int first = a.num_tokens * t / count;
      const int tokens = a.num_tokens * (t + 1) / count - first;
      Stretch s = {.shape = &shape,
                   .block = a.w.block,
                   .k_begin = k,
                   .k_end = k + stretch < padded ? k + stretch : padded,
                   .add = k > 0,
                   .whole = count == 1,
                   .fetch = nullptr,
                   .fetch_tail = nullptr,
                   .tail_at = INT64_MAX,
                   .x_next = nullptr};
      if (count == 1) {
        s.fetch = a.w.block + kAhead;
        s.tail_at = bytes - kAhead;
        s.fetch_tail = a.w.next_block != nullptr ? a.w.next_block - s.tail_at : s.fetch;
      } else if (t < 2 && a.last && a.w.next_block != nullptr) {
        s.fetch = a.w.next_block + t * (bytes / 2);
      }
      if (t + 1 == count) {
        s.x_next = a.next_x;
      } else if (a.x_is_new) {
        s.x_next = x + (first + tokens) * x_stride;
      }
      tiles[tokens - 1](s, x + first * x_stride, x_stride, a.c + first * kBlockRows);
    }
  }
}

template <template <int> class Tile, int... M>
constexpr auto tile_table(std::integer_sequence<int, M...>) {
  struct Table {
    TileFunction of[sizeof...(M)];
  };
  return Table{{Tile<M + 1>::run...}};
}

}  // namespace
}  // namespace ey::cpu
