// SPDX-License-Identifier: Apache-2.0
#include "limits.h"

#include <chrono>

#include "threads.h"

namespace ey::cpu {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Read {
  const Kernel& kernel;
  const char* memory;
  int64_t bytes;
};

struct Peak {
  const Kernel& kernel;
  int64_t steps;
  int64_t flops;  // of one thread
};

}  // namespace

double read_gbps(const Kernel& kernel, const char* memory, int64_t bytes, int num_threads) {
  Read read{kernel, memory, bytes};
  const auto part = [](void* context, Team& team, int thread) {
    const auto& r = *static_cast<Read*>(context);
    const int64_t lines = r.bytes / 64 / team.size();
    r.kernel.read(r.memory + thread * lines * 64, lines * 64);
  };
  const auto start = Clock::now();
  run_team(num_threads, part, &read);
  return static_cast<double>(bytes) / seconds_since(start) / 1e9;
}

double peak_gflops(const Kernel& kernel, int num_threads) {
  Peak peak{kernel, 1 << 20,
            0};  // some milliseconds: long against a team's start, short for a user
  const auto work = [](void* context, Team&, int thread) {
    auto& p = *static_cast<Peak*>(context);
    const int64_t flops = p.kernel.peak(p.steps);
    if (thread == 0) p.flops = flops;
  };
  const auto start = Clock::now();
  run_team(num_threads, work, &peak);
  return static_cast<double>(peak.flops) * num_threads / seconds_since(start) / 1e9;
}

double dispatch_us(int num_threads) {
  constexpr int kRuns = 2000;
  const auto nothing = [](void*, Team&, int) {};
  run_team(num_threads, nothing, nullptr);  // wakes them
  const auto start = Clock::now();
  for (int i = 0; i < kRuns; ++i) run_team(num_threads, nothing, nullptr);
  return seconds_since(start) / kRuns * 1e6;
}

}  // namespace ey::cpu
