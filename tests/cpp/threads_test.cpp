// SPDX-License-Identifier: Apache-2.0
// The thread pool, made to run under a thread sanitizer: plain data handed from phase to phase is
// right only if barrier and join order it; several callers; more threads than CPUs.
#include "cpu/threads.h"

#include <cstdio>
#include <thread>
#include <vector>

namespace {

using ey::cpu::run_team;
using ey::cpu::Team;

struct Shared {
  std::vector<long> first, second;  // one element a thread, plain memory
};

// Phase 1 writes an element; phase 2 reads its neighbour's.
void two_phases(void* context, Team& team, int thread) {
  auto& shared = *static_cast<Shared*>(context);
  shared.first[thread] = thread + 1;
  team.barrier();
  shared.second[thread] = shared.first[(thread + 1) % team.size()];
  team.barrier();
  shared.first[thread] = 0;
}

bool run_once(int threads) {
  Shared shared{std::vector<long>(threads, -1), std::vector<long>(threads, -1)};
  run_team(threads, two_phases, &shared);
  for (int i = 0; i < threads; ++i) {
    if (shared.first[i] != 0 || shared.second[i] != (i + 1) % threads + 1) return false;
  }
  return true;
}

}  // namespace

int main() {
  int passed = 0, failed = 0;
  const auto count = [&](bool ok) { ok ? ++passed : ++failed; };
  for (const int threads : {1, 2, 3, 32}) {
    for (int i = 0; i < 200; ++i) count(run_once(threads));
  }
  std::vector<std::thread> callers;
  std::vector<int> right(4, 0);
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&right, c] {
      for (int i = 0; i < 100; ++i) right[c] += run_once(1 + (c + i) % 4);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const int r : right) count(r == 100);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
