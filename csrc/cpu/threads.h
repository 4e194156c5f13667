// SPDX-License-Identifier: Apache-2.0
// A small thread pool for one purpose: run the same function on n threads, with barriers inside.
//
// The caller is thread 0. Workers spin for a bounded time after a run, then sleep on a futex: a
// decode loop finds them awake, an idle process uses no CPU. Nothing is ever pinned. A fork leaves
// the child without workers; it makes its own at its first run.
#pragma once

#include <atomic>
#include <cstdint>

namespace ey::cpu {

// A counter that threads wait on: spin first, then sleep.
class Event {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }
  void advance();                   // value + 1, and wake every sleeper
  void wait_while(uint32_t value);  // returns once value() differs

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

// What a run's function sees.
class Team {
 public:
  explicit Team(int size) : size_(size) {}
  int size() const { return size_; }
  void barrier();  // returns once all threads of the team have called it

 private:
  const int size_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) Event passed_;
};

using TeamFunction = void (*)(void* context, Team& team, int thread);

// Runs function(context, team, 0 .. n-1), each on its own thread; returns when all have returned.
// Runs from several Python threads at once take turns. function must not throw.
void run_team(int n, TeamFunction function, void* context);

struct ThreadLimits {
  int affinity;  // CPUs this process may run on
  int cgroup;    // CPUs' worth of time that its cgroup allows, rounded up; 0: no limit
  int usable() const { return cgroup > 0 && cgroup < affinity ? cgroup : affinity; }
};
ThreadLimits thread_limits();

// The most threads that runs of the calling thread may use; no limit at first. A virtual GPU is a
// thread with a limit of 1: it does not take turns with the others at the pool.
void limit_caller(int threads);
int callers_limit();

}  // namespace ey::cpu
