// SPDX-License-Identifier: Apache-2.0
// Activation rows of Mode::kFast: 8-bit integers, one fp32 scale per group of kGroup values.
//
//   x[k] ~ scale * q[k],  scale = max |x| / 127 over the group,  q = round(x / scale)
//
// A row is records, each of `values` k: as wide as a group of the weights, at most kGroup.
//
//   scale fp32 | start int32 | q int8 [values]
//
// start = -centre * sum of q: weights are unsigned codes, and integer sums that begin there end as
// the exact product with code - centre. What a tile needs of a token lies at one address.
#pragma once

#include "kernel.h"

namespace ey::cpu {
namespace {

inline int64_t record_values(const Packing& p) { return p.group_size > 0 ? p.group_size : kGroup; }

struct FastRow {
  static constexpr int64_t kScale = 0, kStart = 4, kCodes = 8;
  int64_t values;  // of a record

  explicit FastRow(const Packing& p) : values(record_values(p)) {}
  int64_t record_bytes() const { return kCodes + values; }
  int64_t at(int64_t k) const { return k / values * record_bytes(); }  // k: where a record begins
};

template <class Row = FastRow>
int64_t fast_row_bytes(const RowShape& s) {
  return round_up(Row(s.packing).at(round_up(s.k, kGroup)), 64) + 64;
}

}  // namespace
}  // namespace ey::cpu
