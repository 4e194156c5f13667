// SPDX-License-Identifier: Apache-2.0
#include "torch_team.h"

#include <pthread.h>
#include <strings.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/threads.h"

namespace ey {
namespace {

enum class Choice { kAuto, kTorch, kOwn, kUnknown };

Choice read_choice() {
  const char* name = std::getenv("EXPERTYARD_TEAM");
  if (name == nullptr || *name == 0 || std::strcmp(name, "auto") == 0) return Choice::kAuto;
  if (std::strcmp(name, "torch") == 0) return Choice::kTorch;
  if (std::strcmp(name, "own") == 0) return Choice::kOwn;
  return Choice::kUnknown;
}

Choice choice() {
  static const Choice once = read_choice();
  return once;
}

// OpenMP reads these when it is loaded; later changes do nothing, there as here.
bool spins_briefly() {
  static const bool once = [] {
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    return std::getenv("GOMP_SPINCOUNT") != nullptr ||
           (policy != nullptr && strcasecmp(policy, "passive") == 0);
  }();
  return once;
}

std::atomic<bool> forked{false};

int torchs_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

bool takes_torchs(int cpus) {
  static const int handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  if (forked || handler != 0 || choice() == Choice::kOwn) return false;
  if (choice() == Choice::kAuto && spins_briefly()) return false;
  return torchs_threads() <= cpus;
}

void on_torchs_threads(int n, cpu::TeamFunction function, void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(context, static_cast<int>(i), n);
  });
}

}  // namespace

TorchTeam::TorchTeam() {
  const int cpus = cpu::thread_limits().usable();  // a system call: asked once
  threads_ = std::clamp(torchs_threads(), 1, std::min(cpus, cpu::callers_limit()));
  cpu::lend_team(takes_torchs(cpus) ? on_torchs_threads : nullptr);
}
TorchTeam::~TorchTeam() { cpu::lend_team(nullptr); }

Status TorchTeam::check() {
  if (choice() != Choice::kUnknown) return {};
  return failure("EXPERTYARD_TEAM: expected auto, torch or own, got '%s'",
                 std::getenv("EXPERTYARD_TEAM"));
}

const char* TorchTeam::name() {
  return takes_torchs(cpu::thread_limits().usable()) ? "torch" : "own";
}

}  // namespace ey
