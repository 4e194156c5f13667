// SPDX-License-Identifier: Apache-2.0
#include "signal.h"

#include <sched.h>
#include <time.h>

#include "../futex.h"

namespace ey::handoff {
namespace {

constexpr int64_t kSecond = 1'000'000'000;

}  // namespace

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * kSecond + t.tv_nsec;
}

void Signal::advance() {
  // seq_cst on both sides: either the waiter sees the new value, or we see the waiter.
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) futex_wake_all(value_);
}

bool Signal::wait_while(uint32_t value, int64_t timeout_ns, int64_t spin_ns) {
  const int64_t begin = now_ns();
  const int64_t end = timeout_ns < INT64_MAX - begin ? begin + timeout_ns : INT64_MAX;
  while (now_ns() - begin < spin_ns) {
    for (int i = 0; i < 32; ++i) {
      if (value_.load(std::memory_order_acquire) != value) return true;
      relax();
    }
    sched_yield();  // where there are more threads than cores, whoever is waited for gets this one
  }
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  bool changed = true;
  while (value_.load(std::memory_order_seq_cst) == value) {
    const int64_t left = end - now_ns();
    if (left <= 0) {
      changed = false;
      break;
    }
    const timespec time{static_cast<time_t>(left / kSecond), static_cast<long>(left % kSecond)};
    futex_wait(value_, value, &time);
  }
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
  return changed;
}

}  // namespace ey::handoff
