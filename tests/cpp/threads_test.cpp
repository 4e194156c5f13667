// SPDX-License-Identifier: Apache-2.0
// The thread pool, made to run under a thread sanitizer: plain data handed from phase to phase is
// right only if tasks and join order it; several callers; more threads than CPUs; workers that come
// late.
#include "cpu/threads.h"

#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

using ey::cpu::run_team;
using ey::cpu::Tasks;

struct Shared {
  long size;
  std::vector<long> first, second;  // one element a task, plain memory
  std::vector<int> calls;           // of each thread
  Tasks write, read, clear;
  explicit Shared(long n) : size(n), first(n, -1), second(n, -1), calls(n, 0) {}
};

// Phase 1 writes an element; phase 2 reads its neighbour's; phase 3 in runs, and ends with the run.
void three_phases(void* context, int thread, int threads) {
  auto& s = *static_cast<Shared*>(context);
  ++s.calls[thread];
  s.write.each(s.size, [&](int64_t i) { s.first[i] = i + 1; });
  s.read.each(s.size, [&](int64_t i) { s.second[i] = s.first[(i + 1) % s.size]; });
  for (auto run = s.clear.take(s.size, 4, threads); run.begin < run.end;
       run = s.clear.take(s.size, 4, threads)) {
    for (int64_t i = run.begin; i < run.end; ++i) s.first[i] = 0;
  }
}

bool run_once(int threads, long tasks) {
  Shared shared(tasks);
  shared.calls.assign(threads, 0);
  run_team(threads, three_phases, &shared);
  for (long i = 0; i < tasks; ++i) {
    if (shared.first[i] != 0 || shared.second[i] != (i + 1) % tasks + 1) return false;
  }
  return shared.calls[0] == 1;
}

// One worker is held at the door of its task; the caller does all the rest meanwhile.
struct Held {
  std::atomic<bool> taken{false}, others_done{false};
  std::atomic<int> done{0};
  Tasks tasks;
};

bool one_is_held(int threads) {
  constexpr int kTasks = 50;
  Held held;
  const auto work = [](void* context, int, int) {
    auto& h = *static_cast<Held*>(context);
    h.tasks.each(kTasks, [&](int64_t) {
      if (!h.taken.exchange(true)) {
        while (!h.others_done) std::this_thread::yield();
      } else if (++h.done == kTasks - 1) {
        h.others_done = true;
      }
    });
  };
  run_team(threads, work, &held);
  return held.done == kTasks - 1;
}

}  // namespace

int main() {
  int passed = 0, failed = 0;
  const auto count = [&](bool ok) { ok ? ++passed : ++failed; };
  for (const int threads : {1, 2, 3, 32}) {
    for (int i = 0; i < 200; ++i) count(run_once(threads, 1 + i % 40));
  }
  // Runs of many sizes one after another: a worker called to one may come during the next.
  for (int i = 0; i < 2000; ++i) count(run_once(1 + i % 4, 1 + i % 3));
  for (int i = 0; i < 20; ++i) count(one_is_held(3));
  std::vector<std::thread> callers;
  std::vector<int> right(4, 0);
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&right, c] {
      for (int i = 0; i < 100; ++i) right[c] += run_once(1 + (c + i) % 4, 1 + i % 9);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const int r : right) count(r == 100);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
