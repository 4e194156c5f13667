// SPDX-License-Identifier: Apache-2.0
#include "packing.h"

#include <algorithm>
#include <cstring>

namespace ey {
namespace {

// The code of the value zero: for missing rows and beyond k.
uint8_t zero_code(Format f) { return f == Format::kInt8 ? 128 : f == Format::kInt4 ? 8 : 0; }

// The dword of one row and step, from up to step_k codes; missing ones are `zero`.
uint32_t dword_of(Format format, const char* codes, int64_t available, uint8_t zero) {
  uint8_t bytes[8];
  uint32_t out;
  if (step_k(format) == 4 && available >= 4) {
    std::memcpy(&out, codes, sizeof out);
    return out;
  }
  if (step_k(format) == 8 && available >= 8) {
    uint64_t nibbles;
    std::memcpy(&nibbles, codes, sizeof nibbles);
    return static_cast<uint32_t>(nibbles | nibbles >> 28);
  }
  if (format == Format::kBf16) {
    std::memset(bytes, 0, sizeof bytes);
    std::memcpy(bytes, codes, std::min<int64_t>(available, 2) * 2);
    std::memcpy(&out, bytes, sizeof out);
    return out;
  }
  std::memset(bytes, zero, sizeof bytes);
  std::memcpy(bytes, codes, std::min<int64_t>(available, step_k(format)));
  std::memcpy(&out, bytes, sizeof out);
  if (step_k(format) == 4) return out;
  uint32_t high;
  std::memcpy(&high, bytes + 4, sizeof high);
  return out | high << 4;
}

void pack_steps(const BlockShape& shape, const LaneRows& set, int64_t begin, int64_t end,
                char* out) {
  const int k_step = step_k(shape.format);
  const int64_t size = shape.format == Format::kBf16 ? 2 : 1;
  const uint8_t zero = zero_code(shape.format);
  // a tile of steps stays in the first cache while all rows write their dwords into it
  const int64_t tile = 64 * k_step;
  for (int64_t from = begin; from < end; from += tile) {
    const int64_t to = std::min(from + tile, end);
    for (int row = 0; row < kLaneSet; ++row) {
      const char* codes = set.codes + row * set.code_stride;
      const int64_t all = row < set.num_rows ? shape.k : 0;
      char* dwords = out + (from - begin) / k_step * kStepBytes + row * 4;
      int64_t k = from;
      for (; k + k_step <= std::min(all, to); k += k_step, dwords += kStepBytes) {
        const uint32_t dword = dword_of(shape.format, codes + k * size, k_step, zero);
        std::memcpy(dwords, &dword, sizeof dword);
      }
      for (; k < to; k += k_step, dwords += kStepBytes) {
        const int64_t available = std::max<int64_t>(all - k, 0);
        const uint32_t dword =
            dword_of(shape.format, available ? codes + k * size : codes, available, zero);
        std::memcpy(dwords, &dword, sizeof dword);
      }
    }
  }
}

}  // namespace

void pack_block(const BlockShape& shape, const LaneRows (&sets)[2], char* out) {
  const int64_t size = size_of(shape.packing.scale_type);
  const int64_t groups = (shape.k + shape.group() - 1) / shape.group();  // that the source has
  for (int64_t line = 0; line < shape.num_lines(); ++line) {
    const int64_t begin = line * shape.line_k();
    const int64_t end = std::min(begin + shape.line_k(), shape.padded_k());
    std::memset(out, 0, shape.line_head());
    for (int64_t part = 0; part < shape.groups_in_line(); ++part) {
      const int64_t group = line * shape.groups_in_line() + part;
      if (group >= groups) continue;
      for (int set = 0; set < 2; ++set) {
        for (int row = 0; row < sets[set].num_rows; ++row) {
          const int64_t from = row * sets[set].scale_stride + group * size;
          char* to = out + ((part * 2 + set) * kLaneSet + row) * size;
          if (size > 0) std::memcpy(to, sets[set].scales + from, size);
          if (shape.packing.zeros) {
            std::memcpy(to + shape.scale_bytes(), sets[set].zeros + from, size);
          }
        }
      }
    }
    out += shape.line_head();
    for (int set = 0; set < 2; ++set) pack_steps(shape, sets[set], begin, end, out + set * 64);
    out += (end - begin) / step_k(shape.format) * kStepBytes;
  }
}

void pack_matrices(const BlockShape& shape, int64_t rows, const std::array<uintptr_t, 3>* sources,
                   int num_sources, char* out) {
  const int64_t groups = (shape.k + shape.group() - 1) / shape.group();
  const int64_t code_stride = shape.k * (shape.format == Format::kBf16 ? 2 : 1);
  const int64_t scale_stride = groups * size_of(shape.packing.scale_type);
  const int64_t rows_of_block = num_sources == 2 ? kLaneSet : kLanes;
  for (int64_t first = 0; first < rows; first += rows_of_block, out += shape.block_bytes()) {
    LaneRows sets[2];
    for (int set = 0; set < 2; ++set) {
      const auto& source = sources[num_sources == 2 ? set : 0];
      const int64_t row = num_sources == 2 ? first : first + set * kLaneSet;
      const auto at = [&](uintptr_t base, int64_t stride) {
        return reinterpret_cast<const char*>(base) + row * stride;
      };
      sets[set] = {.codes = at(source[0], code_stride),
                   .code_stride = code_stride,
                   .scales = at(source[1], scale_stride),
                   .zeros = at(source[2], scale_stride),
                   .scale_stride = scale_stride,
                   .num_rows = static_cast<int>(std::clamp<int64_t>(rows - row, 0, kLaneSet))};
    }
    pack_block(shape, sets, out);
  }
}

}  // namespace ey
