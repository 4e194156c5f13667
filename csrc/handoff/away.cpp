// SPDX-License-Identifier: Apache-2.0
#include "away.h"

#include <algorithm>

#include "../cuda/cuda.h"

namespace ey::handoff {

Away::~Away() {
  for (cuda::Branch& branch : branches_) cuda::free_branch(&branch);
}

Status Away::send(const MoeArgs& args, float* arrived, void* stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t workspace = cuda::workspace_bytes(args);
  const auto found =
      std::find_if(branches_.begin(), branches_.end(),
                   [&](const cuda::Branch& branch) { return branch.workspace_bytes >= workspace; });
  if (found != branches_.end()) {
    last_ = &*found;
  } else {
    cuda::Branch made;
    if (Status s = cuda::make_branch(home_, there_, shape_, workspace, &made); !s.ok) return s;
    branches_.push_back(made);
    last_ = &branches_.back();
  }
  return cuda::send(*last_, args, arrived, stream);
}

Status Away::collect(void* stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (last_ == nullptr) return failure("nothing has been sent to cuda:%d", there_);
  return cuda::collect(*last_, stream);
}

Handles<Away>& aways() {
  static Handles<Away>& all = *new Handles<Away>;
  return all;
}

}  // namespace ey::handoff
