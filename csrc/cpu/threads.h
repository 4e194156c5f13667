// SPDX-License-Identifier: Apache-2.0
// A small thread pool for one purpose: to share the tasks of a run among at most n threads.
//
// The caller is thread 0, and it waits for tasks, never for threads: a worker that the system lets
// run late, or not at all while others want its CPU, leaves its share to those that are there.
// Workers spin for a bounded time after a run, then sleep on a futex: a decode loop finds them
// awake, an idle process uses no CPU. Nothing is ever pinned. A fork leaves the child without
// workers; it makes its own at its first run.
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

// One phase of a run: tasks 0 .. total - 1, each done by whichever thread takes it. total is the
// same in every call. The phase is over when all are done, however many threads took some.
class Tasks {
 public:
  struct Run {
    int64_t begin, end;  // none left: begin == end
  };

  // The next run of tasks: long ones first, single ones at the end, so that threads end together.
  Run take(int64_t total, int64_t longest, int threads);
  // `tasks` of those that this thread took are done.
  void finish(int64_t tasks, int64_t total);
  // Returns once all are done; what they wrote can be read.
  void wait(int64_t total);

  // A whole phase of few tasks: task(i) for those that this thread gets, then wait.
  template <class Task>
  void each(int64_t total, Task task) {
    int64_t mine = 0;
    for (Run run = take(total, 1, 1); run.begin < run.end; run = take(total, 1, 1), ++mine)
      task(run.begin);
    finish(mine, total);
    wait(total);
  }

 private:
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  Event over_;
};

// Part `part` of 0 .. n - 1, cut into parts as equal as can be.
inline Tasks::Run share_of(int64_t n, int64_t part, int64_t parts) {
  return {n * part / parts, n * (part + 1) / parts};
}

// What a thread of a run calls: thread < threads, and no two have the same.
using TeamFunction = void (*)(void* context, int thread, int threads);

// Runs function(context, 0, n) here, and function(context, i, n) on those of n - 1 workers that
// come before it returns; then waits for these. So the function shares its work by Tasks, all of
// which one thread could do alone. Runs from several Python threads at once take turns. function
// must not throw.
void run_team(int n, TeamFunction function, void* context);

// Another pool for runs of the calling thread, as long as it is not null: a function that does what
// run_team promises.
using LentTeam = void (*)(int n, TeamFunction function, void* context);
void lend_team(LentTeam team);

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
