// SPDX-License-Identifier: Apache-2.0
// The loop of every CPU kernel: a tile of R weight rows x M tokens of dot products along k,
// straight from the weights' own rows. A room says how to multiply (V), a format how to load
// weights (W):
//
//   V::X, V::kWidth             type of an activation value; values a vector step takes
//   V::kMaxTokens, V::rows(M)   largest tile, and R for M tokens: R * M accumulators must fit
//   V::zero load_x fma sum sum4 vectors; sum4 adds up four accumulators at once
//   W::kSize load load_tail     bytes of one weight; load_tail reads n < kWidth values, not beyond
//
// Why tiles of dot products and not packed panels: weights stay where they lie (a file, HF's own
// parameter), and each is read from memory once, in address order, whatever the number of tokens.
#pragma once

#include <utility>

#include "row_kernel.h"

namespace ey::cpu {
namespace {

// With more tokens than one tile, rows are cut here so that a tile's activations stay in L1: bytes
// of one of them.
inline constexpr int64_t kChunkBytes = 4096;

// What is fetched meanwhile: rows as far apart as the tile's, a line of each at every `turns`-th
// line of these, from the turn-th on. With several tiles each takes its turn: fetched in a burst,
// lines would wait for one another, and the loads behind them too.
struct Next {
  const char* rows;  // null: nothing
  int turns, turn;
};

template <class V, class W, int R, int M, bool kPrefetch>
[[gnu::noinline]] void tile(const char* w, int64_t w_stride, Next next, const void* const* x_rows,
                            int64_t begin, int64_t end, float* c) {
  using X = typename V::X;
  constexpr int kLine = 64 / W::kSize;  // weights in a cache line
  constexpr int kSteps = kLine > V::kWidth ? kLine / V::kWidth : 1;

  typename V::Acc acc[R][M];
  const X* x[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    x[m] = static_cast<const X*>(x_rows[m]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r][m] = V::zero();
  }

  const auto multiply = [&](int64_t k, auto&& load) __attribute__((always_inline)) {
    typename V::W wr[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) wr[r] = load(w + r * w_stride + k * W::kSize);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto xm = V::load_x(x[m] + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) V::fma(acc[r][m], wr[r], xm);
    }
  };
  const auto whole = [](const char* p) __attribute__((always_inline)) { return W::load(p); };

  int64_t k = begin;
  int wait = next.turn;
  for (; k + kLine <= end; k += kLine) {
    if constexpr (kPrefetch) {
      if (wait == 0) {
        wait = next.turns;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) __builtin_prefetch(next.rows + r * w_stride + k * W::kSize);
      }
      --wait;
    }
#pragma GCC unroll 4
    for (int s = 0; s < kSteps; ++s) multiply(k + s * V::kWidth, whole);
  }
  for (; k + V::kWidth <= end; k += V::kWidth) multiply(k, whole);
  if (k < end) {
    const int n = static_cast<int>(end - k);
    multiply(k, [n](const char* p) __attribute__((always_inline)) { return W::load_tail(p, n); });
  }

#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    float* out = c + m * kBlockRows;
    float sums[R];
    if constexpr (R == 4) {
      V::sum4(acc[0][m], acc[1][m], acc[2][m], acc[3][m], sums);
    } else {
      for (int r = 0; r < R; ++r) sums[r] = V::sum(acc[r][m]);
    }
    for (int r = 0; r < R; ++r) out[r] = begin == 0 ? sums[r] : out[r] + sums[r];
  }
}

using RowsTile = void (*)(const char*, int64_t, Next, const void* const*, int64_t, int64_t, float*);

// Tiles for 1 .. kMaxTokens tokens: [full row group or single row][prefetch][tokens - 1]
template <class V, class W, class Tokens>
struct Tiles;
template <class V, class W, int... M>
struct Tiles<V, W, std::integer_sequence<int, M...>> {
  static constexpr RowsTile table[2][2][sizeof...(M)] = {
      {{tile<V, W, V::rows(M + 1), M + 1, false>...}, {tile<V, W, V::rows(M + 1), M + 1, true>...}},
      {{tile<V, W, 1, M + 1, false>...}, {tile<V, W, 1, M + 1, true>...}},
  };
};

template <class V, class W>
void rows(const RowsArgs& a) {
  using AllTiles = Tiles<V, W, std::make_integer_sequence<int, V::kMaxTokens>>;
  const int tiles = (a.num_tokens + V::kMaxTokens - 1) / V::kMaxTokens;
  const int64_t chunk = tiles == 1 ? a.k : kChunkBytes / int64_t{sizeof(typename V::X)};
  const auto ahead = static_cast<int>(kAhead / (a.k * W::kSize)) + 1;  // rows
  for (int64_t begin = 0; begin < a.k; begin += chunk) {
    const int64_t end = begin + chunk < a.k ? begin + chunk : a.k;
    for (int t = 0; t < tiles; ++t) {
      const int first = a.num_tokens * t / tiles;
      const int count = a.num_tokens * (t + 1) / tiles - first;
      const int group = V::rows(count);
      for (int r = 0; r < a.num_rows;) {
        const bool full = r + group <= a.num_rows;
        const int step = full ? group : 1;
        const char* w = a.w + r * a.w_stride;
        // One tile: memory is the limit, so fetch what comes kAhead bytes later. Several: the block
        // is in cache after the first tile, so they fetch the next one's rows meanwhile.
        Next next = {.rows = nullptr, .turns = tiles, .turn = t};
        const int later = tiles == 1 ? r + (ahead + step - 1) / step * step : a.num_rows + r;
        if (later < a.num_rows) {
          next.rows = a.w + later * a.w_stride;
        } else if (a.next != nullptr) {
          next.rows = a.next + (later - a.num_rows) * a.w_stride;
        }
        AllTiles::table[!full][next.rows != nullptr][count - 1](
            w, a.w_stride, next, a.x + first, begin, end, a.c + first * kBlockRows + r);
        r += step;
      }
    }
  }
}

}  // namespace
}  // namespace ey::cpu
