// SPDX-License-Identifier: Apache-2.0
// Handles: the op takes an int for "the experts of one layer", because an int goes through
// torch.compile, CUDA graphs and C callers alike. A handle that was freed is an error, never a
// wild pointer: its upper half is a generation that changes with every use of a slot.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "moe.h"

namespace ey {

struct ExpertSetEntry {
  ExpertSet set;
  std::vector<ExpertPointers> pointers;        // set.experts points here, or to a device's copy
  int device = -1;                             // -1: CPU; else the CUDA ordinal
  void (*release)(ExpertSetEntry&) = nullptr;  // gives back what the set holds on its device

  ExpertSetEntry() = default;
  ExpertSetEntry(const ExpertSetEntry&) = delete;
  ~ExpertSetEntry() {
    if (release != nullptr) release(*this);
  }

  // What really ran, for whoever wants to be sure. The name is a string that lives for ever.
  std::atomic<const char*> last_isa{nullptr};
  std::atomic<int64_t> calls{0};
};

int64_t add_expert_set(std::unique_ptr<ExpertSetEntry> entry);
std::shared_ptr<ExpertSetEntry> find_expert_set(int64_t handle);  // null: not a live handle
bool remove_expert_set(int64_t handle);

}  // namespace ey
