// SPDX-License-Identifier: Apache-2.0
// Activation rows of Mode::kFast: 8-bit integers, one fp32 scale per group of kGroup values, and
// per group of weights the sum of the integers (weights are unsigned codes: their centre times that
// sum comes off the product).
//
//   x[k] ~ scale[k / kGroup] * q[k],  scale = max |x| / 127 over the group,  q = round(x / scale)
//
//   row   q int8 [k padded to kGroup] | scale fp32 [groups] | sums int32 [per group of weights, at
//         most kGroup wide] ; each padded to 64 bytes
#pragma once

#include "kernel.h"

namespace ey::cpu {
namespace {

struct FastRow {
  int64_t k;          // padded
  int64_t sum_group;  // values of one sum
  int64_t scales_at, sums_at, bytes;

  explicit FastRow(const RowShape& s)
      : k(round_up(s.k, kGroup)),
        sum_group(s.packing.group_size > 0 ? s.packing.group_size : kGroup),
        scales_at(k),
        sums_at(scales_at + round_up(k / kGroup * 4, 64)),
        bytes(sums_at + round_up(k / sum_group * 4, 64) + 64) {}
};

inline int64_t fast_row_bytes(const RowShape& s) { return FastRow(s).bytes; }

}  // namespace
}  // namespace ey::cpu
