// SPDX-License-Identifier: Apache-2.0
// What every kernel here needs of one call, and which expert a pair has chosen.
#pragma once

#include "../blocks.h"
#include "bad_id.cuh"
#include "numbers.cuh"
#include "ptx.cuh"

namespace ey::cuda {

// A run of tokens of one call, passed to kernels by value. Pair p is slot p % top_k of token
// p / top_k, both counted from the start of the run.
struct Chunk {
  ExpertSet set;
  const void* hidden_states;
  void* out;
  const void* topk_ids;
  const void* topk_weights;
  int64_t top_k;
  int64_t first_token;  // of the run within the call; only for the report of a bad id
  DType hidden_dtype;
  DType out_dtype;
  DType weights_dtype;
  bool ids_are_int64;
};

enum class Chosen { kExpert, kNone, kBadId };

// The expert of one pair; expert is set only for kExpert.
__device__ __forceinline__ Chosen choose(const Chunk& c, int64_t pair, int64_t* id,
                                         ExpertPointers* expert) {
  *id = c.ids_are_int64 ? static_cast<const int64_t*>(c.topk_ids)[pair]
                        : static_cast<const int32_t*>(c.topk_ids)[pair];
  if (*id == -1 || *id == c.set.num_experts) return Chosen::kNone;
  if (*id < 0 || *id > c.set.num_experts) return Chosen::kBadId;
  *expert = c.set.experts[*id];
  return expert->gate == nullptr ? Chosen::kNone : Chosen::kExpert;
}

// For a pair that chose kBadId: what to add to its token's sums, so that the row cannot pass for a
// result. One thread a token has report set, and tells the host.
__device__ __forceinline__ float refuse(const Chunk& c, int64_t token, int64_t id, bool report) {
  if (report && c.set.bad_id) {
    ptx::store_for_host(c.set.bad_id, bad_id_word(c.first_token + token, id));
  }
  return float_of_bits(0x7fc00000u);  // NaN
}

}  // namespace ey::cuda
