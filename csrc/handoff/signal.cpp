// SPDX-License-Identifier: Apache-2.0
#include "signal.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>

namespace ey::handoff {
namespace {

constexpr int64_t kSecond = 1'000'000'000;

uint32_t* address_of(std::atomic<uint32_t>& word) { return reinterpret_cast<uint32_t*>(&word); }

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

}  // namespace

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * kSecond + t.tv_nsec;
}

void Signal::advance() {
  // seq_cst on both sides: either the waiter sees the new value, or we see the waiter.
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) {
    syscall(SYS_futex, address_of(value_), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }
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
    syscall(SYS_futex, address_of(value_), FUTEX_WAIT_PRIVATE, value, &time, nullptr, 0);
  }
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
  return changed;
}

}  // namespace ey::handoff
