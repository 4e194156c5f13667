// SPDX-License-Identifier: Apache-2.0
// The parts of a model's layers that another GPU computes in one captured graph (cuda/branch.h):
// calls of one shape, from one GPU to one other. Layers take turns, for a stream asks for one after
// the other; graphs do not, so that two of them may run at once.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>

#include "../cuda/branch.h"
#include "handles.h"

namespace ey::handoff {

class Away {
 public:
  Away(int home, int there, const cuda::BranchShape& shape)
      : home_(home), there_(there), shape_(shape) {}
  ~Away();  // no graph that holds it may be replayed any more

  int home() const { return home_; }
  int there() const { return there_; }
  const cuda::BranchShape& shape() const { return shape_; }
  // Both queue work on the stream; each send is collected before the next one.
  Status send(const MoeArgs& args, float* arrived, void* stream);
  Status collect(void* stream);

 private:
  const int home_, there_;
  const cuda::BranchShape shape_;
  std::mutex mutex_;                    // of what follows
  std::deque<cuda::Branch> branches_;   // of growing workspaces, as layers' formats ask for
  const cuda::Branch* last_ = nullptr;  // that was sent
};

Handles<Away>& aways();  // never destroyed: as expert sets

}  // namespace ey::handoff
