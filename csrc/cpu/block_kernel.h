// SPDX-License-Identifier: Apache-2.0
// Kernels of Layout::kBlocks that multiply in fp32, on whatever float vector a room has: the
// readable truth (scalar/), and what runs where there are no bf16 or 8-bit dot products.
//
// A lane is an output row. Codes become fp32 exactly, products are summed in fp32 within a group,
// and the sum is scaled: c = sum_g scale_g * (sum_k w_k x_k - (zero_g - centre) * sum_k x_k), with
// w the code less its format's centre.
//
//   V::kLanes, V::kRegs, V::kMaxTokens   lanes of a vector, vectors and tokens of a tile
//   V::load dwords, V::shift/mask ...    see W below
//   W::value<j>(dwords)                  the j-th weight of a step as floats
//   an activation row                    fp32 values, padded to kGroup; then the sums of its groups
//                                        if the weights have zeros
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "activation.h"
#include "convert.h"
#include "kernel.h"
#include "probe.h"

namespace ey::cpu {
namespace {

// Zeros are told apart from the format's own zero, which `value` has subtracted already.
constexpr float centre(Format f) { return f == Format::kInt4 ? 8 : f == Format::kInt8 ? 128 : 0; }

// n scales of a line -> fp32
inline void scales_to_fp32(ScaleType type, const char* from, int n, float* to) {
  for (int i = 0; i < n; ++i) {
    uint16_t half;
    switch (type) {
      case ScaleType::kNone:
        to[i] = 1;
        break;
      case ScaleType::kFp32:
        __builtin_memcpy(to + i, from + i * 4, 4);
        break;
      case ScaleType::kE8m0: {
        const auto e = static_cast<uint8_t>(from[i]);
        to[i] = bits<float>(e == 0 ? 0x00400000u : uint32_t{e} << 23);  // 2^-127 is subnormal
        break;
      }
      case ScaleType::kBf16:
        __builtin_memcpy(&half, from + i * 2, 2);
        to[i] = from_bf16(half);
        break;
      case ScaleType::kFp16:
        __builtin_memcpy(&half, from + i * 2, 2);
        to[i] = from_fp16(half);
        break;
    }
  }
}

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

// Mode::kFast where there are no 8-bit dot products: values rounded as fast_rows.h says, and kept
// in fp32.
inline void rounded_load_group(const LoadGroupArgs& a) {
  float values[kGroup], largest = 0;
  bool finite = true;
  for (int i = 0; i < a.n; ++i) {
    const float magnitude = std::fabs(a.from[i]);
    finite = finite && magnitude <= std::numeric_limits<float>::max();
    largest = magnitude > largest ? magnitude : largest;
  }
  // What is not finite has no integer: a scale of NaN brings it to the token's output.
  const float scale = finite ? largest / 127 : std::numeric_limits<float>::quiet_NaN();
  const float inverse = largest > 0 && finite ? 127 / largest : 0;
  for (int i = 0; i < a.n; ++i) {
    values[i] = (finite ? std::nearbyint(a.from[i] * inverse) : 1) * scale;
  }
  LoadGroupArgs rounded = a;
  rounded.from = values;
  fp32_load_group(rounded);
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

// kRegs vectors of lanes, beginning at lane `first`, for M tokens.
template <class V, class W, int M>
void block_tile(const BlockShape& shape, const char* block, int first, const void* const* x_rows,
                float* c) {
  typename V::F total[V::kRegs][M];
  const float* x[M];
  for (int m = 0; m < M; ++m) {
    x[m] = static_cast<const float*>(x_rows[m]);
    for (int r = 0; r < V::kRegs; ++r) total[r][m] = V::set(0);
  }
  const int64_t end = shape.padded_k(), group = shape.group();
  const float* sums_of_groups[M];
  for (int m = 0; m < M; ++m) sums_of_groups[m] = x[m] + round_up(shape.k, kGroup);
  const char* p = block;
  for (int64_t begin = 0, g = 0; begin < end; begin += group, ++g) {
    const int64_t part = g % shape.groups_in_line();
    if (part == 0 && g > 0) p += shape.line_bytes();
    float scale[kLanes], zero[kLanes];
    scales_to_fp32(shape.packing.scale_type, p + part * kLanes, kLanes, scale);
    if (shape.packing.zeros) {
      scales_to_fp32(shape.packing.scale_type, p + shape.scale_bytes(), kLanes, zero);
    }
    const int64_t stop = begin + group < end ? begin + group : end;
    const char* steps = p + shape.line_head() + part * (group / W::kStep) * kStepBytes;
    typename V::F acc[V::kRegs][M];
    for (int m = 0; m < M; ++m) {
      for (int r = 0; r < V::kRegs; ++r) acc[r][m] = V::set(0);
    }
    for (int64_t k = begin; k < stop; k += W::kStep, steps += kStepBytes) {
      typename V::I dwords[V::kRegs];
      for (int r = 0; r < V::kRegs; ++r) {
        dwords[r] = V::load_dwords(steps + (first + r * V::kLanes) * 4);
      }
      const auto one = [&](auto j) __attribute__((always_inline)) {
        for (int r = 0; r < V::kRegs; ++r) {
          const auto w = W::template value<decltype(j)::value>(dwords[r]);
          for (int m = 0; m < M; ++m) {
            acc[r][m] = V::fma(w, V::set(x[m][k + decltype(j)::value]), acc[r][m]);
          }
        }
      };
      [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
        (one(std::integral_constant<int, J>{}), ...);
      }(std::make_integer_sequence<int, W::kStep>{});
    }
    for (int r = 0; r < V::kRegs; ++r) {
      const auto s = V::load(scale + first + r * V::kLanes);
      for (int m = 0; m < M; ++m) {
        if (shape.packing.zeros) {
          const auto offset = V::add(V::load(zero + first + r * V::kLanes), V::set(-W::kCentre));
          acc[r][m] = V::fma(offset, V::set(-sums_of_groups[m][g]), acc[r][m]);
        }
        total[r][m] = V::fma(acc[r][m], s, total[r][m]);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < V::kRegs; ++r) {
      V::store(c + m * kBlockRows + first + r * V::kLanes, total[r][m]);
    }
  }
}

template <class V, class W>
void multiply_block(const MultiplyArgs& a) {
  const BlockShape shape{W::kFormat, a.w.packing, a.w.k};
  constexpr int kMax = V::kMaxTokens;
  for (int t = 0; t < a.num_tokens;) {
    const int m = a.num_tokens - t < kMax ? 1 : kMax;
    for (int first = 0; first < kLanes; first += V::kRegs * V::kLanes) {
      (m == kMax ? block_tile<V, W, kMax> : block_tile<V, W, 1>)(shape, a.w.block, first, a.x + t,
                                                                 a.c + t * kBlockRows);
    }
    t += m;
  }
}

// The weights of a step, from dwords of codes.
template <class V>
struct Bf16Values {
  static constexpr Format kFormat = Format::kBf16;
  static constexpr int kStep = 2;
  static constexpr float kCentre = 0;
  template <int j>
  static typename V::F value(typename V::I d) {
    return V::as_floats(j == 0 ? V::template shift_left<16>(d) : V::mask(d, 0xFFFF0000u));
  }
};

template <class V>
struct Int8Values {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr int kStep = 4;
  static constexpr float kCentre = 128;
  template <int j>
  static typename V::F value(typename V::I d) {
    return V::add(V::to_floats(V::mask(V::template shift_right<8 * j>(d), 0xFF)), V::set(-128));
  }
};

template <class V, int j>
typename V::I nibble(typename V::I d) {
  return V::mask(V::template shift_right<j % 4 * 8 + j / 4 * 4>(d), 0xF);
}

template <class V>
struct Int4Values {
  static constexpr Format kFormat = Format::kInt4;
  static constexpr int kStep = 8;
  static constexpr float kCentre = 8;
  template <int j>
  static typename V::F value(typename V::I d) {
    return V::add(V::to_floats(nibble<V, j>(d)), V::set(-8));
  }
};

// e2m1, magnitudes 0 .5 1 1.5 2 3 4 6: its exponent and mantissa bits moved to where fp32 has them
// are the value times 2^-126 (also for the subnormal .5), so a multiplication sets it right.
// Written with a normal number instead, because a program may have told the CPU to take subnormals
// for zero: 1.5 .. 6 and 1 have fp32 exponent e + 126; 0 and .5 come from e = 0 by (1 + m / 2) - 1.
template <class V>
struct Mxfp4Values {
  static constexpr Format kFormat = Format::kMxfp4;
  static constexpr int kStep = 8;
  static constexpr float kCentre = 0;
  template <int j>
  static typename V::F value(typename V::I d) {
    const auto code = nibble<V, j>(d);
    const auto magnitude = V::mask(code, 7);
    const auto sign = V::template shift_left<28>(V::mask(code, 8));
    const auto number = V::as_floats(V::add_int(V::template shift_left<22>(magnitude), 126u << 23));
    // e = 0 made 0.5 * (1 + m / 2); its value is 0.5 * m
    const auto small = V::fma(number, V::set(2), V::set(-1));
    return V::sign_of(sign, V::select_small(magnitude, 2, small, number));
  }
};

// e4m3, bias 7, no infinity, NaN at 0x7F: likewise; e = 0 means m / 8 * 2^-6.
template <class V>
struct Fp8Values {
  static constexpr Format kFormat = Format::kFp8;
  static constexpr int kStep = 4;
  static constexpr float kCentre = 0;
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
          .panel_from_tokens = 0,
          .panel_bytes = nullptr,
          .multiply = multiply_block<V, W>,
          .activate = activate<Floats>,
          .combine = combine<Floats>,
          .store_row = store_row_fp32,
          .peak = peak<Vec, Vec::kChains>,
          .read = read_lines<Vec, kVectorsInLine>};
}

// The same kernel with activations rounded to 8 bits.
constexpr Kernel rounded(Kernel kernel) {
  kernel.mode = Mode::kFast;
  kernel.load_row = load_row_by_groups<rounded_load_group>;
  kernel.load_group = rounded_load_group;
  return kernel;
}

}  // namespace
}  // namespace ey::cpu
