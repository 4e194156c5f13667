// SPDX-License-Identifier: Apache-2.0
// Packed weights in fp32 for many tokens: expanded once for all of them. A stretch of the block
// becomes a panel [k][kLanes] of scaled floats that stays in L2 while all tiles pass; a tile then
// is nothing but loads and multiply-adds, as many sums as block_kernel.h's.
#pragma once

#include <type_traits>
#include <utility>

#include "block_tiles.h"
#include "fp32_values.h"
#include "kernel.h"

namespace ey::cpu {
namespace {

inline constexpr int64_t kStretchFp32 = 1024;  // six tokens' activations: 24 KB of an L1

inline constexpr int64_t kPanelBytes = kStretchFp32 * kLanes * sizeof(float);
inline int64_t fp32_panel_bytes(int64_t) { return kPanelBytes; }

template <class V, class W>
void fill_panel(const BlockShape& shape, const char* block, int64_t k, int64_t end, float* panel) {
  const int64_t group = shape.group();
  while (k < end) {
    const int64_t g = k / group, line = k / shape.line_k(), part = g % shape.groups_in_line();
    const int64_t stop = (g + 1) * group < end ? (g + 1) * group : end;
    const char* head = block + line * shape.line_bytes();
    const char* steps =
        head + shape.line_head() + (k - line * shape.line_k()) / W::kStep * kStepBytes;
    alignas(64) float scales[kLanes], offsets[kLanes];
    group_scales<V, W>(shape, head, static_cast<int>(part), scales, offsets);
    for (int lane = 0; lane < kLanes; lane += V::kLanes) {
      const auto scale = V::load(scales + lane);
      const auto less = V::mul(V::load(offsets + lane), V::mul(scale, V::set(-1)));
      const char* p = steps + lane * 4;
      float* to = panel + lane;
      Nans<V, W> nans;
      for (int64_t at = k; at < stop; at += W::kStep, p += kStepBytes, to += W::kStep * kLanes) {
        const auto dwords = V::load_dwords(p);
        nans.look_at(dwords);
        const auto codes = W::prepare(dwords);
        [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
          const auto store = [&](auto j) __attribute__((always_inline)) {
            auto w = W::template value<decltype(j)::value>(codes);
            if constexpr (W::kUnit != 1) w = V::mul(w, V::set(W::kUnit));
            V::store(to + j * kLanes, V::fma(w, scale, less));
          };
          (store(std::integral_constant<int, J>{}), ...);
        }(std::make_integer_sequence<int, W::kStep>{});
      }
      V::store(panel + lane, nans.put_into(V::load(panel + lane)));  // one is as good as all
    }
    panel += (stop - k) * kLanes;
    k = stop;
  }
}

// c[m] (+)= sum over k of panel[k] * x[m][k], a stretch of k; next: lines to fetch meanwhile, or
// null
template <class V, int M>
[[gnu::noinline]] void panel_tile(const float* panel, int64_t k, const char* x, int64_t x_stride,
                                  const char* next, bool add, float* c) {
  constexpr int kRegs = V::regs(M);
  const float* token[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) token[m] = reinterpret_cast<const float*>(x + m * x_stride);
  for (int first = 0; first < kLanes; first += kRegs * V::kLanes) {
    typename V::F acc[kRegs][M];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int r = 0; r < kRegs; ++r) {
        acc[r][m] = add ? V::load(c + m * kBlockRows + first + r * V::kLanes) : V::set(0);
      }
    }
    const float* p = panel + first;
    for (int64_t at = 0; at < k; ++at, p += kLanes) {
      if (next != nullptr && first == 0 && at % 2 == 0) __builtin_prefetch(next + at * 32);
      typename V::F w[kRegs];
#pragma GCC unroll 4
      for (int r = 0; r < kRegs; ++r) w[r] = V::load(p + r * V::kLanes);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const auto xm = V::set(token[m][at]);
#pragma GCC unroll 4
        for (int r = 0; r < kRegs; ++r) acc[r][m] = V::fma(w[r], xm, acc[r][m]);
      }
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int r = 0; r < kRegs; ++r) {
        V::store(c + m * kBlockRows + first + r * V::kLanes, acc[r][m]);
      }
    }
  }
}

template <class V, int... M>
constexpr auto panel_tiles(std::integer_sequence<int, M...>) {
  struct Table {
    decltype(&panel_tile<V, 1>) of[sizeof...(M)];
  };
  return Table{{panel_tile<V, M + 1>...}};
}

template <class V, class W>
void multiply_panels(const MultiplyArgs& a, const BlockShape& shape) {
  constexpr int kMax = V::kMaxTokens;
  static constexpr auto tiles = panel_tiles<V>(std::make_integer_sequence<int, kMax>{});
  const int count = (a.num_tokens + kMax - 1) / kMax;
  const auto* x = static_cast<const char*>(a.x[0]);
  const int64_t x_stride = static_cast<const char*>(a.x[1]) - x;
  auto* panel = reinterpret_cast<float*>(a.panel);
  const int64_t padded = shape.padded_k();
  const int64_t unit = shape.line_k() < padded ? shape.line_k() : kGroup;
  const int64_t stretch = kStretchFp32 / unit * unit;
  for (int64_t k = 0; k < padded; k += stretch) {
    const int64_t end = k + stretch < padded ? k + stretch : padded;
    fill_panel<V, W>(shape, a.w.block, k, end, panel);
    for (int t = 0; t < count; ++t) {  // tiles of nearly equal size: 13 tokens are 5 + 4 + 4
      const int first = a.num_tokens * t / count;
      const int tokens = a.num_tokens * (t + 1) / count - first;
      const char* next = nullptr;  // the first tiles of a stretch fetch the weights of the next
      const int64_t at = t * (end - k) * 32;
      if (end < padded) {
        const int64_t line = end / shape.line_k();
        const char* from = a.w.block + line * shape.line_bytes() +
                           (end - line * shape.line_k()) / W::kStep * kStepBytes;
        if (at < stretch / W::kStep * kStepBytes) next = from + at;
      } else if (a.last && a.w.next_block != nullptr) {
        if (at < stretch / W::kStep * kStepBytes) next = a.w.next_block + at;
      }
      tiles.of[tokens - 1](panel, end - k, x + first * x_stride + k * sizeof(float), x_stride, next,
                           k > 0, a.c + first * kBlockRows);
    }
  }
}

}  // namespace
}  // namespace ey::cpu
