// SPDX-License-Identifier: Apache-2.0
// Which slots (token, k) belong to which expert: a counting sort, shared out in parts. The
// order of slots within an expert is theirs in topk_ids, whatever the number of parts.
#pragma once

#include "../moe.h"
#include "../status.h"

namespace ey::cpu {

// Every id must be an expert, or -1 or num_experts for none.
Status check_ids(const MoeArgs& args, int num_threads);

// The slots of tokens begin .. begin + num_tokens - 1, sorted by expert: those of active expert a
// are first[a] .. first[a + 1]. Experts that are not here are left out.
struct Routing {
  const MoeArgs& args;
  int64_t begin;
  int64_t num_tokens;

  int num_active;
  int32_t* active;     // [num_active] expert ids, ascending
  int32_t* by_load;    // [num_active] indices into active, most slots first
  int64_t* first;      // [num_active + 1]
  int32_t* token;      // [slots] token, counted from begin
  float* weight;       // [slots]
  int64_t* histogram;  // [num_parts][num_experts]

  int64_t slots() const { return first[num_active]; }

  // In this order: all parts counted before the plan, which comes before any is scattered.
  void count(int64_t part, int num_parts) const;
  void plan(int num_parts);
  void scatter(int64_t part, int num_parts) const;
};

}  // namespace ey::cpu
