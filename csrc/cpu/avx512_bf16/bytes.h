// SPDX-License-Identifier: Apache-2.0
// 8-bit codes x bf16 activations. Few tokens: codes become bf16 in registers, step by step. More:
// the block is made into a panel of bf16 pairs once, in cache, and the tiles read that.
//
// Both take the pairs of k (0,2) (1,3) of a step: the even bytes of a dword, and the odd ones.
//   D   kDots and weights<i> for few tokens; pairs(codes, even, odd) for the panel
#pragma once

#include "block_tile.h"

namespace ey::cpu {
namespace {

struct ByteOrder {
  static constexpr bool kFromPanel = false;
  static constexpr int kStep = 4;
  static constexpr int order(int place) {
    constexpr int k[] = {0, 2, 1, 3};
    return k[place];
  }
};

// What tiles read from a panel: two k at a time, in the rows' order.
template <class D>
struct FromPanel : D {
  static constexpr bool kFromPanel = true;
  static constexpr int kStep = 2, kDots = 1;
  static constexpr int pair(int) { return 0; }
  template <int>
  __m512i weights(__m512i codes) const {
    return codes;
  }
};

inline constexpr int kFewTokens = 4;

inline int64_t byte_panel_bytes(int64_t max_k) { return round_up(max_k, 4) / 2 * kStepBytes; }

template <class D>
[[gnu::noinline]] void fill_panel(const BlockShape& shape, const char* block, char* panel) {
  const D d;
  const int64_t padded = shape.padded_k(), line_k = shape.line_k();
  for (int64_t begin = 0; begin < padded; begin += line_k, block += shape.line_bytes()) {
    const char* steps = block + shape.line_head();
    const int64_t end = begin + line_k < padded ? begin + line_k : padded;
    for (int64_t k = begin; k < end; k += 4, steps += kStepBytes, panel += 2 * kStepBytes) {
      for (int set = 0; set < 2; ++set) {
        __m512i even, odd;
        d.pairs(_mm512_load_si512(steps + set * 64), even, odd);
        _mm512_store_si512(panel + set * 64, even);
        _mm512_store_si512(panel + kStepBytes + set * 64, odd);
      }
    }
  }
}

template <class D>
void multiply_bytes(const MultiplyArgs& a) {
  const BlockShape shape{D::kFormat, a.w.packing, a.w.k};
  if (a.num_tokens <= kFewTokens && !a.panel_filled) {
    run_exact<D, kFewTokens>(a, shape, nullptr);
    return;
  }
  if (!a.panel_filled) fill_panel<D>(shape, a.w.block, a.panel);
  run_exact<FromPanel<D>, kTileM>(a, shape, a.panel);
}

}  // namespace
}  // namespace ey::cpu
