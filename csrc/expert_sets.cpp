// SPDX-License-Identifier: Apache-2.0
#include "expert_sets.h"

#include <mutex>
#include <shared_mutex>

namespace ey {
namespace {

struct Slot {
  std::shared_ptr<ExpertSetEntry> entry;
  uint32_t generation = 1;
};

// Never destroyed: Python may free its last experts after static destructors have run.
std::shared_mutex& mutex = *new std::shared_mutex;
std::vector<Slot>& slots = *new std::vector<Slot>;

Slot* slot_of(int64_t handle) {
  const auto index = static_cast<uint64_t>(handle) & 0xFFFFFFFF;
  const auto generation = static_cast<uint64_t>(handle) >> 32;
  if (handle < 0 || index >= slots.size() || slots[index].generation != generation) return nullptr;
  return &slots[index];
}

}  // namespace

int64_t add_expert_set(std::unique_ptr<ExpertSetEntry> entry) {
  const std::unique_lock lock(mutex);
  size_t index = 0;
  while (index < slots.size() && slots[index].entry != nullptr) ++index;
  if (index == slots.size()) slots.emplace_back();
  slots[index].entry = std::move(entry);
  return static_cast<int64_t>(uint64_t{slots[index].generation} << 32 | index);
}

std::shared_ptr<ExpertSetEntry> find_expert_set(int64_t handle) {
  const std::shared_lock lock(mutex);
  const Slot* slot = slot_of(handle);
  return slot != nullptr ? slot->entry : nullptr;
}

bool remove_expert_set(int64_t handle) {
  const std::unique_lock lock(mutex);
  Slot* slot = slot_of(handle);
  if (slot == nullptr || slot->entry == nullptr) return false;
  slot->entry.reset();  // a call that is running keeps its own reference
  slot->generation = (slot->generation + 1) & 0x7FFFFFFF;
  return true;
}

}  // namespace ey
