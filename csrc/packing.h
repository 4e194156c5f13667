// SPDX-License-Identifier: Apache-2.0
// Writes the block layout (blocks.h) from rows of codes.
#pragma once

#include <array>

#include "blocks.h"

namespace ey {

// Up to kLaneSet rows of one matrix: what a lane set of a block is made from.
struct LaneRows {
  const char* codes;     // first row: bf16 values, or one code a byte
  int64_t code_stride;   // bytes between rows
  const char* scales;    // first row's scales, of packing.scale_type; null if there are none
  const char* zeros;     // first row's zeros, or null
  int64_t scale_stride;  // bytes between rows of scales, and of zeros
  int num_rows;          // <= kLaneSet; missing rows become zeros
};

// shape.block_bytes() bytes at `out`.
void pack_block(const BlockShape& shape, const LaneRows (&sets)[2], char* out);

// The blob of a matrix of `rows` rows (w2), or of two (gate, up: w13). A source is the addresses of
// its codes [rows, k], and its scales and zeros [rows, groups], contiguous.
void pack_matrices(const BlockShape& shape, int64_t rows, const std::array<uintptr_t, 3>* sources,
                   int num_sources, char* out);

}  // namespace ey
