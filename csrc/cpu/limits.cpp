// SPDX-License-Identifier: Apache-2.0
#include "limits.h"

#include <atomic>
#include <chrono>

#include "../futex.h"
#include "threads.h"

namespace ey::cpu {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

constexpr int kTasksOfThread = 32;  // few enough to cost nothing, and threads end together

struct Read {
  const Kernel& kernel;
  const char* memory;
  int64_t bytes;
  Tasks tasks;
};

struct Peak {
  const Kernel& kernel;
  int64_t steps;                  // of a task
  std::atomic<int64_t> flops{0};  // of a task
  Tasks tasks;
};

}  // namespace

double read_gbps(const Kernel& kernel, const char* memory, int64_t bytes, int num_threads) {
  Read read{kernel, memory, bytes, {}};
  const auto part = [](void* context, int, int threads) {
    auto& r = *static_cast<Read*>(context);
    const int64_t tasks = int64_t{threads} * kTasksOfThread, size = r.bytes / 64 / tasks * 64;
    r.tasks.each(tasks, [&](int64_t task) { r.kernel.read(r.memory + task * size, size); });
  };
  const auto start = Clock::now();
  run_team(num_threads, part, &read);
  return static_cast<double>(bytes) / seconds_since(start) / 1e9;
}

double peak_gflops(const Kernel& kernel, int num_threads) {
  // some milliseconds in all: long against a team's start, short for a user
  Peak peak{kernel, (1 << 20) / kTasksOfThread, {}, {}};
  const auto work = [](void* context, int, int threads) {
    auto& p = *static_cast<Peak*>(context);
    p.tasks.each(int64_t{threads} * kTasksOfThread,
                 [&](int64_t) { p.flops = p.kernel.peak(p.steps); });
  };
  const auto start = Clock::now();
  run_team(num_threads, work, &peak);
  const double flops = static_cast<double>(peak.flops) * num_threads * kTasksOfThread;
  return flops / seconds_since(start) / 1e9;
}

double dispatch_us(int num_threads) {
  constexpr int kRuns = 2000;
  // All threads meet in each run: without that the caller would not wait for those that come late.
  const auto meet = [](void* context, int, int threads) {
    auto& arrived = *static_cast<std::atomic<int>*>(context);
    ++arrived;
    while (arrived < threads) relax();
  };
  const auto run = [&] {
    std::atomic<int> arrived{0};
    run_team(num_threads, meet, &arrived);
  };
  run();  // wakes them
  const auto start = Clock::now();
  for (int i = 0; i < kRuns; ++i) run();
  return seconds_since(start) / kRuns * 1e6;
}

}  // namespace ey::cpu
