// SPDX-License-Identifier: Apache-2.0
// Whose threads compute a Python thread's calls: the pool's own (cpu/threads.h), or PyTorch's.
//
// After each of its operations PyTorch's OpenMP threads spin for milliseconds. Own workers, woken
// meanwhile, would share CPUs with them: a call of one token after two Linear layers took 1.6 times
// as long. So calls run on PyTorch's team, unless
//   - it has more threads than there are CPUs for it, or this process was forked from one that used
//     it: a team of OpenMP does not survive that;
//   - its threads do not spin for long, as GOMP_SPINCOUNT or OMP_WAIT_POLICY=passive say: then own
//     workers are the better ones where others want the CPUs, since nobody waits for a late one.
// EXPERTYARD_TEAM=torch or own decides it by name.
#pragma once

#include "status.h"

namespace ey {

// While it lives, runs of the calling thread go where the rule above says.
class TorchTeam {
 public:
  TorchTeam();
  ~TorchTeam();
  TorchTeam(const TorchTeam&) = delete;
  TorchTeam& operator=(const TorchTeam&) = delete;
  // How many threads a call made by this thread may use: torch's number, the CPUs, limit_caller.
  int threads() const { return threads_; }
  // Fails if EXPERTYARD_TEAM is no known name.
  static Status check();
  // "torch" or "own": what a call made now, by this thread, would use.
  static const char* name();

 private:
  int threads_;
};

}  // namespace ey
