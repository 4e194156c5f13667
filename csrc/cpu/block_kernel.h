// SPDX-License-Identifier: Apache-2.0
// Kernels of Layout::kBlocks that multiply in fp32, on whatever float vector a room has: the
// readable truth (scalar/), and what runs where there are no bf16 or 8-bit dot products.
//
// A lane is an output row. Codes become fp32 exactly, products are summed in fp32 within a group,
// and the sum is scaled: c = sum_g scale_g * (sum_k w_k x_k - (zero_g - centre) * sum_k x_k), with
// w the code less its format's centre.
//
//   V::kLanes, V::kMaxTokens, V::regs(M) lanes of a vector; tokens of the largest tile; vectors
//   that
//                                        M tokens leave registers for
//   V::load dwords, V::shift/mask ...    see W below
//   W::kPanelFromTokens                  tokens from which a panel of fp32 weights pays; 0: never
//   W::prepare(dwords)                   what is done once for all weights of a step
//   W::value<j>(prepared)                the j-th weight of a step as floats
//   an activation row                    fp32 values, padded to kGroup; then the sums of its groups
//                                        if the weights have zeros
#pragma once

#include <type_traits>
#include <utility>

#include "activation.h"
#include "block_tiles.h"
#include "convert.h"
#include "kernel.h"
#include "probe.h"

namespace ey::cpu {
namespace {

// Zeros are told apart from the format's own zero, which `value` has subtracted already.
constexpr float centre(Format f) { return f == Format::kInt4 ? 8 : f == Format::kInt8 ? 128 : 0; }

inline constexpr int64_t kStretchFp32 = 1024;  // six tokens' activations: 24 KB of an L1

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
  const BlockShape& shape = *s.shape;
  const int64_t group = shape.group(), sums_at = round_up(shape.k, kGroup);
  const ScaleType type = shape.packing.scale_type;
  const float* token[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) token[m] = reinterpret_cast<const float*>(x + m * x_stride);
  if (!s.add) __builtin_memset(c, 0, M * kBlockRows * sizeof(float));

  for (int64_t k = s.k_begin; k < s.k_end;) {
    const int64_t g = k / group, line = k / shape.line_k(), part = g % shape.groups_in_line();
    const int64_t group_end = (g + 1) * group < s.k_end ? (g + 1) * group : s.k_end;
    const int64_t longest = k + kSegmentSteps * W::kStep;
    const int64_t end = longest < group_end ? longest : group_end;
    const char* head = s.block + line * shape.line_bytes();
    const char* steps =
        head + shape.line_head() + (k - line * shape.line_k()) / W::kStep * kStepBytes;
    for (int first = 0; first < kLanes; first += kRegs * V::kLanes) {
      typename V::F acc[kRegs][M];
#pragma GCC unroll 8
      for (int r = 0; r < kRegs; ++r) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[r][m] = V::set(0);
      }
      const char *p = steps + first * 4, *fetch = s.fetch_at(steps), *second = s.second_at(steps);
      for (int64_t at = k; at < end; at += W::kStep, p += kStepBytes) {
        if (first == 0) {
          __builtin_prefetch(fetch);
          __builtin_prefetch(second);
          fetch += s.fetch_step();
          second += s.fetch_step();
        }
        typename V::I codes[kRegs];
#pragma GCC unroll 8
        for (int r = 0; r < kRegs; ++r)
          codes[r] = W::prepare(V::load_dwords(p + r * V::kLanes * 4));
        const auto one = [&](auto j) __attribute__((always_inline)) {
          typename V::F w[kRegs];
#pragma GCC unroll 8
          for (int r = 0; r < kRegs; ++r) w[r] = W::template value<decltype(j)::value>(codes[r]);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            const auto xm = V::set(token[m][at + decltype(j)::value]);
#pragma GCC unroll 8
            for (int r = 0; r < kRegs; ++r) acc[r][m] = V::fma(w[r], xm, acc[r][m]);
          }
        };
        [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
          (one(std::integral_constant<int, J>{}), ...);
        }(std::make_integer_sequence<int, W::kStep>{});
      }
      const bool zeros = shape.packing.zeros && end == group_end;
#pragma GCC unroll 8
      for (int r = 0; r < kRegs; ++r) {
        const int lane = first + r * V::kLanes;
        const auto scale = V::scales(type, head, static_cast<int>(part) * kLanes + lane);
        typename V::F offset = V::set(0);
        if (zeros) {
          offset = V::add(V::scales(type, head + shape.scale_bytes(), lane), V::set(-W::kCentre));
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          float* out = c + m * kBlockRows + lane;
          auto sum = acc[r][m];
          if (zeros) sum = V::fma(offset, V::set(-token[m][sums_at + g]), sum);
          V::store(out, V::fma(sum, scale, V::load(out)));
        }
      }
    }
    k = end;
  }
}

// Many tokens: a stretch of the block becomes fp32 weights once, scaled, in a panel that stays in
// L2 while all tiles pass: [k][kLanes] floats.
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
    for (int lane = 0; lane < kLanes; lane += V::kLanes) {
      const ScaleType type = shape.packing.scale_type;
      const auto scale = V::scales(type, head, static_cast<int>(part) * kLanes + lane);
      auto less = V::set(0);  // (zero - centre) * scale
      if (shape.packing.zeros) {
        const auto zero = V::scales(type, head + shape.scale_bytes(), lane);
        less = V::mul(V::add(V::set(W::kCentre), V::mul(zero, V::set(-1))), scale);
      }
      const char* p = steps + lane * 4;
      float* to = panel + lane;
      for (int64_t at = k; at < stop; at += W::kStep, p += kStepBytes, to += W::kStep * kLanes) {
        const auto codes = W::prepare(V::load_dwords(p));
        [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
          (V::store(to + J * kLanes, V::fma(W::template value<J>(codes), scale, less)), ...);
        }(std::make_integer_sequence<int, W::kStep>{});
      }
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

template <class V, class W>
void multiply_block(const MultiplyArgs& a) {
  constexpr int kMax = V::kMaxTokens;
  const BlockShape shape{W::kFormat, a.w.packing, a.w.k};
  if constexpr (W::kPanelFromTokens > 0) {
    if (a.num_tokens >= W::kPanelFromTokens) {
      multiply_panels<V, W>(a, shape);
      return;
    }
  }
  static constexpr auto table =
      tile_table<Fp32<V, W>::template Tile>(std::make_integer_sequence<int, kMax>{});
  run_tiles<kMax, kStretchFp32>(a, shape, table.of);
}

// The weights of a step, from dwords of codes.
template <class V>
struct Bf16Values {
  static constexpr Format kFormat = Format::kBf16;
  static constexpr int kPanelFromTokens = 0;
  static constexpr int kStep = 2;
  static constexpr float kCentre = 0;
  static typename V::I prepare(typename V::I d) { return d; }
  template <int j>
  static typename V::F value(typename V::I d) {
    return V::as_floats(j == 0 ? V::template shift_left<16>(d) : V::mask(d, 0xFFFF0000u));
  }
};

// Codes of 8 and 4 bits: flipping the highest bit of each makes them signed integers, whose sign an
// arithmetic shift from the top of the dword spreads.
template <class V>
struct Int8Values {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr int kPanelFromTokens = 24;
  static constexpr int kStep = 4;
  static constexpr float kCentre = 128;
  static typename V::I prepare(typename V::I d) { return V::flip(d, 0x80808080u); }
  template <int j>
  static typename V::F value(typename V::I d) {
    return V::to_floats(V::template shift_right_signed<24>(V::template shift_left<24 - 8 * j>(d)));
  }
};

// Where the j-th 4-bit code of a step begins in its dword (blocks.h).
constexpr int nibble_at(int j) { return j % 4 * 8 + j / 4 * 4; }

template <class V>
struct Int4Values {
  static constexpr Format kFormat = Format::kInt4;
  static constexpr int kPanelFromTokens = 24;
  static constexpr int kStep = 8;
  static constexpr float kCentre = 8;
  static typename V::I prepare(typename V::I d) { return V::flip(d, 0x88888888u); }
  template <int j>
  static typename V::F value(typename V::I d) {
    return V::to_floats(
        V::template shift_right_signed<28>(V::template shift_left<28 - nibble_at(j)>(d)));
  }
};

// e2m1: the value of a magnitude 0 .. 7 is looked up, the sign put in.
template <class V>
struct Mxfp4Values {
  static constexpr Format kFormat = Format::kMxfp4;
  static constexpr int kPanelFromTokens = 18;
  static constexpr int kStep = 8;
  static constexpr float kCentre = 0;
  static typename V::I prepare(typename V::I d) { return d; }
  template <int j>
  static typename V::F value(typename V::I d) {
    constexpr int kAt = nibble_at(j);
    const auto sign = V::mask(V::template shift_left<28 - kAt>(d), 0x80000000u);
    return V::sign_of(sign, V::e2m1(V::template shift_right<kAt>(d)));
  }
};

// Magnitudes of e2m1, by the low three bits of each lane (those above do not count).
alignas(64) inline constexpr float kE2m1Magnitudes[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6,
                                                          0, .5f, 1, 1.5f, 2, 3, 4, 6};

// e4m3, bias 7, no infinity, NaN at 0x7F: likewise; e = 0 means m / 8 * 2^-6.
template <class V>
struct Fp8Values {
  static constexpr Format kFormat = Format::kFp8;
  static constexpr int kPanelFromTokens = 18;
  static constexpr int kStep = 4;
  static constexpr float kCentre = 0;
  static typename V::I prepare(typename V::I d) { return d; }
  template <int j>
  static typename V::F value(typename V::I d) {
    const auto byte = V::mask(V::template shift_right<8 * j>(d), 0xFF);
    const auto magnitude = V::mask(byte, 0x7F);
    const auto sign = V::template shift_left<24>(V::mask(byte, 0x80));
    const auto number = V::as_floats(V::add_int(V::template shift_left<20>(magnitude), 120u << 23));
    // e = 0 made 2^-7 * (1 + m / 8); its value is 2^-6 * m / 8
    const auto small = V::fma(number, V::set(2), V::set(-0x1p-6f));
    return V::sign_of(sign,
                      V::nan_at(magnitude, 0x7F, V::select_small(magnitude, 8, small, number)));
  }
};

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
          .panel_from_tokens = W::kPanelFromTokens,
          .panel_bytes = W::kPanelFromTokens > 0 ? fp32_panel_bytes : nullptr,
          .multiply = multiply_block<V, W>,
          .activate = activate<Floats>,
          .combine = combine<Floats>,
          .store_row = store_row_fp32,
          .peak = peak<Vec, Vec::kChains>,
          .read = read_lines<Vec, kVectorsInLine>};
}

}  // namespace
}  // namespace ey::cpu
