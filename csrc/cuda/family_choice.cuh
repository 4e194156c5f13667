// SPDX-License-Identifier: Apache-2.0
// Which kernels serve a call. The borders here, and those of moe.h, are reasoned, none measured on
// a GPU; bench/gpu_check.sh times both sides of the latter, layer by layer, and writes a table of
// what it finds (crossovers.cuh), which goes before.
#pragma once

#include <cstdlib>
#include <cstring>

#include "family.cuh"

namespace ey::cuda {

// Pairs per expert of the set from which an expert has, as a rule, enough of them for another way.
//
// Packed (ExpertSet::stream_pairs): the stream kernel has each warp copy tokens for itself, the
// grouped one has them copied once for 8 warps. At 8 pairs an expert the former's copies are as
// many bytes as int4 weights. Packed, on Hopper (ExpertSet::wgmma_pairs): a tile of the wgmma
// kernels has 128 pairs, one of the mma kernel 64 at 0.6 of the rate. With fewer pairs both wait
// for weights, and the wider one multiplies zeros.
struct Border {
  // Rows where they lie: up to one pair an expert dot products read hardly any weight twice;
  // beyond, tensor cores pay.
  static constexpr int64_t kTilesPairs = 1;
};

// EXPERTYARD_CUDA_KERNELS=cuda_grouped, say, gives every call to that family, to compare families
// and to go round a fault. Null: not set, or no such family (moe_experts then says so).
inline const char* forced_name() { return std::getenv("EXPERTYARD_CUDA_KERNELS"); }
inline const Family* forced_family() {
  const char* const name = forced_name();
  for (const Family* family : kFamilies) {
    if (name && std::strcmp(family->isa, name) == 0) return family;
  }
  return nullptr;
}

inline const Family& family_of(const MoeArgs& args) {
  if (const Family* forced = forced_family()) return *forced;
  const int64_t pairs = args.num_tokens * args.top_k, experts = args.set->num_experts;
  if (args.set->layout == Layout::kBlocks) {
    if (double(pairs) <= double(args.set->stream_pairs) * double(experts) && kStream.serves(args))
      return kStream;
#if EXPERTYARD_HOPPER
    if (double(pairs) > double(args.set->wgmma_pairs) * double(experts)) {
      if (kWgmmaFast.serves(args)) return kWgmmaFast;
      if (kWgmma.serves(args)) return kWgmma;
    }
#endif
    return kGrouped;
  }
  return pairs > Border::kTilesPairs * experts && kTiles.serves(args) ? kTiles : kRows;
}

}  // namespace ey::cuda
