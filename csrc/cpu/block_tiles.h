// SPDX-License-Identifier: Apache-2.0
// How kernels of packed weights cut (tokens, k) of a block into tiles, and what a tile fetches
// ahead meanwhile. What a tile does is a room's own.
#pragma once

#include <utility>

#include "kernel.h"

namespace ey::cpu {
namespace {

// More tiles than one: k is cut so that the block's stretch and a tile's activations stay in L2 and
// L1 while all tiles pass.
inline constexpr int64_t kStretchK = 2048;

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
using BlockTile = void (*)(const Stretch&, const char* x, int64_t x_stride, float* c);

// Calls tiles[M - 1] for all tokens and stretches of k. kMax: the largest tile; kStretch: k of a
// stretch where there are several.
template <int kMax, int64_t kStretch = kStretchK>
inline void run_tiles(const MultiplyArgs& a, const BlockShape& shape, const BlockTile* tiles) {
  const int count = (a.num_tokens + kMax - 1) / kMax;
  const auto* x = static_cast<const char*>(a.x[0]);
  const int64_t x_stride = a.num_tokens > 1 ? static_cast<const char*>(a.x[1]) - x : 0;
  const int64_t padded = shape.padded_k(), bytes = shape.block_bytes();
  const int64_t unit = shape.line_k() < padded ? shape.line_k() : kGroup;
  const int64_t stretch = count == 1 ? padded : round_up(kStretch, unit);
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
    BlockTile of[sizeof...(M)];
  };
  return Table{{Tile<M + 1>::run...}};
}

}  // namespace
}  // namespace ey::cpu
