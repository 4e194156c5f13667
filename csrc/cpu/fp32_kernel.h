// SPDX-License-Identifier: Apache-2.0
// What the rooms that multiply in fp32 have in common: activations are fp32 rows, nothing is
// packed. A room gives its vectors (Vec for the tile, Floats for the activation), a format its
// loads.
#pragma once

#include "activation.h"
#include "convert.h"
#include "dot_tile.h"
#include "kernel.h"
#include "probe.h"

namespace ey::cpu {
namespace {

inline void load_fp32(const LoadRowArgs& a) {
  load_row_fp32(a.from, a.dtype, a.shape.k, round_up(a.shape.k, kRowPad),
                reinterpret_cast<float*>(a.row));
}

template <class Vec, class Floats, class Weights>
constexpr Kernel fp32_kernel(const char* isa, uint32_t needs, int rank, Format format) {
  constexpr int kVectorsInLine = 64 / (Vec::kWidth * sizeof(float));
  return {.isa = isa,
          .format = format,
          .layout = Layout::kRows,
          .mode = Mode::kExact,
          .needs = needs,
          .rank = rank,
          .bf16_inputs = false,
          .row_bytes = padded_row_bytes<sizeof(float)>,
          .load_row = load_fp32,
          .load_group = nullptr,
          .h_size = sizeof(float),
          .panel_from_tokens = 0,
          .panel_bytes = nullptr,
          .multiply = multiply_rows<rows<Vec, Weights>>,
          .activate = activate<Floats>,
          .combine = combine<Floats>,
          .store_row = store_row_fp32,
          .peak = peak<Vec, Vec::kChains>,
          .read = read_lines<Vec, kVectorsInLine>};
}

}  // namespace
}  // namespace ey::cpu
