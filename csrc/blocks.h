// SPDX-License-Identifier: Apache-2.0
// The block layout: packed weights of one matrix, the same bytes on the CPU and on GPUs, so that an
// expert moves between them by a copy. Pure arithmetic; packing.cpp writes it, kernels read it.
//
//   blob    blocks, one behind the other
//   block   32 lanes x all of k; a lane is an output row
//             w13: block b = gate rows 16 b .. 16 b + 15 (lane set A), up rows 16 b .. (lane set B)
//             w2:  block b = rows 32 b .. 32 b + 15 (A), 32 b + 16 .. 32 b + 31 (B); so is w13
//                  where the activation has no gate
//           rows beyond the matrix are zeros
//   line    what shares one run of scales: [32 scales] [32 zeros, if there are any] [steps]
//           one group along k; two for e8m0, whose scales are 32 + 32 bytes
//   step    128 bytes: 16 dwords of lane set A, 16 of set B; dword r belongs to the set's row r
//             bf16        2 k   w[k], w[k + 1]
//             int8        4 k   code of w[k + j] in byte j, j = 0 .. 3; code = integer + 128
//             fp8         4 k   e4m3 of w[k + j] in byte j
//             int4 mxfp4  8 k   byte j: code of w[k + j] in the low nibble, of w[k + 4 + j] in the
//                               high one; int4 code = integer + 8, mxfp4 code = e2m1
//
// k is padded to whole steps (e8m0: to whole lines) with weights of value zero; a last line may be
// short. Everything is a multiple of 64 bytes. A kernel that wants other pairs of k together orders
// its activations accordingly; weights are never shuffled at run time.
#pragma once

#include "moe.h"

namespace ey {

inline constexpr int kLanes = 32;
inline constexpr int kLaneSet = 16;
inline constexpr int64_t kStepBytes = 128;

EY_BOTH constexpr int step_k(Format f) {
  return f == Format::kBf16 ? 2 : f == Format::kInt8 || f == Format::kFp8 ? 4 : 8;
}

EY_BOTH constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

EY_BOTH constexpr int64_t size_of(ScaleType t) {  // bytes of one scale
  return t == ScaleType::kNone ? 0 : t == ScaleType::kE8m0 ? 1 : t == ScaleType::kFp32 ? 4 : 2;
}

// Only what kernels can read: they divide groups of activations into groups of weights.
constexpr bool is_packing(Format f, const Packing& p) {
  const bool plain = f == Format::kBf16, mx = f == Format::kMxfp4;
  const bool packed = plain || mx || f == Format::kInt8 || f == Format::kInt4 || f == Format::kFp8;
  const bool group = p.group_size == 32 || p.group_size == 64 || p.group_size == 128;
  return packed && plain == (p.scale_type == ScaleType::kNone) &&
         mx == (p.scale_type == ScaleType::kE8m0) && (!mx || p.group_size == 32) &&
         (!plain || p.group_size == 0) && (group || p.group_size == 0) &&
         (!p.zeros || (f == Format::kInt4 && group));
}

// One matrix with k columns.
struct BlockShape {
  Format format;
  Packing packing;
  int64_t k;

  EY_BOTH constexpr int64_t groups_in_line() const {
    return packing.scale_type == ScaleType::kE8m0 ? 2 : 1;
  }
  // k of one group; a whole row's is padded to whole steps
  EY_BOTH constexpr int64_t group() const {
    return packing.group_size > 0 ? packing.group_size : round_up(k, step_k(format));
  }
  EY_BOTH constexpr int64_t line_k() const { return group() * groups_in_line(); }
  EY_BOTH constexpr int64_t padded_k() const {
    return round_up(k, groups_in_line() > 1 ? line_k() : step_k(format));
  }
  EY_BOTH constexpr int64_t num_groups() const { return (padded_k() + group() - 1) / group(); }
  EY_BOTH constexpr int64_t num_lines() const { return (padded_k() + line_k() - 1) / line_k(); }
  EY_BOTH constexpr int64_t scale_bytes() const {  // of one line, without its zeros
    return packing.scale_type == ScaleType::kNone   ? 0
           : packing.scale_type == ScaleType::kFp32 ? kLanes * 4
                                                    : 64;
  }
  EY_BOTH constexpr int64_t line_head() const { return scale_bytes() * (packing.zeros ? 2 : 1); }
  EY_BOTH constexpr int64_t line_bytes() const {  // of a whole line
    return line_head() + line_k() / step_k(format) * kStepBytes;
  }
  EY_BOTH constexpr int64_t block_bytes() const {
    return num_lines() * line_head() + padded_k() / step_k(format) * kStepBytes;
  }
};

EY_BOTH constexpr int w13_rows(bool has_gate) { return has_gate ? kLaneSet : kLanes; }  // of h
EY_BOTH constexpr int64_t w13_blocks(int64_t intermediate_size, bool has_gate) {
  return (intermediate_size + w13_rows(has_gate) - 1) / w13_rows(has_gate);
}
EY_BOTH constexpr int64_t w2_blocks(int64_t hidden_size) {
  return (hidden_size + kLanes - 1) / kLanes;
}

}  // namespace ey
