// SPDX-License-Identifier: Apache-2.0
#include "routing.h"

#include <algorithm>
#include <atomic>

#include "convert.h"
#include "threads.h"

namespace ey::cpu {
namespace {

constexpr int64_t kAloneSlots = 2048;  // ids that one thread checks before others would be awake

int64_t id_at(const MoeArgs& a, int64_t slot) {
  return a.ids_are_int64 ? static_cast<const int64_t*>(a.topk_ids)[slot]
                         : static_cast<const int32_t*>(a.topk_ids)[slot];
}

float weight_at(const MoeArgs& a, int64_t slot) {
  if (a.weights_dtype == DType::kF32) return static_cast<const float*>(a.topk_weights)[slot];
  const uint16_t half = static_cast<const uint16_t*>(a.topk_weights)[slot];
  return a.weights_dtype == DType::kBF16 ? from_bf16(half) : from_fp16(half);
}

bool here(const ExpertSet& set, int64_t id) {
  return id >= 0 && id < set.num_experts && set.experts[id].gate != nullptr;
}

struct Check {
  const MoeArgs& args;
  std::atomic<int64_t> bad;  // first slot with a bad id, or the number of slots
  Tasks parts;
};

void check_parts(void* context, int, int threads) {
  auto& check = *static_cast<Check*>(context);
  const MoeArgs& a = check.args;
  const int64_t slots = a.num_tokens * a.top_k;
  check.parts.each(threads, [&](int64_t part) {
    const auto share = share_of(slots, part, threads);
    for (int64_t slot = share.begin; slot < share.end; ++slot) {
      const int64_t id = id_at(a, slot);
      if (id >= -1 && id <= a.set->num_experts) continue;
      int64_t bad = check.bad.load();
      while (slot < bad && !check.bad.compare_exchange_weak(bad, slot)) {
      }
      return;
    }
  });
}

// Slots of one part: whole tokens, in order.
struct Range {
  int64_t begin, end;
  Range(const Routing& r, int64_t part, int num_parts)
      : begin((r.begin + r.num_tokens * part / num_parts) * r.args.top_k),
        end((r.begin + r.num_tokens * (part + 1) / num_parts) * r.args.top_k) {}
};

}  // namespace

Status check_ids(const MoeArgs& a, int num_threads) {
  const int64_t slots = a.num_tokens * a.top_k;
  Check check{a, slots, {}};
  run_team(slots <= kAloneSlots ? 1 : num_threads, check_parts, &check);
  const int64_t slot = check.bad;
  if (slot == slots) return {};
  return failure(
      "topk_ids[%lld, %lld] is %lld: expected an expert from 0 to %lld, or -1 or %lld for none",
      static_cast<long long>(slot / a.top_k), static_cast<long long>(slot % a.top_k),
      static_cast<long long>(id_at(a, slot)), static_cast<long long>(a.set->num_experts - 1),
      static_cast<long long>(a.set->num_experts));
}

void Routing::count(int64_t part, int num_parts) const {
  const ExpertSet& set = *args.set;
  int64_t* mine = histogram + part * set.num_experts;
  std::fill_n(mine, set.num_experts, 0);
  const Range range(*this, part, num_parts);
  for (int64_t slot = range.begin; slot < range.end; ++slot) {
    const int64_t id = id_at(args, slot);
    if (here(set, id)) ++mine[id];
  }
}

void Routing::plan(int num_parts) {
  const int64_t num_experts = args.set->num_experts;
  num_active = 0;
  first[0] = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    int64_t next = first[num_active];
    for (int part = 0; part < num_parts; ++part) {  // a count becomes its part's first place
      const int64_t mine = histogram[part * num_experts + e];
      histogram[part * num_experts + e] = next;
      next += mine;
    }
    if (next == first[num_active]) continue;
    active[num_active] = static_cast<int32_t>(e);
    first[++num_active] = next;
  }
  for (int a = 0; a < num_active; ++a) by_load[a] = a;
  std::sort(by_load, by_load + num_active, [this](int32_t a, int32_t b) {
    const int64_t load_a = first[a + 1] - first[a], load_b = first[b + 1] - first[b];
    return load_a != load_b ? load_a > load_b : a < b;
  });
}

void Routing::scatter(int64_t part, int num_parts) const {
  const ExpertSet& set = *args.set;
  int64_t* next = histogram + part * set.num_experts;
  const Range range(*this, part, num_parts);
  for (int64_t slot = range.begin; slot < range.end; ++slot) {
    const int64_t id = id_at(args, slot);
    if (!here(set, id)) continue;
    const int64_t at = next[id]++;
    token[at] = static_cast<int32_t>(slot / args.top_k - begin);
    weight[at] = weight_at(args, slot);
  }
}

}  // namespace ey::cpu
