// SPDX-License-Identifier: Apache-2.0
// Packed experts for the emulated tests: random codes and scales, what they mean in float64, and
// their blocks, written from the text of csrc/blocks.h and not with the packer of the product.
#pragma once

#include <algorithm>

#include "blocks.h"
#include "testing.h"

namespace testing {

using ey::BlockShape;
using ey::Format;
using ey::Packing;
using ey::ScaleType;

struct Matrix {
  size_t rows = 0, k = 0, groups = 0;
  std::vector<double> values;    // [rows, k]
  std::vector<uint16_t> codes;   // [rows, k] bf16 bits, or a code
  std::vector<uint32_t> scales;  // [rows, groups] bits
  std::vector<uint32_t> zeros;   // [rows, groups] bits, or empty
};

inline uint32_t scale_bits(ScaleType type, float value, double* seen) {
  switch (type) {
    case ScaleType::kFp32:
      *seen = value;
      return std::bit_cast<uint32_t>(value);
    case ScaleType::kE8m0: {
      const int exponent = std::clamp(int(std::lround(std::log2(value))), -126, 127);
      *seen = std::ldexp(1.0, exponent);
      return uint32_t(exponent + 127);
    }
    default: {
      uint16_t bits;
      *seen = put(&bits, type == ScaleType::kBf16 ? ey::DType::kBF16 : ey::DType::kF16, 0, value);
      return bits;
    }
  }
}

inline double e4m3(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double v =
      exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(double(mantissa), -9);
  return code & 128 ? -v : v;
}

inline double e2m1(int code) {
  const double values[] = {0, .5, 1, 1.5, 2, 3, 4, 6};
  return code & 8 ? -values[code & 7] : values[code & 7];
}

// Values of about 1 / sqrt(k).
inline Matrix random_matrix(Format format, const Packing& packing, size_t rows, size_t k,
                            std::mt19937_64& random) {
  Matrix m;
  m.rows = rows;
  m.k = k;
  const size_t group = packing.group_size ? size_t(packing.group_size) : k;
  m.groups = (k + group - 1) / group;
  m.values.resize(rows * k);
  m.codes.resize(rows * k);
  std::vector<double> scales(rows * m.groups, 1.0), zeros(rows * m.groups, 0.0);
  std::normal_distribution<float> normal;
  const float size = 1.0f / std::sqrt(float(k));
  const float code_size = format == Format::kInt8   ? 70.0f
                          : format == Format::kFp8  ? 30.0f
                          : format == Format::kInt4 ? 4.6f
                                                    : 3.0f;
  if (packing.scale_type != ScaleType::kNone) {
    m.scales.resize(rows * m.groups);
    if (packing.zeros) m.zeros.resize(rows * m.groups);
    for (size_t i = 0; i < m.scales.size(); ++i) {
      const float scale = size / code_size * std::exp2(normal(random));
      m.scales[i] = scale_bits(packing.scale_type, scale, &scales[i]);
      if (packing.zeros) {
        m.zeros[i] = scale_bits(packing.scale_type, 7.5f + 2.3f * normal(random), &zeros[i]);
      } else if (format == Format::kInt4) {
        zeros[i] = 8;
      }
    }
  }
  for (size_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < k; ++c) {
      const size_t i = r * k + c, s = r * m.groups + c / group;
      double code_value;
      if (format == Format::kBf16) {
        code_value = put(m.codes.data(), ey::DType::kBF16, i, size * normal(random));
      } else {
        int code = int(random() & (format == Format::kInt4 || format == Format::kMxfp4 ? 15 : 255));
        if (format == Format::kFp8 && (code & 127) == 127) code = 0;
        m.codes[i] = uint16_t(code);
        code_value = format == Format::kInt8   ? code - 128
                     : format == Format::kInt4 ? code - zeros[s]
                     : format == Format::kFp8  ? e4m3(code)
                                               : e2m1(code);
      }
      m.values[i] = scales[s] * code_value;
    }
  }
  return m;
}

// A weight of value zero where the matrix has none (with zeros: some weight, of scale 0).
inline uint16_t no_code(Format format) {
  return format == Format::kInt8 ? 128 : format == Format::kInt4 ? 8 : 0;
}

// The blob of `first` (w2), or of `first` and `second` (w13: gate and up).
inline Guarded pack(Format format, const Packing& packing, const Matrix& first,
                    const Matrix* second) {
  const BlockShape shape{format, packing, int64_t(first.k)};
  const size_t rows_of_set = second ? first.rows : first.rows;
  const int64_t blocks =
      second ? ey::w13_blocks(int64_t(first.rows), true) : ey::w2_blocks(int64_t(first.rows));
  Guarded blob(size_t(blocks * shape.block_bytes()), 64);
  std::memset(blob.data(), 0, size_t(blocks * shape.block_bytes()));
  const int64_t step_k = ey::step_k(format);
  for (int64_t b = 0; b < blocks; ++b) {
    char* out = blob.data() + b * shape.block_bytes();
    for (int64_t line = 0; line < shape.num_lines(); ++line) {
      const auto place = [&](int lane, const Matrix** m, size_t* row) {
        *m = second && lane >= 16 ? second : &first;
        *row = second ? size_t(b * 16 + lane % 16) : size_t(b * 32 + lane);
        return *row < rows_of_set;
      };
      const Matrix* m;
      size_t row;
      if (packing.scale_type == ScaleType::kE8m0) {
        for (int half = 0; half < 2; ++half) {
          for (int lane = 0; lane < 32; ++lane) {
            const size_t g = size_t(2 * line + half);
            if (place(lane, &m, &row) && g < m->groups) {
              out[half * 32 + lane] = char(m->scales[row * m->groups + g]);
            }
          }
        }
        out += 64;
      } else if (packing.scale_type != ScaleType::kNone) {
        for (int zeros = 0; zeros <= int(packing.zeros); ++zeros) {
          const size_t size = packing.scale_type == ScaleType::kFp32 ? 4 : 2;
          for (int lane = 0; lane < 32; ++lane) {
            if (!place(lane, &m, &row)) continue;
            const auto& from = zeros ? m->zeros : m->scales;
            std::memcpy(out + size_t(lane) * size, &from[row * m->groups + size_t(line)], size);
          }
          out += 32 * size;
        }
      }
      const int64_t end = std::min((line + 1) * shape.line_k(), shape.padded_k());
      for (int64_t k = line * shape.line_k(); k < end; k += step_k, out += 128) {
        for (int lane = 0; lane < 32; ++lane) {
          const bool here = place(lane, &m, &row);
          uint32_t dword = 0;
          for (int j = 0; j < step_k; ++j) {
            const bool inside = here && size_t(k + j) < m->k;
            const uint32_t code = inside ? m->codes[row * m->k + size_t(k + j)] : no_code(format);
            const int bit = step_k == 2 ? 16 * j : step_k == 4 ? 8 * j : 8 * (j % 4) + j / 4 * 4;
            dword |= code << bit;
          }
          std::memcpy(out + 4 * lane, &dword, 4);
        }
      }
    }
  }
  return blob;
}

}  // namespace testing
