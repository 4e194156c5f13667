// SPDX-License-Identifier: Apache-2.0
// Kernels of Layout::kBlocks that multiply in fp32, on whatever float vector a room has: the
// readable truth (scalar/), and what runs where there are no bf16 or 8-bit dot products.
//
// A lane is an output row. Codes become fp32 exactly, products are summed in fp32 within a group,
// and the sum is scaled: c = sum_g scale_g * (sum_k w_k x_k - (zero_g - centre) * sum_k x_k), with
// w the code less its format's centre.
//
//   V::kLanes, V::kMaxTokens   lanes of a vector; tokens of the largest tile
//   V::regs(M)                 vectors that M tokens leave registers for: see the room's lanes.h
//   V::accumulate(sum, a, b)   sum += a * b, in the order that is written
//   W, in fp32_values.h        makes floats of a step's codes
//   an activation row          fp32 values, padded to kGroup; then the sums of its groups if the
//                              weights have zeros
//
// For each k of a step and M tokens: 2 instructions for each vector of weights (fp8: 4), M loads
// that spread an activation over the lanes, M multiply-adds for each vector.
#pragma once

#include <type_traits>
#include <utility>

#include "activation.h"
#include "block_tiles.h"
#include "convert.h"
#include "fp32_panel.h"
#include "fp32_values.h"
#include "kernel.h"
#include "probe.h"
#include "subnormals.h"

namespace ey::cpu {
namespace {

inline int64_t fp32_row_bytes(const RowShape& s) {
  const int64_t k = round_up(s.k, kGroup);
  const int64_t sums = s.packing.zeros ? round_up(k / s.packing.group_size, 16) : 0;
  return (k + sums) * sizeof(float) + 64;
}

inline void fp32_load_group(const LoadGroupArgs& a) {
  auto* row = reinterpret_cast<float*>(a.row);
  float* to = row + a.k_begin;
  __builtin_memcpy(to, a.from, a.n * sizeof(float));
  for (int i = a.n; i < kGroup; ++i) to[i] = 0;
  if (!a.shape.packing.zeros) return;
  const int64_t group = a.shape.packing.group_size;
  float* sums = row + round_up(a.shape.k, kGroup) + a.k_begin / group;
  for (int64_t g = 0; g < kGroup / group; ++g) {
    float sum = 0;
    for (int64_t i = 0; i < group; ++i) sum += to[g * group + i];
    sums[g] = sum;
  }
}

// Hidden states of any dtype, a group at a time.
template <void (*load_group)(const LoadGroupArgs&)>
void load_row_by_groups(const LoadRowArgs& a) {
  const int64_t size = size_of(a.dtype);
  for (int64_t k = 0; k < a.shape.k; k += kGroup) {
    float values[kGroup];
    const int64_t n = a.shape.k - k < kGroup ? a.shape.k - k : kGroup;
    load_row_fp32(static_cast<const char*>(a.from) + k * size, a.dtype, n, n, values);
    load_group(
        {.from = values, .n = static_cast<int>(n), .k_begin = k, .shape = a.shape, .row = a.row});
  }
}

// M tokens x 32 lanes, V::regs(M) vectors of lanes at a time.
//
// A segment is at most kSegmentSteps steps: the other lanes find its cache lines in L1. Its sums
// stay in registers; scaled, they are added to c, which is in L1 too.
inline constexpr int64_t kSegmentSteps = 32;

template <class V, class W>
struct Fp32 {
  template <int M>
  struct Tile {
    [[gnu::noinline]] static void run(const Stretch& s, const char* x, int64_t x_stride, float* c);
  };
};

template <class V, class W>
template <int M>
void Fp32<V, W>::Tile<M>::run(const Stretch& s, const char* x, int64_t x_stride, float* c) {
  constexpr int kRegs = V::regs(M);
  using I = typename V::I;
  const BlockShape& shape = *s.shape;
  const int64_t group = shape.group();
  const int groups_in_line = static_cast<int>(shape.groups_in_line());
  const bool zeros = shape.packing.zeros;
  const int64_t line = s.k_begin / shape.line_k(), first_group = s.k_begin / group;
  const char* head = s.block + line * shape.line_bytes();
  const char* steps =
      head + shape.line_head() + (s.k_begin - line * shape.line_k()) / W::kStep * kStepBytes;
  int part = static_cast<int>(first_group - line * groups_in_line);  // the group's number in it
  int64_t group_end = (first_group + 1) * group;
  int64_t sum_at = round_up(shape.k, kGroup) + first_group;  // of a group's activations
  const float* token[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) token[m] = reinterpret_cast<const float*>(x + m * x_stride);
  if (!s.add) __builtin_memset(c, 0, M * kBlockRows * sizeof(float));
  alignas(64) float scale[kLanes], offset[kLanes];  // offset: zero - centre
  group_scales<V, W>(shape, head, part, scale, offset);

  for (int64_t k = s.k_begin; k < s.k_end;) {
    const int64_t stop = group_end < s.k_end ? group_end : s.k_end;
    const int64_t longest = k + kSegmentSteps * W::kStep;
    const int64_t end = longest < stop ? longest : stop;
    for (int first = 0; first < kLanes; first += kRegs * V::kLanes) {
      typename V::F acc[kRegs][M];
#pragma GCC unroll 8
      for (int r = 0; r < kRegs; ++r) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[r][m] = V::set(0);
      }
      Nans<V, W> nans[kRegs];
      const char *p = steps + first * 4, *fetch = s.fetch_at(steps), *second = s.second_at(steps);
      for (int64_t at = k; at < end; at += W::kStep, p += kStepBytes) {
        if (first == 0) {
          __builtin_prefetch(fetch);
          __builtin_prefetch(second);
          fetch += s.fetch_step();
          second += s.fetch_step();
        }
        decltype(W::prepare(I())) codes[kRegs];
#pragma GCC unroll 8
        for (int r = 0; r < kRegs; ++r) {
          const I dwords = V::load_dwords(p + r * V::kLanes * 4);
          nans[r].look_at(dwords);
          codes[r] = W::prepare(dwords);
        }
        const auto one = [&](auto j) __attribute__((always_inline)) {
          typename V::F w[kRegs];
#pragma GCC unroll 8
          for (int r = 0; r < kRegs; ++r) w[r] = W::template value<decltype(j)::value>(codes[r]);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            auto xm = V::set(token[m][at + decltype(j)::value]);
            V::in_order(xm);
#pragma GCC unroll 8
            for (int r = 0; r < kRegs; ++r) V::accumulate(acc[r][m], w[r], xm);
          }
        };
        [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
          (one(std::integral_constant<int, J>{}), ...);
        }(std::make_integer_sequence<int, W::kStep>{});
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRegs; ++r) {
        const int lane = first + r * V::kLanes;
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          float* out = c + m * kBlockRows + lane;
          auto sum = nans[r].put_into(acc[r][m]);
          if constexpr (W::kUnit != 1) sum = V::mul(sum, V::set(W::kUnit));
          if (zeros && end == stop) {
            sum = V::fma(V::load(offset + lane), V::set(-token[m][sum_at]), sum);
          }
          V::store(out, V::fma(sum, V::load(scale + lane), V::load(out)));
        }
      }
    }
    steps += (end - k) / W::kStep * kStepBytes;
    k = end;
    if (k == group_end && k < s.k_end) {
      group_end += group;
      ++sum_at;
      if (++part == groups_in_line) {
        part = 0;
        head = steps;
        steps += shape.line_head();
      }
      group_scales<V, W>(shape, head, part, scale, offset);
    }
  }
}

template <class V, class W>
void multiply_any(const MultiplyArgs& a) {
  constexpr int kMax = V::kMaxTokens;
  const BlockShape shape{W::kFormat, a.w.packing, a.w.k};
  if constexpr (W::kPanelFromTiles > 0) {
    if (a.num_tokens >= W::kPanelFromTiles * kMax) {
      multiply_panels<V, W>(a, shape);
      return;
    }
  }
  static constexpr auto table =
      tile_table<Fp32<V, W>::template Tile>(std::make_integer_sequence<int, kMax>{});
  run_tiles<kMax, kStretchFp32>(a, shape, table.of);
}

template <class V, class W>
void multiply_block(const MultiplyArgs& a) {
  [[maybe_unused]] unsigned kept = 0;
  if constexpr (W::kSubnormal) kept = keep_subnormals();
  multiply_any<V, W>(a);
  if constexpr (W::kSubnormal) restore_subnormals(kept);
}

template <class V, class Floats, class W, class Vec>
constexpr Kernel block_kernel(const char* isa, uint32_t needs, int rank) {
  constexpr int kVectorsInLine = 64 / (V::kLanes * sizeof(float));
  return {.isa = isa,
          .format = W::kFormat,
          .layout = Layout::kBlocks,
          .mode = Mode::kExact,
          .needs = needs,
          .rank = rank,
          .bf16_inputs = false,
          .row_bytes = fp32_row_bytes,
          .load_row = load_row_by_groups<fp32_load_group>,
          .load_group = fp32_load_group,
          .h_size = sizeof(float),
          .panel_from_tokens = W::kPanelFromTiles * V::kMaxTokens,
          .panel_bytes = W::kPanelFromTiles > 0 ? fp32_panel_bytes : nullptr,
          .multiply = multiply_block<V, W>,
          .activate = activate<Floats>,
          .combine = combine<Floats>,
          .store_row = store_row_fp32,
          .peak = peak<Vec, Vec::kChains>,
          .read = read_lines<Vec, kVectorsInLine>};
}

}  // namespace
}  // namespace ey::cpu
