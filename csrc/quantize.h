// SPDX-License-Identifier: Apache-2.0
// Plain weights to codes and scales, and on to packed blocks, a few rows at a time: what a
// checkpoint holds is read once and what kernels read is written once; everything between stays in
// the caches.
//
// python/expertyard/quantize.py says what the codes are. Plain rounding gives the same bits as it
// does; a search for scales adds its squared errors in another order.
#pragma once

#include <cstdint>

#include "blocks.h"
#include "decode.h"
#include "status.h"

namespace ey {

// Rows of weights: each contiguous, `stride` bytes apart. With a decoder a row is whole blocks,
// which become numbers when the row is quantised, in the first cache.
struct PlainRows {
  const char* data;
  DType dtype;
  int64_t stride;
  BlockDecoder decoder = {};
};

// codes [rows, shape.k], one a byte; scales and zeros [rows, groups] of shape.packing.scale_type,
// the last group may be short. zeros may be null unless the packing has some. Fails for a weight or
// a scale that is not finite.
Status quantize_rows(const BlockShape& shape, const PlainRows& from, int64_t rows, bool search,
                     uint8_t* codes, char* scales, char* zeros);

// The blob of one matrix of `rows` rows (w2), or of two (gate, up: w13), as pack_matrices makes it
// from their codes.
Status quantize_blob(const BlockShape& shape, int64_t rows, const PlainRows* sources,
                     int num_sources, bool search, char* out);

}  // namespace ey
