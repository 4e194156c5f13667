// SPDX-License-Identifier: Apache-2.0
// Which kernels serve a call. Every border here is reasoned, none measured on a GPU;
// bench/gpu_check.sh times both sides of each, and this is the one place to write what it finds.
#pragma once

#include "family.cuh"

namespace ey::cuda {

// Pairs per expert of the set from which an expert has, as a rule, enough of them for another way.
struct Border {
  // Rows where they lie: up to one pair an expert dot products read hardly any weight twice;
  // beyond, tensor cores pay.
  static constexpr int64_t kTilesPairs = 1;
  // Packed: the stream kernel has each warp copy tokens for itself, the grouped one has them copied
  // once for 8 warps. At 8 pairs an expert the former's copies are as many bytes as int4 weights.
  static constexpr int64_t kGroupedPairs = 8;
};

inline const Family& family_of(const MoeArgs& args) {
  const int64_t pairs = args.num_tokens * args.top_k, experts = args.set->num_experts;
  if (args.set->layout == Layout::kBlocks) {
    return pairs <= Border::kGroupedPairs * experts && kStream.serves(args) ? kStream : kGrouped;
  }
  return pairs > Border::kTilesPairs * experts && kTiles.serves(args) ? kTiles : kRows;
}

}  // namespace ey::cuda
