// SPDX-License-Identifier: Apache-2.0
// Mode::kFast in plain C++: the readable truth of 8-bit activations.
//
//   c = sum over groups of activations of scale_x * sum over groups of weights inside of
//       scale_w * (sum code * q - centre * sum q - (zero - centre) * sum q)
// with integer sums exact. mxfp4 codes count as twice their value, plus 12: integers again.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../fast_rows.h"
#include "lanes.h"

namespace ey::cpu {
namespace {

// Unsigned integer of a code, what it stands for at zero, and how many times too large it is.
struct Int8Codes {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr int kStep = 4, kCentre = 128;
  static constexpr float kUnit = 1;
  static int code(uint32_t dword, int j) { return dword >> 8 * j & 0xFF; }
};
struct Int4Codes {
  static constexpr Format kFormat = Format::kInt4;
  static constexpr int kStep = 8, kCentre = 8;
  static constexpr float kUnit = 1;
  static int code(uint32_t dword, int j) { return dword >> (j % 4 * 8 + j / 4 * 4) & 0xF; }
};
struct Mxfp4Codes {
  static constexpr Format kFormat = Format::kMxfp4;
  static constexpr int kStep = 8, kCentre = 12;
  static constexpr float kUnit = 0.5f;
  static int code(uint32_t dword, int j) {
    constexpr int twice[] = {0, 1, 2, 3, 4, 6, 8, 12};
    const int bits = Int4Codes::code(dword, j);
    return kCentre + (bits & 8 ? -twice[bits & 7] : twice[bits & 7]);
  }
};

template <class W>
void fast_load_group(const LoadGroupArgs& a) {
  const FastRow row(a.shape.packing);
  float largest = 0;
  bool finite = true;
  for (int i = 0; i < a.n; ++i) {
    finite = finite && std::isfinite(a.from[i]);
    largest = std::fmax(largest, std::fabs(a.from[i]));
  }
  // What is not finite has no integer: a scale of NaN brings it to the token's output.
  if (!finite) largest = NAN;
  const float inverse = largest > 0 ? 127 / largest : 0, scale = largest / 127;
  for (int64_t begin = 0; begin < kGroup; begin += row.values) {
    char* to = a.row + row.at(a.k_begin + begin);
    int32_t sum = 0;
    for (int64_t j = 0; j < row.values; ++j) {
      const int64_t i = begin + j;
      const auto q =
          static_cast<int8_t>(i < a.n && finite ? std::nearbyint(a.from[i] * inverse) : 0);
      to[FastRow::kCodes + j] = static_cast<char>(q);
      sum += q;
    }
    const int32_t start = -W::kCentre * sum;
    std::memcpy(to + FastRow::kScale, &scale, sizeof scale);
    std::memcpy(to + FastRow::kStart, &start, sizeof start);
  }
}

template <class W>
float fast_dot(const BlockShape& shape, const char* block, int lane, const char* x) {
  const FastRow row(shape.packing);
  float total = 0;
  const int64_t padded = shape.padded_k(), group = shape.group();
  for (int64_t k = 0; k < padded;) {
    const int64_t line = k / shape.line_k(), part = k % shape.line_k() / group;
    const char* head = block + line * shape.line_bytes();
    const ScaleType type = shape.packing.scale_type;
    const float scale = scale_at(type, head, part * kLanes + lane);
    const float zero =
        shape.packing.zeros ? scale_at(type, head + shape.scale_bytes(), lane) : W::kCentre;
    const char* record = x + row.at(k);
    float x_scale;
    int32_t start;
    std::memcpy(&x_scale, record + FastRow::kScale, sizeof x_scale);
    std::memcpy(&start, record + FastRow::kStart, sizeof start);
    const auto* q = reinterpret_cast<const int8_t*>(record + FastRow::kCodes);
    const int64_t begin = k, end = std::min(k + row.values, padded);
    int64_t dot = start;
    for (; k < end; k += W::kStep) {
      const char* step =
          head + shape.line_head() + (k - line * shape.line_k()) / W::kStep * kStepBytes;
      const uint32_t dword = Lanes::load_dwords(step + lane * 4);
      for (int j = 0; j < W::kStep; ++j) dot += W::code(dword, j) * q[k - begin + j];
    }
    const float sum = static_cast<float>(-start / W::kCentre);
    total += x_scale * scale * W::kUnit * (static_cast<float>(dot) - (zero - W::kCentre) * sum);
  }
  return total;
}

template <class W>
void fast_multiply(const MultiplyArgs& a) {
  const BlockShape shape{W::kFormat, a.w.packing, a.w.k};
  for (int t = 0; t < a.num_tokens; ++t) {
    for (int lane = 0; lane < kLanes; ++lane) {
      a.c[t * kBlockRows + lane] =
          fast_dot<W>(shape, a.w.block, lane, static_cast<const char*>(a.x[t]));
    }
  }
}

template <class W>
constexpr Kernel fast_kernel() {
  Kernel k = packed_kernel<Int4Values>();
  k.format = W::kFormat;
  k.mode = Mode::kFast;
  k.row_bytes = fast_row_bytes<>;
  k.load_row = load_row_by_groups<fast_load_group<W>>;
  k.load_group = fast_load_group<W>;
  k.multiply = fast_multiply<W>;
  return k;
}

}  // namespace
}  // namespace ey::cpu
